"""The weight tables: complete against diffusers' own key sets, invertible, strict, and true at full size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import AutoencoderKL, FluxTransformer2DModel, diffusers_config, diffusers_vae_config
from tiny import DEV, VAE, autoencoder, transformer
from torch import Tensor, nn

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.specs import MODELS, AutoencoderSpec, TransformerSpec
from fluxloom.core.transformer import Transformer
from fluxloom.errors import WeightsError
from fluxloom.weights.dialects import Spec, table, to_diffusers, to_official

State = dict[str, Tensor]


def on_meta(make: Any, *args: Any, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = make(*args, **kwargs)
    return module


def shapes(state: State) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items()}


# Tensors and parameters of the published files.
FULL_SIZE = {
    "flux1-dev": (780, 11_901_408_320),
    "flux1-kontext-dev": (780, 11_901_408_320),
    "flux1-schnell": (776, 11_891_178_560),
    "flux1-fill-dev": (780, 11_902_391_360),
    "flux1-canny-dev": (780, 11_901_604_928),
    "flux1-depth-dev": (780, 11_901_604_928),
}


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-schnell", "flux1-fill-dev", "flux1-canny-dev", "nano"])
def test_full_size_transformer(name: str) -> None:
    spec = MODELS[name].transformer
    ours = on_meta(Transformer, spec).state_dict()
    if name in FULL_SIZE:
        assert (len(ours), sum(tensor.numel() for tensor in ours.values())) == FULL_SIZE[name]
    theirs = on_meta(FluxTransformer2DModel, **diffusers_config(spec)).state_dict()
    assert shapes(to_diffusers(ours, spec)) == shapes(theirs)
    assert shapes(to_official(theirs, spec)) == shapes(ours)


def test_members_of_the_same_shape() -> None:
    for one, other in [("flux1-dev", "flux1-kontext-dev"), ("flux1-canny-dev", "flux1-depth-dev")]:
        assert MODELS[one].transformer == MODELS[other].transformer


def test_full_size_autoencoder() -> None:
    spec = AutoencoderSpec()
    ours = on_meta(Autoencoder, spec).state_dict()
    assert sum(tensor.numel() for tensor in ours.values()) == 83_819_683
    assert sum(t.numel() for key, t in ours.items() if key.startswith("encoder.")) == 34_274_208
    theirs = on_meta(AutoencoderKL, **diffusers_vae_config(spec)).state_dict()
    assert shapes(to_diffusers(ours, spec)) == shapes(theirs)
    assert shapes(to_official(theirs, spec)) == shapes(ours)


transformer_specs = st.builds(
    lambda heads, axes, **rest: TransformerSpec(
        hidden_size=heads * sum(axes), num_heads=heads, axes_dim=axes, context_in_dim=6, vec_in_dim=5, **rest
    ),
    heads=st.integers(1, 3),
    axes=st.sampled_from([(2, 2, 2), (2, 4, 4)]),
    in_channels=st.sampled_from([64, 128, 384]),
    depth=st.integers(0, 2),
    depth_single_blocks=st.integers(0, 2),
    mlp_ratio=st.sampled_from([2.0, 4.0]),
    guidance_embed=st.booleans(),
    qkv_bias=st.booleans(),
)
autoencoder_specs = st.builds(
    AutoencoderSpec,
    ch=st.just(4),
    ch_mult=st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple),
    num_res_blocks=st.integers(1, 2),
    z_channels=st.integers(1, 4),
    norm_groups=st.just(2),
)


@given(st.one_of(transformer_specs, autoencoder_specs))
def test_round_trips(spec: Spec) -> None:
    """On the full key set of any architecture, from either side, nothing is lost, doubled or moved."""
    module = Transformer(spec) if isinstance(spec, TransformerSpec) else Autoencoder(spec)
    ours = module.state_dict()
    theirs = to_diffusers(ours, spec)
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in ours.values())
    back = to_official(theirs, spec)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)
    again = to_diffusers(back, spec)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[key], theirs[key]) for key in theirs)


def test_layouts() -> None:
    ours = transformer(DEV, 0).state_dict()
    theirs = to_diffusers(ours, DEV)
    width = DEV.hidden_size
    qkv, last = ours["double_blocks.0.txt_attn.qkv.bias"], ours["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(theirs["transformer_blocks.0.attn.add_k_proj.bias"], qkv[width : 2 * width])
    assert torch.equal(theirs["norm_out.linear.weight"], torch.cat((last[width:], last[:width])))
    mlp = theirs["single_transformer_blocks.1.proj_mlp.weight"]
    assert torch.equal(mlp, ours["single_blocks.1.linear1.weight"][3 * width :])

    vae = autoencoder(VAE, 0).state_dict()
    other = to_diffusers(vae, VAE)
    assert torch.equal(other["decoder.up_blocks.0.resnets.1.conv1.bias"], vae["decoder.up.3.block.1.conv1.bias"])
    assert torch.equal(
        other["encoder.mid_block.attentions.0.to_q.weight"], vae["encoder.mid.attn_1.q.weight"][:, :, 0, 0]
    )


SPECS: dict[str, Spec] = {"transformer": DEV, "autoencoder": VAE}
STATES: dict[str, State] = {
    "transformer": transformer(DEV, 0).state_dict(),
    "autoencoder": autoencoder(VAE, 0).state_dict(),
}


@given(st.sampled_from(sorted(SPECS)), st.booleans(), st.data())
def test_strict(kind: str, official: bool, data: st.DataObject) -> None:
    """Any tensor taken away, and any added, is named."""
    spec = SPECS[kind]
    state, convert = STATES[kind], to_diffusers
    if not official:
        state, convert = to_diffusers(state, spec), to_official
    key = data.draw(st.sampled_from(sorted(state)))
    with pytest.raises(WeightsError, match=f"1 missing.*{key}"):
        convert({name: tensor for name, tensor in state.items() if name != key}, spec)
    with pytest.raises(WeightsError, match=f"1 unknown.*{key}x"):
        convert({**state, f"{key}x": state[key]}, spec)


def test_a_foreign_state_is_cut_short() -> None:
    with pytest.raises(WeightsError, match=r"got 112 missing tensors \(.*, \.\.\.\), allowed exactly"):
        to_official(STATES["transformer"], DEV)


@pytest.mark.parametrize(
    ("kind", "official", "key", "want"),
    [
        ("transformer", True, "double_blocks.1.img_attn.qkv.weight", "192 rows"),
        ("transformer", True, "single_blocks.0.linear1.bias", "448 rows"),
        ("transformer", False, "transformer_blocks.0.attn.to_v.weight", "64 rows"),
        ("transformer", False, "single_transformer_blocks.0.proj_mlp.bias", "256 rows"),
        ("autoencoder", True, "decoder.mid.attn_1.k.weight", "a 1 x 1 convolution"),
        ("autoencoder", False, "decoder.mid_block.attentions.0.to_k.weight", "a matrix"),
    ],
)
def test_misshapen(kind: str, official: bool, key: str, want: str) -> None:
    spec = SPECS[kind]
    state, convert = dict(STATES[kind]), to_diffusers
    if not official:
        state, convert = to_diffusers(state, spec), to_official
    state[key] = torch.cat((state[key], state[key]), dim=-1 if want.startswith("a 1") else 0)
    if want == "a matrix":
        state[key] = state[key][None]
    with pytest.raises(WeightsError, match=rf"got {key} of shape .*, allowed {want}"):
        convert(state, spec)


def test_the_table_names_each_tensor_once() -> None:
    for spec in (*SPECS.values(), replace(DEV, qkv_bias=False)):
        rows = table(spec)
        assert len({row.official for row in rows}) == len(rows)
        names = [name for row in rows for name in row.diffusers]
        assert len(set(names)) == len(names)
