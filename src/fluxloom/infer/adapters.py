"""LoRAs beside a transformer: its weights stay as they are, in whatever form they are stored.

:func:`attach` hangs hooks on the layers that LoRAs change; each adds what they make of the layer's input to its output.
All low-rank updates of a layer become one pair of matrices, however many LoRAs there are. Nothing else knows of this:
the transformer's own code has no branches for it, and :meth:`Attached.detach` leaves no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fluxloom.core.specs import TransformerSpec
from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput
from fluxloom.weights.lora import (
    Change,
    Decomposed,
    Full,
    Hadamard,
    Linear,
    Lora,
    LowRank,
    Update,
    Weighted,
    dense_weight,
    merged,
    tensor_shapes,
)

# Where a product of two low-rank factors (LoHa) would be wider than this, its dense form costs less.
_WIDEST = 1024
_NORM = ".scale"  # how the names of tensors end that are no part of a linear layer


@dataclass
class Attached:
    """LoRAs at work on a transformer, until :meth:`detach` or the end of a ``with`` block."""

    transformer: Transformer
    count: int
    shares: Tensor | None = field(default=None, init=False)
    _handles: list[RemovableHandle] = field(default_factory=list, init=False, repr=False)
    _originals: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list, init=False, repr=False)
    _spec: TransformerSpec | None = field(default=None, init=False, repr=False)

    def share(self, shares: Tensor | None) -> None:
        """From the next forward pass on, how much of each LoRA each member of the batch gets: [B, LoRAs], factors of
        their strengths; None: all of it. So requests with different LoRAs, or with none, share a pass.

        Raises BadInput for another number of LoRAs, and where one exchanges norms, which a batch has in common.
        """
        if shares is not None and (shares.ndim != 2 or shares.shape[1] != self.count):
            raise BadInput(f"got shares of shape {list(shares.shape)}, allowed [batch, {self.count}], try one a LoRA")
        if shares is not None and self._originals:
            raise BadInput(
                "got a LoRA that exchanges norms for a part of a batch, allowed for all of it, try passes of its own"
            )
        self.shares = shares

    def detach(self) -> None:
        """Take everything off again, exactly. Doing so twice is no mistake."""
        for handle in self._handles:
            handle.remove()
        for parameter, original in self._originals:
            parameter.data = original
        if self._spec is not None:
            self.transformer.spec = self._spec
        self._handles, self._originals, self._spec = [], [], None

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


@torch.no_grad()
def attach(transformer: Transformer, loras: Sequence[Weighted]) -> Attached:
    """Let LoRAs act on a transformer beside its weights; where they compute, they come to the device and dtype of the
    input. All LoRAs of a run are attached together: each is relative to the base alone.

    A control LoRA makes the first layer take the channels it was made for, and ``transformer.spec`` say so. The few
    numbers that are no matrices (scales of norms) are exchanged for the time being, and put back by ``detach``.
    """
    attached = Attached(transformer, len(loras))
    shapes = tensor_shapes(transformer.spec)
    layers: dict[str, _Layer] = {}
    norms: dict[str, list[tuple[Update, float]]] = {}
    for number, one in enumerate(loras):
        for tensor, update in one.lora.updates.items():
            strength = one.strength(tensor)
            if not strength:
                continue
            if tensor.endswith(_NORM):
                norms.setdefault(tensor, []).append((update, strength))
                continue
            path = update.module
            if path not in layers:
                layers[path] = _Layer(attached, transformer.get_submodule(path), shapes[f"{path}.weight"])
            layers[path].add(update, strength, number)
    try:
        for layer in layers.values():
            layer.hang()
        for tensor, updates in norms.items():
            parameter = transformer.get_parameter(tensor)
            attached._originals.append((parameter, parameter.data))
            parameter.data = merged(parameter.data, updates)
    except BaseException:  # out of memory, interrupted: half a LoRA is none
        attached.detach()
        raise
    return attached


def exchanges_norms(lora: Lora) -> bool:
    """Whether a LoRA changes scales of norms, which all members of a batch have in common."""
    return any(tensor.endswith(_NORM) for tensor in lora.updates)


class _Term(Protocol):
    """A change of some rows that is no plain low-rank one."""

    def to(self, like: Tensor) -> None: ...

    def __call__(self, x: Tensor, plain: Tensor) -> Tensor:
        """From a layer's input and the base's output without bias, of these rows."""


class _Layer:
    """What is added to the output of one linear layer; ``number`` is everywhere that of a LoRA."""

    def __init__(self, attached: Attached, module: nn.Module, shape: tuple[int, ...]) -> None:
        self.attached, self.module = attached, module
        self.rows, self.columns = shape
        self.wider = self.columns
        self.low: list[tuple[int, int, LowRank, int]] = []
        self.terms: list[tuple[int, int, _Term, int]] = []
        self.biases: list[tuple[Tensor, int]] = []
        self.pair: tuple[Tensor, Tensor] | None = None
        self.owners: list[int] = []
        self.place: tuple[torch.device, torch.dtype] | None = None
        self.seen: Tensor | None = None

    def add(self, update: Update, strength: float, number: int) -> None:
        if update.tensor.endswith(".bias"):
            self.biases.append((update.delta(torch.zeros(update.shape), strength), number))
            return
        self.wider = max(self.wider, update.shape[1])
        for part in update.parts:
            self._add(part.start, part.stop, part.change, strength, number)

    def _add(self, start: int, stop: int, change: Change, strength: float, number: int) -> None:
        if isinstance(change, Hadamard):
            low = change.low_rank()
            change = low if low.rank <= _WIDEST else Full(change.dense())
        if isinstance(change, LowRank):
            self.low.append((start, stop, replace(change, scale=change.scale * strength), number))
        elif isinstance(change, Linear):
            self.terms.append((start, stop, _Plain(replace(change, scale=change.scale * strength)), number))
        else:
            whole = F.pad(dense_weight(self.module, self.columns), (0, self.wider - self.columns))
            weight = whole[start:stop, : change.shape[1]]
            if isinstance(change, Decomposed):
                term: _Term = _Dora(change, weight, strength, self, slice(start, stop))
            else:  # a weight put in the place of another, whatever the strength: its difference
                term = _Plain(Full(change.delta(weight)))
            self.terms.append((start, stop, term, number))

    def hang(self) -> None:
        """All low-rank changes become one pair A [R, I], B [O, R]; then the hooks go on."""
        if self.low:
            total = sum(change.rank for _, _, change, _ in self.low)
            a, b = torch.zeros(total, self.wider), torch.zeros(self.rows, total)
            for start, stop, change, number in self.low:
                ranks = slice(len(self.owners), len(self.owners) + change.rank)
                a[ranks, : change.a.shape[1]] = change.a.float()
                b[start:stop, ranks] = change.scale * change.b.float()
                self.owners += [number] * change.rank
            self.pair, self.low = (a, b), []
        handles, attached = self.attached._handles, self.attached
        if self.wider > self.columns:
            handles.append(self.module.register_forward_pre_hook(self.narrow))
            attached._spec = attached.transformer.spec
            attached.transformer.spec = replace(attached._spec, in_channels=self.wider)
        handles.append(self.module.register_forward_hook(self))

    def narrow(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the layer: keep its whole input, and hand it the channels that it knows."""
        self.seen = args[0]
        return (args[0][..., : self.columns], *args[1:])

    def settle(self, x: Tensor) -> None:
        """Everything to where the layer computes, once."""
        self.place = (x.device, x.dtype)
        if self.pair is not None:
            self.pair = (self.pair[0].to(x), self.pair[1].to(x))
        self.biases = [(bias.to(x), number) for bias, number in self.biases]
        for _, _, term, _ in self.terms:
            term.to(x)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        x: Tensor = args[0]
        if self.seen is not None:
            x, self.seen = self.seen, None
        if self.place != (x.device, x.dtype):
            self.settle(x)
        shares = self.attached.shares

        def share(numbers: list[int]) -> Tensor | float:
            """[B, 1, ..., numbers]: the factors of some LoRAs."""
            if shares is None:
                return 1.0
            return shares[:, numbers].to(x).view(x.shape[0], *[1] * (x.ndim - 2), len(numbers))

        total = out
        if self.pair is not None:
            inner = F.linear(x, self.pair[0])
            if shares is not None:
                inner = inner * share(self.owners)
            flat = torch.addmm(out.reshape(-1, self.rows), inner.reshape(-1, inner.shape[-1]), self.pair[1].T)
            total = flat.view_as(out)
        if self.terms:
            added = torch.zeros_like(out)
            plain = without_bias(module, out)
            for start, stop, term, number in self.terms:
                added[..., start:stop] += share([number]) * term(x, plain[..., start:stop])
            total = total + added
        for bias, number in self.biases:
            total = total + share([number]) * bias
        return total


