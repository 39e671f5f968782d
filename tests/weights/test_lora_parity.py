"""LoRAs here give the numbers that diffusers, PEFT and the official code give; where one of those is wrong, a test
shows it against the definition."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from diffusers.loaders import lora_pipeline
from fluxbfl.model import FluxLoraWrapper, FluxParams
from lora_makers import MAKERS, Made
from oracles import _quiet, diffusers_config, diffusers_transformer
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from tiny import DEV, inputs, relative, transformer
from torch import Tensor, nn

from fluxloom.core.transformer import Transformer
from fluxloom.infer.adapters import attach
from fluxloom.weights.lora import Weighted, merge
from fluxloom.weights.lora_read import read_lora

LIMIT = 1e-5
WIDE = replace(DEV, in_channels=128)

# Their converters have the sizes of the 12 B members written into them; these are the same functions at ours.
SIZES = {"19": DEV.depth, "38": DEV.depth_single_blocks, "3072": DEV.hidden_size, "12288": DEV.mlp_hidden}
CONVERTERS = [name for name in dir(theirs) if re.match(r"_convert_(?:kohya|xlabs|bfl|fal)_flux|_convert_fal", name)]


@pytest.fixture(autouse=True)
def _our_sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in CONVERTERS:
        source = inspect.getsource(getattr(theirs, name))
        for number, ours in SIZES.items():
            source = re.sub(rf"\b{number}\b", str(ours), source)
        space: dict[str, object] = dict(vars(theirs))
        exec(source, space)
        if hasattr(lora_pipeline, name):
            monkeypatch.setattr(lora_pipeline, name, space[name])
    with _quiet():
        yield


def diffusers_velocity(twin: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    out: Tensor = twin(
        hidden_states=arguments["img"],
        encoder_hidden_states=arguments["txt"],
        pooled_projections=arguments["pooled"],
        timestep=arguments["t"],
        img_ids=arguments["img_ids"][0],
        txt_ids=arguments["txt_ids"][0],
        guidance=arguments["guidance"],
        return_dict=False,
    )[0]
    return out


def pipeline(model: Transformer) -> lora_pipeline.FluxLoraLoaderMixin:
    """diffusers' loader, around a transformer with our weights."""

    class Loader(lora_pipeline.FluxLoraLoaderMixin):
        def __init__(self, twin: nn.Module) -> None:
            self.transformer = twin
            self.text_encoder = None
            self.hf_device_map = None
            self.components: dict[str, nn.Module] = {"transformer": twin}

    return Loader(diffusers_transformer(model))


def theirs_of(model: Transformer, state: dict[str, Tensor], weight: float, arguments: dict[str, Tensor]) -> Tensor:
    pipe = pipeline(model)
    pipe.load_lora_weights({key: tensor.clone() for key, tensor in state.items()}, adapter_name="one")
    pipe.transformer.set_adapters(["one"], [weight])
    return diffusers_velocity(pipe.transformer, arguments)


def ours_of(model: Transformer, made: Made, weight: float, arguments: dict[str, Tensor]) -> Tensor:
    with attach(model, [Weighted(read_lora(made.state, made.metadata, model.spec), weight)]):
        out: Tensor = model(**arguments)
    return out


def only(made: Made, pattern: str) -> Made:
    """The keys that match."""
    return Made({k: v for k, v in made.state.items() if re.search(pattern, k)}, {}, made.metadata)


# What of each dialect diffusers reads as it is meant; the rest is below.
READ_ALIKE = {
    "diffusers": "",
    "ai-toolkit": "",
    "kohya": "double_blocks|single_blocks",
    "onetrainer": "attn|x_embedder|context_embedder|time_text|proj_out$",
    "xlabs": "",
    "fal": "double|single|final_layer.linear",
}


@pytest.mark.parametrize("weight", [1.0, 0.7])
@pytest.mark.parametrize("name", READ_ALIKE)
def test_diffusers_gives_the_same_velocity(name: str, weight: float) -> None:
    model, made = transformer(DEV, 0), only(MAKERS[name](DEV, 1), READ_ALIKE[name])
    arguments = inputs(DEV, 0)
    want = theirs_of(model, made.state, weight, arguments)
    assert relative(ours_of(model, made, weight, arguments), want) < LIMIT
    assert relative(ours_of(model, made, weight * 1.01, arguments), want) > LIMIT
    assert relative(model(**arguments), want) > 100 * LIMIT


