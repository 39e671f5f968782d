"""The VAE against the official one and that of diffusers: encoding to the mean, decoding, and the affine map."""

from __future__ import annotations

from types import SimpleNamespace

import mutations
import pytest
import torch
from mutations import TOLERANCE, WIDE, Mutation, each
from oracles import CODINGS, diffusers_autoencoder
from tiny import VAE, autoencoder, relative
from torch import Tensor

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.specs import MODELS, AutoencoderSpec

both = pytest.mark.parametrize("oracle", CODINGS)
SPECS = {
    "narrow": VAE,
    "official depth": AutoencoderSpec(ch=64),
    "three levels": AutoencoderSpec(ch=32, ch_mult=(1, 1, 3), num_res_blocks=1, z_channels=4),
}


def samples(spec: AutoencoderSpec, seed: int) -> tuple[Tensor, Tensor]:
    """Two pictures and two latents, not square."""
    generator = torch.Generator().manual_seed(seed)
    h, w, f = 3, 5, spec.downsampling
    x = 2 * torch.rand(2, spec.in_channels, f * h, f * w, generator=generator) - 1
    return x, torch.randn(2, spec.z_channels, h, w, generator=generator)


def errors(ours: Autoencoder, x: Tensor, z: Tensor, expected: tuple[Tensor, Tensor]) -> list[float]:
    return [relative(got, want) for got, want in zip((ours.encode(x), ours.decode(z)), expected, strict=True)]


@both
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", SPECS)
def test_coding(name: str, seed: int, oracle: str) -> None:
    ours = autoencoder(SPECS[name], seed)
    x, z = samples(ours.spec, seed)
    assert max(errors(ours, x, z, CODINGS[oracle](ours, x, z))) < TOLERANCE


def test_coding_of_nano() -> None:
    """nano's VAE has 8 groups; the official class is fixed to 32, so diffusers alone can tell."""
    ours = autoencoder(MODELS["nano"].autoencoder, 0)
    x, z = samples(ours.spec, 0)
    assert max(errors(ours, x, z, CODINGS["diffusers"](ours, x, z))) < TOLERANCE


def test_moments() -> None:
    ours = autoencoder(VAE, 1)
    x, _ = samples(VAE, 1)
    posterior = diffusers_autoencoder(ours).encode(x).latent_dist
    mean, logvar = ours.moments(x)
    assert relative(mean, posterior.mean) < TOLERANCE
    assert relative(logvar, posterior.logvar) < TOLERANCE


@both
@each(mutations.AUTOENCODER)
def test_coding_notices(mutation: Mutation, oracle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = autoencoder(VAE, 0)
    x, z = samples(VAE, 0)
    expected = CODINGS[oracle](ours, x, z)
    mutation(monkeypatch, SimpleNamespace(ours=ours))
    assert max(errors(ours, x, z, expected)) > WIDE
