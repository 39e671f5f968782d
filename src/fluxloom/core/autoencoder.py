"""The variational autoencoder of FLUX.1: pictures to latents of 8 x 8 pixel cells and back.

Weight names are the official ones. Legend: B batch, C channels, H/W pixels, h/w latent cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fluxloom.core.specs import AutoencoderSpec


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class AttnBlock(nn.Module):
    """Single-head attention over all cells of the middle level."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(f(normed), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[-2])
        result: Tensor = x + self.proj_out(out)
        return result


class ResnetBlock(nn.Module):
    """norm, swish, conv, twice, around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        out: Tensor = shortcut + h
        return out


class Downsample(nn.Module):
    """Strided convolution; padded right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest neighbour, then convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Middle(nn.Module):
    """Residual block, attention, residual block, at the coarsest level."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Level(nn.Module):
    """Residual blocks of one resolution, and the step to the next."""

    def __init__(self, in_channels: int, channels: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else channels, channels, groups) for i in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    """Pictures [B, 3, H, W] to mean and log-variance, stacked [B, 2 C, h, w]."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        widths = [spec.ch * m for m in spec.ch_mult]
        self.conv_in = nn.Conv2d(spec.in_channels, spec.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([spec.ch, *widths], widths, strict=False)):
            level = Level(before, width, spec.num_res_blocks, spec.norm_groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], spec.norm_groups)
        self.norm_out = _norm(widths[-1], spec.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * spec.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    """Latents [B, C, h, w] to pictures [B, 3, H, W]. Level i of ``up`` mirrors level i of the encoder."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        widths = [spec.ch * m for m in spec.ch_mult]
        self.conv_in = nn.Conv2d(spec.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], spec.norm_groups)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[min(i + 1, len(widths) - 1)], width, spec.num_res_blocks + 1, spec.norm_groups)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = _norm(widths[0], spec.norm_groups)
        self.conv_out = nn.Conv2d(widths[0], spec.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class Autoencoder(nn.Module):
    """Encoder and decoder, and the affine map between their latents and the transformer's."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, C, h, w] of the posterior of pictures x [B, 3, H, W] in [-1, 1]."""
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar

    def encode(self, x: Tensor) -> Tensor:
        """Normalised latent [B, C, h, w] of pictures in [-1, 1]: the posterior mean, the official rule."""
        mean, _ = self.moments(x)
        return self.spec.scale_factor * (mean - self.spec.shift_factor)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], about [-1, 1], of normalised latents."""
        out: Tensor = self.decoder(z / self.spec.scale_factor + self.spec.shift_factor)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Round trip."""
        return self.decode(self.encode(x))


def sample_posterior(mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A draw from N(mean, exp(logvar)), for training the autoencoder."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise
