"""Many pictures in step: the same as one by one but for rounding, each deaf to the others, and the receipt says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import photo
from torch import Tensor

from fluxloom.core import shapes
from fluxloom.core.flow import schedule
from fluxloom.core.solvers import SOLVERS
from fluxloom.core.text import TextStates
from fluxloom.errors import BadInput
from fluxloom.infer.batch import lockstep
from fluxloom.infer.conditions import Row
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.replay import replay
from fluxloom.infer.request import Reference, Request, Result
from fluxloom.infer.runtime import Runtime
from fluxloom.infer.sample import Evaluate, trajectory

HW = (6, 8)


def row(runtime: Runtime, prompt: str, guidance: float = 1.0) -> Row:
    return Row(runtime.read(prompt), shapes.image_ids(*HW), None, guidance)


@pytest.fixture
def forwards(runtime: Runtime) -> Iterator[list[int]]:
    """Batch sizes of every pass through the transformer."""
    sizes: list[int] = []
    hook = runtime.transformer.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    yield sizes
    hook.remove()


def apart(first: Result, second: Result) -> int:
    """The largest difference of a value, 0 to 255."""
    return int(np.abs(np.asarray(first.image).astype(int) - np.asarray(second.image)).max())


REQUESTS = [
    Request(prompt="a red cat", seed=1),
    Request(prompt="a blue dog", seed=2, n=3, guidance=4.0),
    Request(prompt="make it blue", seed=3, references=(Reference(photo()),)),
    Request(prompt="a house", seed=4, width=32, height=32),
    Request(prompt="snow", seed=5, steps=5, solver="heun", true_cfg=1.0),
    Request(prompt="a cat", seed=6, init=photo(), strength=0.6),
]


# ---------------------------------------------------------------------------------------------- the driver


def test_trajectories_of_any_kind_arrive_together() -> None:
    ends, starts = torch.randn(2, 7, 1, 5, 4)
    calls: list[int] = []

    def straight(asked: Sequence[Evaluate]) -> list[list[Tensor]]:
        calls.append(len(asked))
        return [[starts[int(e.rows[0].ids[0, 0])] - ends[int(e.rows[0].ids[0, 0])]] for e in asked]

    texts = TextStates(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    runs = [
        trajectory(starts[k], solver.run, schedule(3 + k), (Row(texts, torch.full((5, 3), float(k)), None, None),))
        for k, solver in enumerate(SOLVERS.values())
    ]
    for end, expected in zip(lockstep(runs, straight), ends, strict=False):
        torch.testing.assert_close(end, expected, atol=1e-5, rtol=0)
    assert calls[0] == len(runs)  # equal shapes share a call
    assert calls[-1] < len(runs)  # who has more steps goes on alone
    assert lockstep([], straight) == []


def test_velocities_are_those_of_each_alone(runtime: Runtime) -> None:
    asked = [
        Evaluate(torch.randn(2, 12, 64), 0.9, (row(runtime, "a red cat"), row(runtime, ""))),
        Evaluate(torch.randn(2, 12, 64), 0.2, (row(runtime, "a dog", 4.0),)),
    ]
    together = runtime.velocities(asked)
    assert [len(found) for found in together] == [2, 1]
    for event, found in zip(asked, together, strict=True):
        for v, alone in zip(found, runtime.velocity(event.x, event.t, event.rows), strict=True):
            torch.testing.assert_close(v, alone, atol=1e-5, rtol=1e-5)
    first = asked[0]
    (at_another_time, _) = runtime.velocity(first.x, 0.2, first.rows)
    assert float((at_another_time - together[0][0]).abs().max()) > 1e-3


# ---------------------------------------------------------------------------------------------- pictures


def test_batches_of_one_are_bit_exact(pipeline: Pipeline) -> None:
    for request, results in zip(REQUESTS, pipeline.run_many(REQUESTS), strict=True):
        expected = pipeline.run(request)
        assert [r.receipt.pixels for r in results] == [r.receipt.pixels for r in expected]
        assert [r.seed for r in results] == [r.seed for r in expected]
        assert [r.receipt.data["request"] for r in results] == [r.receipt.data["request"] for r in expected]
        assert "batch" not in results[0].receipt.data["machine"]


@pytest.mark.parametrize("batch", [2, 5, 100])
def test_larger_batches_differ_by_rounding_only(pipeline: Pipeline, batch: int) -> None:
    alone = [result for request in REQUESTS for result in pipeline.run(request)]
    many = list(pipeline.run_many(REQUESTS, batch))
    assert [len(results) for results in many] == [request.n for request in REQUESTS]
    together = [result for results in many for result in results]
    assert max(apart(*pair) for pair in zip(alone, together, strict=True)) <= 2
    sizes = [result.receipt.data["machine"].get("batch", 1) for result in together]
    assert sizes == {2: [2] * 8, 5: [5] * 5 + [3] * 3, 100: [8] * 8}[batch]
    same_size = [result for result in together if result.image.size == (64, 48)]
    assert min(apart(a, b) for a in same_size for b in same_size if a is not b) > 20  # or nothing was compared


def test_rows_do_not_leak_into_each_other(pipeline: Pipeline) -> None:
    first = Request(prompt="a red cat", seed=1)

    def beside(**fields: Any) -> Result:
        return next(pipeline.run_many([first, Request(**fields)], 2))[0]

    one, other = beside(prompt="a blue dog", seed=9), beside(prompt="snow", seed=5, guidance=50.0)
    assert one.receipt.pixels == other.receipt.pixels


def test_equal_shapes_share_their_forward_passes(pipeline: Pipeline, forwards: list[int]) -> None:
    drawn = [Request(prompt=prompt, seed=1) for prompt in ("a cat", "a dog", "a house")]
    assert len(list(pipeline.run_many(drawn, 3))) == 3
    assert forwards == [6, 6, 6]  # three steps of three pictures, two rows each
    forwards.clear()
    list(pipeline.run_many([*drawn[:2], Request(prompt="make it red", references=(Reference(photo()),))], 3))
    assert sorted(forwards) == [2, 2, 4, 4, 4]  # an edit has its reference's tokens, and a step less


def test_bad_ones_are_refused_at_the_call(pipeline: Pipeline, forwards: list[int]) -> None:
    with pytest.raises(BadInput, match="got batch 0, allowed 1 or more"):
        pipeline.run_many(REQUESTS, 0)
    with pytest.raises(BadInput, match="got steps 0"):
        pipeline.run_many([*REQUESTS, Request(prompt="a cat", steps=0)], 4)
    assert forwards == []


def test_replay_tells_of_the_batch(pipeline: Pipeline, tmp_path: Path) -> None:
    ((first,), _) = pipeline.run_many([Request(prompt="a red cat", seed=1), Request(prompt="a dog", seed=2)], 2)
    again = replay(pipeline, first.save(tmp_path / "cat.png"))
    assert again.causes == ("machine batch: 2 then, None now",)
    assert again.max_difference <= 2


def test_a_text_of_another_length_has_a_pass_of_its_own() -> None:
    sizes: list[int] = []

    def still(asked: Sequence[Evaluate]) -> list[list[Tensor]]:
        sizes.append(len(asked))
        return [[torch.zeros_like(event.x)] for event in asked]

    rows = [Row(TextStates(torch.zeros(1, n, 1), torch.zeros(1, 1)), torch.zeros(5, 3), None, None) for n in (3, 4)]
    lockstep([trajectory(torch.zeros(1, 5, 4), SOLVERS["euler"].run, [1.0, 0.0], (one,)) for one in rows], still)
    assert sizes == [1, 1]
