"""Small drawings of our own that dress the places: trees, clouds, flowers, rocks, lamps, ...

Each is drawn once per process on a sheet four times finer than needed, shaded in the manner of the art style
(soft light for "3d", one plain colour for "flat", dark outlines for "cartoon"), then scaled and tinted as asked.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache

import cv2
import numpy as np

from fluxloom.world.atlas import Stamp, halved, halvings, premultiply, stamp
from fluxloom.world.colours import Floats, Pixels
from fluxloom.world.paint import RGB, Canvas, Light, Point, darker, lighter

SHEET = 448
WHITE: RGB = (255, 255, 255)
STORED = 192  # side of the sheet that is kept


class Sheet(Canvas):
    """A canvas with transparency: everything drawn is opaque."""

    def __init__(self, style: str) -> None:
        super().__init__(SHEET, style)
        self.cover = Canvas(SHEET, style)

    def poly(self, points: Sequence[Point], colour: RGB) -> None:
        super().poly(points, colour)
        self.cover.poly(points, WHITE)

    def disc(self, x: float, y: float, radius: float, colour: RGB) -> None:
        super().disc(x, y, radius, colour)
        self.cover.disc(x, y, radius, WHITE)

    def line(self, points: Sequence[Point], colour: RGB, width: float, least: int = 1) -> None:
        super().line(points, colour, width, least)
        self.cover.line(points, WHITE, width, least)

    def rgba(self) -> Pixels:
        """The finished drawing, shaded in the manner of its style."""
        rgb: Floats = self.pixels.astype(np.float32)
        cover = self.cover.pixels[..., 0]
        if self.style == "3d":  # light from the upper left, soft dark towards the lower right edge
            depth = cv2.GaussianBlur(cover, (0, 0), SHEET / 22).astype(np.float32) / 255
            dx, dy = cv2.Sobel(depth, cv2.CV_32F, 1, 0, ksize=3), cv2.Sobel(depth, cv2.CV_32F, 0, 1, ksize=3)
            slope = np.clip((dx + 1.4 * dy) * 12, -0.32, 0.30)[..., None]
            rgb = np.where(slope > 0, rgb + (255 - rgb) * slope, rgb * (1 + slope))
        if self.style == "cartoon":
            edge = cv2.dilate(cover, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (11, 11)))
            tone = cv2.blur(self.pixels, (35, 35)).astype(np.float32)
            share = cv2.blur(cover, (35, 35)).astype(np.float32)[..., None] / 255
            ink = tone / np.maximum(share, 0.05) * np.array([0.45, 0.42, 0.5], np.float32)
            inside = cover[..., None].astype(np.float32) / 255
            rgb = rgb * inside + np.clip(ink, 0, 255) * (1 - inside)
            cover = edge
        return np.dstack([np.clip(rgb, 0, 255).astype(np.uint8), cover])


def _crown(s: Sheet, rng: random.Random, colour: RGB, count: int = 9) -> None:
    """Foliage of overlapping balls, dark below and light above."""
    balls = [
        (0.5 + rng.uniform(-0.2, 0.2), 0.38 + rng.uniform(-0.18, 0.16), rng.uniform(0.13, 0.19)) for _ in range(count)
    ]
    for x, y, r in balls:
        s.disc(x, y + 0.03, r + 0.02, darker(colour, 0.22))
    for x, y, r in balls:
        s.disc(x, y, r, colour)
    for x, y, r in balls[::2]:
        s.disc(x - 0.03, y - 0.05, r * 0.55, lighter(colour, 0.16))


def _trunk(s: Sheet, colour: RGB = (120, 82, 56)) -> None:
    s.poly([(0.45, 1.0), (0.47, 0.5), (0.53, 0.5), (0.56, 1.0)], colour)
    s.line([(0.5, 0.68), (0.38, 0.5)], colour, 0.03)
    s.line([(0.5, 0.62), (0.61, 0.48)], colour, 0.03)


FOLIAGE: dict[str, tuple[RGB, ...]] = {
    "spring": ((126, 190, 84), (246, 168, 196), (150, 205, 96), (250, 190, 214)),
    "summer": ((62, 148, 70), (82, 166, 74), (48, 130, 72), (98, 172, 70)),
    "autumn": ((226, 124, 40), (204, 76, 46), (240, 176, 56), (178, 104, 52)),
}


def tree(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    _trunk(s)
    if season == "winter":
        for i in range(9):
            angle = math.radians(-160 + 140 * i / 8 + rng.uniform(-8, 8))
            x, y = 0.5 + 0.36 * math.cos(angle), 0.55 + 0.42 * math.sin(angle)
            s.line(
                [(0.5, 0.64), (0.5 + 0.18 * math.cos(angle), 0.5 + 0.2 * math.sin(angle)), (x, y)], (112, 88, 76), 0.022
            )
            s.disc(x, y, 0.04, (244, 248, 255))
    else:
        _crown(s, rng, FOLIAGE[season][variant % 4])


def pine(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    colour = ((38, 112, 84), (46, 126, 80), (34, 98, 82), (56, 130, 78))[variant % 4]
    s.poly([(0.46, 1.0), (0.46, 0.8), (0.54, 0.8), (0.54, 1.0)], (108, 76, 58))
    for k in range(4):
        y, half = 0.88 - 0.2 * k, 0.34 - 0.062 * k
        s.poly([(0.5 - half, y), (0.5, y - 0.34), (0.5 + half, y)], darker(colour, 0.12 - 0.03 * k))
        s.poly([(0.5 - half, y), (0.5, y - 0.34), (0.5, y - 0.03)], lighter(colour, 0.08))
        if season == "winter":
            s.poly(
                [(0.5 - half * 0.5, y - 0.17), (0.5, y - 0.34), (0.5 + half * 0.5, y - 0.17), (0.5, y - 0.12)],
                (244, 249, 255),
            )


def palm(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    lean = (0.1, -0.1, 0.16, -0.05)[variant % 4]
    trunk = [(0.5 - lean * 1.4 * (1 - t) ** 2, 1 - 0.62 * t) for t in (0, 0.25, 0.5, 0.75, 1)]
    s.line(trunk, (150, 108, 66), 0.055)
    top = trunk[-1]
    for i in range(8):
        angle = math.radians(-205 + 230 * i / 7 + rng.uniform(-6, 6))
        reach = rng.uniform(0.3, 0.38)
        tip = (top[0] + reach * math.cos(angle), top[1] + reach * 0.75 * math.sin(angle) + 0.12)
        mid = (top[0] + reach * 0.55 * math.cos(angle), top[1] + reach * 0.75 * math.sin(angle) - 0.03)
        colour = (58, 150, 78) if i % 2 else (82, 176, 82)
        s.poly([top, (mid[0], mid[1] - 0.045), tip, (mid[0], mid[1] + 0.035)], colour)
    for dx in (-0.03, 0.03):
        s.disc(top[0] + dx, top[1] + 0.03, 0.032, (116, 74, 44))


def cactus(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    colour: RGB = (66, 142, 84)
    s.line([(0.5, 1.0), (0.5, 0.2)], colour, 0.16)
    for side, foot, tip in ((-1, 0.66, 0.36), (1, 0.56, 0.24)):
        s.line([(0.5, foot), (0.5 + side * 0.22, foot), (0.5 + side * 0.22, tip)], colour, 0.11)
    for dx in (-0.03, 0.03):
        s.line([(0.5 + dx, 0.96), (0.5 + dx, 0.22)], lighter(colour, 0.22), 0.012)
    if variant % 2:
        s.disc(0.5, 0.13, 0.05, (242, 110, 150))


def bush(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    colour = (226, 236, 246) if season == "winter" else FOLIAGE[season][variant % 4]
    for _ in range(8):
        x = rng.uniform(0.18, 0.82)
        y = 0.82 - 0.3 * (1 - abs(2 * x - 1)) * rng.random()
        s.disc(x, y, 0.15, colour if rng.random() < 0.6 else lighter(colour, 0.14))
    s.poly([(0.06, 1.0), (0.1, 0.82), (0.9, 0.82), (0.94, 1.0)], darker(colour, 0.1))


def cloud(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    count = 6
    for i in range(count):
        x = 0.2 + 0.6 * i / (count - 1)
        r = 0.1 + 0.11 * math.sin(math.pi * (i + 0.6) / count) * rng.uniform(0.75, 1.2)
        s.disc(x, 0.6 - r * 0.55, r, (255, 255, 255))
    s.poly([(0.16, 0.5), (0.84, 0.5), (0.9, 0.6), (0.84, 0.67), (0.16, 0.67), (0.1, 0.6)], (240, 245, 253))
    s.disc(0.16, 0.585, 0.085, (244, 248, 254))
    s.disc(0.84, 0.585, 0.085, (240, 245, 253))


def flower(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    petals: RGB = ((242, 92, 120), (255, 205, 70), (250, 250, 255), (170, 110, 226), (255, 140, 60), (250, 130, 190))[
        variant % 6
    ]
    s.line([(0.5, 1.0), (0.5, 0.4)], (70, 150, 70), 0.06)
    s.poly([(0.5, 0.85), (0.72, 0.66), (0.62, 0.9)], (82, 168, 78))
    for i in range(6):
        angle = 2 * math.pi * i / 6
        s.disc(0.5 + 0.16 * math.cos(angle), 0.32 + 0.16 * math.sin(angle), 0.125, petals)
    s.disc(0.5, 0.32, 0.1, (255, 190, 40) if variant % 6 != 1 else (176, 98, 40))


def tuft(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    colour = {"spring": (92, 178, 70), "summer": (64, 150, 62), "autumn": (186, 150, 66), "winter": (206, 220, 236)}[
        season
    ]
    for i in range(6):
        x = 0.25 + 0.5 * i / 5
        tip = x + (x - 0.5) * 0.9 + rng.uniform(-0.05, 0.05)
        s.poly(
            [(x - 0.05, 1.0), (tip, rng.uniform(0.3, 0.55)), (x + 0.05, 1.0)],
            colour if i % 2 else lighter(colour, 0.15),
        )


def rock(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    colour: RGB = ((138, 140, 150), (158, 146, 134), (116, 122, 136))[variant % 3]
    tip = rng.uniform(0.4, 0.6)
    s.poly([(0.08, 1.0), (0.16, 0.68), (tip - 0.12, 0.5), (tip + 0.1, 0.52), (0.84, 0.7), (0.93, 1.0)], colour)
    s.poly([(0.16, 0.68), (tip - 0.12, 0.5), (tip + 0.1, 0.52), (0.5, 0.72)], lighter(colour, 0.22))


def leaf(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    colour = FOLIAGE["autumn"][variant % 4]
    s.poly([(0.1, 0.62), (0.4, 0.42), (0.92, 0.5), (0.55, 0.74)], colour)


def shell(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    if variant % 2:
        points = []
        for i in range(10):
            r = 0.42 if i % 2 == 0 else 0.19
            angle = math.radians(-90 + 36 * i)
            points.append((0.5 + r * math.cos(angle), 0.6 + 0.8 * r * math.sin(angle)))
        s.poly(points, (240, 130, 86))
    else:
        s.poly([(0.5, 0.92), (0.14, 0.62), (0.25, 0.42), (0.5, 0.34), (0.75, 0.42), (0.86, 0.62)], (250, 222, 206))
        for x in (0.28, 0.42, 0.58, 0.72):
            s.line([(0.5, 0.9), (x, 0.42)], (226, 176, 160), 0.03)


def weed(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    colour: RGB = ((40, 140, 96), (66, 160, 84), (30, 118, 104))[variant % 3]
    for k, (x, top) in enumerate(((0.34, 0.34), (0.52, 0.08), (0.68, 0.42))):
        bend = [(x + 0.05 * math.sin(6 * t + variant + k), 1 - (1 - top) * t) for t in np.linspace(0, 1, 9)]
        s.line(bend, lighter(colour, 0.12 * k), 0.075)


def coral(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    colour: RGB = ((246, 108, 122), (250, 152, 84), (196, 110, 206))[variant % 3]
    for angle in (-150, -120, -92, -62, -34):
        a = math.radians(angle + rng.uniform(-6, 6))
        reach = rng.uniform(0.5, 0.72)
        knee = (0.5 + 0.45 * reach * math.cos(a), 0.98 + 0.5 * reach * math.sin(a))
        tip = (0.5 + 0.6 * reach * math.cos(a), 0.98 + reach * math.sin(a))
        s.line([(0.5, 1.0), knee, tip], colour, 0.1)
        s.disc(*tip, 0.065, lighter(colour, 0.2))


def lamp(s: Sheet, rng: random.Random, season: str, variant: int) -> None:
    s.line([(0.5, 1.0), (0.5, 0.18)], (66, 72, 88), 0.045)
    s.poly([(0.4, 1.0), (0.44, 0.94), (0.56, 0.94), (0.6, 1.0)], (66, 72, 88))
    s.poly([(0.42, 0.2), (0.39, 0.08), (0.61, 0.08), (0.58, 0.2)], (255, 238, 176))
    s.poly([(0.37, 0.08), (0.5, 0.02), (0.63, 0.08)], (66, 72, 88))


PAINTERS: dict[str, Callable[[Sheet, random.Random, str, int], None]] = {
    f.__name__: f for f in (tree, pine, palm, cactus, bush, cloud, flower, tuft, rock, leaf, shell, weed, coral, lamp)
}


SEASONAL = {"tree": None, "bush": None, "tuft": None, "pine": ("winter",)}


@lru_cache(1024)
def drawing(kind: str, style: str, season: str, variant: int) -> tuple[Pixels, tuple[float, float, float, float]]:
    """The trimmed premultiplied drawing, and what part of its sheet it fills (left, top, width, height as shares)."""
    sheet = Sheet(style)
    PAINTERS[kind](sheet, random.Random(f"{kind}/{variant}"), season, variant)
    rgba = premultiply(sheet.rgba())
    ys, xs = np.nonzero(rgba[..., 3] > 0)
    y0, y1, x0, x1 = int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1
    shrunk = (max(1, round((x1 - x0) * STORED / SHEET)), max(1, round((y1 - y0) * STORED / SHEET)))
    cut = cv2.resize(rgba[y0:y1, x0:x1], shrunk, interpolation=cv2.INTER_AREA)
    return cut, (x0 / SHEET, y0 / SHEET, (x1 - x0) / SHEET, (y1 - y0) / SHEET)


@lru_cache(2048)
def _level(kind: str, style: str, season: str, variant: int, level: int) -> Pixels:
    if level:
        return halved(_level(kind, style, season, variant, level - 1))
    return drawing(kind, style, season, variant)[0]


@lru_cache(6144)
def scaled(kind: str, style: str, season: str, variant: int, width: int, height: int, mirror: bool) -> Stamp:
    stored = drawing(kind, style, season, variant)[0].shape
    level = min(halvings(stored[1], width), halvings(stored[0], height))
    rgba: Pixels = cv2.resize(_level(kind, style, season, variant, level), (width, height))
    return stamp(cv2.flip(rgba, 1) if mirror else rgba)


def place(
    canvas: Canvas, kind: str, x: float, foot: float, size: float, light: Light,
    variant: int = 0, season: str | None = None, mirror: bool = False,
) -> None:  # fmt: skip
    """Set a drawing on the canvas: x is the middle of its sheet, foot its lower edge, size the sheet's side."""
    known = SEASONAL.get(kind, ())
    season = season if season and (known is None or season in known) else "summer"
    _, (left, top, wide, high) = drawing(kind, canvas.style, season, variant)
    # Sizes snap to steps of about 10 %, so that the cache of scaled drawings serves nearly every call.
    side = size * canvas.size
    step = 2 ** (max(0, math.floor(math.log2(max(side, 1))) - 3))
    side = max(4, round(side / step) * step)
    width, height = max(1, round(wide * side)), max(1, round(high * side))
    offset = (1 - left - wide) if mirror else left
    x0 = round(x * canvas.size - side / 2 + offset * side)
    y0 = round(foot * canvas.size - (1 - top) * side)
    canvas.lay(scaled(kind, canvas.style, season, variant, width, height, mirror), x0, y0, light)
