"""A component of a checkpoint in another dialect and storage format, streamed, with a report of what that costs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fluxloom.core.specs import AutoencoderSpec, TransformerSpec
from fluxloom.errors import BadInput, WeightsError
from fluxloom.weights.checkpoint import Checkpoint
from fluxloom.weights.dialects import Row, table
from fluxloom.weights.encoders import (
    FORMS,
    KEPT,
    Array,
    Form,
    Shape,
    compact_header,
    is_quantised,
    plain,
    relative_error,
)
from fluxloom.weights.identify import MEMBER, Component
from fluxloom.weights.stream import MODULES, Progress, assemble, is_finite, need_fit
from fluxloom.weights.write import write_gguf, write_safetensors


@dataclass(frozen=True)
class Target:
    """What ``--to`` means: names, form of the matrices inside the blocks, kind of the others and of what has one
    axis (None: floats stay as they are, everything else becomes bfloat16), and the container."""

    names: str
    matrices: str | None = None
    others: str | None = None
    vectors: str | None = None
    container: str = "safetensors"


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "official": Target("official"),
        "diffusers": Target("diffusers"),
        "bf16": Target("official", None, "BF16", "BF16"),
        "fp8": Target("official", "fp8"),
        "int8": Target("official", "int8", "F32", "F32"),  # beside int8 our own files know floats of 16 and 32 bits
        "nf4": Target("official", "nf4"),
        "gguf-q8_0": Target("official", "q8_0", None, "F32", "gguf"),
        "gguf-q4_k": Target("official", "q4_k", None, "F32", "gguf"),
    }
)
SUFFIXES = MappingProxyType({"safetensors": ".safetensors", "gguf": ".gguf"})
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
MARKER = ("scaled_fp8", "F8_E4M3", (0,))  # tells ComfyUI which fp8 it is


@dataclass(frozen=True)
class Report:
    """What was written: bytes, tensors, and what each quantised one lost (RMS of the loss / RMS of the tensor)."""

    path: str
    to: str
    nbytes: int
    tensors: int
    errors: Mapping[str, float]

    def worst(self, count: int = 8) -> dict[str, float]:
        """The tensors that lost the most."""
        return dict(sorted(self.errors.items(), key=lambda item: -item[1])[:count])

    def to_dict(self) -> dict[str, Any]:
        mean = sum(self.errors.values()) / len(self.errors) if self.errors else 0.0
        return {**asdict(self), "mean": mean, "worst": self.worst()}


@dataclass(frozen=True)
class _Step:
    """One of our tensors on its way: what it is written as. ``pieces`` has one entry for each written tensor."""

    name: str
    row: Row | None
    pieces: tuple[tuple[str, Form, list[Array], bool], ...]  # name, form, arrays, quantised


def convert(
    checkpoint: Checkpoint,
    component: Component,
    destination: Path,
    to: str,
    member: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a component to a file, or, in the names of diffusers, to a folder that diffusers loads.

    ``member`` is noted in the file, so that it is known again. Raises BadInput for a target that is none or does not
    fit the component, WeightsError for weights that are damaged, OutputError for a place that cannot be written.
    """
    target = _target(to, component)
    path, folder = _path(destination, target)
    shapes = need_fit(checkpoint, component)
    rows = _rows(component) if target.names == "diffusers" else {}
    steps = [_step(checkpoint, component, name, shape, target, rows.get(name)) for name, shape in shapes.items()]
    plan = [array for step in steps for *_, arrays, _ in step.pieces for array in arrays]
    metadata = {"format": "pt"} if target.container == "safetensors" else {}
    if member is not None:
        metadata[MEMBER] = member
    if target.matrices == "int8":
        metadata["fluxloom"] = compact_header(_compact_rows(steps, shapes))
    errors: dict[str, float] = {}
    tensors: Iterable[Tensor] = _encoded(checkpoint, component, steps, metadata, errors, progress)
    if target.matrices == "fp8":
        plan, tensors = [*plan, MARKER], chain(tensors, [torch.empty(0, dtype=torch.float8_e4m3fn)])
    write = {"safetensors": write_safetensors, "gguf": write_gguf}[target.container]
    write(path, plan, tensors, metadata)
    if folder is not None:
        (folder / "config.json").write_text(json.dumps(_config(component), indent=2) + "\n", "utf-8")
    return Report(str(path), to, path.stat().st_size, len(plan), errors)


