"""``fluxloom replay``"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fluxloom.cli import drawing, options
from fluxloom.cli.output import Destination, print_facts, print_json
from fluxloom.cli.progress import Watch
from fluxloom.errors import BadInput

app = typer.Typer(add_completion=False)


@app.command()
def replay(
    picture: Annotated[
        Path, typer.Argument(help="A picture with its receipt inside, or a session.", show_default=False)
    ],
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--input", help="What it was made from, a picture or a LoRA, where it is not beside it.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME", help="Model reference; default: as in the receipt.")
    ] = None,
    variant: options.Variant = None,
    base: options.Base = None,
    offline: options.Offline = False,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    out: options.Out = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Draw a picture again from its receipt, with as many threads as then, and compare: exit code 1 if it comes out
    different. Saved with --out."""
    if picture.is_dir():
        if out is not None:
            raise BadInput("got --out with a session, allowed with a picture, try `fluxloom session export`")
        from fluxloom.cli.session import replay as whole

        whole(picture, None, inputs, model, variant, base, offline, device, dtype, quiet, json)
        return
    place = Destination.at(out, force)
    with Watch("drawing again", quiet=quiet) as watch:
        from fluxloom.infer.receipt import read_receipt

        receipt = read_receipt(picture)
        reference = model or str(receipt.data["model"].get("name"))
        loom = drawing.load(
            reference, device, None, dtype, variant=variant, base=base, offline=offline, progress=watch.part
        )
        if out is not None:
            place.probe()
        found = loom.replay(picture, inputs or (), watch.step)
    facts: dict[str, Any] = {"picture": str(picture), "verdict": found.verdict, "max_difference": found.max_difference}
    facts["psnr"] = None if math.isinf(found.psnr) else round(found.psnr, 2)
    facts["causes"] = list(found.causes)
    if out is not None:
        title = str(receipt.data["request"]["prompt"])
        facts["path"] = str(found.result.save(place.path(title, found.result.seed, many=False)))
    (print_json if json else print_facts)(facts)
    if found.verdict != "bit-exact":
        raise typer.Exit(1)
