"""``--gpus 2``: a process for each GPU, and one command to whoever runs it. Here two processes share a processor."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import QUICK, Run, Start

from fluxloom.infer.receipt import read_receipt

SECONDS = 60.0  # patience with a busy machine


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
def test_it_draws_and_edits_what_one_process_does(run: Run, start: Start, here: Path) -> None:
    for words in (
        ("generate", "a cat", "--seed", "5", "--size", "96"),
        ("edit", "generate1.png", "make it snow", "--seed", "6", "--size", "96"),
    ):
        name = words[0]
        ended = run(*words, "--steps", "2", "--executor", "fused", "--out", f"{name}1.png", "--quiet")
        assert (ended.code, ended.err) == (0, "")
        process = start(*words, "--steps", "2", "--gpus", "2", "--out", f"{name}2.png", "--quiet")
        assert process.communicate(timeout=SECONDS) == (f"{name}2.png\n", "")
        assert process.returncode == 0
        assert np.abs(pixels(here / f"{name}1.png") - pixels(here / f"{name}2.png")).max() <= 1
        machine = read_receipt(here / f"{name}2.png").data["machine"]
        assert machine["executor"].endswith(" on 2 processes")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "4"), "got 4 GPUs for 6 heads, allowed 1, 2, 3, 6, try one of them"),
        (  # found by each, before they know of each other
            ("--gpus", "2", "--vram", "8GB"),
            "got vram '8GB' for 2 GPUs, allowed for one GPU, try device='cuda', or without it",
        ),
    ],
)
def test_an_error_of_all_is_told_once(start: Start, here: Path, words: tuple[str, ...], message: str) -> None:
    process = start("generate", "a cat", *words, *QUICK)
    assert process.communicate(timeout=SECONDS) == ("", f"fluxloom: error: {message}\n")
    assert process.returncode == 2
    assert list(here.iterdir()) == []


def test_ctrl_c_ends_all(start: Start, here: Path) -> None:
    process = start("generate", "a cat", "--gpus", "2", *QUICK[2:], "--steps", "1000", "--out", "new")
    end = time.monotonic() + SECONDS
    while not (here / "new").exists():  # it appears right before the first step
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=SECONDS) == ("", "fluxloom: interrupted\n")
    assert process.returncode == 130
    assert list((here / "new").iterdir()) == []
