"""TAEF1's files: half precision, and everything that is no such file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import randomise
from torch import Tensor

from fluxloom.core.specs import TinyDecoderSpec
from fluxloom.core.tiny_decoder import TinyDecoder
from fluxloom.errors import WeightsError
from fluxloom.weights.tiny import load_tiny_decoder


@pytest.fixture(scope="module")
def decoder() -> TinyDecoder:
    return randomise(TinyDecoder(TinyDecoderSpec()), 0)  # type: ignore[return-value]


@pytest.fixture
def state(decoder: TinyDecoder) -> dict[str, Tensor]:
    """As diffusers names it."""
    return {f"decoder.{name}": tensor.clone() for name, tensor in decoder.state_dict().items()}


def refused(state: dict[str, Tensor], folder: Path) -> str:
    save_file(state, folder / "x.safetensors")
    with pytest.raises(WeightsError) as error:
        load_tiny_decoder(folder / "x.safetensors")
    return str(error.value)


def test_half_precision_computes_in_what_is_asked_for(
    decoder: TinyDecoder, state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "x.safetensors")
    z = torch.randn(1, 16, 2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        ours = load_tiny_decoder(tmp_path / "x.safetensors", dtype=dtype)
        assert {weight.dtype for weight in ours.parameters()} == {dtype}
        assert not any(weight.requires_grad for weight in ours.parameters())
        torch.testing.assert_close(ours(z.to(dtype)).float(), decoder(z), atol=0.1, rtol=0.1)


def test_decoders_of_other_latents_are_refused(tmp_path: Path) -> None:
    for channels, whose in ((4, "Stable Diffusion"), (32, "FLUX.2"), (7, "7 latent channels, allowed 16")):
        other = TinyDecoder(TinyDecoderSpec(z_channels=channels))
        message = refused({f"decoder.{name}": tensor for name, tensor in other.state_dict().items()}, tmp_path)
        assert whose in message
        assert "madebyollin/taef1" in message


def test_its_encoder_is_refused(tmp_path: Path) -> None:
    """In the author's layout; there layer 0 is a convolution, and layer 1 a block."""
    encoder = {"0.weight": torch.zeros(64, 3, 3, 3), "0.bias": torch.zeros(64), "1.conv.0.bias": torch.zeros(64)}
    assert "taef1_decoder.safetensors" in refused(encoder, tmp_path)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    assert "no decoder for previews (img_in.weight)" in refused({"img_in.weight": torch.zeros(4, 4)}, tmp_path)


@pytest.mark.parametrize("fault", ["missing", "unknown", "misshapen", "not finite"])
def test_faults_are_named(state: dict[str, Tensor], fault: str, tmp_path: Path) -> None:
    name = "decoder.layers.3.conv.2.bias"
    if fault == "missing":
        del state[name]
    elif fault == "unknown":
        name = "decoder.layers.99.bias"
        state[name] = torch.zeros(1)
    elif fault == "misshapen":
        state[name] = torch.zeros(63)
    else:
        state[name][5] = torch.nan
    message = refused(state, tmp_path)
    assert fault in message
    assert name.removeprefix("decoder.") in message


def test_a_stray_tensor_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    assert "unknown (vae_scale)" in refused({**state, "vae_scale": torch.ones(1)}, tmp_path)


def test_an_encoder_beside_it_is_passed_over(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({**state, "encoder.layers.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "x.safetensors")
    assert isinstance(load_tiny_decoder(tmp_path / "x.safetensors"), TinyDecoder)
