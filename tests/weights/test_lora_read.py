"""Every dialect of LoRA files becomes the same canonical updates; every key is used or named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_makers import MAKERS, Made, kohya, layers, norms, others
from tiny import DEV, relative
from torch import Tensor

from fluxloom.core.specs import MODELS, TransformerSpec
from fluxloom.errors import WeightsError
from fluxloom.weights.lora import Replacement, tensor_shapes
from fluxloom.weights.lora_dialects import take_apart
from fluxloom.weights.lora_read import examine, read_lora

BASE = MODELS["flux1-dev"].transformer
SPECS = {
    "dev": DEV,
    "schnell": replace(DEV, guidance_embed=False),
    "another": replace(DEV, hidden_size=48, axes_dim=(4, 8, 12), depth=1, depth_single_blocks=3, mlp_ratio=3.0),
}


def deltas(made: Made, spec: TransformerSpec = DEV) -> dict[str, Tensor]:
    """What a file adds to weights of zero (norms aside, which it replaces)."""
    lora = read_lora(made.state, made.metadata, spec)
    return {
        name: update.delta(torch.zeros(update.shape))
        for name, update in lora.updates.items()
        if not isinstance(update.parts[0].change, Replacement)
    }


def wrong(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    assert got.keys() == want.keys()
    limit = 1e-6
    return [name for name in want if relative(got[name], want[name]) > limit]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("which", SPECS)
def test_a_dialect_means_what_its_definition_says(name: str, which: str) -> None:
    spec = SPECS[which]
    made = MAKERS[name](spec, 1)
    if name == "ai-toolkit":  # stored in float16: the definition is of the rounded factors
        state = {key: tensor.float() for key, tensor in made.state.items()}
        assert wrong(deltas(made, spec), deltas(Made(state, {}, made.metadata), spec)) == []
        return
    assert wrong(deltas(made, spec), made.deltas) == []


@pytest.mark.parametrize("name", MAKERS)
def test_tables_of_real_files(name: str) -> None:
    """Names and shapes at the size of the 12 B members: all of them are known, and the dialect is told."""
    made = MAKERS[name](BASE, None)
    lora = read_lora(made.state, made.metadata, BASE)
    assert lora.dialect == name
    assert (lora.unmatched, lora.misshapen, lora.text) == ((), (), ())
    assert lora.keys == len(made.state)
    linear = {layer.official for layer in layers(BASE)}
    assert {update.module for update in lora.updates.values()} <= linear | {n.rpartition(".")[0] for n in norms(BASE)}


def test_the_control_lora_has_as_many_tensors_as_the_published_one() -> None:
    made = MAKERS["control"](BASE, None)
    assert len(made.state) == 1094
    lora = read_lora(made.state, {}, BASE)
    assert lora.in_channels == 128
    assert lora.updates["img_in.weight"].shape == (3072, 128)
    assert sum(isinstance(part.change, Replacement) for _, part in lora.parts()) == 152
    assert min(lora.ranks) == 64  # of the last layer, which has no more rows
    assert lora.notes == ("made for 128 input channels, where this transformer has 64",)


def test_block_numbers_with_two_digits_are_not_taken_for_others() -> None:
    made = MAKERS["onetrainer"](BASE, None)
    lora = read_lora(made.state, {}, BASE)
    assert len(lora.updates) == 314
    part = lora.updates["single_blocks.12.linear1.weight"].parts
    assert [(p.start, p.stop) for p in part] == [(0, 3072), (3072, 6144), (6144, 9216), (9216, 21504)]


# Keys as they stand in published files, and what they change by the formats' tables: (official layer, rows).
D = 3072
PUBLISHED = {
    "transformer.transformer_blocks.18.attn.add_k_proj.lora_A.weight": ("double_blocks.18.txt_attn.qkv", (D, 2 * D)),
    "transformer.single_transformer_blocks.37.proj_mlp.lora_B.weight": ("single_blocks.37.linear1", (3 * D, 7 * D)),
    "transformer.single_transformer_blocks.0.proj_out.lora.down.weight": ("single_blocks.0.linear2", None),
    "transformer.proj_out.lora_A.weight": ("final_layer.linear", None),
    "transformer.norm_out.linear.lora_B.weight": ("final_layer.adaLN_modulation.1", None),
    "base_model.model.transformer_blocks.3.ff_context.net.0.proj.lora_A.default.weight": (
        "double_blocks.3.txt_mlp.0",
        None,
    ),
    "lora_unet_double_blocks_18_txt_attn_qkv.lora_up.weight": ("double_blocks.18.txt_attn.qkv", None),
    "lora_unet_double_blocks_10_img_mod_lin.alpha": ("double_blocks.10.img_mod.lin", None),
    "lora_unet_single_blocks_37_modulation_lin.lora_down.weight": ("single_blocks.37.modulation.lin", None),
    "lora_unet_final_layer_adaLN_modulation_1.lora_down.weight": ("final_layer.adaLN_modulation.1", None),
    "lora_unet_time_in_in_layer.dora_scale": ("time_in.in_layer", None),
    "transformer.transformer_blocks.0.attn.to_out.0.lokr_w2_a": ("double_blocks.0.img_attn.proj", None),
    "diffusion_model.double_blocks.7.img_attn.qkv.lokr_w1": ("double_blocks.7.img_attn.qkv", None),
    "diffusion_model.double_blocks.7.img_mlp.2.diff_b": ("double_blocks.7.img_mlp.2", None),
    "lora_transformer_single_transformer_blocks_21_attn_to_v.lora_down.weight": (
        "single_blocks.21.linear1",
        (2 * D, 3 * D),
    ),
    "lora_transformer_transformer_blocks_2_norm1_context_linear.dora_scale": ("double_blocks.2.txt_mod.lin", None),
    "transformer.double_blocks.0.img_attn.qkv.1.lora_up.weight": ("double_blocks.0.img_attn.qkv", (D, 2 * D)),
    "transformer.single_blocks.5.linear1.3.alpha": ("single_blocks.5.linear1", (3 * D, 7 * D)),
    "double_blocks.4.processor.proj_lora2.up.weight": ("double_blocks.4.txt_attn.proj", None),
    "single_blocks.11.processor.qkv_lora.down.weight": ("single_blocks.11.linear1", (0, 3 * D)),
    "diffusion_model.single_blocks.11.processor.proj_lora.up.weight": ("single_blocks.11.linear2", None),
    "img_in.lora_A.weight": ("img_in", None),
    "guidance_in.out_layer.lora_B.bias": ("guidance_in.out_layer", None),
    "single_blocks.0.norm.key_norm.scale": ("single_blocks.0.norm.key_norm", None),
    "double_blocks.0.txt_attn.norm.query_norm.scale": ("double_blocks.0.txt_attn.norm.query_norm", None),
    "base_model.model.double_blocks.9.img_mod.lin.lora_A.weight": ("double_blocks.9.img_mod.lin", None),
    "lycoris_single_transformer_blocks_3_norm_linear.lokr_w1": ("single_blocks.3.modulation.lin", None),
    "lycoris_transformer_blocks_3_attn_to_add_out.hada_w2_b": ("double_blocks.3.txt_attn.proj", None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys(name: str) -> None:
    module, rows = PUBLISHED[name]
    key = take_apart(name, BASE)
    assert key is not None
    assert (key.place.module, key.place.rows) == (module, rows)
    assert key.place.swapped == (module == "final_layer.adaLN_modulation.1" and "norm_out" in name)


# -------------------------------------------------------------------------------------- what must be caught


def spoil(made: Made, change: str) -> Made:
    state = dict(made.state)
    if change == "alpha":
        state = {k: v * 2 if k.endswith("alpha") else v for k, v in state.items()}
    if change == "transposed":
        up, down = (
            "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight",
            "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
        )
        state[up], state[down] = state[down].T, state[up].T
    if change == "no halves swapped":
        key = "lora_transformer_norm_out_linear.lora_up.weight"
        state[key] = torch.cat(state[key].chunk(2)[::-1])
    if change == "rows of A swapped":
        key = "lora_transformer_norm_out_linear.lora_down.weight"
        state[key] = torch.cat(state[key].chunk(2)[::-1])
    if change == "q and k exchanged":
        q, k = (f"lora_transformer_transformer_blocks_0_attn_to_{x}.lora_up.weight" for x in "qk")
        state[q] = state[q][:, :2]
        state[k] = state[k][:, :2]
        a, b = (key.replace("up", "down") for key in (q, k))
        state[a], state[b], state[q], state[k] = state[b][:2], state[a][:2], state[k], state[q]
    return Made(state, made.deltas, made.metadata)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("kohya", "alpha"),
        ("onetrainer", "alpha"),
        ("lycoris", "alpha"),
        ("kohya", "transposed"),
        ("onetrainer", "no halves swapped"),
        ("onetrainer", "rows of A swapped"),
        ("onetrainer", "q and k exchanged"),
    ],
)
def test_a_mistake_shows(name: str, change: str) -> None:
    made = MAKERS[name](DEV, 1)
    assert wrong(deltas(made), made.deltas) == []
    assert wrong(deltas(spoil(made, change)), made.deltas) != []


# -------------------------------------------------------------------------------------- scales


Q = "transformer.transformer_blocks.0.attn.to_q"
QKV = "double_blocks.0.img_attn.qkv.weight"


def peft(rank: int = 4) -> dict[str, Tensor]:
    d = DEV.hidden_size
    return {f"{Q}.lora_A.weight": torch.ones(rank, d), f"{Q}.lora_B.weight": torch.ones(d, rank)}


def scale_of(state: dict[str, Tensor], metadata: dict[str, str]) -> float:
    lora = read_lora(state, metadata, DEV)
    return float(lora.updates[QKV].delta(torch.zeros(3 * DEV.hidden_size, DEV.hidden_size))[0, 0]) / 4


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({}, 1.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 2}, 0.5),
        ({"r": 4, "lora_alpha": 2}, 0.5),
        ({"transformer.lora_alpha": 2, "transformer.use_rslora": True}, 1.0),
        ({"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"attn.to_q": 12}}, 3.0),
        ({"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"attn.to_k": 12}}, 0.5),
        ({"text_encoder.lora_alpha": 12}, 1.0),
    ],
)
def test_alpha_in_metadata(config: dict[str, object], want: float) -> None:
    assert scale_of(peft(), {"lora_adapter_metadata": json.dumps(config)}) == pytest.approx(want)


@pytest.mark.parametrize(("alpha", "want"), [(8.0, 2.0), (0.0, 1.0), (1.0, 0.25)])
def test_alpha_of_its_own(alpha: float, want: float) -> None:
    state = {**peft(), f"{Q}.alpha": torch.tensor(alpha)}
    assert scale_of(state, {"lora_adapter_metadata": json.dumps({"lora_alpha": 99})}) == pytest.approx(want)


def test_joint_factors_of_split_qkv_are_read_by_their_joint_rank() -> None:
    """kohya's split_qkv files: A holds the parts' factors, B is block-diagonal, and alpha counts for all rows of A."""
    d, generator = DEV.hidden_size, torch.Generator().manual_seed(0)
    ups = [torch.randn(d, 2, generator=generator) for _ in range(3)]
    a = torch.randn(6, d, generator=generator)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {
        f"{name}.lora_down.weight": a,
        f"{name}.lora_up.weight": torch.block_diag(*ups),
        f"{name}.alpha": torch.tensor(6.0),
    }
    lora = read_lora(state, {"ss_network_args": '{"split_qkv": "True"}'}, DEV)
    want = torch.cat([up @ rows for up, rows in zip(ups, a.chunk(3), strict=True)])
    assert relative(lora.updates[QKV].delta(torch.zeros_like(want)), want) < 1e-6
    assert "split_qkv" in lora.notes[0]


# -------------------------------------------------------------------------------------- every key, or its name


def test_text_encoders_are_recognised() -> None:
    text = (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
    )
    made = kohya(DEV, 1)
    lora = read_lora({**made.state, **{name: torch.ones(1) for name in text}}, {}, DEV)
    assert lora.text == text
    assert wrong(deltas(made), made.deltas) == []
    with pytest.raises(WeightsError, match="text encoders alone"):
        read_lora({text[0]: torch.ones(1)}, {}, DEV)


UNKNOWN = {
    "no such layer": {"lora_unet_double_blocks_0_img_attn_qqv.lora_down.weight": (4, 64)},
    "only 2 such blocks": {"lora_unet_double_blocks_7_img_attn_proj.lora_down.weight": (4, 64)},
    "OFT": {"lora_unet_double_blocks_1_img_attn_proj.oft_blocks": (4, 64)},
    "no counterpart": {"transformer.double_blocks.1.img_attn.proj.lora_A.weight": (4, 64)},
    "there is another of the same meaning": {
        "diffusion_model.double_blocks.1.img_mlp.0.diff": (256, 64),
        "diffusion_model.double_blocks.1.img_mlp.0.w_norm": (256, 64),
    },
    "this transformer has no double_blocks.1.img_attn.norm.query_norm.bias": {
        "diffusion_model.double_blocks.1.img_attn.norm.query_norm.b_norm": (32,),
    },
    "another key changes the same rows": {
        "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": (4, 64),
        "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight": (64, 4),
    },
}


@pytest.mark.parametrize("reason", UNKNOWN)
def test_unknown_keys_are_named_with_the_reason(reason: str) -> None:
    made = kohya(DEV, 1)
    extra = {name: torch.ones(shape) for name, shape in UNKNOWN[reason].items()}
    found = examine({**made.state, **extra}, {}, DEV)
    assert [line.partition(":")[0] for line in found.unmatched] == list(extra)
    assert reason in found.unmatched[0]
    with pytest.raises(WeightsError, match="unknown tensors in a LoRA"):
        read_lora({**made.state, **extra}, {}, DEV)


def test_parts_and_the_whole_of_a_layer_exclude_each_other() -> None:
    factors = {"lora_A.weight": torch.randn(4, 64), "lora_B.weight": torch.randn(64, 4)}
    parts = {f"transformer.double_blocks.0.img_attn.qkv.{i}.{k}": t for i in range(3) for k, t in factors.items()}
    whole = {"transformer.double_blocks.0.img_attn.qkv.diff": torch.randn(192, 64)}
    found = examine({**parts, **whole}, {}, DEV)
    assert found.unmatched == (f"{next(iter(whole))}: another key changes the same rows",)


def test_a_whole_checkpoint_is_no_lora() -> None:
    state = {name: torch.ones(()).expand(shape) for name, shape in tensor_shapes(DEV).items()}
    with pytest.raises(WeightsError, match="unknown tensors"):
        read_lora(state, {}, DEV)


def test_misshapen_tensors_are_named_with_both_shapes() -> None:
    made = MAKERS["official"](replace(DEV, hidden_size=32, num_heads=1), 1)
    with pytest.raises(
        WeightsError, match=r"misshapen.*lora_A\.weight \[192, 32\] for .*img_mod\.lin\.weight \[384, 64\]"
    ):
        read_lora(made.state, {}, DEV)
    odd = {f"{Q}.lora_A.weight": torch.ones(4, 64), f"{Q}.lora_B.weight": torch.ones(64, 3)}
    with pytest.raises(WeightsError, match="ranks 4 and 3 differ"):
        read_lora(odd, {}, DEV)


def test_numbers_that_are_not_finite() -> None:
    state = peft()
    state[f"{Q}.lora_A.weight"][0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"not real and finite in transformer.*to_q\.lora_A"):
        read_lora(state, {}, DEV)


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight", "Stable Diffusion 1, 2 or XL"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", "Stable Diffusion 3"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "Wan"),
        ("transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight", "Qwen-Image"),
        ("model.layers.0.attn.weight", "no tensor of a LoRA for FLUX.1"),
    ],
)
def test_other_families_are_told(key: str, family: str) -> None:
    with pytest.raises(WeightsError, match=family):
        read_lora({key: torch.ones(2, 2)}, {}, DEV)


def test_an_empty_file() -> None:
    with pytest.raises(WeightsError, match="the file is empty"):
        read_lora({}, {}, DEV)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"alpha_pattern": {"(": 1}}', '{"alpha_pattern": {"a": "b"}}', '{"alpha_pattern": [1]}']
)
def test_metadata_that_cannot_be_read(text: str) -> None:
    with pytest.raises(WeightsError, match="metadata lora_adapter_metadata that cannot be read"):
        read_lora(peft(), {"lora_adapter_metadata": text}, DEV)


def test_a_lora_that_is_in_its_file_twice_counts_once() -> None:
    made, twin = MAKERS["kohya"](DEV, 1), MAKERS["kohya"](DEV, 1)
    again = {k.replace("lora_unet_", "lycoris_"): t.half() for k, t in twin.state.items() if "alpha" not in k}
    again |= {k.replace("lora_unet_", "lycoris_"): t for k, t in twin.state.items() if "alpha" in k}
    del again["lycoris_img_in.alpha"], again["lycoris_img_in.lora_down.weight"], again["lycoris_img_in.lora_up.weight"]
    both = Made({**again, **made.state}, made.deltas, {})
    lora = read_lora(both.state, {}, DEV)
    assert wrong(deltas(both), made.deltas) == []
    assert lora.notes == (f"{len(again)} tensors say once more, in another dialect, what others say: left out",)
    again["lycoris_txt_in.alpha"] = torch.tensor(3.0)
    found = examine({**again, **made.state}, {}, DEV)
    assert sorted(line.partition(":")[0] for line in found.unmatched) == sorted(k for k in again if "txt_in" in k)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "lora_unet_", "lycoris_", "base_model.model."])
@pytest.mark.parametrize("official", [True, False])
def test_any_prefix_goes_with_any_path(prefix: str, official: bool) -> None:
    """LoKr of ai-toolkit and of ComfyUI, LoHa of kohya's lycoris module: the algorithm does not depend on the name."""
    path = "double_blocks.1.img_mlp.0" if official else "transformer_blocks.1.ff.net.0.proj"
    name = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
    w1, w2 = torch.randn(8, 4), torch.randn(32, 16)
    state = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": torch.tensor(7, dtype=torch.int64)}
    update = read_lora(state, {}, DEV).updates["double_blocks.1.img_mlp.0.weight"]
    assert relative(update.delta(torch.zeros(256, 64)), torch.kron(w1, w2)) < 1e-6  # whole factors are not scaled


