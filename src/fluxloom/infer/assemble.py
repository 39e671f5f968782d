"""From the files that a reference means to a runtime: what each file is, which member that makes, and its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fluxloom.core.specs import AutoencoderSpec, ClipSpec, ModelSpec, T5Spec, TextPair, TransformerSpec
from fluxloom.errors import BadInput, WeightsError
from fluxloom.infer.reading import pair_reader
from fluxloom.infer.runtime import Runtime
from fluxloom.weights.checkpoint import Checkpoint, open_checkpoint
from fluxloom.weights.hub import Located
from fluxloom.weights.identify import Component, choose, identify
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
    """Load every component, tensor by tensor, straight to its place.

    Transformer and text encoders take ``dtype``, the autoencoder float32. Raises WeightsError for what is missing or
    does not fit, BadInput where the files do not tell which member they are and ``variant`` does not either.
    """
    _refuse_adapters(located)
    opened: dict[Path, tuple[Checkpoint, list[Component]]] = {}

    def component(kind: str) -> tuple[Checkpoint, Component]:
        part = located.parts[kind]
        if part.path not in opened:
            checkpoint = open_checkpoint(part.path)
            opened[part.path] = checkpoint, identify(checkpoint, part.sha256)
        checkpoint, found = opened[part.path]
        return checkpoint, _of_kind(kind, found, part)

    only = located.candidates[0] if len(located.candidates) == 1 else None
    spec = choose(component("transformer")[1], variant or only)
    spec = as_found(spec, *(component(kind)[1].spec for kind in NEEDED))

    def loaded(kind: str) -> nn.Module:
        def told(done: int, total: int) -> None:
            if progress is not None:
                progress(kind, done, total)

        precision = torch.float32 if kind == "autoencoder" else dtype
        return load_component(*component(kind), device=device, dtype=precision, progress=told)

    modules: dict[str, Any] = {kind: loaded(kind) for kind in NEEDED}
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
    )


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

    Reading 34 GB to hash them would take longer than loading them.
    """
    whole = hashlib.sha256()
    for kind in NEEDED:
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
        if component.kind == kind:
            return component
    held = ", ".join(component.kind for component in found)
    raise WeightsError(f"got {part.path} with {held}, allowed a file with the {kind}, try another")


def _refuse_adapters(located: Located) -> None:
    if "adapter" in located.parts:
        raise BadInput(
            f"got {located.reference!r}, which is an adapter and no model by itself, allowed whole models, try its base"
        )
    missing = [kind for kind in NEEDED if kind not in located.parts]
    if missing:
        raise WeightsError(f"got {located.reference!r} without {', '.join(missing)}, try a whole model")
