"""``fluxloom train``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxloom.cli.output import Destination
from fluxloom.errors import BadInput

app = typer.Typer(add_completion=False)
PARTS = ("vocabulary", "autoencoder", "train", "refine", "distil")


@app.callback()
def train() -> None:
    """Train a model by one of the recipes."""


@app.command()
def nano(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for weights and logs.", show_default=False)],
    part: Annotated[str, typer.Option("--part", help=f"{', '.join(PARTS)} or all, in this order.")] = "all",
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.01, help="End by the clock, each part.", show_default="by steps")
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option("--start-from", help="Folder of compact weights to go on from.", exists=True)
    ] = None,
    toy: Annotated[bool, typer.Option("--toy", help="Tiny sizes: seconds on a processor.")] = False,
) -> None:
    """Train the embedded model on the illustrated world. On several GPUs: `torchrun -m fluxloom.recipes.nano`."""
    if part not in (*PARTS, "all"):
        raise BadInput(f"got --part {part!r}, allowed {', '.join(PARTS)} or all, try all")
    from fluxloom.recipes.nano import main

    Destination(out).probe()
    words = ["--out", str(out)]
    words += ["--minutes", str(minutes)] if minutes is not None else []
    words += ["--start-from", str(start_from)] if start_from is not None else []
    words += ["--toy"] if toy else []
    for name in PARTS if part == "all" else (part,):
        main([name, *words])
