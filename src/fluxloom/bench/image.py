"""A whole picture, from the prompt to the file, stage by stage: the first one, and warm ones."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fluxloom.bench.floor import HEAT
from fluxloom.bench.results import Row
from fluxloom.bench.timing import Timing, measure, peak, synchronise
from fluxloom.core.shapes import latent_hw
from fluxloom.core.specs import Size
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.request import Reference, Request, Result
from fluxloom.infer.runtime import Runtime

# A prompt that was read before is remembered: every picture has another.
PROMPTS = (
    "a red bicycle on the beach",
    "a blue teapot in the snow",
    "a green boat at night",
    "a yellow tree in spring",
)


@dataclass
class Clock:
    """Seconds between marks, once the device is done."""

    found: Runtime
    stages: dict[str, float] = field(default_factory=dict)
    last: float = 0.0

    def begin(self) -> None:
        synchronise(self.found.device)
        self.last = time.perf_counter()

    def mark(self, stage: str) -> None:
        synchronise(self.found.device)
        now = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self.last
        self.last = now


def run(
    found: Runtime,
    size: Size,
    references: int = 0,
    steps: int | None = None,
    pictures: int = 3,
    told: Callable[[str], object] = lambda _: None,
) -> Iterator[Row]:
    """A row for every picture, the first of them cold: seconds of reading the prompt, of everything up to the first
    step and that step, of the others, of decoding (with the receipt), and of writing the PNG. Then one of the
    decoder alone."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    sources = tuple(Reference(Image.fromarray(noise)) for _ in range(references))
    for k in range(pictures):
        told("the first picture" if k == 0 else f"picture {k + 1}, warm")
        prompt = PROMPTS[k % len(PROMPTS)] + f", number {k}"
        request = Request(prompt=prompt, seed=k, width=size[0], height=size[1], references=sources, steps=steps)
        with peak(found.device) as most:
            row = _picture(found, request)
        yield {"picture": "cold" if k == 0 else "warm", **row, "peak_bytes": most.bytes}
    told("the decoder alone")
    yield {"picture": "decoder alone", "decode_s": round(_decoding(found, size).median / 1e3, 5)}


@torch.inference_mode()
def _decoding(found: Runtime, size: Size) -> Timing:
    """Of latents to pixels, and nothing else."""
    latents = torch.randn(1, found.spec.autoencoder.z_channels, *latent_hw(*size), device=found.device)
    return measure(lambda: found.autoencoder.decode(latents), found.device, repeats=10, heat=HEAT)


def _picture(found: Runtime, request: Request) -> Row:
    clock = Clock(found)
    clock.begin()
    found.read(request.prompt)
    clock.mark("text")
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        for event in Pipeline(found).stream(request):
            if isinstance(event, Result):
                clock.mark("decode")
                event.save(Path(folder) / "picture.png")
                clock.mark("save")
            else:
                clock.mark("first step" if count == 0 else "other steps")
                count += 1
    total = sum(clock.stages.values())
    stages = {f"{name.replace(' ', '_')}_s": round(seconds, 4) for name, seconds in clock.stages.items()}
    others = clock.stages.get("other steps", 0.0) / max(1, count - 1)
    return {**stages, "total_s": round(total, 4), "steps": count, "step_ms": round(1e3 * others, 3)}
