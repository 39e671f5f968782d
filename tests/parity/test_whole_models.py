"""Whole models from files, in every layout: a prompt in, and the numbers of the diffusers pipeline out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import SCHEDULERS, _quiet, diffusers_autoencoder, diffusers_transformer
from pipelines import toy
from safetensors.torch import save_file
from tiny import autoencoder, transformer
from torch import Tensor

import fluxloom as fl
from fluxloom.core.specs import AutoencoderSpec, ClipSpec, T5Spec
from fluxloom.errors import BadInput, FluxloomError
from fluxloom.weights.vocabularies import load_vocabulary

with _quiet():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

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


@pytest.fixture(scope="module")
def expected(theirs: FluxPipeline) -> np.ndarray:
    """The pipeline's picture [H, W, 3] in 0..1, on our noise; only cutting the prompt into tokens is ours."""
    clip_ids = load_vocabulary("clip").encode(PROMPT, CLIP.max_length)
    t5_ids = load_vocabulary("t5").encode(PROMPT, 512)
    with _quiet(), torch.no_grad():
        theirs.set_progress_bar_config(disable=True)
        out = theirs(
            prompt_embeds=theirs.text_encoder_2(torch.tensor([t5_ids])).last_hidden_state,
            pooled_prompt_embeds=theirs.text_encoder(torch.tensor([clip_ids])).pooler_output,
            width=SIZE, height=SIZE, num_inference_steps=STEPS, guidance_scale=3.5,
            generator=torch.Generator().manual_seed(5), output_type="np",
        )  # fmt: skip
    picture: np.ndarray = out.images[0]
    return picture


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
