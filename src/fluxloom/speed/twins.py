"""What lies between the matrix products of a step, in plain PyTorch: the twins of the fused kernels.

Same names, arguments and numbers as :mod:`fluxloom.speed.kernels`, on any device. Arithmetic is in float32 inside and
rounded once, at the end; core rounds after every operation, so that in 16 bits these are the nearer to the truth.
Legend: B batch, L tokens, D width, N heads. ``x`` is [B, L, D] with a contiguous last axis; its rows may be strided, as
those of a view are. Vectors (shift, scale, gate) are [B, D].
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxloom.core.attention import rotate
from fluxloom.errors import BadInput

Low = tuple[Tensor, Tensor]  # codes [B, L, D] of 8 bits, scale float32 [B, L, 1]: x ~ codes * scale
Form = str | None  # None: in x's own dtype; or a key of FORMS
Three = tuple[Tensor, Tensor, Tensor]  # queries, keys, values
Places = tuple[Tensor, Tensor, Tensor | None]  # for them

# What a form stores, and its largest value: e4m3 without infinities ends at 448 (Micikevicius et al. 2022), and int8
# keeps to +-127, so that the codes are as many on both sides of zero.
FORMS: Mapping[str, tuple[torch.dtype, float]] = MappingProxyType(
    {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}
)
CODES = FORMS["fp8"][0]
LEAST = 1e-30  # scales are no smaller: a row of zeros has codes of zeros, and 1 / scale is finite
EPS = 1e-6  # of all norms of FLUX.1


def stored(form: str) -> tuple[torch.dtype, float]:
    """dtype and largest value of a form. Raises BadInput for an unknown one."""
    if form not in FORMS:
        raise BadInput(f"got form {form!r}, allowed {', '.join(FORMS)}, try one of them")
    return FORMS[form]


def quantised(x: Tensor, form: str) -> Low:
    """Codes and a scale a token, absmax / largest code; what is not finite in a row makes its scale so.

    Raises BadInput for an unknown form.
    """
    dtype, limit = stored(form)
    y = x.float()
    scale = (y.abs().amax(-1, keepdim=True) * (1 / limit)).clamp(min=LEAST)
    y = y * (1 / scale)  # past the limit by two roundings at most, and so never past the last code
    return (y.round().to(dtype) if dtype == torch.int8 else y.to(dtype)), scale


def together(shift: Tensor | None, scale: Tensor | None, form: Form) -> None:
    """Raises ValueError for a part of what makes one result."""
    if (shift is None) != (scale is None) or (shift is None and form is not None):
        raise ValueError("got a part of shift, scale and form, allowed both vectors or nothing, try giving both")


def modulated(x: Tensor, shift: Tensor, scale: Tensor, form: Form = None) -> Tensor | Low:
    """(1 + scale) LayerNorm(x) + shift, in x's dtype or in a form of 8 bits."""
    return _stored(_modulated(x.float(), shift, scale), form, x.dtype)


def gated(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    form: Form = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | Low | None]:
    """x' = x + gate y, and what :func:`modulated` makes of it (of x' before it is rounded), unless shift is None.

    x' is written to ``out`` where given: x itself, or a view of a wider buffer. shift and scale come together.
    """
    together(shift, scale, form)
    total = x.float() + gate.float()[:, None] * y.float()
    low = None
    if shift is not None and scale is not None:
        low = _stored(_modulated(total, shift, scale), form, x.dtype)
    return (total.to(x.dtype) if out is None else out.copy_(total)), low


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
    """Queries and keys of one stream, RMS-normalised a head and turned by their positions, where attention wants them.

    qkv [B, L, (3 N D)], q_norm and k_norm [D], cos and sin float32 [B or 1, L, D/2]. Without ``out``, queries and keys
    are overwritten in place, and (q, k, v) are views [B, L, N, D] of qkv. With ``out``, tensors [B, L_all, N, D], they
    are written to their rows at .. at + L, and ``out`` is returned; values without a place stay where they are. Heads
    may have their places in groups, [B, L_all, groups, N / groups, D].

    Places of e4m3 get codes without a scale: a norm's outputs are of the size of its weights, about 1, and at most
    sqrt(D) times that; e4m3 is as exact from 2^-6 to 448, and what lies past it becomes 448.
    """
    q, k, v = split(qkv, heads)
    angles = cos[:, :, None], sin[:, :, None]
    turned = [rotate(_rms(one.float()) * norm.float(), angles) for one, norm in ((q, q_norm), (k, k_norm))]
    if out is None:
        return q.copy_(turned[0]), k.copy_(turned[1]), v
    for whole, part in zip(out, (*turned, v), strict=True):
        if whole is not None:
            part = part.unflatten(2, whole.shape[2:-1])
            whole[:, at : at + v.shape[1]].copy_(unscaled(part) if whole.dtype == CODES else part)
    return out[0], out[1], v if out[2] is None else out[2]


def unscaled(x: Tensor) -> Tensor:
    """e4m3 codes of numbers as they are; those past the largest become it."""
    limit = FORMS["fp8"][1]
    return x if x.dtype == CODES else x.clamp(-limit, limit).to(CODES)


def by_head(x: Tensor) -> Low:
    """e4m3 codes of x [B, L, N, D] with a scale for each head, float32 [B, N]."""
    limit = FORMS["fp8"][1]
    scale = (x.abs().amax((1, 3)).float() * (1 / limit)).clamp(min=LEAST)
    return (x.float() * (1 / scale)[:, None, :, None]).to(CODES), scale


def split(qkv: Tensor, heads: int) -> Three:
    """Views [B, L, N, D] of a fused projection [B, L, (3 N D)]: all queries, then keys, then values."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    return q, k, v


def gelu(x: Tensor, form: Form = None) -> Tensor | Low:
    """x Phi(x) in its tanh approximation (Hendrycks and Gimpel 2016)."""
    return _stored(_gelu(x), form, x.dtype)


def activated(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gelu of a linear layer, x [.., I] to [.., O]."""
    return _gelu(F.linear(x, weight, bias)).to(x.dtype)


def beside(attended: Tensor, hidden: Tensor, form: Form = None) -> Tensor | Low:
    """[attended [B, L, W], gelu(hidden [B, L, M])] as one [B, L, W + M]: what a single block's last product takes."""
    return _stored(torch.cat((attended.float(), _gelu(hidden)), dim=-1), form, attended.dtype)


def rescaled(sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sums [M, O] of a product of codes (int32) times their scales, rows [M, 1] and columns [O], plus a bias [O]."""
    y = sums.float() * rows * columns
    return (y if bias is None else y + bias.float()).to(dtype)


def _stored(y: Tensor, form: Form, dtype: torch.dtype) -> Tensor | Low:
    return y.to(dtype) if form is None else quantised(y, form)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale.float()[:, None]) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift.float()[:, None]


def _rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x.float(), approximate="tanh")
