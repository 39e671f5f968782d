"""What a request asks of a machine: how much, and how fast a machine is. Numbers for :mod:`fluxloom.infer.plan`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from fluxloom.core.shapes import token_count
from fluxloom.core.solvers import SOLVERS
from fluxloom.core.specs import ModelSpec, Size, TransformerSpec
from fluxloom.errors import BadInput
from fluxloom.infer.request import Resolved
from fluxloom.weights.lora_file import held

SEEN = 729  # tokens of a picture that stands for words


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How fast a machine is seen to be.

    products   TFLOP/s of matrix products in ``bfloat16``, ``float32``, ``fp8`` and ``int8``; what is not there is
               not to be had
    attention  TFLOP/s of attention in 16 bits
    pictures   TFLOP/s of the autoencoder's convolutions: in bfloat16 on a GPU, in float32 on a processor
    upload     GB/s from pinned host memory to the device; 0: they are one memory
    overhead   seconds of a step over those of its products and its attention
    """

    name: str
    products: Mapping[str, float]
    attention: float
    pictures: float
    upload: float
    overhead: float = 1.1

    def measured(self, rates: Mapping[str, float]) -> Machine:
        """The same with other rates: names of fields, or of products. Raises BadInput."""
        names = (*self.products, "attention", "pictures", "upload", "overhead")
        for name, rate in rates.items():
            if name not in names or not 0 < rate < math.inf:
                raise BadInput(f"got rate {name}={rate:g}, allowed positive {', '.join(names)}, try bfloat16=100")
        products = {name: rates.get(name, rate) for name, rate in self.products.items()}
        others: dict[str, Any] = {name: rate for name, rate in rates.items() if name not in products}
        return replace(self, products=products, **others)


# H200: bfloat16, fp8 and attention (FA3) as held under load (torch 2.11, bench/results/2026-11-22-h200-peers.json).
# Upload together with plan.HELD_BACK, by which it is divided: 51 to 54 GB/s were seen while blocks streamed
# (2026-11-22-h200-offload.json). Pictures: 32 ms for a decoder of 1024 x 1024 (2026-11-22-h200-image.json). [E], to be
# measured: float32, int8.
# CPU: two cores of an EPYC with AVX-512 bf16, as measured on a transformer of 160 M parameters.
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "h200": Machine(
            name="one H200",
            products={"bfloat16": 746, "float32": 50, "fp8": 1424, "int8": 1000},
            attention=690,
            pictures=280,
            upload=55,
            overhead=1.15,
        ),
        "cpu": Machine(
            name="two cores of a processor",
            products={"bfloat16": 0.944, "float32": 0.194},
            attention=0.185,
            pictures=0.194,
            upload=0,
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What of a request decides its memory and time.

    references   sizes at which reference pictures are encoded; their tokens stand beside the target's at every step
    encoded      sizes of further pictures that are encoded: to start from, to fill, to follow
    images       pictures that stand for words (Redux)
    rows         members of a pass: two under true CFG
    evaluations  passes of the transformer a picture
    text         tokens of text
    pictures     drawn one after another
    loras        bytes of LoRAs that hang on the transformer
    """

    width: int
    height: int
    references: tuple[Size, ...] = ()
    encoded: tuple[Size, ...] = ()
    images: int = 0
    rows: int = 1
    evaluations: int
    text: int
    pictures: int = 1
    loras: int = 0

    @property
    def tokens(self) -> int:
        """Image tokens of a pass."""
        return sum(token_count(*size) for size in ((self.width, self.height), *self.references))

    @classmethod
    def typical(cls, spec: ModelSpec, **changed: Any) -> Work:
        """What a model is for, at its own settings, with one picture of each kind that its tasks take."""
        tasks = spec.tasks
        row = next(iter(tasks.values()))
        width, height = changed.get("width", row.size[0]), changed.get("height", row.size[1])
        rows = 2 if any(one.true_cfg != 1 for one in tasks.values()) else 1
        guess = cls(
            width=width,
            height=height,
            references=((width, height),) if "edit" in tasks else (),
            encoded=((width, height),) if {"fill", "control"} & set(tasks) else (),
            images=int("redux" in tasks),
            rows=rows,
            evaluations=evaluations(row.solver, row.steps),
            text=spec.text_length,
        )
        return replace(guess, **changed)

    @classmethod
    def of(cls, request: Resolved, spec: ModelSpec) -> Work:
        """Of a request that was checked. References count as large as the target, which they are about; LoRAs as their
        files are."""
        size = (request.width, request.height)
        others = sum(request.input(role) is not None for role in ("init", "control"))
        return cls(
            width=request.width,
            height=request.height,
            references=(size,) * len(request.all_of("context")),
            encoded=(size,) * others,
            images=len(request.all_of("image")),
            rows=1 if request.true_cfg == 1 else 2,
            evaluations=evaluations(request.solver, request.steps - request.first_step),
            text=request.text_length or spec.text_length,
            pictures=request.n,
            loras=sum((held(lora.path) or lora.path).stat().st_size for lora in request.loras),
        )


def evaluations(solver: str, steps: int) -> int:
    """Passes of a solver; of one that chooses its times, as if it took the steps that are named."""
    foresee = SOLVERS[solver].evaluations
    return steps if foresee is None else len(foresee([1 - i / steps for i in range(steps + 1)]))


@lru_cache(maxsize=64)
def step_flops(shape: TransformerSpec, work: Work) -> tuple[float, float]:
    """Floating point operations of a pass of the transformer: in matrix products, and in attention."""
    text, image = work.text + SEEN * work.images, work.tokens
    width, hidden = shape.hidden_size, shape.mlp_hidden
    double = 4 * width * width + 2 * width * hidden  # numbers of one stream
    single = 3 * width * width + width * hidden + (width + hidden) * width
    outer = shape.in_channels * image + shape.out_channels * image + shape.context_in_dim * text
    linears = 2 * ((image + text) * (shape.depth * double + shape.depth_single_blocks * single) + width * outer)
    attention = 4 * (image + text) ** 2 * width * (shape.depth + shape.depth_single_blocks)
    return float(work.rows * linears), float(work.rows * attention)
