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
from functools import partial
from itertools import accumulate
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
from fluxloom.speed.team import LOOK, Team
from fluxloom.speed.twins import CODES

_KEPT = 2  # executors, one for each set of lengths; what a captured one computes in is its own

Shares = tuple[int, ...]  # how many tokens each rank has


def shares(tokens: int, ranks: int) -> Shares:
    """Tokens cut evenly, in order; the first ranks have one more where they do not divide."""
    return tuple((tokens + ranks - 1 - rank) // ranks for rank in range(ranks))


def _slices(parts: Sequence[int]) -> list[slice]:
    return [slice(end - part, end) for part, end in zip(parts, accumulate(parts), strict=True)]


# ---------------------------------------------------------------------------------------------------- the exchange


def heads_each(heads: int, ranks: int, chunks: int = 1) -> int:
    """How many heads a rank attends for at once. Raises BadInput where they do not divide."""
    if heads % (ranks * chunks):
        allowed = ", ".join(str(n) for n in range(1, heads // chunks + 1) if heads % (n * chunks) == 0)
        parts = f" in {chunks} parts each" if chunks > 1 else ""
        raise BadInput(f"got {ranks} GPUs for {heads} heads{parts}, allowed {allowed}, try one of them")
    return heads // (ranks * chunks)


@dataclass(frozen=True)
class Exchange:
    """An ``attend`` of shares: q [B, L_q, N, D], k and v [B, L, N, D] of this rank's tokens to [B, L_q, N D] of them.

    attend  of all tokens, with N / P heads
    tokens  all that each rank has
    drawn   of them, those that alone are queries where q is shorter than k (the last block's)
    chunks  parts of the heads: while one is attended for, the next is exchanged
    """

    attend: Attend
    team: Team
    tokens: Shares
    drawn: Shares
    chunks: int = 1

    @property
    def takes(self) -> torch.dtype | None:
        """Of queries and keys, where ``attend`` wants another than the values': they are exchanged in it."""
        return getattr(self.attend, "takes", None)

    def room(self, like: Tensor, heads: int, width: int, dtype: torch.dtype | None = None) -> Tensor | None:
        """Where queries, keys or values of this rank's tokens are best written, in groups by whose the heads are: [B,
        L, P, N / P, D], of which :meth:`begin` copies nothing. None where ranks have different numbers of tokens, or
        heads are exchanged in parts.

        In memory these are P (P - 1) + 1 slots of [L, B, N / P, D]. Every P-th is a group; about this rank's own there
        is room for the same heads from the others, in the order of tokens:

            rank 0 of 2:  group 0 | came from 1 | group 1
            rank 1 of 2:  group 0 | came from 0 | group 1
        """
        ranks, length = self.team.size, self.tokens[0]
        if self.chunks > 1 or len(set(self.tokens)) > 1:
            return None
        shape = (length, len(like), heads_each(heads, ranks), width)
        slots = like.new_empty(ranks * (ranks - 1) + 1, *shape, dtype=dtype)
        return slots[::ranks].permute(2, 1, 0, 3, 4)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.begin(q, k, v)()()

    def begin(self, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Callable[[], Tensor]]:
        """In three moves: see :func:`attention.begun`. Each of the tensors may be in a :meth:`room`."""
        queries = self.tokens if q.shape[1] == k.shape[1] else self.drawn
        parts = self.team.size, self.chunks
        home = v.new_empty(*q.shape[:2], *parts, q[0, 0].numel() // (parts[0] * parts[1]))  # as heads lie
        going = [self._spread((q, k, v), (queries, self.tokens, self.tokens), chunk) for chunk in range(self.chunks)]

        def middle() -> Callable[[], Tensor]:
            chunks = enumerate(going)
            coming = [self._gather(self.attend(*works.end()), queries, home[:, :, :, i]) for i, works in chunks]

            def end() -> Tensor:
                for works in coming:
                    works.end()
                return home.flatten(2)

            return end

        return middle

    def _spread(self, tensors: Sequence[Tensor], lengths: Sequence[Shares], chunk: int) -> _Works:
        """Send heads of this rank's tokens to whose they are; [B, all L, N / P, D] are under way."""
        works, rank = _Works(self.team), self.team.rank
        for x, parts in zip(tensors, lengths, strict=True):
            lies = x.ndim == 5 and x.shape[1] == self.tokens[rank]  # a room, and all of it
            grouped = x if x.ndim == 5 else x.unflatten(2, (self.team.size, self.chunks, -1))[:, :, :, chunk]
            by_rank = grouped.permute(2, 1, 0, 3, 4)  # [P, L, B, N / P, D]: tokens first, so that rows are whole
            arrived = _about(by_rank, rank) if lies else x.new_empty(sum(parts), *by_rank.shape[2:])
            for peer, rows in enumerate(_slices(parts)):
                if peer != rank:
                    works.swap(peer, by_rank[peer], arrived[rows])
                elif not lies:
                    works.keep(by_rank[peer], arrived[rows])
            works.results.append(arrived.transpose(0, 1))
        return works.begin()

    def _gather(self, attended: Tensor, queries: Shares, home: Tensor) -> _Works:
        """Send [B, all L_q, heads D] of this rank's heads to whose tokens they are; ``home`` [B, L_q, P, heads D]."""
        works = _Works(self.team)
        for peer, rows in enumerate(_slices(queries)):
            move = works.keep if peer == self.team.rank else partial(works.swap, peer)
            move(attended[:, rows], home[:, :, peer])
        return works.begin()


def _about(groups: Tensor, rank: int) -> Tensor:
    """Of the groups [P, L, B, N / P, D] in a room, all that lies about those of this rank: [all L, B, N / P, D]."""
    (ranks, length), steps = groups.shape[:2], groups.stride()
    first = groups.storage_offset() + rank * (ranks - 1) * steps[0] // ranks
    return groups.as_strided((ranks * length, *groups.shape[2:]), steps[1:], first)


class _Works:
    """Sends and receives that go as one: on NCCL one kernel, beside whatever the GPU does next."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.results: list[Tensor] = []
        self._steps: list[dist.P2POp] = []
        self._works: list[dist.Work] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self._after: list[tuple[Tensor, Tensor]] = []

    def keep(self, own: Tensor, into: Tensor) -> None:
        """What stays here, copied while the others' is under way."""
        self._before.append((own, into))

    def swap(self, peer: int, out: Tensor, into: Tensor) -> None:
        """A tensor for another of the same kind. All ranks swap in the same order, so tags agree."""
        came = into
        if not into.is_contiguous():
            came = into.new_empty(into.shape)
            self._after.append((came, into))
        tag = sum(step.peer == peer for step in self._steps) // 2
        for act, x in ((dist.isend, out.contiguous()), (dist.irecv, came)):
            plain = x.view(torch.uint8) if x.dtype == CODES else x  # not every backend knows codes
            self._steps.append(dist.P2POp(act, plain, peer, self.team.group, tag))

    def begin(self) -> _Works:
        self._works = dist.batch_isend_irecv(self._steps)
        for own, into in self._before:
            _copy(own, into)
        self._before.clear()
        return self

    def end(self) -> list[Tensor]:
        """The results, there by the time that work begun from here on needs them."""
        for work in self._works:
            work.wait()
        for came, into in self._after:
            _copy(came, into)
        self._steps, self._works, self._after = [], [], []
        return self.results


def _copy(x: Tensor, into: Tensor) -> None:
    """In words of 8 bytes, where both are made of them: of strided tensors a GPU copies so many numbers a second,
    whatever their size."""
    whole = all(
        n * x.element_size() % 8 == 0
        for one in (x, into)
        for n in (one.storage_offset(), one.shape[-1], *one.stride()[:-1])
    )
    if whole and x.stride(-1) == into.stride(-1) == 1:
        x, into = x.view(torch.int64), into.view(torch.int64)
    into.copy_(x)


# ---------------------------------------------------------------------------------------------------- the executor

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
    chunks  of an :class:`Exchange`
    """

    team: Team
    rack: Recorded
    attend: Attend
    make: Callable[[Attend], Executor]
    chunks: int = 1
    name: str = field(init=False)
    lossy: bool = field(init=False)
    _inners: dict[tuple[Shares, Shares], Executor] = field(init=False, default_factory=dict)
    _last: tuple[Given, _Share] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        heads_each(self.rack.spec.transformer.num_heads, self.team.size, self.chunks)
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
        text, target, reference = (_slices(cut)[own] for cut in cuts)
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
            found = self.make(Exchange(self.attend, self.team, tokens, drawn, self.chunks))
        self._inners[tokens, drawn] = found
        while len(self._inners) > _KEPT:
            del self._inners[next(iter(self._inners))]
        return found

    def _run(self, img: Tensor, t: Sequence[float], share: _Share) -> Tensor:
        """Velocities [B, targets, C] of all ranks, on each."""
        own, targets = self.team.rank, sum(share.targets)
        parts = ((img[:, :targets], share.targets), (img[:, targets:], share.references))
        mine = torch.cat([x[:, _slices(cut)[own]] for x, cut in parts], dim=1)
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
