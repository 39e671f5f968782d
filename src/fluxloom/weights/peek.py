"""What a file on a hub is, by its header alone: nobody should wait for 24 GB to learn that they do not do."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from fluxloom.errors import Failure, WeightsError
from fluxloom.weights.checkpoint import Checkpoint, Entry
from fluxloom.weights.layout import Pick
from fluxloom.weights.shelves import Remote, Shelf
from fluxloom.weights.stored import KINDS

_GUESS, _MOST = 1 << 18, 1 << 26  # bytes; 780 tensors take 90 kB
# Of packed storage the shapes in the header are not those of the tensors.
_PLAIN = frozenset({"F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


def peek(shelf: Shelf, pick: Pick) -> Checkpoint | None:
    """Names, shapes and formats of one safetensors file that is still on a hub, and its metadata; None where that takes
    its data, too. The tensors cannot be read."""
    if not isinstance(shelf, Remote) or len(pick.names) > 1 or not pick.path.endswith((".safetensors", ".sft")):
        return None
    start = shelf.hub.beginning(shelf.snapshot, pick.path, _GUESS)
    length = int.from_bytes(start[:8], "little")
    if length > _MOST:
        return None
    if length + 8 > len(start):
        start = shelf.hub.beginning(shelf.snapshot, pick.path, length + 8)
    try:
        header = json.loads(start[8 : 8 + length])
        facts = {name: str(text) for name, text in header.pop("__metadata__", {}).items()}
        rows = {name: (row["dtype"], tuple(row["shape"])) for name, row in header.items()}
        if not {kind for kind, _ in rows.values()} <= _PLAIN:
            return None
        entries = {
            name: Entry(shape, KINDS[kind].storage, KINDS[kind].nbytes(shape), _unread)
            for name, (kind, shape) in rows.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, WeightsError):
        return None  # opening the file says what is wrong with it
    return Checkpoint(entries, (Path(pick.path),), facts)


def sha256_of(shelf: Shelf, pick: Pick) -> str | None:
    """The hash that a hub's listing gives a file; None where it gives none."""
    return shelf.snapshot.files[pick.path].etag or None if isinstance(shelf, Remote) else None


def _unread() -> Tensor:
    raise Failure("got a request for a tensor that is still on the hub, allowed its name and shape, try fetching it")
