"""Running the cases: the model's picture, the true one and its way through the autoencoder, all read by one reader."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import cv2
import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fluxloom.core.shapes import latent_hw, pack
from fluxloom.evals.cases import SIZE, Case, Part, Truth, case_of
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.request import Reference, Request
from fluxloom.infer.runtime import Runtime
from fluxloom.measure.pixels import psnr
from fluxloom.measure.recogniser import Reading

# Whose pictures are read: the model's; the ceiling; the ceiling of anything that comes out of this autoencoder. Of an
# edit also the source, as if nothing had been done: a floor.
PAINTERS = ("model", "true", "round trip")
UNTOUCHED = "source"
MOSTLY_CHANGED = 0.6  # share of changed pixels from which on there is too little left to preserve
_MOST = 10 * math.log10(255**2 / 1e-4)  # dB: equal pixels count as 88, not as infinitely many


class Reader(Protocol):
    """What is needed of a recogniser."""

    @property
    def content(self) -> str: ...

    def read(self, batch: Sequence[Image.Image], /) -> list[Reading]: ...


@dataclass(frozen=True)
class Kept:
    """PSNR in dB to the true picture outside of what an edit changes: the model's, and the autoencoder's."""

    model: float
    ceiling: float


@dataclass(frozen=True)
class Outcome:
    """A case and what was read in its pictures; ``kept`` for edits that leave enough; pictures where asked for."""

    case: Case
    readings: Mapping[str, Reading]
    kept: Kept | None = None
    source: Image.Image | None = None
    picture: Image.Image | None = None

    def verdicts(self, painter: str, facts_of: Case | None = None) -> tuple[bool, ...]:
        """Which facts of the case, or of another one, hold in the picture of a painter."""
        return tuple(fact.holds(self.readings[painter]) for fact in (facts_of or self.case).facts)

    def passed(self, painter: str = "model", facts_of: Case | None = None) -> bool:
        """Whether all of them hold."""
        return all(self.verdicts(painter, facts_of))


class _Rendered(Dataset[tuple[Case, Truth]]):
    """Cases with their true pictures."""

    def __init__(self, part: Part, seed: int, count: int, groups: Sequence[str]) -> None:
        self.asked = [(part, seed, group, index) for group in groups for index in range(count)]

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, number: int) -> tuple[Case, Truth]:
        case = case_of(*self.asked[number])
        return case, case.truth()


def rendered(
    part: Part, seed: int, count: int, groups: Sequence[str], workers: int = 0
) -> Iterator[tuple[Case, Truth]]:
    """The cases of :func:`fluxloom.evals.cases.cases` with their true pictures, rendered ahead by ``workers``
    processes, so that a GPU need not wait for them. 0 renders here."""
    loader: DataLoader[tuple[Case, Truth]] = DataLoader(
        _Rendered(part, seed, count, groups),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        worker_init_fn=_quiet_worker,
    )
    return iter(loader)


def _as_it_is(entry: Any) -> Any:
    return entry


def _quiet_worker(number: int) -> None:
    """One thread a process; Ctrl-C is for the main one."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def evaluate(
    asked: Iterable[tuple[Case, Truth]],
    pipeline: Pipeline,
    reader: Reader,
    batch: int = 1,
    keep: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Outcome]:
    """Draw, edit and read ``batch`` cases at a time, in order.

    ``settings`` are fields of the requests, where not the model's own values. The pictures of the first ``keep`` cases
    of each group are handed on.
    """
    pending = iter(asked)
    while some := list(islice(pending, batch)):
        requests = [request_for(case, truth, settings or {}) for case, truth in some]
        drawn = [results[0].image for results in pipeline.run_many(requests, batch)]
        seen = [_painted(image, truth, pipeline.runtime) for image, (_, truth) in zip(drawn, some, strict=True)]
        readings = iter(reader.read([picture for pictures in seen for picture in pictures.values()]))
        for (case, truth), pictures in zip(some, seen, strict=True):
            yield Outcome(
                case=case,
                readings=dict(zip(pictures, readings, strict=False)),  # each takes its own from the common row
                kept=preserved(truth, pictures["model"], pictures["round trip"]),
                source=truth.source if case.index < keep else None,
                picture=pictures["model"] if case.index < keep else None,
            )


def _painted(drawn: Image.Image, truth: Truth, runtime: Runtime) -> dict[str, Image.Image]:
    """Every picture of a case that is read, by painter."""
    pictures = dict(zip(PAINTERS, (drawn, truth.target, round_trip(runtime, truth.target)), strict=True))
    return pictures if truth.source is None else {**pictures, UNTOUCHED: truth.source}


def request_for(case: Case, truth: Truth, settings: Mapping[str, Any]) -> Request:
    """One picture of 256 x 256."""
    references = () if truth.source is None else (Reference(truth.source),)
    sides = {"width": SIZE, "height": SIZE}
    return Request(prompt=case.prompt, seed=case.seed, references=references, **{**sides, **settings})


def round_trip(runtime: Runtime, picture: Image.Image) -> Image.Image:
    """A picture encoded and decoded again."""
    return runtime.decode(pack(runtime.encode(picture)).to(runtime.device), latent_hw(*picture.size))


def preserved(truth: Truth, drawn: Image.Image, trip: Image.Image) -> Kept | None:
    """How well the pixels that the edit does not touch were kept; None where they are fewer than two of five."""
    if truth.change is None or truth.change.mean() >= MOSTLY_CHANGED:
        return None
    return Kept(
        *(min(psnr(np.asarray(picture), np.asarray(truth.target), ~truth.change), _MOST) for picture in (drawn, trip))
    )


def partners(outcomes: Sequence[Outcome]) -> list[Case | None]:
    """For each outcome the next case of its group, in a circle, that has other facts; None where all are alike.

    Judged by those, a picture passes by chance only: the floor of every rate.
    """
    groups: dict[str, list[Case]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.case.group, []).append(outcome.case)
    found: dict[str, list[Case | None]] = {}
    for name, group in groups.items():
        circles = (group[at + 1 :] + group[:at] for at in range(len(group)))
        found[name] = [
            next((other for other in circle if other.facts != case.facts), None)
            for case, circle in zip(group, circles, strict=True)
        ]
    return [found[outcome.case.group].pop(0) for outcome in outcomes]
