"""One backward pass as one CUDA graph: nano's kernels are so short that launching them one by one leaves gaps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fluxloom.train.model import Batch

_WARM_UP = 3  # passes outside the graph: they compile, and choose kernels


class CapturedBackward:
    """``loss(batch).backward()``, recorded with the first batch and replayed with the next ones of the same shapes.

    Gradients are added to those of the parameters, which must exist before and stay in place, as they do in
    :class:`~fluxloom.train.optim.Optimiser`.
    """

    def __init__(self, loss: Callable[[Batch], Tensor], batch: Batch, gradient: Tensor) -> None:
        self.inputs = {name: value.clone() for name, value in batch.items()}
        kept = gradient.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                loss(self.inputs).backward()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            value = loss(self.inputs)
            value.backward()
        self.loss = value.detach()  # the graph of gradients must die: the next capture is on another stream
        gradient.copy_(kept)  # what warming up added

    def __call__(self, batch: Batch) -> Tensor:
        """The loss; its gradients are added."""
        for name, value in batch.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        return self.loss.clone()
