"""Ordinary differential equation solvers, as generators that never call a model.

A solver walks dx/dt = v(x, t) along given times. It yields :class:`Need` where it wants a velocity and is
sent it; it yields :class:`Took` after each accepted step; it returns the final x. Whoever drives it decides
how a velocity is computed, batched, watched or stopped.

    run = euler(x, times)
    event = next(run)
    while True:
        event = run.send(velocity(event.x, event.t)) if isinstance(event, Need) else next(run)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import copysign, isfinite, log
from types import MappingProxyType

from torch import Tensor

from fluxloom.core.flow import estimate_x0
from fluxloom.errors import Failure


@dataclass(frozen=True, slots=True)
class Need:
    """Please send the velocity at (x, t)."""

    x: Tensor
    t: float


@dataclass(frozen=True, slots=True)
class Took:
    """Step ``index`` of ``total`` (None: not known beforehand) arrived at x, t; x0 estimates the data end."""

    index: int
    total: int | None
    t: float
    x: Tensor
    x0: Tensor


Run = Generator[Need | Took, Tensor, Tensor]
Times = Sequence[float]
TOLERANCE = 0.02  # of the adaptive solver


def euler(x: Tensor, times: Times) -> Run:
    """First order, one evaluation a step: x + dt v. FLUX's own sampler."""
    for i, (t, t_next) in enumerate(_pairs(times)):
        v = yield Need(x, t)
        x0 = estimate_x0(x, v, t)
        x = x + (t_next - t) * v
        yield Took(i, len(times) - 1, t_next, x, x0)
    return x


def heun(x: Tensor, times: Times) -> Run:
    """Second order, two evaluations a step: the mean of the slopes at both ends. A step to t = 0 is Euler's,
    as the velocity at the data itself is not trained (Karras et al. 2022)."""
    for i, (t, t_next) in enumerate(_pairs(times)):
        v = yield Need(x, t)
        x0 = estimate_x0(x, v, t)
        if t_next > 0:
            v_end = yield Need(x + (t_next - t) * v, t_next)
            v = (v + v_end) / 2
        x = x + (t_next - t) * v
        yield Took(i, len(times) - 1, t_next, x, x0)
    return x


def midpoint(x: Tensor, times: Times) -> Run:
    """Second order, two evaluations a step: the slope half-way."""
    for i, (t, t_next) in enumerate(_pairs(times)):
        dt = t_next - t
        v = yield Need(x, t)
        x0 = estimate_x0(x, v, t)
        v = yield Need(x + dt / 2 * v, t + dt / 2)
        x = x + dt * v
        yield Took(i, len(times) - 1, t_next, x, x0)
    return x


def rk4(x: Tensor, times: Times) -> Run:
    """The classical Runge-Kutta method: fourth order, four evaluations a step."""
    for i, (t, t_next) in enumerate(_pairs(times)):
        dt = t_next - t
        k1 = yield Need(x, t)
        k2 = yield Need(x + dt / 2 * k1, t + dt / 2)
        k3 = yield Need(x + dt / 2 * k2, t + dt / 2)
        k4 = yield Need(x + dt * k3, t_next)
        x0 = estimate_x0(x, k1, t)
        x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        yield Took(i, len(times) - 1, t_next, x, x0)
    return x


def ab2(x: Tensor, times: Times) -> Run:
    """Adams-Bashforth for uneven steps: second order, one evaluation a step, from the last two slopes."""
    v_last, dt_last = None, 0.0
    for i, (t, t_next) in enumerate(_pairs(times)):
        dt = t_next - t
        v = yield Need(x, t)
        slope = v if v_last is None else v + dt / (2 * dt_last) * (v - v_last)
        x0 = estimate_x0(x, v, t)
        x = x + dt * slope
        v_last, dt_last = v, dt
        yield Took(i, len(times) - 1, t_next, x, x0)
    return x


