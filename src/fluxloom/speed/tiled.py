"""The autoencoder tile by tile, for pictures that do not fit it whole.

An approximation: its group norms see a tile, not the picture, and so does the attention of its middle level. Tiles
overlap by 16 latent cells or more, across which each fades into the next. On nano, tiles of two thirds of a side decode
31 to 37 dB (PSNR) from the whole, about as far as the autoencoder's round trip is from the original.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.infer.plan import tiles


class Tiled(Autoencoder):
    """The same networks as another autoencoder's, asked tile by tile; smaller pictures pass whole, to the bit.

    cover  (tiles, cells of each) that cover a row of so many latent cells
    """

    def __init__(self, whole: Autoencoder, cover: Callable[[int], tuple[int, int]] = tiles) -> None:
        nn.Module.__init__(self)
        self.spec, self.encoder, self.decoder, self.cover = whole.spec, whole.encoder, whole.decoder, cover

    def encode(self, x: Tensor) -> Tensor:
        """Normalised latent [B, C, h, w] of pictures [B, 3, H, W] in [-1, 1]."""
        cell = self.spec.downsampling
        return self._tiled(super().encode, x, cell, 1)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of normalised latents [B, C, h, w]."""
        return self._tiled(super().decode, z, 1, self.spec.downsampling)

    def _tiled(self, run: Callable[[Tensor], Tensor], x: Tensor, before: int, after: int) -> Tensor:
        """``before`` and ``after``: pixels a cell, of what goes in and of what comes out."""
        rows, columns = (_places(size // before, *self.cover(size // before)) for size in x.shape[-2:])
        if len(rows) == len(columns) == 1:
            return run(x)
        out: Tensor | None = None
        share = x.new_zeros(1, 1, *(size // before * after for size in x.shape[-2:]))
        for top, bottom in rows:
            for left, right in columns:
                part = run(x[..., top * before : bottom * before, left * before : right * before])
                if out is None:
                    out = part.new_zeros(*part.shape[:2], *share.shape[-2:])
                height, width = share.shape[-2] // after, share.shape[-1] // after
                fade = (
                    _fade(top, bottom, height, rows, after).to(part)[:, None]
                    * _fade(left, right, width, columns, after).to(part)[None]
                )
                at = (..., slice(top * after, bottom * after), slice(left * after, right * after))
                out[at] += part * fade
                share[at] += fade
        assert out is not None
        return out / share


def _places(cells: int, count: int, side: int) -> list[tuple[int, int]]:
    """First and last cell of each tile of a row, evenly apart."""
    starts = [round(i * (cells - side) / max(1, count - 1)) for i in range(count)]
    return [(start, start + side) for start in starts]


def _fade(first: int, last: int, cells: int, places: list[tuple[int, int]], after: int) -> Tensor:
    """How much a tile counts, from edge to edge: it grows over what it shares with its neighbours."""
    size = (last - first) * after
    weight = torch.ones(size)
    before = [end - first for _, end in places if first < end < last]
    behind = [last - start for start, _ in places if first < start < last]
    if first > 0 and before:
        ramp = torch.arange(1, before[0] * after + 1) / (before[0] * after + 1)
        weight[: len(ramp)] *= ramp
    if last < cells and behind:
        ramp = torch.arange(1, behind[-1] * after + 1) / (behind[-1] * after + 1)
        weight[size - len(ramp) :] *= ramp.flip(0)
    return weight
