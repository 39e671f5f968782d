"""Waiting on the GPU for words that other GPUs write into its memory. Importing this needs Triton."""

# Kernels are in Triton's language, whose types are not Python's; the function below them is typed.
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _take_kernel(words, ended, OWN: tl.constexpr, P: tl.constexpr):
    """One program: nothing else is to be computed meanwhile. ``sys``: what was written before a word by another GPU is
    there for what follows."""
    for rank in tl.static_range(P):
        if rank != OWN:
            over = tl.atomic_cas(words + rank, 1, 0, sem="acquire", scope="sys")
            while over == 0:
                over = tl.atomic_cas(words + rank, 1, 0, sem="acquire", scope="sys")
                over = over | tl.load(ended, volatile=True)


def take(words: Tensor, own: int, ended: Tensor) -> None:
    """Wait until all of ``words`` [P] int32 but one's own are 1, and make them 0; or until ``ended`` [] int32 is 1."""
    with torch.cuda.device_of(words):
        _take_kernel[(1,)](words, ended, OWN=own, P=len(words), num_warps=1)
