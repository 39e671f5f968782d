"""One denoise step, by way: time, memory, and its error beside the noise of 16 bits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fluxloom.bench import subject
from fluxloom.bench.meter import metered
from fluxloom.bench.results import Row
from fluxloom.bench.subject import Step, error
from fluxloom.bench.timing import HEAT, Call, Timing, measure, peak, seconds
from fluxloom.bench.trace import kernels
from fluxloom.bench.ways import Way, ready, refusal
from fluxloom.infer.executor import Plain
from fluxloom.infer.runtime import Runtime

# Two orders of the same 16-bit sums differ by less; what errs more than this many times the plain pass in bfloat16
# computes something else, and is called lossy.
NOISE = 1.25


def truth(found: Runtime, step: Step) -> tuple[Tensor, float]:
    """The velocity in float32, and the noise floor: the error of the plain pass in bfloat16."""
    exact = subject.wide(found.transformer, step)
    plain = subject.reshaped(found, torch.bfloat16).transformer
    low = step.to(torch.bfloat16)
    with torch.inference_mode():
        noise = error(Plain(plain)(low.img, low.t, low.given), exact)
    return exact, noise


def judged(found: Tensor, exact: Tensor, noise: float, lossy: bool = False) -> Row:
    """Error against float32, how many times the noise floor that is, and whether it is to be called lossy."""
    off = error(found, exact)
    return {"error": off, "times_noise": round(off / noise, 4), "lossy": lossy or not off <= NOISE * noise}


def run(
    found: Runtime,
    step: Step,
    ways: Sequence[Way],
    *,
    warm: int = 2,
    repeats: int = 10,
    turns: bool = False,
    profiled: bool = False,
    told: Callable[[str], object] = lambda _: None,
) -> Iterator[Row]:
    """A row for every way: its figures, or ``skipped`` with the reason. One failure ends no other.

    turns  time all ways by turns, one run each, over and over: what else the machine does then falls on all alike. All
           of them are held at once, and the rows come at the end
    """
    told("the same step in float32")
    exact, noise = truth(found, step)
    yield {"recipe": "noise", "error": noise, "what": "the plain pass in bfloat16 against float32"}
    held: list[tuple[Row, Call]] = []
    for one in ways:
        row: Row = {"recipe": one.name}
        told(one.name)
        if why := refusal(one, found):
            yield row | {"skipped": why}
            continue
        try:
            made, call = _begun(found, step, one, exact, noise)
            if turns:
                held.append((row | made, call))
                continue
            yield row | made | _timed(call, found.device, warm, repeats, profiled)
        except Exception as fault:  # a way of another library may fail in any way at all
            yield row | {"skipped": said(fault)}
        release(found.device)
    if held:
        told("in turns")
        yield from _in_turns(held, found.device, warm, repeats)


def _begun(found: Runtime, step: Step, one: Way, exact: Tensor, noise: float) -> tuple[Row, Call]:
    """A way made ready and run once, cold; and its error."""
    with torch.inference_mode():
        way = ready(one, found, step)
        call = partial(way, step.to(way.dtype))
        row: Row = {"cold_s": round(seconds(call, found.device), 3)}
        return row | judged(call(), exact, noise, one.lossy), call


def _timed(call: Call, device: torch.device, warm: int, repeats: int, profiled: bool) -> Row:
    with torch.inference_mode():
        with peak(device) as most, metered(device) as load:
            row: Row = {**measure(call, device, warm, repeats, HEAT).facts()}
        row |= {"peak_bytes": most.bytes, **load}
        return row | ({"kernels": kernels(call, device)} if profiled else {})


def _in_turns(held: Sequence[tuple[Row, Call]], device: torch.device, warm: int, repeats: int) -> Iterator[Row]:
    samples: list[list[float]] = [[] for _ in held]
    with torch.inference_mode():
        for turn in range(warm + repeats):
            for (_, call), taken in zip(held, samples, strict=True):
                ms = measure(call, device, 0, 1).median
                if turn >= warm:
                    taken.append(ms)
    for (row, _), taken in zip(held, samples, strict=True):
        yield row | Timing.of(taken).facts()


def said(fault: BaseException) -> str:
    """A failure in one line."""
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[0] if lines else 'no message'}"[:400]


def release(device: torch.device) -> None:
    """Let go of what the last way held, compiled code included."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
