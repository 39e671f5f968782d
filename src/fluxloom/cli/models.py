"""``fluxloom models``"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from fluxloom.cli.options import Json
from fluxloom.cli.output import print_json, print_table

if TYPE_CHECKING:
    from fluxloom.core.specs import ModelSpec

app = typer.Typer(add_completion=False)


@app.command()
def models(json: Json = False) -> None:
    """List the members of the family and their defaults."""
    from dataclasses import asdict

    from fluxloom.core.specs import MODELS

    if json:
        facts = [
            {
                "name": spec.name,
                "title": spec.title,
                "embedded": spec.embedded,
                "licence": spec.licence,
                "source": None if spec.source is None else {**asdict(spec.source), "page": spec.source.page},
                "base": spec.base,
                "control": spec.control,
                "transformer": asdict(spec.transformer),
                "text_length": spec.text_length,
                "preferred_sizes": spec.preferred_sizes,
                "tasks": {name: asdict(row) for name, row in spec.tasks.items()},
            }
            for spec in MODELS.values()
        ]
        print_json({"models": facts})
        return
    rows = [
        (
            spec.name,
            task,
            str(row.steps),
            "-" if row.guidance is None else f"{row.guidance:g}",
            f"{row.true_cfg:g}",
            "x".join(map(str, row.size)),
            _weights(spec),
            spec.licence,
        )
        for spec in MODELS.values()
        for task, row in spec.tasks.items()
    ]
    print_table(("model", "task", "steps", "guidance", "true cfg", "size", "weights", "licence"), rows)


def _weights(spec: ModelSpec) -> str:
    """Where they come from."""
    if spec.source is None:
        return "in the package" if spec.embedded else "yours"
    return f"{spec.source.repo}{' (gated)' if spec.source.gated else ''}"
