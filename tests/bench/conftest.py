"""A member of toy size, and one step of it: every class is the real one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fluxloom.bench.subject import Step, random_runtime
from fluxloom.core.specs import MODELS, ClipSpec, ModelSpec, T5Spec, TextPair, TransformerSpec
from fluxloom.infer.runtime import Runtime

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def toy() -> ModelSpec:
    """Kontext at toy width."""
    row = MODELS["flux1-kontext-dev"]
    return replace(
        row,
        transformer=TransformerSpec(
            hidden_size=128, num_heads=2, axes_dim=(8, 28, 28), depth=2, depth_single_blocks=3,
            context_in_dim=32, vec_in_dim=64,
        ),
        autoencoder=replace(row.autoencoder, ch=32, num_res_blocks=1),
        pair=TextPair(
            clip=ClipSpec(width=64, layers=1, heads=1, mlp=64), t5=T5Spec(width=32, layers=1, heads=2, mlp=64)
        ),
        text_length=16,
        preferred_sizes=(),  # references are seen at the size to draw, not at a megapixel
    )  # fmt: skip


@pytest.fixture
def found(toy: ModelSpec) -> Runtime:
    return random_runtime(toy, CPU, torch.float32)


@pytest.fixture
def step(toy: ModelSpec) -> Step:
    """A picture of 4 x 6 tokens beside a reference of 2 x 2, two at a time."""
    return Step.of(toy, (96, 64), [(32, 32)], 2, CPU)
