"""Who computes what lies between matrix products: Triton's kernels where they run, else their plain twins."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch


@cache
def available() -> bool:
    """Whether Triton is installed; it comes with PyTorch for CUDA, and is for GPUs only."""
    return find_spec("triton") is not None


def ops_for(device: torch.device) -> ModuleType:
    """:mod:`fluxloom.speed.kernels` on a GPU with Triton, :mod:`fluxloom.speed.twins` elsewhere: the same functions."""
    if device.type == "cuda" and available():
        from fluxloom.speed import kernels

        return kernels
    from fluxloom.speed import twins

    return twins
