"""A word for how fast and how well, and what a request takes for it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import SPEC

from fluxloom.core.flow import schedule
from fluxloom.core.solvers import SOLVERS, Need, Times
from fluxloom.core.specs import MODELS, QUALITIES, Pace, TaskDefaults
from fluxloom.errors import BadInput
from fluxloom.infer.pace import tolerance_of, walker
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.replay import replay
from fluxloom.infer.request import Request, Resolved, resolve

NANO = MODELS["nano"]
ROWS = [(name, task) for name, spec in MODELS.items() for task in spec.tasks]


def asked(**fields: Any) -> Resolved:
    return resolve(Request(prompt="a red cat", **fields), NANO)


@pytest.mark.parametrize(("name", "task"), ROWS)
def test_every_row_has_a_pace_for_every_quality(name: str, task: str) -> None:
    row = MODELS[name].tasks[task]
    paces = {quality: row.pace(quality) for quality in QUALITIES}
    assert (paces["standard"].steps, paces["standard"].solver) == (row.steps, row.solver)
    for pace in paces.values():
        assert pace.steps >= 1
        assert pace.solver in SOLVERS
        assert pace.tolerance is None or tolerance_of(None, pace.solver, pace) == pace.tolerance
    fixed = [pace.steps for pace in paces.values() if pace.tolerance is None]
    assert fixed == sorted(fixed), "a better quality takes no fewer steps"
    assert paces["draft"].tolerance is not None or paces["draft"].steps < row.steps
    tolerances = [pace.tolerance for pace in paces.values() if pace.tolerance is not None]
    assert all(a > b for a, b in pairwise(tolerances))


def test_a_row_that_says_nothing_halves_and_doubles() -> None:
    row = TaskDefaults(steps=5, guidance=None, solver="heun")
    assert [row.pace(quality) for quality in QUALITIES] == [Pace(steps=n, solver="heun") for n in (3, 5, 10)]


@pytest.mark.parametrize("quality", QUALITIES)
def test_a_request_takes_the_pace_of_its_quality(quality: str) -> None:
    got, pace = asked(quality=quality), NANO.tasks["generate"].pace(quality)
    assert (got.quality, got.steps, got.solver, got.tolerance) == (quality, pace.steps, pace.solver, pace.tolerance)
    assert {"quality", "steps", "solver", "tolerance"} <= got.to_dict().keys()
    if quality == "standard":
        bare = asked()
        assert (bare.quality, bare.steps, bare.solver) == (quality, pace.steps, pace.solver)


def test_what_is_said_wins() -> None:
    got = asked(quality="best", steps=3, solver="heun")
    assert (got.quality, got.steps, got.solver, got.tolerance) == ("best", 3, "heun", None)
    draft = NANO.tasks["generate"].pace("draft")
    assert asked(quality="draft", solver="adaptive").tolerance == draft.tolerance
    assert asked(quality="draft", solver="adaptive", tolerance=0.5).tolerance == 0.5
    assert asked(solver="adaptive").tolerance == SOLVERS["adaptive"].tolerance
    assert asked(quality="draft", steps=5).steps == 5
    assert asked(quality="draft", solver="euler").steps == 8, "half of 16, whatever the draft's own solver takes"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quality": "bset"}, "got quality 'bset', allowed draft, standard, best, try best"),
        ({"quality": 3}, "got quality 3, allowed draft, standard, best, try standard"),
        ({"solver": "eular"}, "got solver 'eular', allowed .*, try euler"),
        (
            {"solver": "euler", "tolerance": 0.1},
            "got tolerance 0.1 with solver euler, allowed with adaptive, try steps",
        ),
        ({"solver": "adaptive", "tolerance": 0}, "got tolerance 0, allowed 0.0001 to 1, try 0.0001"),
        ({"solver": "adaptive", "tolerance": "low"}, "got tolerance 'low', allowed a number"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        asked(**fields)


def evaluations(walk: Any, times: Times) -> int:
    """How many velocities a solver asks for on a path that bends."""
    run, count = walk(torch.ones(3), times), 0
    event = next(run)
    try:
        while True:
            count += isinstance(event, Need)
            event = run.send((6 * torch.tensor(event.t)).cos() * event.x) if isinstance(event, Need) else next(run)
    except StopIteration:
        return count


def test_a_request_walks_with_its_tolerance() -> None:
    times = schedule(8)
    counts = [evaluations(asked(solver="adaptive", tolerance=tolerance).walk, times) for tolerance in (0.1, 0.01, 1e-3)]
    assert counts[0] < counts[1] < counts[2]
    assert evaluations(asked(solver="heun").walk, times) == 15
    assert evaluations(walker("adaptive", 0.01), times) == counts[1]
    assert resolve(Request(prompt="a cat", quality="best"), SPEC).steps == 6, "twice pico's"


def test_a_tolerance_counts_and_is_replayed(pipeline: Pipeline, tmp_path: Path) -> None:
    fields = {"prompt": "a red cat", "seed": 1, "steps": 4, "solver": "adaptive", "quality": "draft"}
    drawn = [pipeline.run(Request(**fields, tolerance=tolerance))[0] for tolerance in (0.5, 1e-3)]  # type: ignore[arg-type]
    assert drawn[0].receipt.pixels != drawn[1].receipt.pixels
    for result in drawn:
        assert result.receipt.data["request"]["quality"] == "draft"
        assert replay(pipeline, result.save(tmp_path / "drawn.png")).verdict == "bit-exact"
