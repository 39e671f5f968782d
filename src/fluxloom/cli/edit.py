"""``fluxloom edit``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxloom.cli import drawing, options

app = typer.Typer(add_completion=False)


@app.command()
def edit(
    image: Annotated[Path, typer.Argument(help="The picture to edit.", show_default=False)],
    instruction: Annotated[str, typer.Argument(help="What to change, in English or Chinese.", show_default=False)],
    model: options.Model = "nano",
    variant: options.Variant = None,
    offline: options.Offline = False,
    negative: options.Negative = "",
    seed: options.Seed = None,
    n: options.Number = 1,
    size: options.Size = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    true_cfg: options.TrueCfg = None,
    solver: options.Solver = None,
    reference: options.References = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    out: options.Out = None,
    force: options.Force = False,
    receipt: options.Receipt = True,
    preview: options.Preview = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Edit a picture by instruction; what is not asked to change stays."""
    fields = {
        "prompt": instruction,
        "negative": negative,
        "seed": seed,
        "n": n,
        "steps": steps,
        "guidance": guidance,
        "true_cfg": true_cfg,
        "solver": solver,
    }
    drawing.draw(
        fields,
        verb="editing",
        pictures=[(path, "context") for path in (image, *(reference or ()))],
        model=model,
        variant=variant,
        offline=offline,
        size=size,
        device=device,
        threads=threads,
        out=out,
        force=force,
        receipt=receipt,
        preview=preview,
        quiet=quiet,
        json=json,
    )
