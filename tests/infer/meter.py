"""How many bytes of tensors a function holds at its fullest, seen on the meta device: shapes without numbers."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class _Attention(TorchFunctionMode):
    """Attention as the kernels of a GPU do it: nothing but its output is ever whole."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class Meter(TorchDispatchMode):
    """Counts each storage from the operation that makes it until nobody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: Counter[int] = Counter()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(one) for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)}
        known = {one.untyped_storage()._cdata for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_iter(out):
            if isinstance(one, Tensor) and id(one) not in given:
                self._hold(one, known)
        return out

    def _hold(self, one: Tensor, known: set[int]) -> None:
        storage = one.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in known and not self.holders[key]:
            return  # a view of what was there before: a weight, an input
        if not self.holders[key]:
            self.alive += size
            self.peak = max(self.peak, self.alive)
        self.holders[key] += 1
        weakref.finalize(one, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            self.alive -= size


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes of all that a function makes and holds at once."""
    with torch.inference_mode(False), torch.no_grad(), _Attention(), Meter() as meter:
        run()
    return meter.peak
