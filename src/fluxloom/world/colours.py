"""The colours that things are named by: their values, how a pixel is named, how a sprite is recoloured."""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]  # uint8 throughout; OpenCV's stubs promise only "some number", hence Any
Floats = NDArray[Any]


class Colour(NamedTuple):
    rgb: tuple[int, int, int]
    en: str
    zh: str


COLOURS: dict[str, Colour] = {
    "red": Colour((226, 38, 44), "red", "红色"),
    "orange": Colour((252, 132, 20), "orange", "橙色"),
    "yellow": Colour((253, 212, 32), "yellow", "黄色"),
    "green": Colour((56, 172, 66), "green", "绿色"),
    "blue": Colour((38, 112, 232), "blue", "蓝色"),
    "purple": Colour((138, 62, 208), "purple", "紫色"),
    "pink": Colour((255, 118, 186), "pink", "粉色"),
    "brown": Colour((134, 82, 44), "brown", "棕色"),
    "black": Colour((44, 44, 52), "black", "黑色"),
    "white": Colour((240, 242, 246), "white", "白色"),
}

# Upper hue bound in degrees of each name, going round the circle.
HUES = ((14, "red"), (43, "orange"), (68, "yellow"), (168, "green"), (255, "blue"), (292, "purple"), (344, "pink"))


def _hsv(rgb: Pixels) -> tuple[Floats, Floats, Floats]:
    """Hue in degrees, saturation and value in [0, 1]."""
    hsv = cv2.cvtColor(rgb.astype(np.float32) / np.float32(255), cv2.COLOR_RGB2HSV).astype(np.float32)
    return hsv[..., 0], hsv[..., 1], hsv[..., 2]


def name_shares(rgba: Pixels) -> dict[str, float]:
    """Which share of the opaque area each colour name covers (grey counts as a name of its own)."""
    hue, sat, val = _hsv(rgba[..., :3])
    opaque = rgba[..., 3] > 128
    names = np.full(hue.shape, "red", dtype="<U6")
    low = 0.0
    for high, name in HUES:
        names[(hue >= low) & (hue < high)] = name
        low = high
    names[(names == "red") & (val > 0.8) & (sat < 0.55)] = "pink"
    names[np.isin(names, ("orange", "red")) & (val < 0.68) & (sat > 0.2) & (hue > 8) & (hue < 43)] = "brown"
    names[sat < 0.14] = "grey"
    names[(sat < 0.14) & (val > 0.84)] = "white"
    names[val < 0.26] = "black"
    found, counts = np.unique(names[opaque], return_counts=True)
    return {str(n): float(c) / float(counts.sum()) for n, c in zip(found, counts, strict=True)}


def _ramp(x: Floats, low: float, high: float) -> Floats:
    ramp: Floats = np.clip((x - np.float32(low)) / np.float32(high - low), 0, 1)
    return ramp


def paint_mask(rgba: Pixels, whole: bool = False) -> Floats:
    """The paint of a sprite in [0, 1]: its main hue, or where it has none, everything that is not ink.

    With `whole` everything is paint but ink and white: for things of several hues, such as a bus.
    """
    hue, sat, val = _hsv(rgba[..., :3])
    if whole:
        painted: Floats = _ramp(val, 0.2, 0.34) * (1 - _ramp(val, 0.82, 0.92) * (1 - _ramp(sat, 0.12, 0.2)))
        return painted
    alpha = rgba[..., 3].astype(np.float32) / np.float32(255)
    vivid = alpha * (sat > 0.22) * (val > 0.16)
    if vivid.sum() >= 0.3 * alpha.sum():
        bins = np.bincount((hue // 10).astype(np.int64).ravel() % 36, vivid.ravel(), 36)
        smooth = bins + np.roll(bins, 1) + np.roll(bins, -1)
        centre = 10.0 * float(np.argmax(smooth)) + 5.0
        distance = np.abs((hue - centre + 180) % 360 - 180)
        hued: Floats = (1 - _ramp(distance, 30, 46)) * _ramp(sat, 0.10, 0.24) * _ramp(val, 0.08, 0.2)
        return hued
    neutral: Floats = (1 - _ramp(sat, 0.3, 0.5)) * _ramp(val, 0.2, 0.34)
    return neutral


def recolour(rgba: Pixels, colour: str, whole: bool = False) -> Pixels:
    """The sprite with its paint in another colour; light, shade and everything that is not paint stay."""
    target = np.array(COLOURS[colour].rgb, np.float32)
    mask = paint_mask(rgba, whole)
    rgb = rgba[..., :3].astype(np.float32)
    light = rgb @ np.array([0.3, 0.59, 0.11], np.float32)
    painted = mask * (rgba[..., 3] > 64)
    if painted.sum() < 1:
        return rgba
    reference = float(np.percentile(light[painted > 0.5], 55)) if (painted > 0.5).any() else 128.0
    relative = (light / np.float32(max(reference, 1.0)))[..., None]
    shade = np.clip(relative, 0, 1) ** np.float32(0.85)
    gleam = np.clip((relative - 1) * np.float32(0.2 if colour == "black" else 0.4), 0, 0.4)
    fresh = target * shade + (255 - target) * gleam
    mixed = rgb + (fresh - rgb) * mask[..., None]
    return np.dstack([np.clip(mixed + 0.5, 0, 255).astype(np.uint8), rgba[..., 3]])
