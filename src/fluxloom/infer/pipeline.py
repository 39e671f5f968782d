"""Request to results: encode, sample, decode, finish, write the receipt. One path for drawing, editing and init."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice

import torch
from PIL import Image
from torch import Tensor

import fluxloom
from fluxloom.core.shapes import latent_hw
from fluxloom.errors import BadInput
from fluxloom.infer.batch import lockstep
from fluxloom.infer.conditions import Conditioning, condition
from fluxloom.infer.finish import Finisher, Maker, check, finish, inputs
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
    finishers: tuple[Finisher, ...]
    conditions: Conditioning
    notes: list[str]
    translations: dict[str, str]
    hw: tuple[int, int]

    def trajectory(self, index: int, device: torch.device) -> Trajectory:
        """The path of picture ``index``."""
        x = self.conditions.start(index).to(device)
        known = self.conditions.known(index)
        held = None if known is None else known.to(device)
        solver = self.request.walk
        return trajectory(x, solver, self.conditions.times, self.conditions.rows, self.request.true_cfg, held)


@dataclass(frozen=True)
class Pipeline:
    """Runs requests on a runtime. Pictures of one request are drawn one after another: on a CPU a batch gains under
    a tenth, and matrix products of another size round differently, so that a picture could not be replayed alone.

    makers  of the finishers that a receipt may name, for replay
    """

    runtime: Runtime
    makers: Mapping[str, Maker] = field(default_factory=dict)

    def run(
        self,
        request: Request,
        observe: Callable[[Preview], None] | None = None,
        finishers: Sequence[Finisher] = (),
    ) -> list[Result]:
        """All results of a request. ``observe`` sees every step; raising there ends the work."""
        results = []
        for event in self.stream(request, finishers):
            if isinstance(event, Result):
                results.append(event)
            elif observe is not None:
                observe(event)
        return results

    def run_many(
        self, requests: Sequence[Request], batch: int = 1, finishers: Sequence[Finisher] = ()
    ) -> Iterator[list[Result]]:
        """The results of each request in turn, drawn ``batch`` pictures at a time: what a GPU is quickest with.

        Batches of 1 give the very pictures of :meth:`run`; in larger ones rounding differs, and the receipt says so.
        The requests are checked at once; raises BadInput, and WeightsError for LoRAs that do not fit.
        """
        if batch < 1:
            raise BadInput(f"got batch {batch}, allowed 1 or more pictures, try 1")
        return self._run_many([self._resolved(request, finishers) for request in requests], batch, tuple(finishers))

    def stream(self, request: Request, finishers: Sequence[Finisher] = ()) -> Iterator[Preview | Result]:
        """Every step as it is reached, and each result when it is done. Closing the iterator ends the work.

        The request is checked at once, not at the first step; raises BadInput, and WeightsError for LoRAs that do not
        fit. Each picture goes through the ``finishers`` before it is handed out.
        """
        return self._stream(self._resolved(request, finishers), tuple(finishers))

    def _resolved(self, request: Request, finishers: Sequence[Finisher]) -> Resolved:
        """A request checked with all that it needs: LoRAs that do not fit are found out here."""
        found = resolve(request, self.runtime.spec)
        if self.runtime.allows is not None:
            self.runtime.allows(found)
        for lora in found.loras:
            self.runtime.loras.read(lora)
        check(found, finishers)
        return found

    def _stream(self, request: Resolved, finishers: tuple[Finisher, ...]) -> Iterator[Preview | Result]:
        began = time.perf_counter()
        runtime, job = self.runtime, self._job(request, finishers)
        for index in range(request.n):
            for step in walk(job.trajectory(index, runtime.device), runtime.velocity):
                x = step.x
                yield Preview(index, request.n, step, job.hw, runtime, runtime.previewer)
            yield self._result(job, index, runtime.decode(x, job.hw), began)
            began = time.perf_counter()

    def _run_many(
        self, requests: list[Resolved], batch: int, finishers: tuple[Finisher, ...]
    ) -> Iterator[list[Result]]:
        jobs = (self._job(request, finishers) for request in requests)
        pieces = ((job, index) for job in jobs for index in range(job.request.n))
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
        return [
            self._result(job, index, image, began, size) for image, (job, index) in zip(images, pieces, strict=True)
        ]

    def _job(self, request: Resolved, finishers: tuple[Finisher, ...]) -> _Job:
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
        return _Job(request, finishers, conditions, notes, translations, latent_hw(request.width, request.height))

    def _result(self, job: _Job, index: int, drawn: Image.Image, began: float, batch: int = 1) -> Result:
        """A decoded picture, finished, with its receipt."""
        spec, request = self.runtime.spec, job.request
        image, told = finish(drawn, request, job.finishers)
        seconds = (time.perf_counter() - began) / batch
        receipt = Receipt(
            {
                "schema": SCHEMA,
                "fluxloom": fluxloom.__version__,
                "model": {"name": spec.name, "content": self.runtime.content},
                "request": {**request.to_dict(), "index": index, "seed": request.seed + index},
                "inputs": [found.to_dict() for found in (*request.inputs, *inputs(job.finishers))],
                "pixels": pixel_hash(image),
                **({"finish": told} if told else {}),
                "warnings": job.notes,
                **({"translations": job.translations} if job.translations else {}),
                "versions": versions(),
                "machine": {**self.runtime.machine(), **({"batch": batch} if batch > 1 else {})},
                "seconds": round(seconds, 3),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        return Result(image, receipt)
