"""Adapters that are members themselves, added to a base as it is loaded: control LoRAs, and Redux."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from fluxloom.core.redux import Redux, ReduxSpec
from fluxloom.core.specs import MODELS, ModelSpec, TransformerSpec
from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput, WeightsError
from fluxloom.weights.checkpoint import CONFIG, Checkpoint
from fluxloom.weights.identify import Component, choose
from fluxloom.weights.kinds import AnySpec
from fluxloom.weights.load import Uninitialised
from fluxloom.weights.lora import Update, Weighted, gather, merged
from fluxloom.weights.lora_file import load_lora
from fluxloom.weights.stream import load_into

Opened = tuple[Checkpoint, Component]
Told = Callable[[int, int], None]  # tensors done, tensors in all


def adapter_row(component: Component, variant: str | None) -> ModelSpec:
    """The member that an adapter's file is. Raises BadInput where it is none, or another than ``variant``, or cannot be
    told."""
    if component.kind == "lora" and not component.candidates:
        # Control LoRAs of other tools: their names do not tell, and reading one checks that it fits.
        row = MODELS.get(variant) if variant else None
        if row is None or row.lora is None:
            loras = ", ".join(row.name for row in MODELS.values() if row.lora is not None)
            raise BadInput(
                "got a LoRA that is no model by itself, allowed control LoRAs and Redux, try a whole model with "
                f"--lora FILE; if it is a control LoRA, try --variant {loras}"
            )
        return row
    return choose(component, variant)


def need_base(row: ModelSpec, found: AnySpec | None, place: str) -> None:
    """Raises BadInput where a transformer takes and gives something else than the base of an adapter."""
    assert row.base is not None, "a row of an adapter"
    wanted = MODELS[row.base].transformer
    fields = ("in_channels", "out_channels", "guidance_embed")
    if [getattr(found, name, None) for name in fields] != [getattr(wanted, name) for name in fields]:
        told = ", ".join(f"{name} {getattr(found, name, None)}" for name in fields)
        need = ", ".join(f"{name} {getattr(wanted, name)}" for name in fields)
        raise BadInput(f"got {place} ({told}) as base of {row.name}, allowed {need}, try {row.base}")


# ---------------------------------------------------------------------------------------------- control LoRAs


def control_lora(path: Path, row: ModelSpec, base: TransformerSpec) -> Weighted:
    """A member's LoRA at its strength. Raises WeightsError where it does not fit the base, or reads other channels."""
    assert row.lora is not None, "a row of a LoRA"
    weighted = load_lora(path, base, row.lora)
    found, wanted = weighted.lora.in_channels or base.in_channels, row.transformer.in_channels
    if found != wanted:
        raise WeightsError(
            f"got {path} for {found} input channels as {row.name}, allowed {wanted}, try another --variant, or "
            f"{row.base} with --lora {path.name}"
        )
    return weighted


def merge_for_good(transformer: Transformer, lora: Weighted, told: Told | None = None) -> None:
    """Write a LoRA into plain weights, one tensor at a time: unlike :func:`weights.lora.merge`, which can take it out
    again, without a second copy of them (24 GB of a 12 B member)."""
    wanted = gather([lora])
    plain = dict(transformer.named_parameters())
    for done, (name, updates) in enumerate(wanted.items(), 1):
        weight = plain[name].data
        near = [(_on(update, weight.device), strength) for update, strength in updates]
        plain[name].data = merged(weight, near)
        if told is not None:
            told(done, len(wanted))
    columns = transformer.img_in.weight.shape[1]
    transformer.img_in.in_features = columns
    transformer.spec = replace(transformer.spec, in_channels=columns)


def _on(update: Update, device: torch.device) -> Update:
    """An update whose products are computed where the weights are."""
    parts = tuple(replace(part, change=part.change.map(lambda t: t.to(device))) for part in update.parts)
    return replace(update, parts=parts)


# ---------------------------------------------------------------------------------------------- Redux


def load_redux(tower: Opened, adapter: Opened, dtype: torch.dtype, told: Told | None = None) -> Redux:
    """Vision tower and adapter, each from its own file, as one module on the CPU.

    Raises WeightsError where either is not whole, or where they do not go together.
    """
    spec = redux_spec(tower, adapter)
    checkpoint = Checkpoint({**tower[0], **adapter[0]}, (*tower[0].files, *adapter[0].files), {})
    both = Component(
        kind="redux",
        dialect=adapter[1].dialect,
        prefix="",
        names={**tower[1].names, **adapter[1].names},
        unknown=(*tower[1].unknown, *adapter[1].unknown),
    )
    with Uninitialised(), torch.device("meta"):
        module = Redux(spec)
    load_into(module, checkpoint, both, dtype=dtype, progress=told)
    return module


def redux_spec(tower: Opened, adapter: Opened) -> ReduxSpec:
    """The shape of both, from the tensors' shapes; heads and the pictures' side are also in the tower's configuration,
    and otherwise those of the published tower: heads as wide, patches of the same number."""
    usual, config = ReduxSpec(), _config(tower)
    places, width = _shape(tower, "vision_model.embeddings.position_embedding.weight")
    patch = _shape(tower, "vision_model.embeddings.patch_embedding.weight")[-1]
    layers = {name.split(".")[3] for name in tower[1].names if name.startswith("vision_model.encoder.layers.")}
    side, heads = config.get("image_size"), config.get("num_attention_heads")
    if not isinstance(side, int):
        side = usual.side if (places, patch) == (usual.tokens, usual.patch) else isqrt(places) * patch
    spec = ReduxSpec(
        width=width,
        layers=len(layers),
        heads=heads if isinstance(heads, int) else max(1, width * usual.heads // usual.width),
        mlp=_shape(tower, "vision_model.encoder.layers.0.mlp.fc1.weight")[0],
        patch=patch,
        side=side,
        out_dim=_shape(adapter, "redux_down.weight")[0],
    )
    reads = _shape(adapter, "redux_up.weight")[1]
    if reads != width or width % spec.heads:
        raise WeightsError(
            f"got an adapter that reads {reads} numbers and a tower of {spec.heads} heads that gives {width}, allowed "
            f"the same number, and whole heads, try google/siglip-so400m-patch14-384"
        )
    return spec


def _shape(opened: Opened, name: str) -> tuple[int, ...]:
    checkpoint, component = opened
    sources = component.names.get(name)
    if not sources or len(checkpoint[sources[0]].shape) < 2:
        raise WeightsError(f"got {component.kind} without a matrix {name}, try fetching it anew")
    return checkpoint[sources[0]].shape


def _config(opened: Opened) -> dict[str, Any]:
    """What a tower's folder says that shapes cannot; {} for a file. A whole SigLIP keeps it one level down."""
    checkpoint, component = opened
    folder = next(iter(component.names.values()))[0].rpartition("/")[0]
    try:
        found = json.loads(checkpoint.metadata.get(f"{folder}/{CONFIG}" if folder else CONFIG, "{}"))
        found = found.get("vision_config", found)
    except (ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
