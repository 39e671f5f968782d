"""The VAE beyond parity: shapes, its affine map, and draws from the posterior."""

from __future__ import annotations

import pytest
import torch

from fluxloom.core.autoencoder import Autoencoder, sample_posterior
from fluxloom.core.specs import AutoencoderSpec

SPEC = AutoencoderSpec(ch=8, num_res_blocks=1, norm_groups=4)


@pytest.fixture
def vae() -> Autoencoder:
    torch.manual_seed(1)
    return Autoencoder(SPEC).eval().requires_grad_(False)


@pytest.mark.parametrize("mult", [(1,), (1, 2), (1, 2, 2, 1)])
def test_shapes(mult: tuple[int, ...]) -> None:
    spec = AutoencoderSpec(ch=8, ch_mult=mult, num_res_blocks=1, norm_groups=4, z_channels=3)
    vae = Autoencoder(spec)
    assert spec.downsampling == 2 ** (len(mult) - 1)
    x = torch.rand(2, 3, 16, 24)
    z = vae.encode(x)
    assert z.shape == (2, 3, 16 // spec.downsampling, 24 // spec.downsampling)
    assert vae.decode(z).shape == x.shape


def test_the_affine_map(vae: Autoencoder) -> None:
    """z = scale (mean - shift), undone before decoding."""
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, _ = vae.moments(x)
    torch.testing.assert_close(vae.encode(x), 0.3611 * (mean - 0.1159))
    torch.testing.assert_close(vae(x), vae.decoder(mean))


def test_pictures_of_a_batch_do_not_meet(vae: Autoencoder) -> None:
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(vae(x)[1:], vae(x[1:]))


def test_sample_posterior() -> None:
    mean, logvar = torch.full((1, 4, 40, 40), 0.5), torch.full((1, 4, 40, 40), -2.0)
    draw = sample_posterior(mean, logvar, torch.Generator().manual_seed(1))
    assert float(draw.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(draw.std()) == pytest.approx(0.3679, abs=0.01)
    assert torch.equal(draw, sample_posterior(mean, logvar, torch.Generator().manual_seed(1)))
    assert not torch.equal(draw, sample_posterior(mean, logvar, torch.Generator().manual_seed(2)))


def test_sample_posterior_of_any_variance_is_finite() -> None:
    extreme = torch.tensor([[-1e9, 1e9]])
    draw = sample_posterior(torch.zeros(1, 2), extreme, torch.Generator().manual_seed(1))
    assert torch.isfinite(draw).all()
    assert abs(float(draw[0, 0])) < 1e-6
