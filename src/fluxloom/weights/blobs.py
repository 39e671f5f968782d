"""Content on the disk, by its hash: half files that are continued, links that give a file its name."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxloom.errors import WeightsError

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
CHUNK = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository: ``etag`` is its content's hash, SHA-256 of LFS files and git's blob id of others;
    size -1 and an empty etag where the listing did not say."""

    name: str
    size: int = -1
    etag: str = ""


class Partial:
    """The beginning of a file, and the hash of that beginning."""

    def __init__(self, path: Path, file: RemoteFile) -> None:
        self.path, self.file, self.done = path, file, 0
        self._hash = content_hash(file)
        if on_disk(path) > file.size:
            self.remove()
        if path.exists():
            # Read again, not kept beside it: a torn write after a power cut is found here, too.
            with path.open("rb") as old:
                while chunk := old.read(CHUNK):
                    self._hash.update(chunk)
                    self.done += len(chunk)
        else:
            path.touch()

    def append(self, chunk: bytes) -> None:
        if self.done + len(chunk) > self.file.size:
            self.remove()
            raise WeightsError(f"got more bytes of {self.file.name} than the {self.file.size} announced, try again")
        with self.path.open("ab") as out:
            out.write(chunk)
        self._hash.update(chunk)
        self.done += len(chunk)

    def restart(self) -> None:
        self.path.write_bytes(b"")
        self._hash, self.done = content_hash(self.file), 0

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def hexdigest(self) -> str:
        return str(self._hash.hexdigest())

    def matches(self) -> bool:
        known = SHA256.fullmatch(self.file.etag) or COMMIT.fullmatch(self.file.etag)
        return not known or self.hexdigest() == self.file.etag


def content_hash(file: RemoteFile) -> Any:
    """SHA-256 where the etag is one; else git's blob id: SHA-1 over a header with the size, then the content."""
    if SHA256.fullmatch(file.etag):
        return hashlib.sha256()
    return hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)


def on_disk(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def whole(path: Path, size: int) -> bool:
    return path.is_file() and (size < 0 or path.stat().st_size == size)


def shared(blob: Path, own: Path) -> Path:
    """A second name for another repository's content, which outlives that one; or itself where links cannot be."""
    if blob != own:
        own.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(blob, own)
        except OSError:
            return blob
    return own


def link(blob: Path, path: Path) -> None:
    """The file under its name: a link into blobs/, or a copy where the disk knows no links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.unlink(missing_ok=True)
    try:
        draft.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        shutil.copyfile(blob, draft)
    draft.replace(path)


def size_text(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"
