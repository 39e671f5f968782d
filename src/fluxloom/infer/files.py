"""Writing pictures: whole or not at all, with the receipt inside."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, JpegImagePlugin, PngImagePlugin

from fluxloom.errors import BadInput, OutputError
from fluxloom.infer import xmp

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
KEY = "fluxloom"  # of the PNG text chunk
Quality = int | Mapping[str, Any]  # 1 to 100, or what tables_of() gives
_PNG_LEVEL = 2  # of 1024 x 1024 grainy pixels: 0.10 s and 1.92 MB, where zlib's own 6 takes 0.25 s for 1.68 MB
_JPEG_QUALITY = 95  # and full colour resolution, as the official code saves


def format_of(path: str | os.PathLike[str]) -> str:
    """The format that a file name asks for. Raises BadInput for any other than PNG, JPEG and WebP."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise BadInput(f"got {str(path)!r}, allowed {', '.join(FORMATS)}, try {Path(path).stem or 'picture'}.png")
    return FORMATS[suffix]


def encode(picture: Image.Image, form: str, note: str | None = None, quality: Quality | None = None) -> bytes:
    """An RGB picture as a file of ``form``, with ``note`` (ASCII) inside: PNG iTXt, JPEG and WebP XMP.

    PNG is lossless, WebP lossless unless ``quality`` is given, JPEG of quality 95 unless given (1 to 100, or the
    tables of another JPEG).
    """
    tables = _tables(quality, form) if isinstance(quality, Mapping) else None
    if isinstance(quality, int) and (form == "PNG" or not 1 <= quality <= 100):
        raise BadInput(f"got quality {quality} for {form}, allowed 1 to 100 for JPEG and WebP, try leaving it out")
    options: dict[str, Any] = {}
    if form == "PNG":
        options |= {"pnginfo": PngImagePlugin.PngInfo(), "compress_level": _PNG_LEVEL}
        if note is not None:
            options["pnginfo"].add_itxt(KEY, note)
    elif form == "JPEG":
        options |= tables or {"quality": quality or _JPEG_QUALITY, "subsampling": 0}
    else:
        options |= {"lossless": quality is None, "quality": 80 if quality is None else quality}
    if form != "PNG" and note is not None:
        options["xmp"] = xmp.pack(note)
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def tables_of(picture: Image.Image) -> Quality | None:
    """The tables of an RGB JPEG that PIL has opened: with them, what was not changed comes out nearly as it was."""
    tables = getattr(picture, "quantization", None)
    sampling = JpegImagePlugin.get_sampling(picture) if tables and picture.mode == "RGB" else -1
    if not tables or sampling == -1:
        return None
    return {"qtables": [list(tables[key]) for key in sorted(tables)], "subsampling": sampling}


def _tables(found: Mapping[str, Any], form: str) -> dict[str, Any]:
    """Checked, as they may come from a receipt."""
    match found:
        case {"qtables": [*tables], "subsampling": 0 | 1 | 2 as sampling} if form == "JPEG" and 1 <= len(tables) <= 4:
            values = [value for table in tables for value in (table if isinstance(table, list) else [None])]
            if len(values) == 64 * len(tables) and all(isinstance(one, int) and 1 <= one <= 255 for one in values):
                return {"qtables": tables, "subsampling": sampling}
    raise BadInput(f"got tables for {form}, allowed those of a JPEG, for one, try leaving them out")


def through(picture: Image.Image, form: str, quality: Quality | None = None) -> Image.Image:
    """What comes back of an RGB picture from a file of ``form``: the picture itself where that is lossless."""
    if quality is None and form != "JPEG":
        return picture
    return Image.open(io.BytesIO(encode(picture, form, quality=quality)))


def note_in(picture: Image.Image) -> str | None:
    """The note that :func:`encode` put into a picture that PIL has opened and loaded."""
    text = getattr(picture, "text", {}).get(KEY)
    if text is not None:
        return str(text)
    packet = picture.info.get("xmp")
    return xmp.unpack(packet) if isinstance(packet, bytes) else None


def write(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file whole or not at all; missing folders are made.

    The bytes go to a hidden file beside, reach the disk, and take the name in one step. Whatever happens on the
    way (a full disk, a missing right, an interrupt), the hidden file is removed; OSError becomes OutputError.
    """
    path = Path(path)
    part = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise OutputError(f"got {str(path)!r} to write to ({reason}), try another place") from error
        raise
    return path
