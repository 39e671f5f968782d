"""The forward pass of :class:`fluxloom.core.transformer.Transformer` as one sequence of fused operations.

The same velocity from the same modules, which are asked for their products only; all between them is done by ``ops``
(:mod:`twins`, or the Triton :mod:`kernels`) in as few passes over memory as there can be. Exact savings on top:

- shifts, scales and gates depend on time, guidance and pooled text alone, which are known beforehand: those of all
  steps are computed in one pass over their 3.2 billion weights (of 12), which the steps then do not touch;
- rotations and the first text layer are computed once a request;
- queries, keys and values are normalised and rotated where they lie; text and image never leave their joint buffer;
- of the last block only the tokens to be drawn are computed, and the keys and values of the others.

Legend: B batch, L tokens (text, then image), D width, N heads, T tokens whose velocity is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxloom.core.attention import QKNorm, rope
from fluxloom.core.transformer import DoubleBlock, SingleBlock, Transformer
from fluxloom.infer.executor import Given
from fluxloom.speed import twins
from fluxloom.speed.attention import Attend, backend_for, begun

Hidden = Tensor | twins.Low
_TOGETHER = 64  # vectors whose modulations are computed in one pass; their table of 12 B takes 2 MB each


@dataclass(eq=False)
class Still:
    """What follows from a :class:`Given`, once a request.

    txt     [B, L_txt, D] after the first text layer
    cos     [B, L, D_head / 2] float32, and ``sin``
    table   of each time known so far, all modulations [B, M] in the order of :func:`modulations`
    """

    txt: Tensor
    cos: Tensor
    sin: Tensor
    table: dict[float, Tensor]


class Fused:
    """An executor.

    attend  what attends, q [B, L_q, N, D], k and v [B, L, N, D] to [B, L_q, N D]; by default the best backend there is
    ops     :mod:`twins` or :mod:`kernels`; the latter on a GPU with Triton
    blocks  all blocks in order, each when its weights are where they compute; by default all are
    """

    def __init__(
        self,
        transformer: Transformer,
        attend: Attend | None = None,
        ops: Any = twins,
        blocks: Iterable[nn.Module] | None = None,
    ) -> None:
        self.transformer, self.ops = transformer, ops
        self.attend = attend or backend_for(next(transformer.parameters()), transformer.spec.head_dim)
        form = getattr(transformer.single_blocks[0].linear1, "form", None)
        by = getattr(self.attend, "name", None)
        self.name = ", ".join(["fused", *([f"{by} attention"] if by else []), *([f"{form} linears"] if form else [])])
        self.takes: torch.dtype | None = getattr(self.attend, "takes", None)
        self.lossy = form is not None or getattr(self.attend, "lossy", False)
        self.blocks = (*transformer.double_blocks, *transformer.single_blocks) if blocks is None else blocks
        self._stills: WeakKeyDictionary[Given, Still] = WeakKeyDictionary()

    def __call__(self, img: Tensor, t: Sequence[float], given: Given) -> Tensor:
        still = self.still(given)
        return self.run(img, self.modulated(t, given), still.txt, still.cos, still.sin, given.targets)

    # ------------------------------------------------------------------------------------------------ once a request

    def still(self, given: Given) -> Still:
        """What follows from ``given``, computed when it is first seen."""
        if given not in self._stills:
            spec = self.transformer.spec
            ids = torch.cat((given.txt_ids, given.img_ids), dim=1)
            cos, sin = (angle[:, 0].contiguous() for angle in rope(ids, spec.axes_dim, spec.theta))
            self._stills[given] = Still(self.transformer.txt_in(given.txt), cos, sin, {})
        return self._stills[given]

    def modulated(self, t: Sequence[float], given: Given) -> Tensor:
        """All modulations [B, M] of the members' times; of a time not seen before, with those that are to come."""
        table = self.still(given).table
        if missing := [time for time in dict.fromkeys(t) if time not in table]:
            wanted = list(dict.fromkeys((*missing, *(time for time in given.times if time not in table))))
            # LoRAs of a mixed batch count its members: to them the times come one by one.
            at_once = 1 if given.adapted else max(1, _TOGETHER // len(given.pooled))
            for part in (wanted[i : i + at_once] for i in range(0, len(wanted), at_once)):
                table.update(zip(part, self._modulations(part, given), strict=True))
        if len(set(t)) == 1:
            return table[t[0]]
        return torch.stack([table[time][member] for member, time in enumerate(t)])

    def _modulations(self, times: Sequence[float], given: Given) -> tuple[Tensor, ...]:
        batch, device = len(given.pooled), given.pooled.device
        t = torch.tensor(times, device=device).repeat_interleave(batch)
        guidance = None if given.guidance is None else torch.tensor(given.guidance, device=device).repeat(len(times))
        vec = self.transformer.vector(t, given.pooled.repeat(len(times), 1), guidance)
        return torch.split(modulations(self.transformer, vec), batch)

    # --------------------------------------------------------------------------------------------------- every step

    def run(self, img: Tensor, mods: Tensor, txt: Tensor, cos: Tensor, sin: Tensor, targets: int) -> Tensor:
        """Velocities [B, T, C] of the first ``targets`` image tokens; tensors in, tensors out, as a graph wants it."""
        model, spec = self.transformer, self.transformer.spec
        depth, start = spec.depth, txt.shape[1]
        x = torch.cat((txt, model.img_in(img)), dim=1)  # our own: all blocks write into it
        vectors = _Vectors(mods, spec.hidden_size, depth)
        blocks = iter(self.blocks)
        if depth:
            self._doubles(islice(blocks, depth), x, start, vectors, cos, sin)
        singles = [cast(SingleBlock, block) for block in model.single_blocks]
        h: Hidden = self.ops.modulated(x, *vectors.single(0)[:2], form=form_of(singles[0].linear1))
        for i, block in enumerate(islice(blocks, len(singles) - 1)):
            gate, (shift, scale, _) = vectors.single(i)[2], vectors.single(i + 1)
            added = self._single(cast(SingleBlock, block), h, cos, sin)
            _, h = self.ops.gated(x, added, gate, shift, scale, form=form_of(singles[i + 1].linear1), out=x)
            del added  # or it would lie there beside the next
        drawn = slice(start, start + targets)
        added = self._single(cast(SingleBlock, next(blocks)), h, cos, sin, drawn)
        gate = vectors.single(len(singles) - 1)[2]
        _, h = self.ops.gated(x[:, drawn], added, gate, *vectors.last(len(singles)))
        for _ in blocks:  # whoever lends blocks learns that the last one is no longer needed
            raise AssertionError("more blocks than the model has")
        out: Tensor = model.final_layer.linear(h)
        return out

    def _doubles(
        self, blocks: Iterable[nn.Module], x: Tensor, start: int, vectors: _Vectors, cos: Tensor, sin: Tensor
    ) -> None:
        """All double blocks, on the joint buffer: text in rows before ``start``, image after."""
        ops, heads = self.ops, self.transformer.spec.num_heads
        known = [cast(DoubleBlock, block) for block in self.transformer.double_blocks]
        rows = {"img": slice(start, None), "txt": slice(0, start)}
        joint = self._places(x, x.shape[2])
        if joint is None:
            room = partial(x.new_empty, (*x.shape[:2], heads, x.shape[2] // heads))
            joint = room(dtype=self.takes), room(dtype=self.takes), room()
        hidden: dict[str, Hidden] = {
            side: ops.modulated(x[:, at], *vectors.double(0, side)[:2], form=form_of(_side(known[0], side).qkv))
            for side, at in rows.items()
        }
        for i, one in enumerate(blocks):
            block = cast(DoubleBlock, one)
            for side, at in rows.items():
                layer = _side(block, side)
                ops.placed(
                    layer.qkv(hidden.pop(side)), *_scales(layer.norm), cos[:, at], sin[:, at], heads,
                    out=joint, at=at.start,
                )  # fmt: skip
            attended = self.attend(*joint)
            for side, at in rows.items():
                parts, view = vectors.double(i, side), x[:, at]
                mlp = block.img_mlp if side == "img" else block.txt_mlp
                _, h = ops.gated(
                    view, _side(block, side).proj(attended[:, at]), *parts[2:5], form=form_of(mlp[0]), out=view
                )
                y = mlp[2](self._activated(mlp[0], h, form_of(mlp[2])))
                if i + 1 == len(known):
                    ops.gated(view, y, parts[5], out=view)
                else:
                    form = form_of(_side(known[i + 1], side).qkv)
                    _, hidden[side] = ops.gated(
                        view, y, parts[5], *vectors.double(i + 1, side)[:2], form=form, out=view
                    )

    def _single(self, block: SingleBlock, h: Hidden, cos: Tensor, sin: Tensor, drawn: slice = slice(None)) -> Tensor:
        """What a single block adds, before its gate, to the tokens that are ``drawn``: of all others nothing but keys
        and values is needed."""
        up, width, whole = block.linear1, block.split[0], sum(block.split)
        few = h if drawn == slice(None) else _rows(h, drawn)
        inside: Callable[[], Tensor]
        apart = plain(up) or few is not h or hasattr(self.attend, "begin")  # else one product is better than two
        if apart and not _watched(up):
            qkv, inside = part(up, 0, width, h), partial(part, up, width, whole, few)
        else:
            qkv, hidden = up(h).split(block.split, dim=-1)
            inside = partial(hidden.__getitem__, (slice(None), drawn))
        q, k, v = self._placed(block, qkv, cos, sin)
        return self._mixed(block, (q[:, drawn], k, v), few, inside)

    def _activated(self, layer: nn.Module, h: Hidden, form: twins.Form) -> Hidden:
        """gelu of a layer of the input, in one where it can be."""
        if form is None and plain(layer):
            one: Tensor = self.ops.activated(h, layer.weight, layer.bias)
            return one
        found: Hidden = self.ops.gelu(layer(h), form=form)
        return found

    def _mixed(self, block: SingleBlock, qkv: twins.Three, h: Hidden, hidden: Callable[[], Tensor]) -> Tensor:
        """The last product of a single block, of what was attended to and of the MLP's inside.

        Where attention exchanges something with others, the MLP is computed beside. Of plain layers the first product
        has its gelu in itself, and the last is a sum of two, so that nothing is put side by side; a product of codes
        cannot be added to another where it is made.
        """
        up, down, width = block.linear1, block.linear2, block.split[0]
        attend = begun(self.attend, *qkv)
        if not (plain(up) and plain(down)):
            inside = hidden()
            out: Tensor = down(self.ops.beside(attend()(), inside, form=form_of(down)))
            return out
        active = self.ops.activated(h, up.weight[width:], _bias(up, width))
        attended = attend()
        inner = width // 3
        out = F.linear(active, down.weight[:, inner:], down.bias)
        out.flatten(0, 1).addmm_(attended().flatten(0, 1), down.weight[:, :inner].t())
        return out

    def _placed(self, block: SingleBlock, qkv: Tensor, cos: Tensor, sin: Tensor) -> twins.Three:
        """Queries and keys where they lie, unless attention wants them elsewhere or in another dtype."""
        out: twins.Places | None = self._places(qkv, qkv.shape[2] // 3)
        if out is None and self.takes is not None:
            q, k = (torch.empty_like(x, dtype=self.takes) for x in self.ops.split(qkv, block.heads)[:2])
            out = q, k, None
        placed: twins.Three = self.ops.placed(qkv, *_scales(block.norm), cos, sin, block.heads, out)
        return placed

    def _places(self, like: Tensor, width: int) -> twins.Three | None:
        """Where attention that exchanges queries, keys and values with others wants those of the tokens of ``like``;
        all heads are ``width`` wide."""
        room, heads = getattr(self.attend, "room", None), self.transformer.spec.num_heads
        found: twins.Three | None = room and room(like, heads, width // heads)
        return found


# -------------------------------------------------------------------------------------------------------- modulations


def modulations(transformer: Transformer, vec: Tensor) -> Tensor:
    """All shifts, scales and gates [R, M] of conditioning vectors [R, D], in the order of the forward pass: of each
    double block six for the image and six for the text, of each single block three, and two of the last layer."""
    silu = F.silu(vec)
    return torch.cat([layer(silu) for layer in modulation_layers(transformer)], dim=-1)


def modulation_layers(transformer: Transformer) -> list[nn.Module]:
    """The layers that :func:`modulations` asks, in its order."""
    doubles = [cast(DoubleBlock, block) for block in transformer.double_blocks]
    mods = [mod for block in doubles for mod in (block.img_mod, block.txt_mod)]
    mods += [cast(SingleBlock, block).modulation for block in transformer.single_blocks]
    return [*(mod.lin for mod in mods), transformer.final_layer.adaLN_modulation[1]]


class _Vectors:
    """Views [B, D] of a row of modulations, by block."""

    def __init__(self, mods: Tensor, width: int, depth: int) -> None:
        self.parts: tuple[Tensor, ...] = torch.unbind(mods.unflatten(-1, (-1, width)), 1)
        self.singles = 12 * depth

    def double(self, i: int, side: str) -> Sequence[Tensor]:
        first = 12 * i + (0 if side == "img" else 6)
        return self.parts[first : first + 6]

    def single(self, i: int) -> Sequence[Tensor]:
        return self.parts[self.singles + 3 * i : self.singles + 3 * i + 3]

    def last(self, singles: int) -> Sequence[Tensor]:
        return self.parts[self.singles + 3 * singles :]


# ------------------------------------------------------------------------------------------------------------ modules


def form_of(module: nn.Module) -> twins.Form:
    """The form of 8 bits in which a linear layer takes its input (:class:`linear8.Linear8` says so by ``form``); plain
    where something hangs on it that looks at the input."""
    return None if _watched(module) else getattr(module, "form", None)


def plain(module: nn.Module) -> bool:
    """Whether a layer is its weight and bias and no more."""
    return isinstance(module, nn.Linear) and not _watched(module)


def part(module: nn.Module, start: int, stop: int, h: Hidden) -> Tensor:
    """Columns ``start`` to ``stop`` of what a linear layer gives: only they are computed."""
    if isinstance(module, nn.Linear):
        return F.linear(cast(Tensor, h), module.weight[start:stop], _bias(module, start, stop))
    out: Tensor = cast(Any, module).part(start, stop)(h)
    return out


def _bias(module: nn.Module, start: int, stop: int | None = None) -> Tensor | None:
    """Columns of a bias, if there is one."""
    bias = getattr(module, "bias", None)
    return None if bias is None else cast(Tensor, bias)[start:stop]


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _side(block: DoubleBlock, side: str) -> Any:
    return block.img_attn if side == "img" else block.txt_attn


def _scales(norm: QKNorm) -> tuple[Tensor, Tensor]:
    return norm.query_norm.scale, norm.key_norm.scale


def _rows(h: Hidden, rows: slice) -> Hidden:
    return h[:, rows] if isinstance(h, Tensor) else (h[0][:, rows], h[1][:, rows])
