"""``fluxloom generate``"""

from __future__ import annotations

from typing import Annotated

import typer

from fluxloom.cli import drawing, options

app = typer.Typer(add_completion=False)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw, in English or Chinese.", show_default=False)],
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
    init: options.Init = None,
    strength: options.Strength = None,
    mask: options.Mask = None,
    expand: options.Expand = None,
    control: options.Control = None,
    control_ready: options.ControlReady = False,
    control_model: options.ControlModel = None,
    image: options.Images = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    out: options.Out = None,
    force: options.Force = False,
    receipt: options.Receipt = True,
    preview: options.Preview = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Draw a picture from a prompt."""
    fields = {
        "prompt": prompt,
        "negative": negative,
        "seed": seed,
        "n": n,
        "steps": steps,
        "guidance": guidance,
        "true_cfg": true_cfg,
        "solver": solver,
        "init": init,
        "strength": strength,
        "mask": mask,
        "expand": drawing.margins(expand),
        "control": control,
        "control_ready": control_ready,
        "control_model": control_model,
    }
    drawing.draw(
        fields,
        verb="drawing",
        pictures=[(path, "image") for path in image or ()],
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
