"""What ``fluxloom info`` tells about a checkpoint: facts as plain values, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from math import prod
from typing import Any

from fluxloom.core.specs import MODELS
from fluxloom.weights.checkpoint import Checkpoint
from fluxloom.weights.identify import Component, identify
from fluxloom.weights.layout import IMAGES

HASH_BYTES = 1 << 30  # a second or two; larger files are hashed only when asked
_TEXTS = 200  # letters of a metadata value that are shown
# What a picture takes besides a transformer, and what each part is called.
_NEEDED = {"t5": "the T5 encoder", "clip": "the CLIP text encoder", "autoencoder": "the autoencoder"}


def describe(checkpoint: Checkpoint, sha256: str | None = None) -> dict[str, Any]:
    """Files, components, formats, candidates and what would run it. Raises WeightsError for other models."""
    parts = identify(checkpoint, sha256)
    size = sum(path.stat().st_size for path in checkpoint.files)
    return {
        "files": [str(path) for path in checkpoint.files],
        "size": f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB",
        "bytes": size,
        "sha256": sha256,
        "components": [_component(part, checkpoint) for part in parts],
        "runs": runs(parts),
        "metadata": {
            name: _short(text) for name, text in checkpoint.metadata.items() if not name.startswith(("_", "fluxloom"))
        },
        **({"lora": _lora(checkpoint)} if any(part.kind == "lora" for part in parts) else {}),
    }


def components(checkpoint: Checkpoint, sha256: str | None = None) -> list[dict[str, Any]]:
    """What each component is. Raises WeightsError for other models."""
    return [_component(part, checkpoint) for part in identify(checkpoint, sha256)]


def _lora(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the doctor says without a base to measure on."""
    from fluxloom.weights.lora_doctor import diagnose

    state = {name: entry.read() for name, entry in checkpoint.items()}
    return diagnose(state, checkpoint.metadata, names=[path.name for path in checkpoint.files]).to_dict()


def _component(part: Component, checkpoint: Checkpoint) -> dict[str, Any]:
    names = [name for group in part.names.values() for name in group]
    entries = [checkpoint[name] for name in names if name in checkpoint]
    missing = [name for name in names if name not in checkpoint]
    numbers: Counter[str] = Counter()
    for entry in entries:
        numbers[entry.storage] += prod(entry.shape)
    total = numbers.total()
    told = part.candidates and len(part.candidates) == 1
    return {
        "kind": part.kind,
        "member": part.candidates[0] if told else None,
        "candidates": None if told else list(part.candidates),
        "told by": part.basis if part.candidates else None,
        "dialect": part.dialect,
        "prefix": part.prefix,
        "parameters": total,
        "tensors": len(entries),
        "bytes": sum(entry.nbytes for entry in entries),
        "formats": {form: f"{count / total:.1%}" for form, count in numbers.most_common()} if total else {},
        "missing": missing[:8],
        "unknown": list(part.unknown[:8]),
        "shape": _shape(part.spec),
    }


def runs(parts: Sequence[Component], held: Collection[str] = ()) -> str:
    """One line: what can be done with it, and what is still needed for that besides the parts that are ``held``."""
    kinds = {part.kind: part for part in parts}
    faulty = [part.kind for part in parts if part.unknown]
    if faulty:
        return f"nothing: its {faulty[0]} has tensors that belong to no FLUX.1 {faulty[0]}"
    adapter = kinds.get("lora") or kinds.get("redux")
    if "transformer" in kinds:
        part = kinds["transformer"]
        rows = [MODELS[name] for name in part.candidates]
        wanted = {"text": "its text tower", "autoencoder": "its autoencoder"} if any(r.text for r in rows) else _NEEDED
        needed = [what for kind, what in wanted.items() if kind not in {*kinds, *held}]
        return _told(part, needed, "one of the members that it was pruned from")
    if adapter is not None and adapter.candidates:
        base = MODELS[adapter.candidates[0]].base
        needed = [] if "transformer" in held else [f"its base {base}, which loading it fetches or --base names"]
        if adapter.kind == "redux" and not {"siglip", IMAGES} & {*kinds, *held}:
            needed.append("the image encoder")
        return _told(adapter, needed, "one of the adapters")
    if adapter is not None:
        return "a LoRA: `fluxloom lora inspect` says for which base"
    return f"{', '.join(kinds)}: beside {'Redux' if 'siglip' in kinds else 'a transformer'}"


def _told(part: Component, needed: Sequence[str], otherwise: str) -> str:
    rest = f"; with {', '.join(needed)}" if needed else ""
    if len(part.candidates) == 1:
        return f"{' and '.join(MODELS[part.candidates[0]].tasks)}, as {part.candidates[0]}{rest}"
    return f"give it --variant: {' or '.join(part.candidates) or otherwise}{rest}"


def _shape(spec: Any) -> dict[str, Any] | None:
    """A spec as plain values, without fitted numbers (``rgb_map``)."""
    if spec is None:
        return None
    shown = [item.name for item in fields(spec) if item.repr]
    return {name: value for name, value in asdict(spec).items() if name in shown}


def _short(text: str) -> str:
    return text if len(text) <= _TEXTS else f"{text[:_TEXTS]}... ({len(text)} letters)"


def member(name: str) -> Mapping[str, Any]:
    """The row of a member by its name, as plain values."""
    row = MODELS[name]
    source = row.source
    return {
        "member": name,
        "title": row.title,
        "licence": row.licence,
        "repository": source.repo if source else None,
        "file": source.file if source else None,
        "sha256": source.sha256 if source else None,
        "gated": f"accept its terms at {source.page}" if source and source.gated else None,
        "base": row.base,
        "tasks": {task: asdict(defaults) for task, defaults in row.tasks.items()},
        "shape": asdict(row.transformer),
    }
