"""LoRA files on the disk, and the transformers that they are measured on, merged into or extracted from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fluxloom.core.specs import MODELS, TransformerSpec
from fluxloom.errors import BadInput, UnknownModel, WeightsError
from fluxloom.weights.checkpoint import Checkpoint, open_checkpoint
from fluxloom.weights.encoders import KEPT
from fluxloom.weights.identify import MEMBER, Component, identify
from fluxloom.weights.load import (
    ASSETS,
    CARD,
    VOCABULARY,
    content_hash,
    digest,
    load_folder,
    part,
    read_card,
    save_card,
    save_compact,
)
from fluxloom.weights.lora import Blocks, Update, Weighted, gather, is_zero, merged, tensor_shapes
from fluxloom.weights.lora_read import read_lora
from fluxloom.weights.stream import assemble, need_fit
from fluxloom.weights.write import write_safetensors

# What a folder with a LoRA calls it: PEFT, and diffusers.
NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
CONFIG = "adapter_config.json"
_CONFIG_BYTES = 1 << 20
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_KINDS = {dtype: kind for kind, dtype in _DTYPES.items()}

Updates = Mapping[str, list[tuple[Update, float]]]


def held(folder: Path) -> Path | None:
    """The LoRA in a folder as PEFT and diffusers save it."""
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def open_lora(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a LoRA: a .safetensors file, or a folder as PEFT and diffusers save it, whose
    adapter_config.json becomes metadata ``lora_adapter_metadata``.

    Raises BadInput where there is none, WeightsError for a file that cannot be read (a pickle is not).
    """
    path = Path(path)
    folder = path if path.is_dir() else None
    file = held(folder) if folder else path
    if file is None:
        raise BadInput(f"got {path}, a folder without a LoRA, allowed {' or '.join(NAMES)} in it, try the file itself")
    if not file.is_file():
        raise BadInput(f"got {str(path)!r}, which is not there, allowed a .safetensors file, try another path")
    checkpoint = open_checkpoint(file)
    metadata = dict(checkpoint.metadata)
    config = file.parent / CONFIG
    if file.name == NAMES[0] and config.is_file() and config.stat().st_size <= _CONFIG_BYTES:
        metadata.setdefault("lora_adapter_metadata", config.read_text("utf-8", "replace"))
    return {name: entry.read() for name, entry in checkpoint.items()}, metadata


def load_lora(path: Path | str, spec: TransformerSpec, weight: float = 1.0, blocks: Blocks | None = None) -> Weighted:
    """A LoRA for a transformer of this shape, ready to be merged into it or attached to it.

    Raises what :func:`open_lora` and :func:`lora_read.read_lora` raise, and WeightsError for one without any effect.
    """
    lora = read_lora(*open_lora(path), spec)
    if all(is_zero(part.change) for _, part in lora.parts()):
        raise WeightsError(f"got {path}, a LoRA without effect: all of it is zero, allowed a trained one, try another")
    return Weighted(lora, weight, MappingProxyType(dict(blocks or {})))


def save_lora(state: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str]) -> Path:
    """Write tensors as a .safetensors file: whole, or not at all. Raises BadInput for another ending, OutputError where
    the place cannot be written to."""
    path = _named(Path(path))
    whole = {name: tensor if tensor.dtype in _KINDS else tensor.float() for name, tensor in state.items()}
    plan = [(name, _KINDS[tensor.dtype], tuple(tensor.shape)) for name, tensor in whole.items()]
    write_safetensors(path, plan, whole.values(), metadata)
    return path


