"""Draw a picture again from the receipt in its file, and say whether it came out the same."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from fluxloom.errors import BadInput, ReceiptError
from fluxloom.infer import files, pictures
from fluxloom.infer.control import SUFFIX
from fluxloom.infer.finish import masks, remake
from fluxloom.infer.loras import Lora, content_of, is_lora_folder
from fluxloom.infer.pipeline import Pipeline, Preview
from fluxloom.infer.receipt import Receipt, examine, intact
from fluxloom.infer.request import Picture, Reference, Request, Result
from fluxloom.weights.load import digest

_SAME_NAME = (
    "prompt", "negative", "strength", "width", "height", "steps", "guidance", "true_cfg", "solver", "shift",
    "text_length", "seed",
)  # fmt: skip
_ROLES = ("init", "mask", "control")  # of inputs that are fields of a request
_REFERENCES = ("context", "image")  # of those that are references; all others are a finisher's
# Fields that receipts of version 0.1.0 lack.
_SINCE = {
    "prompt_t5": None, "expand": None, "control_ready": False, "written": None, "quality": None, "tolerance": None,
}  # fmt: skip


@dataclass(frozen=True)
class Replay:
    """The new drawing beside the old.

    verdict         ``bit-exact`` where the new drawing, saved as the file was, has the very pixels of the file;
                    else ``different``
    max_difference  largest difference of a colour value, 0 to 255, between those two
    psnr            in dB over all their pixels; infinite where nothing differs
    causes          what differs between then and now and may explain it
    """

    result: Result
    receipt: Receipt
    verdict: Literal["bit-exact", "different"]
    max_difference: int
    psnr: float
    causes: tuple[str, ...]


def replay(
    pipeline: Pipeline,
    path: str | os.PathLike[str],
    inputs: Sequence[Picture] = (),
    observe: Callable[[Preview], None] | None = None,
) -> Replay:
    """Draw the picture in a file again.

    What it was made from is looked for among ``inputs``, then beside the file: pictures by the hash of their pixels,
    LoRAs (.safetensors, or folders of PEFT) and a depth model (.onnx) by that of the file. Where only a lossy copy of a
    drawn input is found, the input is drawn again first from its own receipt. Raises ReceiptError where the file is not
    an intact picture of this model or an input is missing.
    """
    found, rgb = pictures.read(path)
    verdict = examine(found, rgb)
    receipt = intact(path, verdict)
    result = _redraw(pipeline, receipt, [*inputs, *_beside(Path(path))], observe)
    if result.image.size != rgb.size:
        name, drawn = os.fspath(path), result.image.size
        raise ReceiptError(f"got {name!r} of {rgb.size} pixels, allowed {drawn}, as its receipt draws, try another")
    form = found.format if found.format in ("JPEG", "WEBP") else "PNG"  # other formats, too, lose nothing
    largest, psnr = difference(rgb, files.through(result.image, form, verdict.quality))
    causes = tuple(_causes(receipt, result.receipt))
    return Replay(result, receipt, "different" if largest else "bit-exact", largest, psnr, causes)


def difference(first: Image.Image, second: Image.Image) -> tuple[int, float]:
    """Largest difference of a value and PSNR in dB of two RGB pictures of one size."""
    delta = np.asarray(first).astype(np.int16) - np.asarray(second)
    mean = float(np.square(delta, dtype=np.int32).mean())
    return int(np.abs(delta).max()), math.inf if mean == 0 else 10 * math.log10(255**2 / mean)


def equal(first: Image.Image, second: Image.Image) -> float:
    """Share of the values of two RGB pictures of one size that are the same."""
    return float((np.asarray(first) == np.asarray(second)).mean())


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """An entry of a receipt's inputs."""

    role: str
    pixels: str
    size: list[int]
    file: str | None
    receipt: str | None
    weight: float = 1.0

    def __post_init__(self) -> None:
        read: tuple[object, object] = (self.pixels, self.size)  # whatever the file said
        match read:
            case (str(), [int(), int()]):
                return
        raise TypeError("an input is a role, the hash of its pixels and two sides")


@contextmanager
def _threads(count: object) -> Iterator[None]:
    """Compute with as many threads as then, where there are as many cores: convolutions sum in another order with
    another number of threads (transformers, measured, do not)."""
    before = torch.get_num_threads()
    if isinstance(count, int) and 1 <= count <= (os.cpu_count() or 1):
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _redraw(
    pipeline: Pipeline,
    receipt: Receipt,
    candidates: list[Picture],
    observe: Callable[[Preview], None] | None = None,
) -> Result:
    name, own = receipt.data["model"].get("name"), pipeline.runtime.spec.name
    if name != own:
        raise ReceiptError(f"got a picture drawn by {name!r}, allowed one by the loaded {own!r}, try loading {name!r}")
    was: dict[str, Any] = receipt.data["request"]
    try:
        asked: dict[str, Any] = {field: was[field] for field in _SAME_NAME}
        wanted = [_Wanted(**entry) for entry in receipt.data["inputs"]]
        asked["loras"] = [_lora(entry, candidates) for entry in was.get("loras", [])]
        model = was.get("control_model")
        asked["control_model"] = None if model is None else _depth_model(model["file"], model["sha256"], candidates)
    except (KeyError, TypeError, ValueError) as error:
        raise ReceiptError(f"got a receipt without all its parts ({error}), allowed whole ones, try another") from error
    asked |= {field: was.get(field, default) for field, default in _SINCE.items()}
    told = receipt.data.get("finish", [])
    sources = [*candidates, *(mask for entry in wanted if entry.role == "mask" for mask in masks(told, entry.size))]
    found = [(entry, _locate(pipeline, entry, sources)) for entry in wanted]
    asked |= {entry.role: picture for entry, picture in found if entry.role in _ROLES}
    asked["references"] = tuple(
        Reference(picture, entry.role, entry.weight) for entry, picture in found if entry.role in _REFERENCES
    )
    rest = [(entry.role, picture) for entry, picture in found if entry.role not in (*_ROLES, *_REFERENCES)]
    finishers = remake(told, pipeline.makers, rest)
    if sum(reference.role == "context" for reference in asked["references"]) > 1:
        asked["positions"] = was.get("positions")
    for text, english in _translations(receipt).items():
        pipeline.runtime.reader.recall(text, english)
    with _threads(receipt.data["machine"].get("threads")):
        return pipeline.run(Request(**asked), observe, finishers)[0]


