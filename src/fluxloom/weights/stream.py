"""From a checkpoint into a module on the meta device, tensor by tensor, straight to its place, device and dtype.

Strict: everything that is missing, unknown, misshapen or not finite is named. What is read ahead while a tensor is
placed is bounded, so that memory peaks a few per cent above what stays.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.clip import ClipText
from fluxloom.core.t5 import T5Encoder
from fluxloom.core.text import TextTower
from fluxloom.core.transformer import Transformer
from fluxloom.errors import WeightsError
from fluxloom.weights.checkpoint import PINNED, Checkpoint, Entry
from fluxloom.weights.identify import Component
from fluxloom.weights.load import Uninitialised, first
from fluxloom.weights.stored import INTEGER

THREADS = 4  # that read and decode; one reads 2 GB/s from the page cache or decodes 0.3 billion weights a second
THREADS_TO_GPU = 8  # that read into pinned memory, from where it is copied as they read on
AHEAD = 32  # part of the module's bytes (one 32nd) that may be in flight
_DECODED = 4  # bytes a weight: what is not stored in 16 bits is decoded to float32

Progress = Callable[[int, int], None]  # (tensors done, tensors in all)


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    component: Component,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> None:
    """Give a module on the meta device its weights, in evaluation mode and without gradients.

    Raises WeightsError naming what is missing, unknown, misshapen, of integers or not finite (the first eight of
    each); before anything is read, but for the last.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check(type(module).__name__, wanted, checkpoint, component)
    names = _in_order(checkpoint, component, wanted)
    budget = sum(map(prod, wanted.values())) * dtype.itemsize // AHEAD
    sources = [(name, [checkpoint[source] for source in component.names[name]]) for name in names]
    finite: dict[str, Tensor] = {}
    trim, used = _trim(), 0
    place = torch.device(device)
    for done, (name, parts) in enumerate(_read_ahead(sources, budget, pinned=place.type == "cuda"), 1):
        tensor = _placed(parts, wanted[name], component, name, place, dtype)
        finite[name] = is_finite(tensor)
        _assign(module, name, tensor)
        used += tensor.nbytes
        if used > budget:
            trim()
            used = 0
        if progress:
            progress(done, len(names))
    trim()
    _check_finite(finite, dtype)
    _check_whole(module)
    module.eval().requires_grad_(False)


