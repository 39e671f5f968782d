"""The entry point: the one place where whatever happens becomes an exit code and at most one line.

0 done, 1 the work failed, 2 the input cannot be used, 130 interrupted. A traceback appears only with ``--debug``
(anywhere on the line) or FLUXLOOM_DEBUG=1.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from fluxloom.cli import interrupts
from fluxloom.cli.output import plain
from fluxloom.errors import FluxloomError
from fluxloom.speed.launch import GRACE, Elsewhere, rank, start


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
    for stream in (sys.stdout, sys.stderr):  # a path or a prompt that the terminal cannot spell is no reason to fail
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if rank():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process says what there is to say
    else:
        interrupts.end_at_once()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _noted(warnings.showwarning)
            code = _started(words, debug)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = interrupts.EXIT_CODE
    except BrokenPipeError:  # the reader has seen enough, as in `fluxloom models | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        line, code = _explain(error)
        if rank():  # where the first one fails alike, it says so meanwhile
            time.sleep(GRACE)
        print(plain(f"fluxloom: error: {line}"), file=sys.stderr)
    if code == interrupts.EXIT_CODE:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(interrupts.LINE, end="", file=sys.stderr)
    return code


def _noted(otherwise: Callable[..., None]) -> Callable[..., None]:
    """How warnings are shown: ours in a line, without the place in the code."""

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if category.__module__.startswith("fluxloom."):
            print(plain(f"fluxloom: note: {message}"), file=sys.stderr)
        else:
            otherwise(message, category, *place)

    return show


def _started(words: list[str], debug: bool) -> int:
    """Run a command here, or in a process a GPU where it asks for several."""
    try:
        return _run(words)
    except Elsewhere as wanted:
        if debug:
            os.environ["FLUXLOOM_DEBUG"] = "1"
        code = start(wanted.gpus, ["-m", "fluxloom", *words])
        if code == interrupts.EXIT_CODE:  # they have said so
            sys.exit(code)
        return code


def _run(words: list[str]) -> int:
    from typer.main import get_command

    from fluxloom.cli.app import app

    # Click gives back the exit code of --help and typer.Exit, 130 for Ctrl-C, and else what the command returned.
    code = get_command(app).main(args=words or ["--help"], prog_name="fluxloom", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _take_debug(words: list[str]) -> tuple[list[str], bool]:
    end = words.index("--") if "--" in words else len(words)
    rest = [word for i, word in enumerate(words) if word != "--debug" or i > end]
    return rest, len(rest) < len(words) or os.environ.get("FLUXLOOM_DEBUG", "0") not in ("", "0")


def _explain(error: Exception) -> tuple[str, int]:
    if isinstance(error, FluxloomError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):  # Click's own; its classes move between Typer releases
        from fluxloom.cli.usage import explain

        return explain(error), 2
    if isinstance(error, OSError) and error.strerror:
        where = f" on {error.filename!r}" if error.filename else ""
        return f"got {error.strerror!r}{where}, allowed a file that can be read or written, try another path", 1
    return f"got an unexpected {type(error).__name__}: {error}; try again with --debug to see where", 1
