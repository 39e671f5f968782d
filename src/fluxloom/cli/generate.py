"""``fluxloom generate``"""

from __future__ import annotations

from typing import Annotated

import typer

from fluxloom.cli import drawing, options

app = typer.Typer(add_completion=False)


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to draw, in English or Chinese.", show_default=False)
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
    init: options.Init = None,
    strength: options.Strength = None,
    mask: options.Mask = None,
    expand: options.Expand = None,
    control: options.Control = None,
    control_ready: options.ControlReady = False,
    control_model: options.ControlModel = None,
    image: options.Images = None,
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
    receipt: options.Receipt = True,
    preview: options.Preview = False,
    preview_decoder: options.PreviewDecoder = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Draw a picture from a prompt."""
    given = locals()
    drawing.lend(given)
    drawing.draw(given, verb="drawing", prompt=prompt, pictures=[(path, "image") for path in image or ()])
