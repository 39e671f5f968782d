"""A session's folder: pictures by the hash of their bytes, rows about them, and the order of writing.

    session.db          SQLite; at rest a single file, while in use with -wal and -shm beside it
    objects/ab/ab12...  pictures, named by the sha256 of their bytes; never changed
    objects/.*          pictures being written

A step is written under SQLite's write lock, which the system gives back when a process dies: the picture goes to a
hidden file, reaches the disk and takes its name; then the rows; then the commit makes all of it visible at once. A
process killed anywhere before leaves at most a file that no row names, for :meth:`Store.sweep`. That takes the same
lock, so what it finds belongs to nobody alive. Connections last one transaction: no lock is held while a model draws,
and whenever nobody writes the folder can be copied.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fluxloom.errors import BadInput, Failure, OutputError
from fluxloom.weights.load import digest

FORMAT = 1
YOUNG = 3600.0  # seconds; a file of no row that is younger stays, in case a network disk does not know locks
_FILE, _OBJECTS = "session.db", "objects"
_APPLICATION = 0x666C786C  # "flxl": the mark of our databases among all of SQLite's
_PATIENCE = 60.0  # seconds to wait for another process's turn, which takes well under one
_TABLES = """
CREATE TABLE session (only INTEGER PRIMARY KEY CHECK (only = 1), seed TEXT NOT NULL, turn INTEGER NOT NULL DEFAULT 0,
    at INTEGER NOT NULL DEFAULT 0, created TEXT NOT NULL, fluxloom TEXT NOT NULL);
CREATE TABLE nodes (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, body TEXT NOT NULL, receipt TEXT, meters TEXT);
CREATE TABLE branches (name TEXT PRIMARY KEY, node TEXT);
CREATE TABLE moves (number INTEGER PRIMARY KEY, node TEXT, branch TEXT);
CREATE TABLE seeds (seed TEXT PRIMARY KEY);
CREATE TABLE extras (object TEXT PRIMARY KEY, pixels TEXT NOT NULL, file TEXT)
"""


@dataclass(frozen=True)
class Store:
    """The folder of one session."""

    folder: Path

    @property
    def objects(self) -> Path:
        """Where the pictures lie."""
        return self.folder / _OBJECTS

    @classmethod
    def create(cls, folder: Path, fill: Callable[[sqlite3.Connection], object]) -> Store:
        """A new folder, or an empty one made a session; ``fill`` writes the first rows. Raises BadInput for others."""
        store = cls(folder)
        made = BadInput(f"got {str(folder)!r}, which is a session already, allowed a new folder, try working on in it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in folder.iterdir()}
        except OSError as error:
            raise OutputError(f"got {str(folder)!r} for a session ({error.strerror}), try another place") from error
        if any(not name.startswith(_FILE) for name in names):  # the database alone: a making that was cut off
            other = f"got {str(folder)!r}, which holds other things, allowed a new or an empty folder, try another"
            raise made if _FILE in names else BadInput(other)
        with store._connected("rwc") as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("BEGIN IMMEDIATE")
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:  # another process was quicker
                raise made
            for statement in _TABLES.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
            db.execute(f"PRAGMA user_version = {FORMAT}")
            fill(db)
            db.execute("COMMIT")
        return store

    @classmethod
    def open(cls, folder: Path) -> Store:
        """An existing session. Raises BadInput where there is none, Failure where it is damaged or too new."""
        store = cls(folder)
        with store.reading():
            return store

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view of the rows."""
        with self._transaction("BEGIN") as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The turn to write: all of what is done inside, or nothing."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            yield db

    def add(self, fill: Callable[[Path], object]) -> str:
        """Keep the file that ``fill`` writes to a path (.png); its hash. Only inside :meth:`writing`."""
        draft = self.objects / f".{secrets.token_hex(8)}.png"
        try:
            self.objects.mkdir(exist_ok=True)
            fill(draft)
            name = digest(draft)
            place = self._place(name)
            place.parent.mkdir(exist_ok=True)
            os.replace(draft, place)  # over one of the same name, too: should that be damaged, it is whole again
            for folder in (place.parent, self.objects, self.folder):
                _settle(folder)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OutputError(f"got {str(self.objects)!r} to write to ({reason}), try making room there") from error
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        return name

    def object(self, name: str) -> Path:
        """The file of a hash. Raises Failure where it is missing or was altered."""
        problem = self.problem(name)
        if problem is not None:
            raise Failure(f"got {problem}, allowed the session's own, try a copy of the session, or another node")
        return self._place(name)

    def problem(self, name: str) -> str | None:
        """What is wrong with the file of a hash, if anything."""
        place = self._place(name)
        try:
            return None if digest(place) == name else f"an altered file {place}"
        except FileNotFoundError:
            return f"no file {place}"
        except OSError as error:
            return f"an unreadable file {place} ({error.strerror})"

    def stray(self, kept: set[str], age: float) -> list[Path]:
        """Files of no row, older than ``age`` seconds. Inside :meth:`writing`, nobody alive is at work on one."""
        latest = time.time() - age
        found = [path for path in self.objects.rglob("*") if path.is_file() and path.name not in kept]
        return sorted(path for path in found if path.stat().st_mtime <= latest)

    def sound(self) -> str | None:
        """What SQLite finds wrong with its file, if anything."""
        with self.reading() as db:
            found = "; ".join(row[0] for row in db.execute("PRAGMA integrity_check(3)"))
        return None if found == "ok" else found

    def _place(self, name: str) -> Path:
        return self.objects / name[:2] / name

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        if not (self.folder / _FILE).is_file():
            where = str(self.folder)
            raise BadInput(f"got {where!r}, which is no session, allowed one, try `fluxloom session new {where}`")
        with self._connected("rw") as db:
            self._check(db)
            db.execute(begin)
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def _connected(self, mode: str) -> Iterator[sqlite3.Connection]:
        """A connection, closed at the end; SQLite's errors become ours."""
        path = self.folder / _FILE
        try:
            uri = f"{path.absolute().as_uri()}?mode={mode}"
            with closing(sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None)) as db:
                db.execute("PRAGMA synchronous = FULL")  # in WAL mode less would lose the last steps in a power cut
                yield db
        except sqlite3.Error as error:
            raise _ours(error, path) from error

    def _check(self, db: sqlite3.Connection) -> None:
        mark, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        if mark != _APPLICATION:
            where = str(self.folder)
            raise BadInput(f"got {where!r}, whose {_FILE} is no session's, allowed one, try another folder")
        if version > FORMAT:
            raise Failure(f"got a session of format {version}, allowed up to {FORMAT}, try a newer fluxloom")


def _ours(error: sqlite3.Error, path: Path) -> Exception:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")) or "no such table" in str(error):
        return Failure(
            f"got a damaged {path} ({error}), allowed a whole one, try a copy of it; the pictures are in "
            f"{path.parent / _OBJECTS}, each with its receipt"
        )
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return Failure(f"got {path}, to which another process writes for over {_PATIENCE:.0f} s, try again later")
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return OutputError(f"got {path} to write to ({error}), allowed one with room and the right to, try another")
    return Failure(f"got an unexpected answer of {path} ({error}), try `fluxloom verify` on its folder")


def _settle(folder: Path) -> None:
    """Let the names in a folder reach the disk; where folders cannot be opened (Windows), they do so by themselves."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
