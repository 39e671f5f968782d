"""TIFF directories, taken apart and put together byte for byte: EXIF is one, in whatever file it lies, and a TIFF file
is one around its pixels. (TIFF 6.0, Adobe 1992; EXIF 2.32, CIPA DC-008.)"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from numpy.typing import NDArray

ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, XMP, ICC = 274, 282, 283, 296, 700, 34675
_WIDTH = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # bytes of a value by type
_SHORT, _LONG, _RATIONAL, _UNDEFINED = 3, 4, 5, 7
_DEEPER = (34665, 34853, 40965)  # EXIF, GPS and interoperability: directories of their own
# How the old pixels lay in the file (and Photoshop's layers of them): none of it holds for the new ones.
_STRUCTURE = {
    *range(254, 260), 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291, 292, 293, 301,
    317, 320, *range(322, 326), 330, 332, 333, 334, 336, 337, 338, 339, 340, 341, 342, 347, *range(512, 522),
    *range(529, 533), 37724,
}  # fmt: skip
_STRIP = 1 << 20  # bytes of a strip, before it is packed, about


@dataclass
class Directory:
    """Entries by tag: (type, count, bytes), or a directory. ``order`` is struct's sign of the byte order."""

    order: Literal["<", ">"]
    entries: dict[int, tuple[int, int, bytes] | Directory] = field(default_factory=dict)


def read(block: bytes) -> Directory | None:
    """The first directory of a TIFF file or an EXIF block (without pixels and what describes their place); None where
    it is damaged or a BigTIFF."""
    order: Literal["<", ">"] = "<" if block[:2] == b"II" else ">"
    try:
        if block[:4] not in (b"II*\0", b"MM\0*"):
            return None
        found = _read(block, struct.unpack_from(order + "L", block, 4)[0], order, 0)
    except (struct.error, KeyError, RecursionError):
        return None
    for tag in _STRUCTURE & found.entries.keys():
        del found.entries[tag]
    return found


def write(found: Directory) -> bytes:
    """An EXIF block."""
    return _head(found.order) + _write(found, 8)


def upright(block: bytes) -> bytes:
    """An EXIF block that says: not turned. Only that value is another; all other bytes stay."""
    order = "<" if block[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(order + "L", block, 4)
        (count,) = struct.unpack_from(order + "H", block, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", block, at)
            if tag == ORIENTATION and kind == _SHORT:
                return block[: at + 8] + struct.pack(order + "H", 1) + block[at + 10 :]
    except struct.error:  # damaged: so is the orientation, and nobody heeds it
        pass
    return block


def thumbnail(block: bytes) -> bool:
    """Whether an EXIF block has a second directory, that of a thumbnail."""
    order = "<" if block[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(order + "L", block, 4)
        (count,) = struct.unpack_from(order + "H", block, start)
        return bool(struct.unpack_from(order + "L", block, start + 2 + 12 * count)[0])
    except struct.error:
        return False


def resolved(found: Directory, dpi: tuple[float, float]) -> Directory:
    """A directory that tells how many pixels lie on an inch: as it says itself, or else as given."""
    order = found.order
    if found.entries.keys() & {X_RESOLUTION, Y_RESOLUTION}:
        return found
    x, y = ((_RATIONAL, 1, struct.pack(order + "LL", round(value * 10_000), 10_000)) for value in dpi)
    told = {X_RESOLUTION: x, Y_RESOLUTION: y, RESOLUTION_UNIT: (_SHORT, 1, struct.pack(order + "H", 2))}
    return Directory(order, {**found.entries, **told})


def picture(pixels: NDArray[Any], kept: Directory, blobs: Mapping[int, bytes]) -> bytes:
    """A TIFF file of uint8 or uint16 [H, W, 3 or 4] (the fourth: unassociated alpha), packed without loss, with the
    entries of ``kept`` and blobs by tag."""
    height, width, channels = pixels.shape
    order = kept.order
    rows = max(1, _STRIP // (width * channels * pixels.itemsize))
    values = pixels.astype(pixels.dtype.newbyteorder(order))
    values[:, 1:] = pixels[:, 1:] - pixels[:, :-1]  # the predictor: differences along a row, modulo the range
    strips = [zlib.compress(values[y : y + rows].tobytes(), 3) for y in range(0, height, rows)]

    def short(*numbers: int) -> tuple[int, int, bytes]:
        return _SHORT, len(numbers), struct.pack(f"{order}{len(numbers)}H", *numbers)

    def long(*numbers: int) -> tuple[int, int, bytes]:
        return _LONG, len(numbers), struct.pack(f"{order}{len(numbers)}L", *numbers)

    found = Directory(order, dict(kept.entries))
    found.entries |= {tag: (_UNDEFINED, len(blob), blob) for tag, blob in blobs.items()}
    found.entries |= {
        256: long(width),
        257: long(height),
        258: short(*[8 * pixels.itemsize] * channels),
        259: short(8),  # zlib
        262: short(2),  # RGB
        273: long(*[0] * len(strips)),
        277: short(channels),
        278: long(rows),
        279: long(*map(len, strips)),
        284: short(1),
        317: short(2),
    }
    if channels == 4:
        found.entries[338] = short(2)
    at = 8 + len(_write(found, 8))
    starts = [at + sum(map(len, strips[:number])) for number in range(len(strips))]
    found.entries[273] = long(*starts)
    return _head(order) + _write(found, 8) + b"".join(strips)


def _head(order: str) -> bytes:
    return (b"II" if order == "<" else b"MM") + struct.pack(order + "HL", 42, 8)


def _read(block: bytes, start: int, order: Literal["<", ">"], depth: int) -> Directory:
    found = Directory(order)
    (count,) = struct.unpack_from(order + "H", block, start)
    for at in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "HHL", block, at)
        size = _WIDTH[kind] * number
        place = at + 8 if size <= 4 else struct.unpack_from(order + "L", block, at + 8)[0]
        if place + size > len(block):
            raise struct.error("an entry beyond the end")
        if tag in _DEEPER and depth < 3:
            found.entries[tag] = _read(block, struct.unpack_from(order + "L", block, at + 8)[0], order, depth + 1)
        else:
            found.entries[tag] = (kind, number, block[place : place + size])
    return found


def _write(found: Directory, start: int) -> bytes:
    """A directory as it lies at ``start``, what it points to right behind it."""
    order, entries, behind = found.order, b"", b""
    end = start + 2 + 12 * len(found.entries) + 4
    for tag, entry in sorted(found.entries.items()):
        at = end + len(behind)
        if isinstance(entry, Directory):
            entries += struct.pack(order + "HHLL", tag, _LONG, 1, at)
            behind += _even(_write(entry, at))
            continue
        kind, number, data = entry
        value = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(order + "L", at)
        entries += struct.pack(order + "HHL", tag, kind, number) + value
        behind += _even(data) if len(data) > 4 else b""
    return struct.pack(order + "H", len(found.entries)) + entries + b"\0\0\0\0" + behind


def _even(data: bytes) -> bytes:
    return data + b"\0" * (len(data) % 2)
