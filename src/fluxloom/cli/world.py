"""``fluxloom world``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxloom.cli import options
from fluxloom.cli.output import Destination
from fluxloom.cli.progress import Watch

app = typer.Typer(add_completion=False)
COLUMNS = 6


@app.callback()
def world() -> None:
    """Look at the illustrated world, from which nano has learned."""


@app.command()
def preview(
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of the random scenes.")] = 1,
    rows: Annotated[int, typer.Option("--rows", min=1, max=100, help="Rows of scenes, over an edit of each kind.")] = 4,
    out: Annotated[Path, typer.Option("--out", "-o", help="File: .png, .jpg or .webp.")] = Path("world.webp"),
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw a contact sheet: random scenes with their captions, and edits with their instructions."""
    place = Destination.at(out, force)
    with Watch("drawing the world", quiet=quiet):
        from fluxloom.infer.files import encode, format_of, write
        from fluxloom.world.preview import contact_sheet

        place.probe()
        path = place.path("world", seed, many=False)
        sheet = contact_sheet(seed, scenes=COLUMNS * rows, columns=COLUMNS)
        write(path, encode(sheet, format_of(path)))
    print(path)
