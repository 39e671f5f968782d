"""The autoencoder in tiles: the same picture, nearly, and how nearly."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import VAE, randomise
from torch import Tensor

import fluxloom
from fluxloom.core.autoencoder import Autoencoder
from fluxloom.infer.pictures import to_picture, to_tensor
from fluxloom.infer.plan import tiles
from fluxloom.measure.pixels import psnr
from fluxloom.speed.tiled import Tiled
from fluxloom.world.mix import Mix, sample_scene
from fluxloom.world.render import render

SMALL = partial(tiles, most=10, overlap=4)


def toy() -> Autoencoder:
    module = randomise(Autoencoder(VAE), 3)
    assert isinstance(module, Autoencoder)
    return module


@given(rows=st.integers(2, 40), columns=st.integers(2, 40))
def test_what_sees_only_its_own_cell_is_exact(rows: int, columns: int) -> None:
    tiled = Tiled(toy(), SMALL)
    z = torch.randn(1, 2, rows, columns, dtype=torch.float64)
    wide = F.interpolate(z, scale_factor=8.0)
    assert torch.allclose(tiled._tiled(lambda part: F.interpolate(part, scale_factor=8.0), z, 1, 8), wide)
    assert torch.allclose(tiled._tiled(lambda part: F.avg_pool2d(part, 8), wide, 8, 1), z)


def test_small_pictures_pass_whole() -> None:
    whole = toy()
    tiled = Tiled(whole, SMALL)
    z = torch.randn(2, 16, 10, 6)
    assert torch.equal(tiled.decode(z), whole.decode(z))
    x = torch.randn(1, 3, 48, 80)
    assert torch.equal(tiled.encode(x), whole.encode(x))
    assert {id(part) for part in tiled.parameters()} == {id(part) for part in whole.parameters()}


def test_no_tile_is_larger_than_allowed() -> None:
    seen: list[torch.Size] = []

    def run(part: Tensor) -> Tensor:
        seen.append(part.shape[-2:])
        return part

    Tiled(toy())._tiled(run, torch.randn(1, 1, 128, 256), 1, 1)  # a picture of 1024 x 2048
    assert max(max(shape) for shape in seen) <= 72
    assert len(seen) == 2 * 5


def test_how_near_tiles_come_on_nano() -> None:
    """Tiles of two thirds of a side, as at 1024 x 1024: 31 to 37 dB from the whole on scenes of the world."""
    whole = fluxloom.load("nano").pipeline.runtime.autoencoder
    tiled = Tiled(whole, partial(tiles, most=32))
    picture = Image.fromarray(render(sample_scene(random.Random(0), Mix()), 384).pixels)
    with torch.inference_mode():
        z = whole.encode(to_tensor(picture))
        a, b = (np.asarray(to_picture(one.decode(z))) for one in (whole, tiled))
        passed = np.asarray(to_picture(whole.decode(tiled.encode(to_tensor(picture)))))
    assert 30 < psnr(a, b) < 45
    assert psnr(a, passed) > 30