def _target(to: str, component: Component) -> Target:
    if to not in TARGETS:
        raise BadInput(f"got --to {to!r}, allowed {', '.join(TARGETS)}, try fp8")
    target = TARGETS[to]
    if component.kind not in MODULES:
        raise BadInput(f"got a {component.kind} to convert, allowed {', '.join(MODULES)}, try --component")
    if target.names == "diffusers" and not isinstance(component.spec, TransformerSpec | AutoencoderSpec):
        raise BadInput(f"got --to diffusers for {component.kind}, whose names are the same there, try --to bf16")
    if target.container == "gguf" and component.kind != "transformer":
        raise BadInput(f"got --to {to} for {component.kind}, allowed for transformers, try --to fp8")
    return target


def _rows(component: Component) -> dict[str, Row]:
    assert isinstance(component.spec, TransformerSpec | AutoencoderSpec)
    return {row.official: row for row in table(component.spec)}


def _path(destination: Path, target: Target) -> tuple[Path, Path | None]:
    """The file to write, and the folder that takes a config.json, where one is made for diffusers."""
    suffix = SUFFIXES[target.container]
    if target.names == "diffusers" and not destination.suffix:
        return destination / DIFFUSERS_FILE, destination
    if destination.suffix != suffix:
        raise BadInput(f"got {destination} to write to, allowed a {suffix} file, try {destination.with_suffix(suffix)}")
    return destination, None


def _step(
    checkpoint: Checkpoint, component: Component, name: str, shape: Shape, target: Target, row: Row | None
) -> _Step:
    """Plan one tensor; cut into those of diffusers first, where ``row`` says so."""
    whole = [(name, shape)]
    if row is not None and row.rows:
        whole = [(part, (rows, *shape[1:])) for part, rows in zip(row.diffusers, row.rows, strict=True)]
    elif row is not None:
        whole = [(row.diffusers[0], shape[:2] if row.layout == "pointwise" else shape)]
    kept = KEPT.get(checkpoint[component.names[name][0]].storage, "BF16")
    pieces = []
    for part, size in whole:
        form = plain((target.vectors if len(size) < 2 else target.others) or kept)
        quantised = target.matrices is not None and is_quantised(name, size, FORMS[target.matrices])
        if target.matrices and quantised:
            form = FORMS[target.matrices]
        pieces.append((part, form, form.arrays(part, size), quantised))
    return _Step(name, row, tuple(pieces))


def _compact_rows(steps: list[_Step], shapes: Mapping[str, Shape]) -> dict[str, tuple[str, Shape]]:
    return {
        part: ("int8" if quantised else "float32", shapes[step.name])
        for step in steps
        for part, _, _, quantised in step.pieces
    }


def _encoded(
    checkpoint: Checkpoint,
    component: Component,
    steps: list[_Step],
    metadata: Mapping[str, str],
    errors: dict[str, float],
    progress: Progress | None,
) -> Iterator[Tensor]:
    """Every array of the plan, in order; what the quantised ones lost goes into ``errors``."""
    for done, step in enumerate(steps, 1):
        tensor = assemble(checkpoint, component, step.name)
        if not is_finite(tensor):
            raise WeightsError(f"got {step.name} with values that are not finite, try fetching the file anew")
        tensors = step.row.to_diffusers(tensor) if step.row else (tensor,)
        for (name, form, arrays, quantised), piece in zip(step.pieces, tensors, strict=True):
            encoded = form.encode(piece)
            if quantised:
                facts = _facts(metadata, name)
                errors[name] = relative_error(piece, arrays, encoded, facts)
            yield from encoded
        if progress:
            progress(done, len(steps))


def _facts(metadata: Mapping[str, str], name: str) -> dict[str, str]:
    """The metadata as a file of this tensor alone would have it."""
    if "fluxloom" not in metadata:
        return {}
    header = json.loads(metadata["fluxloom"])
    return {"fluxloom": json.dumps({**header, "tensors": {name: header["tensors"][name]}})}


def _config(component: Component) -> dict[str, Any]:
    """The config.json by which diffusers builds the module."""
    spec = component.spec
    if isinstance(spec, TransformerSpec):
        return {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": spec.in_channels,
            "out_channels": spec.out_channels,
            "num_layers": spec.depth,
            "num_single_layers": spec.depth_single_blocks,
            "attention_head_dim": spec.head_dim,
            "num_attention_heads": spec.num_heads,
            "joint_attention_dim": spec.context_in_dim,
            "pooled_projection_dim": spec.vec_in_dim,
            "guidance_embeds": spec.guidance_embed,
            "axes_dims_rope": list(spec.axes_dim),
        }
    assert isinstance(spec, AutoencoderSpec)
    levels = len(spec.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [spec.ch * mult for mult in spec.ch_mult],
        "layers_per_block": spec.num_res_blocks,
        "latent_channels": spec.z_channels,
        "norm_num_groups": spec.norm_groups,
        "scaling_factor": spec.scale_factor,
        "shift_factor": spec.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": True,
    }
