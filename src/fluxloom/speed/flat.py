"""Tensors one after another in a buffer of bytes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

_ALIGNED = 256  # bytes: what every kernel could ask of an address, and what CUDA's own allocations have


def starts(sizes: Iterable[int]) -> list[int]:
    """Where each starts, of as many bytes, and last where all end."""
    return list(accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0))
