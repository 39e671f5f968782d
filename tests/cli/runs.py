"""How the tests of the command line run it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

QUICK = ("--steps", "1", "--size", "64", "--true-cfg", "1")  # of nano: a tenth of a second, and no likeness


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]  # in this process
Start = Callable[..., "subprocess.Popen[str]"]  # in one of its own