@dataclass(frozen=True)
class Base:
    """A transformer on the disk.

    state    official tensors; of a checkpoint each is read when it is asked for, every time
    kinds    of a checkpoint: in which of safetensors' number formats each tensor is written again
    folder   of a model folder, as nano's; None: of a checkpoint
    member   the member that it is, where that is known
    """

    spec: TransformerSpec
    state: Mapping[str, Tensor]
    kinds: Mapping[str, str]
    folder: Path | None
    member: str | None


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a component, read one by one."""

    def __init__(self, checkpoint: Checkpoint, component: Component) -> None:
        self.checkpoint, self.component = checkpoint, component

    def __getitem__(self, name: str) -> Tensor:
        return assemble(self.checkpoint, self.component, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.component.names)

    def __len__(self) -> int:
        return len(self.component.names)


def open_base(reference: str) -> Base:
    """The transformer of an embedded model, a model folder, or a checkpoint in any form that can be read.

    Raises UnknownModel for anything else, WeightsError for what cannot be read or is not whole.
    """
    embedded = reference in MODELS and MODELS[reference].embedded
    folder = ASSETS / reference if embedded else Path(reference)
    if (folder / CARD).is_file():
        name = read_card(folder)["model"]
        if name not in MODELS:
            raise UnknownModel(f"got a folder of {name!r}, allowed {', '.join(MODELS)}, try nano")
        state = part(load_folder(folder), "transformer")
        return Base(MODELS[name].transformer, state, dict.fromkeys(state, "F16"), folder, name)
    if not folder.exists():
        raise UnknownModel(f"got {reference!r}, allowed nano, a model folder or a checkpoint file, try nano")
    checkpoint = open_checkpoint(folder)
    found = next((one for one in identify(checkpoint) if one.kind == "transformer"), None)
    if found is None or not isinstance(found.spec, TransformerSpec):
        raise WeightsError(f"got {reference} without a transformer, allowed a checkpoint of FLUX.1, try another")
    need_fit(checkpoint, found)
    kinds = {name: KEPT.get(checkpoint[sources[0]].storage, "BF16") for name, sources in found.names.items()}
    member = found.candidates[0] if len(found.candidates) == 1 else None
    return Base(found.spec, _Tensors(checkpoint, found), kinds, None, member)


def merge_files(base: Base, loras: Sequence[Weighted], files: Sequence[Path], out: Path) -> Path:
    """Write a base with LoRAs merged into it, and what was merged in its metadata; returns what was written.

    A model folder becomes a model folder of float16 (other modules as they were), or a file if ``out`` is one; a
    checkpoint an official .safetensors file, tensor by tensor, in its own number formats (bfloat16 for quantised ones).
    """
    told = [
        {"file": file.name, "sha256": lora_digest(file), "weight": one.weight}
        for file, one in zip(files, loras, strict=True)
    ]
    wanted = gather(loras)
    columns = max([base.spec.in_channels, *(update.shape[1] for update, _ in wanted.get("img_in.weight", ()))])
    if base.folder is None or out.suffix:
        _merge_file(base, wanted, columns, told, _named(out))
        return out
    if columns != base.spec.in_channels:
        raise BadInput(f"got a control LoRA for {base.folder}, whose card has no row for it, try a checkpoint")
    card = read_card(base.folder)
    whole = {name: tensor for name, tensor in load_folder(base.folder).items() if not name.startswith("transformer.")}
    for name, tensor in base.state.items():
        whole[f"transformer.{name}"] = merged(tensor, wanted[name]) if name in wanted else tensor
    save_compact(whole, out, default="float16")
    if (base.folder / VOCABULARY).is_file():
        shutil.copyfile(base.folder / VOCABULARY, out / VOCABULARY)
    save_card(out, card["model"], {"base": content_hash(card["files"]), "merged": told})
    return out


def _merge_file(base: Base, wanted: Updates, columns: int, told: list[dict[str, Any]], out: Path) -> None:
    shapes = {**tensor_shapes(base.spec), "img_in.weight": (base.spec.hidden_size, columns)}
    plan = [(name, base.kinds[name], shapes[name]) for name in base.state]

    def tensors() -> Iterator[Tensor]:
        for name in base.state:
            tensor = base.state[name]
            yield (merged(tensor, wanted[name]) if name in wanted else tensor).to(_DTYPES[base.kinds[name]])

    known = {MEMBER: base.member} if base.member and columns == base.spec.in_channels else {}
    write_safetensors(out, plan, tensors(), {"format": "pt", "merged": json.dumps(told), **known})


def lora_digest(path: Path) -> str:
    """sha256 of a LoRA's file, for receipts."""
    return digest((held(path) or path) if path.is_dir() else path)


def _named(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise BadInput(
            f"got {path.name!r} to write to, allowed names that end in .safetensors, try {path.stem}.safetensors"
        )
    return path
