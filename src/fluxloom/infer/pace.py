"""How fast and how well: a word for it, and the steps, solver and tolerance that a request takes for that word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial

from torch import Tensor

from fluxloom.core.solvers import SOLVERS, Run
from fluxloom.core.specs import QUALITIES, Pace
from fluxloom.errors import BadInput
from fluxloom.infer.checks import either, number

TOLERANCES = (1e-4, 1.0)  # under the lower one rounding decides how long steps are


def quality_of(name: object) -> str:
    """One of ``specs.QUALITIES``; standard where nothing was said. Raises BadInput."""
    if name is None:
        return "standard"
    if not isinstance(name, str) or name not in QUALITIES:
        near = next(iter(get_close_matches(str(name), QUALITIES, n=1, cutoff=0.4)), "standard")
        raise BadInput(f"got quality {name!r}, allowed {', '.join(QUALITIES)}, try {near}")
    return name


def solver_of(name: object) -> str:
    """A name of ``solvers.SOLVERS``. Raises BadInput."""
    if not isinstance(name, str) or name not in SOLVERS:
        near = get_close_matches(str(name), SOLVERS, n=2, cutoff=0.4) or ["euler"]
        raise BadInput(f"got solver {name!r}, allowed {', '.join(SOLVERS)}, try {' or '.join(near)}")
    return name


def tolerance_of(asked: object, solver: str, pace: Pace) -> float | None:
    """What the solver keeps to: what was asked, or else the pace's, or else its own; None where it keeps to steps.
    Raises BadInput."""
    own = SOLVERS[solver].tolerance
    if own is not None:
        return number("tolerance", either(asked, either(pace.tolerance, own)), *TOLERANCES)
    if asked is not None:
        choosers = [name for name, row in SOLVERS.items() if row.tolerance is not None]
        raise BadInput(f"got tolerance {asked!r} with solver {solver}, allowed with {', '.join(choosers)}, try steps")
    return None


def walker(solver: str, tolerance: float | None) -> Callable[[Tensor, Sequence[float]], Run]:
    """A solver that keeps to its tolerance, if it has one."""
    run = SOLVERS[solver].run
    return run if tolerance is None else partial(run, tolerance=tolerance)
