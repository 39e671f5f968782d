"""Clock and power of a GPU while it works: a card at its power limit lowers its clock, and that bounds what it does."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
from collections.abc import Iterator
from shutil import which
from typing import Any

import torch

_ASKED = "clocks.sm,power.draw,power.limit"
_EVERY = 100  # milliseconds


@contextlib.contextmanager
def metered(device: torch.device) -> Iterator[dict[str, Any]]:
    """Fill a row with what ``nvidia-smi`` says of the work inside: ``sm_mhz``, ``watts`` and ``watts_limit``, medians
    of the later half of its samples. Nothing on other devices, where it is not installed, or where it says nothing.
    """
    row: dict[str, Any] = {}
    if device.type != "cuda" or which("nvidia-smi") is None:
        yield row
        return
    chosen = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [
        "nvidia-smi",
        f"--id={chosen}",
        f"--query-gpu={_ASKED}",
        "--format=csv,noheader,nounits",
        f"-lms={_EVERY}",
    ]
    asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield row
    finally:
        asked.terminate()
        row |= read(asked.communicate()[0])


def read(told: str) -> dict[str, Any]:
    """The medians of lines "MHz, W, W"; lines cut short or without numbers do not count."""
    samples = []
    for line in told.splitlines():
        with contextlib.suppress(ValueError):
            samples.append([float(word) for word in line.split(",")])
    whole = [sample for sample in samples if len(sample) == 3]
    names = ("sm_mhz", "watts", "watts_limit")
    late = whole[len(whole) // 2 :]
    return {
        name: round(statistics.median(column)) for name, column in zip(names, zip(*late, strict=True), strict=False)
    }
