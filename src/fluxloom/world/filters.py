"""Picture filters: pixel art, pencil sketch, watercolour, black and white; and ink for the line style."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from fluxloom.world.colours import Pixels

BLOCKS = 48  # of a pixel-art picture, along a side


def apply_filter(pixels: Pixels, name: str, seed: int) -> Pixels:
    return {"pixel": _pixel, "pencil": _pencil, "watercolour": _watercolour, "mono": _mono, "ink": _ink}[name](
        pixels, seed
    )


def _grey(pixels: Pixels) -> Pixels:
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _pixel(pixels: Pixels, seed: int) -> Pixels:
    size = pixels.shape[0]
    small = cv2.resize(pixels, (BLOCKS, BLOCKS), interpolation=cv2.INTER_AREA)
    small = np.round(small.astype(np.float32) / 17).astype(np.uint8) * np.uint8(17)
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_NEAREST)


def _mono(pixels: Pixels, seed: int) -> Pixels:
    return cv2.cvtColor(_grey(pixels), cv2.COLOR_GRAY2RGB)


def _pencil(pixels: Pixels, seed: int) -> Pixels:
    size = pixels.shape[0]
    grey = _grey(pixels)
    soft = cv2.GaussianBlur(grey, (0, 0), max(1.0, size / 56))
    dodge = cv2.divide(grey, soft, scale=250)
    strokes = cv2.convertScaleAbs(255 - dodge, alpha=2.2)  # graphite: contours at twice their contrast
    shade = cv2.subtract(cv2.addWeighted(grey, 0.36, grey, 0, 150), strokes)
    shade = cv2.multiply(shade, cv2.resize(_paper(seed % 7), (size, size)), scale=1 / 255)
    return cv2.merge([shade, shade, cv2.addWeighted(shade, 0.97, shade, 0, 3)])


def _watercolour(pixels: Pixels, seed: int) -> Pixels:
    size = pixels.shape[0]
    small = cv2.resize(pixels, (128, 128), interpolation=cv2.INTER_AREA)
    wet = cv2.medianBlur(small, 5)
    wet = cv2.resize(wet, (size, size), interpolation=cv2.INTER_LINEAR)
    edges = cv2.morphologyEx(_grey(wet), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    pale = cv2.addWeighted(wet, 0.8, wet, 0, 50)
    rim = cv2.cvtColor(cv2.convertScaleAbs(edges, alpha=0.5), cv2.COLOR_GRAY2RGB)
    paper = cv2.cvtColor(cv2.resize(_paper(seed % 7), (size, size)), cv2.COLOR_GRAY2RGB)
    return cv2.multiply(cv2.subtract(pale, rim), paper, scale=1 / 255)


def _ink(pixels: Pixels, seed: int) -> Pixels:
    """White paper, dark contours: the backdrop of the line style."""
    size = pixels.shape[0]
    grey = cv2.GaussianBlur(_grey(pixels), (0, 0), max(0.6, size / 400))
    edges = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    lines = 255 - np.clip(edges.astype(np.int32) * 5 - 20, 0, 220).astype(np.uint8)
    return cv2.cvtColor(lines, cv2.COLOR_GRAY2RGB)


@lru_cache(8)
def _paper(kind: int) -> Pixels:
    """Paper grain as a factor near 255."""
    noise = np.random.default_rng(kind).normal(0, 1, (256, 256)).astype(np.float32)
    coarse = cv2.GaussianBlur(noise, (0, 0), 6) * 6 + cv2.GaussianBlur(noise, (0, 0), 1.2)
    paper: Pixels = np.clip(246 + coarse * 5, 214, 255).astype(np.uint8)
    return paper