def without_bias(module: nn.Module, out: Tensor) -> Tensor:
    """The output of a linear layer less its bias, where it has one."""
    bias = getattr(module, "bias", None)
    return out - bias if isinstance(bias, Tensor) else out


class _Plain:
    """A change that does not ask what the weights are."""

    def __init__(self, change: Linear) -> None:
        self.change = change

    def to(self, like: Tensor) -> None:
        self.change = self.change.map(lambda tensor: tensor.to(like))

    def __call__(self, x: Tensor, plain: Tensor) -> Tensor:
        return self.change.apply(x[..., : self.change.shape[1]])


class _Dora:
    """s (W' - W) x with W' = c (W + D), c the factor of each row, or of each column: then W ((c - 1) x) is asked of
    the base by a second pass through the layer."""

    def __init__(self, change: Decomposed, weight: Tensor, strength: float, layer: _Layer, rows: slice) -> None:
        self.inner, self.by_row, self.strength = change.inner, change.by_row, strength
        self.layer, self.rows = layer, rows
        factor = change.factor(weight).flatten()
        self.factor, self.less = factor, factor - 1  # before anything is rounded to 16 bits

    def to(self, like: Tensor) -> None:
        self.inner = self.inner.map(lambda tensor: tensor.to(like))
        self.factor, self.less = self.factor.to(like), self.less.to(like)

    def __call__(self, x: Tensor, plain: Tensor) -> Tensor:
        x = x[..., : self.inner.shape[1]]
        if self.by_row:
            found = self.less * plain + self.factor * self.inner.apply(x)
        else:
            module = self.layer.module
            again = module.forward((x * self.less)[..., : self.layer.columns])
            found = without_bias(module, again)[..., self.rows] + self.inner.apply(x * self.factor)
        out: Tensor = self.strength * found
        return out
