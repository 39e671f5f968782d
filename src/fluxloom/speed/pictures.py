"""The autoencoder's two halves in bfloat16, channels last: the same modules, walked another way.

On a GPU the convolutions are nearly all the work (10.5 TFLOP to decode 1024 x 1024). What is done about the rest:

- norm and swish are one kernel (:mod:`picture_kernels`), channels last as convolutions want them;
- nearest-neighbour upsampling and the 3 x 3 convolution behind it are four 2 x 2 convolutions of the small picture,
  one for each parity of rows and columns: each output pixel sees at most 2 x 2 different inputs, so that taps which
  see the same one are added up beforehand. 4 products instead of 9, 15 % of the decoder's work less, and exact;
- attention of the middle level, 16,384 cells with one head of 512, is two matrix products by rows at a time, as fused
  kernels take heads of up to 256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxloom.core.autoencoder import (
    AttnBlock,
    Autoencoder,
    Decoder,
    Downsample,
    Encoder,
    Level,
    Middle,
    ResnetBlock,
    Upsample,
)
from fluxloom.speed.ops import available

Swished = Callable[[Tensor, nn.GroupNorm], Tensor]
_ROWS = 4096  # of the attention matrix at a time: 128 MB at 1024 x 1024


def twin(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Norm and swish, plainly."""
    return F.silu(norm(x))


class Walk(nn.Module):
    """An encoder or a decoder in another dtype and layout; takes and gives float32.

    A copy of the weights is made: 0.1 GB in bfloat16. ``swished``: norm and swish in one.
    """

    def __init__(self, half: Encoder | Decoder, dtype: torch.dtype = torch.bfloat16, swished: Swished = twin) -> None:
        super().__init__()
        self.dtype, self.swished = dtype, swished
        self.of = deepcopy(half).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parities = nn.ParameterDict()
        for name, module in self.of.named_modules():
            if isinstance(module, Upsample):
                taps = by_parity(module.conv.weight.detach()).contiguous(memory_format=torch.channels_last)
                self.parities[name.replace(".", " ")] = nn.Parameter(taps, requires_grad=False)
        self.names = {module: name.replace(".", " ") for name, module in self.of.named_modules()}

    def forward(self, x: Tensor) -> Tensor:
        half = self.of
        with _searched():
            h = half.conv_in(x.to(self.dtype, memory_format=torch.channels_last))
            if isinstance(half, Decoder):
                h = self._middle(half.mid, h)
                for level in reversed(half.up):
                    h = self._level(cast(Level, level), h)
            else:
                for level in half.down:
                    h = self._level(cast(Level, level), h)
                h = self._middle(half.mid, h)
            out: Tensor = half.conv_out(self.swished(h, half.norm_out))
        return out.float().contiguous()

    def _level(self, level: Level, x: Tensor) -> Tensor:
        for block in level.block:
            x = self._resnet(cast(ResnetBlock, block), x)
        if hasattr(level, "downsample"):
            x = cast(Downsample, level.downsample)(x)
        if hasattr(level, "upsample"):
            module = cast(Upsample, level.upsample)
            x = upsampled(x, self.parities[self.names[module]], module.conv.bias)
        return x

    def _middle(self, middle: Middle, x: Tensor) -> Tensor:
        x = self._resnet(middle.block_1, x)
        return self._resnet(middle.block_2, attended(middle.attn_1, x))

    def _resnet(self, block: ResnetBlock, x: Tensor) -> Tensor:
        h = block.conv1(self.swished(x, block.norm1))
        h = block.conv2(self.swished(h, block.norm2))
        shortcut = block.nin_shortcut(x) if hasattr(block, "nin_shortcut") else x
        out: Tensor = h.add_(shortcut)
        return out


@contextmanager
def _searched() -> Iterator[None]:
    """Let cuDNN try its algorithms, once a shape. Not by its flags(), which set TF32 too, and in the old way: of that
    torch 2.9 and later warn."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def by_parity(weight: Tensor) -> Tensor:
    """Taps [4 O, I, 2, 2] of the four convolutions, (even, even), (even, odd), (odd, even), (odd, odd) rows and
    columns of the large picture, of a kernel [O, I, 3, 3] behind nearest-neighbour upsampling by two.

    An even row 2i sees rows i - 1, i, i of the small picture, an odd one i, i, i + 1. Summed in float32.
    """
    w = weight.float()
    rows = (
        torch.stack((w[:, :, 0], w[:, :, 1] + w[:, :, 2]), dim=2),
        torch.stack((w[:, :, 0] + w[:, :, 1], w[:, :, 2]), dim=2),
    )
    taps = [
        torch.stack(pair, dim=3)
        for r in rows
        for pair in ((r[..., 0], r[..., 1] + r[..., 2]), (r[..., 0] + r[..., 1], r[..., 2]))
    ]
    return torch.cat(taps).to(weight.dtype)


def upsampled(x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of x [B, I, h, w], doubled by nearest neighbours: [B, O, 2h, 2w], with taps of
    :func:`by_parity`."""
    batch, _, height, width = x.shape
    four = F.conv2d(x, taps, None if bias is None else bias.repeat(4), padding=1)  # [B, 4 O, h + 1, w + 1]
    out = x.new_empty(batch, 2 * height, 2 * width, len(taps) // 4).permute(0, 3, 1, 2)  # channels last
    for parity, part in enumerate(four.chunk(4, dim=1)):
        row, column = divmod(parity, 2)
        out[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
    return out


def attended(block: AttnBlock, x: Tensor) -> Tensor:
    """The attention of the middle level, some rows of its matrix at a time; softmax in float32."""
    normed = block.norm(x)
    q, k, v = (f(normed).flatten(2).transpose(1, 2) for f in (block.q, block.k, block.v))  # [B, h w, C]
    scale = q.shape[-1] ** -0.5
    parts = [
        torch.softmax(rows @ k.transpose(1, 2) * scale, dim=-1, dtype=torch.float32).to(v.dtype) @ v
        for rows in q.split(_ROWS, dim=1)
    ]
    out = torch.cat(parts, dim=1).transpose(1, 2).unflatten(2, x.shape[-2:])
    result: Tensor = x + block.proj_out(out.contiguous(memory_format=torch.channels_last))
    return result


def apply(autoencoder: Autoencoder) -> Callable[[], None]:
    """Let an autoencoder on a GPU encode and decode in bfloat16; returns what takes it back. Twice is as good as once.

    What that rounds is of the order of an 8-bit level (docs/performance.md); the official code does the same.
    """
    exact = autoencoder.encoder, autoencoder.decoder
    if isinstance(autoencoder.decoder, Walk):
        return lambda: None
    swished: Swished = twin
    if available() and next(autoencoder.parameters()).device.type == "cuda":
        from fluxloom.speed import picture_kernels

        swished = picture_kernels.swished
    autoencoder.encoder, autoencoder.decoder = (cast(Encoder, Walk(half, swished=swished)) for half in exact)  # type: ignore[assignment]

    def undo() -> None:
        autoencoder.encoder, autoencoder.decoder = exact

    return undo
