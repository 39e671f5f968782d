"""The best of several tries at one request, judged by the model that drew them and by what they left alone.

*Fulfilment* asks the model itself: how much better does it predict the noise in a picture when it is told the
instruction than when it is told nothing? With the same reference, noise and times for both, the difference of the
flow-matching losses estimates a log likelihood ratio (Li et al. 2023, arXiv:2303.16203, who classify pictures so;
Kong et al. 2023, arXiv:2310.07972, for the information that it measures). Over 0, the words explain the picture.
Measured on nano, one or two edits of each of its 19 kinds: in 24 of 24 the exact result is over 0, and before both the
unchanged source (over 0 in 3) and the exact result of another instruction (in none). At t = 0.65 alone 22 are in order.

*Preservation* is the mean CIEDE2000 outside of the change, as the lock of :mod:`fluxloom.edit.lock` measures it before
it puts the old pixels back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from fluxloom.core import flow, shapes
from fluxloom.edit.drift import Limits, exceeded, meters
from fluxloom.edit.lock import lock
from fluxloom.edit.measured import changed
from fluxloom.errors import BadInput
from fluxloom.infer.checks import whole
from fluxloom.infer.conditions import condition
from fluxloom.infer.finish import Finisher
from fluxloom.infer.pictures import resize
from fluxloom.infer.pipeline import Pipeline, Preview
from fluxloom.infer.request import Request, Resolved, Result, resolve
from fluxloom.infer.runtime import Runtime

# Where words matter: at high noise they decide what will be there, at low noise the picture itself tells.
TIMES = (0.65, 0.8, 0.95)
SEED = 0  # of the noise that all candidates share
MOST = 64  # tries
TOLERANCE = 5.0  # mean CIEDE2000 outside of the change at which 1/e of the evidence is left


@dataclass(frozen=True)
class Try:
    """One picture of several.

    fulfilment  see above; in squared latent units
    delta_e     outside of the change; None for drawings, and for edits of the whole picture
    changed     share of the picture; None for drawings
    score       fulfilment e^(-delta_e / 5) where fulfilment is over 0, else fulfilment: what follows the words comes
                before what does not, and more of it may cost a little of the rest
    exceeded    limits of drift that do not hold, in words
    """

    result: Result
    fulfilment: float
    delta_e: float | None
    changed: float | None
    exceeded: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        kept = math.exp(-(self.delta_e or 0.0) / TOLERANCE)
        return self.fulfilment * kept if self.fulfilment > 0 else self.fulfilment

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, without the picture."""
        facts = {"fulfilment": self.fulfilment, "delta_e": self.delta_e, "changed": self.changed}
        return {"seed": self.result.seed, "score": self.score, **facts, "exceeded": list(self.exceeded)}


def best_of(
    pipeline: Pipeline,
    request: Request,
    n: int,
    finishers: Sequence[Finisher] = (),
    observe: Callable[[Preview], None] | None = None,
    allowed: Limits | None = None,
) -> tuple[Result, list[Try]]:
    """Draw a request with ``n`` seeds, its own and those after it; returns the best result, and all tries, best first.

    ``finishers`` and ``observe``: see :meth:`Pipeline.run`; ``allowed``: see :func:`rank`. Raises BadInput for what the
    model cannot do, and for several pictures in the request itself.
    """
    if request.n != 1:
        raise BadInput(f"got n {request.n} in a request for the best of {n}, allowed 1, try leaving it out")
    results = pipeline.run(replace(request, n=whole("best_of", n, 1, MOST)), observe, finishers)
    tries = rank(pipeline.runtime, request, results, allowed)
    return tries[0].result, tries


def rank(runtime: Runtime, request: Request, results: Sequence[Result], allowed: Limits | None = None) -> list[Try]:
    """Results of a request, best first; of equals, the earlier. Those that drift further than is ``allowed`` come last:
    where the first does, none is as it should be."""
    asked = resolve(request, runtime.spec)
    tries = [_try(runtime, asked, result, allowed) for result in results]
    return sorted(tries, key=lambda one: (bool(one.exceeded), -one.score))


def fulfilment(runtime: Runtime, request: Resolved, picture: Image.Image) -> float:
    """How much better the model predicts a picture with the words of a request than without any: the mean over TIMES.

    Guidance, where the model takes it, is 1: what is predicted then is the plain conditional velocity.
    """
    plain = None if request.guidance is None else 1.0
    # True CFG gives the rows that are wanted here: the prompt, and with the same pictures, no prompt.
    both = replace(request, true_cfg=2.0, negative="", guidance=plain)
    rows = condition(both, runtime.spec, runtime.read, runtime.encode, runtime.see).rows
    latent = runtime.encode(resize(picture, request.width, request.height))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(SEED))
    truth = shapes.pack(flow.target(latent, noise)).to(runtime.device)
    gains = []
    for t in TIMES:
        x = shapes.pack(flow.interpolate(latent, noise, t)).to(runtime.device)
        told, untold = ((velocity - truth).square().mean() for velocity in runtime.velocity(x, t, rows))
        gains.append(float(untold - told))
    return sum(gains) / len(gains)


def _try(runtime: Runtime, request: Resolved, result: Result, allowed: Limits | None = None) -> Try:
    found = fulfilment(runtime, request, result.image)
    original = request.input("context") or request.input("init")
    if original is None:
        return Try(result, found, None, None)
    report = _kept(original.image, result)
    beyond = _exceeded(original.image, result, allowed) if allowed is not None else []
    outside = None if report["whole"] else float(report["delta_e_outside"])
    return Try(result, found, outside, float(report["changed"]), tuple(beyond))


def _kept(original: Image.Image, result: Result) -> Mapping[str, Any]:
    """The report of the lock: of the one that the result went through, or else of one tried out here."""
    steps: Sequence[Mapping[str, Any]] = result.receipt.data.get("finish", ())
    for step in steps:
        if step["name"] == "lock":
            report: Mapping[str, Any] = step["report"]
            return report
    return lock(np.asarray(original), np.asarray(result.image))[2].to_dict()


def _exceeded(original: Image.Image, result: Result, allowed: Limits) -> list[str]:
    """At the size of the result: an edit that was not locked has the model's."""
    before = resize(original, *result.image.size)
    where = changed(before, result.image, result.receipt)
    return exceeded(meters(np.asarray(before), np.asarray(result.image), where), allowed)
