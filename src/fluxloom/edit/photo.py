"""Photographs: pixels at full resolution and depth, with all that their files hold besides."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fluxloom.edit import containers, tiff
from fluxloom.edit.containers import Kept
from fluxloom.errors import BadInput
from fluxloom.infer import files, pictures
from fluxloom.infer.receipt import Receipt

Pixels = NDArray[Any]  # uint8 or uint16 [H, W, 3]
FORMATS = {**files.FORMATS, ".tif": "TIFF", ".tiff": "TIFF"}
READABLE = (*FORMATS, ".bmp", ".gif", ".jpe", ".jfif")  # suffixes of what is looked for in folders
_GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I")


@dataclass(frozen=True, eq=False)
class Photo:
    """A picture as it stands in its file, upright.

    pixels  RGB, uint8 or uint16 [H, W, 3]
    alpha   [H, W] of the same type, where the file has transparency; it is kept aside and never edited
    kept    colour profile, EXIF, XMP, resolution and what else the file holds
    form    the format to save as: the file's own where it is JPEG, PNG, WebP or TIFF
    quality the tables of a JPEG, to save with the same
    notes   what of the file is another now, in sentences for the user
    """

    pixels: Pixels
    alpha: Pixels | None
    kept: Kept
    form: str
    quality: files.Quality | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Photo:
        """Raises BadInput for what is no whole single picture, or too small or large (see :func:`pictures.read`)."""
        with _reading(path) as (data, found):
            form = "JPEG" if found.format == "MPO" else str(found.format)
            if found.format != "MPO" and getattr(found, "n_frames", 1) > 1:
                frames = getattr(found, "n_frames", 1)
                raise BadInput(f"got {os.fspath(path)!r} of {frames} frames, allowed one, try saving the one to edit")
            found.load()  # finds out whether the file is whole
            turn = found.getexif().get(tiff.ORIENTATION, 1) if form == "PNG" else 1  # OpenCV turns a TIFF itself
            notes = [f"{form} is written as PNG"] if form not in FORMATS.values() else []
            if found.format == "MPO":
                notes.append("of several pictures in the file, only the first is kept")
            kept = containers.take(form, data, found).upright()
            if form == "TIFF" and kept.exif is None:
                notes.append("its tags are damaged or of a BigTIFF: all but profile and XMP are left out")
            if kept.exif is not None and tiff.thumbnail(kept.exif):
                notes.append("the small preview in its EXIF still shows the picture before the edit")
            if _is_deep(form, data, found):
                pixels, alpha = _deep(path, data, int(turn))
            else:
                pixels, alpha = _shallow(found)
        grey, profile = found.mode in _GREY, kept.icc
        if grey or found.mode in ("P", "PA", "CMYK"):
            was = "grey" if grey else "CMYK" if found.mode == "CMYK" else "its palette"
            notes.append(f"{was} has become RGB")
        if profile is not None and profile[16:20] != b"RGB ":
            kept = kept.without_profile()
            notes.append("its colour profile, which is not of RGB, is left out")
        quality = files.tables_of(found) if form == "JPEG" else None
        return cls(pixels, alpha, kept, form if form in FORMATS.values() else "PNG", quality, tuple(notes))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]

    def flat(self) -> Image.Image:
        """What a model sees: 8 bits, transparency laid over white."""
        rgb = _eight(self.pixels)
        if self.alpha is None:
            return Image.fromarray(rgb)
        return pictures.upright(Image.fromarray(np.dstack((rgb, _eight(self.alpha))), "RGBA"))

    def edited(self, before: Image.Image, after: Image.Image) -> Photo:
        """With the change from one flat 8-bit picture to another, both of its size.

        Where the two agree, every bit stays. Elsewhere deep pixels take the difference, so that their fine steps
        stay, with the new picture's value in their upper 8 bits; what lies under transparency is laid bare again.
        """
        old, new = np.asarray(before), np.asarray(after)
        where = (old != new).any(axis=-1)
        was, to = old[where].astype(np.int32), new[where].astype(np.int32)
        if self.alpha is not None:
            share = _eight(self.alpha)[where][:, None].astype(np.float64) / 255
            seen = share > 0  # wholly transparent pixels show nothing of what they were given
            was, to = (np.where(seen, (x - 255 * (1 - share)) / np.maximum(share, 1e-9), 255) for x in (was, to))
            was, to = (x.round().clip(0, 255).astype(np.int32) for x in (was, to))
        pixels = self.pixels.copy()
        if pixels.dtype == np.uint16:
            pixels[where] = np.clip(pixels[where] + 257 * (to - was), to << 8, (to << 8) | 255)
        else:
            pixels[where] = to
        return replace(self, pixels=pixels)

    def resized(self, width: int, height: int) -> Photo:
        """At another size, in its own depth."""
        alpha = None if self.alpha is None else scaled(self.alpha, width, height)
        return replace(self, pixels=scaled(self.pixels, width, height), alpha=alpha)

    def matched(self, flat: Image.Image) -> Photo:
        """With the upper 8 bits of a flat picture that differs only by how it was rounded."""
        if self.pixels.dtype == np.uint8 or self.alpha is not None:
            return self
        upper = np.asarray(flat).astype(np.uint16) << 8
        return replace(self, pixels=self.pixels.clip(upper, upper | 255))

    def converted(self, form: str, depth: int | None = None) -> Photo:
        """To be saved as another format; ``depth`` 8 or 16 bits a channel (16: PNG and TIFF)."""
        shallow = form not in ("PNG", "TIFF") or depth == 8
        notes = list(self.notes)
        pixels, alpha = self.pixels, self.alpha
        if shallow and pixels.dtype == np.uint16:
            pixels, alpha = _eight(pixels), None if alpha is None else _eight(alpha)
            notes.append("16 bits a channel have become 8")
        elif depth == 16 and not shallow and pixels.dtype == np.uint8:
            pixels = pixels.astype(np.uint16) * 257
            alpha = None if alpha is None else alpha.astype(np.uint16) * 257
        if form == "JPEG" and alpha is not None:
            pixels, alpha = np.asarray(replace(self, pixels=pixels, alpha=alpha).flat()), None
            notes.append("transparency has become white")
        quality = self.quality if form == self.form else None
        return replace(self, pixels=pixels, alpha=alpha, form=form, quality=quality, notes=tuple(notes))

    def save(self, path: Path, receipt: Receipt | None = None, quality: int | None = None) -> Saved:
        """Write the photograph in its format, whole or not at all, with all that was kept and the receipt.

        ``quality`` as in :func:`files.encode`; a JPEG is saved with its own tables unless it is given. Raises
        OutputError where the file cannot be written.
        """
        if quality is not None and self.form in ("PNG", "TIFF"):
            raise BadInput(f"got quality {quality} for {self.form}, allowed for JPEG and WebP, try leaving it out")
        how = self.quality if quality is None else quality
        encoded = None if self.form == "TIFF" else self._encode(how)
        data = self._file(encoded, None)
        _, back = pictures.read(io.BytesIO(data))
        notes = list(self.notes)
        if receipt is not None:
            envelope = {"receipt": receipt.to_dict(), "decoded": pictures.pixel_hash(back), "quality": how}
            data = self._file(encoded, json.dumps(envelope, sort_keys=True, separators=(",", ":")))
            if files.note_in(pictures.read(io.BytesIO(data))[0]) is None:
                notes.append("its XMP is damaged or leaves no room: the receipt is left out")
        identical = float((np.asarray(back) == np.asarray(self.flat())).mean()) if self.form == "JPEG" else 1.0
        return Saved(files.write(path, data), data, back, identical, tuple(notes))

    def _encode(self, quality: files.Quality | None) -> bytes:
        """The pixels alone."""
        if self.form == "JPEG":
            return files.encode(Image.fromarray(self.pixels), "JPEG", quality=quality)
        whole = self._whole()
        if self.form == "WEBP":
            buffer = io.BytesIO()
            how = {"lossless": True, "exact": True} if quality is None else {"quality": quality}
            Image.fromarray(whole).save(buffer, "WEBP", **how)
            return buffer.getvalue()
        order = [2, 1, 0, 3][: whole.shape[2]]
        return bytes(cv2.imencode(".png", np.ascontiguousarray(whole[..., order]))[1].tobytes())

    def _file(self, encoded: bytes | None, note: str | None) -> bytes:
        if encoded is not None:
            return containers.put(self.form, encoded, self.kept, note)
        return containers.put_tiff(self._whole(), self.kept, note)

    def _whole(self) -> Pixels:
        return self.pixels if self.alpha is None else np.dstack((self.pixels, self.alpha))


@dataclass(frozen=True)
class Saved:
    """A written file: where, its bytes, how it decodes, the share of values that came through the format as they were,
    and what the user should know."""

    path: Path
    data: bytes
    picture: Image.Image
    identical: float
    notes: tuple[str, ...]


def scaled(values: Pixels, width: int, height: int) -> Pixels:
    """Values [H, W, ...] at another size: smaller by area, larger by Lanczos."""
    if values.shape[:2] == (height, width):
        return values
    smaller = width * height < values.shape[0] * values.shape[1]
    how = cv2.INTER_AREA if smaller else cv2.INTER_LANCZOS4
    return cv2.resize(values, (width, height), interpolation=how)


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[tuple[bytes, Image.Image]]:
    """The bytes of a file and the picture in them, of which the head is read."""
    with pictures.opened(path) as found:
        yield Path(path).read_bytes(), found


def _is_deep(form: str, data: bytes, found: Image.Image) -> bool:
    """Whether the file has 16 bits a channel, which Pillow tells of grey only."""
    if form == "PNG":
        return data[24] == 16  # the depth in IHDR, which is always first
    return form == "TIFF" and found.tag_v2.get(258, (8,))[0] == 16  # type: ignore[attr-defined]


def _deep(path: str | os.PathLike[str], data: bytes, orientation: int) -> tuple[Pixels, Pixels | None]:
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        raise BadInput(f"got {os.fspath(path)!r}, of 16 bits in a rare form, allowed RGB or grey, try saving it as PNG")
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3, axis=-1)
    values = _turned(values, orientation)
    alpha = np.ascontiguousarray(values[..., 3]) if values.shape[2] == 4 else None
    return np.ascontiguousarray(values[..., 2::-1]), alpha


def _turned(values: Pixels, orientation: int) -> Pixels:
    """As EXIF's orientation says (CIPA DC-008, table 4): 5 to 8 lie on their side."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values


def _shallow(found: Image.Image) -> tuple[Pixels, Pixels | None]:
    if not found.has_transparency_data:
        return np.array(pictures.upright(found)), None
    values = np.array(pictures.turned(found).convert("RGBA"))
    return np.ascontiguousarray(values[..., :3]), np.ascontiguousarray(values[..., 3])


def _eight(values: Pixels) -> Pixels:
    """As Pillow reads 16 bits: the upper 8."""
    return values if values.dtype == np.uint8 else (values >> 8).astype(np.uint8)
