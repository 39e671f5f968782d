"""``fluxloom info``"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fluxloom.cli.options import Json
from fluxloom.cli.output import print_facts, print_json

app = typer.Typer(add_completion=False)


@app.command()
def info(
    picture: Annotated[
        Path | None, typer.Argument(help="A picture, to show how it was made.", show_default="the installation")
    ] = None,
    json: Json = False,
) -> None:
    """Show how a picture was made, or what this installation consists of."""
    facts = _installation() if picture is None else _picture(picture)
    (print_json if json else print_facts)(facts)


def _picture(path: Path) -> dict[str, Any]:
    from fluxloom.infer.pictures import read
    from fluxloom.infer.receipt import examine

    found, rgb = read(path)
    verdict = examine(found, rgb)
    receipt = verdict.receipt.to_dict() if verdict.receipt else None
    return {
        "picture": str(path),
        "size": f"{rgb.width}x{rgb.height}",
        "state": verdict.state,
        "detail": verdict.detail,
        "receipt": receipt,
    }


def _installation() -> dict[str, Any]:
    import torch

    import fluxloom
    from fluxloom.infer.receipt import processor, system, versions
    from fluxloom.weights.load import ASSETS, read_card

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fluxloom": fluxloom.__version__,
        "versions": versions(),
        "system": system(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "nano": read_card(ASSETS / "nano"),
    }
