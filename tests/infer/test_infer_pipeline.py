"""From request to pictures: every field has an effect, and the same request gives the same picture."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import SPEC, photo

from fluxloom.core import flow, shapes
from fluxloom.core.solvers import SOLVERS
from fluxloom.errors import BadInput
from fluxloom.infer.pictures import pixel_hash
from fluxloom.infer.pipeline import Pipeline, Preview
from fluxloom.infer.request import Reference, Request, Result
from fluxloom.infer.runtime import Runtime


def draw(pipeline: Pipeline, **fields: Any) -> Result:
    results = pipeline.run(Request(**{"prompt": "a red cat", "seed": 1, **fields}))
    return results[0]


@pytest.fixture
def forwards(runtime: Runtime) -> Iterator[list[int]]:
    """Batch sizes of every pass through the transformer."""
    sizes: list[int] = []
    hook = runtime.transformer.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    yield sizes
    hook.remove()


def test_a_picture_is_the_decoded_end_of_the_official_loop(pipeline: Pipeline, runtime: Runtime) -> None:
    with torch.inference_mode():
        x = shapes.pack(torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(1)))
        ids, wanted, empty = shapes.image_ids(6, 8)[None], runtime.read("a red cat"), runtime.read("")
        times = flow.schedule(3, 12)
        for t, t_next in pairwise(times):
            v, v_empty = (
                runtime.transformer(x, ids, s.tokens, torch.zeros(1, 8, 3), torch.tensor([t]), s.pooled, torch.ones(1))
                for s in (wanted, empty)
            )
            x = x + (t_next - t) * (v_empty + 3.0 * (v - v_empty))
        expected = np.asarray(runtime.decode(x, (6, 8))).astype(int)
    got = np.asarray(draw(pipeline).image).astype(int)
    assert np.abs(got - expected).max() <= 1  # another batch size may round a value to its neighbour
    other = np.asarray(draw(pipeline, seed=2).image).astype(int)
    assert np.abs(other - expected).max() > 20


def test_the_same_request_is_bit_exact(pipeline: Pipeline) -> None:
    assert draw(pipeline).receipt.pixels == draw(pipeline).receipt.pixels


CHANGES: list[dict[str, Any]] = [
    {"prompt": "a blue dog"},
    {"negative": "a house"},
    {"seed": 2},
    {"steps": 4},
    {"guidance": 8.0},
    {"true_cfg": 1.0},
    {"solver": "heun"},
    {"shift": False},
    {"init": photo(), "strength": 0.6},
    {"references": (Reference(photo()),)},
    {"references": (Reference(photo(seed=1)),)},
]


def test_every_field_has_an_effect(pipeline: Pipeline) -> None:
    pictures = [draw(pipeline, **change).receipt.pixels for change in [{}, *CHANGES]]
    assert len(set(pictures)) == len(pictures), [pictures.index(pixels) for pixels in pictures]


def test_strength_keeps_more_of_the_picture_the_smaller_it_is(pipeline: Pipeline) -> None:
    kept = pipeline.runtime.decode(shapes.pack(pipeline.runtime.encode(photo())), (6, 8))

    def distance(strength: float) -> float:
        image = draw(pipeline, init=photo(), strength=strength, steps=10).image
        return float(np.abs(np.asarray(image).astype(int) - np.asarray(kept)).mean())

    distances = [distance(strength) for strength in (0.1, 0.5, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] < 0.7 * distances[2]


def test_picture_k_of_n_is_the_picture_of_seed_plus_k(pipeline: Pipeline) -> None:
    many = pipeline.run(Request(prompt="a cat", seed=40, n=3))
    assert [result.seed for result in many] == [40, 41, 42]
    assert [result.receipt.data["request"]["index"] for result in many] == [0, 1, 2]
    for result in many:
        assert draw(pipeline, prompt="a cat", seed=result.seed).receipt.pixels == result.receipt.pixels


@pytest.mark.parametrize("size", [(32, 32), (32, 96), (128, 128)])
def test_sizes(pipeline: Pipeline, size: tuple[int, int]) -> None:
    assert draw(pipeline, width=size[0], height=size[1]).image.size == size


def test_an_edit_has_the_size_of_its_picture(pipeline: Pipeline) -> None:
    result = draw(pipeline, references=(Reference(photo(62, 33)),))
    assert result.image.size == (64, 32)
    assert result.receipt.data["request"]["task"] == "edit"
    assert result.receipt.data["inputs"][0]["size"] == [62, 33]


@pytest.mark.parametrize(
    ("solver", "true_cfg", "sizes"),
    [("euler", 1, [1] * 4), ("euler", 2, [2] * 4), ("heun", 2, [2] * 7), ("midpoint", 1, [1] * 8)],
)
def test_forward_passes(
    pipeline: Pipeline, forwards: list[int], solver: str, true_cfg: float, sizes: list[int]
) -> None:
    draw(pipeline, steps=4, solver=solver, true_cfg=true_cfg)
    assert forwards == sizes


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_draws(pipeline: Pipeline, solver: str) -> None:
    assert draw(pipeline, solver=solver).receipt.data["request"]["solver"] == solver


# ---------------------------------------------------------------------------------------------- streams


def test_stream_gives_previews_and_results_in_order(pipeline: Pipeline) -> None:
    events = list(pipeline.stream(Request(prompt="a cat", n=2, steps=3, seed=5)))
    kinds = ["result" if isinstance(event, Result) else (event.picture, event.step.index) for event in events]
    assert kinds == [(0, 0), (0, 1), (0, 2), "result", (1, 0), (1, 1), (1, 2), "result"]
    first, last = events[0], events[2]
    assert isinstance(first, Preview)
    assert isinstance(last, Preview)
    assert (first.pictures, first.step.total, last.step.t) == (2, 3, 0.0)
    assert first.image.size == SPEC.tasks["generate"].size
    assert first.image is first.image  # decoded once
    assert isinstance(events[3], Result)
    # The last step's estimate is the picture itself, up to rounding.
    difference = np.asarray(last.image).astype(int) - np.asarray(events[3].image)
    assert np.abs(difference).max() <= 1


def test_previews_change_nothing_and_cost_nothing_unless_looked_at(pipeline: Pipeline, forwards: list[int]) -> None:
    decoded: list[Any] = []
    hook = pipeline.runtime.autoencoder.decoder.register_forward_hook(lambda *args: decoded.append(args))
    plain = pipeline.run(Request(prompt="a cat", seed=3))[0]
    assert len(decoded) == 1
    watched = pipeline.run(Request(prompt="a cat", seed=3), observe=lambda preview: preview.image.load() and None)[0]
    hook.remove()
    assert len(decoded) == 1 + 3 + 1
    assert watched.receipt.pixels == plain.receipt.pixels


def test_closing_the_stream_stops_the_work(pipeline: Pipeline, forwards: list[int]) -> None:
    stream = pipeline.stream(Request(prompt="a cat", n=5, steps=50))
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(forwards) == 2
    assert list(stream) == []


def test_an_observer_that_raises_stops_the_work(pipeline: Pipeline, forwards: list[int]) -> None:
    def stop(preview: Preview) -> None:
        if preview.step.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(Request(prompt="a cat", steps=50), stop)
    assert len(forwards) == 2


def test_bad_requests_are_refused_before_any_work(pipeline: Pipeline, forwards: list[int]) -> None:
    with pytest.raises(BadInput, match="steps"):
        pipeline.stream(Request(prompt="a cat", steps=0))  # at the call, not at the first step
    assert forwards == []


# ---------------------------------------------------------------------------------------------- warnings


def test_what_is_cut_and_unknown_is_told(pipeline: Pipeline) -> None:
    result = draw(pipeline, prompt="a red cat 狗 a red cat a blue dog", negative="5")
    assert [note[:30] for note in result.warnings] == [
        "the prompt is too long for pic",
        "pico does not know these words",
        "pico does not know these words",
    ]
    assert draw(pipeline).warnings == ()


def test_an_edit_of_an_edit_names_its_parents(pipeline: Pipeline, tmp_path: Path) -> None:
    first = draw(pipeline)
    second = draw(pipeline, prompt="make it blue", references=(Reference(first),))
    third = draw(pipeline, prompt="remove house", references=(Reference(second.save(tmp_path / "b.png")),))
    assert second.receipt.data["inputs"][0]["receipt"] == first.receipt.id
    assert third.receipt.data["inputs"][0]["receipt"] == second.receipt.id
    assert third.receipt.data["inputs"][0]["pixels"] == pixel_hash(second.image)


def test_a_runtime_may_refuse_what_does_not_fit(pipeline: Pipeline, runtime: Runtime, forwards: list[int]) -> None:
    def allows(request: Any) -> None:
        if request.width > 64:
            raise BadInput(f"got {request.width} pixels")

    runtime.allows = allows
    try:
        draw(pipeline, width=64, height=64, steps=1)
        done = len(forwards)
        with pytest.raises(BadInput, match="got 80 pixels"):
            draw(pipeline, width=80, height=64, steps=1)
        assert len(forwards) == done
    finally:
        runtime.allows = None
