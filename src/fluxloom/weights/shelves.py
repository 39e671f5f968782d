"""Places with files of models: folders of the disk, and repositories."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from fluxloom.errors import BadInput
from fluxloom.weights.blobs import SHA256
from fluxloom.weights.download import Hub, Progress, Snapshot
from fluxloom.weights.layout import KINDS, SUFFIXES, Listing, Pick

FOLDERS = "FLUXLOOM_MODELS"


@dataclass(frozen=True)
class Part:
    """One component on the disk: ``path`` is what to open, its file or its folder; ``origin`` says where it came from,
    with the commit where that is a repository; ``lacks`` counts its bytes that are still there, if none were to be
    fetched."""

    kind: str
    path: Path
    files: tuple[Path, ...]
    origin: str
    commit: str | None = None
    lacks: int = 0

    @property
    def sha256(self) -> str | None:
        """Hash of a single file from a hub, which the cache's name for it tells; None where it would take reading."""
        weights = [path.resolve() for path in self.files if path.name.lower().endswith(SUFFIXES)]
        (blob, *more) = weights or [self.path]
        return blob.name if not more and blob.parent.name == "blobs" and SHA256.fullmatch(blob.name) else None


class Shelf(Protocol):
    """A place with files.

    own   it was named, or is the publisher's: the transformer in it is the one that is meant
    flux  its folders in the diffusers layout are those of a FLUX.1 pipeline
    """

    @property
    def own(self) -> bool: ...
    @property
    def flux(self) -> bool: ...
    @property
    def listing(self) -> Listing: ...

    def cost(self, pick: Pick) -> int:
        """Bytes to fetch before it can be used."""

    def deliver(self, picks: Sequence[Pick], progress: Progress | None) -> list[Part]: ...

    def part(self, pick: Pick) -> Part:
        """What would be delivered, without fetching it."""


@dataclass(frozen=True)
class Folder:
    """A folder of the disk: its files, and those of subfolders whose names say what they hold."""

    root: Path
    own: bool = False

    @cached_property
    def listing(self) -> Listing:
        known = {name for kind in KINDS.values() for name in (*kind.folders, *kind.places)}
        found: dict[str, int] = {}
        for at in (self.root, *(self.root / name for name in sorted(known))):
            try:
                files = sorted(path for path in at.iterdir() if path.is_file())
            except OSError:
                continue  # not there, or not ours to read
            found |= {path.relative_to(self.root).as_posix(): path.stat().st_size for path in files}
        return found

    @cached_property
    def flux(self) -> bool:
        if self.own:
            return True
        try:
            return '"_class_name": "Flux' in (self.root / "model_index.json").read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            return False

    def cost(self, pick: Pick) -> int:
        return 0

    def deliver(self, picks: Sequence[Pick], progress: Progress | None) -> list[Part]:
        return [self.part(pick) for pick in picks]

    def part(self, pick: Pick) -> Part:
        files = tuple(self.root / name for name in pick.names)
        return Part(pick.kind, _opened(self.root / pick.path, files), files, str(self.root / pick.path))


@dataclass(frozen=True)
class Remote:
    """A repository at one commit."""

    hub: Hub
    snapshot: Snapshot
    own: bool = True
    flux: bool = True

    @cached_property
    def listing(self) -> Listing:
        return {name: file.size for name, file in self.snapshot.files.items()}

    def cost(self, pick: Pick) -> int:
        return sum(max(self.listing[name], 1) for name in self.hub.lacking(self.snapshot, pick.names))

    def deliver(self, picks: Sequence[Pick], progress: Progress | None) -> list[Part]:
        self.hub.fetch(self.snapshot, [name for pick in picks for name in pick.names], progress)
        return [self.part(pick) for pick in picks]

    def part(self, pick: Pick) -> Part:
        files = tuple(self.hub.path(self.snapshot, name) for name in pick.names)
        origin = f"{self.snapshot.repo}@{self.snapshot.commit}:{pick.path}"
        path = _opened(self.hub.path(self.snapshot, pick.path), files)
        return Part(pick.kind, path, files, origin, self.snapshot.commit, self.cost(pick))


def collections() -> list[Folder]:
    """The folders that FLUXLOOM_MODELS names, and the folders in these."""
    found: list[Folder] = []
    for name in filter(None, os.environ.get(FOLDERS, "").split(os.pathsep)):
        root = Path(name).expanduser()
        if not root.is_dir():
            raise BadInput(f"got {root} in {FOLDERS}, allowed folders, try one that exists")
        found += [Folder(root), *(Folder(path) for path in sorted(root.iterdir()) if path.is_dir())]
    return found


def _opened(path: Path, files: Sequence[Path]) -> Path:
    """What to open for a component: its folder, where a config.json says what shapes cannot, unless the folder holds
    other weights, too."""
    if not path.is_file() or "config.json" not in {file.name for file in files}:
        return path
    weights = {file for file in path.parent.iterdir() if file.name.lower().endswith(SUFFIXES)}
    return path.parent if weights == {path} else path