def dpmpp_2m(x: Tensor, times: Times) -> Run:
    """DPM-Solver++(2M) (Lu et al. 2022): second order, one evaluation a step. An exponential integrator in
    lambda = log((1 - t) / t), which on the straight path is Euler plus a correction by the change of x0."""
    x0_last, h_last = x, 0.0
    for i, (t, t_next) in enumerate(_pairs(times)):
        v = yield Need(x, t)
        x0 = estimate_x0(x, v, t)
        inside = min(t, t_next) > 0 and max(t, t_next) < 1  # lambda is infinite at the ends: no correction there
        h = log((1 - t_next) / t_next) - log((1 - t) / t) if inside else 0.0
        x = x + (t_next - t) * v
        if h_last:
            x = x + (1 - t_next / t) * h / (2 * h_last) * (x0 - x0_last)
        x0_last, h_last = x0, h
        yield Took(i, len(times) - 1, t_next, x, x0)
    return x


def adaptive(x: Tensor, times: Times, tolerance: float = TOLERANCE) -> Run:
    """Steps as long as the path is straight: second order, one evaluation a step. The embedded pair is Euler and
    :func:`ab2`. Their difference over a step of length h, h^2/2 |v'|, is known before the step is taken: h is chosen
    so that it is ``tolerance`` times the size of x0, and no step is ever taken back. Not under a thousandth of the way,
    nor over twice the step before; ``times`` gives both ends and the longest first step, for which |v'| is guessed to
    be |v|."""
    t, end = times[0], times[-1]
    longest, smallest = abs(times[1] - t), abs(end - t) / 1000
    v_last, t_last, index = None, t, 0
    while t != end:
        v = yield Need(x, t)
        x0 = estimate_x0(x, v, t)
        bend = v if v_last is None else (v - v_last) / (t - t_last)  # v'
        ratio = float(bend.norm() / (2 * tolerance * x0.norm().clamp_min(1e-8)))
        if not isfinite(ratio):
            raise Failure(f"got a velocity that is not finite near t = {t:.4f}, allowed finite ones, try euler")
        h = max(min(max(ratio, 1e-8) ** -0.5, longest), smallest)
        longest = 2 * h
        # What is left goes into one step rather than into one and a crumb.
        t_next = end if 1.25 * h >= abs(end - t) else t + copysign(h, end - t)
        dt = t_next - t
        x = x + dt * v if v_last is None else x + dt * v + dt * dt / 2 * bend
        v_last, t_last, t = v, t, t_next
        yield Took(index, None, t, x, x0)
        index += 1
    return x


@dataclass(frozen=True)
class Solver:
    """A row of the registry. ``order`` is the measured order of convergence; ``evaluations`` gives the times
    at which velocities will be wanted, where they are known beforehand; ``tolerance`` what a solver that chooses its
    own steps keeps to, unless told."""

    run: Callable[..., Run]
    order: int
    evaluations: Callable[[Times], list[float]] | None
    tolerance: float | None = None


def _pairs(times: Times) -> list[tuple[float, float]]:
    return list(pairwise(times))


def _at_starts(times: Times) -> list[float]:
    return list(times[:-1])


def _at_both_ends(times: Times) -> list[float]:
    return [t for a, b in _pairs(times) for t in ((a, b) if b > 0 else (a,))]


def _at_midpoints(times: Times) -> list[float]:
    return [t for a, b in _pairs(times) for t in (a, a + (b - a) / 2)]


def _at_rk4(times: Times) -> list[float]:
    return [t for a, b in _pairs(times) for t in (a, a + (b - a) / 2, a + (b - a) / 2, b)]


SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        "euler": Solver(euler, 1, _at_starts),
        "heun": Solver(heun, 2, _at_both_ends),
        "midpoint": Solver(midpoint, 2, _at_midpoints),
        "rk4": Solver(rk4, 4, _at_rk4),
        "ab2": Solver(ab2, 2, _at_starts),
        "dpmpp_2m": Solver(dpmpp_2m, 2, _at_starts),
        "adaptive": Solver(adaptive, 2, None, TOLERANCE),
    }
)
