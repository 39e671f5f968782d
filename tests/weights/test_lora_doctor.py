"""The doctor tells what a LoRA is, and refuses what would do nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from lora_makers import MAKERS, Made
from tiny import DEV, transformer
from torch import Tensor

from fluxloom.core.specs import MODELS
from fluxloom.errors import WeightsError
from fluxloom.infer.adapters import attach
from fluxloom.weights.lora_doctor import diagnose, fitting

BASE = MODELS["flux1-dev"].transformer
NANO = MODELS["nano"].transformer


def attached(model: object, loras: object) -> object:
    return attach(model, loras).detach  # type: ignore[arg-type]


def test_a_report() -> None:
    made = MAKERS["kohya"](DEV, 1)
    state = {
        **made.state,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),
        "what.ever": torch.ones(1),
    }
    name = "lora_unet_single_blocks_0_linear1.lora_up.weight"
    state[name] = torch.zeros_like(state[name])
    found = diagnose(state, made.metadata, transformer(DEV, 0))
    assert (found.dialect, found.ranks, found.scales) == ("kohya", {4: 36}, (0.25,))
    assert (found.keys, found.matched, found.text) == (len(state), len(state) - 2, 1)
    assert found.unmatched == ("what.ever: no such layer or suffix",)
    assert (found.layers, found.silent, found.kinds) == (36, 1, {"LowRank": 36})
    assert found.change is not None
    assert 0.1 < found.change < 10
    assert json.loads(json.dumps(found.to_dict()))["ranks"] == {"4": 36}


@pytest.mark.parametrize("name", MAKERS)
def test_the_change_is_the_same_beside_the_weights(name: str) -> None:
    made, model = MAKERS[name](DEV, 1), transformer(DEV, 0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    merged = diagnose(made.state, made.metadata, model).change
    beside = diagnose(made.state, made.metadata, model, apply=attached).change  # type: ignore[arg-type]
    assert merged == pytest.approx(beside, rel=1e-4)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def zeroed(made: Made, part: str) -> dict[str, Tensor]:
    return {key: torch.zeros_like(t) if part in key else t for key, t in made.state.items()}


def test_no_effect_is_refused() -> None:
    made = MAKERS["diffusers"](DEV, 1)
    for part in ("lora_A", "lora_B"):
        with pytest.raises(WeightsError, match="without effect"):
            diagnose(zeroed(made, part), {}, transformer(DEV, 0))
    state, last = zeroed(made, "lora_B"), "transformer.x_embedder.lora_B.weight"
    state[last] = 1e-30 * made.state[last]  # not zero, and still nothing
    with pytest.raises(WeightsError, match="does not change the velocity"):
        diagnose(state, {}, transformer(DEV, 0))


def test_another_base_is_named() -> None:
    made = MAKERS["kohya"](NANO, 1)
    with pytest.raises(
        WeightsError, match=r"hidden size 384 with 1 double and 9 single blocks, allowed 64.*try it with nano"
    ):
        diagnose(made.state, {}, transformer(DEV, 0))
    large = MAKERS["kohya"](BASE, None)
    with pytest.raises(WeightsError, match=r"hidden size 3072 .*try it with flux1-kontext-dev"):
        diagnose(large.state, {}, transformer(DEV, 0), names=["my_kontext_lora.safetensors"])


def test_nothing_that_fits_is_refused() -> None:
    for state in ({"a.lora_A.weight": torch.ones(2, 2)}, MAKERS["kohya"](DEV, 1).state):
        with pytest.raises(WeightsError, match=r"got (no tensor of a LoRA|\d+ misshapen)"):
            diagnose(state, {})


@pytest.mark.parametrize(
    ("maker", "metadata", "name", "want"),
    [
        ("kohya", {"modelspec.architecture": "flux-1-dev/lora"}, "", ("flux1-dev",)),
        ("kohya", {"ss_sd_model_name": "FLUX.1-Kontext-dev"}, "", ("flux1-kontext-dev",)),
        (
            "kohya",
            {},
            "schnell.safetensors",
            ("flux1-dev", "flux1-krea-dev", "flux1-kontext-dev"),
        ),  # guidance_in says no
        ("xlabs", {}, "schnell.safetensors", ("flux1-schnell",)),
        ("control", {}, "", ("flux1-dev",)),
        ("fal", {}, "flux1-fill-dev-lora", ("flux1-fill-dev",)),
    ],
)
def test_guesses_of_the_base(maker: str, metadata: dict[str, str], name: str, want: tuple[str, ...]) -> None:
    made = MAKERS[maker](BASE, None)
    assert diagnose(made.state, metadata, names=[name]).bases == want


def test_the_shape_that_fits_is_found() -> None:
    assert fitting(MAKERS["lycoris"](NANO, 1).state, {}).spec == NANO
    fill = replace(BASE, in_channels=384)
    assert fitting(MAKERS["kohya"](fill, None).state, {}).spec == fill
    assert fitting(MAKERS["control"](BASE, None).state, {}).spec.in_channels == 128
