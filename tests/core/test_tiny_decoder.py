"""The distilled decoder beyond parity: shapes, size, and its clamp."""

from __future__ import annotations

import pytest
import torch
from tiny import randomise

from fluxloom.core.specs import TinyDecoderSpec
from fluxloom.core.tiny_decoder import TinyDecoder


@pytest.mark.parametrize("blocks", [(1,), (2, 1), (1, 1, 0, 1)])
def test_shapes(blocks: tuple[int, ...]) -> None:
    decoder = TinyDecoder(TinyDecoderSpec(z_channels=5, width=8, blocks=blocks))
    factor = 2 ** (len(blocks) - 1)
    assert decoder(torch.randn(2, 5, 3, 4)).shape == (2, 3, 3 * factor, 4 * factor)


def test_size_of_the_published_one() -> None:
    """taef1_decoder.safetensors has 2,464,414 bytes: the weights in float16 and a header of some kilobytes."""
    with torch.device("meta"):
        count = sum(weight.numel() for weight in TinyDecoder(TinyDecoderSpec()).parameters())
    assert 0 < 2_464_414 - 2 * count < 20_000


def test_latents_are_squeezed_below_three() -> None:
    decoder = randomise(TinyDecoder(TinyDecoderSpec(z_channels=4, width=8, blocks=(1, 1))), 0)
    z = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(decoder(1e6 * z), decoder(1e9 * z))
    assert (decoder(1e6 * z) - decoder(z)).abs().max() > 0.01


def test_pictures_of_a_batch_do_not_meet() -> None:
    decoder = randomise(TinyDecoder(TinyDecoderSpec(z_channels=4, width=8, blocks=(1, 1))), 1)
    z = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(decoder(z)[1:], decoder(z[1:]))
