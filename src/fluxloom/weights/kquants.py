"""Q4_K of GGUF as it is written; the ``gguf`` package only reads it.

A super-block of 256 weights is eight blocks of 32, each w = d s q - e m with q in 0..15 and s, m in 0..63; d and e are
float16 of the super-block. 144 bytes: d, e, eight (s, m) in 12 bytes, 128 bytes of q. Source of the layout: the block
types of GGUF; of the fit: least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxloom.weights.stored import CHUNK

BLOCK, BYTES = 256, 144
_TOP, _MOST = 15, 63  # greatest q, greatest s and m
# Rounds of the fit: levels for a line, a line for the levels. On Gaussian weights four lose 7.4 % (RMS, relative) at 33
# million weights a second and core; five starting scales with three rounds each 7.2 %, at a quarter of the speed.
_ROUNDS = 4


def q4_k(tensor: Tensor) -> Tensor:
    """uint8 [rows, columns / 256 x 144] of a matrix [rows, columns] of whole super-blocks."""
    rows, columns = tensor.shape
    step = max(1, CHUNK // columns)
    parts = [_super_blocks(part.float().reshape(-1, 8, 32)) for part in tensor.split(step)]
    return torch.cat(parts).reshape(rows, columns // BLOCK * BYTES)


def _super_blocks(x: Tensor) -> Tensor:
    """[N, 8, 32] weights as [N, 144] bytes."""
    scale, offset = _fit(x)
    d, e = ((limit.amax(1, keepdim=True) / _MOST).half().float() for limit in (scale, offset))
    s, m = (_divided(value, unit).round_().clamp_(0, _MOST) for value, unit in ((scale, d), (offset, e)))
    q = _divided(x + (e * m)[..., None], (d * s)[..., None]).round_().clamp_(0, _TOP).to(torch.uint8)
    halves = torch.cat((d, e), dim=1).half().view(torch.uint8)
    pairs = q.reshape(-1, 4, 2, 32)  # 64 weights: the first 32 in the low half of each byte
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)
    return torch.cat((halves, _packed(s.to(torch.uint8), m.to(torch.uint8)), nibbles), dim=1)


def _packed(s: Tensor, m: Tensor) -> Tensor:
    """Eight (s, m) of six bits in twelve bytes: the first four whole, with the high bits of the last four above."""
    low = s[:, :4] | (s[:, 4:] >> 4) << 6
    middle = m[:, :4] | (m[:, 4:] >> 4) << 6
    return torch.cat((low, middle, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4), dim=1)


def _fit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset (both at least zero) [N, 8] of blocks, x = scale q - offset, of the least squared error."""
    low = x.amin(-1).clamp_(max=0)
    span = (x.amax(-1) - low) / _TOP
    best, offset = span, -low
    scale, shift = span, -low
    least = torch.full_like(span, torch.inf)
    for _ in range(_ROUNDS):
        q = _divided(x + shift[..., None], scale[..., None]).round_().clamp_(0, _TOP)
        error = (scale[..., None] * q - shift[..., None] - x).square_().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best, offset = torch.where(better, scale, best), torch.where(better, shift, offset)
        scale, shift = _line(q, x)
    return best, offset


def _line(q: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The least squares line x = scale q - shift of each block; through the origin where shift would be negative."""
    n = q.shape[-1]
    sq, sx = q.sum(-1), x.sum(-1)
    sqq, sqx = q.square().sum(-1), (q * x).sum(-1)
    scale = _divided(n * sqx - sq * sx, n * sqq - sq.square())
    shift = (scale * sq - sx) / n
    scale = torch.where(shift < 0, _divided(sqx, sqq), scale)
    return scale.clamp_(min=0), shift.clamp_(min=0)


def _divided(a: Tensor, b: Tensor) -> Tensor:
    """a / b, zero where b is."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)