def load_component(
    checkpoint: Checkpoint,
    component: Component,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> nn.Module:
    """The module of a component's own spec, with its weights: :func:`load_into`."""
    module = made(component)
    load_into(module, checkpoint, component, device, dtype, progress)
    return module


def state_of(checkpoint: Checkpoint, component: Component, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of a component under our names, on the CPU; in ``dtype``, or as they are decoded."""
    return {name: assemble(checkpoint, component, name, dtype) for name in component.names}


def assemble(checkpoint: Checkpoint, component: Component, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """One of our tensors from its sources, on the CPU. Raises WeightsError for what does not fit together."""
    parts = [checkpoint[source].read() for source in component.names[name]]
    row = component.rows.get(name)
    tensor = row.to_official(parts) if row else parts[0]
    return tensor if dtype is None else tensor.to(dtype)


# ---------------------------------------------------------------------------------------------- before reading

MODULES: Mapping[str, Callable[[Any], nn.Module]] = MappingProxyType(
    {"transformer": Transformer, "autoencoder": Autoencoder, "clip": ClipText, "t5": T5Encoder, "text": TextTower}
)


def made(component: Component) -> nn.Module:
    """The module of a component's spec, on the meta device. Raises WeightsError for shapes that no module can have."""
    try:
        with Uninitialised(), torch.device("meta"):
            return MODULES[component.kind](component.spec)
    except (RuntimeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise WeightsError(f"got weights of the shape {component.spec}, which no module can have ({error})") from error


def need_fit(checkpoint: Checkpoint, component: Component) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of a component's tensors, in the order of the checkpoint. Raises WeightsError where it is
    not a whole module of its spec."""
    module = made(component)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check(type(module).__name__, wanted, checkpoint, component)
    return {name: wanted[name] for name in _in_order(checkpoint, component, wanted)}


def _in_order(checkpoint: Checkpoint, component: Component, names: Iterable[str]) -> list[str]:
    """As they lie in the file, so that it is read forwards."""
    order = {name: i for i, name in enumerate(checkpoint)}
    return sorted(names, key=lambda name: order[component.names[name][0]])


def check(title: str, wanted: dict[str, tuple[int, ...]], checkpoint: Checkpoint, component: Component) -> None:
    """Raises WeightsError naming all that is missing, unknown, misshapen or of integers; nothing is read."""
    missing, misshapen, integers = [], [], []
    for name, shape in wanted.items():
        sources = component.names.get(name, ())
        absent = [source for source in sources or [component.prefix + name] if source not in checkpoint]
        missing += absent
        if not absent and sources:
            shapes = [checkpoint[source].shape for source in sources]
            if shapes != _shapes_of(component, name, shape):
                misshapen.append(f"{', '.join(sources)} {[list(s) for s in shapes]} for {list(shape)}")
            integers += [source for source in sources if checkpoint[source].storage == INTEGER]
    unused = [source for name, group in component.names.items() if name not in wanted for source in group]
    unknown = [*component.unknown, *(name for name in unused if name in checkpoint)]
    faults = {"missing": missing, "unknown": unknown, "misshapen": misshapen, "of integers": integers}
    told = [f"{len(names)} {fault} ({first(names)})" for fault, names in faults.items() if names]
    if told:
        raise WeightsError(
            f"got weights that do not fit {title}: {'; '.join(told)}; allowed its {len(wanted)} tensors exactly, "
            "try another file or --variant"
        )


def _shapes_of(component: Component, name: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes that the sources of a tensor must have."""
    row = component.rows.get(name)
    if row and row.rows:
        return [(rows, *shape[1:]) for rows in row.rows] if sum(row.rows) == shape[0] else []
    return [shape[:2]] if row and row.layout == "pointwise" else [shape]


# ---------------------------------------------------------------------------------------------- reading


def _read_ahead(
    sources: list[tuple[str, list[Entry]]], budget: int, pinned: bool = False
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """(name, its parts) in order, a few parts read ahead by threads. Parts must be taken before the next name."""
    todo = deque(entry for _, entries in sources for entry in entries)
    flying: deque[tuple[Future[Tensor], int]] = deque()
    used = 0
    threads = THREADS_TO_GPU if pinned else THREADS
    pool = ThreadPoolExecutor(threads, "fluxloom-read", initializer=PINNED.set, initargs=(pinned,))

    def fill() -> None:
        nonlocal used
        while todo and (not flying or used + _bytes_of(todo[0]) <= budget):
            entry = todo.popleft()
            used += _bytes_of(entry)
            read = partial(_pinned, entry) if pinned else entry.read
            flying.append((pool.submit(read), _bytes_of(entry)))

    def parts(count: int) -> Iterator[Tensor]:
        nonlocal used
        for _ in range(count):
            fill()
            future, size = flying.popleft()
            yield future.result()
            used -= size

    try:
        for name, entries in sources:
            yield name, parts(len(entries))
    finally:
        pool.shutdown(cancel_futures=True)


def _pinned(entry: Entry) -> Tensor:
    """In pinned memory: what is stored as numbers was read into it, what was decoded is copied there."""
    return entry.read().pin_memory()


def _trim() -> Callable[[], object]:
    """What gives freed memory back to the system where the C library (glibc) would keep it: blocks under 32 MB, of
    which decoding leaves many. Measured on 2 GB decoded from fp8, the peak falls from 1.43 times what stays to 1.09."""
    try:
        return partial(ctypes.CDLL(None).malloc_trim, 0)
    except (OSError, AttributeError, TypeError):
        return lambda: None


def _bytes_of(entry: Entry) -> int:
    half = entry.storage in ("float16", "bfloat16")
    return prod(entry.shape) * (2 if half else _DECODED)


def _placed(
    parts: Iterator[Tensor],
    shape: tuple[int, ...],
    component: Component,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """One tensor at its place. A fused one is allocated once and filled part by part; one that is stored as it is
    wanted is the very tensor that was read."""
    row = component.rows.get(name)
    if row is None or (not row.rows and row.layout != "swapped"):
        out = None
        for part in parts:
            # To the device as it is: what is pinned gets there while the next is read, and is converted there.
            out = part.to(device, non_blocking=True).to(dtype).reshape(shape)
        assert out is not None
        return out
    out = torch.empty(shape, dtype=dtype, device=device)
    at = 0
    for part in parts:
        for piece in part.chunk(2)[::-1] if row.layout == "swapped" else (part,):
            out[at : at + len(piece)].copy_(piece, non_blocking=True)
            at += len(piece)
    return out


def is_finite(tensor: Tensor) -> Tensor:
    """A flag on the tensor's device, in one pass without a copy: least and greatest are not finite if any is not."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    least, greatest = torch.aminmax(tensor)
    return torch.isfinite(least) & torch.isfinite(greatest)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    place = module.get_submodule(owner)
    if leaf in place._parameters:
        place._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        place._buffers[leaf] = tensor


def _check_finite(finite: dict[str, Tensor], dtype: torch.dtype) -> None:
    flags = torch.stack([flag.cpu() for flag in finite.values()]).tolist() if finite else []
    bad = [name for name, fine in zip(finite, flags, strict=True) if not fine]
    if bad:
        advice = "try bfloat16, or fetch the file anew" if dtype == torch.float16 else "try fetching the file anew"
        raise WeightsError(f"got {len(bad)} tensors with values that are not finite ({first(bad)}), {advice}")


def _check_whole(module: nn.Module) -> None:
    left = [name for name, tensor in module.named_buffers() if tensor.is_meta]
    if left:
        raise WeightsError(f"got a module whose buffers {first(left)} no checkpoint fills")
