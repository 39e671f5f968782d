"""What the networks of a model weigh, and what a picture costs its autoencoder: read from the modules' own shapes.

The modules are made on the meta device, which has shapes and no numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import nn

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.clip import ClipText
from fluxloom.core.redux import Redux, ReduxSpec
from fluxloom.core.specs import AutoencoderSpec, ModelSpec, TextPair, TextSpec, TransformerSpec
from fluxloom.core.t5 import T5Encoder
from fluxloom.core.text import TextTower
from fluxloom.core.transformer import Transformer
from fluxloom.weights.load import Uninitialised

Shapes = dict[str, tuple[int, ...]]
# Modulations: each of a vector alone, so that those of all steps can be computed beforehand.
_MODULATION = re.compile(r"(?:_mod|\bmodulation)\.lin\.|adaLN_modulation")
_BLOCK = re.compile(r"(?:double_blocks|single_blocks|encoder\.block)\.(\d+)\.|(shared)\.")
_DOUBLED = ".upsample.conv."  # what follows nearest-neighbour upsampling
_FLOAT32 = 4


@dataclass(frozen=True)
class Weights:
    """Bytes of weights on the device. What can stream is listed piece by piece: matrices alone, vectors stay.

    outer          the transformer without the pieces below
    blocks         of each block, double blocks first, without its modulation
    modulations    in the order in which they are computed, the last layer's at the end
    towers         text encoders without the layers below; ``tower_numbers`` of them are multiplied for every token
    layers         of T5: the embedding, then its layers
    """

    outer: int
    blocks: list[int]
    modulations: list[int]
    towers: int
    tower_numbers: int
    layers: list[int]
    autoencoder: int
    redux: int
    redux_numbers: int

    @property
    def transformer(self) -> int:
        """All of it."""
        return self.outer + sum(self.blocks) + sum(self.modulations)


def shapes_of(make: Callable[[], nn.Module]) -> Shapes:
    """Name and shape of every parameter of a module."""
    with Uninitialised(), torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().named_parameters()}


def streams(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a streamed piece is copied each time. Vectors (biases, scales) are few and stay, so do the
    biases of T5's distances, which all layers use."""
    return len(shape) > 1 and "relative_attention_bias" not in name


def weigh(spec: ModelSpec, dtype: str, linears: str | None, walked: bool = False) -> Weights:
    """The weights of a model in a dtype, its blocks' products in a form (``fp8``, ``int8``: a byte a number and a
    float32 scale a row) or as they are; a tower of the model's own is in float32. ``walked``: the autoencoder as
    :mod:`fluxloom.speed.pictures` has it, in bfloat16 with 2 x 2 taps for each parity of what is doubled; else float32.
    """
    redux = "redux" in spec.tasks
    return _weigh(spec.transformer, spec.autoencoder, spec.text or spec.pair, redux, walked, dtype, linears)


@lru_cache(maxsize=32)
def _weigh(
    spec: TransformerSpec, pictures: AutoencoderSpec, text: TextSpec | TextPair, sees: bool, walked: bool, dtype: str,
    form: str | None,
) -> Weights:  # fmt: skip
    size = getattr(torch, dtype).itemsize
    transformer = shapes_of(lambda: Transformer(spec))
    modulations = {
        name: prod(shape) * size for name, shape in transformer.items() if streams(name, shape) and is_modulation(name)
    }
    blocks: dict[str, int] = {}
    whole = 0
    for name, shape in transformer.items():
        found = _BLOCK.match(name)
        low = form is not None and found is not None and len(shape) > 1 and name not in modulations
        nbytes = prod(shape) * (1 if low else size)
        whole += nbytes + (4 * shape[0] if low else 0)
        if found is not None and streams(name, shape) and name not in modulations:
            blocks[found[0]] = blocks.get(found[0], 0) + nbytes
    outer = whole - sum(blocks.values()) - sum(modulations.values())
    towers, numbers, layers = _towers(text, size)
    redux = shapes_of(lambda: Redux(ReduxSpec())) if sees else {}
    halves = shapes_of(lambda: Autoencoder(pictures))
    taps = sum(16 * prod(shape) // 9 for name, shape in halves.items() if _DOUBLED in name and len(shape) > 1)
    return Weights(
        outer=outer,
        blocks=list(blocks.values()),
        modulations=list(modulations.values()),
        towers=towers,
        tower_numbers=numbers,
        layers=layers,
        autoencoder=2 * (_numbers(halves) + taps) if walked else _FLOAT32 * _numbers(halves),
        redux=size * _numbers(redux),
        redux_numbers=_numbers(redux),
    )


def is_modulation(name: str) -> bool:
    """Whether a tensor of the transformer, or of one of its blocks, belongs to a modulation."""
    return _MODULATION.search(name) is not None


def _towers(text: TextSpec | TextPair, size: int) -> tuple[int, int, list[int]]:
    """Bytes that do not stream, numbers that are multiplied for every token, bytes of each layer that can stream."""
    if isinstance(text, TextSpec):
        numbers = _numbers(shapes_of(lambda: TextTower(text)))
        return _FLOAT32 * numbers, numbers, []
    clip, t5 = shapes_of(lambda: ClipText(text.clip)), shapes_of(lambda: T5Encoder(text.t5))
    layers: dict[str, int] = {}
    for name, shape in t5.items():
        found = _BLOCK.match(name)
        if found is not None and streams(name, shape):
            layers[found[0]] = layers.get(found[0], 0) + prod(shape) * size
    whole = size * (_numbers(clip) + _numbers(t5))
    return whole - sum(layers.values()), _numbers(t5) - prod(t5["shared.weight"]), list(layers.values())


def _numbers(shapes: Shapes) -> int:
    return sum(map(prod, shapes.values()))


@lru_cache(maxsize=8)
def _pixel_flops(spec: AutoencoderSpec, half: str, walked: bool) -> float:
    """Operations of the convolutions of the encoder or the decoder, a pixel of the picture."""
    flops, coarsest = 0.0, len(spec.ch_mult) - 1
    for name, shape in shapes_of(lambda: Autoencoder(spec)).items():
        if not name.startswith(f"{half}.") or len(shape) < 2:
            continue
        level = re.search(r"\.(?:up|down)\.(\d+)\.", name)
        fine = name == "encoder.conv_in.weight" or name == "decoder.conv_out.weight"
        at = int(level[1]) if level else 0 if fine else coarsest
        at += ".downsample." in name  # runs at the next level's resolution
        at -= ".upsample." in name
        flops += 2 * prod(shape) / 4**at * (4 / 9 if walked and _DOUBLED in name else 1)
    return flops


def picture_flops(spec: AutoencoderSpec, stage: str, width: int, height: int, walked: bool = False) -> float:
    """Operations that ``encode`` or ``decode`` takes, with those of the one attention over all cells. ``walked``: see
    :func:`weigh`."""
    cells = width * height / spec.downsampling**2
    attention = 4 * cells**2 * spec.ch * spec.ch_mult[-1]
    return _pixel_flops(spec, {"encode": "encoder", "decode": "decoder"}[stage], walked) * width * height + attention
