"""Redux: a picture as words. A vision tower reads it, an adapter turns what it saw into text tokens.

Weight names are those of the published files: the tower's as Hugging Face writes SigLIP (Zhai et al. 2023), without
its pooling head, which Redux does not read; the adapter's as in the official file. Legend: B batch, L patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ReduxSpec:
    """Shape of tower and adapter; defaults are SigLIP so400m/14 at 384 pixels (27 x 27 = 729 patches) and FLUX.1 Redux.

    ``out_dim`` is the width of the T5 tokens that the pictures' tokens stand beside.
    """

    width: int = 1_152
    layers: int = 27
    heads: int = 16
    mlp: int = 4_304
    patch: int = 14  # pixels
    side: int = 384  # pixels; the last 6 make no whole patch and are left out
    out_dim: int = 4_096

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return int((self.side // self.patch) ** 2)


class _Embeddings(nn.Module):
    def __init__(self, spec: ReduxSpec) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, spec.width, spec.patch, spec.patch)
        self.position_embedding = nn.Embedding(spec.tokens, spec.width)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        patches = self.patch_embedding(x_B3HW).flatten(2).transpose(1, 2)
        out: Tensor = patches + self.position_embedding.weight
        return out


class _Attention(nn.Module):
    def __init__(self, spec: ReduxSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(spec.width, spec.width) for _ in range(4))

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x_BLD), "b l (n d) -> b n l d", n=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out_proj(rearrange(mixed, "b n l d -> b l (n d)"))
        return out


class _Mlp(nn.Module):
    def __init__(self, spec: ReduxSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.width, spec.mlp)
        self.fc2 = nn.Linear(spec.mlp, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class _Layer(nn.Module):
    def __init__(self, spec: ReduxSpec) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(spec.width, eps=1e-6)
        self.self_attn = _Attention(spec)
        self.layer_norm2 = nn.LayerNorm(spec.width, eps=1e-6)
        self.mlp = _Mlp(spec)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class _Encoder(nn.Module):
    def __init__(self, spec: ReduxSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(spec) for _ in range(spec.layers))


class VisionTower(nn.Module):
    """Pictures to states of their patches."""

    def __init__(self, spec: ReduxSpec) -> None:
        super().__init__()
        self.embeddings = _Embeddings(spec)
        self.encoder = _Encoder(spec)
        self.post_layernorm = nn.LayerNorm(spec.width, eps=1e-6)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """States [B, L, D] of pictures in [-1, 1], of the spec's side."""
        x = self.embeddings(x_B3HW)
        for layer in self.encoder.layers:
            x = layer(x)
        out: Tensor = self.post_layernorm(x)
        return out


class Redux(nn.Module):
    """Vision tower (``vision_model.*``) and adapter (``redux_up``, ``redux_down``)."""

    def __init__(self, spec: ReduxSpec) -> None:
        super().__init__()
        self.spec = spec
        self.vision_model = VisionTower(spec)
        self.redux_up = nn.Linear(spec.width, 3 * spec.out_dim)
        self.redux_down = nn.Linear(3 * spec.out_dim, spec.out_dim)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """Text tokens [B, L, out_dim] of pictures [B, 3, side, side] in [-1, 1]."""
        out: Tensor = self.adapt(self.vision_model(x_B3HW))
        return out

    def adapt(self, states_BLD: Tensor) -> Tensor:
        """The adapter alone: states of a vision tower [B, L, D] to text tokens [B, L, out_dim]."""
        out: Tensor = self.redux_down(F.silu(self.redux_up(states_BLD)))
        return out
