"""Joint attention: rotary positions on three axes, RMS-normalised queries and keys.

Legend: B batch, N heads, L tokens, D head dimension, A position axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# cos and sin [B, 1, L, D/2], float32: one angle for each pair (2k, 2k+1) of the head dimension.
Rope = tuple[Tensor, Tensor]


def rope(ids_BLA: Tensor, axes_dim: Sequence[int], theta: int) -> Rope:
    """Angles of positions on several axes, concatenated: position / theta^(2k/d), k < d/2 (Su et al. 2021).

    The frequencies are computed in float64, as a float32 power is off by 1e-7 relative and the angle by that
    times the position.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=ids_BLA.device) / dim
        angles.append(ids_BLA[..., axis, None].double() * theta**-exponent)
    angle_B1LF = torch.cat(angles, dim=-1)[:, None]
    return angle_B1LF.cos().float(), angle_B1LF.sin().float()


def rotate(x_BNLD: Tensor, rope: Rope) -> Tensor:
    """Rotate interleaved pairs (x_2k, x_2k+1) by their angles, in float32; not halves, as some models do."""
    cos, sin = rope
    even, odd = x_BNLD.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1).flatten(-2).type_as(x_BNLD)


class RMSNorm(nn.Module):
    """x / rms(x) over the head dimension in float32, times a learned scale [D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return normed.type_as(x) * self.scale


class QKNorm(nn.Module):
    """Separate norms of queries and keys (Dehghani et al. 2023); both come back in v's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


def split_heads(qkv_BLX: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """A fused projection [B, L, (3 N D)] as q, k, v [B, N, L, D]: all queries, then keys, then values."""
    q, k, v = rearrange(qkv_BLX, "b l (k n d) -> k b n l d", k=3, n=heads).unbind(0)
    return q, k, v


def attention(q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor, rope: Rope) -> Tensor:
    """Softmax attention [B, L, (N D)] over all tokens; no mask: padding is attended, as FLUX was trained."""
    out_BNLD = F.scaled_dot_product_attention(rotate(q_BNLD, rope), rotate(k_BNLD, rope), v_BNLD)
    return rearrange(out_BNLD, "b n l d -> b l (n d)")