def test_diffusers_gives_the_same_velocity_for_several_at_once() -> None:
    model, arguments = transformer(DEV, 0), inputs(DEV, 0)
    weights = {"diffusers": 0.6, "xlabs": -0.4, "ai-toolkit": 0.9}
    pipe = pipeline(model)
    for name in weights:
        state = MAKERS[name](DEV, 1).state
        pipe.load_lora_weights({key: tensor.clone() for key, tensor in state.items()}, adapter_name=name)
    pipe.transformer.set_adapters(list(weights), list(weights.values()))
    want = diffusers_velocity(pipe.transformer, arguments)
    made = {name: MAKERS[name](DEV, 1) for name in weights}
    loras = [Weighted(read_lora(made[name].state, made[name].metadata, DEV), weights[name]) for name in weights]
    with attach(model, loras):
        assert relative(model(**arguments), want) < LIMIT
    with attach(model, loras[:2]):
        assert relative(model(**arguments), want) > 100 * LIMIT


# ------------------------------------------------------------------------------------------------ PEFT


TARGETS = r".*\.(to_q|to_v|add_k_proj|to_out\.0|proj_mlp|net\.2|linear)$"
METHODS = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS, init_lora_weights=False),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"to_q": 3},
        alpha_pattern={"to_v": 2, r"transformer_blocks\.0\.attn\.to_q": 9},
        target_modules=TARGETS,
        init_lora_weights=False,
    ),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS, init_lora_weights=False),
    "bias": LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=TARGETS, init_lora_weights=False),
    "loha": LoHaConfig(r=3, alpha=6, target_modules=TARGETS, init_weights=False),
    "lokr": LoKrConfig(r=2, alpha=6, target_modules=TARGETS, init_weights=False),
    "lokr, both factorised": LoKrConfig(
        r=2, alpha=6, decompose_both=True, decompose_factor=8, target_modules=TARGETS, init_weights=False
    ),
    "lokr, none factorised": LoKrConfig(r=64, alpha=6, target_modules=TARGETS, init_weights=False),
}


@pytest.mark.parametrize("name", METHODS)
def test_peft_gives_the_same_velocity(name: str) -> None:
    model, config, arguments = transformer(DEV, 0), METHODS[name], inputs(DEV, 0)
    twin = diffusers_transformer(model)
    inject_adapter_in_model(config, twin)
    for parameter in (p for n, p in twin.named_parameters() if "default" in n):
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape)
    state = {f"transformer.{k}": v.clone() for k, v in get_peft_model_state_dict(twin).items()}
    kept = {k: v for k, v in config.to_dict().items() if not isinstance(v, set)}
    made = Made(state, {}, {"lora_adapter_metadata": json.dumps(kept, default=str)})
    want = diffusers_velocity(twin.eval(), arguments)
    assert relative(ours_of(model, made, 1.0, arguments), want) < LIMIT
    assert relative(ours_of(model, made, 0.99, arguments), want) > LIMIT
    undo = merge(model, [Weighted(read_lora(state, made.metadata, DEV))])
    assert relative(model(**arguments), want) < LIMIT
    undo()
    if name == "dora":
        no_magnitudes = Made({k: v for k, v in state.items() if "magnitude" not in k}, {}, made.metadata)
        assert relative(ours_of(model, no_magnitudes, 1.0, arguments), want) > 1e-2


# ------------------------------------------------------------------------------------------------ control LoRAs


