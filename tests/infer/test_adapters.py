"""LoRAs beside the weights give the same velocity as LoRAs merged into them, and leave no trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_makers import MAKERS, others
from tiny import DEV, inputs, relative, transformer
from torch import Tensor, nn

from fluxloom.api import load
from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput, WeightsError
from fluxloom.infer.adapters import attach
from fluxloom.infer.request import Request
from fluxloom.weights.lora import Blocks, Lora, Weighted, block_number, merge
from fluxloom.weights.lora_read import read_lora

LIMIT = 1e-5
D = DEV.hidden_size


LORAS = [*MAKERS, *others(DEV)]


def lora_of(name: str) -> Lora:
    if name in MAKERS:
        made = MAKERS[name](DEV, 1)
        return read_lora(made.state, made.metadata, DEV)
    return read_lora(others(DEV)[name], {}, DEV)


def velocity(model: Transformer, seed: int = 0) -> Tensor:
    """On inputs of as many channels as the transformer takes now."""
    out: Tensor = model(**inputs(model.spec, seed))
    return out


@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("weight", [1.0, 0.6, -0.4])
def test_beside_and_merged_agree(name: str, weight: float) -> None:
    model, lora = transformer(DEV, 0), lora_of(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = velocity(model)
    with attach(model, [Weighted(lora, weight)]):
        beside = velocity(model)
    assert torch.equal(velocity(model), plain)
    undo = merge(model, [Weighted(lora, weight)])
    together = velocity(model)
    assert relative(beside, together) < LIMIT
    assert relative(velocity(model), plain) > 1e-3  # it did something
    undo()
    assert torch.equal(velocity(model), plain)
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert model.spec == DEV
    assert model.img_in.in_features == DEV.in_channels


def test_several_at_once_add_up_in_any_order() -> None:
    model = transformer(DEV, 0)
    names = ["kohya", "lycoris", "dora rows", "dora columns", "loha", "diff", "control"]
    loras = [Weighted(lora_of(name), 0.1 * (i + 1)) for i, name in enumerate(names)]
    velocities = []
    for order in (loras, loras[::-1]):
        with attach(model, order):
            velocities.append(velocity(model))
    undo = merge(model, loras)
    velocities.append(velocity(model))
    undo()
    assert relative(velocities[0], velocities[2]) < LIMIT
    assert relative(velocities[1], velocities[2]) < LIMIT


def test_swapping_is_detaching_and_attaching() -> None:
    model = transformer(DEV, 0)
    first, second = Weighted(lora_of("kohya")), Weighted(lora_of("xlabs"))
    with attach(model, [second]):
        want = velocity(model)
    attached = attach(model, [first])
    attached.detach()
    attached.detach()  # no mistake
    with attach(model, [second]):
        assert torch.equal(velocity(model), want)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------- the control LoRA


def test_a_control_lora_widens_the_first_layer() -> None:
    model, lora = transformer(DEV, 0), lora_of("control")
    wide = transformer(replace(DEV, in_channels=128), 0)  # the same weights behind a zero-expanded first layer
    state = model.state_dict()
    wide.load_state_dict({**state, "img_in.weight": torch.cat((state["img_in.weight"], torch.zeros(D, 64)), 1)})
    arguments = inputs(wide.spec, 0)
    with attach(wide, [Weighted(lora, 0.85)]):
        want = wide(**arguments)
    with attach(model, [Weighted(lora, 0.85)]):
        assert model.spec.in_channels == 128
        assert relative(model(**arguments), want) < LIMIT
        other = arguments["img"].clone()
        other[..., 64:] += 1
        assert relative(model(**{**arguments, "img": other}), want) > 1e-3  # the control picture counts
    assert model.spec.in_channels == 64


def test_norm_scales_are_replaced_whatever_the_strength() -> None:
    model, lora = transformer(DEV, 0), lora_of("control")
    name = "double_blocks.0.img_attn.norm.query_norm"
    want = MAKERS["control"](DEV, 1).state[f"{name}.scale"]
    for weight in (0.85, 0.1):
        with attach(model, [Weighted(lora, weight)]):
            assert torch.allclose(model.get_submodule(name).scale, want)
    plain = velocity(model)
    with attach(model, [Weighted(lora, 0.0)]):
        assert torch.equal(velocity(model), plain)


def test_a_dev_lora_on_a_wider_base_acts_on_the_channels_it_knows() -> None:
    fill = replace(DEV, in_channels=384)
    made = MAKERS["kohya"](DEV, 1)
    lora = read_lora(made.state, {}, fill)
    assert lora.notes == ("made for 64 input channels, where this transformer has 384",)
    model = transformer(fill, 0)
    with attach(model, [Weighted(lora)]):
        beside = velocity(model)
    before = model.img_in.weight.clone()
    merge(model, [Weighted(lora)])
    assert relative(beside, velocity(model)) < LIMIT
    change = model.img_in.weight - before
    assert float(change[:, :64].abs().max()) > 0
    assert float(change[:, 64:].abs().max()) == 0


# ---------------------------------------------------------------------------------------- weights by block


@pytest.mark.parametrize(
    ("blocks", "touched"),
    [
        ({"": 0, "double_blocks": 1}, {0, 1}),
        ({"": 0, 1: 1, 2: 1}, {1, 2}),
        ({r"single_blocks\.[0]\.": 0, "double": 0}, {3, None}),
        ({"double": 0, "single": 0}, {None}),
    ],
)
def test_weights_by_block(blocks: Blocks, touched: set[int | None]) -> None:
    model = transformer(DEV, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge(model, [Weighted(lora_of("kohya"), 1.0, blocks)])
    after = model.state_dict()
    changed = {block_number(name, DEV) for name in before if not torch.equal(before[name], after[name])}
    assert changed == touched


def test_a_factor_scales_the_weight() -> None:
    one = Weighted(lora_of("kohya"), 0.5, {"double": 0.5, 1: 3.0})
    assert one.strength("double_blocks.0.img_attn.qkv.weight") == 0.25
    assert one.strength("double_blocks.1.img_attn.qkv.weight") == 1.5
    assert one.strength("single_blocks.0.linear1.weight") == 0.5
    assert one.strength("img_in.weight") == 0.5


# ---------------------------------------------------------------------------------------- other forms of weights


class Stored(nn.Module):
    """A linear layer whose weight is not there to be read, as in a quantised base."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("codes", linear.weight.detach().view(torch.int32))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.view(torch.float32), self.bias)


