"""From the canonical form back to files: LoRAs in another dialect, and LoRAs extracted from two sets of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from fluxloom.core.specs import TransformerSpec
from fluxloom.errors import BadInput, WeightsError
from fluxloom.weights.dialects import table
from fluxloom.weights.lora import (
    Change,
    Decomposed,
    Full,
    Hadamard,
    Kronecker,
    Lora,
    LowRank,
    Part,
    Replacement,
    Update,
    tensor_shapes,
)

# Rows or columns up to which all singular values are computed: a matrix of 12 B members (3,072 and more) would take ten
# seconds. Beyond, so many more directions than asked for are projected on; a test holds what that costs under 0.1 %.
_EXACT = 1024
_MORE = 32


@dataclass(frozen=True)
class Target:
    """A dialect to write: how it names a layer, and its tensors.

    ``split``: fused layers in parts, as diffusers has them; otherwise the parts are joined. ``alpha``: the scale is
    kept as a tensor; otherwise it is multiplied into B.
    """

    prefix: str
    split: bool
    underscores: bool
    down: str
    up: str
    alpha: bool
    replaced: str  # suffix of a norm's new scale


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "diffusers": Target("transformer.", True, False, "lora_A.weight", "lora_B.weight", False, "weight"),
        "kohya": Target("lora_unet_", False, True, "lora_down.weight", "lora_up.weight", True, "set_weight"),
        "official": Target("diffusion_model.", False, False, "lora_A.weight", "lora_B.weight", True, "scale"),
    }
)


def write_lora(lora: Lora, to: str) -> dict[str, Tensor]:
    """The tensors of a LoRA in a dialect of TARGETS. Nothing of it is approximated.

    Raises BadInput for an unknown dialect, WeightsError for a change that the dialect has no form for.
    """
    if to not in TARGETS:
        raise BadInput(f"got dialect {to!r} to write, allowed {', '.join(TARGETS)}, try diffusers")
    target = TARGETS[to]
    names = _paths(lora.spec)
    out: dict[str, Tensor] = {}
    for update in lora.updates.values():
        kind = update.tensor.rpartition(".")[2]
        places = names[update.module] if target.split else ((update.module, None),)
        for path, rows in places:
            change = _of_rows(update, rows) if rows else _joined(update)
            if change is None:
                continue
            if target.split and update.module == "final_layer.adaLN_modulation.1":
                change = change.swapped()
            name = target.prefix + (path.replace(".", "_") if target.underscores else path)
            weight = lora.updates.get(f"{update.module}.weight")
            own = weight is not None and all(isinstance(part.change, LowRank) for part in weight.parts)
            for suffix, tensor in _tensors(change, kind, target, f"{update.tensor} in dialect {to}", own):
                out[f"{name}.{suffix}"] = tensor.contiguous()
    return out


def extract(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], spec: TransformerSpec, rank: int) -> Lora:
    """What turns one transformer into another, as a LoRA: for each matrix the best approximation of a rank (the first
    singular vectors of the difference, Eckart and Young 1936; of large ones by random projections, Halko et al. 2011),
    everything else exactly. Equal tensors are left out.

    Both are official states of ``spec``. Raises BadInput for a rank under 1, WeightsError where nothing differs.
    """
    if rank < 1:
        raise BadInput(f"got rank {rank}, allowed 1 or more, try 16")
    updates = {}
    for name, shape in tensor_shapes(spec).items():
        difference = tuned[name].float() - base[name].float()
        if not bool(difference.any()):
            continue
        change = _low_rank(difference, rank) if difference.ndim == 2 else Full(difference)
        updates[name] = Update(name, shape, (Part(0, shape[0], change),))
    if not updates:
        raise WeightsError("got two sets of weights that are equal, allowed different ones, try another pair")
    return Lora(MappingProxyType(updates), spec, "extracted", keys=len(updates))


def _low_rank(difference: Tensor, rank: int) -> LowRank:
    """Both factors carry the root of the singular values, so that neither outgrows 16-bit numbers."""
    if min(difference.shape) <= max(_EXACT, 4 * rank):
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
    else:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            u, s, right = torch.svd_lowrank(difference, q=rank + _MORE, niter=4)
        v = right.T
    root = s[:rank].sqrt()
    return LowRank(root[:, None] * v[:rank], u[:, :rank] * root)


def _paths(spec: TransformerSpec) -> dict[str, tuple[tuple[str, tuple[int, int] | None], ...]]:
    """Official module: (diffusers path, rows) of each of its parts; rows are None for a whole layer."""
    out: dict[str, tuple[tuple[str, tuple[int, int] | None], ...]] = {}
    for row in table(spec):
        module, _, kind = row.official.rpartition(".")
        if kind == "bias":
            continue
        stops = [sum(row.rows[: i + 1]) for i in range(len(row.rows))]
        cut: list[tuple[int, int] | None] = [(stop - rows, stop) for stop, rows in zip(stops, row.rows, strict=True)]
        cut = cut or [None]
        out[module] = tuple((name.rpartition(".")[0], rows) for name, rows in zip(row.diffusers, cut, strict=True))
    return out


def _of_rows(update: Update, rows: tuple[int, int]) -> Change | None:
    """What an update does to some rows of its tensor; None: nothing."""
    start, stop = rows
    found = [part for part in update.parts if part.start < stop and start < part.stop]
    if not found:
        return None
    if len(found) > 1 or found[0].start > start or found[0].stop < stop:
        raise WeightsError(f"got changes of {update.tensor} that do not end where its parts do, allowed those that do")
    part = found[0]
    return _cut(part.change, start - part.start, stop - part.start, update.tensor)


def _cut(change: Change, start: int, stop: int, name: str) -> Change | None:
    """Rows of a change, without the ranks that have no part in them (a block-diagonal B); None: they are zero."""
    if (start, stop) == (0, change.shape[0]):
        return change
    rows = slice(start, stop)
    if isinstance(change, LowRank):
        used = change.b[rows].any(0)
        return LowRank(change.a[used], change.b[rows][:, used], change.scale) if bool(used.any()) else None
    if isinstance(change, Hadamard):
        return replace(change, a1=change.a1[rows], a2=change.a2[rows])
    if isinstance(change, Kronecker) and start % change.w2.shape[0] == 0 and stop % change.w2.shape[0] == 0:
        return replace(change, w1=change.w1[start // change.w2.shape[0] : stop // change.w2.shape[0]])
    if isinstance(change, Kronecker | Full):
        return Full(change.dense()[rows])
    if isinstance(change, Decomposed) and change.by_row:
        inner = _cut(change.inner, start, stop, name)
        if isinstance(inner, LowRank | Hadamard | Kronecker | Full):
            return Decomposed(inner, change.magnitude[rows])
    raise WeightsError(
        f"got {type(change).__name__} of {name} over several parts, which cannot be taken apart, allowed dialects with "
        "fused layers, try --to official"
    )


def _joined(update: Update) -> Change:
    """All parts of an update as one change of the whole tensor."""
    rows = update.shape[0]
    parts = update.parts
    if len(parts) == 1 and (parts[0].start, parts[0].stop) == (0, rows):
        return parts[0].change
    changes = [part.change for part in parts]
    whole = sum(part.stop - part.start for part in parts) == rows
    if whole and all(isinstance(change, Decomposed) and change.by_row for change in changes):
        inner = _joined(replace(update, parts=tuple(replace(p, change=p.change.inner) for p in parts)))  # type: ignore[attr-defined]
        magnitude = torch.cat([change.magnitude for change in changes])  # type: ignore[attr-defined]
        assert isinstance(inner, LowRank | Full)
        return Decomposed(inner, magnitude)
    if all(isinstance(change, LowRank) for change in changes):
        return _stacked(update)
    if any(isinstance(change, Decomposed | Replacement) for change in changes):
        raise WeightsError(
            f"got magnitudes for parts of {update.tensor}, which have no common form, allowed dialects with split "
            "layers, try --to diffusers"
        )
    return Full(update.delta(torch.zeros(update.shape)))


def _stacked(update: Update) -> LowRank:
    """Low-rank parts as one: A on top of A, B block by block, each with its own scale multiplied in."""
    parts = [(part.start, part.stop, part.change) for part in update.parts if isinstance(part.change, LowRank)]
    a = torch.cat([change.a for _, _, change in parts])
    b = torch.zeros(update.shape[0], a.shape[0], dtype=parts[0][2].b.dtype)
    at = 0
    for start, stop, change in parts:
        scaled = _scaled(change)
        b = b.to(torch.promote_types(b.dtype, scaled.dtype))
        b[start:stop, at : at + change.rank] = scaled
        at += change.rank
    return LowRank(a, b)


def _scaled(change: LowRank) -> Tensor:
    """B times the scale: in its own dtype where that is exact (powers of two), otherwise in float32."""
    exact = torch.frexp(torch.tensor(abs(change.scale))).mantissa == 0.5
    return (change.b if bool(exact) else change.b.float()) * change.scale


def _tensors(change: Change, kind: str, target: Target, what: str, own: bool) -> Iterator[tuple[str, Tensor]]:
    """(suffix, tensor) of one change of a weight, a bias or a scale."""
    if isinstance(change, Replacement):
        yield (target.replaced if kind == "scale" else "set_weight"), change.value
        return
    if kind == "bias":
        peft = own and not target.alpha
        yield "lora_B.bias" if peft else "diff_b", change.delta(torch.zeros(change.shape))
        return
    if isinstance(change, Decomposed):
        row = target.split and change.by_row
        yield ("lora_magnitude_vector", change.magnitude[:, 0]) if row else ("dora_scale", change.magnitude)
        change = change.inner
    writer = _WRITERS.get(type(change))
    if writer is None:
        raise WeightsError(f"got {type(change).__name__} of {what}, which has no form for it, try another dialect")
    yield from writer(change, target)


def _write_low_rank(change: LowRank, target: Target) -> Iterator[tuple[str, Tensor]]:
    yield target.down, change.a
    yield target.up, change.b if target.alpha else _scaled(change)
    if target.alpha:
        yield "alpha", torch.tensor(change.scale * change.rank)


def _write_hadamard(change: Hadamard, _: Target) -> Iterator[tuple[str, Tensor]]:
    yield from zip(
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (change.a1, change.b1, change.a2, change.b2), strict=True
    )
    yield "alpha", torch.tensor(change.scale * change.rank)


def _write_kronecker(change: Kronecker, _: Target) -> Iterator[tuple[str, Tensor]]:
    """With both factors whole, where no reader scales: the scale goes into the first."""
    yield "lokr_w1", change.scale * change.w1.float()
    yield "lokr_w2", change.w2


def _write_full(change: Full, _: Target) -> Iterator[tuple[str, Tensor]]:
    yield "diff", change.dense() if change.scale != 1 else change.diff


_WRITERS: Mapping[type, Callable[..., Iterator[tuple[str, Tensor]]]] = {
    LowRank: _write_low_rank,
    Hadamard: _write_hadamard,
    Kronecker: _write_kronecker,
    Full: _write_full,
}
