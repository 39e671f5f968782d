"""The art of the illustrated world: its concepts, and their sprites in every style and colour."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

import cv2
import numpy as np
from PIL import Image

from fluxloom.errors import BadInput
from fluxloom.world.colours import Pixels, recolour

STYLES = ("3d", "flat", "cartoon")
# Built and drawable, but never in a training mix: kept aside so that a LoRA can learn a style that is really new.
RESERVED_STYLES = ("line",)


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A kind of thing: its names in both languages, and how it may stand in a scene."""

    key: str
    en: str
    en_more: tuple[str, ...]
    bare: tuple[str, ...]  # English names that stand without "a": plurals and stuff
    zh: str
    zh_more: tuple[str, ...]
    measure: str
    category: str
    stance: str  # stands, flies, floats
    size: int  # 1 (a bee) to 5 (a castle) in the real world
    flip: bool  # may be mirrored (bears no lettering)
    whole: bool  # repainting covers all hues
    colours: tuple[str, ...]  # into which it can be repainted truly
    natural: str | None  # the colour that it plainly has by itself, in every style
    pixels: dict[str, tuple[int, int]]  # style -> width, height of the sprite

    @cached_property
    def extent(self) -> tuple[float, float]:
        """Width and height over the long side, the largest of the trained styles: room to reserve."""
        shapes = [(w / max(w, h), h / max(w, h)) for s, (w, h) in self.pixels.items() if s in STYLES]
        return max(w for w, _ in shapes), max(h for _, h in shapes)

    def shape(self, style: str) -> tuple[float, float]:
        """Width and height over the long side in one style."""
        width, height = self.pixels[style]
        return width / max(width, height), height / max(width, height)


@dataclass(frozen=True)
class Stamp:
    """A picture ready to be laid over another: colour already multiplied by alpha, and what shows through."""

    colour: Pixels  # [h, w, 3], premultiplied
    through: Pixels  # [h, w, 3], 255 - alpha


def premultiply(rgba: Pixels) -> Pixels:
    wide = cv2.cvtColor(rgba[..., 3], cv2.COLOR_GRAY2RGB)
    return np.dstack([cv2.multiply(np.ascontiguousarray(rgba[..., :3]), wide, scale=1 / 255), rgba[..., 3]])


def stamp(premultiplied: Pixels) -> Stamp:
    """From RGBA whose colour is already multiplied by alpha."""
    alpha = cv2.extractChannel(premultiplied, 3)
    return Stamp(cv2.cvtColor(premultiplied, cv2.COLOR_RGBA2RGB), cv2.cvtColor(255 - alpha, cv2.COLOR_GRAY2RGB))


def _concept(key: str, row: dict[str, Any]) -> Concept:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k != "code"}
    fields["pixels"] = {style: (int(w), int(h)) for style, (w, h) in row["pixels"].items()}
    return Concept(key=key, **fields)


def halved(pixels: Pixels) -> Pixels:
    size = (max(1, pixels.shape[1] // 2), max(1, pixels.shape[0] // 2))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def halvings(stored: int, wanted: int) -> int:
    """How often to halve before a bilinear step, which then loses nothing and is ten times faster than averaging."""
    return max(0, (stored // max(wanted, 1)).bit_length() - 1)


class Atlas:
    """Concepts by key and their sprites, read lazily from the archive that ships with the package."""

    def __init__(self, table: bytes, archive: bytes) -> None:
        self.concepts = {key: _concept(key, row) for key, row in json.loads(table).items()}
        self._archive = zipfile.ZipFile(io.BytesIO(archive))
        # One worker of a training run holds at most 2,500 sprites of 124 kB and their halves.
        self.sprite = lru_cache(8192)(self._sprite)
        self.stamp = lru_cache(96)(self._stamp)

    def concept(self, key: str) -> Concept:
        if key not in self.concepts:
            raise BadInput(f"got concept {key!r}; allowed are the {len(self.concepts)} keys of load_atlas().concepts")
        return self.concepts[key]

    def _sprite(self, key: str, style: str, colour: str | None = None, level: int = 0) -> Pixels:
        """The sprite as premultiplied RGBA at the size it is stored in, halved `level` times."""
        if level:
            return halved(self.sprite(key, style, colour, level - 1))
        concept = self.concept(key)
        if style not in concept.pixels:
            raise BadInput(f"got style {style!r} for {key}; allowed are {', '.join(concept.pixels)}")
        rgba = np.asarray(Image.open(io.BytesIO(self._file(concept, style))).convert("RGBA"))
        return premultiply(recolour(rgba, colour, concept.whole) if colour else rgba)

    def _file(self, concept: Concept, style: str) -> bytes:
        """A drawing as WebP. The archive holds those of a concept one after another, in the order of its styles (76 kB
        less than each by itself); a RIFF file begins with its length."""
        data = self._archive.read(concept.key)
        for name in concept.pixels:
            size = 8 + int.from_bytes(data[4:8], "little")
            if name == style:
                break
            data = data[size:]
        return data[:size]

    def _stamp(self, key: str, style: str, colour: str | None, mirror: bool, width: int, height: int) -> Stamp:
        level = halvings(max(self.concept(key).pixels[style]), max(width, height))
        rgba: Pixels = cv2.resize(self.sprite(key, style, colour, level), (width, height))
        return stamp(cv2.flip(rgba, 1) if mirror else rgba)


@lru_cache(1)
def load_atlas() -> Atlas:
    """The atlas, once per process."""
    folder = files("fluxloom") / "assets" / "world"
    return Atlas((folder / "concepts.json").read_bytes(), (folder / "atlas.zip").read_bytes())
