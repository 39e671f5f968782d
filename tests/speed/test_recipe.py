"""Words to executors, through the public door."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fluxloom.api import load
from fluxloom.errors import BadInput, Failure
from fluxloom.infer.plan import fit
from fluxloom.speed.linear8 import Linear8
from fluxloom.speed.recipe import Recipe, apply

QUICK = {"steps": 2, "width": 64, "height": 64, "seed": 1}


def picture(**more: str) -> tuple[np.ndarray, str]:
    result = load("nano", **more).generate("a red car", **QUICK)
    return np.asarray(result.image).astype(int), result.receipt.data["machine"]["executor"]


def test_the_same_picture_up_to_rounding() -> None:
    plain, name = picture()
    assert name == "plain"
    fused, name = picture(executor="fused", attention="math")
    assert name == "fused, math attention"
    assert np.abs(plain - fused).max() <= 2


@pytest.mark.parametrize(("form", "least", "most"), [("fp8", 0.2, 12), ("int8", 0.1, 8)])
def test_linears_of_8_bits_change_it_a_little(form: str, least: float, most: float) -> None:
    plain, _ = picture()
    low, name = picture(executor="fused", linears=form)
    assert name == f"fused, torch attention, {form} linears"
    assert least < np.sqrt(((plain - low) ** 2).mean()) < most


def test_what_is_rewritten_is_rewritten_once() -> None:
    loom = load("nano", linears="int8")
    runtime = loom.pipeline.runtime
    assert sum(isinstance(module, Linear8) for module in runtime.transformer.modules()) == 8 + 2 * 9
    with pytest.raises(Failure, match="try loading it anew"):
        apply(runtime, Recipe(linears="fp8"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"executor": "quick"}, "got executor 'quick', allowed auto, plain, fused, captured, try auto"),
        ({"linears": "fp4"}, "got linears 'fp4', allowed fp8, int8, try leaving it out"),
        ({"executor": "plain", "attention": "math"}, "got attention 'math' with executor 'plain'"),
        ({"executor": "captured"}, "got executor 'captured' on cpu, allowed on a GPU, try fused"),
        ({"attention": "flash"}, "got attention 'flash', which needs a GPU, try auto"),
    ],
)
def test_what_cannot_be(given: dict[str, str], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        load("nano", **given)


@pytest.mark.gpu
@pytest.mark.parametrize("linears", [None, "fp8", "int8"])
def test_on_a_gpu(linears: str | None) -> None:
    """Captured is the default there; two requests of one shape, and one of another: as near to the pictures of float32
    as the plain pass in bfloat16 is."""
    quick = load("nano", "cuda", linears=linears)
    assert quick.pipeline.runtime.executor.name.endswith("captured")
    looms = quick, load("nano", "cuda", executor="plain"), load("nano", "cuda", "float32", executor="plain")
    errors = []
    for words, side in (("a red car", 128), ("a cat in the snow", 128), ("an owl", 192)):
        one, rounded, exact = (
            np.asarray(loom.generate(words, seed=1, steps=4, width=side, height=128).image).astype(float)
            for loom in looms
        )
        errors.append([np.sqrt(((picture - exact) ** 2).mean()) for picture in (one, rounded)])
    found, noise = np.mean(errors, axis=0)
    assert found < (1.5 * noise + 0.5 if linears is None else 25), noise
    picture = quick.generate("a red car", seed=1, width=128, height=128)
    again = quick.generate("a red car", seed=1, width=128, height=128)
    assert torch.equal(*(torch.tensor(np.array(one.image)) for one in (picture, again)))
    edited = quick.edit(picture, "make it blue", seed=2)
    assert edited.image.size == (128, 128)


def test_a_plan_is_carried_out() -> None:
    wanted, _ = picture(executor="fused")
    loom = load("nano")
    runtime = loom.pipeline.runtime
    plan = replace(
        fit(runtime.spec, None, dtype="float32"),
        stays=frozenset({"towers"}),
        streamed=tuple(range(10)),
        modulation=True,
    )
    apply(runtime, Recipe("fused"), plan=plan, device=torch.device("cpu"))
    assert np.array_equal(np.asarray(loom.generate("a red car", **QUICK).image).astype(int), wanted)
    with pytest.raises(BadInput, match="got executor 'captured'"):
        apply(load("nano").pipeline.runtime, Recipe("captured"), plan=plan, device=torch.device("cpu"))


def test_memory_is_a_word_for_gpus() -> None:
    with pytest.raises(
        BadInput, match="got vram '12GB' for cpu, allowed for one GPU, try device='cuda', or without it"
    ):
        load("nano", vram="12GB")


@pytest.mark.gpu
def test_on_a_gpu_a_cap_is_kept_or_refused() -> None:
    with pytest.raises(BadInput, match=r"got 0\.5 GB of memory for nano"):
        load("nano", "cuda", vram="500MB")
    load("nano", "cuda", vram="4GB").generate("a red car", **QUICK)
