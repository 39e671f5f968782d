"""One process a GPU: started by torchrun's engine, which watches them and ends all when one of them fails.

``torchrun --nproc-per-node 2 -m fluxloom generate ... --gpus 2`` comes to the same; started here, exit codes and
messages are those of the first process, and nothing is said by the launcher. Importing this loads no torch.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence

from fluxloom.errors import BadInput, Failure

GRACE = 5.0  # seconds that a failed process leaves the first one to say so, before the launcher ends all
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # which the engine passes on, and ends


class Elsewhere(BaseException):
    """This command line is to be run by processes of their own, one a GPU: no error, so that nothing swallows it."""

    def __init__(self, gpus: int) -> None:
        super().__init__(f"to be run by {gpus} processes")
        self.gpus = gpus


def rank() -> int:
    """Which of the processes this is; 0 for the first, and where there is no other."""
    return int(os.environ.get("RANK", "0"))


def placed(gpus: int) -> bool:
    """Whether this is one of ``gpus`` processes of torchrun. Raises BadInput where it started another number."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1 or "MASTER_ADDR" not in os.environ:
        return False
    if started != gpus:
        raise BadInput(f"got {gpus} GPUs in a world of {started} processes, allowed as many, try --gpus {started}")
    return True


def lends(gpus: int) -> bool:
    """Whether this process is to do nothing but lend its GPU to the first.

    Raises Elsewhere where several GPUs are wanted and this is not yet one of as many processes, and BadInput for fewer
    than one.
    """
    if gpus < 1:
        raise BadInput(f"got {gpus} GPUs, allowed 1 or more, try 1")
    if gpus > 1 and not placed(gpus):
        raise Elsewhere(gpus)
    return gpus > 1 and rank() > 0


def start(gpus: int, words: Sequence[str]) -> int:
    """Run ``python <words>`` in as many processes and return the exit code of the first; 128 + number for a signal.

    Raises Failure, with what it left behind, where another process failed; the first one tells by itself.
    """
    import torch.distributed as dist

    if not dist.is_available():  # builds of torch for some systems come without
        raise BadInput(f"got {gpus} GPUs, allowed 1 with this build of torch, try another build")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    sys.stdout.flush()
    # Addresses by number: a machine's own name may resolve to nothing, and the processes are all on this one.
    home = "127.0.0.1"
    before, handlers = logging.root.manager.disable, {number: signal.getsignal(number) for number in _SIGNALS}
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="fluxloom-") as notes:
            config = LaunchConfig(
                min_nodes=1, max_nodes=1, nproc_per_node=gpus, run_id=uuid.uuid4().hex, max_restarts=0,
                rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr=home, logs_specs=DefaultLogsSpecs(notes),
            )  # fmt: skip
            elastic_launch(config, sys.executable)(*words)
    except SignalException as caught:
        return 128 + int(caught.sigval)
    except ChildFailedError as failed:
        return _told({number: one.exitcode for number, one in failed.failures.items()})
    finally:
        logging.disable(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def _told(codes: dict[int, int]) -> int:
    """The exit code of the first process where that was one of those that failed by themselves."""
    if codes.get(0, 0) > 0:
        return codes[0]
    number, code = next(iter(codes.items()))
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    raise Failure(
        f"got the process of GPU {number} {how}, allowed all of them to go on, try fewer GPUs, or FLUXLOOM_DEBUG=1"
    )
