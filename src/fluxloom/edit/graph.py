"""The rows of a session: nodes, positions, and the names by which they are called."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fluxloom.errors import BadInput, Failure

MAIN = "main"  # the branch that a session begins with
SHORT = 8  # digits of an id as it is shown; more where they do not tell it from another
PREFIX = 4  # digits that are taken for an id
BRANCH = re.compile(r"[\w][\w./-]{0,99}")
ID = re.compile(rf"[0-9a-f]{{{PREFIX},64}}")


@dataclass(frozen=True)
class Node:
    """One picture of a session.

    kind     ``import``, ``generate`` or ``edit``; ``instruction`` is what was asked for
    picture  sha256 of the bytes of its file, ``pixels`` the hash of what that decodes to
    receipt  id of its receipt; of an import only where it came with one
    number   its place in the order of the session
    meters   what changed against its parent; beside the id, as later versions may measure anew
    """

    id: str
    parent: str | None
    kind: str
    instruction: str
    picture: str
    pixels: str
    size: tuple[int, int]
    file: str | None
    receipt: str | None
    seed: int | None
    created: str
    number: int
    branches: tuple[str, ...]
    current: bool
    meters: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "size": list(self.size), "branches": list(self.branches)}


@dataclass(frozen=True)
class Position:
    """Where the session stands: a node, and the branch that moves along."""

    node: str | None
    branch: str | None


def position_of(db: sqlite3.Connection) -> Position:
    """Where the session stands."""
    query = "SELECT node, branch FROM moves JOIN session ON moves.number = session.at"
    return Position(*db.execute(query).fetchone())


def move(db: sqlite3.Connection, position: Position) -> None:
    """A new last position; what had been undone can no more be redone, but stays in the tree."""
    number = db.execute("SELECT at FROM session").fetchone()[0] + 1
    db.execute("DELETE FROM moves WHERE number >= ?", (number,))
    db.execute("INSERT INTO moves VALUES (?, ?, ?)", (number, position.node, position.branch))
    stand(db, number, position)


def stand(db: sqlite3.Connection, number: int, position: Position) -> None:
    """Be at one of the positions; its branch moves there."""
    db.execute("UPDATE session SET at = ?", (number,))
    if position.branch is not None:
        db.execute("INSERT OR REPLACE INTO branches VALUES (?, ?)", (position.branch, position.node))


def tip(db: sqlite3.Connection, branch: str) -> str | None:
    """The node of a branch."""
    row: tuple[str | None] = db.execute("SELECT node FROM branches WHERE name = ?", (branch,)).fetchone()
    return row[0]


def node_in(position: Position) -> str:
    """The node of a position. Raises BadInput where there is none yet."""
    if position.node is None:
        raise BadInput(f"got {position.branch or 'a session'} without a picture, allowed with one, try import")
    return position.node


def resolve(db: sqlite3.Connection, ref: str) -> Position:
    """A branch with its node, or a node by the first digits of its id. Raises BadInput."""
    row = db.execute("SELECT node, name FROM branches WHERE name = ?", (ref,)).fetchone()
    if row is not None:
        return Position(*row)
    known = [found for (found,) in db.execute("SELECT id FROM nodes")]
    found = [name for name in known if ID.fullmatch(ref) and name.startswith(ref)]
    if len(found) == 1:
        return Position(found[0], None)
    got = f"got {ref[:64]!r}, which is {'the beginning of several ids' if found else 'no branch and no node'} here"
    raise BadInput(f"{got}, allowed a branch or {PREFIX} and more digits that tell a node from others, try log")


def node_of(db: sqlite3.Connection, name: str) -> Node:
    """The node of a whole id."""
    return next(node for node in all_nodes(db) if node.id == name)


def all_nodes(db: sqlite3.Connection) -> list[Node]:
    """All nodes in the order of their making."""
    names: dict[str, list[str]] = {}
    for branch, top in db.execute("SELECT name, node FROM branches ORDER BY name"):
        names.setdefault(top, []).append(branch)
    here = position_of(db).node
    rows = db.execute("SELECT id, body, meters FROM nodes ORDER BY number")
    return [_read(name, body, meters, tuple(names.get(name, ())), name == here) for name, body, meters in rows]


def _read(name: str, body: str, meters: str | None, branches: tuple[str, ...], current: bool) -> Node:
    try:
        said = json.loads(body)
        size = (int(said["size"][0]), int(said["size"][1]))
        measured = None if meters is None else json.loads(meters)
        return Node(**{**said, "id": name, "size": size, "branches": branches, "current": current, "meters": measured})
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise Failure(f"got a damaged node {name[:SHORT]} ({error}), allowed whole ones, try a copy") from error


def body_hash(db: sqlite3.Connection) -> dict[str, str]:
    """Of every node the id that what it says now would give it."""
    rows = db.execute("SELECT id, body FROM nodes")
    return {name: hashlib.sha256(body.encode()).hexdigest() for name, body in rows}


def short(node: Node | str, nodes: list[Node]) -> str:
    """An id in as few digits as tell it from the others, at least eight."""
    own = node if isinstance(node, str) else node.id
    length = SHORT
    while sum(other.id.startswith(own[:length]) for other in nodes) > 1:
        length += 1
    return own[:length]


def canonical(value: Any) -> str:
    """JSON in the one form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def now() -> str:
    """UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