@pytest.mark.parametrize("name", LORAS)
def test_a_base_whose_weights_cannot_be_read(name: str) -> None:
    plain, hidden = transformer(DEV, 0), transformer(DEV, 0)
    for path, module in list(hidden.named_modules()):
        if isinstance(module, nn.Linear) and path != "img_in":
            parent, _, last = path.rpartition(".")
            setattr(hidden.get_submodule(parent), last, Stored(module))
    lora = Weighted(lora_of(name), 0.7)
    with attach(plain, [lora]), attach(hidden, [lora]):
        assert relative(velocity(hidden), velocity(plain)) < LIMIT
    with pytest.raises(WeightsError, match="not plain floating-point weights"):
        merge(hidden, [lora])


def test_half_precision_stays_half_precision() -> None:
    model = transformer(DEV, 0).bfloat16()
    arguments = {k: v.bfloat16() if k in ("img", "txt", "pooled") else v for k, v in inputs(DEV, 0).items()}
    for name in ("kohya", "dora rows", "dora columns", "lycoris"):
        with attach(model, [Weighted(lora_of(name))]):
            beside = model(**arguments)
        undo = merge(model, [Weighted(lora_of(name))])
        together = model(**arguments)
        undo()
        assert beside.dtype == torch.bfloat16
        assert relative(beside.float(), together.float()) < 0.1


# ---------------------------------------------------------------------------------------- a batch with different LoRAs


def test_members_of_a_batch_with_loras_of_their_own() -> None:
    model = transformer(DEV, 0)
    names = ["kohya", "dora columns", "loha", "onetrainer", "lycoris"]
    loras = [Weighted(lora_of(name), 0.3) for name in names]
    arguments = {
        key: tensor[:1].repeat(len(names) + 1, *[1] * (tensor.ndim - 1)) for key, tensor in inputs(DEV, 0).items()
    }
    single = {key: tensor[:1] for key, tensor in arguments.items()}
    want = [model(**single)]
    for lora in loras:
        with attach(model, [lora]):
            want.append(model(**single))
    with attach(model, loras) as attached:
        attached.share(torch.cat((torch.zeros(1, len(loras)), torch.eye(len(loras)))))
        together = model(**arguments)
        attached.share(None)
        everything = model(**single)
    for got, alone in zip(together.split(1), want, strict=True):
        assert relative(got, alone) < LIMIT
    assert min(relative(everything, alone) for alone in want) > 1e-3


def test_what_a_batch_cannot_have_apart() -> None:
    model = transformer(DEV, 0)
    with (
        attach(model, [Weighted(lora_of("kohya"))]) as attached,
        pytest.raises(BadInput, match=r"allowed \[batch, 1\]"),
    ):
        attached.share(torch.ones(2, 2))
    with attach(model, [Weighted(lora_of("control"))]) as attached, pytest.raises(BadInput, match="exchanges norms"):
        attached.share(torch.ones(2, 1))


# ---------------------------------------------------------------------------------------- nano, end to end


def test_a_lora_on_nano_from_request_to_picture() -> None:
    pipeline = load("nano").pipeline
    model = pipeline.runtime.transformer
    made = MAKERS["kohya"](model.spec, 1)
    lora = read_lora(made.state, made.metadata, model.spec)
    request = Request(prompt="a red bicycle", seed=3, steps=2, width=64, height=64, true_cfg=1.0)

    def draw() -> bytes:
        return pipeline.run(request)[0].image.tobytes()

    plain = draw()
    with attach(model, [Weighted(lora, 0.05)]):
        tuned = draw()
    assert tuned != plain
    assert draw() == plain  # bit for bit: it left no trace
    undo = merge(model, [Weighted(lora, 0.05)])
    merged = draw()
    undo()
    assert draw() == plain
    difference = [abs(a - b) for a, b in zip(merged, tuned, strict=True)]
    assert max(difference) <= 1  # of 255: the same numbers, added in another order
