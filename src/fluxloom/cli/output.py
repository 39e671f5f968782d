"""Where pictures and tables go: file names that overwrite nothing, and a test of the place before any work is done."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from fluxloom.cli import interrupts
from fluxloom.errors import OutputError

_PROBE = bytes(1 << 18)  # a picture is smaller; less would fit into the last blocks of a full disk


@dataclass(frozen=True)
class Destination:
    """Where pictures will be saved. ``stem`` None: named after the prompt and the seed."""

    folder: Path
    stem: str | None = None
    suffix: str = ".png"
    force: bool = False

    @classmethod
    def at(cls, out: Path | None, force: bool = False) -> Destination:
        """From ``--out``: an existing folder, a name without suffix (a folder to make) or a file."""
        if out is None or out.is_dir() or not out.suffix:
            return cls(out or Path(), force=force)
        from fluxloom.infer.files import format_of

        format_of(out)  # raises BadInput for a format that cannot be written
        return cls(out.parent, out.stem, out.suffix, force)

    def probe(self) -> None:
        """Make the folder and write a nameless file into it, so that a bad place is found before the work.

        From here on Ctrl-C unwinds: there may be something to undo.
        """
        interrupts.unwind()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(_PROBE)
                file.flush()
        except OSError as error:
            where = f"got folder {str(self.folder)!r} to write to ({error.strerror})"
            raise OutputError(f"{where}, allowed one with room and the right to write, try another --out") from error

    def path(self, title: str, seed: int, many: bool) -> Path:
        """The file of one picture; without ``force`` the next that is free."""
        if self.stem is None:
            stem = f"{slug(title)}-{seed}"
        else:
            stem = f"{self.stem}-{seed}" if many else self.stem
        return next(path for path in self._candidates(stem) if self.force or not path.exists())

    def _candidates(self, stem: str) -> Iterator[Path]:
        yield self.folder / f"{stem}{self.suffix}"
        for number in count(2):
            yield self.folder / f"{stem}-{number}{self.suffix}"


def slug(title: str, limit: int = 48) -> str:
    """A file name of the letters and digits of a text, in any script."""
    name = "-".join(re.findall(r"[^\W_]+", title.lower()))[:limit].strip("-")
    return name or "picture"


def plain(text: str) -> str:
    """A text on one line without terminal escapes, whoever wrote it."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on standard output, and nothing else."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def print_facts(facts: Mapping[str, Any], indent: str = "") -> None:
    """Names and values, one a line, what belongs together indented."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        name = plain(name)
        if isinstance(value, Mapping) and value:
            print(f"{indent}{name}")
            print_facts(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, entry in enumerate(value, 1):
                print(f"{indent}{name} {number}")
                print_facts(entry, indent + "  ")
        elif value not in (None, "", [], {}):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{indent}{name:{width}}  {plain(str(shown))}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for a terminal; tabs between the cells for everything else."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
