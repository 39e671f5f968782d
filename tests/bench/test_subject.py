"""Random models of the real classes, their inputs, and the truth in float32."""

from __future__ import annotations

import pytest
import torch

from fluxloom.bench.subject import (
    Noise,
    Step,
    error,
    is_random,
    own_sizes,
    random_module,
    random_runtime,
    reshaped,
    sharing,
    wide,
)
from fluxloom.core.specs import MODELS, ModelSpec
from fluxloom.core.t5 import T5Encoder
from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput
from fluxloom.infer.executor import Plain
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.request import Request
from fluxloom.infer.runtime import Runtime

CPU = torch.device("cpu")


def test_random_weights_keep_states_of_their_size_and_hide_nothing(toy: ModelSpec, found: Runtime, step: Step) -> None:
    for name, weight in found.transformer.named_parameters():
        assert weight.abs().max() > 0, name
        assert name.endswith("scale") == bool(abs(weight.mean() - 1) < 0.2), name
    with torch.inference_mode():
        v = Plain(found.transformer)(step.img, step.t, step.given)
    assert 0.2 < v.std() < 5
    again = random_module(lambda: Transformer(toy.transformer), CPU, torch.float32)
    assert torch.equal(again.img_in.weight, found.transformer.img_in.weight)


def test_the_queries_of_t5_bring_their_scale(toy: ModelSpec) -> None:
    encoder = random_module(lambda: T5Encoder(toy.pair.t5), CPU, torch.float32)
    layer = encoder.get_submodule("encoder.block.0.layer.0.SelfAttention")
    assert layer.q.weight.std() / layer.k.weight.std() == pytest.approx(64**-0.5, rel=0.1)  # type: ignore[union-attr]


def test_a_random_model_draws(toy: ModelSpec) -> None:
    runtime = random_runtime(toy, CPU, torch.float32, words=True)
    (result,) = Pipeline(runtime).run(Request(prompt="a cat", width=256, height=256, steps=1, seed=1))
    assert result.image.size == (256, 256)


def test_copies_share_numbers_and_nothing_else(found: Runtime) -> None:
    one, other = found.transformer, sharing(found.transformer)
    assert one.img_in.weight.data_ptr() == other.img_in.weight.data_ptr()
    other.double_blocks[0].img_attn.qkv = torch.nn.Identity()
    low = reshaped(found, torch.bfloat16)
    assert low.transformer.img_in.weight.dtype is torch.bfloat16
    assert one.img_in.weight.dtype is torch.float32
    assert isinstance(one.double_blocks[0].img_attn.qkv, torch.nn.Linear)


def test_the_truth_is_the_plain_pass_in_float32(found: Runtime, step: Step) -> None:
    low = reshaped(found, torch.bfloat16).transformer
    exact = wide(low, step)
    inputs = step.to(torch.float32)
    with torch.inference_mode():
        whole = Plain(sharing(low).float())(inputs.img, inputs.t, inputs.given)
        plain = Plain(low)(*[getattr(step.to(torch.bfloat16), name) for name in ("img", "t", "given")])
    assert exact.shape == (2, 24, 64)  # the reference's tokens are not asked for
    assert torch.equal(exact, whole[:, :24])
    assert low.img_in.weight.dtype is torch.bfloat16  # as it was
    assert not any(p.is_meta for p in low.parameters())
    assert 1e-4 < error(plain, exact) < 5e-2
    assert error(exact, exact) == 0


def test_a_step_has_a_picture_and_its_references(toy: ModelSpec, step: Step) -> None:
    assert step.tokens == (16, 28)
    assert step.given.targets == 24
    assert step.given.img_ids[0, :, 0].tolist() == [0] * 24 + [1] * 4
    low = step.to(torch.bfloat16)
    assert torch.equal(low.img.float(), step.to(torch.float32).img)  # every dtype is given the same numbers
    states = Noise(toy, CPU, torch.float32).read("anything")
    assert torch.equal(states.tokens[0], step.given.txt[1])


def test_names_mean_random_weights_unless_they_come_with_the_package() -> None:
    assert is_random("flux1-dev")
    assert not is_random("nano")
    assert not is_random("./some/folder")


def test_sizes_are_the_models_own() -> None:
    assert own_sizes(MODELS["flux1-kontext-dev"], (512, 768), 2, None) == ((512, 768), [(1024, 1024)] * 2)
    assert own_sizes(MODELS["nano"], None, 1, None) == ((256, 256), [(256, 256)])
    with pytest.raises(BadInput, match="got a side of 100 px, allowed multiples of 16, try 1024"):
        own_sizes(MODELS["nano"], (100, 64), 0, None)
