"""``fluxloom info``"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fluxloom.cli.options import Json, Offline
from fluxloom.cli.output import print_facts, print_json

app = typer.Typer(add_completion=False)

_WEIGHTS = (".safetensors", ".sft", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@app.command()
def info(
    reference: Annotated[
        str | None,
        typer.Argument(
            metavar="[REF]",
            help="A picture, to show how it was made; or a model, as --model takes it: a file, a folder, a member's "
            "name, or owner/name[@revision][:file] on a hub.",
            show_default="the installation",
        ),
    ] = None,
    hash: Annotated[bool, typer.Option("--hash", help="Hash weights of a gigabyte and more, too.")] = False,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Show how a picture was made, what a model is and what of it would be fetched, or what this installation consists
    of."""
    facts = _installation() if reference is None else _about(reference, hash, offline)
    (print_json if json else print_facts)(facts)


def _about(reference: str, hashed: bool, offline: bool) -> dict[str, Any]:
    path = Path(reference)
    if path.is_dir() or (path.suffix.lower() in _WEIGHTS and (path.exists() or ":" not in reference)):
        return _checkpoint(path, hashed)
    if path.exists() or (path.suffix.lower() in _PICTURES and ":" not in reference):
        return _picture(path)
    from fluxloom.cli.progress import Watch
    from fluxloom.weights.survey import survey

    with Watch(f"asking for {reference}"):
        return survey(reference, offline=offline)


def _checkpoint(path: Path, hashed: bool) -> dict[str, Any]:
    from fluxloom.cli.progress import Watch
    from fluxloom.weights.checkpoint import open_checkpoint
    from fluxloom.weights.describe import HASH_BYTES, describe
    from fluxloom.weights.load import digest

    checkpoint = open_checkpoint(path)
    single = checkpoint.files[0] if len(checkpoint.files) == 1 else None
    sha256 = None
    if single is not None and (hashed or single.stat().st_size < HASH_BYTES):
        with Watch("hashing"):
            sha256 = digest(single)
    return {"checkpoint": str(path), **describe(checkpoint, sha256)}


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
