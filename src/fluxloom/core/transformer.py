"""The multimodal diffusion transformer of FLUX.1: text and image in two streams, then woven into one.

Weight names are the official ones. Legend: B batch, L tokens, C channels, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxloom.core.attention import QKNorm, Rope, attention, rope, split_heads
from fluxloom.core.specs import TransformerSpec

_SINUSOID_DIM = 256


def sinusoid(t_B: Tensor, dim: int = _SINUSOID_DIM) -> Tensor:
    """[cos(1000 t f), sin(1000 t f)] with f = 10000^(-i/half), computed in float32, cosine half first."""
    half = dim // 2
    freqs = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angle = (1000 * t_B).float()[:, None] * freqs
    return torch.cat((angle.cos(), angle.sin()), dim=-1).type_as(t_B)


class MLPEmbedder(nn.Module):
    """A vector into the width of the model: linear, SiLU, linear."""

    def __init__(self, in_dim: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out


class Modulation(nn.Module):
    """The conditioning vector as ``parts`` vectors [B, 1, D]: (shift, scale, gate), once or twice."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(width, parts * width)

    def forward(self, vec_BD: Tensor) -> tuple[Tensor, ...]:
        out: Tensor = self.lin(F.silu(vec_BD))
        return out[:, None].chunk(self.parts, dim=-1)


def modulate(x_BLD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) LayerNorm(x) + shift; the norm has no parameters of its own."""
    return (1 + scale) * F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=1e-6) + shift


class SelfAttention(nn.Module):
    """Projections and norms of one stream; the attention itself runs over both streams together."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.heads = spec.num_heads
        self.qkv = nn.Linear(spec.hidden_size, 3 * spec.hidden_size, bias=spec.qkv_bias)
        self.norm = QKNorm(spec.head_dim)
        self.proj = nn.Linear(spec.hidden_size, spec.hidden_size)

    def project(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(self.qkv(x_BLD), self.heads)
        q, k = self.norm(q, k, v)
        return q, k, v


def _mlp(spec: TransformerSpec) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(spec.hidden_size, spec.mlp_hidden),
        nn.GELU(approximate="tanh"),
        nn.Linear(spec.mlp_hidden, spec.hidden_size),
    )


class DoubleBlock(nn.Module):
    """Image and text keep weights of their own and meet in attention (MMDiT, Esser et al. 2024)."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.img_mod = Modulation(spec.hidden_size, 6)
        self.img_attn = SelfAttention(spec)
        self.img_mlp = _mlp(spec)
        self.txt_mod = Modulation(spec.hidden_size, 6)
        self.txt_attn = SelfAttention(spec)
        self.txt_mlp = _mlp(spec)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        img_qkv = self.img_attn.project(modulate(img, *img_mod[:2]))
        txt_qkv = self.txt_attn.project(modulate(txt, *txt_mod[:2]))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))  # text first
        txt_out, img_out = attention(q, k, v, rope).split((txt.shape[1], img.shape[1]), dim=1)

        img = img + img_mod[2] * self.img_attn.proj(img_out)
        img = img + img_mod[5] * self.img_mlp(modulate(img, *img_mod[3:5]))
        txt = txt + txt_mod[2] * self.txt_attn.proj(txt_out)
        txt = txt + txt_mod[5] * self.txt_mlp(modulate(txt, *txt_mod[3:5]))
        return img, txt


class SingleBlock(nn.Module):
    """One stream of [text, image]; attention and MLP side by side (Dehghani et al. 2023)."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.heads = spec.num_heads
        self.split = (3 * spec.hidden_size, spec.mlp_hidden)
        self.modulation = Modulation(spec.hidden_size, 3)
        self.linear1 = nn.Linear(spec.hidden_size, sum(self.split))
        self.norm = QKNorm(spec.head_dim)
        self.linear2 = nn.Linear(spec.hidden_size + spec.mlp_hidden, spec.hidden_size)

    def forward(self, x: Tensor, vec: Tensor, rope: Rope) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, hidden = self.linear1(modulate(x, shift, scale)).split(self.split, dim=-1)
        q, k, v = split_heads(qkv, self.heads)
        q, k = self.norm(q, k, v)
        mixed = torch.cat((attention(q, k, v, rope), F.gelu(hidden, approximate="tanh")), dim=-1)
        out: Tensor = x + gate * self.linear2(mixed)
        return out


class LastLayer(nn.Module):
    """Modulated norm and projection to the velocity of each token; (shift, scale) in this order."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.hidden_size, spec.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(spec.hidden_size, 2 * spec.hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(x, shift, scale))
        return out


class Transformer(nn.Module):
    """Velocity of every image token, given text, time and (where the member has it) guidance."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.hidden_size
        self.img_in = nn.Linear(spec.in_channels, width)
        self.time_in = MLPEmbedder(_SINUSOID_DIM, width)
        self.vector_in = MLPEmbedder(spec.vec_in_dim, width)
        if spec.guidance_embed:
            self.guidance_in = MLPEmbedder(_SINUSOID_DIM, width)
        self.txt_in = nn.Linear(spec.context_in_dim, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(spec) for _ in range(spec.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(spec) for _ in range(spec.depth_single_blocks))
        self.final_layer = LastLayer(spec)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        t: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B, L_img, C_out].

        img [B, L_img, C_in]: target tokens, then any reference tokens (whose outputs the caller drops);
        img_ids [B, L_img, 3]; txt [B, L_txt, C_txt]; txt_ids [B, L_txt, 3]; t [B] in [0, 1];
        pooled [B, C_vec]; guidance [B], exactly for members that embed it.
        """
        vec = self.vector(t, pooled, guidance)
        img, txt = self.img_in(img), self.txt_in(txt)
        angles = rope(torch.cat((txt_ids, img_ids), dim=1), self.spec.axes_dim, self.spec.theta)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, angles)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, vec, angles)
        out: Tensor = self.final_layer(x[:, txt.shape[1] :], vec)
        return out

    def vector(self, t: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """The conditioning vector [B, D]: time + guidance + pooled text. Time is embedded in float32."""
        dtype = self.img_in.weight.dtype
        vec = self.time_in(sinusoid(t.float()).to(dtype))
        if (guidance is not None) != self.spec.guidance_embed:
            want = "a guidance value" if self.spec.guidance_embed else "none: it does not embed it"
            raise ValueError(f"got guidance {guidance}; this transformer needs {want}")
        if guidance is not None:
            vec = vec + self.guidance_in(sinusoid(guidance.float()).to(dtype))
        out: Tensor = vec + self.vector_in(pooled)
        return out