def _translations(receipt: Receipt) -> dict[str, str]:
    """What was read in place of texts: a translator asked again might answer otherwise."""
    found: object = receipt.data.get("translations", {})
    match found:
        case dict() if all(isinstance(text, str) for text in (*found, *found.values())):
            return dict(found)
    raise ReceiptError("got a receipt whose translations are no texts, allowed texts, try another")


def _beside(path: Path) -> list[Path]:
    wanted = (*files.FORMATS, SUFFIX, ".safetensors")
    return sorted(other for other in path.parent.iterdir() if other.suffix.lower() in wanted or is_lora_folder(other))


def _depth_model(file: str, sha256: str, candidates: list[Picture]) -> Path:
    """The depth model of a receipt, by the hash of its file."""
    for candidate in candidates:
        if isinstance(candidate, (str, os.PathLike)):
            path = Path(candidate)
            if path.suffix.lower() == SUFFIX and path.is_file() and digest(path) == sha256:
                return path
    raise ReceiptError(
        f"got a picture made with the depth model {file} (sha256 {sha256[:12]}…), which is not beside it, allowed with "
        "that file, try giving it as input"
    )


def _lora(entry: dict[str, Any], candidates: list[Picture]) -> Lora:
    """A LoRA of a receipt, by the hash of its file; those of the same name are looked at first, as others may be
    checkpoints of many gigabytes."""
    name, wanted = entry["file"], (entry["sha256"], entry.get("config"))
    paths = [Path(one) for one in candidates if isinstance(one, (str, os.PathLike))]
    files_ = [path for path in paths if path.suffix.lower() == ".safetensors" or is_lora_folder(path)]
    for path in sorted(files_, key=lambda path: path.name != name):
        with suppress(BadInput):  # one that cannot be read is not it
            if content_of(path) == wanted:
                return Lora(path, entry["weight"], dict(entry["blocks"]))
    raise ReceiptError(
        f"got a picture made with the LoRA {name} (sha256 {str(wanted[0])[:12]}…), which is not beside it, allowed "
        "with that file, try giving it as input"
    )


def _locate(pipeline: Pipeline, wanted: _Wanted, candidates: list[Picture]) -> Picture:
    """The input picture of a receipt: the very pixels, or a drawn picture whose receipt can bring them back."""
    lossy = []
    for candidate, found, rgb in _of_size(wanted.size, candidates):
        if pictures.pixel_hash(rgb) == wanted.pixels:
            return candidate
        parent = examine(found, rgb).receipt
        if parent is not None and parent.id == wanted.receipt and parent.pixels == wanted.pixels:
            lossy.append(parent)
    for parent in lossy:
        result = _redraw(pipeline, parent, candidates)
        if result.receipt.pixels == wanted.pixels:
            return result
    raise ReceiptError(
        f"got a picture made from {wanted.file or 'a picture'} with pixels {str(wanted.pixels)[:19]}…, which is not "
        "beside it, allowed with that picture, try giving it as input"
    )


def _of_size(size: list[int], candidates: list[Picture]) -> Iterator[tuple[Picture, Image.Image, Image.Image]]:
    """Candidates that can be read and have a size, decoded: as found, and in RGB."""
    for candidate in candidates:
        if isinstance(candidate, Result):
            found = rgb = candidate.image
        else:
            try:
                if sorted(pictures.size_of(candidate)) != sorted(size):  # as stored, perhaps lying on its side
                    continue
                found, rgb = pictures.read(candidate)
            except BadInput:
                continue
        if list(rgb.size) == size:
            yield candidate, found, rgb


def _causes(then: Receipt, now: Receipt) -> Iterator[str]:
    for name, key in (("fluxloom", "fluxloom"), ("weights", "model"), ("versions", "versions"), ("machine", "machine")):
        before, after = then.data[key], now.data[key]
        if isinstance(before, dict):
            for field in sorted(before.keys() | after.keys()):
                if before.get(field) != after.get(field):
                    yield f"{name} {field}: {before.get(field)} then, {after.get(field)} now"
        elif before != after:
            yield f"{name}: {before} then, {after} now"