DAMAGE = {
    "transposed": lambda t: t.T if t.ndim == 2 else t[None],
    "flat": lambda t: t.flatten(),
    "empty": lambda t: t[:0] if t.ndim else t.new_zeros(0),
    "a row less": lambda t: t[:-1] if t.ndim else t.new_ones(3),
    "a convolution": lambda t: t[..., None, None].repeat(*[1] * t.ndim, 3, 3),
    "codes": lambda t: t.to(torch.uint8),
    "complex": lambda t: t.to(torch.complex64),
}
SMALL = {name: MAKERS[name](DEV, 1) for name in ("kohya", "diffusers", "control", "lycoris", "xlabs")}
SMALL |= {name: Made(state, {}, {}) for name, state in others(DEV).items()}


@given(st.sampled_from(sorted(SMALL)), st.sampled_from(sorted(DAMAGE)), st.integers(0, 10_000))
def test_damage_is_named_or_harmless(name: str, damage: str, index: int) -> None:
    made = SMALL[name]
    key = sorted(made.state)[index % len(made.state)]
    try:
        lora = read_lora({**made.state, key: DAMAGE[damage](made.state[key])}, {}, DEV)
    except WeightsError:
        return
    for update in lora.updates.values():
        assert bool(torch.isfinite(update.delta(torch.ones(update.shape))).all())