def official_control(
    model: Transformer, state: dict[str, Tensor], weight: float, arguments: dict[str, Tensor]
) -> Tensor:
    """The official package: a wrapper of every layer, into which weights and LoRA are loaded as they are."""
    twin = FluxLoraWrapper(params=FluxParams(**asdict(WIDE)), lora_rank=128, lora_scale=1.0)
    base = model.state_dict()
    base["img_in.weight"] = nn.functional.pad(base["img_in.weight"], (0, 64))
    found = twin.load_state_dict({**base, **state}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    twin.set_lora_scale(weight)
    twin.eval().requires_grad_(False)
    renamed = {"timesteps": arguments["t"], "y": arguments["pooled"]}
    rest = {key: value for key, value in arguments.items() if key not in ("t", "pooled")}
    out: Tensor = twin(**rest, **renamed)
    return out


@pytest.mark.parametrize("weight", [1.0, 0.85])
def test_the_official_control_lora(weight: float) -> None:
    model, made, arguments = transformer(DEV, 0), MAKERS["control"](DEV, 1), inputs(WIDE, 0)
    want = official_control(model, made.state, weight, arguments)
    assert relative(ours_of(model, made, weight, arguments), want) < LIMIT
    without: dict[str, Callable[[str], bool]] = {
        "biases": lambda key: not key.endswith("lora_B.bias"),
        "norm scales": lambda key: not key.endswith("_norm.scale"),
    }
    for keep in without.values():
        less = Made({k: v for k, v in made.state.items() if keep(k)}, {}, {})
        assert relative(ours_of(model, less, weight, arguments), want) > 1e-3


def test_diffusers_exchanges_rows_of_a_of_the_control_lora_which_is_wrong() -> None:
    """Its converter swaps the halves of A's rows too. Those are ranks, not scale and shift: exchanged, they meet the
    wrong columns of B. With an A whose halves are equal, both agree."""
    model, made, arguments = transformer(DEV, 0), MAKERS["control"](DEV, 1), inputs(WIDE, 0)
    official = official_control(model, made.state, 1.0, arguments)
    assert relative(theirs_of(model, made.state, 1.0, arguments), official) > 1e-3
    key = "final_layer.adaLN_modulation.1.lora_A.weight"
    half = made.state[key].chunk(2)[0]
    same = Made({**made.state, key: torch.cat((half, half))}, {}, {})
    want = theirs_of(model, same.state, 1.0, arguments)
    assert relative(ours_of(model, same, 1.0, arguments), want) < LIMIT


# ------------------------------------------------------------------------------------------------ where they are wrong


def dense(model: Transformer, made: Made, arguments: dict[str, Tensor]) -> Tensor:
    """By definition: the makers' dense differences added to the weights."""
    twin = Transformer(DEV)
    state = model.state_dict()
    twin.load_state_dict({k: v + made.deltas[k] if k in made.deltas else v for k, v in state.items()})
    out: Tensor = twin.eval().requires_grad_(False)(**arguments)
    return out


# What diffusers 0.42 makes of whole files of these dialects.
#   kohya             alphas of the last layer and all embedders are dropped: other numbers
#   official          read as a LoRA for no module: no effect, and no error
#   onetrainer        MLPs and modulations are not known: an error, as for the rest
OTHERWISE = {
    "kohya": "other numbers",
    "official": "no effect",
    "onetrainer": "refused",
    "onetrainer-split": "refused",
    "fal": "refused",
    "lycoris": "refused",
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_diffusers_does_not_read_follows_the_definition(name: str) -> None:
    model, made, arguments = transformer(DEV, 0), MAKERS[name](DEV, 1), inputs(DEV, 0)
    want = dense(model, made, arguments)
    assert relative(ours_of(model, made, 1.0, arguments), want) < LIMIT
    try:
        found = theirs_of(model, made.state, 1.0, arguments)
    except (ValueError, KeyError, RuntimeError):  # PEFT's error for unknown modules is a ValueError
        outcome = "refused"
    else:
        assert relative(found, want) > 1e-3
        outcome = "no effect" if relative(found, model(**arguments)) < LIMIT else "other numbers"
    assert outcome == OTHERWISE[name]


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_diffusers_drops_the_magnitudes_of_kohya_files(axis: str) -> None:
    model, arguments = transformer(DEV, 0), inputs(DEV, 0)
    made = only(MAKERS["kohya"](DEV, 1), "double_blocks_0_img_attn_proj")
    name, weight = "lora_unet_double_blocks_0_img_attn_proj", "double_blocks.0.img_attn.proj.weight"
    d = DEV.hidden_size
    magnitude = 1 + 0.3 * torch.randn((d, 1) if axis == "rows" else (1, d))
    made.state[f"{name}.dora_scale"] = magnitude
    base = model.state_dict()[weight]
    whole = base + MAKERS["kohya"](DEV, 1).deltas[weight]
    made.deltas[weight] = magnitude * whole / whole.norm(dim=1 if axis == "rows" else 0, keepdim=True) - base
    want = dense(model, made, arguments)
    assert relative(ours_of(model, made, 1.0, arguments), want) < LIMIT
    assert relative(theirs_of(model, made.state, 1.0, arguments), want) > 1e-3


def test_the_tiny_twin_is_the_one_we_mean() -> None:
    assert diffusers_config(DEV)["in_channels"] == 64
