"""The distilled decoder against that of diffusers, from random weights, through files of both layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from tiny import randomise, relative

from fluxloom.core import tiny_decoder
from fluxloom.core.specs import TinyDecoderSpec
from fluxloom.core.tiny_decoder import TinyDecoder
from fluxloom.weights.load import build
from fluxloom.weights.tiny import load_tiny_decoder

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def oracle() -> AutoencoderTiny:
    """The configuration of TAEF1: 16 latent channels, the rest as by default."""
    return randomise(AutoencoderTiny(latent_channels=16), 0)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return 2 * torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(0))  # some beyond the clamp


def expected(oracle: AutoencoderTiny, z: torch.Tensor) -> torch.Tensor:
    sample: torch.Tensor = oracle.decode(z).sample
    return sample


@pytest.mark.parametrize("single", [True, False])
def test_the_layout_of_diffusers(oracle: AutoencoderTiny, latents: torch.Tensor, tmp_path: Path, single: bool) -> None:
    """As its own class writes it: encoder and decoder in one file, beside a configuration."""
    oracle.save_pretrained(tmp_path)
    ours = load_tiny_decoder(tmp_path / "diffusion_pytorch_model.safetensors" if single else tmp_path)
    assert relative(ours(latents), expected(oracle, latents)) < TOLERANCE


def test_the_layout_of_its_author(oracle: AutoencoderTiny, latents: torch.Tensor, tmp_path: Path) -> None:
    """The decoder alone; the clamp is layer 0 there (taesd.py), so that every number is greater by one."""
    state = {}
    for name, tensor in oracle.decoder.state_dict().items():
        _, number, rest = name.split(".", 2)
        state[f"{int(number) + 1}.{rest}"] = tensor
    save_file(state, tmp_path / "taef1_decoder.safetensors")
    ours = load_tiny_decoder(tmp_path / "taef1_decoder.safetensors")
    assert relative(ours(latents), expected(oracle, latents)) < TOLERANCE


@pytest.mark.parametrize("z_channels", [4, 16])
def test_other_shapes(z_channels: int) -> None:
    spec = TinyDecoderSpec(z_channels=z_channels, width=24, blocks=(2, 1, 3))
    oracle = AutoencoderTiny(
        latent_channels=z_channels,
        decoder_block_out_channels=(24,) * 3,
        num_decoder_blocks=spec.blocks,
        encoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1, 1, 1),
    )
    randomise(oracle, 1)
    ours = build(lambda: TinyDecoder(spec), oracle.decoder.state_dict())
    z = torch.randn(1, z_channels, 4, 3)
    assert relative(ours(z), expected(oracle, z)) < TOLERANCE


def test_parity_notices_the_clamp(
    oracle: AutoencoderTiny, latents: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = build(lambda: TinyDecoder(TinyDecoderSpec()), oracle.decoder.state_dict())
    monkeypatch.setattr(tiny_decoder, "_CLAMP", 3.1)
    assert relative(ours(latents), expected(oracle, latents)) > 100 * TOLERANCE
