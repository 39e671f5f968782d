"""LoRAs in another dialect are the same LoRAs; LoRAs extracted from two sets of weights turn one into the other."""

from __future__ import annotations

import pytest
import torch
from lora_makers import MAKERS, dora, others
from tiny import DEV, inputs, relative, transformer
from torch import Tensor

from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput, WeightsError
from fluxloom.weights.lora import Lora, Weighted, merge
from fluxloom.weights.lora_read import read_lora
from fluxloom.weights.lora_write import TARGETS, _low_rank, extract, write_lora

NAMES = [*MAKERS, *others(DEV)]


def lora_of(name: str) -> Lora:
    if name in MAKERS:
        made = MAKERS[name](DEV, 1)
        return read_lora(made.state, made.metadata, DEV)
    return read_lora(others(DEV)[name], {}, DEV)


def weights_with(model: Transformer, lora: Lora) -> dict[str, Tensor]:
    undo = merge(model, [Weighted(lora)])
    out = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    undo()
    return out


def same(got: dict[str, Tensor], want: dict[str, Tensor], limit: float = 1e-6) -> bool:
    return all(relative(got[name], want[name]) < limit for name in want)


# What has no form in a dialect, and why.
IMPOSSIBLE = {
    ("dora columns", "kohya"): "magnitudes for parts",
    ("dora columns", "official"): "magnitudes for parts",
    ("dora rows", "kohya"): "magnitudes for parts",  # of q and v: without those of k the layer has none of its own
    ("dora rows", "official"): "magnitudes for parts",
}


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_lora_in_another_dialect_is_the_same(name: str, to: str) -> None:
    lora, model = lora_of(name), transformer(DEV, 0)
    if (name, to) in IMPOSSIBLE:
        with pytest.raises(WeightsError, match=IMPOSSIBLE[name, to]):
            write_lora(lora, to)
        return
    state = write_lora(lora, to)
    back = read_lora(state, {}, DEV)
    want = weights_with(model, lora)
    assert same(weights_with(model, back), want)
    if name != "control":  # which changes a shape
        assert not same(want, dict(model.state_dict()))
    if name in MAKERS and name != "control":
        assert back.dialect == {"official": "official", "kohya": "kohya"}.get(to, "diffusers") or name == "lycoris"
    assert all(tensor.is_contiguous() for tensor in state.values())


def test_ranks_survive_taking_apart_what_was_put_together() -> None:
    """kohya joins the parts' factors into a block-diagonal B; diffusers gets each part's own factors back."""
    lora = lora_of("onetrainer")
    joint = read_lora(write_lora(lora, "kohya"), {}, DEV)
    assert joint.updates["single_blocks.0.linear1.weight"].parts[0].change.rank == 2 + 3 + 4 + 5
    apart = read_lora(write_lora(joint, "diffusers"), {}, DEV)
    assert [part.change.rank for part in apart.updates["single_blocks.0.linear1.weight"].parts] == [2, 3, 4, 5]


def test_scales_are_exact_in_half_precision() -> None:
    path = "transformer.transformer_blocks.0.attn.to_out.0"
    factors = {
        f"{path}.lora_A.weight": torch.randn(4, 64).bfloat16(),
        f"{path}.lora_B.weight": torch.randn(64, 4).bfloat16(),
    }
    for alpha, kept in ((2.0, torch.bfloat16), (3.0, torch.float32)):
        lora = read_lora({**factors, f"{path}.alpha": torch.tensor(alpha)}, {}, DEV)
        state = write_lora(lora, "diffusers")
        assert state[f"{path}.lora_B.weight"].dtype == kept
        back = read_lora(state, {}, DEV)
        zero = torch.zeros(64, 64)
        name = "double_blocks.0.img_attn.proj.weight"
        assert relative(back.updates[name].delta(zero), lora.updates[name].delta(zero)) < 1e-6


def test_magnitudes_of_all_rows_can_be_joined_and_of_columns_taken_apart_by_nobody() -> None:
    state = dora(DEV, "rows")
    d = DEV.hidden_size
    k = "transformer.transformer_blocks.0.attn.to_k"
    state |= {f"{k}.lora_A.weight": torch.randn(4, d), f"{k}.lora_B.weight": torch.randn(d, 4)}
    state[f"{k}.lora_magnitude_vector"] = 1 + torch.rand(d)
    single = "transformer.single_transformer_blocks.1.proj_mlp"
    lora = read_lora({key: tensor for key, tensor in state.items() if not key.startswith(single)}, {}, DEV)
    model = transformer(DEV, 0)
    back = read_lora(write_lora(lora, "kohya"), {}, DEV)
    assert same(weights_with(model, back), weights_with(model, lora))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    fused = {f"{name}.lora_down.weight": torch.randn(4, d), f"{name}.lora_up.weight": torch.randn(3 * d, 4)}
    with pytest.raises(WeightsError, match=r"cannot be taken apart.*--to official"):
        write_lora(read_lora({**fused, f"{name}.dora_scale": torch.ones(1, d)}, {}, DEV), "diffusers")


