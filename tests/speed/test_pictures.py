"""The autoencoder walked another way gives the same latents and pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from tiny import VAE, autoencoder, relative
from torch import Tensor, nn

from fluxloom.api import load
from fluxloom.core.autoencoder import Autoencoder
from fluxloom.speed import pictures
from fluxloom.speed.pictures import Walk, by_parity, upsampled


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def nano() -> Autoencoder:
    return load("nano").pipeline.runtime.autoencoder


@pytest.mark.parametrize("size", [(40, 24), (16, 8)])
def test_in_float32_it_is_the_same(size: tuple[int, int]) -> None:
    model = autoencoder(VAE, 0)
    x, z = torch.randn(2, 3, *size), torch.randn(2, 16, size[0] // 8, size[1] // 8)
    assert relative(Walk(model.encoder, torch.float32)(x), model.encoder(x)) < 1e-5
    assert relative(Walk(model.decoder, torch.float32)(z), model.decoder(z)) < 1e-5


def test_upsampling_and_its_convolution_in_one() -> None:
    x, weight, bias = torch.randn(2, 5, 4, 7), torch.randn(3, 5, 3, 3), torch.randn(3)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    assert relative(upsampled(x, by_parity(weight), bias), wanted) < 1e-5
    turned = by_parity(weight).chunk(4)
    wrong = torch.cat((turned[1], turned[0], *turned[2:]))
    assert relative(upsampled(x, wrong, bias), wanted) > 0.1


def test_attention_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = autoencoder(VAE, 0).decoder.mid.attn_1, torch.randn(1, 128, 6, 9)
    monkeypatch.setattr(pictures, "_ROWS", 16)
    assert relative(pictures.attended(block, x), block(x)) < 1e-5


def test_bfloat16_rounds_little_and_is_undone(nano: Autoencoder) -> None:
    z = torch.randn(1, 16, 16, 16)
    exact = nano.decode(z)
    undo = pictures.apply(nano)
    pictures.apply(nano)
    rounded = nano.decode(z)
    assert rounded.dtype == torch.float32
    psnr = -10 * float(((rounded - exact) / 2).square().mean().log10())
    assert 45 < psnr < 75
    undo()
    assert torch.equal(nano.decode(z), exact)


def kernel_is_its_twin(device: str, dtype: torch.dtype) -> None:
    from fluxloom.speed.picture_kernels import swished

    torch.manual_seed(0)
    for channels, groups in ((32, 8), (128, 32), (96, 12)):
        norm = cast(nn.GroupNorm, nn.GroupNorm(groups, channels, eps=1e-6).to(device, dtype))
        norm.weight.data.normal_()
        norm.bias.data.normal_()
        x = (3 * torch.randn(2, channels, 13, 11) + 1).to(device, dtype).contiguous(memory_format=torch.channels_last)
        got: Tensor = swished(x, norm)
        assert got.is_contiguous(memory_format=torch.channels_last)
        wanted: Any = F.silu(norm.float()(x.float()))
        assert relative(got.float(), wanted) < (1e-5 if dtype == torch.float32 else 2**-8)
    with pytest.raises(ValueError, match="allowed channels last"):
        swished(x.contiguous(), norm)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")
def test_the_kernel_in_the_interpreter() -> None:
    """Which is chosen before Triton is imported, for a whole process: this file as a script."""
    more = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, __file__], env=os.environ | more, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_on_a_gpu(dtype: torch.dtype) -> None:
    kernel_is_its_twin("cuda", dtype)


@pytest.mark.gpu
def test_decoding_on_a_gpu(nano: Autoencoder) -> None:
    z = torch.randn(1, 16, 32, 32)
    exact = nano.decode(z)
    nano.cuda()
    undo = pictures.apply(nano)
    assert relative(nano.decode(z.cuda()).cpu(), exact) < 0.02
    undo()
    nano.cpu()


if __name__ == "__main__":
    kernel_is_its_twin("cpu", torch.float32)
