"""What lies between the matrix products of a step, fused in Triton: one pass over memory each.

The functions are those of :mod:`fluxloom.speed.twins`, word for word; what they compute is said there. Importing this
needs Triton, which comes with PyTorch for CUDA; :func:`fluxloom.speed.ops.ops_for` picks the one or the other.

All kernels are bound by memory: in bf16 a step of 12 B at 1024 x 1024 moves 31 GB through them, 6.5 ms at the 4.8 TB/s
of an H200. So every number is read once and written once, 8 numbers of 16 bits an access. A program takes a row, 16
numbers a thread where a row has as many, and keeps it in registers: mean, variance and absmax are sums over what is
there already. ``beside`` with a form keeps its whole row of 15360 too, since its exponentials cost about as much as its
memory and are to be computed once. Vectors of a width come through the cache. Nothing is tuned at run time or
synchronised, and nothing but results allocated: after a first call, which compiles, CUDA graphs can capture others.
"""

# Kernels are in Triton's language, whose types are not Python's; the functions below them are typed.
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fluxloom.speed import twins
from fluxloom.speed.twins import CODES, Form, Low, Places, Three, split, stored

__all__ = ["activated", "beside", "by_head", "gated", "gelu", "modulated", "placed", "quantised", "rescaled", "split"]

_EACH = 16  # numbers a thread: two accesses of 16 bytes each, and enough rows in flight on a multiprocessor
_MOST_WARPS = 16
_TILE = 2048  # of kernels that need not see a whole row
_ROWS = 64  # tokens of a head a program, where a scale is sought for all of them: 8 accesses of 16 bytes a thread
_HEADS = 8  # at a time: 8 x 128 numbers each of queries, keys and values, one access of 16 bytes a thread of 4 warps

_EPS = tl.constexpr(twins.EPS)
_LARGEST_CODE = tl.constexpr(twins.FORMS["fp8"][1])
_LEAST = tl.constexpr(twins.LEAST)
_TO_INTEGER = tl.constexpr(1.5 * 2**23)  # added and taken off again, it leaves the nearest integer, ties to even
# x Phi(x) ~ x / (1 + 2^(x (A + B x^2))): tanh(u) = 2 / (1 + exp(-2u)) - 1 with u = sqrt(2/pi) (x + 0.044715 x^3)
_GELU_A = tl.constexpr(-2.302208198144325)
_GELU_B = tl.constexpr(-0.10294323939002268)


# ------------------------------------------------------------------------------------------------------------- pieces


@triton.jit
def _code(value, step, LIMIT: tl.constexpr):
    """Numbers as codes, still of float32; int8 ones are rounded here, e4m3 ones by the cast."""
    value = value * tl.div_rn(1.0, step)
    if LIMIT == 127:
        value = (value + _TO_INTEGER) - _TO_INTEGER
    return value


@triton.jit
def _largest(value):
    """Largest magnitude. By way of integers, whose order is that of positive floats and puts NaN above all."""
    return tl.max(tl.abs(value).to(tl.int32, bitcast=True), axis=0)


@triton.jit
def _step(largest, LIMIT: tl.constexpr):
    """Scale of a row from the bits of its largest magnitude; a NaN stays one."""
    step = largest.to(tl.float32, bitcast=True) * (1 / LIMIT)
    return tl.where(step < _LEAST, _LEAST, step)


@triton.jit
def _gelu(x):
    return x / (1.0 + tl.exp2(x * (_GELU_A + _GELU_B * x * x)))


