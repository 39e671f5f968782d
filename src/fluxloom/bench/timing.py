"""Time and memory of a call: medians with their spread, on a GPU between events of its stream."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]
HEAT = 1.5  # seconds of work before a step is timed on a GPU
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """Of ``runs`` warm runs, in milliseconds."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))

    def facts(self) -> dict[str, float]:
        """For a row: ms (the median), ms_low, ms_high, runs."""
        return {
            "ms": round(self.median, 4),
            "ms_low": round(self.low, 4),
            "ms_high": round(self.high, 4),
            "runs": self.runs,
        }


def synchronise(device: torch.device) -> None:
    """Wait until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, device: torch.device) -> float:
    """Wall-clock seconds of one run, whatever it takes: compiling, capturing, first touches."""
    synchronise(device)
    began = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - began


def measure(call: Call, device: torch.device, warm: int = 2, repeats: int = 10, heat: float = 0.0) -> Timing:
    """Milliseconds of a call: between CUDA events on a GPU, by the clock elsewhere. ``warm`` runs go before, on a GPU
    for ``heat`` seconds at least: under load its clock falls within tenths of a second, to where power holds it."""
    until = time.perf_counter() + (heat if device.type == "cuda" else 0)
    while warm > 0 or time.perf_counter() < until:
        call()
        warm -= 1
        if heat:
            synchronise(device)
    synchronise(device)
    if device.type != "cuda":
        return Timing.of([1e3 * seconds(call, device) for _ in range(repeats)])
    pairs = []
    for _ in range(repeats):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        pairs.append((before, after))
    torch.cuda.synchronize(device)
    return Timing.of([before.elapsed_time(after) for before, after in pairs])


@dataclass
class Peak:
    """The most memory within a :func:`peak`, in bytes: what torch held of the GPU, or the resident set of this
    process; None where the system does not tell."""

    bytes: int | None = None


@contextlib.contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Watch the most memory that is held inside. On Linux, and of one process: a process has one peak at a time."""
    found = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # the peak of the resident set begins anew (proc(5))
    yield found
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        # Reserved, not allocated: what a graph computes in lies in its own pool, and is allocated to nobody.
        found.bytes = torch.cuda.max_memory_reserved(device)
    else:
        found.bytes = _resident_peak()


def _resident_peak() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:  # not Linux
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return found[0] if found else None
