"""Request to results: encode, sample, decode, write the receipt. One path for drawing, editing and image to image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice

import torch
from PIL import Image
from torch import Tensor

import fluxloom
from fluxloom.core.shapes import latent_hw
from fluxloom.core.solvers import SOLVERS
from fluxloom.errors import BadInput
from fluxloom.infer.batch import lockstep
from fluxloom.infer.conditions import Conditioning, condition
from fluxloom.infer.pictures import pixel_hash
from fluxloom.infer.preview import Preview as Preview
from fluxloom.infer.receipt import SCHEMA, Receipt, versions
from fluxloom.infer.request import Request, Resolved, Result, resolve
from fluxloom.infer.runtime import Runtime
from fluxloom.infer.sample import Trajectory, trajectory, walk


@dataclass(frozen=True)
class _Job:
    """A request made ready to be drawn."""

    request: Resolved
    conditions: Conditioning
    notes: list[str]
    translations: dict[str, str]
    hw: tuple[int, int]

    def trajectory(self, index: int, device: torch.device) -> Trajectory:
        """The path of picture ``index``."""
        x = self.conditions.start(index).to(device)
        solver = SOLVERS[self.request.solver].run
        known = self.conditions.known(index)
        held = None if known is None else known.to(device)
        return trajectory(x, solver, self.conditions.times, self.conditions.rows, self.request.true_cfg, held)


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

    def run_many(self, requests: Sequence[Request], batch: int = 1) -> Iterator[list[Result]]:
        """The results of each request in turn, drawn ``batch`` pictures at a time: what a GPU is quickest with.

        Batches of 1 give the very pictures of :meth:`run`; in larger ones rounding differs, and the receipt says so.
        The requests are checked at once; raises BadInput, and WeightsError for LoRAs that do not fit.
        """
        if batch < 1:
            raise BadInput(f"got batch {batch}, allowed 1 or more pictures, try 1")
        return self._run_many([self._resolved(request) for request in requests], batch)

    def stream(self, request: Request) -> Iterator[Preview | Result]:
        """Every step as it is reached, and each result when it is done. Closing the iterator ends the work.

        The request is checked at once, not at the first step; raises BadInput, and WeightsError for LoRAs that do not
        fit.
        """
        return self._stream(self._resolved(request))

    def _resolved(self, request: Request) -> Resolved:
        """A request checked with all that it needs: LoRAs that do not fit are found out here."""
        found = resolve(request, self.runtime.spec)
        for lora in found.loras:
            self.runtime.loras.read(lora)
        return found

    def _stream(self, request: Resolved) -> Iterator[Preview | Result]:
        began = time.perf_counter()
        runtime, job = self.runtime, self._job(request)
        for index in range(request.n):
            for step in walk(job.trajectory(index, runtime.device), runtime.velocity):
                x = step.x
                yield Preview(index, request.n, step, job.hw, runtime, runtime.previewer)
            image = runtime.decode(x, job.hw)
            seconds = time.perf_counter() - began
            yield Result(image, self._receipt(job, index, image, seconds))
            began = time.perf_counter()

    def _run_many(self, requests: list[Resolved], batch: int) -> Iterator[list[Result]]:
        pieces = ((job, index) for job in map(self._job, requests) for index in range(job.request.n))
        batches = iter(lambda: list(islice(pieces, batch)), [])
        results = chain.from_iterable(map(self._together, batches))
        for request in requests:
            yield list(islice(results, request.n))

    def _together(self, pieces: list[tuple[_Job, int]]) -> list[Result]:
        """Pictures drawn in one batch; each takes its share of the time."""
        began, size = time.perf_counter(), len(pieces)
        ends: dict[int, Tensor] = {}
        for numbers, loras in self.runtime.loras.parties([job.request.loras for job, _ in pieces]):
            runs = [job.trajectory(index, self.runtime.device) for job, index in (pieces[k] for k in numbers)]
            velocities = partial(self.runtime.velocities, together=loras)
            ends.update(zip(numbers, lockstep(runs, velocities), strict=True))
        images = [self.runtime.decode(ends[k], job.hw) for k, (job, _) in enumerate(pieces)]
        seconds = (time.perf_counter() - began) / size
        return [
            Result(image, self._receipt(job, index, image, seconds, size))
            for image, (job, index) in zip(images, pieces, strict=True)
        ]

    def _job(self, request: Resolved) -> _Job:
        runtime = self.runtime
        notes = [
            *runtime.notes(request.prompt, prompt_t5=request.prompt_t5, text_length=request.text_length),
            *runtime.notes(request.negative, text_length=request.text_length),
            *runtime.loras.notes(request.loras),
        ]
        conditions = condition(request, runtime.spec, runtime.read, runtime.encode, runtime.see)
        texts = [text for text in (request.prompt, request.prompt_t5, request.negative) if text]
        read = {text: runtime.reader.translation(text) for text in texts}
        translations = {text: english for text, english in read.items() if english is not None}
        return _Job(request, conditions, notes, translations, latent_hw(request.width, request.height))

    def _receipt(self, job: _Job, index: int, image: Image.Image, seconds: float, batch: int = 1) -> Receipt:
        spec, request = self.runtime.spec, job.request
        return Receipt(
            {
                "schema": SCHEMA,
                "fluxloom": fluxloom.__version__,
                "model": {"name": spec.name, "content": self.runtime.content},
                "request": {**request.to_dict(), "index": index, "seed": request.seed + index},
                "inputs": [found.to_dict() for found in request.inputs],
                "pixels": pixel_hash(image),
                "warnings": job.notes,
                **({"translations": job.translations} if job.translations else {}),
                "versions": versions(),
                "machine": {**self.runtime.machine(), **({"batch": batch} if batch > 1 else {})},
                "seconds": round(seconds, 3),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
