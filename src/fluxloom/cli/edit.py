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
    instruction: Annotated[
        str | None, typer.Argument(help="What to change, in English or Chinese.", show_default=False)
    ] = None,
    model: options.Model = "nano",
    variant: options.Variant = None,
    base: options.Base = None,
    offline: options.Offline = False,
    template: options.Template = None,
    slot: options.Slots = None,
    templates: options.Templates = None,
    enhance: options.Enhance = None,
    negative: options.Negative = "",
    seed: options.Seed = None,
    n: options.Number = 1,
    size: options.Size = None,
    quality: options.Quality = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    true_cfg: options.TrueCfg = None,
    solver: options.Solver = None,
    reference: options.References = None,
    lock: options.Lock = "auto",
    mask: options.Within = None,
    box: options.Box = None,
    best_of: options.BestOf = None,
    max_drift: options.MaxDrift = None,
    lora: options.Loras = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    gpus: options.Gpus = 1,
    executor: options.Executor = "auto",
    linears: options.Linears = None,
    attention: options.Attention = "auto",
    vram: options.Vram = None,
    out: options.Out = None,
    force: options.Force = False,
    session: options.Session = None,
    receipt: options.Receipt = True,
    preview: options.Preview = False,
    preview_decoder: options.PreviewDecoder = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Edit a picture by instruction; what is not asked to change stays."""
    given = locals()
    drawing.lend(given)
    if session is not None:
        from fluxloom.cli.session import shortcut

        shortcut(given, session, image, instruction or "")
        return
    pictures = [(path, "context") for path in (image, *(reference or ()))]
    drawing.draw(given, verb="editing", prompt=instruction, pictures=pictures, picture=image)
