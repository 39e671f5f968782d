"""Drawing tools: a canvas in shares of its side, anti-aliased on uint8, and light that colours what is drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from fluxloom.world.atlas import Stamp
from fluxloom.world.colours import Floats, Pixels

RGB = tuple[int, int, int]
Point = tuple[float, float]
SHIFT = 5  # bits of sub-pixel precision in OpenCV's drawing


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """From a (0) to b (1)."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def lighter(rgb: RGB, share: float) -> RGB:
    return mix(rgb, (255, 255, 255), share)


def darker(rgb: RGB, share: float) -> RGB:
    return mix(rgb, (16, 20, 48), share)


@dataclass(frozen=True)
class Light:
    """Coloured light on everything that does not shine: a factor per channel after taking some colour away."""

    factor: tuple[float, float, float] = (1.0, 1.0, 1.0)
    grey: float = 0.0

    def on(self, rgb: RGB) -> RGB:
        mean = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]
        lit = [(c + (mean - c) * self.grey) * f for c, f in zip(rgb, self.factor, strict=True)]
        return tuple(min(255, round(c)) for c in lit)  # type: ignore[return-value]

    def tinted(self, rgb: Pixels) -> Pixels:
        """The same for pixels (being linear, it serves premultiplied colour as well)."""
        return rgb if self == PLAIN_LIGHT else cv2.transform(rgb, _matrix(self))


PLAIN_LIGHT = Light()


@lru_cache(128)
def _matrix(light: Light) -> Floats:
    """Light as a matrix on colours: OpenCV does this four times faster than a product with a scalar."""
    mean = np.array([[0.3, 0.59, 0.11]]) * light.grey + np.eye(3) * (1 - light.grey)
    matrix: Floats = mean * np.array(light.factor)[:, None]
    return matrix


@lru_cache(32)
def gradation(colours: tuple[RGB, ...], height: int, width: int, bands: int) -> Pixels:
    """A vertical gradient [height, width, 3] through evenly spaced colours; with bands > 0, in so many flat steps."""
    at = (np.arange(height, dtype=np.float32) + 0.5) * ((len(colours) - 1) / max(height, 1))
    if bands:
        step = np.float32((len(colours) - 1) / bands)
        at = (np.floor(at / step) + 0.5) * step
    stops = np.array(colours, np.float32)
    first = np.minimum(at.astype(np.int64), max(len(colours) - 2, 0))
    second = np.minimum(first + 1, len(colours) - 1)
    column = stops[first] + (stops[second] - stops[first]) * (at - first)[:, None]
    filled: Pixels = cv2.resize(
        (column + 0.5).astype(np.uint8)[:, None], (width, height), interpolation=cv2.INTER_NEAREST
    )
    return filled


@lru_cache(64)
def blob(width: int, height: int, hard: bool) -> Pixels:
    """A round spot [h, w] with values to 255: soft as a glow, or hard as a disc."""
    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) * 2 / height - 1
    x = (np.arange(width, dtype=np.float32)[None] + 0.5) * 2 / width - 1
    r = np.sqrt(x * x + y * y)
    if hard:
        edge = np.clip((1 - r) * min(width, height) / 2 + 0.5, 0, 1)
    else:
        edge = np.clip(1 - r, 0, 1) ** 2 * (1 + 2 * np.clip(r, 0, 1))
    return (edge * 255).round().astype(np.uint8)


