"""Request to results: encode, sample, decode, write the receipt. One path for drawing, editing and image to image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

from PIL import Image

import fluxloom
from fluxloom.core.shapes import latent_hw
from fluxloom.core.solvers import SOLVERS
from fluxloom.infer.conditions import condition
from fluxloom.infer.pictures import pixel_hash
from fluxloom.infer.receipt import SCHEMA, Receipt, versions
from fluxloom.infer.request import Request, Resolved, Result, resolve
from fluxloom.infer.runtime import Runtime
from fluxloom.infer.sample import Step, trajectory, walk


@dataclass(frozen=True)
class Preview:
    """A step on the way of picture ``picture`` (from 0) of ``pictures``."""

    picture: int
    pictures: int
    step: Step
    hw: tuple[int, int]
    runtime: Runtime = field(repr=False)

    @cached_property
    def image(self) -> Image.Image:
        """What the picture would be if the path went on straight, at full size. Decoded when asked for, which
        costs nano a fifth of a second: ask at every other step or less."""
        return self.runtime.decode(self.step.x0, self.hw)


@dataclass(frozen=True)
class Pipeline:
    """Runs requests on a runtime. Pictures of one request are drawn one after another: on a CPU a batch gains under
    a tenth, and matrix products of another size round differently, so that a picture could not be replayed alone."""

    runtime: Runtime

    def run(self, request: Request, observe: Callable[[Preview], None] | None = None) -> list[Result]:
        """All results of a request. ``observe`` sees every step; raising there ends the work."""
        results = []
        for event in self.stream(request):
            if isinstance(event, Result):
                results.append(event)
            elif observe is not None:
                observe(event)
        return results

    def stream(self, request: Request) -> Iterator[Preview | Result]:
        """Every step as it is reached, and each result when it is done. Closing the iterator ends the work.

        The request is checked at once, not at the first step; raises BadInput.
        """
        return self._stream(resolve(request, self.runtime.spec))

    def _stream(self, request: Resolved) -> Iterator[Preview | Result]:
        began = time.perf_counter()
        runtime, hw = self.runtime, latent_hw(request.width, request.height)
        notes = [note for text in (request.prompt, request.negative) for note in runtime.notes(text)]
        conditions = condition(request, runtime.spec, runtime.read, runtime.encode)
        solver = SOLVERS[request.solver].run
        for index in range(request.n):
            x = conditions.start(index).to(runtime.device)
            run = trajectory(x, solver, conditions.times, conditions.rows, request.true_cfg)
            for step in walk(run, runtime.velocity):
                x = step.x
                yield Preview(index, request.n, step, hw, runtime)
            image = runtime.decode(x, hw)
            seconds = time.perf_counter() - began
            yield Result(image, self._receipt(request, index, image, notes, seconds))
            began = time.perf_counter()

    def _receipt(self, request: Resolved, index: int, image: Image.Image, notes: list[str], seconds: float) -> Receipt:
        spec = self.runtime.spec
        return Receipt(
            {
                "schema": SCHEMA,
                "fluxloom": fluxloom.__version__,
                "model": {"name": spec.name, "content": self.runtime.content},
                "request": {**request.to_dict(), "index": index, "seed": request.seed + index},
                "inputs": [found.to_dict() for found in request.inputs],
                "pixels": pixel_hash(image),
                "warnings": notes,
                "versions": versions(),
                "machine": self.runtime.machine(),
                "seconds": round(seconds, 3),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
