"""One piece of a comparison in a process of its own: ``python -m fluxloom.bench.worker TASK``.

A piece that crashes, runs out of memory or never ends takes no other with it, its peak memory is its own, and what it
compiles is compiled in front of the clock. Rows go to standard output, each on a line after :data:`MARK`; everything
else that libraries print is theirs. A row with ``at`` alone says how far it came, should it be ended there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxloom.bench import floor, rivals, subject
from fluxloom.bench.meter import metered
from fluxloom.bench.results import Row
from fluxloom.bench.step import judged, said, truth
from fluxloom.bench.subject import Step
from fluxloom.bench.timing import HEAT, measure, peak, seconds
from fluxloom.bench.trace import kernels
from fluxloom.bench.ways import ready, refusal, way
from fluxloom.infer.runtime import DTYPES, Runtime

MARK = "fluxloom-row "
GROUND = "ground"  # the task that measures the machine and computes the truth
OURS = "ours "


@dataclass(frozen=True)
class Scene:
    """What one step draws: a picture of a size, beside references of theirs."""

    name: str
    size: tuple[int, int]
    references: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Task:
    """A piece: ``who`` computes the steps of the ``scenes``; ``folder`` is where the truth lies."""

    who: str
    model: str
    device: str
    dtype: str
    scenes: tuple[Scene, ...]
    folder: str
    batch: int = 1
    warm: int = 2
    repeats: int = 10

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        found = json.loads(text)
        scenes = tuple(
            Scene(row["name"], tuple(row["size"]), tuple(map(tuple, row["references"]))) for row in found.pop("scenes")
        )
        return cls(scenes=scenes, **found)


def rows(task: Task) -> Iterator[Row]:
    """The rows of a task, as they come; what goes wrong is a row with ``skipped``."""
    device, dtype = torch.device(task.device), DTYPES[task.dtype]
    began = time.perf_counter()
    try:
        if why := _refusal(task, device):
            yield {"skipped": why}
            return
        found = subject.runtime(task.model, device, dtype)
        steps = {s.name: Step.of(found.spec, s.size, s.references, task.batch, device) for s in task.scenes}
        if task.who == GROUND:
            yield from _ground(task, found, steps)
            return
        setup = time.perf_counter()
        with torch.no_grad():  # as pipelines of others run: not every tensor subclass takes inference mode
            call, own, notes, lossy, count = _made(task.who, found, next(iter(steps.values())))
            del found  # whoever exchanged weights is measured without those that it gave up
            built = {"model_s": round(setup - began, 2), "setup_s": round(time.perf_counter() - setup, 2)}
            for name, step in steps.items():
                yield {"at": f"the scene {name}, begun {time.perf_counter() - began:.0f} s after the start"}
                yield {"scene": name, **built, **_scene(task, call, step.to(own), name, lossy, count)}
                built = {}
            if notes:
                yield {"notes": notes}
    except Exception as fault:  # another package may fail in any way at all; the others go on
        yield {"skipped": said(fault)}


def _refusal(task: Task, device: torch.device) -> str | None:
    rival = _rival(task.who)
    return None if rival is None else rivals.refusal(rival, device)


def _rival(who: str) -> rivals.Rival | None:
    return next((one for one in rivals.RIVALS if one.name == who), None)


def _made(who: str, found: Runtime, step: Step) -> tuple[Callable[[Step], Tensor], torch.dtype, list[str], bool, int]:
    """What computes, its dtype, what there is to be said, whether it rounds further, and the steps of one call."""
    rival = _rival(who)
    if rival is None:
        one = way(who.removeprefix(OURS))
        if why := refusal(one, found):
            raise RuntimeError(why)
        made = ready(one, found, step)
        return made, made.dtype, [], one.lossy, 1
    theirs = rivals.make(rival, found.transformer)
    return theirs, found.dtype, theirs.notes, rival.lossy, rival.steps


def _scene(task: Task, call: Callable[[Step], Tensor], step: Step, name: str, lossy: bool, count: int) -> Row:
    """The figures of one scene; ``count`` steps to a call."""
    device = torch.device(task.device)
    again = partial(call, step)
    row: Row = {"cold_s": round(seconds(again, device), 3), "lossy": lossy}
    repeats = task.repeats if count == 1 else 2
    with peak(device) as most, metered(device) as load:
        taken = measure(again, device, task.warm if count == 1 else 0, repeats, HEAT)
    row |= {key: value / count if key.startswith("ms") else value for key, value in taken.facts().items()}
    row |= {"peak_bytes": most.bytes, **load}
    if count == 1:  # of a path with a cache the last velocity says nothing
        path = Path(task.folder) / f"{name}.pt"
        if path.is_file():  # or what was to compute the truth failed, and said so
            stored = torch.load(path, map_location=device)
            row |= judged(again(), stored["exact"], stored["noise"], lossy)
    return row | {"kernels": _kernels(again, device)} if count == 1 else row


def _kernels(call: Callable[[], object], device: torch.device) -> Row:
    """Of one call; a profiler that does not work here costs no figure."""
    try:
        return kernels(call, device)
    except Exception as fault:
        return {"skipped": said(fault)}


def _ground(task: Task, found: Runtime, steps: dict[str, Step]) -> Iterator[Row]:
    """The truth of every scene, kept for the others, and the machine's floor."""
    device = found.device
    for name, step in steps.items():
        exact, noise = truth(found, step)
        torch.save({"exact": exact.cpu(), "noise": noise}, Path(task.folder) / f"{name}.pt")
        text, image = step.tokens
        counted = floor.count(found.spec.transformer, text, image, task.batch)
        with torch.inference_mode():
            rates = partial(
                floor.ceilings, found.spec.transformer, text, image, task.batch, device, repeats=task.repeats
            )
            facts = floor.reached(counted, rates, device)
        yield {"scene": name, "tokens": [text, image], "noise": noise, **facts}


def main(words: list[str]) -> int:
    for row in rows(Task.from_json(words[0])):
        print(MARK + json.dumps(row), flush=True)
    return 0


def heard(line: str) -> dict[str, Any] | None:
    """The row on a line of a worker's output, if it is one."""
    _, mark, row = line.partition(MARK)  # libraries may have begun the line
    return json.loads(row) if mark else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
