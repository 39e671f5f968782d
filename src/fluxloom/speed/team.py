"""The processes that compute one picture together: how they find, tell and lose each other.

Rank 0 tells the others what to compute through the store that the launcher keeps, in JSON; tensors go through the
process group, NCCL on GPUs and gloo on processors. A rank that fails says so in the store, where the others look.
"""

from __future__ import annotations

import atexit
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fluxloom.errors import BadInput, Failure
from fluxloom.speed.launch import GRACE, placed

_EVER = timedelta(days=365)  # workers wait for the next picture as long as it takes
_JOIN = timedelta(minutes=10)  # for all processes to come up
LOOK = 0.25  # seconds between looks at how the others are, while this rank waits
_FAILED = "failed"  # the key in the store


@dataclass(eq=False)
class Team:
    """The processes that compute together, as one of them knows them."""

    rank: int
    size: int
    device: torch.device
    store: Store
    group: dist.ProcessGroup
    near: bool  # whether all are on one host
    sent: int = 0  # messages of rank 0 so far, and how many of them are no longer in the store
    forgotten: int = 0
    shared: int = 0  # words of each rank
    left: bool = False
    waiting: WeakSet[Any] = field(init=False, default_factory=WeakSet)  # what waits on the GPU for others, until end()
    _begun: list[torch.cuda.Event] = field(init=False, default_factory=list)

    def tell(self, message: Any) -> None:
        """To all other ranks, from rank 0."""
        self.store.set(f"message {self.sent}", json.dumps(message))
        self.sent += 1

    def heard(self, behind: int = 0) -> None:
        """On rank 0, when all others have shown that they heard what they were told, but for the last messages."""
        while self.forgotten < self.sent - behind:
            self.store.delete_key(f"message {self.forgotten}")
            self.forgotten += 1

    def hear(self) -> Any:
        """The next message of rank 0."""
        key = f"message {self.sent}"
        self.store.wait([key], _EVER)
        self.sent += 1
        return json.loads(self.store.get(key))

    def share(self, word: Any) -> list[Any]:
        """What each rank says, in their order, once all of them did. Raises Failure where one failed instead."""
        keys = [f"word {self.shared} of {rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], json.dumps(word))
        self.until(lambda: self.store.check(keys), 1e-3)
        words = [json.loads(self.store.get(key)) for key in keys]
        if self.shared:  # all have read what was said before, or they would not have gone on
            self.store.delete_key(f"word {self.shared - 1} of {self.rank}")
        self.shared += 1
        return words

    def fail(self, error: BaseException) -> None:
        """Let the others know that this rank cannot go on, and end what they may be waiting for."""
        what = f"{type(error).__name__}: {error}"[:2000]
        with suppress(RuntimeError):  # where the store is gone, so is the launcher, and with it the others
            self.store.compare_set(_FAILED, "", json.dumps([self.rank, what]))
        self.leave(in_order=False)

    def check(self) -> None:
        """Raise Failure where another rank said that it failed."""
        if self.store.check([_FAILED]):
            rank, what = json.loads(self.store.get(_FAILED))
            if rank != self.rank:
                raise Failure(
                    f"got a failure on GPU {rank} ({what}), allowed all GPUs to go on, try fewer GPUs or a smaller size"
                )

    def until(self, done: Callable[[], bool], nap: float) -> None:
        """Ask every ``nap`` seconds whether it is done, with an eye on the others. Raises Failure where one failed."""
        looked = time.monotonic()
        while not done():
            time.sleep(nap)
            if time.monotonic() - looked > LOOK:
                self.check()
                looked = time.monotonic()

    def settle(self, behind: int = 0) -> None:
        """Wait for what this rank has begun, with an eye on the others. Raises Failure where one of them failed.

        behind  so many of the last calls need not be done: while the GPU computes a pass, the next is told and begun

        NCCL waits on the GPU for a rank that is gone, and the driver knows no timeout: hence no plain synchronise.
        """
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
            self._begun.append(done)
            while len(self._begun) > behind:
                self.until(self._begun[0].query, 5e-5)
                del self._begun[0]
        self.check()

    def leave(self, in_order: bool = True) -> None:
        """Give up the connections; out of order, in the middle of an exchange: gloo's end with the process alone.

        NCCL tells what waits on the GPU to quit, and then waits itself for CUDA graphs that hold an exchange to be let
        go; they, where they are under way, wait for the former: hence beside whatever comes next.
        """
        if self.left:
            return
        self.left = True
        if in_order:
            dist.destroy_process_group()
        elif self.device.type == "cuda":
            for one in self.waiting:
                one.end()
            ending = Thread(target=dist.distributed_c10d._abort_process_group, daemon=True)
            ending.start()
            ending.join(LOOK)
            atexit.register(ending.join, GRACE)  # a thread that is inside NCCL as Python ends ends it with SIGABRT


@contextmanager
def team_of(gpus: int, device: torch.device) -> Iterator[Team]:
    """The team of ``gpus`` processes that this is one of. To load within, and to serve: there what goes wrong on a
    worker is told to rank 0. Raises BadInput where torchrun did not start as many."""
    if not placed(gpus):
        raise BadInput(
            f"got {gpus} GPUs in one process, allowed 1, try `torchrun --nproc-per-node {gpus}` or `fluxloom generate`"
        )
    team = join(device)
    with together(team):
        yield team


def join(device: torch.device) -> Team:
    """Make this process, which torchrun has started, one of a team. A GPU is taken by the local rank; on processors
    the threads are divided.

    Raises BadInput where there are fewer GPUs than processes, and where there is a team already.
    """
    if dist.is_initialized():
        raise BadInput("got a second model on several GPUs, allowed one a process, try another process")
    backend = "gloo"
    near = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if device.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise BadInput(f"got a process for GPU {local}, allowed one of {there} GPUs here, try --gpus {there}")
        backend, device = "nccl", torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif near and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are here, whatever this machine's name resolves to
    store, rank, size = next(rendezvous("env://", timeout=_JOIN))
    store = PrefixStore("fluxloom", store)
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, device_id=device if backend == "nccl" else None
    )
    assert dist.group.WORLD is not None
    return Team(rank, size, device, store, dist.group.WORLD, near)


@contextmanager
def together(team: Team) -> Iterator[None]:
    """Where a rank loads and serves: what goes wrong on a worker is told to rank 0, and ends the process there.

    The launcher ends all when one of them ends with an error, so a worker that failed leaves it to rank 0 to say so: on
    processors by ending without one, as its peers then find their connections closed; on GPUs, where rank 0 may be
    stuck in the driver, by ending with one after a while.
    """
    try:
        yield
    except Exception as error:
        if not team.rank:
            raise
        if os.environ.get("FLUXLOOM_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        try:
            team.check()
            team.fail(error)
        except Exception:  # rank 0 failed, or is gone: nothing to add to what it says
            _quit(0)
        if team.device.type == "cpu":
            _quit(0)
        time.sleep(GRACE)
        _quit(1)


def _quit(code: int) -> NoReturn:
    """End a worker as it stands: threads of a broken group may never end by themselves."""
    os._exit(code)
