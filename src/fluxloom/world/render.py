"""From a scene to pixels: backdrop, shadows, items back to front, sign, what falls, and the picture filter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fluxloom.world.atlas import load_atlas
from fluxloom.world.built import paint_place
from fluxloom.world.colours import Pixels
from fluxloom.world.filters import apply_filter
from fluxloom.world.paint import Canvas
from fluxloom.world.scene import Backdrop, Item, Scene, Sign
from fluxloom.world.sky import Setting, item_light, paint_fall

SIGN_MARK = 255
NO_FLOOR = ("underwater", "sea")


@dataclass(frozen=True)
class Picture:
    """pixels [S, S, 3]; items [S, S]: 0 for the backdrop, k for item k (counted from 1), 255 for the sign."""

    pixels: Pixels
    items: Pixels


@lru_cache(12)
def _backdrop(backdrop: Backdrop, style: str, size: int) -> Pixels:
    canvas = Canvas(size, style)
    paint_place(Setting(canvas, backdrop))
    if style == "line":
        canvas.pixels = apply_filter(canvas.pixels, "ink", 0)
    canvas.pixels.setflags(write=False)
    return canvas.pixels


def render(scene: Scene, size: int) -> Picture:
    """Draw the scene as a square of `size` pixels; the same scene gives the same picture, always."""
    canvas = Canvas(size, scene.style)
    canvas.pixels = _backdrop(scene.backdrop, scene.style, size).copy()
    marks = np.zeros((size, size), np.uint8)
    if scene.sign:
        _draw_sign(canvas, marks, scene.sign, scene.backdrop)
    for k, item in enumerate(scene.items, 1):
        _draw_item(canvas, marks, item, scene, k)
    if scene.backdrop.weather:
        paint_fall(canvas, scene.backdrop)
    pixels = canvas.pixels
    if scene.filter:
        pixels = apply_filter(pixels, scene.filter, scene.backdrop.seed("details"))
    return Picture(pixels, marks)


def _draw_item(canvas: Canvas, marks: Pixels, item: Item, scene: Scene, mark: int) -> None:
    place, size = scene.backdrop.place, canvas.size
    atlas = load_atlas()
    concept = atlas.concept(item.concept)
    left, top, right, bottom = item.box(scene.style)
    # Even widths at even steps: the cache of scaled sprites then serves many scenes.
    width = max(4, 2 * round((right - left) * size / 2))
    height = max(4, 2 * round((bottom - top) * size / 2))
    if concept.stance == "stands" and place not in NO_FLOOR and bottom > 0.62:
        hard = canvas.flat
        canvas.spot(
            item.x,
            bottom - 0.004,
            (right - left) * 0.46,
            0.028 + 0.05 * (right - left),
            (14, 18, 40),
            0.2 if hard else 0.42,
            hard,
        )
    # Line drawings stay black on white in every light.
    tint = None if scene.style == "line" else item_light(place, scene.backdrop.time, scene.backdrop.weather)
    stamp = atlas.stamp(item.concept, scene.style, item.colour, item.mirror and concept.flip, width, height)
    x0, y0 = round(item.x * size - width / 2), round(bottom * size) - height
    canvas.lay(stamp, x0, y0, tint)
    clip = canvas.clip(x0, y0, width, height)
    if clip:
        ys, xs, sy, sx = clip
        marks[ys, xs][stamp.through[sy, sx, 0] < 128] = mark


@lru_cache(128)
def _lettering(text: str, height: int) -> Pixels:
    """The word as a coverage mask, its capitals `height` pixels tall."""
    font = ImageFont.load_default(120)
    x0, y0, x1, y1 = font.getbbox(text, stroke_width=5)
    sheet = Image.new("L", (int(x1 - x0) + 4, int(y1 - y0) + 4))
    ImageDraw.Draw(sheet).text((2 - x0, 2 - y0), text, 255, font=font, stroke_width=5)
    mask = np.asarray(sheet)
    mask = mask[np.flatnonzero(mask.any(1))[0] : np.flatnonzero(mask.any(1))[-1] + 1]
    width = max(1, round(mask.shape[1] * height / mask.shape[0]))
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA)


@lru_cache(128)
def lettering_width(text: str) -> float:
    """Width of a word over the height of its letters."""
    mask = _lettering(text, 64)
    return float(mask.shape[1] / mask.shape[0])


def sign_box(sign: Sign) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the board (its post reaches down to sign.y)."""
    half = sign.letters * (lettering_width(sign.text) / 2 + 0.45)
    high = sign.letters * 1.8
    return sign.x - half, sign.y - high - 0.11, sign.x + half, sign.y - 0.11


def _draw_sign(canvas: Canvas, marks: Pixels, sign: Sign, backdrop: Backdrop) -> None:
    size = canvas.size
    lit = item_light(backdrop.place, backdrop.time, backdrop.weather).on
    left, top, right, bottom = sign_box(sign)
    canvas.spot(sign.x, sign.y, 0.09, 0.02, (14, 18, 40), 0.4, canvas.flat)
    post, edge = 0.018, 0.012
    canvas.rect(sign.x - post, bottom - 0.01, sign.x + post, sign.y, lit((120, 78, 46)))
    canvas.rect(left - edge, top - edge, right + edge, bottom + edge, lit((112, 70, 38)))
    board = [(left, top), (right, top), (right, bottom), (left, bottom)]
    canvas.shaded(board, (lit((240, 200, 140)),) if canvas.flat else (lit((248, 212, 154)), lit((226, 180, 120))))
    for k in (0.3, 0.68):
        y = top + (bottom - top) * k
        canvas.line([(left, y), (right, y)], lit((222, 178, 118)), 0.004)
    mask = _lettering(sign.text, max(4, round(sign.letters * size)))
    x0 = round(sign.x * size - mask.shape[1] / 2)
    y0 = round((top + bottom) / 2 * size - mask.shape[0] / 2)
    if clip := canvas.clip(x0, y0, mask.shape[1], mask.shape[0]):
        ys, xs, sy, sx = clip
        ink = np.empty((*mask[sy, sx].shape, 3), np.uint8)
        ink[:] = lit((62, 34, 22))
        canvas.blend(ink, np.ascontiguousarray(mask[sy, sx]), xs.start, ys.start)
    for x0f, y0f, x1f, y1f in (
        (left - edge, top - edge, right + edge, bottom + edge),
        (sign.x - post, bottom, sign.x + post, sign.y),
    ):
        ya, yb, xa, xb = (min(size, max(0, round(v * size))) for v in (y0f, y1f, x0f, x1f))
        marks[ya:yb, xa:xb] = SIGN_MARK


def change_mask(source: Pixels, target: Pixels) -> NDArray[np.bool_]:
    """Exactly the pixels of which some channel differs by more than 2 of 255."""
    change: NDArray[np.bool_] = cv2.inRange(cv2.absdiff(source, target), (0, 0, 0), (2, 2, 2)) == 0
    return change
