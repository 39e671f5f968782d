"""``fluxloom templates``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxloom.cli.options import Json
from fluxloom.cli.output import print_facts, print_json, print_table
from fluxloom.errors import BadInput

if TYPE_CHECKING:
    from fluxloom.edit.enhance import Language
    from fluxloom.edit.templates import Template

app = typer.Typer(add_completion=False)


@app.command()
def templates(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.", show_default="all")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Only those of this task: generate or edit.")] = None,
    lang: Annotated[str, typer.Option("--lang", help="Language of titles and texts: en or zh.")] = "en",
    own: Annotated[
        Path | None,
        typer.Option("--templates", envvar="FLUXLOOM_TEMPLATES", metavar="FILE", help="Templates of your own (TOML)."),
    ] = None,
    json: Json = False,
) -> None:
    """List prompt templates, or show one: its text, its slots and what it suits."""
    from fluxloom.edit.enhance import spoken
    from fluxloom.edit.templates import TASKS, library

    language = spoken(lang)
    if task not in (None, *TASKS):
        raise BadInput(f"got --task {task!r}, allowed {', '.join(TASKS)}, try {TASKS[0]}")
    known = [one for one in library(own).values() if task in (None, one.task)]
    found = [one for one in known if name in (None, one.name)]
    if not found:
        from fluxloom.cli.settings import nearest

        near = nearest(name or "", [one.name for one in known]) or known[0].name
        raise BadInput(f"got template {name!r}, allowed what `fluxloom templates` lists, try {near}")
    if json:
        print_json({"templates": [one.to_dict() for one in found]})
    elif name is not None:
        for one in found:
            print_facts(_facts(one, language))
    else:
        rows = [
            (one.task, one.name, one.title[language], ", ".join(one.gaps), "yes" if one.nano else "no") for one in found
        ]
        print_table(("task", "name", "title", "slots", "for nano"), rows)


def _facts(template: Template, language: Language) -> dict[str, Any]:
    """One template for people."""
    slots = {
        name: "; ".join([slot.allowed, *([f"{slot.default[language]} unless given"] if slot.default else [])])
        for name, slot in template.slots.items()
    }
    settings = (f"--{option.replace('_', '-')} {value}" for option, value in template.settings.items())
    return {
        "template": f"{template.name} ({template.title[language]})",
        "task": template.task,
        "text": template.text[language],
        "slots": slots,
        "models": list(template.models),
        "worth trying": " ".join(settings),
    }
