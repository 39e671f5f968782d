"""``fluxloom convert``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxloom.cli.options import Json, Quiet
from fluxloom.cli.output import print_facts, print_json

if TYPE_CHECKING:
    from fluxloom.weights.convert import Report
    from fluxloom.weights.identify import Component

app = typer.Typer(add_completion=False)

_WORST = 5


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint: a file, or a folder.")],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="A .safetensors or .gguf file; with --to diffusers also a folder.")
    ],
    to: Annotated[
        str,
        typer.Option("--to", help="official, diffusers, bf16, fp8, int8, nf4, gguf-q8_0 or gguf-q4_k.", metavar="FORM"),
    ],
    component: Annotated[
        str | None, typer.Option("--component", help="Which part of the checkpoint.", show_default="transformer")
    ] = None,
    variant: Annotated[
        str | None, typer.Option("--variant", help="Which member it is, to be noted in the file.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite DST.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write a checkpoint in other names or another storage format, and tell what each layer lost by it."""
    from fluxloom.cli import interrupts
    from fluxloom.cli.progress import Watch
    from fluxloom.errors import BadInput
    from fluxloom.weights.checkpoint import open_checkpoint
    from fluxloom.weights.convert import convert as convert_to
    from fluxloom.weights.identify import choose, identify

    if destination.exists() and not force:
        raise BadInput(f"got {destination}, which exists, allowed a new name, try another or --force")
    if destination.resolve() == source.resolve():
        raise BadInput(f"got {destination} for both, allowed another file than the one that is read, try a new name")
    checkpoint = open_checkpoint(source)
    part = _part(identify(checkpoint), component)
    one = len(part.candidates) == 1 or variant is not None
    member = choose(part, variant).name if one else None
    interrupts.unwind()
    with Watch("converting", quiet=quiet) as watch:
        report = convert_to(checkpoint, part, destination, to, member, watch.count)
    before = sum(checkpoint[name].nbytes for group in part.names.values() for name in group)
    _tell(report, before, member, json)


def _part(parts: list[Component], kind: str | None) -> Component:
    """The part that is meant: the one named, else the transformer, else the only one."""
    from fluxloom.errors import BadInput

    found = {part.kind: part for part in reversed(parts)}
    if kind is None:
        kind = "transformer" if "transformer" in found or len(found) > 1 else next(iter(found))
    if kind not in found:
        raise BadInput(f"got --component {kind}, allowed {', '.join(found)}, try one of them")
    return found[kind]


def _tell(report: Report, before: int, member: str | None, json: bool) -> None:
    if json:
        print_json({**report.to_dict(), "member": member})
        return
    facts: dict[str, Any] = {
        "path": report.path,
        "member": member,
        "size": f"{report.nbytes / 1e6:.1f} MB, from {before / 1e6:.1f} MB",
    }
    if report.errors:
        facts["relative RMS error"] = {
            "mean": f"{report.to_dict()['mean']:.4%}",
            **{name: f"{error:.4%}" for name, error in report.worst(_WORST).items()},
        }
    print_facts(facts)
