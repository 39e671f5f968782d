"""Solvers on a flow whose answer is known: a mixture of Gaussians on a line, in float64.

There x_t is a mixture at every time, its velocity is closed form, and as paths cannot cross on a line a point keeps
its quantile: the exact solution inverts the distribution function. (A single Gaussian would not do: by an accident
of symmetry the midpoint method is of third order on it.)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fluxloom.core.flow import schedule
from fluxloom.core.solvers import SOLVERS, Need, Run, Took, adaptive, dpmpp_2m
from fluxloom.errors import Failure

FIXED = [name for name in SOLVERS if name != "adaptive"]
Velocity = Callable[[Tensor, float], Tensor]

WEIGHT = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEAN = torch.tensor([-1.6, 0.4, 2.1], dtype=torch.float64)
DEVIATION = torch.tensor([0.4, 0.7, 0.5], dtype=torch.float64)
NOISE = torch.tensor([-1.1, -0.4, 0.3, 0.8, 1.3], dtype=torch.float64)


def _at(t: float) -> tuple[Tensor, Tensor]:
    return (1 - t) * MEAN, torch.sqrt((1 - t) ** 2 * DEVIATION**2 + t**2)


def mixture(x: Tensor, t: float) -> Tensor:
    """E[noise - x0 | x_t = x]."""
    mean, deviation = _at(t)
    distance = x[..., None] - mean
    share = torch.softmax(WEIGHT.log() - deviation.log() - distance**2 / (2 * deviation**2), dim=-1)
    slope = (t - (1 - t) * DEVIATION**2) / deviation**2
    return (share * (slope * distance - MEAN)).sum(-1)


def exact(x: Tensor, start: float, end: float) -> Tensor:
    def quantile(x: Tensor, t: float) -> Tensor:
        mean, deviation = _at(t)
        return (WEIGHT * torch.special.ndtr((x[..., None] - mean) / deviation)).sum(-1)

    want = quantile(x, start)
    low, high = torch.full_like(x, -20.0), torch.full_like(x, 20.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = quantile(middle, end) < want
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


@dataclass
class Log:
    x: Tensor = field(default_factory=lambda: torch.empty(0))
    asked: list[float] = field(default_factory=list)
    took: list[Took] = field(default_factory=list)


def drive(run: Run, velocity: Velocity) -> Log:
    log = Log()
    event = next(run)
    try:
        while True:
            if isinstance(event, Need):
                log.asked.append(event.t)
                event = run.send(velocity(event.x, event.t))
            else:
                log.took.append(event)
                event = next(run)
    except StopIteration as stop:
        log.x = stop.value
    return log


def grid(start: float, end: float, steps: int, kind: str) -> list[float]:
    """Even steps, or steps of which every second is half as long: smooth grids forgive a wrong weight of history."""
    lengths = [1.0 if kind == "even" or i % 2 else 2.0 for i in range(steps)]
    ends = np.concatenate(([0.0], np.cumsum(lengths))) / sum(lengths)
    return [float(t) for t in start + (end - start) * ends]


def order(solver: Callable[[Tensor, Sequence[float]], Run], start: float, end: float, kind: str) -> float:
    """Slope of log error over log steps."""
    x, steps = exact(NOISE, 1.0, start), [32, 64, 128, 256]
    errors = [
        float((drive(solver(x, grid(start, end, n, kind)), mixture).x - exact(x, start, end)).abs().max())
        for n in steps
    ]
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


@pytest.mark.parametrize("kind", ["even", "uneven"])
@pytest.mark.parametrize(("start", "end"), [(0.9, 0.2), (0.2, 0.9)], ids=["to data", "to noise"])
@pytest.mark.parametrize("name", FIXED)
def test_order(name: str, start: float, end: float, kind: str) -> None:
    assert order(SOLVERS[name].run, start, end, kind) == pytest.approx(SOLVERS[name].order, abs=0.25)


@pytest.mark.parametrize(
    ("name", "least"), [("euler", 0.75), ("dpmpp_2m", 1.5)] + [(n, 1.75) for n in ("heun", "midpoint", "ab2")]
)
def test_order_to_the_very_ends(name: str, least: float) -> None:
    """From pure noise to data. Heun's last step is Euler's, whose error of one step is of second order already; the
    multistep method approaches its order slowly, as lambda is infinite at both ends."""
    assert order(SOLVERS[name].run, 1.0, 0.0, "even") > least


def test_order_notices_a_wrong_weight_of_history() -> None:
    """The measurement can fail: Adams-Bashforth with even weights on uneven steps is of first order."""

    def even_ab2(x: Tensor, times: Sequence[float]) -> Run:
        last = None
        for i in range(len(times) - 1):
            v = yield Need(x, times[i])
            x = x + (times[i + 1] - times[i]) * (v if last is None else 1.5 * v - 0.5 * last)
            last = v
        return x

    assert order(even_ab2, 0.9, 0.2, "even") == pytest.approx(2, abs=0.25)
    assert order(even_ab2, 0.9, 0.2, "uneven") < 1.5


def test_order_of_adaptive() -> None:
    """Its steps follow from the tolerance, so error is measured over evaluations."""
    x = exact(NOISE, 1.0, 0.9)
    logs = [drive(adaptive(x, [0.9, 0.5, 0.2], 10.0**-n), mixture) for n in (3, 4, 5)]
    errors = [float((log.x - exact(x, 0.9, 0.2)).abs().max()) for log in logs]
    counts = [len(log.asked) for log in logs]
    slope = -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])
    assert slope == pytest.approx(SOLVERS["adaptive"].order, abs=0.25)


def test_adaptive_meets_its_tolerance() -> None:
    end = exact(NOISE, 1.0, 0.0)
    counts = []
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        log = drive(adaptive(NOISE, schedule(8, 1024), tolerance), mixture)
        assert float((log.x - end).norm() / end.norm()) < 2 * tolerance
        assert log.took[-1].t == 0
        assert [(step.index, step.total) for step in log.took] == [(i, None) for i in range(len(log.took))]
        assert log.asked == [1.0, *(step.t for step in log.took[:-1])], (
            "each evaluation makes a step; t = 0 is not asked"
        )
        counts.append(len(log.asked))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] / 3
    assert SOLVERS["adaptive"].evaluations is None


@pytest.mark.parametrize("up", [False, True])
def test_adaptive_goes_slowly_where_the_path_bends(up: bool) -> None:
    """A velocity that turns around half-way, and is nearly constant before and after."""
    times = [0.0, 0.1, 1.0] if up else [1.0, 0.9, 0.0]
    log = drive(adaptive(5 * NOISE, times, 1e-3), lambda x, t: NOISE * float(np.tanh(6 * (t - 0.5))))
    steps = [(abs(step.t - t), abs(t - 0.5)) for t, step in zip(log.asked, log.took, strict=True)]
    turning = [length for length, distance in steps if distance < 0.1]
    assert len(turning) >= 3
    assert max(length for length, distance in steps if distance > 0.2) > 2 * max(turning)
    assert len(steps) < 30
    assert float((log.x - 5 * NOISE).norm() / NOISE.norm()) < 0.02


def test_adaptive_ends_on_noisy_velocities() -> None:
    """Where rounding keeps the error above the tolerance, steps stop shrinking instead of shrinking for ever."""
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor, t: float) -> Tensor:
        return mixture(x, t) + torch.randn(x.shape, generator=generator, dtype=x.dtype)

    log = drive(adaptive(NOISE, schedule(4), 1e-6), noisy)
    assert 900 < len(log.took) <= 1001
    assert log.took[-1].t == 0


def test_adaptive_refuses_what_is_not_finite() -> None:
    run = adaptive(NOISE, schedule(4))
    with pytest.raises(Failure, match=r"not finite near t = 1\.0000"):
        drive(run, lambda x, t: x / 0)


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=9, unique=True),
    st.booleans(),
    st.sampled_from(FIXED),
)
def test_evaluations_are_declared_truly(times: list[float], up: bool, name: str) -> None:
    times = sorted(times, reverse=not up)
    solver = SOLVERS[name]
    assert solver.evaluations is not None
    assert drive(solver.run(NOISE, times), lambda x, t: -x).asked == solver.evaluations(times)


@pytest.mark.parametrize("tokens", [None, 256, 4096])
@pytest.mark.parametrize("name", FIXED)
def test_evaluations_on_the_schedule(name: str, tokens: int | None) -> None:
    times = schedule(7, tokens)
    log = drive(SOLVERS[name].run(NOISE, times), mixture)
    assert log.asked == SOLVERS[name].evaluations(times)  # type: ignore[misc]
    per_step = {"euler": 1, "ab2": 1, "dpmpp_2m": 1, "heun": 2, "midpoint": 2, "rk4": 4}[name]
    assert len(log.asked) == per_step * 7 - (name == "heun")
    assert (0.0 in log.asked) == (name == "rk4"), "the velocity at the data itself is not trained"


@pytest.mark.parametrize("name", FIXED)
def test_steps_are_reported(name: str) -> None:
    """Index, total and time of each, the last x being the answer; x0 is where the step's first velocity points."""
    times = schedule(5, 1024)
    first: dict[float, Tensor] = {}

    def velocity(x: Tensor, t: float) -> Tensor:
        v = mixture(x, t)
        if t in times:
            first.setdefault(t, x - t * v)
        return v

    log = drive(SOLVERS[name].run(NOISE, times), velocity)
    assert [(step.index, step.total, step.t) for step in log.took] == [(i, 5, times[i + 1]) for i in range(5)]
    assert log.took[-1].x is log.x
    if name not in ("heun", "rk4"):  # these ask for the next time once more before the step is taken
        assert all(torch.equal(step.x0, first[t]) for step, t in zip(log.took, times, strict=False))
    assert torch.equal(log.took[0].x0, first[1.0])


