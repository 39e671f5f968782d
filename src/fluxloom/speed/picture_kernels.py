"""Group norm and swish of pictures that lie channels last, fused in Triton: two reads and one write.

The twin is ``F.silu(norm(x))``. Statistics are summed in float32, by tile and then over tiles in a fixed order: of the
same picture, the same bits. Importing this needs Triton.
"""

# Kernels are in Triton's language, whose types are not Python's; the function below them is typed.
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_TILE = 8192  # numbers a program: at 512 channels 16 pixels, at 128 channels 64
_WARPS = 8


@triton.jit
def _sums_kernel(
    x, sums, pixels, C: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum and sum of squares of each group over P pixels: sums [B, tiles, 2, G]."""
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, cols = tile * P + tl.arange(0, P), tl.arange(0, BLOCK)
    mask = (rows < pixels)[:, None] & (cols < C)[None, :]
    at = (batch * pixels + rows.to(tl.int64))[:, None] * C + cols[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    first, second = tl.sum(value, axis=0), tl.sum(value * value, axis=0)
    out = sums + (batch * tl.num_programs(0) + tile) * 2 * G
    groups = tl.arange(0, BLOCK // EACH)
    tl.store(out + groups, tl.sum(tl.reshape(first, [BLOCK // EACH, EACH]), axis=1), mask=groups < G)
    tl.store(out + G + groups, tl.sum(tl.reshape(second, [BLOCK // EACH, EACH]), axis=1), mask=groups < G)


@triton.jit
def _swish_kernel(x, out, factor, offset, pixels, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """silu(x factor + offset), factor and offset [B, C] float32."""
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, cols = tile * P + tl.arange(0, P), tl.arange(0, BLOCK)
    mask = (rows < pixels)[:, None] & (cols < C)[None, :]
    at = (batch * pixels + rows.to(tl.int64))[:, None] * C + cols[None, :]
    a = tl.load(factor + batch * C + cols, mask=cols < C, other=0.0)[None, :]
    b = tl.load(offset + batch * C + cols, mask=cols < C, other=0.0)[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * a + b
    value = value / (1.0 + tl.exp(-value))
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


def swished(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """``F.silu(norm(x))`` of x [B, C, H, W], channels last in memory, like its result.

    Raises ValueError for pictures that lie otherwise, and for groups whose width is no power of two.
    """
    batch, channels, height, width = x.shape
    pixels, groups = height * width, norm.num_groups
    each = channels // groups
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"got strides {x.stride()}, allowed channels last, try contiguous(memory_format=...)")
    if each & (each - 1):
        raise ValueError(f"got groups of {each} channels, allowed powers of two, try the twin")
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE // block)
    tiles = triton.cdiv(pixels, rows)
    sums = torch.empty(batch, tiles, 2, groups, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _sums_kernel[(tiles, batch)](
            x, sums, pixels, C=channels, G=groups, EACH=each, P=rows, BLOCK=block, num_warps=_WARPS
        )
        mean, square = (sums.sum(1) / (pixels * each)).unbind(1)
        inverse = torch.rsqrt((square - mean * mean).clamp_min(0) + norm.eps)
        factor = norm.weight.float() * inverse.repeat_interleave(each, dim=1)
        offset = norm.bias.float() - mean.repeat_interleave(each, dim=1) * factor
        _swish_kernel[(tiles, batch)](x, out, factor, offset, pixels, C=channels, P=rows, BLOCK=block, num_warps=_WARPS)
    return out
