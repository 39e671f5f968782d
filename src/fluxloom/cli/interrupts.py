"""What Ctrl-C does. At first the process just ends, as nothing is written yet; once there may be something to undo, it
unwinds."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import NoReturn

EXIT_CODE = 130  # 128 + SIGINT, as shells report it
LINE = "fluxloom: interrupted\n"
_RESTORE = "\r\x1b[K\x1b[?25h"  # clears a spinner's line and shows the cursor again


def end_at_once() -> None:
    """From now on Ctrl-C ends the process on the spot. For parsing, imports and loading: a KeyboardInterrupt in the
    middle of importing torch surfaces as anything, from an ImportError to pages of C++ stack."""
    signal.signal(signal.SIGINT, _end)


def unwind() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, so that files and terminal are left in order."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    with suppress(OSError):
        os.write(2, ((_RESTORE if os.isatty(2) else "") + LINE).encode())
    os._exit(EXIT_CODE)
