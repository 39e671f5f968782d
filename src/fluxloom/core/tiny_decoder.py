"""A distilled decoder for previews, the shape of TAEF1: plain convolutions from latents to pixels.

Weight names are those of the diffusers layout; a layer's number counts activations and upsampling, too. Its author's
own files count the clamp as well, so that their numbers are greater by one. Legend: B batch, C channels, H/W pixels,
h/w latent cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxloom.core.specs import TinyDecoderSpec

_CLAMP = 3.0  # latents beyond are squeezed: TAEF1 was distilled on tanh(z / 3) * 3


def _conv(in_channels: int, out_channels: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


class Block(nn.Module):
    """Three convolutions around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyDecoder(nn.Module):
    """Normalised latents [B, C, h, w] to pictures [B, 3, H, W], about [-1, 1]."""

    def __init__(self, spec: TinyDecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        layers: list[nn.Module] = [_conv(spec.z_channels, spec.width), nn.ReLU()]
        *coarse, finest = spec.blocks
        for blocks in coarse:
            layers += [Block(spec.width) for _ in range(blocks)]
            layers += [nn.Upsample(scale_factor=2), _conv(spec.width, spec.width, bias=False)]
        layers += [Block(spec.width) for _ in range(finest)]
        self.layers = nn.Sequential(*layers, _conv(spec.width, 3))

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.layers(_CLAMP * torch.tanh(z / _CLAMP))
        return 2 * out - 1  # it was distilled on pictures in [0, 1]
