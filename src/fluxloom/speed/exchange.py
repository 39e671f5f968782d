"""Tokens for heads and back: what the ranks of a team send each other about attention.

Each rank has a share of the tokens with all heads, and attends for all tokens with its part of the heads
(DeepSpeed-Ulysses: Jacobs et al. 2023, arXiv:2309.14509). Here by sends and receives, in any group of processes; see
:mod:`direct` for copies into each other's memory.

Legend: B batch, L tokens, N heads, D head dimension, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fluxloom.errors import BadInput
from fluxloom.speed.attention import Attend
from fluxloom.speed.team import Team
from fluxloom.speed.twins import CODES, Three

Shares = tuple[int, ...]  # how many tokens each rank has


def shares(tokens: int, ranks: int) -> Shares:
    """Tokens cut evenly, in order; the first ranks have one more where they do not divide."""
    return tuple((tokens + ranks - 1 - rank) // ranks for rank in range(ranks))


def slices(parts: Sequence[int]) -> list[slice]:
    return [slice(end - part, end) for part, end in zip(parts, accumulate(parts), strict=True)]


def heads_each(heads: int, ranks: int) -> int:
    """How many heads a rank attends for. Raises BadInput where they do not divide."""
    if heads % ranks:
        allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise BadInput(f"got {ranks} GPUs for {heads} heads, allowed {allowed}, try one of them")
    return heads // ranks


@dataclass(frozen=True)
class Exchange:
    """An ``attend`` of shares: q [B, L_q, N, D], k and v [B, L, N, D] of this rank's tokens to [B, L_q, N D] of them.

    attend  of all tokens, with N / P heads
    tokens  all that each rank has
    drawn   of them, those that alone are queries where q is shorter than k (the last block's)
    """

    attend: Attend
    team: Team
    tokens: Shares
    drawn: Shares

    @property
    def takes(self) -> torch.dtype | None:
        """Of queries and keys, where ``attend`` wants another than the values': they are exchanged in it."""
        return getattr(self.attend, "takes", None)

    def room(self, like: Tensor, heads: int, width: int) -> Three:
        """Where queries, keys and values of this rank's tokens are best written, in groups by whose the heads are: each
        [B, L, P, N / P, D], of which :meth:`begin` copies nothing.

        like  [B, ..], of the device and dtype of the values
        heads, width  N and D
        """
        shape = rooms(self.tokens, len(like), heads, width)
        q, k, v = (mine(like.new_empty(shape, dtype=one), self.tokens, self.team.rank) for one in self.dtypes(like))
        return q, k, v

    def dtypes(self, like: Tensor) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of queries, keys and values that are exchanged."""
        takes = self.takes or like.dtype
        return takes, takes, like.dtype

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.begin(q, k, v)()()

    def begin(self, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Callable[[], Tensor]]:
        """In three moves: see :func:`attention.begun`. Each of the tensors may be in a :meth:`room`."""
        queries = self.tokens if q.shape[1] == k.shape[1] else self.drawn
        way = self.way(q, k, v)
        arriving = way.spread((q, k, v), (queries, self.tokens, self.tokens))

        def middle() -> Callable[[], Tensor]:
            attended = self.attend(*arriving())  # [B, all L_q, N / P D]
            home = v.new_empty(*q.shape[:2], self.team.size, attended.shape[2])  # as heads lie
            coming = way.gather(attended, queries, home)

            def end() -> Tensor:
                coming()
                return home.flatten(2)

            return end

        return middle

    def way(self, q: Tensor, k: Tensor, v: Tensor) -> Way:
        """How such tensors are exchanged."""
        return _Messages(self.team)


class Way(Protocol):
    """How tensors get from rank to rank. What is called begins, and gives what ends it."""

    def spread(self, tensors: Sequence[Tensor], lengths: Sequence[Shares]) -> Callable[[], list[Tensor]]:
        """Heads of this rank's tokens, each [B, L, N, D] or as in a room, to whose they are: [B, all L, N / P, D]."""

    def gather(self, attended: Tensor, queries: Shares, home: Tensor) -> Callable[[], object]:
        """[B, all L_q, heads D] of this rank's heads to whose tokens they are; ``home`` [B, L_q, P, heads D]."""


@dataclass(frozen=True)
class _Messages:
    """By sends and receives."""

    team: Team

    def spread(self, tensors: Sequence[Tensor], lengths: Sequence[Shares]) -> Callable[[], list[Tensor]]:
        works, rank, tokens = _Works(self.team), self.team.rank, lengths[1]
        for x, parts in zip(tensors, lengths, strict=True):
            lies = x.ndim == 5 and x.shape[1] == tokens[rank]  # a room, and all of it
            grouped = by_rank(x if x.ndim == 5 else x.unflatten(2, (self.team.size, -1)))
            arrived = about(grouped, tokens, rank) if lies else x.new_empty(sum(parts), *grouped.shape[2:])
            for peer, rows in enumerate(slices(parts)):
                if peer != rank:
                    works.swap(peer, grouped[peer], arrived[rows])
                elif not lies:
                    works.keep(grouped[peer], arrived[rows])
            works.results.append(arrived.transpose(0, 1))
        return works.begin().end

    def gather(self, attended: Tensor, queries: Shares, home: Tensor) -> Callable[[], object]:
        works = _Works(self.team)
        for peer, rows in enumerate(slices(queries)):
            move = works.keep if peer == self.team.rank else partial(works.swap, peer)
            move(attended[:, rows], home[:, :, peer])
        return works.begin().end


def by_rank(x: Tensor) -> Tensor:
    """[B, L, P, N / P, D] to [P, L, B, N / P, D], in which rows are whole; and back."""
    return x.permute(2, 1, 0, 3, 4)


def rooms(tokens: Shares, batch: int, heads: int, width: int) -> tuple[int, ...]:
    """The shape of an :meth:`Exchange.room` in memory: [P, all L, B, N / P, D].

    A rank writes its tokens' rows of all groups; in the group of its own heads the other rows are for what comes.
    """
    return len(tokens), sum(tokens), batch, heads_each(heads, len(tokens)), width


def mine(room: Tensor, tokens: Shares, rank: int) -> Tensor:
    """What a rank writes of its room: [B, L, P, N / P, D]."""
    return by_rank(room[:, slices(tokens)[rank]])


def about(grouped: Tensor, tokens: Shares, rank: int) -> Tensor:
    """The group of a rank's own heads, whole, [all L, B, N / P, D], from what it writes, [P, L, B, N / P, D]."""
    steps = grouped.stride()
    first = grouped.storage_offset() + rank * steps[0] - sum(tokens[:rank]) * steps[1]
    return grouped.as_strided((sum(tokens), *grouped.shape[2:]), steps[1:], first)


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
            copy(own, into)
        self._before.clear()
        return self

    def end(self) -> list[Tensor]:
        """The results, there by the time that work begun from here on needs them."""
        for work in self._works:
            work.wait()
        for came, into in self._after:
            copy(came, into)
        self._steps, self._works, self._after = [], [], []
        return self.results


def copy(x: Tensor, into: Tensor) -> None:
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
