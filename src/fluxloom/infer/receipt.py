"""Receipts: what made a picture, written into its file, so that it can be drawn again and checked.

A receipt (schema 1) is JSON:

    id          sha256 of all the rest in canonical form (sorted keys, no spaces, ASCII)
    fluxloom    version
    model       {name, content}: the row of MODELS, and the hash of the weight files
    request     every field as it was resolved, with the ``index`` of this picture among n and its own ``seed``; its
                ``loras`` are [{file, sha256, weight, blocks}], and of PEFT's folders the hash of their ``config``
    inputs      [{role, pixels, size, file, receipt}]: hash of the decoded pixels, file name as a hint, parent's id; of
                a picture that stands for words also its ``weight``; a finisher's own have its name as their role
    pixels      hash of the picture as it was handed out, before a file format touched it
    finish      [{name, settings, report}]: what was done to the picture after it was drawn, if anything
    warnings    what the user was told
    translations    {text: what was read in its place}, where a text was translated
    versions, machine    libraries; device, dtype, threads, processor, platform; ``batch``, how many pictures were
                drawn together, where it was more than one
    seconds, created     wall time, with that of whoever watched; UTC

In the file it travels as ``{"receipt": ..., "decoded": hash, "quality": ...}``: the hash of the pixels that this very
file decodes to (JPEG does not give back what went in), and the quality it was saved with. A receipt finds changes;
it is no signature: what was forged on purpose comes out when the picture is drawn again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from fluxloom.errors import ReceiptError
from fluxloom.infer import files, pictures

SCHEMA = 1
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "fluxloom": str,
    "model": dict,
    "request": dict,
    "inputs": list,
    "pixels": str,
    "warnings": list,
    "versions": dict,
    "machine": dict,
    "seconds": (int, float),
    "created": str,
}


@dataclass(frozen=True)
class Receipt:
    """One receipt; ``data`` is the JSON described above, without the id."""

    data: Mapping[str, Any]

    @property
    def id(self) -> str:
        return "sha256:" + hashlib.sha256(_canonical(self.data).encode()).hexdigest()

    @property
    def pixels(self) -> str:
        """Hash of the picture as it was drawn."""
        return str(self.data["pixels"])

    @property
    def seed(self) -> int:
        """Seed of this picture."""
        return int(self.data["request"]["seed"])

    def to_dict(self) -> dict[str, Any]:
        """The whole JSON, id included."""
        return {"id": self.id, **self.data}

    @classmethod
    def from_dict(cls, found: Any) -> Receipt:
        """Read a receipt back. Raises ReceiptError where its id or form is not right."""
        if not isinstance(found, dict):
            raise ReceiptError("got a damaged receipt: it is no JSON object")
        if found.get("schema") != SCHEMA:
            raise ReceiptError(f"got a receipt of schema {found.get('schema')!r}, allowed {SCHEMA}, try updating")
        data = {key: value for key, value in found.items() if key != "id"}
        wrong = [key for key, kind in _FIELDS.items() if not isinstance(data.get(key), kind)]
        receipt = cls(data)
        if wrong or receipt.id != found.get("id"):
            raise ReceiptError(f"got a damaged receipt: {', '.join(wrong) or 'its id'} is not right")
        return receipt


@dataclass(frozen=True)
class Verdict:
    """What a file says of itself.

    state: ``intact`` (receipt and pixels belong together), ``changed`` (the pixels are not those the receipt was
    written with), ``damaged`` (a receipt that cannot be read) or ``none`` (a foreign picture, or a stripped one).
    """

    state: Literal["intact", "changed", "damaged", "none"]
    receipt: Receipt | None
    detail: str
    quality: files.Quality | None = None


def verify(path: str | os.PathLike[str]) -> Verdict:
    """Compare a file with the receipt inside it. Raises BadInput where it is no readable picture."""
    found, rgb = pictures.read(path)
    return examine(found, rgb)


def read_receipt(path: str | os.PathLike[str]) -> Receipt:
    """The receipt of an intact file. Raises ReceiptError saying what is wrong with any other."""
    return intact(path, verify(path))


def intact(path: str | os.PathLike[str], verdict: Verdict) -> Receipt:
    """The receipt of an intact verdict on a file; otherwise ReceiptError."""
    if verdict.state != "intact" or verdict.receipt is None:
        raise ReceiptError(f"got {os.fspath(path)!r}: {verdict.detail}, try the file as fluxloom saved it")
    return verdict.receipt


def examine(found: Image.Image, rgb: Image.Image) -> Verdict:
    """:func:`verify` for a picture that is already decoded: as PIL found it, and its RGB pixels."""
    note = files.note_in(found)
    if note is None:
        return Verdict("none", None, "it carries no fluxloom receipt")
    try:
        envelope = json.loads(note)
        receipt = Receipt.from_dict(envelope["receipt"])
        decoded, quality = envelope["decoded"], envelope["quality"]
    except ReceiptError as error:
        return Verdict("damaged", None, str(error))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return Verdict("damaged", None, f"its receipt is damaged ({error})")
    if decoded != pictures.pixel_hash(rgb):
        return Verdict("changed", receipt, "its pixels were changed since the receipt was written")
    if getattr(found, "n_frames", 1) > 1:
        return Verdict("changed", receipt, "it has become an animation since the receipt was written")
    return Verdict("intact", receipt, "receipt and pixels belong together", quality)


def save(
    picture: Image.Image, path: str | os.PathLike[str], receipt: Receipt | None, quality: files.Quality | None
) -> Path:
    """Write a picture whole or not at all, with its receipt inside unless None.

    Raises ReceiptError where the picture is not the one that the receipt tells of.
    """
    form = files.format_of(path)
    note = None
    if receipt is not None:
        if pictures.pixel_hash(picture) != receipt.pixels:
            raise ReceiptError("got a picture changed since it was drawn, allowed as drawn, try saving without receipt")
        decoded = pictures.pixel_hash(files.through(picture, form, quality))
        note = _canonical({"receipt": receipt.to_dict(), "decoded": decoded, "quality": quality})
    return files.write(path, files.encode(picture, form, note, quality))


@cache
def versions() -> dict[str, str]:
    """Versions of what a picture's numbers go through."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "pillow", "opencv-python-headless", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a bundle without metadata
            found[name] = "unknown"
    return found


@cache
def processor() -> str:
    """Model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def system() -> str:
    """Operating system and architecture."""
    return f"{sys.platform}-{platform.machine()}"


def _canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
