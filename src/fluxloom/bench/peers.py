"""Ours and others side by side in one run: the same weights, the same inputs, the same clock, each in a process of its
own."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import IO

from fluxloom.bench.floor import beside, floor_of
from fluxloom.bench.results import Row
from fluxloom.bench.rivals import RIVALS
from fluxloom.bench.worker import GROUND, OURS, Task, heard
from fluxloom.errors import BadInput

# Ours, by the ways of :mod:`fluxloom.bench.ways`.
WAYS = {
    "cuda": ("captured+cudnn", "captured+fa3", "captured+fp8+cudnn", "captured+fp8+fa3", "captured+fp8+fa3-fp8"),
    "cpu": ("plain+float32", "fused+float32", "plain+bfloat16", "fused+bfloat16"),
}
_GLANCE = 1.0  # seconds after which a silent worker is looked after
_LEAST = 15.0  # seconds below which nothing is begun
_TAIL = 12  # lines of a worker's complaints that are kept


@dataclass
class Comparison:
    """A run.

    task     what all have in common
    only     parts of names: whoever has none of them is left out; empty: everyone but the extras
    seconds  for everything; who is not done by then is ended, or skipped
    each     at most, for one of them
    shared   keep compiled code between processes: quicker, and cold starts mean nothing
    """

    task: Task
    only: Sequence[str] = ()
    seconds: float = 520.0
    each: float = 260.0
    shared: bool = False
    told: Callable[[str], object] = lambda _: None
    floors: dict[str, dict[str, float]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Who takes part, ours first. Raises BadInput where nobody does."""
        device = self.task.device.partition(":")[0]
        ours = [OURS + name for name in WAYS[device]]
        everyone = [*ours, *(one.name for one in RIVALS)]
        if not self.only:
            return [*ours, *(one.name for one in RIVALS if not one.extra)]
        found = [name for name in everyone if any(word in name for word in self.only)]
        if not found:
            raise BadInput(f"got --only {', '.join(self.only)}, allowed parts of {', '.join(everyone)}, try diffusers")
        return found

    def run(self) -> Iterator[Row]:
        """Rows as they come: the machine's first, then everyone's, one a scene."""
        names, end = self.names(), time.monotonic() + self.seconds
        with tempfile.TemporaryDirectory() as folder:
            task = replace(self.task, folder=folder)
            for name in (GROUND, *names):
                self.told(name)
                notes: list[str] = []
                for row in self._of(replace(task, who=name), end):
                    notes += row.pop("notes", [])
                    if row:
                        yield self._row(name, row)
                if notes:
                    yield {"peer": name, "notes": notes}

    def _row(self, name: str, row: Row) -> Row:
        if name == GROUND:
            self.floors[row.get("scene", "")] = row.get("floor_ms", {})
            return {"peer": GROUND, **row}
        floor = self.floors.get(row.get("scene", ""), {})
        words = name.removeprefix(OURS).replace(" ", "+").split("+")
        dtype = next((word for word in words if word in ("float32", "bfloat16")), self.task.dtype)
        least = floor_of(words, floor, dtype)
        return {"peer": name, "ours": name.startswith(OURS), **beside(row, least)}

    def _of(self, task: Task, end: float) -> Iterator[Row]:
        left = end - time.monotonic()
        if left < _LEAST:
            yield {"skipped": f"no time left of {self.seconds:.0f} s"}
            return
        with tempfile.TemporaryDirectory() as cache:
            own = {} if self.shared else {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
            command = [sys.executable, "-m", "fluxloom.bench.worker", task.to_json()]
            worker = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                env={**os.environ, **own}, start_new_session=True,
            )  # fmt: skip
            try:
                yield from _rows(worker, min(end, time.monotonic() + self.each))
            finally:
                _end(worker)


def _rows(worker: subprocess.Popen[str], end: float) -> Iterator[Row]:
    """A worker's rows until it is done or the time is over; of one that failed, the end of what it said, and of one
    that was ended, where it was."""
    assert worker.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_pass_on, args=(worker.stdout, lines), daemon=True).start()
    said: list[str] = []
    at = ""
    while True:
        try:
            line = lines.get(timeout=_GLANCE)
        except queue.Empty:
            if worker.poll() is not None:
                break  # what it left running (compilers do) holds the pipe open
            if time.monotonic() < end:
                continue
            yield {"skipped": f"ended: no time left{at}"}
            return
        if line is None:
            break
        row = heard(line)
        if row is not None and "at" in row:
            at = f", at {row['at']}"
        elif row is not None:
            yield row
        else:
            said = [*said, line.rstrip()][-_TAIL:]
    if code := worker.wait():
        yield {"skipped": f"ended with code {code}", "said": said}


def _pass_on(lines: IO[str], to: queue.Queue[str | None]) -> None:
    for line in lines:
        to.put(line)
    to.put(None)


def _end(worker: subprocess.Popen[str]) -> None:
    """End a worker with all that it started (compilers have workers of their own)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    if worker.stdout is not None:
        worker.stdout.close()
