"""Requests become rows, times and start states by the official rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pico import SPEC, photo
from torch import Tensor

from fluxloom.core import flow, shapes
from fluxloom.core.specs import MODELS, ModelSpec
from fluxloom.infer.conditions import Conditioning, condition
from fluxloom.infer.pictures import resize, to_tensor
from fluxloom.infer.request import Reference, Request, resolve
from fluxloom.infer.runtime import Runtime


@pytest.fixture
def conditions(runtime: Runtime) -> Callable[..., Conditioning]:
    def make(spec: ModelSpec = SPEC, **fields: Any) -> Conditioning:
        request = resolve(Request(**{"prompt": "a cat", "seed": 9, **fields}), spec)
        return condition(request, spec, runtime.read, runtime.encode)

    return make


def noise(seed: int, h: int = 6, w: int = 8) -> Tensor:
    return torch.randn(1, 16, h, w, generator=torch.Generator().manual_seed(seed))


def test_noise_is_drawn_unpacked_on_its_own_seed(conditions: Callable[..., Conditioning]) -> None:
    made = conditions(n=3)
    for index in range(3):
        assert torch.equal(made.start(index), shapes.pack(noise(9 + index)))
    packed = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(9))
    assert not torch.equal(made.start(0), packed)


def test_generate_has_two_rows_under_true_cfg(conditions: Callable[..., Conditioning], runtime: Runtime) -> None:
    rows = conditions(negative="a dog", guidance=2.0).rows
    assert [row.guidance for row in rows] == [2.0, 2.0]
    assert rows[0].text is runtime.read("a cat")
    assert rows[1].text is runtime.read("a dog")
    assert torch.equal(rows[0].ids, shapes.image_ids(6, 8))
    assert rows[0].context is None
    assert len(conditions(true_cfg=1).rows) == 1
    assert conditions().rows[1].text is runtime.read("")


def test_edit_rows_keep_the_reference(conditions: Callable[..., Conditioning], runtime: Runtime) -> None:
    rows = conditions(references=(Reference(photo(64, 32)),)).rows
    latent = runtime.encode(photo(64, 32))
    for row in rows:
        assert row.context is not None
        assert torch.equal(row.context, shapes.pack(latent))
        assert torch.equal(row.ids, torch.cat((shapes.image_ids(4, 8), shapes.image_ids(4, 8, index=1))))
    assert rows[1].text is runtime.read("")


def test_a_model_without_preferred_sizes_sees_the_reference_place_by_place(
    conditions: Callable[..., Conditioning], runtime: Runtime
) -> None:
    (row, _) = conditions(references=(Reference(photo(64, 32)),), width=48, height=80).rows
    assert torch.equal(row.ids, torch.cat((shapes.image_ids(10, 6), shapes.image_ids(10, 6, index=1))))
    assert row.context is not None
    assert torch.equal(row.context, shapes.pack(runtime.encode(resize(photo(64, 32), 48, 80))))


@pytest.mark.parametrize("given", [{}, {"width": 512, "height": 512}])
def test_the_reference_is_resized_to_a_size_the_model_likes(runtime: Runtime, given: dict[str, int]) -> None:
    sizes: list[tuple[int, int]] = []

    def encode(picture: Any) -> Tensor:
        sizes.append(picture.size)
        return torch.zeros(1, 16, picture.height // 8, picture.width // 8)

    spec = MODELS["flux1-kontext-dev"]
    request = resolve(Request(prompt="x", references=(Reference(photo(400, 300)),), **given), spec)
    made = condition(request, spec, lambda prompt, **_: runtime.read(prompt), encode)
    assert sizes == [(1184, 880)]
    width, height = given.get("width", 1184), given.get("height", 880)
    assert (request.width, request.height) == (width, height)
    assert made.rows[0].ids.shape == (width * height // 256 + 74 * 55, 3)


def test_times_are_shifted_by_target_tokens_alone(conditions: Callable[..., Conditioning]) -> None:
    assert conditions(steps=4).times == tuple(flow.schedule(4, 12))
    assert conditions(steps=4, references=(Reference(photo()),)).times == tuple(flow.schedule(4, 12))
    assert conditions(steps=4, shift=False).times == tuple(flow.schedule(4))


def test_image_to_image_starts_on_the_straight_path(conditions: Callable[..., Conditioning], runtime: Runtime) -> None:
    made = conditions(init=photo(), strength=0.5, steps=6)
    assert made.times == tuple(flow.schedule(6, 12)[3:])
    t = made.times[0]
    z = runtime.autoencoder.encode(to_tensor(photo()))
    assert torch.equal(made.start(0), shapes.pack((1 - t) * z + t * noise(9)))
    whole = conditions(init=photo(), strength=1.0)
    torch.testing.assert_close(whole.start(0), shapes.pack(noise(9)))  # at strength 1 nothing of the picture is left


def test_the_init_picture_is_resized_to_the_output(conditions: Callable[..., Conditioning]) -> None:
    assert conditions(init=photo(200, 100), steps=6, width=32, height=48).start(0).shape == (1, 6, 64)
