"""Patch arithmetic: pixels, latent cells and tokens. This is its only home.

A picture of H x W pixels is a latent of h x w cells (h = H/8), packed 2 x 2 into (h/2)(w/2) tokens of
4 C channels. Legend: B batch, C channels, h/w latent cells, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor

CELL = 8  # pixels a latent cell, along each side
PATCH = 2  # latent cells a token, along each side
TOKEN = CELL * PATCH  # pixels a token, along each side


def latent_hw(width: int, height: int) -> tuple[int, int]:
    """Latent cells (h, w) of a picture in pixels; an unfinished token is completed (official rule: ceil)."""
    return PATCH * -(-height // TOKEN), PATCH * -(-width // TOKEN)


def token_count(width: int, height: int) -> int:
    """Packed tokens of a picture: 1024 x 1024 -> 4096."""
    h, w = latent_hw(width, height)
    return h * w // PATCH**2


def pack(z_BChw: Tensor) -> Tensor:
    """Latent to tokens, row-major; inside a token the order is (channel, row, column)."""
    return rearrange(z_BChw, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack(x_BLC: Tensor, h: int, w: int) -> Tensor:
    """Inverse of :func:`pack` for a latent of h x w cells."""
    return rearrange(x_BLC, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=h // PATCH, ph=PATCH, pw=PATCH)


def image_ids(h: int, w: int, index: int = 0) -> Tensor:
    """Position ids [L, 3] = (index, row, column) of a latent of h x w cells, float32.

    ``index`` is 0 for the picture being drawn and 1 for a Kontext reference. float32 matters: bfloat16
    loses odd integers above 256.
    """
    ids = torch.zeros(h // PATCH, w // PATCH, 3)
    ids[..., 0] = index
    ids[..., 1] = torch.arange(h // PATCH)[:, None]
    ids[..., 2] = torch.arange(w // PATCH)[None, :]
    return rearrange(ids, "h w a -> (h w) a")


def text_ids(length: int) -> Tensor:
    """Position ids [L, 3] of text tokens: all zero."""
    return torch.zeros(length, 3)


def nearest_size(width: int, height: int, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The (w, h) of ``sizes`` of the nearest aspect ratio; ties go to the smallest, the official rule."""
    aspect = width / height
    return min((abs(aspect - w / h), w, h) for w, h in sizes)[1:]


def fit_size(width: int, height: int, multiple: int, min_side: int, max_area: int) -> tuple[int, int]:
    """An allowed (w, h) of about the same aspect: scaled into the limits, sides rounded to ``multiple``."""
    scale = min(max(1.0, min_side / min(width, height)), (max_area / (width * height)) ** 0.5)
    sides = [max(min_side, round(side * scale / multiple) * multiple) for side in (width, height)]
    while sides[0] * sides[1] > max_area and max(sides) > min_side:  # rounding up may overshoot
        sides[sides.index(max(sides))] -= multiple
    return sides[0], sides[1]
