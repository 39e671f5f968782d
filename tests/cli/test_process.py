"""What only a process of its own can show: signals, full disks, pipes, terminals, and how light a start is."""

from __future__ import annotations

import os
import pty
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import QUICK, Run, Start

from fluxloom.cli import drawing
from fluxloom.cli.app import Commands
from fluxloom.errors import Failure
from fluxloom.speed.recipe import SpeedWarning

LONG = ("--steps", "1000", "--size", "64", "--true-cfg", "1", "--out", "new")
SECONDS = 60.0  # patience with a busy machine


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


def folder_of(here: Path) -> Callable[[], bool]:
    """The output folder appears after all checks, right before the first step."""
    return lambda: (here / "new").exists()


def test_ctrl_c_in_mid_run(start: Start, here: Path) -> None:
    process = start("generate", "a cat", *LONG)
    wait_for(folder_of(here), process)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=SECONDS) == ("", "fluxloom: interrupted\n")
    assert process.returncode == 130
    assert list((here / "new").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see how far the imports are")
def test_ctrl_c_while_torch_is_imported(start: Start, here: Path) -> None:
    process = start("generate", "a cat", *LONG)
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=SECONDS) == ("", "fluxloom: interrupted\n")
    assert process.returncode == 130
    assert list(here.iterdir()) == []


def test_ctrl_c_while_the_file_is_written(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves: list[list[str]] = []

    def interrupt(descriptor: int) -> None:
        halves.append([path.name for path in here.iterdir()])
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "fsync", interrupt)
    ended = run("generate", "a cat", *QUICK)
    assert (ended.code, ended.out, ended.err) == (130, "", "fluxloom: interrupted\n")
    assert len(halves[0]) == 1  # the signal did come in the middle of writing
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("out", ["taken.txt/cat.png", "taken.txt/folder", "/proc/cat.png", "/proc/folder"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(run: Run, here: Path, out: str) -> None:
    (here / "taken.txt").write_text("a file, not a folder")
    began = time.perf_counter()
    ended = run("generate", "a cat", *LONG, "--out", out)
    assert time.perf_counter() - began < 10  # a thousand steps take longer
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("fluxloom: error: got folder ")
    assert ended.err.count("\n") == 1
    assert (here / "taken.txt").read_text() == "a file, not a folder"
    assert len(list(here.iterdir())) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="sets the limits of another process")
def test_a_disk_that_fills_up_leaves_no_half_file(start: Start, here: Path) -> None:
    process = start("generate", "a cat", "--steps", "20", *LONG[2:])
    wait_for(folder_of(here), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))  # from now on no file can grow over 1 kB
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("fluxloom: error: got 'new/a-cat-")
    assert "File too large" in err
    assert err.count("\n") == 1
    assert list((here / "new").iterdir()) == []


def test_a_full_disk_is_found_before_the_work(run: Run, here: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        ended = run("generate", "a cat", *LONG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (ended.code, ended.out) == (1, "")
    assert "got folder 'new' to write to (File too large)" in ended.err
    assert list((here / "new").iterdir()) == []


def test_a_reader_that_leaves_is_no_error(start: Start) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start("models", stdout=writing)
    os.close(writing)
    assert process.communicate(timeout=SECONDS)[1] == ""
    assert process.returncode == 1


def test_a_terminal_shows_the_picture_grow(start: Start, here: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    process = start("generate", "a cat", "--preview", "--seed", "5", *QUICK, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    out, _ = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (0, "a-cat-5.png\n")
    assert "▀" in shown.decode()
    assert "drawing" in shown.decode()
    assert shown.decode().rindex("\x1b[?25h") > shown.decode().rindex("\x1b[?25l")  # the cursor is back


def test_help_of_every_command_is_light() -> None:
    code = """
import sys
from typer.main import get_command
from fluxloom.cli.app import app
from fluxloom.cli.main import main
assert main(["--help"]) == 0
for name in get_command(app).commands:
    assert main([name, "--help"]) == 0
print(sorted({"torch", "numpy", "PIL", "cv2", "safetensors"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.count("Usage:") == 1 + len(Commands.names)


def test_a_traceback_is_for_those_who_ask(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in run("generate", "").err
    assert "Traceback" in run("generate", "", "--debug").err
    monkeypatch.setenv("FLUXLOOM_DEBUG", "1")
    assert "Traceback" in run("generate", "").err


def test_what_is_done_otherwise_is_noted_in_a_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*given: object, **more: object) -> None:
        warnings.warn("int8 was taken", SpeedWarning, stacklevel=2)
        warnings.warn("of somebody else", UserWarning, stacklevel=2)
        raise Failure("no further")

    monkeypatch.setattr(drawing, "load", load)
    with pytest.warns(UserWarning, match="of somebody else"):  # as Python shows it
        shown = run("generate", "a cat").err
    assert shown == "fluxloom: note: int8 was taken\nfluxloom: error: no further\n"
