"""Counting and ceilings: against the published count, torch's own counter, and arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fluxloom.bench.floor import Ceilings, ceilings, count, floor_of, floors, layers_ms, products
from fluxloom.bench.subject import Step
from fluxloom.core.specs import MODELS, ModelSpec, TransformerSpec
from fluxloom.core.transformer import Transformer
from fluxloom.infer.executor import Plain

CPU = torch.device("cpu")
DEV = MODELS["flux1-dev"].transformer
# TFLOP of one step of dev at 1024 x 1024 and of Kontext with a reference of that size, with 512 text tokens.
PUBLISHED = {
    4096: {"double_image": 17.627, "double_text": 2.203, "single": 39.660, "attention": 14.872, "modulation": 0.0065,
           "ends": 0.016, "total": 74.385},
    8192: {"double_image": 35.253, "double_text": 2.203, "single": 74.913, "attention": 53.063, "modulation": 0.0065,
           "ends": 0.019, "total": 165.458},
}  # fmt: skip


@pytest.mark.parametrize("image", PUBLISHED)
def test_the_count_of_the_full_size_is_the_known_one(image: int) -> None:
    facts = count(DEV, 512, image).facts()
    for name, value in PUBLISHED[image].items():
        assert facts[name] == pytest.approx(value, abs=0.0006), name


@pytest.mark.parametrize("guidance", [True, False])
def test_the_count_is_what_torch_counts(toy: ModelSpec, guidance: bool) -> None:
    spec = replace(toy.transformer, guidance_embed=guidance)
    step = Step.of(replace(toy, transformer=spec), (96, 64), [(32, 32)], 3, CPU)
    plain_products = sdpa_kernel(SDPBackend.MATH)  # the others are not in the counter's books on a processor
    with torch.inference_mode(), plain_products, FlopCounterMode(display=False) as counter:
        Plain(Transformer(spec))(step.img, step.t, step.given)
    assert count(spec, *step.tokens, batch=3).total == counter.get_total_flops()


def test_the_floor_is_operations_over_rates() -> None:
    """The floors that follow from 782 and 1466 TFLOP/s of products and 636 of attention, seen on one H200."""
    seen = Ceilings({"bfloat16": 782.0, "fp8": 1466.0}, {"cudnn": 636.0, "flash": 325.0, "fa3-fp8": 918.0}, 4300.0)
    least = floors(count(DEV, 512, 4096), seen)
    assert least["bfloat16"] == pytest.approx(99.5, abs=0.1)
    assert least["fp8"] == pytest.approx(64.0, abs=0.1)
    assert least["fp8"] - least["fp8+fa3-fp8"] == pytest.approx(14872 / 636 - 14872 / 918, abs=0.01)
    assert floor_of(("captured",), least, "bfloat16") == least["bfloat16"]
    assert floor_of(("captured", "fp8"), least, "bfloat16") == least["fp8"]
    assert floor_of(("captured", "fp8", "fa3-fp8"), least, "bfloat16") == least["fp8+fa3-fp8"]
    assert floor_of(("plain", "float32"), least, "float32") is None


def test_ceilings_are_measured_at_the_shapes_of_the_model(toy: ModelSpec) -> None:
    spec: TransformerSpec = toy.transformer
    told: list[str] = []
    found = ceilings(spec, 16, 28, 2, CPU, told.append, repeats=2)
    assert set(found.products) == {"float32", "bfloat16"}
    assert "torch float32" in found.attention
    assert "needs a GPU" in found.missing["attention cudnn float32"]
    assert found.missing["fp8"] == "needs a GPU"
    assert [row["name"] for row in found.layers] == [one.name for one in products(spec, 16, 28, 2)]
    assert found.layers[-1]["shape"] == [2 * 44, 128 + 512, 128]
    assert len(told) == len(found.layers) + 1
    rates = [*found.products.values(), *found.attention.values(), found.copies]
    assert all(rate > 0 for rate in rates)
    assert layers_ms(found, "float32") == pytest.approx(sum(r["float32_ms"] * r["count"] for r in found.layers))
    least = floors(count(spec, 16, 28, 2), found)
    assert set(least) == {"float32", "bfloat16"}
    assert least["float32"] > 0
