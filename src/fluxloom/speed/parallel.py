"""Several GPUs for one picture: every rank has all weights and a share of the tokens (context parallelism).

Everything in the model but attention goes token by token. For attention, ranks exchange heads for tokens and back, so
that each attends for all tokens with its part of the heads (DeepSpeed-Ulysses: Jacobs et al. 2023, arXiv:2309.14509).
The numbers are those of one GPU but for the order of sums: attention has no order of keys, and rotations are applied
before, so tokens stay in the order in which they arrive.

Legend: B batch, L tokens, N heads, D head dimension, P ranks; a share is what a rank has of the tokens.
"""

from __future__ import annotations

import atexit
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fluxloom.errors import BadInput, Failure
from fluxloom.infer.executor import Executor, Given
from fluxloom.infer.loras import Rack, ResolvedLora
from fluxloom.infer.runtime import Runtime
from fluxloom.speed.attention import Attend
from fluxloom.speed.direct import Direct
from fluxloom.speed.exchange import Exchange, Shares, heads_each, shares, slices
from fluxloom.speed.team import LOOK, Team

_KEPT = 2  # executors, one for each set of lengths; what a captured one computes in is its own
_TENSORS = ("txt", "txt_ids", "img_ids", "pooled")


class Recorded(Rack):
    """A rack that remembers what it was last asked to hang, so that the racks of other ranks can hang the same."""

    def __init__(self, rack: Rack) -> None:
        super().__init__(rack.transformer, rack.spec)
        self.asked: tuple[Sequence[tuple[ResolvedLora, ...]], tuple[ResolvedLora, ...] | None] = ((), None)

    def hang(self, sets: Sequence[tuple[ResolvedLora, ...]], together: tuple[ResolvedLora, ...] | None = None) -> None:
        super().hang(sets, together)
        self.asked = sets, together


@dataclass(eq=False)
class _Share:
    """What a rank keeps of a :class:`Given`: its own part, who computes it, and how many targets each rank has."""

    given: Given
    targets: Shares
    references: Shares
    inner: Executor


@dataclass(eq=False)
class Spread:
    """An executor on several ranks: each computes the velocities of its share of the target's tokens.

    rack    the LoRAs of this rank's transformer
    attend  what attends, with all tokens and a part of the heads
    make    an executor of this rank's transformer, such as :class:`fluxloom.speed.fused.Fused`, that attends as told
    """

    team: Team
    rack: Recorded
    attend: Attend
    make: Callable[[Attend], Executor]
    name: str = field(init=False)
    lossy: bool = field(init=False)
    _inners: dict[tuple[Shares, Shares], Executor] = field(init=False, default_factory=dict)
    _last: tuple[Given, _Share] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        heads_each(self.rack.spec.transformer.num_heads, self.team.size)
        inner = self.make(self.attend)
        what = "GPUs" if self.team.device.type == "cuda" else "processes"
        self.name, self.lossy = f"{inner.name} on {self.team.size} {what}", inner.lossy

    def __call__(self, img: Tensor, t: Sequence[float], given: Given) -> Tensor:
        """On rank 0. Raises Failure where another rank failed, and BadInput for fewer tokens than ranks."""
        if self.team.left:
            raise Failure(
                "got a picture for GPUs of which one failed before, allowed none that fails, try loading anew"
            )
        known = self._last is not None and self._last[0] is given
        share = self._last[1] if known and self._last is not None else self._share(given)
        try:
            self.team.check()
            self.team.tell(_facts(img, t, None if known else given, self.rack))
            for x in (img, *(() if known else (getattr(given, name) for name in _TENSORS))):
                self._broadcast(x)
            self._last = given, share
            out = self._run(img, t, share)
            behind = _followed(t, given)
            self.team.settle(behind)
            self.team.heard(behind)
        except BaseException as error:  # an interrupt, too: the others are in the middle of an exchange
            cause = self._cause(error)
            del share
            self.team.fail(cause)
            self.forget(error)
            if cause is error:
                raise
            raise cause from error
        return out

    def stop(self) -> None:
        """On rank 0: no more pictures; the others go on after :meth:`serve`."""
        if not self.team.left:
            self.team.tell(None)
            self.team.settle()
        self.forget()

    @torch.inference_mode()
    def serve(self) -> None:
        """On all other ranks: compute shares until rank 0 stops. Raises what goes wrong here or there."""
        while (facts := self.team.hear()) is not None:
            img, t = self._received(facts["img"]), facts["t"]
            if facts["given"] is not None:
                self._take(facts["given"])
            assert self._last is not None
            self._run(img, t, self._last[1])
            self.team.settle(behind=1)
        self.team.settle()
        self.forget()

    # ------------------------------------------------------------------------------------------------ on every rank

    def forget(self, error: BaseException | None = None) -> None:
        """Let go of executors: NCCL waits for ever to end what a CUDA graph still holds (see :meth:`Team.leave`). Those
        that an error came through are in its frames, too."""
        self._inners, self._last = {}, None
        traceback.clear_frames(error.__traceback__ if error else None)
        gc.collect()

    def _share(self, given: Given) -> _Share:
        ranks, own = self.team.size, self.team.rank
        references = given.img_ids.shape[1] - given.targets
        cuts = [shares(tokens, ranks) for tokens in (given.txt.shape[1], given.targets, references)]
        if min(*cuts[0], *cuts[1]) < 1:
            raise BadInput(
                f"got {given.txt.shape[1]} tokens of text and {given.targets} of the picture for {ranks} GPUs, "
                "allowed at least one of each for each, try fewer GPUs"
            )
        text, target, reference = (slices(cut)[own] for cut in cuts)
        mine = replace(
            given,
            txt=given.txt[:, text].contiguous(),
            txt_ids=given.txt_ids[:, text].contiguous(),
            img_ids=torch.cat(
                (given.img_ids[:, : given.targets][:, target], given.img_ids[:, given.targets :][:, reference]), 1
            ),
            targets=cuts[1][own],
        )
        tokens = tuple(map(sum, zip(*cuts, strict=True)))
        return _Share(mine, cuts[1], cuts[2], self._inner(tokens, cuts[1]))

    def _inner(self, tokens: Shares, drawn: Shares) -> Executor:
        """The executor for some lengths; what it captures holds the exchange's."""
        found = self._inners.pop((tokens, drawn), None)
        if found is None:
            form = Direct if self.team.near else Exchange
            found = self.make(form(self.attend, self.team, tokens, drawn))
        self._inners[tokens, drawn] = found
        while len(self._inners) > _KEPT:
            del self._inners[next(iter(self._inners))]
        return found

    def _run(self, img: Tensor, t: Sequence[float], share: _Share) -> Tensor:
        """Velocities [B, targets, C] of all ranks, on each."""
        own, targets = self.team.rank, sum(share.targets)
        parts = ((img[:, :targets], share.targets), (img[:, targets:], share.references))
        mine = torch.cat([x[:, slices(cut)[own]] for x, cut in parts], dim=1)
        out = share.inner(mine, t, share.given)[:, : share.targets[own]]
        most = max(share.targets)  # pieces of one size, the first ranks'
        piece = out.new_zeros(len(out), most, out.shape[2])
        piece[:, : out.shape[1]] = out
        pieces = [torch.empty_like(piece) for _ in share.targets]
        dist.all_gather(pieces, piece, group=self.team.group)
        return torch.cat([x[:, :length] for x, length in zip(pieces, share.targets, strict=True)], dim=1)

    def _broadcast(self, x: Tensor) -> None:
        dist.broadcast(x.contiguous(), 0, group=self.team.group)

    def _received(self, facts: Sequence[Any]) -> Tensor:
        shape, dtype = facts
        x = torch.empty(shape, dtype=getattr(torch, dtype), device=self.team.device)
        dist.broadcast(x, 0, group=self.team.group)
        return x

    def _take(self, facts: dict[str, Any]) -> None:
        """A new :class:`Given`, and its LoRAs onto the modules."""
        tensors = {name: self._received(facts[name]) for name in _TENSORS}
        guidance = None if facts["guidance"] is None else tuple(facts["guidance"])
        given = Given(
            **tensors,
            guidance=guidance,
            targets=facts["targets"],
            times=tuple(facts["times"]),
            adapted=facts["adapted"],
        )
        found = [_lora(one) for one in facts["loras"]]
        sets = [tuple(found[i] for i in numbers) for numbers in facts["sets"]]
        self.rack.hang(sets, None if facts["together"] is None else tuple(found[i] for i in facts["together"]))
        self._last = given, self._share(given)

    def _cause(self, error: BaseException) -> BaseException:
        """What another rank says that it failed of, where one does: a closed connection here is only the echo."""
        if isinstance(error, RuntimeError) and not isinstance(error, Failure):
            try:
                for _ in range(4):  # the word may come a moment after the echo
                    self.team.check()
                    time.sleep(LOOK)
            except RuntimeError as told:
                return told if isinstance(told, Failure) else error
        return error


