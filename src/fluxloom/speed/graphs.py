"""CUDA graphs around the fused sequence: one launch a step, whatever the number of kernels."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor

from fluxloom.infer.executor import Given
from fluxloom.speed.fused import Fused

_Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # those of Fused.run
_KEPT = 4  # shapes; all share one pool of memory, and only one of them runs at a time
_WARM = 2  # runs before the capture: kernels are compiled, workspaces and handles made


@dataclass(eq=False)
class _Captured:
    """A captured pass: where its inputs lie, and where it leaves its output."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    out: Tensor
    given: ref[Given] | None = None


class Captured:
    """An executor: :class:`Fused`, captured once for each shape (batch, image and text tokens) and then replayed.

    Passes with LoRAs are not captured: what hangs on the modules comes and goes.
    """

    def __init__(self, fused: Fused) -> None:
        self.fused, self.name, self.lossy = fused, f"{fused.name}, captured", fused.lossy
        self._shapes: dict[Hashable, _Captured] = {}  # the last used comes last
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, img: Tensor, t: Sequence[float], given: Given) -> Tensor:
        if given.adapted:
            return self.fused(img, t, given)
        still, mods = self.fused.still(given), self.fused.modulated(t, given)
        inputs = (img, mods, still.txt, still.cos, still.sin)
        key = (*(x.shape for x in inputs), img.dtype, given.targets)
        found = self._shapes.pop(key, None) or self._capture(inputs, given.targets)
        self._shapes[key] = found
        while len(self._shapes) > _KEPT:
            del self._shapes[next(iter(self._shapes))]
        same = found.given is not None and found.given() is given
        for at, x in list(zip(found.inputs, inputs, strict=True))[: 2 if same else None]:
            at.copy_(x)
        found.given = ref(given)
        found.graph.replay()
        return found.out.clone()  # the next step overwrites it

    def _capture(self, inputs: tuple[Tensor, ...], targets: int) -> _Captured:
        """Run once outside of the default stream, then capture, on copies of the inputs."""
        own = img, mods, txt, cos, sin = cast(_Inputs, tuple(x.clone() for x in inputs))
        device = own[0].device
        with torch.cuda.device(device):  # capturing knows the current one alone
            # One stream for all: a pool is shared by captures of one stream, and each stream has a workspace of cuBLAS.
            stream = self._stream = self._stream or torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM):
                    self.fused.run(img, mods, txt, cos, sin, targets)
            torch.cuda.current_stream().wait_stream(stream)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile (NCCL's watchdog asks for events) is none of the capture's business.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                out = self.fused.run(img, mods, txt, cos, sin, targets)
        return _Captured(graph, own, out)