def test_an_unknown_dialect() -> None:
    with pytest.raises(BadInput, match="got dialect 'comfy' to write, allowed diffusers, kohya, official"):
        write_lora(lora_of("kohya"), "comfy")


# ------------------------------------------------------------------------------------------------ extraction


@pytest.mark.parametrize("name", ["kohya", "diff", "onetrainer"])
def test_what_was_merged_can_be_extracted(name: str) -> None:
    model, lora = transformer(DEV, 0), lora_of(name)
    base, tuned = dict(model.state_dict()), weights_with(model, lora)
    rank = DEV.hidden_size if name == "diff" else 14
    found = extract(base, tuned, DEV, rank)
    assert found.updates.keys() == lora.updates.keys()
    back = read_lora(write_lora(found, "official"), {}, DEV)
    assert same(weights_with(model, back), tuned, 1e-5)
    arguments = inputs(DEV, 0)
    small = extract(base, tuned, DEV, 1)
    velocities = []
    for one in (found, small):
        undo = merge(model, [Weighted(one)])
        velocities.append(model(**arguments))
        undo()
    merge(model, [Weighted(lora)])
    want = model(**arguments)
    assert relative(velocities[0], want) < 1e-4
    assert relative(velocities[1], want) > 1e-2


def test_nothing_to_extract() -> None:
    state = dict(transformer(DEV, 0).state_dict())
    with pytest.raises(WeightsError, match="two sets of weights that are equal"):
        extract(state, state, DEV, 4)
    with pytest.raises(BadInput, match="got rank 0"):
        extract(state, state, DEV, 0)


# ------------------------------------------------------------------------------------------------ fused layers

QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
FUSED = {
    "loha": {"hada_w1_a": (192, 2), "hada_w1_b": (2, 64), "hada_w2_a": (192, 2), "hada_w2_b": (2, 64)},
    "lokr that ends with its parts": {"lokr_w1": (12, 8), "lokr_w2": (16, 8)},
    "lokr that does not": {"lokr_w1": (2, 8), "lokr_w2": (96, 8)},
    "difference": {"diff": (192, 64)},
    "lora": {"lora_A.weight": (4, 64), "lora_B.weight": (192, 4)},
    "dora": {"lora_A.weight": (4, 64), "lora_B.weight": (192, 4), "dora_scale": (192, 1)},
}


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_are_taken_apart_exactly(name: str, to: str) -> None:
    state = {f"{QKV}.{suffix}": 0.2 * torch.randn(shape) for suffix, shape in FUSED[name].items()}
    lora, model = read_lora(state, {}, DEV), transformer(DEV, 0)
    written = write_lora(lora, to)
    assert any("attn.to_q" in key for key in written) == (to == "diffusers")
    assert same(weights_with(model, read_lora(written, {}, DEV)), weights_with(model, lora))


def test_parts_of_other_kinds_are_joined_in_full() -> None:
    path = "transformer.transformer_blocks.0.attn.to_k"
    state = {f"{path}.lokr_w1": torch.randn(8, 8), f"{path}.lokr_w2": torch.randn(8, 8)}
    lora, model = read_lora(state, {}, DEV), transformer(DEV, 0)
    written = write_lora(lora, "kohya")
    assert list(written) == ["lora_unet_double_blocks_0_img_attn_qkv.diff"]
    assert same(weights_with(model, read_lora(written, {}, DEV)), weights_with(model, lora))


def test_large_matrices_are_approximated_almost_as_well() -> None:
    """A spectrum that falls slowly, the hard case: the rest is at most 0.1 % larger than it must be."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(1_500, 1_100, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(1_100, 1_100, generator=generator))
    values = 1 / torch.arange(1, 1_101).sqrt()
    difference = (u * values) @ v.T
    found = _low_rank(difference, 16)
    assert found.rank == 16
    rest = float((difference - found.dense()).norm())
    assert rest < 1.001 * float(values[16:].norm())
    assert rest < 0.9999 * float(values[15:].norm())  # one rank less would show
