"""What a picture's file holds besides pixels: taken out of one file, put into another, byte for byte.

Colour profile, EXIF, XMP and resolution have a place in each of JPEG, PNG, WebP and TIFF (WebP: but for resolution).
What has a place in one format only (comments, IPTC, PNG's texts and colour chunks) stays where the format stays.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from fluxloom.edit import tiff
from fluxloom.infer import files, xmp

_EXIF, _XMP, _ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"  # heads of JPEG segments
_SEGMENT = 65_533  # bytes that fit into a JPEG segment, beside the two of its length
_PNG = b"\x89PNG\r\n\x1a\n"
# Chunks that speak of the old pixels, or that are written anew.
_PNG_LEFT = (b"tRNS", b"bKGD", b"hIST", b"sPLT", b"sBIT", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"fdAT")
_PNG_COLOUR = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI")  # they speak of the colours that the profile does
_PNG_XMP = b"XML:com.adobe.xmp"


@dataclass(frozen=True)
class Kept:
    """All of a file but its pixels. ``exif`` is a TIFF block; ``own``: pieces that only ``form`` has a place for."""

    form: str
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    own: tuple[bytes, ...] = ()

    def upright(self) -> Kept:
        """As of a picture that was turned as its EXIF said."""
        return self if self.exif is None else replace(self, exif=tiff.upright(self.exif))

    def without_profile(self) -> Kept:
        """As of a picture in other colours."""
        own = self.own if self.form != "PNG" else tuple(one for one in self.own if one[4:8] not in _PNG_COLOUR)
        return replace(self, icc=None, own=own)


def take(form: str, data: bytes, found: Image.Image) -> Kept:
    """All of a file (its bytes, and as Pillow has loaded it) but its pixels."""
    info = found.info
    exif = info.get("exif") or None
    if isinstance(exif, bytes):
        exif = exif.removeprefix(_EXIF)
    own: tuple[bytes, ...] = ()
    if form == "TIFF":
        directory = tiff.read(data)
        if directory is not None:
            for tag in (tiff.XMP, tiff.ICC):
                directory.entries.pop(tag, None)
            exif = tiff.write(directory)
    elif form == "JPEG":
        own = tuple(piece for piece in _segments(data) if _is_own(piece))
    elif form == "PNG":
        own = tuple(piece for piece in _chunks(data) if _is_own_chunk(piece))
    dpi, packet = info.get("dpi"), info.get("xmp")
    packet = packet.encode() if isinstance(packet, str) else packet
    two = (float(dpi[0]), float(dpi[1])) if isinstance(dpi, tuple) and len(dpi) == 2 and all(dpi) else None
    return Kept(form, info.get("icc_profile") or None, exif, xmp.join(packet, None), two, own)


def put(form: str, encoded: bytes, kept: Kept, note: str | None = None) -> bytes:
    """A file of JPEG, PNG or WebP without anything but pixels, with what was kept, and a note (ASCII)."""
    own = kept.own if kept.form == form else ()
    return _WRITERS[form](encoded, replace(kept, own=own), note)


# ------------------------------------------------------------------------------------------------ JPEG


def _segments(data: bytes) -> Iterator[bytes]:
    """The segments of a JPEG before its pixels, each with its marker."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] == 0xFF:  # fill
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at:end]
        at = end


def _is_own(piece: bytes) -> bool:
    """Comments and applications' segments, but for what is written anew: APP14 says how the encoder kept colours, MPF
    where in the file other pictures lie."""
    marker, head = piece[1], piece[4:]
    if head.startswith((_EXIF, _XMP, _ICC, b"MPF\0")) or marker == 0xEE:
        return False
    return marker == 0xFE or 0xE0 <= marker <= 0xEF


def _jpeg(encoded: bytes, kept: Kept, note: str | None) -> bytes:
    own = list(kept.own)
    plain = next(_segments(encoded))
    heads = [piece for piece in own if piece[1] == 0xE0] or [plain if kept.dpi is None else _jfif(kept.dpi)]
    packet = xmp.join(kept.xmp, note)
    if packet is not None and len(packet) + len(_XMP) > _SEGMENT:  # theirs alone did fit
        packet = kept.xmp
    told = [_EXIF + part for part in _cut(kept.exif, _SEGMENT - len(_EXIF))]
    told += [_XMP + packet] if packet is not None and len(packet) + len(_XMP) <= _SEGMENT else []
    profile = list(_cut(kept.icc, _SEGMENT - len(_ICC) - 2))
    pieces = heads + [b"\xff\xe1" + struct.pack(">H", len(one) + 2) + one for one in told]
    for number, part in enumerate(profile, 1):
        body = _ICC + bytes((number, len(profile))) + part
        pieces.append(b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body)
    pieces += [piece for piece in own if piece[1] != 0xE0]
    return encoded[:2] + b"".join(pieces) + encoded[2 + len(plain) :]


