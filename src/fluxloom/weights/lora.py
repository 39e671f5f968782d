"""LoRAs in one canonical form: for each official tensor, what is to be added to it, or to be put in its place.

A change is data: it knows its shape, its dense form and, where it can be had without that, its product with a vector.
It never touches a model; :func:`merge` writes changes into weights (and takes them back), ``infer.adapters`` computes
them beside weights that it leaves alone. A strength s always means W + s (W' - W), several LoRAs add up, and each is
relative to the weights of the base, so that their order does not matter.

Legend: O outputs (rows), I inputs (columns), R rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxloom.core.specs import TransformerSpec
from fluxloom.core.transformer import Transformer
from fluxloom.errors import WeightsError


class Change(Protocol):
    """What happens to some rows of a tensor, at strength one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rows that it changes."""

    @property
    def rank(self) -> int | None:
        """Of a low-rank change; None: it is not one."""

    def delta(self, weight: Tensor) -> Tensor:
        """W' - W, float32, for weights W of this shape."""

    def swapped(self) -> Change:
        """The same with both halves of the rows exchanged: diffusers keeps (scale, shift) of the last layer so."""

    def map(self, f: Callable[[Tensor], Tensor]) -> Change:
        """The same with f applied to its tensors: another device, another dtype."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """scale B A, with A [R, I] and B [O, R] (Hu et al. 2021). ``scale`` is alpha / R, 1 where no alpha is kept."""

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def dense(self) -> Tensor:
        return self.scale * (self.b.float() @ self.a.float())

    def delta(self, weight: Tensor) -> Tensor:
        return self.dense().to(weight.device)

    def apply(self, x: Tensor) -> Tensor:
        """The change of W x, for x [..., I]: [..., O]."""
        return self.scale * F.linear(F.linear(x, self.a), self.b)

    def swapped(self) -> LowRank:
        return replace(self, b=swap_halves(self.b))

    def map(self, f: Callable[[Tensor], Tensor]) -> LowRank:
        return replace(self, a=f(self.a), b=f(self.b))


@dataclass(frozen=True, eq=False)
class Kronecker:
    """scale (w1 x w2), a Kronecker product (LoKr): w1 [O1, I1], w2 [O2, I2], O = O1 O2, I = I1 I2."""

    w1: Tensor
    w2: Tensor
    scale: float = 1.0
    rank: int | None = None  # of its factors, where they are products themselves

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

    def dense(self) -> Tensor:
        return self.scale * torch.kron(self.w1.float().contiguous(), self.w2.float().contiguous())

    def delta(self, weight: Tensor) -> Tensor:
        return self.dense().to(weight.device)

    def apply(self, x: Tensor) -> Tensor:
        """(w1 x w2) x without their product: x as a matrix [I1, I2] becomes w1 x w2^T."""
        folded = x.unflatten(-1, (self.w1.shape[1], self.w2.shape[1]))
        return self.scale * (self.w1 @ F.linear(folded, self.w2)).flatten(-2)

    def swapped(self) -> Full:
        return Full(swap_halves(self.dense()))

    def map(self, f: Callable[[Tensor], Tensor]) -> Kronecker:
        return replace(self, w1=f(self.w1), w2=f(self.w2))


@dataclass(frozen=True, eq=False)
class Hadamard:
    """scale (a1 b1) * (a2 b2), element by element (LoHa): a [O, R], b [R, I]."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.a1.shape[0], self.b1.shape[1]

    @property
    def rank(self) -> int:
        return self.a1.shape[1]

    def dense(self) -> Tensor:
        return self.scale * (self.a1.float() @ self.b1.float()) * (self.a2.float() @ self.b2.float())

    def delta(self, weight: Tensor) -> Tensor:
        return self.dense().to(weight.device)

    def low_rank(self) -> LowRank:
        """The same as a product of rank R1 R2: a row of B holds all products of a row of a1 and a row of a2."""
        b = (self.a1.float()[:, :, None] * self.a2.float()[:, None, :]).flatten(1)
        a = (self.b1.float()[:, None] * self.b2.float()[None]).flatten(0, 1)
        return LowRank(a, b, self.scale)

    def apply(self, x: Tensor) -> Tensor:
        return self.low_rank().apply(x)

    def swapped(self) -> Hadamard:
        return replace(self, a1=swap_halves(self.a1), a2=swap_halves(self.a2))

    def map(self, f: Callable[[Tensor], Tensor]) -> Hadamard:
        return replace(self, a1=f(self.a1), b1=f(self.b1), a2=f(self.a2), b2=f(self.b2))