def spread(runtime: Runtime, team: Team, attend: Attend, make: Callable[[Attend], Executor]) -> Spread:
    """The executor of a runtime over a team; on ranks above 0 this never returns: they serve, and end with rank 0.

    ``attend`` and ``make`` as in :class:`Spread`. Raises BadInput where the heads do not divide.
    """
    runtime.loras = rack = Recorded(runtime.loras)
    found = Spread(team, rack, attend, make)
    if team.rank:
        found.serve()
        team.leave()
        sys.exit(0)

    @atexit.register
    def end() -> None:
        with suppress(RuntimeError):  # a launcher that is gone has nobody to tell
            found.stop()
            team.leave()

    return found


def _followed(t: Sequence[float], given: Given) -> int:
    """1 where another pass is known to follow the one at ``t``, else 0: how many rank 0 need not wait for."""
    return int(t[0] in given.times[:-1])


def _facts(img: Tensor, t: Sequence[float], given: Given | None, rack: Recorded) -> dict[str, Any]:
    """A pass in JSON; numbers survive it to the bit."""
    facts: dict[str, Any] = {"img": _like(img), "t": list(t), "given": None}
    if given is not None:
        sets, together = rack.asked
        loras = list(dict.fromkeys((*(together or ()), *(one for found in sets for one in found))))
        facts["given"] = {
            **{name: _like(getattr(given, name)) for name in _TENSORS},
            "guidance": given.guidance,
            "targets": given.targets,
            "times": given.times,
            "adapted": given.adapted,
            "loras": [{**vars(one), "path": str(one.path.absolute())} for one in loras],
            "sets": [[loras.index(one) for one in found] for found in sets],
            "together": None if together is None else [loras.index(one) for one in together],
        }
    return facts


def _like(x: Tensor) -> tuple[list[int], str]:
    return list(x.shape), str(x.dtype).removeprefix("torch.")


def _lora(facts: dict[str, Any]) -> ResolvedLora:
    blocks = tuple((key, value) for key, value in facts["blocks"])
    return ResolvedLora(**{**facts, "path": Path(facts["path"]), "blocks": blocks})
