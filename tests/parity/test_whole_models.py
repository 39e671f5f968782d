"""Whole models from files, in every layout: a prompt in, and the numbers of the diffusers pipeline out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_makers import Layer, Numbers, layers, split
from oracles import SCHEDULERS, _quiet, diffusers_autoencoder, diffusers_transformer
from PIL import Image
from pipelines import DiffusersRedux, _means, picture, toy
from safetensors.torch import save_file
from tiny import autoencoder, randomise, transformer
from torch import Tensor

import fluxloom as fl
from fluxloom.core.redux import Redux, ReduxSpec
from fluxloom.core.specs import MODELS, AutoencoderSpec, ClipSpec, T5Spec
from fluxloom.errors import BadInput, FluxloomError
from fluxloom.infer.request import Reference
from fluxloom.weights.vocabularies import load_vocabulary

with _quiet():
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxControlPipeline,
        FluxPipeline,
        FluxPriorReduxPipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        SiglipVisionConfig,
        SiglipVisionModel,
        T5Config,
        T5EncoderModel,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

# Where no configuration says them, axes and heads follow from the width as in the real encoders.
CLIP = ClipSpec(width=64, layers=2, heads=1, mlp=40)
T5 = T5Spec(width=24, layers=2, heads=2, head_dim=64, mlp=32)
VAE = AutoencoderSpec(ch=32)  # of no known member's shape, so that it is taken for FLUX.1's
SPEC = replace(toy("flux1-dev").transformer, axes_dim=(4, 14, 14), vec_in_dim=CLIP.width)
PROMPT, NAME, SIZE, STEPS = "a red bicycle on the beach", "flux1-dev", 256, 3


@pytest.fixture(scope="module")
def encoders() -> tuple[CLIPTextModel, T5EncoderModel]:
    torch.manual_seed(3)
    clip = CLIPTextConfig(
        vocab_size=CLIP.vocab_size, hidden_size=CLIP.width, intermediate_size=CLIP.mlp, num_hidden_layers=CLIP.layers,
        num_attention_heads=CLIP.heads, max_position_embeddings=CLIP.max_length, hidden_act="quick_gelu",
        bos_token_id=49_406, eos_token_id=49_407,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=T5.vocab_size, d_model=T5.width, d_kv=T5.head_dim, d_ff=T5.mlp, num_layers=T5.layers,
        num_heads=T5.heads, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return CLIPTextModel(clip).eval().requires_grad_(False), T5EncoderModel(t5).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def theirs(encoders: tuple[CLIPTextModel, T5EncoderModel]) -> FluxPipeline:
    with _quiet():
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULERS["dev"]),
            vae=diffusers_autoencoder(autoencoder(VAE, 6)),
            transformer=diffusers_transformer(transformer(SPEC, 5)),
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=None,
            tokenizer_2=None,
        )


@pytest.fixture(scope="module")
def diffusers_folder(theirs: FluxPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "toy-dev"
    with _quiet():
        theirs.save_pretrained(folder)
    return folder


def states(pipe: Any) -> dict[str, Tensor]:
    """What the encoders of a pipeline say to the prompt; only cutting it into tokens is ours."""
    clip_ids = load_vocabulary("clip").encode(PROMPT, CLIP.max_length)
    t5_ids = load_vocabulary("t5").encode(PROMPT, 512)
    with torch.no_grad():
        return {
            "prompt_embeds": pipe.text_encoder_2(torch.tensor([t5_ids])).last_hidden_state,
            "pooled_prompt_embeds": pipe.text_encoder(torch.tensor([clip_ids])).pooler_output,
        }


def drawn(pipe: Any, **arguments: Any) -> np.ndarray:
    """A pipeline's picture [H, W, 3] in 0..1, on our noise."""
    given = {"width": SIZE, "height": SIZE, "num_inference_steps": STEPS, "guidance_scale": 3.5, **arguments}
    with _quiet(), torch.no_grad():
        pipe.set_progress_bar_config(disable=True)
        out = pipe(generator=torch.Generator().manual_seed(5), output_type="np", **given)
    picture: np.ndarray = out.images[0]
    return picture


@pytest.fixture(scope="module")
def expected(theirs: FluxPipeline) -> np.ndarray:
    return drawn(theirs, **states(theirs))


def as_it_is(folder: Path, to: Path) -> Path:
    return folder


def sharded(folder: Path, to: Path) -> Path:
    """diffusers' own shards: an index, and several files."""
    copy = Path(shutil.copytree(folder, to / "toy-dev"))
    with _quiet():
        from diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel.from_pretrained(folder / "transformer")
        shutil.rmtree(copy / "transformer")
        model.save_pretrained(copy / "transformer", max_shard_size="200KB")
    assert len(list((copy / "transformer").glob("*.safetensors"))) > 2
    return copy