@triton.jit
def _turned(source, norm, target, cos, sin, mask, cols, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Some heads [HEADS, BLOCK] of one token: RMS-normalised, and each pair (2k, 2k + 1) turned by its angle."""
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    # Once a head, though all are the same: each thread finds in the cache what it needs, and exchanges nothing.
    scale = tl.load(tl.broadcast_to((norm + cols)[None, :], [HEADS, BLOCK]), mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + _EPS)
    x = x * inverse[:, None] * scale
    even, odd = tl.split(tl.reshape(x, [HEADS, BLOCK // 2, 2]))
    x = tl.reshape(tl.join(cos * even - sin * odd, sin * even + cos * odd), [HEADS, BLOCK])
    if target.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x, -_LARGEST_CODE, _LARGEST_CODE, propagate_nan=tl.PropagateNan.ALL)
    tl.store(target, x.to(target.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _gated_kernel(
    x, y, gate, total, shift, scale, low, steps,
    x_batch, x_row, y_batch, y_row, total_batch, total_row, gate_batch, shift_batch, scale_batch,
    D: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """A row a program: x + gate y where there is a gate, its norm modulated where there is a shift."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    value = tl.load(x + batch * x_batch + row * x_row + cols, mask=mask, other=0.0).to(tl.float32)
    if gate is not None:
        added = tl.load(y + batch * y_batch + row * y_row + cols, mask=mask, other=0.0).to(tl.float32)
        value += tl.load(gate + batch * gate_batch + cols, mask=mask, other=0.0).to(tl.float32) * added
        tl.store(total + batch * total_batch + row * total_row + cols, value.to(total.dtype.element_ty), mask=mask)
    if shift is not None:
        moved = tl.load(shift + batch * shift_batch + cols, mask=mask, other=0.0).to(tl.float32)
        factor = 1.0 + tl.load(scale + batch * scale_batch + cols, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - tl.sum(value, axis=0) / D, 0.0)
        value = value * tl.rsqrt(tl.sum(value * value, axis=0) / D + _EPS) * factor + moved
        at = batch * tl.num_programs(0) + row
        if LIMIT:
            step = _step(_largest(value), LIMIT)
            tl.store(steps + at, step)
            value = _code(value, step, LIMIT)
        tl.store(low + at * D + cols, value.to(low.dtype.element_ty), mask=mask)


@triton.jit
def _placed_kernel(
    qkv, q_norm, k_norm, cos, sin, q, k, v,
    qkv_batch, qkv_row, angle_batch, angle_row,
    q_batch, q_row, q_group, q_head, k_batch, k_row, k_group, k_head, v_batch, v_row, v_group, v_head,
    N: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some heads of a token a program, of queries and keys, and of values where there is a place for them; GROUP heads
    lie together."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    heads = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    group, inside = (heads // GROUP).to(tl.int64)[:, None], (heads % GROUP)[:, None]
    cols = tl.arange(0, BLOCK)
    mask = (cols < D)[None, :]
    pairs = tl.arange(0, BLOCK // 2)
    angles = batch * angle_batch + row * angle_row + pairs
    c = tl.load(cos + angles, mask=pairs < D // 2, other=0.0)[None, :]
    s = tl.load(sin + angles, mask=pairs < D // 2, other=0.0)[None, :]
    source = qkv + batch * qkv_batch + row * qkv_row + heads[:, None] * D + cols[None, :]
    to_q = q + batch * q_batch + row * q_row + group * q_group + inside * q_head + cols[None, :]
    to_k = k + batch * k_batch + row * k_row + group * k_group + inside * k_head + cols[None, :]
    _turned(source, q_norm, to_q, c, s, mask, cols, D, HEADS, BLOCK)
    _turned(source + N * D, k_norm, to_k, c, s, mask, cols, D, HEADS, BLOCK)
    if v is not None:
        to_v = v + batch * v_batch + row * v_row + group * v_group + inside * v_head + cols[None, :]
        tl.store(to_v, tl.load(source + 2 * N * D, mask=mask), mask=mask)


@triton.jit
def _largest_kernel(
    x, largest, length, x_batch, x_row, x_head,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest magnitude of some tokens of a head, as bits: largest [B, N, tiles]."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, cols = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (rows < length)[:, None] & (cols < D)[None, :]
    source = x + batch * x_batch + rows.to(tl.int64)[:, None] * x_row + head * x_head + cols[None, :]
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    at = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + tile
    tl.store(largest + at, _largest(tl.reshape(value, [ROWS * BLOCK])))


@triton.jit
def _by_head_kernel(
    x, largest, codes, steps, length, x_batch, x_row, x_head,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Some tokens of a head a program, as codes by the largest magnitude of all."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    at, tiles = batch * tl.num_programs(1) + head, tl.arange(0, TILES)
    found = tl.load(largest + at * tl.num_programs(0) + tiles, mask=tiles < tl.num_programs(0), other=0)
    step = _step(tl.max(found, axis=0), LIMIT)
    tl.store(steps + at, step)  # the same by all that share it
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (rows < length)[:, None] & (cols < D)[None, :]
    source = x + batch * x_batch + rows.to(tl.int64)[:, None] * x_row + head * x_head + cols[None, :]
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    target = codes + ((batch * length + rows.to(tl.int64)[:, None]) * tl.num_programs(1) + head) * D + cols[None, :]
    tl.store(target, _code(value, step, LIMIT).to(codes.dtype.element_ty), mask=mask)


@triton.jit
def _joined_kernel(
    left, right, joined,
    left_batch, left_row, right_batch, right_row,
    W: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of a row of [left [W], gelu(right [M])] a program, first the tiles of left."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.program_id(2) * TILE + tl.arange(0, TILE)
    joined += (batch * tl.num_programs(0) + row) * (W + M)
    ours = (W + TILE - 1) // TILE
    if tl.program_id(2) < ours:
        value = tl.load(left + batch * left_batch + row * left_row + cols, mask=cols < W, other=0.0)
        tl.store(joined + cols, value.to(joined.dtype.element_ty), mask=cols < W)
    else:
        cols -= ours * TILE
        value = tl.load(right + batch * right_batch + row * right_row + cols, mask=cols < M, other=0.0)
        tl.store(joined + W + cols, _gelu(value.to(tl.float32)).to(joined.dtype.element_ty), mask=cols < M)


@triton.jit
def _joined_codes_kernel(
    left, right, codes, steps,
    left_batch, left_row, right_batch, right_row,
    W: tl.constexpr, M: tl.constexpr,
    LEFT: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """A row of [left [W], gelu(right [M])] a program, held in three parts: right is FIRST and up to REST numbers, as
    12288 = 8192 + 4096, since a third of 16384 threads' exponentials would be for nothing."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = batch * tl.num_programs(0) + row
    codes += at * (W + M)
    largest = tl.full([], 0, tl.int32)
    if W:
        i = tl.arange(0, LEFT)
        a = tl.load(left + batch * left_batch + row * left_row + i, mask=i < W, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, _largest(a))
    if M:
        right += batch * right_batch + row * right_row
        j, k = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
        b = tl.load(right + j)
        c = tl.load(right + k, mask=k < M, other=0.0)
        b, c = _gelu(b.to(tl.float32)), _gelu(c.to(tl.float32))
        largest = tl.maximum(largest, tl.maximum(_largest(b), _largest(c)))
    step = _step(largest, LIMIT)
    tl.store(steps + at, step)
    if W:
        tl.store(codes + i, _code(a, step, LIMIT).to(codes.dtype.element_ty), mask=i < W)
    if M:
        tl.store(codes + W + j, _code(b, step, LIMIT).to(codes.dtype.element_ty))
        tl.store(codes + W + k, _code(c, step, LIMIT).to(codes.dtype.element_ty), mask=k < M)


@triton.jit
def _rescaled_kernel(
    sums, rows, columns, bias, out, row_stride, O: tl.constexpr, TILE: tl.constexpr  # noqa: E741
):  # fmt: skip
    """A tile of a row a program: sums times the scales of row and columns, plus a bias where there is one."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = cols < O
    value = tl.load(sums + row * row_stride + cols, mask=mask, other=0).to(tl.float32)
    value = value * tl.load(rows + row) * tl.load(columns + cols, mask=mask, other=0.0)
    if bias is not None:
        value += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * O + cols, value.to(out.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------- launch


def modulated(x: Tensor, shift: Tensor, scale: Tensor, form: Form = None) -> Tensor | Low:
    """See :func:`twins.modulated`."""
    low = _room(x, x.shape[-1], form)
    _gated(x, None, None, None, shift, scale, low)
    return low[0] if form is None else low


def gated(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    form: Form = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | Low | None]:
    """See :func:`twins.gated`."""
    twins.together(shift, scale, form)
    total = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if shift is None or scale is None:
        _gated(x, y, gate, total, None, None, None)
        return total, None
    low = _room(x, x.shape[-1], form)
    _gated(x, y, gate, total, shift, scale, low)
    return total, low[0] if form is None else low


def placed(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    out: Places | None = None,
    at: int = 0,
) -> Three:
    """See :func:`twins.placed`."""
    parts = split(qkv, heads)
    batch, length, _, width = parts[0].shape
    q, k, v = parts if out is None else (whole if whole is None else whole[:, at : at + length] for whole in out)
    grouped = cast(Tensor, q).shape[2:-1]
    q, k, v = (one.unflatten(2, (1, heads)) if one is not None and len(grouped) == 1 else one for one in (q, k, v))
    shape = (batch, length, heads // grouped[-1], grouped[-1], width)
    strides = [stride for one in (q, k, v) for stride in ((0, 0, 0, 0) if one is None else _strides(one, shape))]
    turned = _strides(cos, (cos.shape[0], length, width // 2))
    if turned != _strides(sin, tuple(cos.shape)):
        raise ValueError(f"got strides {turned} of cosines and others of sines, allowed equal ones, try contiguous()")
    tile = min(_HEADS, heads & -heads)  # the largest power of two that divides the number of heads
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(qkv):
        _placed_kernel[(length, batch, heads // tile)](
            qkv, _vector(q_norm, (width,)), _vector(k_norm, (width,)), cos, sin, q, k, None if out is None else v,
            *_strides(qkv, (batch, length, 3 * heads * width)), turned[0] if cos.shape[0] == batch else 0, turned[1],
            *strides, N=heads, D=width, GROUP=grouped[-1], HEADS=tile, BLOCK=block, num_warps=_warps(2 * tile * block),
        )  # fmt: skip
    if out is None:
        return parts
    return out[0], out[1], parts[2] if out[2] is None else out[2]


def by_head(x: Tensor) -> Low:
    """See :func:`twins.by_head`."""
    batch, length, heads, width = x.shape
    tiles = triton.cdiv(length, _ROWS)
    largest = torch.empty(batch, heads, tiles, dtype=torch.int32, device=x.device)
    codes, steps = x.new_empty(x.shape, dtype=CODES), x.new_empty(batch, heads, dtype=torch.float32)
    given = {"D": width, "ROWS": _ROWS, "BLOCK": triton.next_power_of_2(width), "num_warps": 4}
    strides = _strides(x, (batch, length, heads, width))
    with torch.cuda.device_of(x):
        _largest_kernel[tiles, heads, batch](x, largest, length, *strides, **given)
        _by_head_kernel[tiles, heads, batch](
            x, largest, codes, steps, length, *strides, TILES=triton.next_power_of_2(tiles), LIMIT=LIMITS[CODES],
            **given,
        )  # fmt: skip
    return codes, steps


def gelu(x: Tensor, form: Form = None) -> Tensor | Low:
    """See :func:`twins.gelu`."""
    return _joined(None, x, form)


def activated(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`twins.activated`. cuBLAS does both at once, on its sums of float32: no pass over memory between."""
    if bias is None:
        return cast(Tensor, gelu(F.linear(x, weight)))
    flat: Tensor = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return flat.view(*x.shape[:-1], -1)


def beside(attended: Tensor, hidden: Tensor, form: Form = None) -> Tensor | Low:
    """See :func:`twins.beside`."""
    return _joined(attended, hidden, form)


def quantised(x: Tensor, form: str) -> Low:
    """See :func:`twins.quantised`."""
    stored(form)
    codes, steps = _joined(x, None, form)
    return codes, steps


def rescaled(sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See :func:`twins.rescaled`."""
    count, width = sums.shape
    if sums.stride(1) != 1:
        raise ValueError(f"got sums with strides {sums.stride()}, allowed a contiguous last axis, try contiguous()")
    out = torch.empty(count, width, dtype=dtype, device=sums.device)
    tile = min(_TILE, triton.next_power_of_2(width))
    with torch.cuda.device_of(sums):
        _rescaled_kernel[(count, triton.cdiv(width, tile))](
            sums, rows.contiguous(), _vector(columns, (width,)), None if bias is None else _vector(bias, (width,)),
            out, sums.stride(0), O=width, TILE=tile, num_warps=_warps(tile),
        )  # fmt: skip
    return out


def _gated(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    total: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    low: tuple[Tensor, Any] | None,
) -> None:
    batch, length, width = x.shape
    block = triton.next_power_of_2(width)
    rows = [
        stride for one in (x, y, total) for stride in (_strides(one, tuple(x.shape)) if one is not None else (0, 0))
    ]
    steps = [0 if one is None else _vector(one, (batch, width)).stride(0) for one in (gate, shift, scale)]
    limit = 0 if low is None or low[1] is None else LIMITS[low[0].dtype]
    with torch.cuda.device_of(x):
        _gated_kernel[(length, batch)](
            x, y, gate, total, shift, scale, *(low or (None, None)), *rows, *steps,
            D=width, BLOCK=block, LIMIT=limit, num_warps=_warps(block),
        )  # fmt: skip


def _joined(left: Tensor | None, right: Tensor | None, form: Form) -> Tensor | Low:
    given = [one for one in (left, right) if one is not None]
    batch, length, _ = given[0].shape
    w, m = (0 if one is None else one.shape[-1] for one in (left, right))
    strides = [
        stride
        for one, width in ((left, w), (right, m))
        for stride in ((0, 0) if one is None else _strides(one, (batch, length, width)))
    ]
    out, steps = _room(given[0], w + m, form)
    with torch.cuda.device_of(out):
        if steps is None:
            tile = min(_TILE, triton.next_power_of_2(max(w, m)))
            _joined_kernel[(length, batch, triton.cdiv(w, tile) + triton.cdiv(m, tile))](
                right if left is None else left, right, out, *strides, W=w, M=m, TILE=tile, num_warps=_warps(tile)
            )
            return out
        wide = triton.next_power_of_2(max(w, 1))
        first = 1 << max(m.bit_length() - 1, 0)  # the largest power of two in m
        rest = triton.next_power_of_2(max(m - first, 1))
        _joined_codes_kernel[(length, batch)](
            left, right, out, steps, *strides, W=w, M=m, LEFT=wide, FIRST=first, REST=rest,
            LIMIT=LIMITS[out.dtype], num_warps=_warps((wide if w else 0) + (first + rest if m else 0)),
        )  # fmt: skip
    return out, steps


LIMITS = {dtype: int(limit) for dtype, limit in twins.FORMS.values()}


def _room(like: Tensor, width: int, form: Form) -> tuple[Tensor, Any]:
    """Where a result [B, L, width] goes, and its scales [B, L, 1] if it has a form."""
    size = like.shape[:2]
    if form is None:
        return like.new_empty(*size, width), None
    return like.new_empty(*size, width, dtype=stored(form)[0]), like.new_empty(*size, 1, dtype=torch.float32)


def _warps(numbers: int) -> int:
    """The largest power of two that leaves each thread no fewer numbers than wanted."""
    return 1 << max(0, min(_MOST_WARPS, numbers // (32 * _EACH)).bit_length() - 1)


def _strides(x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of all axes but the last. Raises ValueError for another shape, or gaps in the last axis."""
    if tuple(x.shape) != shape or x.stride(-1) != 1:
        raise ValueError(
            f"got {list(x.shape)} with strides {x.stride()}, allowed {list(shape)} with a contiguous last axis, "
            f"try contiguous()"
        )
    return x.stride()[:-1]


def _vector(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    _strides(x, shape)
    return x