@given(
    st.lists(st.just(0.0) | st.floats(1e-3, 1), min_size=2, max_size=6, unique=True),
    st.booleans(),
    st.sampled_from([*SOLVERS]),
)
def test_straight_paths_are_exact(times: list[float], up: bool, name: str) -> None:
    """With a constant velocity any steps lead to the same place, in both directions."""
    times = sorted(times, reverse=not up)
    v = torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    log = drive(SOLVERS[name].run(NOISE, times), lambda x, t: v)
    torch.testing.assert_close(log.x, NOISE + (times[-1] - times[0]) * v, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_one_step_finds_a_single_picture(name: str) -> None:
    """Where the data is one point, the first velocity points at it."""
    point = torch.full_like(NOISE, 0.7)
    log = drive(SOLVERS[name].run(NOISE, schedule(1)), lambda x, t: (x - point) / t)
    torch.testing.assert_close(log.x, point)


def test_dpmpp_needs_few_steps_for_nearly_a_point() -> None:
    """What it is made for: its guess of x0 bends less than the path, so ten steps beat Euler's."""
    times, end = schedule(10, 1024), exact(NOISE, 1.0, 0.0)
    errors = [
        float((drive(SOLVERS[name].run(NOISE, times), mixture).x - end).abs().max()) for name in ("dpmpp_2m", "euler")
    ]
    assert errors[0] < errors[1] / 2
    assert drive(dpmpp_2m(NOISE, times), mixture).x.dtype == torch.float64


@pytest.mark.parametrize("name", SOLVERS)
def test_there_and_back(name: str) -> None:
    """From data to noise and back: inversion uses the same solvers on reversed times."""
    times, own = schedule(400), {} if SOLVERS[name].tolerance is None else {"tolerance": 1e-3}
    up = drive(SOLVERS[name].run(NOISE, times[::-1], **own), mixture).x
    down = drive(SOLVERS[name].run(up, times, **own), mixture).x
    assert float((up - NOISE).abs().max()) > 0.1
    torch.testing.assert_close(down, NOISE, rtol=0, atol=0.03)


@pytest.mark.parametrize("events", range(6))
@pytest.mark.parametrize("name", SOLVERS)
def test_closing_early(name: str, events: int) -> None:
    run: Generator[Any, Any, Any] = SOLVERS[name].run(NOISE, schedule(3))
    event = next(run)
    for _ in range(events):
        event = run.send(mixture(event.x, event.t)) if isinstance(event, Need) else next(run)
    run.close()
    with pytest.raises(StopIteration):
        next(run)


def test_x_is_never_changed_in_place() -> None:
    before = NOISE.clone()
    for solver in SOLVERS.values():
        log = drive(solver.run(NOISE, schedule(3)), mixture)
        assert len({id(step.x) for step in log.took}) == len(log.took)
    assert torch.equal(NOISE, before)
