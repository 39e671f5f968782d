"""From the tensors of a LoRA file to its canonical form: every key is used, or named with the reason."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fluxloom.core.specs import TransformerSpec
from fluxloom.errors import WeightsError
from fluxloom.weights.lora import (
    Change,
    Decomposed,
    Full,
    Hadamard,
    Kronecker,
    Linear,
    Lora,
    LowRank,
    Part,
    Replacement,
    Update,
    tensor_shapes,
)
from fluxloom.weights.lora_dialects import (
    Key,
    Place,
    dialect_of,
    family_of,
    is_text,
    take_apart,
    why_unknown,
)

State = Mapping[str, Tensor]
_COUNTS = ("alpha", "shape")  # roles that may be integers
_SAME = 0.01  # of its norm: how far a second copy may be from a first, which was rounded to 16 bits
Scale = Callable[[str, int | None, float | None], float]  # (path, rank, alpha's tensor) -> what a product is scaled by
Ranked = Callable[[int | None], float]  # the same for one path


def read_lora(state: State, metadata: Mapping[str, str], spec: TransformerSpec) -> Lora:
    """The LoRA of a file for a transformer of this shape, strictly.

    Raises WeightsError where nothing of it is for this transformer, where a key is unknown or a tensor misshapen (each
    named), and where numbers are not finite. Keys for text encoders are listed in the result, not applied.
    """
    lora = examine(state, metadata, spec)
    if not lora.updates and not lora.misshapen:
        raise WeightsError(_nothing(lora, state))
    for what, found in (("misshapen", lora.misshapen), ("unknown", lora.unmatched)):
        if found:
            raise WeightsError(
                f"got {len(found)} {what} tensors in a LoRA ({_some(found)}), allowed those of this transformer, "
                "try `fluxloom lora inspect` to see which model it is for"
            )
    return lora


def examine(state: State, metadata: Mapping[str, str], spec: TransformerSpec) -> Lora:
    """The same without refusing: what cannot be used is listed in ``unmatched`` and ``misshapen``.

    Raises WeightsError only for numbers that are not finite: nothing can be said about those.
    """
    need_finite(state)
    return arrange(state, metadata, spec)


def arrange(state: State, metadata: Mapping[str, str], spec: TransformerSpec) -> Lora:
    """:func:`examine`, without reading all the numbers."""
    text = [name for name in state if is_text(name)]
    keys = [key for name in state if not is_text(name) and (key := take_apart(name, spec))]
    known = {key.whole for key in keys} | set(text)
    unmatched = [f"{name}: {why_unknown(name, spec)}" for name in state if name not in known]
    builder = _Builder(spec, _scale_rule(metadata))
    for prefix, _ in Counter(key.prefix for key in keys).most_common():
        groups: dict[str, list[Key]] = {}
        for key in keys:
            if key.prefix == prefix:
                groups.setdefault(key.path, []).append(key)
        of_prefix = _Builder(spec, builder.scale)
        for group in groups.values():
            of_prefix.add(group, state)
        builder.join(of_prefix)
    dialect = dialect_of(keys, state, metadata)
    updates = builder.finished()
    first = updates.get("img_in.weight")
    return Lora(
        updates=MappingProxyType(updates),
        spec=spec,
        dialect=dialect.name if dialect else "unknown",
        metadata=MappingProxyType(dict(metadata)),
        in_channels=first.shape[1] if first else None,
        text=tuple(text),
        unmatched=(*unmatched, *builder.unmatched),
        misshapen=tuple(builder.misshapen),
        notes=(*builder.notes, *_notes(metadata)),
        keys=len(state),
    )


@dataclass
class _Builder:
    """Collects parts of updates; what does not fit goes into its lists."""

    spec: TransformerSpec
    scale: Scale
    unmatched: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    updates: dict[str, list[tuple[Part, list[Key]]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, group: list[Key], state: State) -> None:
        """All keys of one path."""
        place, path = group[0].place, group[0].path
        tensors = {key.role: state[key.whole] for key in group}
        used: set[str] = set()
        if len(tensors) < len(group):
            self.unmatched += [f"{key.whole}: there is another of the same meaning" for key in group]
            return
        try:
            if codes := [
                key.whole for key in group if key.role not in _COUNTS and not state[key.whole].is_floating_point()
            ]:
                raise ValueError(f"{codes[0]} holds integers, which are codes of something")
            for kind, change in _changes(tensors, path, place, self.scale, used):
                self._put(place, kind, change, group)
        except (RuntimeError, IndexError, ValueError) as error:  # factors whose sizes do not go together
            names = ", ".join(f"{key.whole} {list(state[key.whole].shape)}" for key in group)
            self.misshapen.append(f"{names}: {str(error).splitlines()[0][:100]}")
            return
        self.unmatched += [f"{key.whole}: it has no counterpart" for key in group if key.role not in used]

    def _put(self, place: Place, kind: str, change: Change, group: list[Key]) -> None:
        norm = f"{place.module}.scale" in tensor_shapes(self.spec)
        name = f"{place.module}.{'scale' if norm and kind == 'weight' else kind}"
        shape = tensor_shapes(self.spec).get(name)
        if shape is None:
            self.unmatched.append(f"{group[0].whole}: this transformer has no {name}")
            return
        start, stop = place.rows or (0, shape[0])
        wanted = (stop - start, *shape[1:])
        first = name == "img_in.weight" and change.shape[:1] == wanted[:1]  # of any width: see Update
        if change.shape != wanted and not first:
            self.misshapen.append(f"{group[0].whole} {list(change.shape)} for {name} {list(wanted)}")
            return
        if first and change.shape != wanted:
            self.notes.append(f"made for {change.shape[1]} input channels, where this transformer has {shape[1]}")
        part = Part(start, stop, change.swapped() if place.swapped else change)
        others = self.updates.setdefault(name, [])
        if _overlap([part], [other for other, _ in others]):
            self.unmatched += [f"{key.whole}: another key changes the same rows" for key in group]
            return
        others.append((part, group))

    def join(self, other: _Builder) -> None:
        """Take in what keys of another prefix say. Some files hold a LoRA twice, in two dialects: what says the same
        once more is left out, and noted; what says something else of the same rows is unmatched."""
        again = 0
        for name, found in other.updates.items():
            mine = self.updates.setdefault(name, [])
            if not _overlap([part for part, _ in found], [part for part, _ in mine]):
                mine += found
                continue
            zero = torch.zeros(other.update(name).shape)
            one, two = self.update(name).delta(zero), other.update(name).delta(zero)
            keys = [key for _, group in found for key in group]
            if one.shape == two.shape and bool((one - two).norm() <= _SAME * one.norm()):
                again += len(keys)
            else:
                self.unmatched += [f"{key.whole}: another key changes the same rows" for key in keys]
        if again:
            self.notes.append(f"{again} tensors say once more, in another dialect, what others say: left out")
        self.unmatched += other.unmatched
        self.misshapen += other.misshapen
        self.notes += other.notes

    def update(self, name: str) -> Update:
        """What was found of one official tensor."""
        parts = sorted((part for part, _ in self.updates[name]), key=lambda part: part.start)
        shape = tensor_shapes(self.spec)[name]
        if name == "img_in.weight":  # of the width that it was made for
            shape = (shape[0], parts[0].change.shape[1])
        return Update(name, shape, tuple(parts))

    def finished(self) -> dict[str, Update]:
        return {name: self.update(name) for name in self.updates}


def _overlap(some: list[Part], others: list[Part]) -> bool:
    return any(one.start < other.stop and other.start < one.stop for one in some for other in others)


def _changes(tensors: State, path: str, place: Place, scale: Scale, used: set[str]) -> list[tuple[str, Change]]:
    """(weight or bias, change) for the tensors of one path; ``used`` takes their roles."""
    alpha = float(tensors["alpha"].float().flatten()[0]) if "alpha" in tensors else None
    out: list[tuple[str, Change]] = []
    for roles, build in _ALGORITHMS:
        if roles <= tensors.keys():
            inner = build(tensors, lambda rank: scale(path, rank, alpha))
            used |= {*roles, "alpha", "shape"}
            if "magnitude" in tensors:
                used.add("magnitude")
                magnitude = _matrix(tensors["magnitude"])
                out.append(("weight", Decomposed(inner, _magnitude(magnitude, inner.shape))))
            else:
                out.append(("weight", inner))
            if "up_bias" in tensors:
                used.add("up_bias")
                out.append(("bias", Full(tensors["up_bias"], scale(path, inner.rank, alpha))))
            break
    for role, kind, make in _PLAIN:
        if role in tensors:
            used.add(role)
            out.append((kind, make(tensors[role])))
    if "value" in tensors and ".norm." in f".{place.module}.":
        used.add("value")
        out.append(("weight", Replacement(tensors["value"])))
    return out


def _low_rank(t: State, scale: Ranked) -> Linear:
    a, b = _matrix(t["down"]), _matrix(t["up"])
    if a.shape[0] != b.shape[1]:
        raise ValueError(f"ranks {a.shape[0]} and {b.shape[1]} differ")
    return LowRank(a, b, scale(a.shape[0]))


def _hadamard(t: State, scale: Ranked) -> Linear:
    a1, b1, a2, b2 = (_matrix(t[role]) for role in ("a1", "b1", "a2", "b2"))
    if a1.shape[1] != b1.shape[0] or a2.shape[1] != b2.shape[0] or a1.shape[0] != a2.shape[0]:
        raise ValueError("factors do not go together")
    return Hadamard(a1, b1, a2, b2, scale(b1.shape[0]))


def _kronecker(t: State, scale: Ranked) -> Linear:
    """alpha / rank counts only where a factor is itself a product; of two, the second one's rank (as LyCORIS). PEFT,
    which keeps the rank in its configuration, counts it always."""
    factors, rank = [], None
    for name in ("w1", "w2"):
        if name in t:
            factors.append(_matrix(t[name]))
        else:
            rank = t[f"{name}_b"].shape[0]
            factors.append(_matrix(t[f"{name}_a"]) @ _matrix(t[f"{name}_b"]))
    return Kronecker(factors[0], factors[1], scale(rank), rank)


# What makes an update, by the roles it needs: the first row that is complete.
_ALGORITHMS: tuple[tuple[set[str], Callable[[State, Ranked], Linear]], ...] = (
    ({"down", "up"}, _low_rank),
    ({"a1", "b1", "a2", "b2"}, _hadamard),
    ({"w1", "w2"}, _kronecker),
    ({"w1", "w2_a", "w2_b"}, _kronecker),
    ({"w1_a", "w1_b", "w2"}, _kronecker),
    ({"w1_a", "w1_b", "w2_a", "w2_b"}, _kronecker),
)
# Changes that one tensor makes by itself: (role, of which tensor, how).
_PLAIN: tuple[tuple[str, str, Callable[[Tensor], Change]], ...] = (
    ("diff", "weight", lambda tensor: Full(_matrix(tensor) if tensor.ndim > 1 else tensor)),
    ("diff_b", "bias", Full),
    ("set", "weight", lambda tensor: Replacement(_matrix(tensor) if tensor.ndim > 1 else tensor)),
)


def _matrix(tensor: Tensor) -> Tensor:
    """A factor without the trailing axes of size one that tools for convolutions keep; fp8 as bfloat16."""
    if tensor.ndim > 2 and tensor[0, 0].numel() != 1:
        raise ValueError(f"shape {list(tensor.shape)} is that of a convolution")
    plain = tensor.flatten(1) if tensor.ndim > 2 else tensor
    return plain.to(torch.bfloat16) if plain.dtype.itemsize < 2 else plain


def _magnitude(magnitude: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[O, 1] or [1, I]; a vector is PEFT's, one number a row."""
    if magnitude.ndim == 1 and magnitude.shape[0] == shape[0]:
        magnitude = magnitude[:, None]
    if tuple(magnitude.shape) not in ((shape[0], 1), (1, shape[1])):
        raise ValueError(f"magnitude {list(magnitude.shape)} of a change {list(shape)}")
    return magnitude


