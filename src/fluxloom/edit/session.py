"""A session: every picture of a piece of work as a node, every edit an edge, and no step ever lost.

Nodes are never changed or removed. What moves is the position: a node, and the branch that grows from it. All positions
are kept in order, and undo and redo walk among them; what was undone is still in the tree. A node's id is the hash of
all that it says, its parent's id included, so that a changed step shows in every later one.

An edit begins at a node's own lossless pixels, never at a copy that a lossy format has touched, with a seed that no
other turn of the session has had: one noise in every turn amplifies what it leaves behind (EdiVal-Agent, 2025).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import fluxloom
from fluxloom.edit.graph import (
    BRANCH,
    ID,
    MAIN,
    SHORT,
    Node,
    Position,
    all_nodes,
    canonical,
    move,
    node_in,
    node_of,
    now,
    position_of,
    resolve,
    stand,
    tip,
)
from fluxloom.edit.measured import turn_meters
from fluxloom.edit.store import YOUNG, Store
from fluxloom.errors import BadInput
from fluxloom.infer import files, pictures
from fluxloom.infer.receipt import Receipt, examine
from fluxloom.infer.replay import difference
from fluxloom.infer.request import MAX_SEED, Picture, Reference, Result

_NOT_PICTURES = ("loras", "control_model")  # fields of a request that name other files


class Session:
    """One folder, as many processes as like to. Make one with :meth:`create` or :meth:`open`."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @classmethod
    def create(cls, folder: str | os.PathLike[str], seed: int | None = None) -> Session:
        """A new session in a new or empty folder; all fresh seeds follow from ``seed``, drawn where left out."""
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise BadInput(f"got seed {seed}, allowed 0 to {MAX_SEED}, try leaving it out")
        own = int.from_bytes(os.urandom(8), "little") if seed is None else seed

        def fill(db: sqlite3.Connection) -> None:
            values = (str(own), now(), fluxloom.__version__)
            db.execute("INSERT INTO session (only, seed, created, fluxloom) VALUES (1, ?, ?, ?)", values)
            db.execute("INSERT INTO branches VALUES (?, NULL)", (MAIN,))
            db.execute("INSERT INTO moves VALUES (0, NULL, ?)", (MAIN,))

        return cls(Store.create(Path(folder), fill))

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Session:
        """An existing session. Raises BadInput where there is none, Failure where it is damaged or of a newer kind."""
        return cls(Store.open(Path(folder)))

    # ------------------------------------------------------------------------------------------------ new pictures

    def import_picture(self, picture: Picture) -> Node:
        """Take a picture in: a file byte for byte, whatever its format."""
        start = self.position
        kept = _Kept.of(picture)
        facts = {"kind": "import", "instruction": "", "file": kept.file, "seed": kept.receipt and kept.receipt.seed}
        return self._commit(start, _root(start), kept, facts)

    def generate(self, draw: Callable[..., Result], prompt: str, **fields: Any) -> Node:
        """Draw a picture from words and keep it; ``draw`` is :meth:`fluxloom.Loom.generate` or the like."""
        start = self.position
        result = draw(prompt, **{**fields, "seed": self._seed(fields)})
        facts = {"kind": "generate", "instruction": prompt, "file": None, "seed": result.seed}
        return self._commit(start, _root(start), _Kept.of(result), facts, extras=_extras(fields, result))

    def edit(
        self,
        edit: Callable[..., Result],
        instruction: str,
        at: str | None = None,
        stay: bool = False,
        **fields: Any,
    ) -> Node:
        """Change the current picture, or that of another node or branch, and keep the new one.

        ``edit`` is :meth:`fluxloom.Loom.edit` or the like. The new node becomes the current one, unless another
        process moved on in the meantime: then it stands beside what that made, as it does with ``stay``.
        """
        with self.store.reading() as db:
            start = position_of(db)
            base = start if at is None else resolve(db, at)
            parent = node_of(db, node_in(base))
        source = self.picture(parent)
        result = edit(source, instruction, **{**fields, "seed": self._seed(fields)})
        facts = {"kind": "edit", "instruction": instruction, "file": None, "seed": result.seed}
        meters = turn_meters(_rgb(source), result.image, result.receipt)
        extras = _extras(fields, result, besides=parent.pixels)
        return self._commit(None if stay else start, base, _Kept.of(result), facts, meters, extras)

    # ------------------------------------------------------------------------------------------------------- looking

    @property
    def position(self) -> Position:
        """Where the session stands."""
        with self.store.reading() as db:
            return position_of(db)

    @property
    def branches(self) -> dict[str, str | None]:
        """Names, and the nodes they stand at; None before the first."""
        with self.store.reading() as db:
            return dict(db.execute("SELECT name, node FROM branches ORDER BY name"))

    def log(self) -> list[Node]:
        """All nodes in the order of their making."""
        with self.store.reading() as db:
            return all_nodes(db)

    def node(self, ref: str | None = None) -> Node:
        """The node of a branch, of an id or its first digits; the current one unless given. Raises BadInput."""
        with self.store.reading() as db:
            return node_of(db, node_in(position_of(db) if ref is None else resolve(db, ref)))

    def show(self, ref: str | None = None) -> dict[str, Any]:
        """All about one node: what it says, the file of its picture, and its receipt."""
        node = self.node(ref)
        receipt = self.receipt(node)
        facts = {**node.to_dict(), "path": str(self.store.objects / node.picture[:2] / node.picture)}
        return {**facts, "receipt": receipt and receipt.to_dict()}

    def receipt(self, node: Node) -> Receipt | None:
        """How a node was made, as the session has it, whatever has become of the file."""
        with self.store.reading() as db:
            (text,) = db.execute("SELECT receipt FROM nodes WHERE id = ?", (node.id,)).fetchone()
        return None if text is None else Receipt.from_dict(json.loads(text))

    def picture(self, node: Node) -> Path | Result:
        """The very picture of a node: the file that was imported, or what was drawn. Raises Failure where its file is
        missing or altered."""
        path = self.store.object(node.picture)
        receipt = self.receipt(node)
        if node.kind == "import" or receipt is None:
            return path
        return Result(pictures.read(path)[1], receipt)

    def lineage(self, node: Node) -> list[Node]:
        """A node with all that it came from, the first picture first."""
        known = {other.id: other for other in self.log()}
        found = [node]
        while (parent := found[-1].parent) is not None:
            found.append(known[parent])
        return found[::-1]

    def find(self, picture: Picture) -> Node | None:
        """The latest node with the pixels and the receipt of a picture; else with its pixels, as an edit that changed
        nothing has those of its source; else with its receipt, should it be a lossy copy."""
        own = _Kept.of(picture)
        receipt = own.receipt.id if own.receipt else ""
        found = [((node.pixels == own.pixels, node.receipt == receipt), node) for node in self.log()[::-1]]
        alike, node = max(found, key=lambda one: one[0], default=((False,), None))
        return node if any(alike) else None

    def compare(self, first: str, second: str) -> dict[str, Any]:
        """Two nodes: where their ways part, what was asked on each, and how far apart the pictures are."""
        nodes = self.node(first), self.node(second)
        ways = [self.lineage(node) for node in nodes]
        shared = [a for a, b in zip(*ways, strict=False) if a.id == b.id]
        facts: dict[str, Any] = {"common": shared[-1].id if shared else None}
        for side, node, way in zip("ab", nodes, ways, strict=True):
            facts[side] = {"id": node.id, "way": [step.instruction or step.file or "" for step in way[len(shared) :]]}
        facts["same_pixels"] = nodes[0].pixels == nodes[1].pixels
        if nodes[0].size == nodes[1].size:
            one, other = (_rgb(self.picture(node)) for node in nodes)
            largest, psnr = difference(one, other)
            facts |= {"max_difference": largest, "psnr": psnr if math.isfinite(psnr) else None}
            facts["meters"] = turn_meters(one, other, None)
        return facts

    # -------------------------------------------------------------------------------------------------------- moving

    def checkout(self, ref: str) -> Node:
        """Stand at a branch, which then grows with the next edit, or at a node."""
        with self.store.writing() as db:
            found = resolve(db, ref)
            node_in(found)
            move(db, found)
        return self.node()

    def undo(self) -> Node | None:
        """Back to the position before the last move; the node stays in the tree. None: before the first picture."""
        return self._walk(-1, "undo", "a move to take back")

    def redo(self) -> Node | None:
        """Forward again to the position that was undone."""
        return self._walk(1, "redo", "one after undo")

    def branch(self, name: str, at: str | None = None) -> Node:
        """Begin a branch at the current node or another, and stand on it."""
        if not BRANCH.fullmatch(name) or ID.fullmatch(name):
            raise BadInput(
                f"got branch {name[:100]!r}, allowed letters, digits and . _ - /, unlike a node's id, try 'night'"
            )
        with self.store.writing() as db:
            if db.execute("SELECT 1 FROM branches WHERE name = ?", (name,)).fetchone():
                raise BadInput(f"got branch {name!r}, which exists, allowed a new name, try checkout")
            found = node_in(position_of(db) if at is None else resolve(db, at))
            move(db, Position(found, name))
        return self.node()

    # ---------------------------------------------------------------------------------------------------- the folder

    def export(self, out: str | os.PathLike[str], ref: str | None = None, force: bool = False) -> list[Path]:
        """Write a node's picture to a file; or, to a folder, all from the first picture to it, in order.

        In a format of its own a picture keeps its very bytes, in another its pixels and its receipt.
        """
        node, target = self.node(ref), Path(out)
        steps = {target: node} if target.suffix and not target.is_dir() else {}
        if not steps:
            way = self.lineage(node)
            steps = {target / f"{k:02d}-{step.id[:SHORT]}{_suffix(step)}": step for k, step in enumerate(way)}
        taken = [str(path) for path in steps if path.exists()]
        if taken and not force:
            raise BadInput(f"got {taken[0]!r}, which exists, allowed a new name, try another, or force")
        return [self._export(step, path) for path, step in steps.items()]

    def gc(self, age: float = YOUNG) -> dict[str, int]:
        """Remove files that belong to no step: what killed processes have left, older than ``age`` seconds."""
        with self.store.writing() as db:
            extras = {name for (name,) in db.execute("SELECT object FROM extras")}
            kept = {node.picture for node in all_nodes(db)} | extras
            stray = self.store.stray(kept, age)
            size = sum(path.stat().st_size for path in stray)
            for path in stray:
                path.unlink()
        return {"removed": len(stray), "bytes": size}

    def given(self) -> list[Path]:
        """The further pictures (references, masks ...) that edits were given, as the session keeps them."""
        with self.store.reading() as db:
            names = [row[0] for row in db.execute("SELECT object FROM extras ORDER BY object")]
        return [self.store.object(name) for name in names if self.store.problem(name) is None]

    # -------------------------------------------------------------------------------------------------------- inside

    def _commit(
        self,
        start: Position | None,
        base: Position,
        kept: _Kept,
        facts: Mapping[str, Any],
        meters: Mapping[str, Any] | None = None,
        extras: tuple[_Kept, ...] = (),
    ) -> Node:
        with self.store.writing() as db:
            for extra in extras:
                row = (self.store.add(extra.write), extra.pixels, extra.file)
                db.execute("INSERT OR IGNORE INTO extras VALUES (?, ?, ?)", row)
            number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM nodes").fetchone()[0]
            picture = self.store.add(kept.write)
            receipt = kept.receipt
            own = {"picture": picture, "pixels": kept.pixels, "size": list(kept.size), "created": now()}
            edge = {"number": number, "parent": base.node, "receipt": receipt and receipt.id}
            body = canonical({**facts, **own, **edge})
            name = hashlib.sha256(body.encode()).hexdigest()
            texts = [None if one is None else canonical(one) for one in (receipt and receipt.to_dict(), meters)]
            db.execute("INSERT INTO nodes VALUES (?, ?, ?, ?, ?)", (number, name, body, *texts))
            if facts["seed"] is not None:
                db.execute("INSERT OR IGNORE INTO seeds VALUES (?)", (str(facts["seed"]),))
            still = base.branch is None or tip(db, base.branch) == base.node
            if position_of(db) == start and still:
                move(db, Position(name, base.branch))
            return node_of(db, name)

    def _seed(self, fields: Mapping[str, Any]) -> Any:
        """The seed that was given; else the next of the session's own that no turn has had. It is taken before the
        drawing: two processes at once draw two pictures."""
        if fields.get("seed") is not None:
            return fields["seed"]
        with self.store.writing() as db:
            own, turn = db.execute("SELECT seed, turn FROM session").fetchone()
            while True:
                turn += 1
                seed = int.from_bytes(hashlib.sha256(f"{own} {turn}".encode()).digest()[:4], "little")
                if db.execute("INSERT OR IGNORE INTO seeds VALUES (?)", (str(seed),)).rowcount:
                    break
            db.execute("UPDATE session SET turn = ?", (turn,))
        return seed

    def _walk(self, step: int, what: str, allowed: str) -> Node | None:
        with self.store.writing() as db:
            number = db.execute("SELECT at FROM session").fetchone()[0] + step
            row = db.execute("SELECT node, branch FROM moves WHERE number = ?", (number,)).fetchone()
            if row is None:
                raise BadInput(f"got {what} with nothing to {what}, allowed {allowed}, try log and checkout")
            stand(db, number, Position(*row))
            return None if row[0] is None else node_of(db, row[0])

    def _export(self, node: Node, path: Path) -> Path:
        source = self.store.object(node.picture)
        with Image.open(source) as found:
            own = found.format
        if Image.registered_extensions().get(path.suffix.lower()) == own:
            return files.write(path, source.read_bytes())
        picture = self.picture(node)
        if isinstance(picture, Result):
            return picture.save(path)
        form = files.format_of(path)
        return files.write(path, files.encode(_rgb(picture), form))