class Canvas:
    """A square picture; all positions and lengths are shares of its side."""

    def __init__(self, size: int, style: str) -> None:
        self.size = size
        self.style = style
        self.flat = style == "flat"
        self.pixels: Pixels = np.zeros((size, size, 3), np.uint8)

    def _fixed(self, points: Sequence[Point]) -> np.ndarray:
        scale, half = self.size << SHIFT, 1 << (SHIFT - 1)
        return np.array([(round(x * scale) - half, round(y * scale) - half) for x, y in points], np.int32)

    def width(self, share: float, least: int = 1) -> int:
        return max(least, round(share * self.size))

    def gradient(self, colours: Sequence[RGB], top: float = 0.0, bottom: float = 1.0, bands: int = 0) -> None:
        y0, y1 = round(top * self.size), round(bottom * self.size)
        if y1 > y0:
            self.pixels[y0:y1] = gradation(tuple(colours), y1 - y0, self.size, bands)

    def poly(self, points: Sequence[Point], colour: RGB) -> None:
        cv2.fillPoly(self.pixels, [self._fixed(points)], colour, cv2.LINE_AA, SHIFT)

    def rect(self, left: float, top: float, right: float, bottom: float, colour: RGB) -> None:
        self.poly([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def line(self, points: Sequence[Point], colour: RGB, width: float, least: int = 1) -> None:
        cv2.polylines(self.pixels, [self._fixed(points)], False, colour, self.width(width, least), cv2.LINE_AA, SHIFT)

    def lines(self, pairs: Sequence[Sequence[Point]], colour: RGB, width: float, least: int = 1) -> None:
        """Many short lines at once."""
        fixed = [self._fixed(p) for p in pairs]
        cv2.polylines(self.pixels, fixed, False, colour, self.width(width, least), cv2.LINE_AA, SHIFT)

    def disc(self, x: float, y: float, radius: float, colour: RGB) -> None:
        centre = self._fixed([(x, y)])[0]
        r = max(1, round(radius * self.size * (1 << SHIFT)))
        cv2.circle(self.pixels, (int(centre[0]), int(centre[1])), r, colour, -1, cv2.LINE_AA, SHIFT)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
        centre = self._fixed([(x, y)])[0]
        axes = (max(1, round(rx * self.size * (1 << SHIFT))), max(1, round(ry * self.size * (1 << SHIFT))))
        cv2.ellipse(self.pixels, (int(centre[0]), int(centre[1])), axes, 0, 0, 360, colour, -1, cv2.LINE_AA, SHIFT)

    def shaded(self, points: Sequence[Point], colours: Sequence[RGB], bands: int = 0) -> None:
        """A polygon filled with a vertical gradient over its own height."""
        ys = [p[1] for p in points]
        xs = [p[0] for p in points]
        y0, y1 = max(0, math.floor(min(ys) * self.size) - 1), min(self.size, math.ceil(max(ys) * self.size) + 1)
        x0, x1 = max(0, math.floor(min(xs) * self.size) - 1), min(self.size, math.ceil(max(xs) * self.size) + 1)
        if y1 <= y0 or x1 <= x0:
            return
        cover = np.zeros((y1 - y0, x1 - x0), np.uint8)
        fixed = self._fixed(points) - np.array([x0 << SHIFT, y0 << SHIFT], np.int32)
        cv2.fillPoly(cover, [fixed], 255, cv2.LINE_AA, SHIFT)
        self.blend(gradation(tuple(colours), y1 - y0, x1 - x0, bands), cover, x0, y0)

    def blend(self, colour: Pixels, cover: Pixels, x0: int, y0: int) -> None:
        """Lay colour over the region at (x0, y0), as far as cover (0 to 255) says."""
        region = self.pixels[y0 : y0 + cover.shape[0], x0 : x0 + cover.shape[1]]
        wide = cv2.cvtColor(cover, cv2.COLOR_GRAY2RGB)
        below = cv2.multiply(region, cv2.bitwise_not(wide), scale=1 / 255)
        region[:] = cv2.add(below, cv2.multiply(colour, wide, scale=1 / 255))

    def clip(self, x0: int, y0: int, width: int, height: int) -> tuple[slice, slice, slice, slice] | None:
        xa, ya = max(0, x0), max(0, y0)
        xb, yb = min(self.size, x0 + width), min(self.size, y0 + height)
        if xb <= xa or yb <= ya:
            return None
        return slice(ya, yb), slice(xa, xb), slice(ya - y0, yb - y0), slice(xa - x0, xb - x0)

    def lay(self, stamp: Stamp, x0: int, y0: int, light: Light | None = None) -> None:
        """Lay a stamp with its corner at a pixel; what hangs over the edge is cut."""
        if clip := self.clip(x0, y0, stamp.colour.shape[1], stamp.colour.shape[0]):
            ys, xs, sy, sx = clip
            region = self.pixels[ys, xs]
            below = cv2.multiply(region, stamp.through[sy, sx], scale=1 / 255)
            colour = stamp.colour[sy, sx]
            region[:] = cv2.add(below, light.tinted(colour) if light else colour)

    def spot(self, x: float, y: float, rx: float, ry: float, colour: RGB, strength: float, hard: bool = False) -> None:
        """A round stain, soft or hard: shadows and haze."""
        width, height = max(2, round(2 * rx * self.size)), max(2, round(2 * ry * self.size))
        x0, y0 = round((x - rx) * self.size), round((y - ry) * self.size)
        if clip := self.clip(x0, y0, width, height):
            ys, xs, sy, sx = clip
            cover = cv2.convertScaleAbs(blob(width, height, hard)[sy, sx], alpha=strength)
            fill = np.empty((*cover.shape, 3), np.uint8)
            fill[:] = colour
            self.blend(fill, cover, xs.start, ys.start)

    def glow(self, x: float, y: float, radius: float, colour: RGB, strength: float = 1.0) -> None:
        """Light added softly around a point."""
        side = max(2, round(2 * radius * self.size))
        if clip := self.clip(round((x - radius) * self.size), round((y - radius) * self.size), side, side):
            ys, xs, sy, sx = clip
            shape = cv2.cvtColor(blob(side, side, False)[sy, sx], cv2.COLOR_GRAY2RGB)
            tinted = cv2.transform(shape, np.diag([c * strength / 255 for c in colour]))
            region = self.pixels[ys, xs]
            region[:] = cv2.add(region, tinted)

    def shaded_ray(self, x: float, wide: float, lean: float) -> None:
        """A shaft of light from above that fades downwards."""
        cover = np.zeros((self.size, self.size), np.uint8)
        shaft = [
            (x - wide / 2, -0.02),
            (x + wide / 2, -0.02),
            (x + lean + wide * 1.6, 0.85),
            (x + lean - wide * 1.6, 0.85),
        ]
        cv2.fillPoly(cover, [self._fixed(shaft)], 255, cv2.LINE_AA, SHIFT)
        fade = np.clip(np.linspace(0.3, 0, self.size), 0, 1)[:, None]
        self.blend(np.full_like(self.pixels, 235), (cover * fade).astype(np.uint8), 0, 0)

    def veil(self, colours: Sequence[RGB], shares: Sequence[float]) -> None:
        """A thin layer over the whole picture; colours and its opacity run from top to bottom."""
        cover = np.interp(np.linspace(0, 1, self.size), np.linspace(0, 1, len(shares)), shares)
        weight = np.round(cover * 255).astype(np.uint8)[:, None, None]
        wide = np.broadcast_to(weight, self.pixels.shape).copy()
        fill = gradation(tuple(colours), self.size, self.size, 0)
        below = cv2.multiply(self.pixels, cv2.bitwise_not(wide), scale=1 / 255)
        self.pixels[:] = cv2.add(below, cv2.multiply(fill, wide, scale=1 / 255))


def ridge(rng: random.Random, base: float, swing: float, waves: float = 1.6, steps: int = 28) -> list[Point]:
    """A smooth skyline from the left edge to the right edge around the height `base`."""
    parts = [(rng.uniform(0.7, 1.3) * waves * k, rng.uniform(0, 2 * math.pi), 1 / k) for k in (1, 2, 3.7)]
    out = []
    for i in range(steps + 1):
        x = i / steps
        lift = sum(a * math.sin(2 * math.pi * f * x / 2 + p) for f, p, a in parts)
        out.append((x * 1.04 - 0.02, base - swing * lift / 1.6))
    return out


def below(line: Sequence[Point], bottom: float = 1.02) -> list[Point]:
    """The area under a skyline."""
    return [*line, (line[-1][0], bottom), (line[0][0], bottom)]


def height_at(line: Sequence[Point], x: float) -> float:
    """The height of a skyline at x."""
    return float(np.interp(x, [p[0] for p in line], [p[1] for p in line]))
