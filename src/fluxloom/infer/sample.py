"""The one loop: a generator that never calls a model.

:func:`trajectory` says which velocities it wants and what it has reached; whoever holds it computes, batches, watches
or stops. Previews, cancelling, guidance, image to image, services that batch many of them: all stand outside.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from fluxloom.core.solvers import Need, Run, Times
from fluxloom.infer.conditions import Known, Row


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Please send the velocities at (x, t), one for each row."""

    x: Tensor
    t: float
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """Step ``index`` (from 0) of ``total`` (None: not known beforehand) arrived at x, t; x0 is where it leads to."""

    index: int
    total: int | None
    t: float
    x: Tensor
    x0: Tensor


Trajectory = Generator[Evaluate | Step, Sequence[Tensor] | None, Tensor]
Velocity = Callable[[Tensor, float, tuple[Row, ...]], Sequence[Tensor]]


def trajectory(
    start: Tensor,
    solver: Callable[[Tensor, Times], Run],
    times: Times,
    rows: tuple[Row, ...],
    true_cfg: float = 1.0,
    known: Known | None = None,
) -> Trajectory:
    """Walk ``times`` from ``start`` [B, L, C]; returns the final x.

    ``rows`` are one, or two under true CFG: (what is wanted, what is not). ``known``: the places whose velocity need
    not be asked for. Closing the generator ends the walk.
    """
    run = solver(start, times)
    velocity: Tensor | None = None
    while True:
        try:
            event = run.send(cast(Tensor, velocity))  # sending None is next()
        except StopIteration as end:
            return cast(Tensor, end.value)
        if isinstance(event, Need):
            velocities = yield Evaluate(event.x, event.t, rows)
            assert velocities is not None, "an Evaluate is answered with velocities"
            velocity = guided(velocities, true_cfg)
            velocity = velocity if known is None else known.hold(velocity)
        else:
            yield Step(event.index, event.total, event.t, event.x, event.x0)
            velocity = None


def guided(velocities: Sequence[Tensor], true_cfg: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): v_neg + s (v_pos - v_neg); of a single row, itself."""
    if len(velocities) == 1:
        return velocities[0]
    wanted, unwanted = velocities
    return unwanted + true_cfg * (wanted - unwanted)


def walk(run: Trajectory, velocity: Velocity) -> Generator[Step, None, Tensor]:
    """Answer a trajectory's evaluations and pass its steps on; returns the final x."""
    answer: Sequence[Tensor] | None = None
    while True:
        try:
            event = run.send(answer)
        except StopIteration as end:
            return cast(Tensor, end.value)
        if isinstance(event, Step):
            answer = None
            yield event
        else:
            answer = velocity(event.x, event.t, event.rows)


def drive(run: Trajectory, velocity: Velocity, observe: Callable[[Step], None] | None = None) -> Tensor:
    """Run a trajectory to its end. An observer that raises ends it."""
    steps = walk(run, velocity)
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return cast(Tensor, end.value)
        if observe is not None:
            observe(step)