@dataclass(frozen=True, eq=False)
class Full:
    """A difference in full, of a matrix [O, I] or a vector [O]."""

    diff: Tensor
    scale: float = 1.0
    rank: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.diff.shape)

    def dense(self) -> Tensor:
        return self.scale * self.diff.float()

    def delta(self, weight: Tensor) -> Tensor:
        return self.dense().to(weight.device)

    def apply(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(x, self.diff)

    def swapped(self) -> Full:
        return replace(self, diff=swap_halves(self.diff))

    def map(self, f: Callable[[Tensor], Tensor]) -> Full:
        return replace(self, diff=f(self.diff))


Linear = LowRank | Kronecker | Hadamard | Full  # changes that do not ask what the weights are


@dataclass(frozen=True, eq=False)
class Decomposed:
    """W' = m (W + D) / |W + D| (DoRA, Liu et al. 2024): direction and magnitude apart.

    The shape of ``magnitude`` tells the axis of the norm: [O, 1] one for each row (PEFT, and LyCORIS with wd_on_out),
    [1, I] one for each column (kohya, OneTrainer). The norm is that of W + D, as both are trained.
    """

    inner: Linear
    magnitude: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def by_row(self) -> bool:
        return self.magnitude.shape[1] == 1

    def factor(self, weight: Tensor) -> Tensor:
        """m / |W + D|, [O, 1] or [1, I]; 1 where a row or column is zero and nothing can be scaled."""
        norm = (weight.float() + self.inner.delta(weight)).norm(dim=1 if self.by_row else 0, keepdim=True)
        return torch.where(norm > 0, self.magnitude.float().to(weight.device) / norm, 1.0)

    def delta(self, weight: Tensor) -> Tensor:
        return self.factor(weight) * (weight.float() + self.inner.delta(weight)) - weight.float()

    def swapped(self) -> Decomposed:
        return Decomposed(self.inner.swapped(), swap_halves(self.magnitude) if self.by_row else self.magnitude)

    def map(self, f: Callable[[Tensor], Tensor]) -> Decomposed:
        return Decomposed(self.inner.map(f), f(self.magnitude))


@dataclass(frozen=True, eq=False)
class Replacement:
    """A tensor that takes the place of another, whole and whatever the strength, unless that is 0: so the official
    code treats the query and key scales of a control LoRA."""

    value: Tensor
    rank: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def delta(self, weight: Tensor) -> Tensor:
        return self.value.float().to(weight.device) - weight.float()

    def swapped(self) -> Replacement:
        return replace(self, value=swap_halves(self.value))

    def map(self, f: Callable[[Tensor], Tensor]) -> Replacement:
        return replace(self, value=f(self.value))


@dataclass(frozen=True, eq=False)
class Part:
    """A change of rows [start, stop) of a tensor: all of it, or one of those that an official layer fuses."""

    start: int
    stop: int
    change: Change


@dataclass(frozen=True, eq=False)
class Update:
    """All that a LoRA does to one official tensor. ``shape`` is that of the tensor it was made for; the first layer
    of the base may be narrower (a control LoRA on dev) or wider (a dev LoRA on Fill): the rest is zero."""

    tensor: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def delta(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """What to add to a weight of this shape, float32."""
        out = torch.zeros(self.shape, dtype=torch.float32, device=weight.device)
        for part in self.parts:
            one = 1.0 if isinstance(part.change, Replacement) and strength else strength
            out[part.start : part.stop] += one * part.change.delta(weight[part.start : part.stop])
        return out

    def apply(self, x: Tensor) -> Tensor:
        """The change [..., O] of W x at strength one, of parts that do not depend on W. Raises TypeError for others."""
        out = x.new_zeros(*x.shape[:-1], self.shape[0])
        for part in self.parts:
            if not isinstance(part.change, Linear):
                raise TypeError(f"got {type(part.change).__name__} of {self.tensor}, which depends on the weight")
            out[..., part.start : part.stop] += part.change.apply(x)
        return out

    @property
    def module(self) -> str:
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA for transformers of one shape.

    updates    by official tensor name
    dialect    how its file wrote it, a row of ``lora_dialects.DIALECTS``
    in_channels  columns of the first layer that it was made for, None: it does not touch that layer
    text       keys for text encoders: known as such, not applied
    unmatched  keys that nothing here knows, with the reason
    misshapen  keys whose tensors do not fit the transformer, with both shapes
    notes      what its user should know
    """

    updates: Mapping[str, Update]
    spec: TransformerSpec
    dialect: str
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    in_channels: int | None = None
    text: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    keys: int = 0

    @property
    def ranks(self) -> dict[int, int]:
        """Rank: how many changes have it."""
        found: dict[int, int] = {}
        for _, part in self.parts():
            if part.change.rank is not None:
                found[part.change.rank] = found.get(part.change.rank, 0) + 1
        return dict(sorted(found.items()))

    def parts(self) -> Iterator[tuple[Update, Part]]:
        for update in self.updates.values():
            for part in update.parts:
                yield update, part


Blocks = Mapping[str | int, float]


@dataclass(frozen=True, eq=False)
class Weighted:
    """A LoRA and how strongly it counts. ``blocks`` scales that for some places: a key is a regular expression that
    is searched for in official tensor names, or the number of a block (double blocks first, then single ones: 0 to
    56 in a 12 B member); of several that match, the last one counts."""

    lora: Lora
    weight: float = 1.0
    blocks: Blocks = field(default_factory=lambda: MappingProxyType({}))

    def strength(self, tensor: str) -> float:
        factor = 1.0
        block = block_number(tensor, self.lora.spec)
        for key, value in self.blocks.items():
            if key == block if isinstance(key, int) else re.search(key, tensor):
                factor = value
        return self.weight * factor


def block_number(tensor: str, spec: TransformerSpec) -> int | None:
    """The number of the block that a tensor belongs to, double blocks first; None outside of the blocks."""
    found = re.match(r"(double|single)_blocks\.(\d+)\.", tensor)
    return None if found is None else int(found[2]) + (spec.depth if found[1] == "single" else 0)


def is_zero(change: Change) -> bool:
    """Whether a change adds nothing, told by its factors."""
    factors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        factors.append(tensor)
        return tensor

    change.map(keep)
    return isinstance(change, Linear) and (change.scale == 0 or not all(bool(factor.any()) for factor in factors))


def swap_halves(tensor: Tensor) -> Tensor:
    """The second half of the rows, then the first."""
    return torch.cat(tensor.chunk(2)[::-1])


def widen(weight: Tensor, columns: int) -> Tensor:
    """A weight [O, I] of a first layer for more input channels, which count for nothing until a LoRA says otherwise."""
    return F.pad(weight, (0, columns - weight.shape[1])) if columns > weight.shape[1] else weight


@lru_cache(maxsize=8)
def tensor_shapes(spec: TransformerSpec) -> Mapping[str, tuple[int, ...]]:
    """Official name: shape, of every tensor of a transformer."""
    with torch.device("meta"):
        state = Transformer(spec).state_dict()
    return MappingProxyType({name: tuple(tensor.shape) for name, tensor in state.items()})


def gather(loras: Sequence[Weighted]) -> dict[str, list[tuple[Update, float]]]:
    """Official tensor name: the updates of it that count, with their strengths."""
    out: dict[str, list[tuple[Update, float]]] = {}
    for one in loras:
        for tensor, update in one.lora.updates.items():
            strength = one.strength(tensor)
            if strength:
                out.setdefault(tensor, []).append((update, strength))
    return out


def merged(weight: Tensor, updates: Sequence[tuple[Update, float]]) -> Tensor:
    """A tensor with updates written into it, summed in float32, in its own dtype; widened if one of them asks."""
    base = weight
    if weight.ndim == 2:
        base = widen(weight, max(update.shape[1] for update, _ in updates))
    total = base.float().clone()
    for update, strength in updates:
        columns = (slice(None), slice(0, update.shape[1])) if weight.ndim == 2 else (slice(None),)
        total[columns] += update.delta(base[columns], strength)
    return total.to(weight.dtype)


def merge(transformer: Transformer, loras: Sequence[Weighted]) -> Callable[[], None]:
    """Write LoRAs into the weights of a transformer, in place. Returns what takes them out again, exactly: the
    original tensors are kept for that. A control LoRA widens the first layer, and ``transformer.spec`` says so.

    Raises WeightsError where weights are stored in a form that cannot be written to.
    """
    wanted = gather(loras)
    plain = dict(transformer.named_parameters())
    stored = [name for name in wanted if name not in plain or not plain[name].is_floating_point()]
    if stored:
        raise WeightsError(
            f"got {len(stored)} tensors to merge into that are not plain floating-point weights ({stored[0]}, ...), "
            "allowed float32, bfloat16 or float16, try applying the LoRA beside them instead"
        )
    originals = {name: plain[name].data for name in wanted}
    spec = transformer.spec

    def write(tensors: Mapping[str, Tensor], described: TransformerSpec) -> None:
        for name, tensor in tensors.items():
            plain[name].data = tensor
        transformer.spec = described
        transformer.img_in.in_features = described.in_channels

    results = {name: merged(originals[name], updates) for name, updates in wanted.items()}
    first = results.get("img_in.weight", transformer.img_in.weight)
    write(results, replace(spec, in_channels=first.shape[1]))
    return lambda: write(originals, spec)


@torch.no_grad()
def dense_weight(module: nn.Module, columns: int) -> Tensor:
    """The weight [O, I], float32, of a linear layer in whatever form it is stored: read where it lies as numbers, and
    otherwise found by what the layer makes of unit vectors."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2 and weight.shape[1] == columns:
        return weight.detach().float()
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), torch.zeros(1))
    bias = getattr(module, "bias", None)
    units = torch.eye(columns, device=like.device, dtype=like.dtype if like.dtype.itemsize > 1 else torch.bfloat16)
    out: Tensor = module.forward(units)
    return (out - bias if isinstance(bias, Tensor) else out).float().T
