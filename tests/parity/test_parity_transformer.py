"""The transformer against the official one and that of diffusers: float32, the same weights, every variant."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import mutations
import pytest
import torch
from mutations import SLIGHT, TOLERANCE, WIDE, Mutation, each
from oracles import VELOCITIES
from tiny import DEV, inputs, relative, shrink, transformer

from fluxloom.core.shapes import image_ids
from fluxloom.core.specs import MODELS

both = pytest.mark.parametrize("oracle", VELOCITIES)
# Members that differ in the architecture; the others differ in weights and defaults alone.
VARIANTS = {
    "dev": DEV,
    "schnell": shrink(MODELS["flux1-schnell"].transformer),
    "canny": shrink(MODELS["flux1-canny-dev"].transformer),
    "fill": shrink(MODELS["flux1-fill-dev"].transformer),
    "nano": replace(MODELS["nano"].transformer, depth_single_blocks=1),
}


def test_the_variants_cover_every_member() -> None:
    toys = list(VARIANTS.values())
    assert all(shrink(member.transformer) in toys for member in MODELS.values())
    assert {(v.in_channels, v.out_channels, v.guidance_embed) for v in toys} == {
        (64, 64, True),
        (64, 64, False),
        (128, 64, True),
        (384, 64, True),
    }


@both
@pytest.mark.parametrize("reference", [False, True], ids=["plain", "reference"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", VARIANTS)
def test_velocity(variant: str, seed: int, reference: bool, oracle: str) -> None:
    """A batch of two with different times and guidance, on a grid that is not square, with Kontext's tokens or not."""
    ours = transformer(VARIANTS[variant], seed)
    arguments = inputs(ours.spec, seed, reference=reference)
    assert relative(ours(**arguments), VELOCITIES[oracle](ours, arguments)) < TOLERANCE


@both
def test_velocity_far_from_the_origin(oracle: str) -> None:
    """Large positions multiply what a frequency is off by."""
    ours = transformer(DEV, 7)
    far = image_ids(6, 10) + torch.tensor([0.0, 200.0, 117.0])
    arguments = inputs(DEV, 7) | {"img_ids": far.expand(2, -1, -1)}
    assert relative(ours(**arguments), VELOCITIES[oracle](ours, arguments)) < TOLERANCE


@both
@each([*mutations.TRANSFORMER, *mutations.SUBTLE])
def test_velocity_notices(mutation: Mutation, oracle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = transformer(DEV, 0)
    scene = SimpleNamespace(ours=ours, inputs=inputs(DEV, 0, reference=True))
    expected = VELOCITIES[oracle](ours, scene.inputs)
    mutation(monkeypatch, scene)
    assert relative(scene.ours(**scene.inputs), expected) > (SLIGHT if mutation in mutations.SUBTLE else WIDE)


def test_without_qkv_bias() -> None:
    """No published member has none, but the official parameters allow it (for double blocks alone)."""
    spec = replace(DEV, qkv_bias=False)
    ours = transformer(spec, 3)
    arguments = inputs(spec, 3)
    assert relative(ours(**arguments), VELOCITIES["official"](ours, arguments)) < TOLERANCE
