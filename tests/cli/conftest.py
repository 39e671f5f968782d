"""Two ways to run the command: in this process, where it is quick, and in one of its own, where signals and exits are
real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import QUICK, Ended, Run, Start

from fluxloom.cli.main import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run a command line in this process."""
    handler = signal.getsignal(signal.SIGINT)

    def run_here(*words: str) -> Ended:
        code = main(words)
        return Ended(code, *capsys.readouterr())

    yield run_here
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def start(here: Path) -> Iterator[Start]:
    """Start a command line in a process of its own."""
    running: list[subprocess.Popen[str]] = []

    def start_one(*words: str, **more: object) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": {**os.environ}} | more
        running.append(subprocess.Popen([sys.executable, "-m", "fluxloom", *words], **pipes))  # type: ignore[call-overload]
        return running[-1]

    yield start_one
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def drawn(run: Run, here: Path) -> Path:
    """A small picture with its receipt."""
    ended = run("generate", "a cat", "--seed", "5", *QUICK)
    assert (ended.code, ended.err) == (0, "")
    return here / ended.out.strip()