def _jfif(dpi: tuple[float, float]) -> bytes:
    body = b"JFIF\0\1\1\1" + struct.pack(">HHBB", *(min(65_535, round(value)) for value in dpi), 0, 0)
    return b"\xff\xe0" + struct.pack(">H", len(body) + 2) + body


def _cut(data: bytes | None, size: int) -> Iterator[bytes]:
    whole = data or b""
    return (whole[start:end] for start, end in pairwise([*range(0, len(whole), size), len(whole)]))


# ------------------------------------------------------------------------------------------------- PNG


def _chunks(data: bytes) -> Iterator[bytes]:
    """The chunks of a PNG, whole."""
    at = len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at:end]
        at = end


def _is_own_chunk(piece: bytes) -> bool:
    kind, text = piece[4:8], piece[8:].partition(b"\0")[0]
    ancillary = bool(kind[0] & 32)
    ours = kind == b"iTXt" and text in (files.KEY.encode(), _PNG_XMP)
    return ancillary and kind not in _PNG_LEFT and not ours


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _text(key: bytes, text: bytes) -> bytes:
    return _chunk(b"iTXt", key + b"\0\0\0\0\0" + text)


def _png(encoded: bytes, kept: Kept, note: str | None) -> bytes:
    pieces = list(_chunks(encoded))
    told = []
    if kept.icc is not None:
        told.append(_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(kept.icc)))
    if kept.dpi is not None and all(piece[4:8] != b"pHYs" for piece in kept.own):
        told.append(_chunk(b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in kept.dpi), 1)))
    if kept.exif is not None:
        told.append(_chunk(b"eXIf", kept.exif))
    if kept.xmp is not None:
        told.append(_text(_PNG_XMP, kept.xmp))
    told += [_text(files.KEY.encode(), note.encode("ascii"))] if note is not None else []
    pixels = [piece for piece in pieces[1:] if piece[4:8] in (b"IDAT", b"IEND")]
    return _PNG + pieces[0] + b"".join((*kept.own, *told, *pixels))


# ------------------------------------------------------------------------------------------------ WebP


def _webp(encoded: bytes, kept: Kept, note: str | None) -> bytes:
    packet = xmp.join(kept.xmp, note)
    image, at = [], 12
    while at + 8 <= len(encoded):
        end = at + 8 + int.from_bytes(encoded[at + 4 : at + 8], "little")
        image.append((encoded[at : at + 4], encoded[at + 8 : end]))
        at = end + end % 2
    told = {b"ICCP": kept.icc, b"EXIF": kept.exif, b"XMP ": packet}
    if any(body is not None for body in told.values()):
        image = _extended(image, told, Image.open(io.BytesIO(encoded)).size)
    body = b"".join(kind + struct.pack("<I", len(one)) + one + b"\0" * (len(one) % 2) for kind, one in image)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _extended(
    image: list[tuple[bytes, bytes]], told: dict[bytes, bytes | None], size: tuple[int, int]
) -> list[tuple[bytes, bytes]]:
    """The chunks of a WebP with a head that says what there is, in the order that the format asks for."""
    lossless = next((body for kind, body in image if kind == b"VP8L"), None)
    transparent = any(kind == b"ALPH" for kind, _ in image) or (lossless is not None and bool(lossless[4] & 0x10))
    bits = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
    flags = sum(bit for kind, bit in bits.items() if told[kind]) | (0x10 if transparent else 0)
    sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
    pixels = [(kind, body) for kind, body in image if kind in (b"ALPH", b"VP8 ", b"VP8L")]
    notes = [(kind, body) for kind, body in told.items() if body]
    before = [one for one in notes if one[0] == b"ICCP"]
    return [(b"VP8X", struct.pack("<I", flags) + sides), *before, *pixels, *notes[len(before) :]]


_WRITERS: dict[str, Callable[[bytes, Kept, str | None], bytes]] = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp}


# ------------------------------------------------------------------------------------------------ TIFF


def put_tiff(pixels: NDArray[Any], kept: Kept, note: str | None = None) -> bytes:
    """A TIFF of uint8 or uint16 [H, W, 3 or 4] with what was kept, and a note."""
    directory = (None if kept.exif is None else tiff.read(kept.exif)) or tiff.Directory("<")
    if kept.dpi is not None:
        directory = tiff.resolved(directory, kept.dpi)
    packet = xmp.join(kept.xmp, note)
    blobs = {tiff.XMP: packet, tiff.ICC: kept.icc}
    return tiff.picture(pixels, directory, {tag: blob for tag, blob in blobs.items() if blob is not None})
