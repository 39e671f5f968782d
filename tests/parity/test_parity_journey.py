"""Whole Euler trajectories from injected noise, against the official denoise and a diffusers scheduler loop."""

from __future__ import annotations

from types import SimpleNamespace

import mutations
import pytest
import test_golden
import tiny
from mutations import TOLERANCE, WIDE, Mutation, each
from oracles import JOURNEYS, diffusers_coding, official_transformer
from test_parity_transformer import VARIANTS
from tiny import DEV, Journey, relative, transformer

both = pytest.mark.parametrize("oracle", JOURNEYS)


def trips() -> dict[str, Journey]:
    return {
        "dev": tiny.journey(DEV, 0),
        "kontext": tiny.journey(DEV, 1, reference=True),
        "schnell": tiny.journey(VARIANTS["schnell"], 2, shift=False),
        "fill": tiny.journey(VARIANTS["fill"], 3),
    }


@both
@pytest.mark.parametrize("name", trips())
def test_journey(name: str, oracle: str) -> None:
    trip = trips()[name]
    ours = transformer(trip.spec, 5)
    path = tiny.travel(ours, trip)
    assert len(path) == trip.steps + 1 >= 7
    assert relative(path[-1], trip.noise) > 0.1, "it must have gone somewhere"
    assert relative(path[-1], JOURNEYS[oracle](ours, trip)) < TOLERANCE


@both
@each(mutations.JOURNEY)
def test_journey_notices(mutation: Mutation, oracle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, trip = transformer(DEV, 5), trips()["kontext"]
    expected = JOURNEYS[oracle](ours, trip)
    mutation(monkeypatch, SimpleNamespace(ours=ours, trip=trip))
    assert relative(tiny.travel(ours, trip)[-1], expected) > WIDE


def test_the_golden_edit_is_theirs_too() -> None:
    """The stored edit, with the official transformer and the VAE of diffusers in our places."""
    model, vae, stored = test_golden.load()
    coder = SimpleNamespace(
        encode=lambda x: diffusers_coding(vae, x, stored["latent"])[0],
        decode=lambda z: diffusers_coding(vae, stored["reference"], z)[1],
    )
    stages = test_golden.edit(official_transformer(model), coder, stored)
    assert max(relative(stages[name], stored[name]) for name in test_golden.STAGES) < TOLERANCE
