"""What a batch has finished, so that it can be stopped at any time and taken up again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fluxloom.errors import BadInput, OutputError

FILE = "journal.jsonl"
_HEAD = {"fluxloom batch": 1}
_PART = re.compile(r"\.[0-9a-f]{16}\.part")  # what files.write() leaves where it is killed


class Journal:
    """A line of JSON for each picture, written when its file is in place. A line that was cut off is none: what it
    would have said is done again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists() and any(folder.iterdir()):
                raise BadInput(
                    f"got {str(folder)!r}, which holds other files, allowed an empty or new folder or one of a batch, "
                    "try another --out"
                )
            self._file = open(path, "a+b")  # noqa: SIM115 - held for as long as the batch runs
        except OSError as error:
            where = f"got folder {str(folder)!r} to write to ({error.strerror})"
            raise OutputError(f"{where}, allowed one with room and the right to write, try another --out") from error
        self._claim()
        self._read()

    def _claim(self) -> None:
        with suppress(ImportError):  # not on Windows
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.close()
                where = f"got {str(self.folder)!r}, where another batch is at work"
                raise BadInput(f"{where}, allowed one at a time, try again when it is done") from error
        for path in self.folder.rglob(".*.part"):
            if _PART.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        for line in data.splitlines():
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):  # the head, or a line that was cut off
                continue
        if not data:
            self._append(_HEAD)
        elif not data.endswith(b"\n"):
            self._file.write(b"\n")

    def done(self, key: str) -> dict[str, Any] | None:
        """The row of what was finished under a key, if its file is still as it was written."""
        row = self.rows.get(key)
        if row is None:
            return None
        try:
            data = (self.folder / row["output"]).read_bytes()
        except OSError:
            return None
        return row if hashlib.sha256(data).hexdigest() == row["sha256"] else None

    def add(self, row: dict[str, Any]) -> None:
        """Write down what is finished; it is on the disk when this returns."""
        with self._lock:
            self.rows[row["key"]] = row
            self._append(row)

    def _append(self, row: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            path = str(self.folder / FILE)
            raise OutputError(f"got {path!r} to write to ({error.strerror}), try another place") from error

    def close(self) -> None:
        self._file.close()
