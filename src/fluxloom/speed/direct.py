"""The exchange of heads and tokens as copies into the memory of the other ranks, beside what they compute.

A kernel that exchanges, such as NCCL's, takes multiprocessors from the product beside it, or waits until it is over;
copy engines take none. So each rank writes to where the others will read, and then a word that says so; before it
reads itself, it looks for the others' words. Needs one host, and GPUs that see each other's memory: PyTorch's symmetric
memory. Processes on a processor map each other's files, and do the same.

Nobody asks whether there is room yet. Who sends the heads of a block has got all tokens of the block before, so that
all have attended there and are through with the heads that they got; who sends tokens has got all heads of this block,
which were sent by ranks that are through with the tokens of the block before.

Legend as in :mod:`exchange`.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fluxloom.speed.exchange import Exchange, Shares, Way, by_rank, copy, mine, rooms, slices
from fluxloom.speed.flat import starts
from fluxloom.speed.ops import available
from fluxloom.speed.recipe import SpeedWarning
from fluxloom.speed.team import Team
from fluxloom.speed.twins import Three

_HEADS, _TOKENS = range(2)  # what words are about

Shapes = Sequence[tuple[Sequence[int], torch.dtype]]
Moves = Sequence[tuple[Tensor, Tensor]]  # from where, in one's own memory, to where in another's


@dataclass(frozen=True, eq=False)
class _Places:
    """What lies where in the memory of a rank.

    words  [2, P] int32: 1 where heads, and tokens, have come from a rank and were not yet read
    rooms  of queries, keys and values, [P, all L, B, N / P, D]: see :func:`exchange.rooms`
    drawn  [all drawn, B, N / P, D]: queries of the last block
    came   [P, B L N / P D]: of this rank's tokens, what others attended for
    """

    words: Tensor
    rooms: tuple[Tensor, Tensor, Tensor]
    drawn: Tensor
    came: Tensor


@dataclass(frozen=True)
class Direct(Exchange):
    """An exchange for ranks of one host.

    What was not written to a :meth:`room` is exchanged like any other; so is all, where memory cannot be seen.
    """

    _known: dict[tuple[object, ...], _Copies | None] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def room(self, like: Tensor, heads: int, width: int) -> Three:
        batch, dtypes = len(like), self.dtypes(like)
        key = batch, heads // self.team.size, width, *dtypes
        if key not in self._known:
            each = rooms(self.tokens, batch, heads, width)
            most = prod((max(self.tokens), *each[2:]))
            shapes = [
                ((2, self.team.size), torch.int32), *((each, dtype) for dtype in dtypes),
                ((sum(self.drawn), *each[2:]), dtypes[0]), ((self.team.size, most), dtypes[2]),
            ]  # fmt: skip
            memory = seen(self.team, _starts(shapes)[-1])
            self._known[key] = (
                None if memory is None else _Copies(self.team.rank, memory, [_places(one, shapes) for one in memory.of])
            )
        known = self._known[key]
        if known is None:
            return super().room(like, heads, width)
        q, k, v = (mine(room, self.tokens, self.team.rank) for room in known.of[self.team.rank].rooms)
        return q, k, v

    def way(self, q: Tensor, k: Tensor, v: Tensor) -> Way:
        return self._known.get((len(q), *q.shape[3:], q.dtype, k.dtype, v.dtype)) or super().way(q, k, v)


@dataclass(frozen=True, eq=False)
class _Copies:
    """A :class:`exchange.Way`: into places of the other ranks; ``of`` each rank its own."""

    rank: int
    memory: _Memory
    of: Sequence[_Places]

    def spread(self, tensors: Sequence[Tensor], lengths: Sequence[Shares]) -> Callable[[], list[Tensor]]:
        few = tensors[0].shape[1] < tensors[1].shape[1]
        rows = [slices(parts) for parts in lengths]
        grouped = [by_rank(x) for x in tensors]
        if few:  # elsewhere than all, as they are to lie side by side
            copy(grouped[0][self.rank], self.of[self.rank].drawn[rows[0][self.rank]])
        moves = [
            (x[peer], there[own[self.rank]])
            for peer in self._others()
            for x, there, own in zip(grouped, self._arrived(peer, few), rows, strict=True)
        ]
        self.memory.send(moves, [places.words[_HEADS] for places in self.of])

        def end() -> list[Tensor]:
            self.memory.wait(self.of[self.rank].words[_HEADS])
            return [x.transpose(0, 1) for x in self._arrived(self.rank, few)]

        return end

    def gather(self, attended: Tensor, queries: Shares, home: Tensor) -> Callable[[], object]:
        rows = slices(queries)

        def came(of_rank: int, peer: int) -> Tensor:
            shape = len(attended), queries[of_rank], attended.shape[2]
            return self.of[of_rank].came[peer, : prod(shape)].view(shape)

        moves = [(attended[:, rows[peer]], came(peer, self.rank)) for peer in self._others()]
        self.memory.send(moves, [places.words[_TOKENS] for places in self.of])
        copy(attended[:, rows[self.rank]], home[:, :, self.rank])

        def end() -> None:
            self.memory.wait(self.of[self.rank].words[_TOKENS])
            for peer in self._others():
                copy(came(self.rank, peer), home[:, :, peer])

        return end

    def _arrived(self, rank: int, few: bool) -> list[Tensor]:
        """[all L, B, N / P, D] of queries, keys and values: where they are read by a rank."""
        q, k, v = (room[rank] for room in self.of[rank].rooms)
        return [self.of[rank].drawn if few else q, k, v]

    def _others(self) -> list[int]:
        return [peer for peer in range(len(self.of)) if peer != self.rank]


def _places(flat: Tensor, shapes: Shapes) -> _Places:
    words, q, k, v, drawn, came = _laid(flat, shapes)
    return _Places(words, (q, k, v), drawn, came)


def _starts(shapes: Shapes) -> list[int]:
    return starts(prod(shape) * dtype.itemsize for shape, dtype in shapes)


def _laid(flat: Tensor, shapes: Shapes) -> list[Tensor]:
    return [
        flat[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for start, (shape, dtype) in zip(_starts(shapes), shapes, strict=False)
    ]


# ---------------------------------------------------------------------------------------------------- the memory


class _Memory(Protocol):
    """Memory of every rank, as one of them sees it: ``of`` each rank uint8 [nbytes], zeros at first."""

    of: list[Tensor]

    def send(self, moves: Moves, words: Sequence[Tensor]) -> None:
        """Begin to move what is computed by now, and set one's own word in ``words`` [P] of each rank when it is
        there. The sources are left alone until :meth:`wait`."""

    def wait(self, words: Tensor) -> None:
        """What is computed from here on finds all that was sent by others, who said so in ``words``, and what this
        rank sent is gone. The words are taken back."""


@torch.inference_mode(False)  # other passes write there, too
def seen(team: Team, nbytes: int) -> _Memory | None:
    """Memory that all ranks of a team see; a call that all of them make. None, and a warning, where one does not."""
    form, memory, offer, why = (_Mapped if team.device.type == "cpu" else _Symmetric), None, None, ""
    try:
        offer = form.offer(nbytes)
    except (OSError, RuntimeError) as error:
        why = str(error)
    try:
        # Whoever failed before says so here, and ends it for all: what follows waits for all and looks for nobody.
        offers = team.share(offer)
        try:
            memory = None if None in offers else form(team, nbytes, offers)
        except (OSError, RuntimeError) as error:
            why = str(error)
        whys = team.share(None if memory else why)
    finally:
        form.taken(offer)
    if not any(why is not None for why in whys):
        return memory
    if not team.rank:
        first = next(filter(None, whys)).partition("\n")[0]
        instead = f"what they exchange goes through {dist.get_backend()}, which is slower"
        warnings.warn(f"got ranks that do not see each other's memory ({first}), {instead}", SpeedWarning, stacklevel=2)
    return None


class _Symmetric:
    """Of GPUs: copies on a stream of their own, by copy engines."""

    @staticmethod
    def offer(nbytes: int) -> str:
        if not available():
            raise RuntimeError("there is no Triton to wait with")
        return ""

    @staticmethod
    def taken(offer: str | None) -> None:
        """Nothing is left over."""

    def __init__(self, team: Team, nbytes: int, offers: Sequence[str]) -> None:
        # Nothing here is sent to several at once, which some machines cannot set up though they say so.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        import torch.distributed._symmetric_memory as symmetric

        self.rank = team.rank
        self._own = own = symmetric.empty(nbytes, dtype=torch.uint8, device=team.device)
        self._handle = handle = symmetric.rendezvous(own, team.group.group_name)
        start = own.data_ptr() - handle.buffer_ptrs[team.rank]  # in an allocation that may hold others
        self.of = [handle.get_buffer(rank, (nbytes,), torch.uint8, start) for rank in range(team.size)]
        own.zero_()
        self._side, self._last = torch.cuda.Stream(team.device), torch.cuda.Stream(team.device)
        self._one = torch.ones((), dtype=torch.int32, device=team.device)
        self._ended = torch.zeros((), dtype=torch.int32, device=team.device)
        self._moves: Moves = ()
        torch.cuda.synchronize(team.device)
        team.waiting.add(self)

    def send(self, moves: Moves, words: Sequence[Tensor]) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            for x, there in moves:
                copy(x, there)
            for rank, of_rank in enumerate(words):
                if rank != self.rank:
                    of_rank[self.rank].copy_(self._one)
        self._moves = moves  # nobody else may get their memory yet

    def wait(self, words: Tensor) -> None:
        from fluxloom.speed.direct_kernels import take

        torch.cuda.current_stream(self._side.device).wait_stream(self._side)
        self._moves = ()
        take(words, self.rank, self._ended)

    def end(self) -> None:
        """Let whatever waits, here, wait no longer."""
        with torch.cuda.stream(self._last):
            self._ended.fill_(1)


class _Mapped:
    """Of processes on one processor: files that all of them map."""

    @staticmethod
    def offer(nbytes: int) -> str:
        """The path of a file that is there on the disk, whole."""
        number, path = tempfile.mkstemp(prefix="fluxloom-")
        try:
            with open(number, "wb") as file:
                file.write(bytes(nbytes))
        except OSError:
            _Mapped.taken(path)
            raise
        return path

    @staticmethod
    def taken(offer: str | None) -> None:
        with suppress(OSError):  # where what is mapped cannot be removed
            Path(offer or "").unlink()

    def __init__(self, team: Team, nbytes: int, offers: Sequence[str]) -> None:
        self.team = team
        self.of = [torch.from_file(one, shared=True, size=nbytes, dtype=torch.uint8) for one in offers]

    def send(self, moves: Moves, words: Sequence[Tensor]) -> None:
        for x, there in moves:
            copy(x, there)
        for of_rank in words:
            of_rank[self.team.rank] = 1

    def wait(self, words: Tensor) -> None:
        self.team.until(lambda: bool(words.all()), 1e-5)
        words.zero_()
