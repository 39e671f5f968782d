"""From the files that a reference means to a runtime: what each file is, which member that makes, and its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fluxloom.core.specs import AutoencoderSpec, ClipSpec, ModelSpec, T5Spec, TextPair, TransformerSpec
from fluxloom.errors import WeightsError
from fluxloom.infer.reading import pair_reader
from fluxloom.infer.runtime import Runtime
from fluxloom.weights.adapted import adapter_row, control_lora, load_redux, merge_for_good, need_base
from fluxloom.weights.checkpoint import Checkpoint, open_checkpoint
from fluxloom.weights.hub import PARTS, Located
from fluxloom.weights.identify import Component, choose, identify
from fluxloom.weights.layout import ADAPTER, IMAGES, own_kinds
from fluxloom.weights.lora import Weighted
from fluxloom.weights.shelves import Part
from fluxloom.weights.stream import load_component
from fluxloom.weights.vocabularies import load_vocabulary

Progress = Callable[[str, int, int], None]  # component, tensors done, tensors in all
NEEDED = ("transformer", "autoencoder", "clip", "t5")
_EDGE = 1 << 20  # bytes at either end of a file that stand for it


def assemble(
    located: Located,
    device: torch.device,
    dtype: torch.dtype,
    variant: str | None = None,
    progress: Progress | None = None,
) -> Runtime:
    """Load every component, tensor by tensor, straight to its place; a control LoRA is merged into its base at its
    row's strength, Redux is put beside it.

    Transformer, text encoders and Redux take ``dtype``, the autoencoder float32. Raises WeightsError for what is
    missing or does not fit, BadInput where the files do not tell which member they are and ``variant`` does not either.
    """
    opened = _Opened(located)
    only = located.candidates[0] if len(located.candidates) == 1 else None
    row, lora = _member(opened, variant or only)
    spec = as_found(row, *(opened(kind)[1].spec for kind in NEEDED))

    def told(kind: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(kind, done, total) if progress is not None else None

    def loaded(kind: str) -> nn.Module:
        precision = torch.float32 if kind == "autoencoder" else dtype
        return load_component(*opened(kind), device=device, dtype=precision, progress=told(kind))

    modules: dict[str, Any] = {kind: loaded(kind) for kind in NEEDED}
    if lora is not None:
        merge_for_good(modules["transformer"], lora, told(ADAPTER))
        spec = replace(spec, transformer=modules["transformer"].spec)
    redux = load_redux(opened(IMAGES), opened(ADAPTER), dtype, told(ADAPTER)) if IMAGES in own_kinds(row) else None
    if redux is not None and redux.spec.out_dim != spec.pair.t5.width:
        raise WeightsError(
            f"got an adapter that gives {redux.spec.out_dim} numbers a word beside T5 with {spec.pair.t5.width}, "
            "allowed the same, try another base"
        )
    words = ("clip", located.parts.get("tokenizer")), ("t5", located.parts.get("tokenizer_2"))
    clip_words, t5_words = (load_vocabulary(kind, part.path if part else None) for kind, part in words)
    return Runtime(
        spec=spec,
        transformer=modules["transformer"],
        autoencoder=modules["autoencoder"],
        reader=pair_reader(spec, modules["clip"], modules["t5"], (clip_words, t5_words)),
        content=content(located),
        device=device,
        dtype=dtype,
        redux=redux,
    )


class _Opened:
    """The parts of a model by their kind, each file opened once."""

    def __init__(self, located: Located) -> None:
        self.located = located
        self._files: dict[Path, tuple[Checkpoint, list[Component]]] = {}
        self._need_whole()

    def __call__(self, kind: str) -> tuple[Checkpoint, Component]:
        part = self.located.parts[kind]
        if part.path not in self._files:
            checkpoint = open_checkpoint(part.path)
            self._files[part.path] = checkpoint, identify(checkpoint, part.sha256)
        checkpoint, found = self._files[part.path]
        return checkpoint, _of_kind(kind, found, part)

    def _need_whole(self) -> None:
        parts = self.located.parts
        if missing := [kind for kind in NEEDED if kind not in parts]:
            if ADAPTER in parts:
                adapter_row(self(ADAPTER)[1], None)  # raises for a LoRA that is no member
            raise WeightsError(f"got {self.located.reference!r} without {', '.join(missing)}, try a whole model")


def _member(opened: _Opened, wanted: str | None) -> tuple[ModelSpec, Weighted | None]:
    """The row of what was found, and its LoRA, if it is one."""
    transformer = opened("transformer")[1]
    if ADAPTER not in opened.located.parts:
        return choose(transformer, wanted), None
    row = adapter_row(opened(ADAPTER)[1], wanted)
    need_base(row, transformer.spec, str(opened.located.parts["transformer"].path))
    if row.lora is None:
        return row, None
    (file,) = _weights(opened.located.parts[ADAPTER])
    return row, control_lora(file, row, cast(TransformerSpec, transformer.spec))


def as_found(spec: ModelSpec, transformer: Any, autoencoder: Any, clip: Any, t5: Any) -> ModelSpec:
    """The row with the shapes of the files: pruned and toy members are loaded as they are."""
    return replace(
        spec,
        transformer=cast(TransformerSpec, transformer),
        autoencoder=cast(AutoencoderSpec, autoencoder),
        pair=TextPair(clip=cast(ClipSpec, clip), t5=cast(T5Spec, t5)),
    )


def content(located: Located) -> str:
    """A hash that names the weights: of every part its sha256 where the cache knows it, else its size and both ends.
    Of an adapter two, base+adapter, the first as the base alone has it.

    Reading 34 GB to hash them would take longer than loading them.
    """
    adapted = [kind for kind in (ADAPTER, IMAGES) if kind in located.parts]
    return "+".join(_digest(located, kinds) for kinds in (NEEDED, adapted) if kinds)


def _digest(located: Located, kinds: Sequence[str]) -> str:
    whole = hashlib.sha256()
    for kind in kinds:
        part = located.parts[kind]
        whole.update(f"{kind}:{part.sha256 or ''.join(map(_ends, sorted(_weights(part))))}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def _weights(part: Part) -> list[Path]:
    return [path for path in part.files if path.suffix not in (".json", ".txt", ".model")]


def _ends(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = hashlib.sha256(file.read(_EDGE))
        file.seek(max(0, size - _EDGE))
        ends.update(file.read(_EDGE))
    return f"{size}:{ends.hexdigest()}"


def _of_kind(kind: str, found: list[Component], part: Part) -> Component:
    for component in found:
        if PARTS.get(component.kind, component.kind) == kind:
            return component
    held = ", ".join(component.kind for component in found)
    raise WeightsError(f"got {part.path} with {held}, allowed a file with the {kind}, try another")