# ------------------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class _Kept:
    """A picture about to be kept: how its file is written, and what is known of it."""

    write: Callable[[Path], object]
    pixels: str
    size: tuple[int, int]
    file: str | None
    receipt: Receipt | None

    @classmethod
    def of(cls, picture: Picture) -> _Kept:
        if isinstance(picture, Result):
            return cls(picture.save, picture.receipt.pixels, picture.image.size, None, picture.receipt)
        found, rgb = pictures.read(picture)
        verdict = examine(found, rgb)
        receipt = verdict.receipt if verdict.state == "intact" else None
        name = None if isinstance(picture, Image.Image) else Path(picture).name
        data = files.encode(rgb, "PNG") if isinstance(picture, Image.Image) else Path(picture).read_bytes()
        return cls(lambda path: files.write(path, data), pictures.pixel_hash(rgb), rgb.size, name, receipt)


def _extras(fields: Mapping[str, Any], result: Result, besides: str | None = None) -> tuple[_Kept, ...]:
    """What else a picture was made from: without it the session could not replay it."""
    needed = {entry["pixels"] for entry in result.receipt.data["inputs"]} - {besides}
    given = [kept for name, value in fields.items() if name not in _NOT_PICTURES for kept in _flat(value)]
    return tuple(kept for kept in given if kept.pixels in needed)


def _flat(value: Any) -> Iterator[_Kept]:
    if isinstance(value, Reference):
        yield from _flat(value.image)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _flat(one)
    elif isinstance(value, (Image.Image, Result, os.PathLike, str)):
        with suppress(BadInput, OSError):  # a text that names no picture
            yield _Kept.of(value)


def _rgb(picture: Path | Result) -> Image.Image:
    return picture.image if isinstance(picture, Result) else pictures.read(picture)[1]


def _suffix(node: Node) -> str:
    return Path(node.file).suffix.lower() if node.file else ".png"


def _root(start: Position) -> Position:
    """Where a picture without parent stands: on a branch that has none yet, else on no branch."""
    return start if start.node is None else Position(None, None)
