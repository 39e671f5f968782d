"""Schedules, packing and position ids against the official code and diffusers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import mutations
import numpy as np
import pytest
import torch
from mutations import TOLERANCE, WIDE, Mutation, each
from oracles import (
    KONTEXT_SIZES,
    OFFICIAL_MEMBERS,
    UNKNOWN_THERE,
    FluxPipeline,
    calculate_shift,
    diffusers_ids,
    diffusers_schedule,
    official_kontext,
    official_prepare,
    sampling,
)
from PIL import Image
from tiny import relative

from fluxloom.core import flow, shapes
from fluxloom.core.specs import MODELS


def official_schedule(steps: int, tokens: int | None) -> list[float]:
    return sampling.get_schedule(steps, tokens or 0, shift=tokens is not None)


SCHEDULES = {
    "official": official_schedule,
    "diffusers": lambda steps, tokens: diffusers_schedule(steps, tokens).sigmas.tolist(),
}
both = pytest.mark.parametrize("oracle", SCHEDULES)


def distance(got: list[float], expected: list[float]) -> float:
    return float(np.abs(np.array(got) - np.array(expected)).max())  # the greatest time is 1


@both
@pytest.mark.parametrize("tokens", [None, 15, 256, 1024, 4080, 4096, 16384])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_schedule(steps: int, tokens: int | None, oracle: str) -> None:
    assert distance(flow.schedule(steps, tokens), SCHEDULES[oracle](steps, tokens)) < TOLERANCE


@both
@each(mutations.SCHEDULE)
def test_schedule_notices(mutation: Mutation, oracle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = SCHEDULES[oracle](28, 1024)
    mutation(monkeypatch, None)
    assert distance(flow.schedule(28, 1024), expected) > WIDE


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4080, 4096, 20000])
def test_shift(tokens: int) -> None:
    mu = flow.shift_mu(tokens)
    assert mu == pytest.approx(calculate_shift(tokens), rel=1e-12)
    assert mu == pytest.approx(sampling.get_lin_function(y1=0.5, y2=1.15)(tokens), rel=1e-12)
    at = torch.tensor([1e-3, 0.25, 0.5, 0.999], dtype=torch.float64)
    ours = torch.tensor([flow.shift(t, mu) for t in at.tolist()], dtype=torch.float64)
    assert relative(ours, sampling.time_shift(mu, 1.0, at)) < 1e-12


Z = torch.arange(2 * 16 * 6 * 10, dtype=torch.float32).reshape(2, 16, 6, 10)


def test_packing() -> None:
    packed, (h, w) = shapes.pack(Z), Z.shape[-2:]
    assert torch.equal(packed, FluxPipeline._pack_latents(Z, 2, 16, h, w))
    assert torch.equal(packed[:1], official_prepare(Z[:1])["img"])
    assert torch.equal(shapes.unpack(packed, h, w), FluxPipeline._unpack_latents(packed, 8 * h, 8 * w, 8))
    assert torch.equal(shapes.unpack(packed, h, w), sampling.unpack(packed, 8 * h, 8 * w))


@each(mutations.PACKING)
def test_packing_notices(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, (h, w) = official_prepare(Z[:1])["img"], Z.shape[-2:]
    mutation(monkeypatch, None)
    assert relative(shapes.pack(Z[:1]), packed) > WIDE
    assert relative(shapes.unpack(packed, h, w), Z[:1]) > WIDE
    assert torch.equal(shapes.unpack(shapes.pack(Z), h, w), Z), "only the oracle can tell, a round trip cannot"


@pytest.mark.parametrize(("h", "w"), [(2, 2), (6, 10), (86, 170)])
def test_image_ids(h: int, w: int) -> None:
    ids = shapes.image_ids(h, w)
    assert ids.dtype == torch.float32
    assert torch.equal(ids, diffusers_ids(h, w))
    assert torch.equal(ids, official_prepare(torch.zeros(1, 16, h, w))["img_ids"][0])
    assert h == w or not torch.equal(ids, diffusers_ids(w, h))


def test_text_ids() -> None:
    prepared = official_prepare(torch.zeros(1, 16, 2, 2))["txt_ids"][0]
    assert torch.equal(shapes.text_ids(len(prepared)), prepared)


@pytest.mark.parametrize(("width", "height"), [(100, 100), (160, 90), (35, 80), (1, 3)])
def test_kontext_reference(width: int, height: int, tmp_path: Path) -> None:
    """The size that a reference is brought to, and its ids: index 1, rows and columns of its own."""
    picture = Image.new("RGB", (width, height))
    prepared, target_height, target_width = official_kontext(picture, tmp_path)
    sizes = MODELS["flux1-kontext-dev"].preferred_sizes
    assert shapes.nearest_size(width, height, sizes) == (target_width, target_height)

    expected = prepared["img_cond_seq_ids"][0]
    h, w = shapes.latent_hw(target_width, target_height)
    assert torch.equal(shapes.image_ids(h, w, index=1), expected)
    assert relative(shapes.image_ids(h, w), expected) > WIDE
    assert len(expected) == shapes.token_count(target_width, target_height) == prepared["img_cond_seq"].shape[1]


@pytest.mark.parametrize("oracle", KONTEXT_SIZES)
def test_preferred_sizes(oracle: str) -> None:
    ours = MODELS["flux1-kontext-dev"].preferred_sizes
    assert list(ours) == KONTEXT_SIZES[oracle]
    for width, height in [(640, 480), (480, 640), (1000, 999), (3, 1), (1, 5), (1920, 1080), (1024, 1024)]:
        _, *expected = min((abs(width / height - w / h), w, h) for w, h in KONTEXT_SIZES[oracle])
        assert shapes.nearest_size(width, height, ours) == tuple(expected)


def test_hyper_parameters() -> None:
    """Every row of the family that the official package knows is its own."""
    assert OFFICIAL_MEMBERS.keys() == MODELS.keys() - UNKNOWN_THERE
    for name, theirs in OFFICIAL_MEMBERS.items():
        expected = vars(theirs.params) | {"axes_dim": tuple(theirs.params.axes_dim)}
        assert asdict(MODELS[name].transformer) == expected, name

        vae = asdict(MODELS[name].autoencoder)
        renamed = vae | {"out_ch": vae["out_channels"], "ch_mult": list(vae["ch_mult"]), "resolution": 256}
        assert vars(theirs.ae_params).items() <= renamed.items(), name
