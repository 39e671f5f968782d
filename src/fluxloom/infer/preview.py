"""What an observer sees of a picture on its way: decoded in full, or at a glance.

A glance takes the colour of each latent cell by a linear map, or what a distilled decoder makes of it. Measured with
two threads on two cores, a full decode takes 900 times as long as the map for nano at 256 x 256 (0.2 ms) and about
20,000 times for the autoencoder of FLUX.1 at 512 x 512 (0.8 ms). A decoder like TAEF1 takes a 13th of FLUX.1's time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from fluxloom.core import shapes
from fluxloom.core.specs import AutoencoderSpec, ModelSpec, RgbMap
from fluxloom.core.tiny_decoder import TinyDecoder
from fluxloom.errors import BadInput
from fluxloom.infer import pictures
from fluxloom.infer.runtime import Runtime
from fluxloom.infer.sample import Step

ENLARGED = 4  # a cell is 8 x 8 pixels of the picture and 4 x 4 of a glance: half the size says all that a cell knows


@dataclass(frozen=True)
class Preview:
    """A step on the way of picture ``picture`` (from 0) of ``pictures``. ``decoder``: what a glance is decoded by."""

    picture: int
    pictures: int
    step: Step
    hw: tuple[int, int]
    runtime: Runtime = field(repr=False)
    decoder: TinyDecoder | None = field(default=None, repr=False)

    @cached_property
    def image(self) -> Image.Image:
        """What the picture would be if the path went on straight, at full size. Decoded when asked for, which
        costs nano a fifth of a second: ask at every other step or less."""
        return self.runtime.decode(self.step.x0, self.hw)

    @cached_property
    def quick(self) -> Image.Image:
        """:attr:`image` at a glance: by ``decoder``, at full size, where there is one; otherwise the colours of the
        latent cells, smoothed, at half the size. Where nobody has fitted those to the autoencoder, ``image`` itself.
        """
        x0, rgb_map = self.step.x0, self.runtime.spec.autoencoder.rgb_map
        if not torch.isfinite(x0).all():
            return self.image  # which says what is wrong
        z = shapes.unpack(x0, *self.hw)
        if self.decoder is not None:
            return pictures.to_picture(decoded(self.decoder, z))
        if len(rgb_map) != z.shape[1] + 1:
            return self.image
        small = pictures.to_picture(colours(z, rgb_map))
        return small.resize((ENLARGED * small.width, ENLARGED * small.height), Image.Resampling.BICUBIC)


@torch.inference_mode()
def decoded(decoder: TinyDecoder, z: Tensor) -> Tensor:
    """Pictures [B, 3, H, W], about [-1, 1], of normalised latents; computed where and in what the decoder is."""
    weight = next(decoder.parameters())
    out: Tensor = decoder(z.to(weight.device, weight.dtype))
    return out


def load_decoder(path: Path | str, spec: ModelSpec, device: torch.device | str = "cpu") -> TinyDecoder:
    """TAEF1 for glances at pictures of a member, in float32 like the autoencoder.

    Raises BadInput for a member whose latents are not FLUX.1's, which it was distilled on; WeightsError for files that
    are not TAEF1.
    """
    from fluxloom.weights.tiny import load_tiny_decoder  # nano needs no reader of other tools' files

    ours, theirs = spec.autoencoder, AutoencoderSpec()
    if (ours.scale_factor, ours.shift_factor) != (theirs.scale_factor, theirs.shift_factor):
        raise BadInput(
            f"got a decoder for previews of {spec.name}, allowed for members with the latents of FLUX.1, try without"
        )
    return load_tiny_decoder(path, device)


def colours(z: Tensor, rgb_map: RgbMap) -> Tensor:
    """The colour [B, 3, h, w] in about [-1, 1] of each cell of normalised latents [B, C, h, w]."""
    table = torch.tensor(rgb_map, device=z.device)
    return F.conv2d(z.float(), table[:-1].T[:, :, None, None], table[-1])


def fit_rgb_map(z: Tensor, x: Tensor) -> RgbMap:
    """The ``rgb_map`` of an autoencoder by least squares: from normalised latents [N, C, h, w] to the mean colours of
    the cells of their pictures [N, 3, H, W] in [-1, 1]."""
    cells = rearrange(F.pad(z.double(), (0, 0, 0, 0, 0, 1), value=1.0), "n c h w -> (n h w) c")
    means = rearrange(F.interpolate(x.double(), z.shape[-2:], mode="area"), "n c h w -> (n h w) c")
    rows = torch.linalg.lstsq(cells, means).solution.tolist()
    return tuple((round(r, 4), round(g, 4), round(b, 4)) for r, g, b in rows)