def _scale_rule(metadata: Mapping[str, str]) -> Scale:
    """alpha / rank: alpha from its tensor (0: the rank, as kohya has it), or from PEFT's configuration in the
    metadata (``lora_adapter_metadata``, which for a folder is its adapter_config.json); 1 without either."""
    config = _peft(metadata)

    def configured(path: str, names: tuple[str, ...], patterns: str) -> float:
        own = config.get(patterns) or {}
        match = next((key for key in own if re.match(rf"(.*\.)?({key})$", path)), None)
        value = own[match] if match is not None else next((config[name] for name in names if config.get(name)), 0)
        return float(value)

    def scale(path: str, rank: int | None, alpha: float | None) -> float:
        if alpha is None:
            alpha = configured(path, ("lora_alpha", "alpha"), "alpha_pattern")
            rank = rank or int(configured(path, ("r",), "rank_pattern"))
        if not alpha or not rank:
            return 1.0
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


def _peft(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration of the transformer's adapter: {} where none is kept."""
    try:
        found = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        config = {name.removeprefix("transformer."): value for name, value in found.items() if not is_text(name)}
        for patterns in ("alpha_pattern", "rank_pattern"):
            for key, value in (config.get(patterns) or {}).items():
                re.compile(key)
                float(value)
    except (ValueError, AttributeError, TypeError, re.error) as error:
        raise WeightsError(
            f"got metadata lora_adapter_metadata that cannot be read ({error}), allowed PEFT's configuration as JSON, "
            "try without"
        ) from error
    return config


def _notes(metadata: Mapping[str, str]) -> list[str]:
    if "split_qkv" in metadata.get("ss_network_args", ""):
        return [
            "trained with split_qkv: its alpha was meant for each part, but every reader divides it by the joint rank"
        ]
    return []


def need_finite(state: State) -> None:
    bad = [name for name, tensor in state.items() if tensor.is_complex() or not _is_finite(tensor)]
    if bad:
        raise WeightsError(
            f"got numbers that are not real and finite in {_some(bad)}, allowed real and finite ones, try another LoRA"
        )


def _is_finite(tensor: Tensor) -> bool:
    """A sum over what is not finite is not finite; asked number by number only where a sum of finite ones overflows."""
    plain = tensor if tensor.dtype.itemsize > 1 else tensor.float()
    return bool(plain.sum(dtype=torch.float32).isfinite()) or bool(plain.isfinite().all())


def _nothing(lora: Lora, state: State) -> str:
    family = family_of(state)
    if lora.text and not lora.unmatched:
        found = f"a LoRA for text encoders alone ({len(lora.text)} tensors)"
    elif family:
        found = f"a LoRA for {family}"
    else:
        found = f"no tensor of a LoRA for FLUX.1 ({_some(list(state)) or 'the file is empty'})"
    return f"got {found}, allowed one for the transformer of FLUX.1, try another file"


def _some(found: list[str] | tuple[str, ...], count: int = 5) -> str:
    return ", ".join(found[:count]) + (", ..." if len(found) > count else "")
