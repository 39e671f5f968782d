"""Masks and larger canvases: what of a picture is to be repainted, and how a model or the loop is told so.

A mask is a tensor [1, 1, H, W] from 0 to 1, in pixels: 1 is repainted, 0 is kept, and what lies between is passed on
as it is. Legend: H/W pixels, h/w latent cells, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from fluxloom.core import shapes
from fluxloom.infer.pictures import resize, to_tensor

Margins = tuple[int, int, int, int]  # pixels to add at the left, top, right and bottom

_BLANK = (128, 128, 128)  # of new canvas: nearest to the 0 that masked pixels have in [-1, 1]


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture [1, 3, H, W] in [-1, 1] and its mask [1, 1, H, W]."""

    picture: Tensor
    mask: Tensor

    def masked(self) -> Tensor:
        """The picture without what is repainted: there it is 0, mid-grey (official: after scaling to [-1, 1])."""
        return self.picture * (1 - self.mask)


def lay(picture: Image.Image, mask: Image.Image | None, margins: Margins | None, width: int, height: int) -> Canvas:
    """A picture on its canvas, at the size to draw.

    picture  RGB; mask: of the same size, white where it is repainted, or None: only the margins are
    margins  pixels of the picture's own scale; they are repainted
    """
    whole, marked = picture, mask.convert("L") if mask is not None else Image.new("L", picture.size, 0)
    if margins is not None:
        left, top, right, bottom = margins
        size = (left + picture.width + right, top + picture.height + bottom)
        whole, marked = Image.new("RGB", size, _BLANK), Image.new("L", size, 255)
        whole.paste(picture, (left, top))
        marked.paste(
            mask.convert("L") if mask is not None else 0, (left, top, left + picture.width, top + picture.height)
        )
    if marked.size != (width, height):
        # Linear, not Lanczos: an edge between 0 and 1 must not ring.
        marked = marked.resize((width, height), Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.array(marked)).float()[None, None] / 255
    return Canvas(to_tensor(resize(whole, width, height)), values)


def mask_tokens(mask_11HW: Tensor) -> Tensor:
    """The mask as tokens [1, L, 256]: the 8 x 8 pixels of a cell become its channels, row by row, then cells are
    packed as any latent (official; a mask is passed on as it is, never rounded to 0 or 1)."""
    cells = rearrange(mask_11HW, "b 1 (h ph) (w pw) -> b (ph pw) h w", ph=shapes.CELL, pw=shapes.CELL)
    return shapes.pack(cells)


def mask_cells(mask_11HW: Tensor) -> Tensor:
    """The mask of latent cells [1, 1, h, w]: a cell is repainted as much as the most repainted of its pixels."""
    return F.max_pool2d(mask_11HW, shapes.CELL)
