"""Step caches: executors that answer some steps from earlier ones, for bench/quality.py.

They are no part of the package: at equal cost a second-order solver with fewer steps comes nearer to the exact path
(docs/log.md, 2026-11-22). They stay here so that this can be measured again, on larger models too.

A run of steps is recognised by its :class:`Given` and by times that fall; whatever else comes starts anew.
Legend: B batch, L tokens, C channels, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fluxloom.core.attention import rope
from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput
from fluxloom.infer.executor import Executor, Given

WARM = 3  # steps at the start of a path that are always computed: there the picture is decided


class Run:
    """How far one run of steps is; tells when another has begun."""

    def __init__(self) -> None:
        self._given: Given | None = None
        self._times: tuple[float, ...] = ()
        self.index = 0

    def goes_on(self, t: Sequence[float], given: Given) -> bool:
        """Count a step; False where it is the first of another run: other conditions, or times that do not fall."""
        times, before = tuple(t), self._times
        on = (
            given is self._given
            and len(times) == len(before)
            and all(a < b for a, b in zip(times, before, strict=True))
        )
        self._given, self._times, self.index = given, times, self.index + 1 if on else 0
        return on


class Taylor:
    """Every ``every``-th step is computed; between, the velocity is continued from the last computed ones by the
    polynomial of degree ``order`` through them in t (TaylorSeer, Liu et al. 2025, arXiv:2503.06923, which does so with
    the features of every block)."""

    lossy = True

    def __init__(self, inner: Executor, every: int = 2, order: int = 1, warm: int = WARM) -> None:
        if every < 2 or order not in (0, 1, 2):
            raise BadInput(f"got every {every} and order {order}, allowed 2 or more and 0, 1 or 2, try 2 and 1")
        self.inner, self.every, self.order, self.warm = inner, every, order, max(warm, order + 1)
        self.name = f"{inner.name}, Taylor {order} every {every}"
        self.computed = 0
        self._run = Run()
        self._known: list[tuple[Tensor, Tensor]] = []  # (times [B, 1, 1], velocity [B, L, C]), newest first

    def __call__(self, img: Tensor, t: Sequence[float], given: Given) -> Tensor:
        if not self._run.goes_on(t, given):
            self._known = []
        times = torch.tensor(t, device=img.device)[:, None, None]
        if self._run.index >= self.warm and (self._run.index - self.warm) % self.every != self.every - 1:
            return continued(self._known, times)
        v = self.inner(img, t, given)
        self.computed += 1
        self._known = [(times, v), *self._known[: self.order]]
        return v


def continued(known: Sequence[tuple[Tensor, Tensor]], t: Tensor) -> Tensor:
    """The polynomial through known (times [B, 1, 1], values [B, L, C]), at t [B, 1, 1], by Newton's divided
    differences; computed in float32, returned in the values' dtype."""
    times = [time for time, _ in known]
    column = [value.float() for _, value in known]
    out, product = column[0], torch.ones_like(t)
    for degree in range(1, len(known)):
        column = [(a - b) / (times[i] - times[i + degree]) for i, (a, b) in enumerate(pairwise(column))]
        product = product * (t - times[degree - 1])
        out = out + product * column[0]
    return out.to(known[0][1].dtype)


class FirstBlock:
    """The first block is always computed. Where its residual of the image tokens changed by less than ``threshold``
    (mean of the absolute difference, relative) since the last whole step, the residual of all others is that step's
    (ParaAttention's first block cache, Cheng 2025; the measure is TeaCache's, Liu et al. 2024, arXiv:2411.19108)."""

    lossy = True

    def __init__(self, transformer: Transformer, threshold: float = 0.1, warm: int = WARM) -> None:
        if not 0 < threshold < 1:
            raise BadInput(f"got threshold {threshold}, allowed between 0 and 1, try 0.1")
        self.transformer, self.threshold, self.warm = transformer, threshold, warm
        self.name = f"plain, first block {threshold:g}"
        self.computed = 0
        self._run = Run()
        self._last: tuple[Tensor, Tensor] | None = None  # residuals [B, L, D]: of the first block, of all others

    def __call__(self, img: Tensor, t: Sequence[float], given: Given) -> Tensor:
        model = self.transformer
        if not self._run.goes_on(t, given):
            self._last = None
        guidance = None if given.guidance is None else torch.tensor(given.guidance, device=img.device)
        vec = model.vector(torch.tensor(t, device=img.device), given.pooled, guidance)
        angles = rope(torch.cat((given.txt_ids, given.img_ids), dim=1), model.spec.axes_dim, model.spec.theta)
        before, txt = model.img_in(img), model.txt_in(given.txt)
        first, *rest = model.double_blocks
        x, txt = first(before, txt, vec, angles)
        residual = x - before
        if self._last is None or self._run.index < self.warm or self._changed(residual) >= self.threshold:
            begun = x
            for block in rest:
                x, txt = block(x, txt, vec, angles)
            both = torch.cat((txt, x), dim=1)
            for block in model.single_blocks:
                both = block(both, vec, angles)
            x = both[:, txt.shape[1] :]
            self._last = residual, x - begun
            self.computed += 1
        else:
            x = x + self._last[1]
        out: Tensor = model.final_layer(x, vec)
        return out

    def _changed(self, residual: Tensor) -> float:
        """Relative change of the first block's residual, of the member of the batch that changed most."""
        assert self._last is not None
        before = self._last[0]
        change = (residual - before).abs().mean((1, 2)) / before.abs().mean((1, 2))
        return float(change.max())
