"""pico: a model small enough for a forward pass in milliseconds; real classes, random weights, a real folder."""

from __future__ import annotations

import string
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from PIL import Image
from tiny import randomise

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.specs import MODELS, AutoencoderSpec, ModelSpec, TaskDefaults, TextSpec, TransformerSpec
from fluxloom.core.text import SPECIALS, TextTower
from fluxloom.core.transformer import Transformer
from fluxloom.weights.load import save_card, save_compact

WORDS = ("a", "red", "blue", "cat", "dog", "house", "make", "it", "snow", "remove")
VOCABULARY = [*SPECIALS, *WORDS, *(f"##{letter}" for letter in string.ascii_lowercase), "猫"]
LENGTH = 8

SPEC: ModelSpec = replace(
    MODELS["nano"],
    name="pico",
    transformer=TransformerSpec(
        hidden_size=32,
        num_heads=2,
        axes_dim=(4, 6, 6),
        depth=1,
        depth_single_blocks=1,
        context_in_dim=16,
        vec_in_dim=16,
    ),
    autoencoder=AutoencoderSpec(ch=8, num_res_blocks=1, norm_groups=4, scale_factor=0.5, shift_factor=0.1),
    text=TextSpec(vocab_size=len(VOCABULARY), width=16, layers=1, heads=2, max_length=LENGTH),
    tasks=MappingProxyType(
        {
            "generate": TaskDefaults(steps=3, guidance=1.0, true_cfg=3.0, size=(64, 48)),
            "edit": TaskDefaults(steps=2, guidance=1.0, true_cfg=1.5, size=(64, 48)),
        }
    ),
    text_length=LENGTH,
    min_side=32,
    max_area=128 * 128,
)


def save_model(folder: Path, spec: ModelSpec, seed: int = 0) -> Path:
    """A model folder with random weights of a spec."""
    assert spec.text is not None
    modules = {
        "transformer": Transformer(spec.transformer),
        "autoencoder": Autoencoder(spec.autoencoder),
        "text": TextTower(spec.text),
    }
    state = {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in randomise(module, seed).state_dict().items()
    }
    save_compact(state, folder, default="int8")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", "utf-8")
    save_card(folder, spec.name, {})
    return folder


def photo(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """A smooth colourful picture."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