def official(folder: Path, to: Path) -> Path:
    """The official files, and encoders beside them as others keep them."""
    model, vae = transformer(SPEC, 5), autoencoder(VAE, 6)
    save_file(model.state_dict(), to / "flux1-dev.safetensors")
    save_file(vae.state_dict(), to / "ae.safetensors")
    shutil.copy(folder / "text_encoder" / "model.safetensors", to / "clip_l.safetensors")
    shutil.copy(folder / "text_encoder_2" / "model.safetensors", to / "t5xxl_fp32.safetensors")
    return to / "flux1-dev.safetensors"


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {"diffusers": as_it_is, "sharded": sharded, "official": official}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_gives_the_pipelines_picture(
    layout: str, diffusers_folder: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    """Loaded from files, read, drawn and decoded. The control is another seed."""
    reference = LAYOUTS[layout](diffusers_folder, tmp_path)
    pipe = fl.load(reference, variant=NAME)
    assert pipe.spec.name == NAME
    fields = {"width": SIZE, "height": SIZE, "steps": STEPS, "guidance": 3.5}
    one = pipe.generate(PROMPT, seed=5, **fields)
    two = pipe.generate(PROMPT, seed=6, **fields)
    ours, other = (np.asarray(result.image) / 255 for result in (one, two))
    assert np.abs(ours - expected).max() < 1.1 / 255, "rounding to 8 bits, and no more"
    assert np.abs(other - expected).mean() > 5 / 255
    assert one.receipt.data["model"]["content"].startswith("sha256:")


def test_replay_from_files_is_bit_exact(diffusers_folder: Path, tmp_path: Path) -> None:
    pipe = fl.load(diffusers_folder, variant=NAME)
    path = pipe.generate(PROMPT, seed=1, width=SIZE, height=SIZE, steps=2).save(tmp_path / "a.png")
    assert fl.load(diffusers_folder, variant=NAME).replay(path).verdict == "bit-exact"


def test_a_component_that_does_not_fit_is_named(diffusers_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(diffusers_folder, tmp_path / "toy-dev"))
    (weights,) = (folder / "text_encoder_2").glob("*.safetensors")
    weights.unlink()
    with pytest.raises(FluxloomError, match=r"T5|t5"):
        fl.load(folder, variant=NAME)


def test_variants_of_one_shape_are_asked_for(diffusers_folder: Path, tmp_path: Path) -> None:
    """dev, Krea and Kontext have the same tensors: a toy of that shape, without a telling name, is not guessed at."""
    with pytest.raises(BadInput, match=r"try --variant flux1-dev"):
        fl.load(diffusers_folder)
    index = json.loads((diffusers_folder / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"


def test_weights_that_are_not_finite_are_refused(diffusers_folder: Path, tmp_path: Path) -> None:
    model, vae = transformer(SPEC, 5), autoencoder(VAE, 6)
    state: dict[str, Tensor] = dict(model.state_dict())
    state["img_in.weight"] = torch.full_like(state["img_in.weight"], torch.nan)
    reference = official(diffusers_folder, tmp_path)
    save_file(state, reference)
    save_file(vae.state_dict(), tmp_path / "ae.safetensors")
    with pytest.raises(FluxloomError, match=r"not finite.*img_in.weight"):
        fl.load(reference, variant=NAME)


# ---------------------------------------------------------------------------------------------- adapters


FIELDS = {"seed": 5, "width": SIZE, "height": SIZE, "steps": STEPS, "guidance": 3.5}
CONTROL = "flux1-canny-dev-lora"


def control_lora() -> dict[str, Tensor]:
    """As PEFT exports one: its first layer reads the control picture's channels, too, here so strongly that a toy's
    picture shows it. The modulation of the last layer is left out, as is all that diffusers 0.42 reads wrongly."""

    def write(layer: Layer, i: int, a: Tensor, b: Tensor, alpha: float) -> dict[str, Tensor]:
        name = f"transformer.{layer.parts[i][0]}"
        return {f"{name}.lora_A.weight": a.contiguous(), f"{name}.lora_B.weight": b.contiguous()}

    of = [layer for layer in layers(SPEC, control=True) if "adaLN" not in layer.official]
    state = split(of, write, Numbers(7), lambda i: 0).state
    state["transformer.x_embedder.lora_A.weight"][:, SPEC.in_channels :] *= 30
    return state


def test_a_control_lora_gives_the_pipelines_picture(
    theirs: FluxPipeline, diffusers_folder: Path, tmp_path: Path
) -> None:
    """Loaded with the base beside it and merged at the row's strength. The controls are the picture to follow, and
    another strength."""
    state, photo = control_lora(), picture(SIZE, SIZE, seed=4)
    official(diffusers_folder, tmp_path)
    save_file(state, tmp_path / "control.safetensors")
    parts = {**theirs.components, "transformer": diffusers_transformer(transformer(SPEC, 5))}
    pipe = FluxControlPipeline(
        **{name: parts[name] for name in parts if name not in ("image_encoder", "feature_extractor")}
    )
    text = states(theirs)
    with _quiet(), _means():
        pipe.load_lora_weights({name: tensor.clone() for name, tensor in state.items()}, adapter_name="one")
        found = []
        for strength in (MODELS[CONTROL].lora, 0.5):
            pipe.set_adapters(["one"], [strength])
            found.append(drawn(pipe, control_image=photo, **text))
    loom = fl.load(tmp_path / "control.safetensors", variant=CONTROL)
    assert (loom.spec.name, loom.spec.transformer.in_channels) == (CONTROL, 128)
    one, two = (
        np.asarray(loom.generate(PROMPT, control=seen, control_ready=True, **FIELDS).image) / 255
        for seen in (photo, picture(SIZE, SIZE, seed=9))
    )
    assert np.abs(one - found[0]).max() < 1.1 / 255, "rounding to 8 bits, and no more"
    assert min(np.abs(one - found[1]).mean(), np.abs(two - found[0]).mean()) > 2 / 255


REDUX = ReduxSpec(width=72, layers=2, heads=1, mlp=24, patch=14, side=160, out_dim=T5.width)  # 121 patches


def redux_folder(folder: Path, layout: str) -> tuple[Any, Any, Any]:
    """A toy Redux as its publisher lays it out, and in others' classes: tower, what makes its pictures, adapter. What
    it sees counts so strongly that a toy's picture shows it."""
    config = SiglipVisionConfig(
        hidden_size=REDUX.width, intermediate_size=REDUX.mlp, num_hidden_layers=REDUX.layers,
        num_attention_heads=REDUX.heads, image_size=REDUX.side, patch_size=REDUX.patch,
    )  # fmt: skip
    ours, tower = randomise(Redux(REDUX), 8), SiglipVisionModel(config).eval()
    assert isinstance(ours, Redux)
    ours.vision_model.embeddings.patch_embedding.weight *= 10
    ours.redux_down.weight *= 30
    head = {name: tensor for name, tensor in tower.state_dict().items() if name.startswith("head.")}
    tower.load_state_dict({**ours.vision_model.state_dict(), **head})
    embedder = DiffusersRedux(redux_dim=REDUX.width, txt_in_features=REDUX.out_dim)
    adapter = {name: tensor for name, tensor in ours.state_dict().items() if name.startswith("redux_")}
    embedder.load_state_dict(adapter)
    (folder / "image_encoder").mkdir(parents=True)
    published = {f"vision_model.{name}": tensor.contiguous() for name, tensor in tower.state_dict().items()}
    save_file(published, folder / "image_encoder" / "model.safetensors")
    config.save_pretrained(folder / "image_encoder")
    if layout == "official":
        save_file(adapter, folder / "flux1-redux-dev.safetensors")
    else:
        with _quiet():
            embedder.save_pretrained(folder / "image_embedder")
    return tower, SiglipImageProcessorPil(size={"height": REDUX.side, "width": REDUX.side}), embedder


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_redux_gives_the_pipelines_picture(
    layout: str, theirs: FluxPipeline, diffusers_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the adapter, the base in a collection beside it. The control is another picture as words."""
    tower, processor, embedder = redux_folder(tmp_path / "redux", layout)
    (tmp_path / "dev").mkdir()
    official(diffusers_folder, tmp_path / "dev")
    monkeypatch.setenv("FLUXLOOM_MODELS", str(tmp_path))
    photo, text = picture(100, 70, seed=3), states(theirs)
    with _quiet(), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        prior = FluxPriorReduxPipeline(image_encoder=tower, feature_extractor=processor, image_embedder=embedder)
        prior.text_encoder = object()  # only asked whether it is there
        patch.setattr(prior, "encode_prompt", lambda **_: (*(one.clone() for one in text.values()), None))
        found = prior(photo)
    want = drawn(theirs, **{name: found[name] for name in text})
    loom = fl.load(tmp_path / "redux")
    assert loom.spec.name == "flux1-redux-dev"

    def ours(seen: Image.Image) -> np.ndarray:
        return np.asarray(loom.generate(PROMPT, references=(Reference(seen, "image"),), **FIELDS).image) / 255

    assert np.abs(ours(photo) - want).max() < 1.1 / 255, "rounding to 8 bits, and no more"
    assert np.abs(ours(picture(seed=9)) - want).mean() > 1 / 255
