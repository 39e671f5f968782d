"""What a training step of nano costs on this machine, by how it is compiled: the backward passes of drawings and edits
on made-up latents of 256 px, and the optimiser.

    python bench/training_step.py dynamic static whole

One JSON line each. On a processor the batches are tiny and the figures mean nothing: that is for trying the script.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fluxloom.core.specs import MODELS
from fluxloom.train.model import Draw, Trainee, flow_loss
from fluxloom.train.optim import Optimiser

SPEC = MODELS["nano"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DRAWINGS, EDITS, ROUNDS = (192, 96, 10) if DEVICE.type == "cuda" else (2, 1, 1)


def batch(count: int, edits: bool) -> dict[str, Tensor]:
    """Latents and words at random."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    pictures = ("image", "source") if edits else ("image",)
    latents = {name: torch.randn(count, 16, 32, 32, device=DEVICE, generator=generator).bfloat16() for name in pictures}
    ids = torch.randint(3, 1_500, (count, SPEC.text_length), device=DEVICE, generator=generator)
    made = {**latents, "ids": ids, "weight": torch.ones(count, 256, device=DEVICE)}
    return Draw(mean=0.8, std=1.2).add(made, torch.zeros_like(ids[0]), generator)


def milliseconds(work: Callable[[], object]) -> float:
    """Mean over a few rounds, after two to warm up."""
    for _ in range(2):
        work()
    _wait()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        work()
    _wait()
    return round(1_000 * (time.perf_counter() - began) / ROUNDS, 1)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def compiled(how: str) -> Trainee:
    """nano in bfloat16, compiled block by block with ``dynamic`` or ``static`` shapes, as a ``whole``, or not."""
    torch._dynamo.reset()
    model = Trainee(SPEC)
    model.initialise()
    model.to(DEVICE, torch.bfloat16)
    if how == "whole":
        model.compile(dynamic=False)
    elif how != "eager":
        for blocks in (model.text.blocks, model.transformer.double_blocks, model.transformer.single_blocks):
            for block in blocks:
                block.compile(dynamic=how == "dynamic")
    return model


def main() -> None:
    drawings, edits = batch(DRAWINGS, False), batch(EDITS, True)
    for how in sys.argv[1:] or ["eager"]:
        model = compiled(how)
        optimiser = Optimiser(model, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99), ema=0.999, clip=1.0)
        began = time.perf_counter()
        for given in (drawings, edits):
            flow_loss(model, given).backward()
        _wait()
        row = {
            "compiled": how,
            "first pass, s": round(time.perf_counter() - began, 1),
            "drawings, ms": milliseconds(lambda m=model: flow_loss(m, drawings).backward()),
            "edits, ms": milliseconds(lambda m=model: flow_loss(m, edits).backward()),
            "optimiser, ms": milliseconds(lambda o=optimiser: o.step(1.0, 10)),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
