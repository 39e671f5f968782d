"""TAEF1, a distilled decoder for previews, from the files in which it is published."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from fluxloom.core.specs import TinyDecoderSpec
from fluxloom.core.tiny_decoder import TinyDecoder
from fluxloom.errors import WeightsError
from fluxloom.weights.checkpoint import open_checkpoint
from fluxloom.weights.identify import Component
from fluxloom.weights.load import Uninitialised
from fluxloom.weights.stream import load_into

_TRY = "try taef1_decoder.safetensors or the folder's diffusion_pytorch_model.safetensors of madebyollin/taef1"
_PLAIN = re.compile(r"(\d{1,3})\.(.+)")
_OF = {4: "Stable Diffusion 1, 2 or XL", 32: "FLUX.2"}  # latent channels -> whose they are


def load_tiny_decoder(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TinyDecoder:
    """TAEF1 from a safetensors file, or the folder of one: of diffusers, where an encoder lies beside it, or of its
    author, where the file is the decoder alone. Raises WeightsError for anything else.

    TAESD3 has the very same shape, and no file says which it is: it gives wrong colours.
    """
    spec = TinyDecoderSpec()
    checkpoint = open_checkpoint(path)
    names = _names(checkpoint)
    shape = checkpoint[names["layers.0.weight"]].shape if "layers.0.weight" in names else ()
    if len(shape) != 4:
        some = ", ".join([*checkpoint][:3]) or "no tensors at all"
        raise WeightsError(f"got {path}, which is no decoder for previews ({some}), allowed TAEF1's, {_TRY}")
    if shape[1] != spec.z_channels:
        whose = f", those of {_OF[shape[1]]}" if shape[1] in _OF else ""
        raise WeightsError(
            f"got {path}, a decoder of {shape[1]} latent channels{whose}, allowed {spec.z_channels}, {_TRY}"
        )
    used = set(names.values())
    component = Component(
        kind="tiny decoder",
        dialect="plain" if "1.weight" in used else "diffusers",
        prefix="",
        names={ours: (theirs,) for ours, theirs in names.items()},
        unknown=tuple(name for name in checkpoint if name not in used and not name.startswith("encoder.")),
    )
    with Uninitialised(), torch.device("meta"):
        module = TinyDecoder(spec)
    load_into(module, checkpoint, component, device, dtype)
    return module


def _names(theirs: Iterable[str]) -> dict[str, str]:
    """Our names -> those of a file, in either layout. Where the author's files count the clamp as layer 0, those of
    diffusers do not: layer 1 there is layer 0 here."""
    found = {}
    for name in theirs:
        if name.startswith("decoder.layers."):
            found[name.removeprefix("decoder.")] = name
        elif (match := _PLAIN.fullmatch(name)) and int(match[1]) > 0:
            found[f"layers.{int(match[1]) - 1}.{match[2]}"] = name
    return found
