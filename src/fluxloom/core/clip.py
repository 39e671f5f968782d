"""The text tower of CLIP ViT-L/14, whose pooled state FLUX.1 adds to the time embedding.

A causal transformer over 77 tokens. Modules are named as in the published files, so that a state loads without
translation. Sources: Radford et al. 2021 (arXiv 2103.00020) and the published configuration of
openai/clip-vit-large-patch14 (quick_gelu, layer norm with eps 1e-5).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fluxloom.core.specs import ClipSpec


class _Attention(nn.Module):
    """Self-attention of every token with those up to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x_BLD), "b l (n d) -> b n l d", n=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out_proj(rearrange(mixed, "b n l d -> b l (n d)"))
        return out


class _MLP(nn.Module):
    """Two linear layers around CLIP's quick GELU, x sigmoid(1.702 x); the exact GELU gives other pictures."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        h = self.fc1(x_BLD)
        out: Tensor = self.fc2(h * torch.sigmoid(1.702 * h))
        return out


class _Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(spec.width)
        self.self_attn = _Attention(spec.width, spec.heads)
        self.layer_norm2 = nn.LayerNorm(spec.width)
        self.mlp = _MLP(spec.width, spec.mlp)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x = x_BLD + self.self_attn(self.layer_norm1(x_BLD))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class _Layers(nn.Module):
    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(spec) for _ in range(spec.layers))

    def forward(self, x_BLD: Tensor) -> Tensor:
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        return x_BLD


class _TextModel(nn.Module):
    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        embeddings = {
            "token_embedding": nn.Embedding(spec.vocab_size, spec.width),
            "position_embedding": nn.Embedding(spec.max_length, spec.width),
        }
        self.embeddings = nn.ModuleDict(embeddings)
        self.encoder = _Layers(spec)
        self.final_layer_norm = nn.LayerNorm(spec.width)

    def forward(self, ids_BL: Tensor) -> Tensor:
        positions = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        x = self.embeddings["token_embedding"](ids_BL) + self.embeddings["position_embedding"](positions)
        out: Tensor = self.final_layer_norm(self.encoder(x))
        return out


class ClipText(nn.Module):
    """Token ids [B, L], L <= ``spec.max_length``, to states of all tokens [B, L, D] and pooled states [B, D].

    The end of the text is the last id of the vocabulary (49,407). A text is padded with it, and pooled is the state
    of the first one: after the causal layers that has seen the whole text and no padding. Raises ValueError where a
    text has no end or is too long.
    """

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.spec = spec
        self.text_model = _TextModel(spec)

    def forward(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        if ids_BL.shape[1] > self.spec.max_length:
            raise ValueError(f"got {ids_BL.shape[1]} tokens; CLIP reads at most {self.spec.max_length}")
        ends = ids_BL == self.spec.vocab_size - 1
        if not ends.any(dim=1).all():
            raise ValueError(f"got a text without its end token {self.spec.vocab_size - 1}")
        states = self.text_model(ids_BL)
        first = ends.int().argmax(dim=1)
        return states, states[torch.arange(len(states), device=states.device), first]
