"""From files to a model that is ready: seconds and memory, beside how much of the files was in memory already."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fluxloom.bench.results import Row
from fluxloom.bench.subject import is_random
from fluxloom.bench.timing import peak, synchronise
from fluxloom.errors import BadInput
from fluxloom.infer.runtime import Runtime

CACHES = ("as-is", "warm", "cold")
_CHUNK = 1 << 24


def files_of(model: str) -> list[Path]:
    """The weight files behind a reference that names files or the embedded model. Raises BadInput for a member whose
    weights are not here: random weights are not loaded."""
    if is_random(model) and not Path(model).exists():
        raise BadInput(f"got {model!r}, allowed a folder, a file or nano: there is nothing to load, try `bench image`")
    from fluxloom.weights.hub import resolve

    parts = resolve(model, offline=True).parts.values()
    return sorted({path for part in parts for path in part.files})


def resident(paths: Sequence[Path]) -> float | None:
    """The share of the files' bytes that lies in the page cache (mincore(2)); None where the system does not tell."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError):  # not Linux
        return None
    here = whole = 0
    for path in paths:
        size = path.stat().st_size
        pages = -(-size // mmap.PAGESIZE)
        if not size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as held:
            states = (ctypes.c_ubyte * pages)()
            anchor = ctypes.c_char.from_buffer(held)
            failed = mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), states)
            del anchor  # or the map could not be closed
        if failed:
            return None
        here, whole = here + sum(state & 1 for state in states), whole + pages
    return here / whole if whole else None


def prepare(paths: Sequence[Path], cache: str) -> None:
    """Bring files into the page cache, or out of it. Raises BadInput for another word."""
    if cache not in CACHES:
        raise BadInput(f"got --cache {cache!r}, allowed {', '.join(CACHES)}, try as-is")
    for path in paths if cache != "as-is" else ():
        with path.open("rb", buffering=0) as file:
            if cache == "cold":
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                continue
            buffer = bytearray(_CHUNK)
            while file.readinto(buffer):
                pass


def run(
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    cache: str = "as-is",
    repeats: int = 3,
    told: Callable[[str], object] = lambda _: None,
    variant: str | None = None,
) -> Iterator[Row]:
    """A row for every load: seconds until it is ready, those of a first pass over its weights (which files that are
    only mapped pay there), memory, and the share of the files that was in the page cache before. ``variant``: see
    :func:`fluxloom.load`."""
    from fluxloom.api import load

    paths = files_of(model)
    name = str(dtype).removeprefix("torch.")
    torch.zeros(1, device=device)  # the device is awake
    for k in range(repeats):
        prepare(paths, cache)
        share = resident(paths)
        told(f"load {k + 1}")
        began = time.perf_counter()
        with peak(device) as most:
            runtime = load(model, str(device), name, variant=variant).pipeline.runtime
            synchronise(device)
            taken = time.perf_counter() - began
            _pass(runtime)
            synchronise(device)
        yield {
            "load": k + 1,
            "ready_s": round(taken, 3),
            "first_pass_s": round(time.perf_counter() - began - taken, 3),
            "peak_bytes": most.bytes,
            "files_bytes": sum(path.stat().st_size for path in paths),
            "in_page_cache": None if share is None else round(share, 4),
        }
        del runtime
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _pass(runtime: Runtime) -> None:
    """Read every weight of the transformer and the autoencoder once."""
    for module in (runtime.transformer, runtime.autoencoder):
        for weight in module.parameters():
            weight.detach().aminmax()
