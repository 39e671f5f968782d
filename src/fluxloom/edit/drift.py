"""Drift: what an edit does to the part of a picture that it was not asked to change, turn by turn and in all.

Pictures are RGB arrays [H, W, 3], uint8 or uint16, of one size; ``changed`` [H, W] marks what an edit was to change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fluxloom.errors import BadInput
from fluxloom.measure.identity import Identity, similarity
from fluxloom.measure.pixels import Mask, Pixels, ciede2000, psnr, sharpness, ssim
from fluxloom.measure.register import register

LEAST = 0.02  # share of a picture that must be left unchanged for anything to be said of it
CEILING = 100.0  # dB, for JSON, which knows no infinity; of 8-bit values, one in 15,000 is off by one there


@dataclass(frozen=True)
class Meters:
    """How far ``after`` is from ``before`` outside of what was changed. None: there is nothing to judge by.

    psnr       dB; inf where nothing differs
    ssim       1 where nothing differs
    delta_e    mean CIEDE2000; 0 where nothing differs
    sharpness  after over before: under 1 is blur, over 1 grain
    shift      of the picture as a whole, in pixels
    identity   1 for the same face or thing in both, about 0 for others, 0 where it is gone
    """

    psnr: float | None
    ssim: float | None
    delta_e: float | None
    sharpness: float | None
    shift: float | None
    identity: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Ready for JSON: an infinite PSNR is written as 100."""
        return {**asdict(self), "psnr": None if self.psnr is None else min(self.psnr, CEILING)}


def meters(before: Pixels, after: Pixels, changed: Mask | None = None, identity: Identity | None = None) -> Meters:
    """Compare two pictures outside of ``changed``; identity and shift look at the whole. Raises BadInput where sizes
    or depths differ."""
    where = None if changed is None else ~changed
    differences = ciede2000(before, after)  # first: it refuses what cannot be compared
    known = None if identity is None else similarity(identity, _picture(before), _picture(after))
    if where is not None and not _enough(where):
        return Meters(None, None, None, None, None, known)
    return Meters(
        psnr=psnr(before, after, where),
        ssim=_known(ssim(before, after, where)),
        delta_e=float((differences if where is None else differences[where]).mean()),
        sharpness=_ratio(sharpness(after, where), sharpness(before, where)),
        shift=_shift(before, after),
        identity=known,
    )


def _enough(where: Mask) -> bool:
    return float(where.mean()) >= LEAST


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _ratio(after: float, before: float) -> float | None:
    if before == 0 or math.isnan(before):
        return 1.0 if after == before else None
    return after / before


def _shift(before: Pixels, after: Pixels) -> float | None:
    """None where no plain shift explains it."""
    found = register(_eight(after), _eight(before))
    return math.hypot(found.dx, found.dy) if found.plain else None


def _eight(picture: Pixels) -> NDArray[np.uint8]:
    values = picture if picture.dtype == np.uint8 else (picture.astype(np.uint32) + 128) // 257
    return np.asarray(values, dtype=np.uint8)


def _picture(picture: Pixels) -> Image.Image:
    return Image.fromarray(_eight(picture))


# ---------------------------------------------------------------------------------------------- over turns


@dataclass(frozen=True)
class Turn:
    """One edit of a chain.

    step     against the turn before, outside of what this turn changed
    total    against the start, outside of all that was changed since
    changed  share of the picture changed since the start
    start    the turn that ``total`` counts from: 0 is the picture that the chain began with
    """

    step: Meters
    total: Meters
    changed: float
    start: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "step": self.step.to_dict(), "total": self.total.to_dict()}


class Drift:
    """Accumulates a chain of edits. An edit that leaves less than LEAST of the picture unchanged (night falls)
    leaves nothing to compare with: from there on, its result is the start."""

    def __init__(self, first: Pixels, identity: Identity | None = None) -> None:
        self.identity = identity
        self.turns: list[Turn] = []
        self._last = first
        self._restart(first)

    def _restart(self, picture: Pixels) -> None:
        self._first, self._start = picture, len(self.turns)
        self._changed = np.zeros(picture.shape[:2], bool)

    def add(self, picture: Pixels, changed: Mask | None = None) -> Turn:
        """The picture after the next edit, and what that was to change; None: nothing was."""
        own = np.zeros(picture.shape[:2], bool) if changed is None else changed
        step = meters(self._last, picture, own, self.identity)
        self._changed = self._changed | own
        total = meters(self._first, picture, self._changed, self.identity)
        turn = Turn(step, total, float(self._changed.mean()), self._start)
        self.turns.append(turn)
        self._last = picture
        if not _enough(~self._changed):
            self._restart(picture)
        return turn


# ---------------------------------------------------------------------------------------------- limits


@dataclass(frozen=True)
class Limits:
    """How far a picture may drift; None: no limit. PSNR, SSIM and identity at least, delta_e and shift at most;
    sharpness, a ratio up to 1, at least that and at most its inverse."""

    psnr: float | None = None
    ssim: float | None = None
    delta_e: float | None = None
    sharpness: float | None = None
    shift: float | None = None
    identity: float | None = None


_TOPS: Mapping[str, float] = MappingProxyType(  # every limit begins at 0
    {"psnr": CEILING, "ssim": 1.0, "delta_e": 100.0, "sharpness": 1.0, "shift": 1000.0, "identity": 1.0}
)
_MOST = ("delta_e", "shift")  # of these less is better
_TRY = "try psnr=28,delta_e=3"


def limits(text: str) -> Limits:
    """Limits as on the command line: ``psnr=28,delta_e=3``. Raises BadInput."""
    names = [field.name for field in fields(Limits)]
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in names:
            raise BadInput(f"got limit {part.strip()!r}, allowed {', '.join(names)}, each with =, {_TRY}")
        if name in found:
            raise BadInput(f"got limit {name} twice, allowed once, {_TRY}")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not 0 <= found[name] <= _TOPS[name]:
            raise BadInput(f"got limit {name} {value!r}, allowed 0 to {_TOPS[name]:g}, {_TRY}")
    return Limits(**found)


def exceeded(found: Meters, allowed: Limits) -> list[str]:
    """Which limits do not hold, in words; what could not be judged is not held against anyone."""
    out = []
    for name, limit in asdict(allowed).items():
        value: float | None = getattr(found, name)
        if limit is None or value is None:
            continue
        if name == "sharpness":
            fine, words = limit <= value <= (1 / limit if limit else math.inf), f"from {limit:g} to its inverse"
        elif name in _MOST:
            fine, words = value <= limit, f"at most {limit:g}"
        else:
            fine, words = value >= limit, f"at least {limit:g}"
        if not fine:
            out.append(f"{name} {value:.4g}, allowed {words}")
    return out
