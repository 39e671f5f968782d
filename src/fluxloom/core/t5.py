"""The encoder of T5 v1.1, whose last states are the text tokens of FLUX.1.

Modules are named as in the published files, so that a state loads without translation. What sets T5 apart: no
biases, RMS norms, no scale in the attention (the initialisation of its queries holds it), and positions that are known
only as learned biases for binned distances, which the first layer owns and all layers use. Padding is attended, as in
every FLUX.1 pipeline. Sources: Raffel et al. 2020 (arXiv 1910.10683), Shazeer 2020 (arXiv 2002.05202; gated GELU),
and the published configuration of google/t5-v1_1-xxl (eps 1e-6).

Its feed-forward layers exceed 65,504 in the residual stream: compute in bfloat16 or float32, not in float16.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fluxloom.core.specs import T5Spec


def position_buckets(length: int, buckets: int, max_distance: int, device: torch.device | None = None) -> Tensor:
    """The bucket [L, L] of each pair (query row, key column), int64.

    Half of the buckets are for keys that come after the query. Of each half, the first half hold one distance each;
    the others grow by equal factors and end at ``max_distance``; the last takes everything beyond.
    """
    place = torch.arange(length, device=device)
    distance = place[None, :] - place[:, None]
    half = buckets // 2
    exact = half // 2
    far = distance.abs().clamp(min=exact).float()
    grown = exact + (torch.log(far / exact) / math.log(max_distance / exact) * (half - exact)).long()
    near = torch.where(distance.abs() < exact, distance.abs(), grown.clamp(max=half - 1))
    return near + half * (distance > 0)


class _RMSNorm(nn.Module):
    """Divides by the root mean square, computed in float32; nothing is subtracted, nothing added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)
        return self.weight * normed.to(self.weight.dtype)


class _Attention(nn.Module):
    """Attention of all tokens with all; the first layer's holds the biases [buckets, heads] of distances."""

    def __init__(self, spec: T5Spec, *, first: bool) -> None:
        super().__init__()
        inner = spec.heads * spec.head_dim
        self.heads = spec.heads
        self.q = nn.Linear(spec.width, inner, bias=False)
        self.k = nn.Linear(spec.width, inner, bias=False)
        self.v = nn.Linear(spec.width, inner, bias=False)
        self.o = nn.Linear(inner, spec.width, bias=False)
        if first:
            self.relative_attention_bias = nn.Embedding(spec.buckets, spec.heads)

    def forward(self, x_BLD: Tensor, bias_1NLL: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x_BLD), "b l (n d) -> b n l d", n=self.heads) for project in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_1NLL.to(q.dtype), scale=1.0)
        out: Tensor = self.o(rearrange(mixed, "b n l d -> b l (n d)"))
        return out


class _SelfAttention(nn.Module):
    def __init__(self, spec: T5Spec, *, first: bool) -> None:
        super().__init__()
        self.SelfAttention = _Attention(spec, first=first)
        self.layer_norm = _RMSNorm(spec.width)

    def forward(self, x_BLD: Tensor, bias_1NLL: Tensor) -> Tensor:
        out: Tensor = x_BLD + self.SelfAttention(self.layer_norm(x_BLD), bias_1NLL)
        return out


class _FeedForward(nn.Module):
    """A linear layer gated by the (tanh-approximated) GELU of another."""

    def __init__(self, spec: T5Spec) -> None:
        super().__init__()
        layers = {
            "wi_0": nn.Linear(spec.width, spec.mlp, bias=False),
            "wi_1": nn.Linear(spec.width, spec.mlp, bias=False),
            "wo": nn.Linear(spec.mlp, spec.width, bias=False),
        }
        self.DenseReluDense = nn.ModuleDict(layers)
        self.layer_norm = _RMSNorm(spec.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        dense, h = self.DenseReluDense, self.layer_norm(x_BLD)
        out: Tensor = x_BLD + dense["wo"](F.gelu(dense["wi_0"](h), approximate="tanh") * dense["wi_1"](h))
        return out


class _Block(nn.Module):
    def __init__(self, spec: T5Spec, *, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_SelfAttention(spec, first=first), _FeedForward(spec)])

    def forward(self, x_BLD: Tensor, bias_1NLL: Tensor) -> Tensor:
        out: Tensor = self.layer[1](self.layer[0](x_BLD, bias_1NLL))
        return out


class _Stack(nn.Module):
    def __init__(self, spec: T5Spec) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Block(spec, first=i == 0) for i in range(spec.layers))
        self.final_layer_norm = _RMSNorm(spec.width)

    def forward(self, x_BLD: Tensor, buckets_LL: Tensor) -> Tensor:
        table = self.get_submodule("block.0.layer.0.SelfAttention.relative_attention_bias")
        bias = rearrange(table(buckets_LL), "q k n -> 1 n q k").contiguous()
        for block in self.block:
            x_BLD = block(x_BLD, bias)
        out: Tensor = self.final_layer_norm(x_BLD)
        return out


class T5Encoder(nn.Module):
    """Token ids [B, L] of any length to states [B, L, D]. FLUX.1 pads texts with id 0 to 512 (schnell: 256); since
    padding is attended, another length gives other states."""

    def __init__(self, spec: T5Spec) -> None:
        super().__init__()
        self.spec = spec
        self.shared = nn.Embedding(spec.vocab_size, spec.width)
        self.encoder = _Stack(spec)

    def forward(self, ids_BL: Tensor) -> Tensor:
        spec = self.spec
        buckets = position_buckets(ids_BL.shape[1], spec.buckets, spec.max_distance, ids_BL.device)
        out: Tensor = self.encoder(self.shared(ids_BL), buckets)
        return out
