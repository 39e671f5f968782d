"""The one loop, driven by velocities that are known exactly."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fluxloom.core.flow import interpolate, schedule
from fluxloom.core.solvers import SOLVERS, euler
from fluxloom.core.text import TextStates
from fluxloom.infer.conditions import Row
from fluxloom.infer.sample import Evaluate, Step, drive, guided, trajectory, walk

X0, NOISE = torch.randn(1, 5, 4), torch.randn(1, 5, 4)


def row(name: float = 0.0) -> Row:
    return Row(TextStates(torch.full((1, 1, 1), name), torch.zeros(1, 1)), torch.zeros(5, 3), None, None)


def straight(x: Tensor, t: float, rows: Sequence[Row]) -> list[Tensor]:
    """The velocity of the straight path from NOISE to X0, wherever it is asked for."""
    return [NOISE - X0 for _ in rows]


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_arrives(name: str) -> None:
    end = drive(trajectory(NOISE, SOLVERS[name].run, schedule(7, 1024), (row(),)), straight)
    torch.testing.assert_close(end, X0, atol=1e-5, rtol=0)


def test_entering_half_way() -> None:
    times = schedule(8)[3:]
    end = drive(trajectory(interpolate(X0, NOISE, times[0]), euler, times, (row(),)), straight)
    torch.testing.assert_close(end, X0, atol=1e-6, rtol=0)


def test_steps_count_and_foresee_the_end() -> None:
    steps = list(walk(trajectory(NOISE, euler, schedule(4), (row(),)), straight))
    assert [(step.index, step.total) for step in steps] == [(i, 4) for i in range(4)]
    assert [step.t for step in steps] == [0.75, 0.5, 0.25, 0]
    for step in steps:
        torch.testing.assert_close(step.x0, X0, atol=1e-6, rtol=0)
    torch.testing.assert_close(steps[1].x, (X0 + NOISE) / 2, atol=1e-6, rtol=0)


def test_the_generator_itself_calls_nothing() -> None:
    rows = (row(1.0), row(2.0))
    run = trajectory(NOISE, euler, [1.0, 0.0], rows, true_cfg=3.0)
    event = next(run)
    assert isinstance(event, Evaluate)
    assert event.rows is rows
    assert event.t == 1.0
    event = run.send([torch.ones_like(NOISE), torch.zeros_like(NOISE)])
    assert isinstance(event, Step)
    assert torch.equal(event.x, NOISE - 3)
    with pytest.raises(StopIteration) as end:
        next(run)
    assert torch.equal(end.value.value, NOISE - 3)


def test_guidance_formula() -> None:
    wanted, unwanted = torch.tensor(5.0), torch.tensor(2.0)
    assert guided([wanted, unwanted], 3.0) == 11
    assert guided([wanted, unwanted], 1.0) == wanted
    assert guided([unwanted, wanted], 3.0) == -4  # the order matters
    assert guided([wanted], 3.0) == wanted


def test_observer_sees_every_step_and_may_stop() -> None:
    seen: list[int] = []
    asked: list[float] = []

    def velocity(x: Tensor, t: float, rows: Sequence[Row]) -> list[Tensor]:
        asked.append(t)
        return straight(x, t, rows)

    def stop_at_two(step: Step) -> None:
        seen.append(step.index)
        if step.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive(trajectory(NOISE, euler, schedule(10), (row(),)), velocity, stop_at_two)
    assert seen == [0, 1, 2]
    assert len(asked) == 3


def test_a_velocity_that_fails_is_heard() -> None:
    def broken(x: Tensor, t: float, rows: Sequence[Row]) -> list[Tensor]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        drive(trajectory(NOISE, euler, schedule(3), (row(),)), broken)
