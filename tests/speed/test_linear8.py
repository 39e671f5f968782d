"""Linear layers of 8 bits: how far off they are, what is rewritten, and what reaches them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxloom.core import shapes
from fluxloom.core.specs import MODELS
from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput, Failure
from fluxloom.speed import linear8, twins
from fluxloom.speed.linear8 import Linear8
from fluxloom.weights.lora import dense_weight

SPEC = replace(MODELS["nano"].transformer, hidden_size=64, num_heads=2, axes_dim=(4, 14, 14), depth=1)
SPEC = replace(SPEC, depth_single_blocks=2, guidance_embed=True)
FORMS = list(twins.FORMS)
# The relative error of products of Gaussian numbers. e4m3: uniform rounding to 4 bits is 2.65 % off on either side.
# int8: the step is a row's largest of 3072, about 3.6, over 127, and its rounding 1 / sqrt(12) of it: 0.8 % a side.
BOUNDS = {"fp8": (0.034, 0.041), "int8": (0.010, 0.014)}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def gaussian(width: int = 3072, out: int = 64, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    with torch.inference_mode(False):
        layer = nn.Linear(width, out, bias=bias)
        nn.init.normal_(layer.weight, std=0.02)
    return layer.to(dtype)


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("form", FORMS)
def test_gaussian_products_are_as_far_off_as_their_codes_say(form: str) -> None:
    layer, x = gaussian(bias=False), torch.randn(2, 32, 3072)
    low, high = BOUNDS[form]
    assert low < off(Linear8.of(layer, form)(x), layer(x)) < high


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_lost_but_by_rounding_to_codes(form: str) -> None:
    layer, x = gaussian(96, 40), torch.randn(2, 5, 96)
    (codes, scale), (rows, tokens) = twins.quantised(layer.weight, form), twins.quantised(x, form)
    wanted = F.linear(rows.double() * tokens.double(), codes.double() * scale.double(), layer.bias.double())
    assert off(Linear8.of(layer, form)(x), wanted) < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_as_input_are_the_tensor_as_input(form: str, dtype: torch.dtype) -> None:
    layer, x = Linear8.of(gaussian(96, 48, dtype), form), torch.randn(2, 5, 96).to(dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(twins.quantised(x, form)), layer(x))
    assert torch.equal(layer(x[1, 2]), layer(x)[1, 2])  # a token's scale is its own
    codes, scale = twins.quantised(x, form)
    assert torch.equal(layer((codes[:, 1:4], scale[:, 1:4])), layer(x)[:, 1:4])


@pytest.mark.parametrize("form", FORMS)
def test_codes_of_another_form_are_refused(form: str) -> None:
    other = next(name for name in FORMS if name != form)
    with pytest.raises(ValueError, match=f"try quantised\\(x, '{form}'\\)"):
        Linear8.of(gaussian(32, 16), form)(twins.quantised(torch.randn(1, 2, 32), other))


@pytest.mark.parametrize("bias", [True, False])
def test_a_part_is_some_of_the_outputs(bias: bool) -> None:
    layer, x = Linear8.of(gaussian(64, 48, bias=bias), "int8"), torch.randn(1, 3, 64)
    part = layer.part(16, 40)
    assert torch.equal(part(x), layer(x)[..., 16:40])
    assert part.codes.data_ptr() == layer.codes[16:].data_ptr()


@pytest.mark.parametrize("form", FORMS)
def test_moving_converts_the_outputs_and_no_codes(form: str) -> None:
    layer, x = Linear8.of(gaussian(64, 48), form), torch.randn(1, 3, 64)
    codes, scale, before = layer.codes.clone(), layer.scale.clone(), layer(x)
    half = layer.to(torch.bfloat16)
    assert half is layer
    assert half.codes.dtype == codes.dtype
    assert torch.equal(half.codes.float(), codes.float())
    assert torch.equal(half.scale, scale)
    assert half.bias is not None
    assert half.bias.dtype == half(x).dtype == torch.bfloat16
    assert off(half(x), before) < 2**-8
    assert Linear8.of(gaussian(64, 48), form).to("meta").codes.device.type == "meta"


# ------------------------------------------------------------------------------------------------------- whole models


def transformer() -> Transformer:
    torch.manual_seed(3)
    with torch.inference_mode(False):
        model = Transformer(SPEC)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def velocity(model: Transformer) -> Tensor:
    torch.manual_seed(5)
    img, txt = torch.randn(2, 12, SPEC.in_channels), torch.randn(2, 5, SPEC.context_in_dim)
    ids = [one[None].expand(2, -1, -1) for one in (shapes.image_ids(6, 8), shapes.text_ids(5))]
    pooled, t = torch.randn(2, SPEC.vec_in_dim), torch.tensor([0.5, 0.9])
    out: Tensor = model(img, ids[0], txt, ids[1], t, pooled, torch.tensor([3.5, 2.0]))
    return out


REWRITTEN = {
    *(
        f"double_blocks.0.{side}_{layer}"
        for side in ("img", "txt")
        for layer in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    ),
    *(f"single_blocks.{i}.linear{j}" for i in (0, 1) for j in (1, 2)),
}


@pytest.mark.parametrize("form", FORMS)
def test_exactly_the_products_of_the_blocks_are_rewritten(form: str) -> None:
    model, plain = transformer(), transformer()
    assert linear8.quantise(model, form) == len(REWRITTEN)
    assert {name for name, module in model.named_modules() if isinstance(module, Linear8)} == REWRITTEN
    rest = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert rest == {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)} - REWRITTEN
    kept, before = dict(model.named_parameters()), dict(plain.named_parameters())
    assert set(before) - set(kept) == {name for name in before if name.rpartition(".")[0] in REWRITTEN}
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    assert 1e-4 < off(velocity(model), velocity(plain)) < 0.1


def test_what_stays_can_be_chosen() -> None:
    model = transformer()
    assert linear8.quantise(model, "fp8", keep={*linear8.KEEP, "single_blocks"}) == 8
    assert not any(isinstance(module, Linear8) for module in model.single_blocks.modules())


def test_it_is_done_once_and_before_loras() -> None:
    model = transformer()
    with pytest.raises(BadInput, match="got form 'fp4'"):
        linear8.quantise(model, "fp4")
    handle = model.single_blocks[1].linear2.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    with pytest.raises(Failure, match=r"got single_blocks\.1\.linear2 with a LoRA on it"):
        linear8.quantise(model, "int8")
    assert not any(isinstance(module, Linear8) for module in model.modules())
    handle.remove()
    linear8.quantise(model, "int8")
    with pytest.raises(Failure, match="try loading it anew"):
        linear8.quantise(model, "int8")


def test_weights_that_are_not_finite_are_named() -> None:
    model = transformer()
    model.get_parameter("single_blocks.0.linear1.weight")[3, 4] = torch.nan
    with pytest.raises(Failure, match=r"single_blocks\.0\.linear1: got weights that are not finite"):
        linear8.quantise(model, "fp8")


@pytest.mark.parametrize("form", FORMS)
def test_a_hook_sees_the_tensor_and_its_change_counts(form: str) -> None:
    layer, x = Linear8.of(gaussian(64, 48), form), torch.randn(1, 3, 64)
    before, seen = layer(x), []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(args[0]) or out + 1)  # type: ignore[func-returns-value]
    assert torch.equal(layer(x), before + 1)
    assert seen[0] is x
    handle.remove()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("form", FORMS)
def test_loras_that_ask_for_the_weight_are_given_numbers(form: str) -> None:
    layer = gaussian(64, 48)
    dense = dense_weight(Linear8.of(layer, form), 64)
    codes, scale = twins.quantised(layer.weight, form)
    assert off(dense, codes.float() * scale) < 1e-6
    assert off(dense, layer.weight) < 0.04


def test_copies_and_states_keep_their_numbers() -> None:
    layer, x = Linear8.of(gaussian(64, 48), "fp8"), torch.randn(1, 3, 64)
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), layer(x))
    other = Linear8.of(gaussian(64, 48), "fp8")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("form", FORMS)
def test_a_processor_takes_every_form(form: str) -> None:
    assert linear8.supported(form, torch.device("cpu")) == (form, "")
    with pytest.raises(BadInput, match="got form 'nf4'"):
        linear8.supported("nf4", torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------------ on GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 512])
@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_gives_the_numbers_of_the_processor(form: str, tokens: int, bias: bool, dtype: torch.dtype) -> None:
    if not linear8.capable(form, torch.device("cuda")):
        pytest.skip(f"this GPU multiplies no {form}")
    layer, x = gaussian(3072, 768, dtype, bias), torch.randn(2, tokens, 3072).to(dtype)
    low = twins.quantised(x, form)
    wanted = Linear8.of(layer, form).float()(low)
    on_gpu = Linear8.of(layer.cuda(), form)
    got = on_gpu((low[0].cuda(), low[1].cuda()))
    assert got.dtype == dtype
    assert off(got.cpu(), wanted) < 5e-3  # rounding to bf16, and fast sums
    assert off(on_gpu(x.cuda()).cpu(), wanted) < 5e-3
    assert off(on_gpu.part(256, 512)(x.cuda()).cpu(), wanted[..., 256:512]) < 5e-3


@pytest.mark.gpu
def test_widths_of_no_whole_16_bytes_are_computed_from_codes() -> None:
    layer, x = gaussian(100, 20).cuda(), torch.randn(1, 3, 100).cuda()
    assert off(Linear8.of(layer, "int8")(x), layer(x)) < 0.02


@pytest.mark.gpu
def test_what_a_gpu_cannot_multiply_becomes_what_it_can() -> None:
    form, why = linear8.supported("fp8", torch.device("cuda"))
    assert (form, why == "") in {("fp8", True), ("int8", False)}
    assert linear8.capable(form, torch.device("cuda"))
