"""Along a chain of pictures: is each what its receipt says, can it be drawn again, how far does it drift."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

import fluxloom
from fluxloom.core.specs import MODELS
from fluxloom.edit.graph import Node, body_hash, short
from fluxloom.edit.measured import changed, measurable
from fluxloom.edit.session import Session
from fluxloom.errors import BadInput, Failure, FluxloomError
from fluxloom.infer import files, pictures
from fluxloom.infer.finish import masks
from fluxloom.infer.receipt import Receipt, examine, versions
from fluxloom.infer.replay import Replay
from fluxloom.infer.request import Picture, Result
from fluxloom.weights.load import ASSETS, verified

State = Literal["sound", "note", "broken"]


@dataclass(frozen=True)
class Finding:
    """What was found about one picture: ``sound``; a ``note`` that breaks nothing; or ``broken``."""

    subject: str
    state: State
    detail: str

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


# -------------------------------------------------------------------------------------------------------------- verify


def verify_picture(path: Path, session: Session | None = None) -> list[Finding]:
    """Follow a picture's chain: its receipt and pixels, then those of what it was made from, as far as that lies beside
    it or in ``session``. Raises BadInput where it cannot be read."""
    found, rgb = pictures.read(path)
    verdict, name = examine(found, rgb), path.name
    out = list(_known(name, pictures.pixel_hash(rgb), verdict.receipt, session))
    if verdict.state == "none":
        why = "it carries no receipt: not one of ours, or another program has stripped it"
        return [Finding(name, "broken", why), *out]
    if verdict.receipt is None or verdict.state != "intact":
        return [Finding(name, "broken", verdict.detail), *out]
    around = [other for other in sorted(path.parent.iterdir()) if other.suffix.lower() in files.FORMATS]
    if session is not None:
        around += [session.store.objects / node.picture[:2] / node.picture for node in session.log()]
    return [*_chain(name, verdict.receipt, around, set()), *out]


def verify_session(session: Session) -> list[Finding]:
    """Check every node: what it says against its id, its file, the pixels and the receipt in that, and its parent's."""
    problem = session.store.sound()
    if problem is not None:
        return [Finding("session.db", "broken", f"SQLite finds it damaged: {problem}")]
    nodes = session.log()
    with session.store.reading() as db:
        ids = body_hash(db)
    known = {node.id: node for node in nodes}
    out: list[Finding] = []
    for node in nodes:
        name = short(node, nodes)
        faults = [] if ids[node.id] == node.id else ["what it says is not what its id was made of"]
        faults += _node_faults(session, node, known)
        out += [Finding(name, "broken", fault) for fault in faults] or [Finding(name, "sound", "")]
        receipt = None if faults else session.receipt(node)
        if receipt is not None:
            said = {(found.state, found.detail) for found in out}
            out += [note for note in _origin(name, receipt) if (note.state, note.detail) not in said]
    return out


def _node_faults(session: Session, node: Node, known: dict[str, Node]) -> Iterator[str]:
    problem = session.store.problem(node.picture)
    if problem is not None:
        yield problem
        return
    found, rgb = pictures.read(session.store.object(node.picture))
    if pictures.pixel_hash(rgb) != node.pixels:
        yield "its file has other pixels than the session recorded"
    try:
        receipt = session.receipt(node)
    except Failure as error:
        yield str(error)
        return
    if (receipt and receipt.id) != node.receipt:
        yield "its receipt in the session is not the one it names"
    inside = examine(found, rgb)
    if receipt is not None and (inside.state != "intact" or inside.receipt is None or inside.receipt.id != receipt.id):
        yield f"the receipt in its file is not the session's: {inside.detail}"
    if node.parent is None:
        return
    parent = known.get(node.parent)
    if parent is None or receipt is None:
        yield "its parent is not in the session" if parent is None else "it has no receipt"
    elif all(
        (entry["pixels"], entry["receipt"]) != (parent.pixels, parent.receipt) for entry in receipt.data["inputs"]
    ):
        yield f"by its receipt it was not made from {short(parent, list(known.values()))}"


def _known(name: str, pixels: str, receipt: Receipt | None, session: Session | None) -> Iterator[Finding]:
    """What a session knows of a picture whose own receipt says little."""
    nodes = [] if session is None else session.log()
    for node in nodes:
        if node.pixels == pixels:
            yield Finding(name, "note", f"its pixels are those of node {short(node, nodes)}: {node.instruction}")
        elif receipt is not None and node.receipt == receipt.id:
            yield Finding(name, "note", f"its receipt is that of node {short(node, nodes)}: {node.instruction}")


def _chain(name: str, receipt: Receipt, around: Sequence[Path], seen: set[str]) -> Iterator[Finding]:
    yield Finding(name, "sound", f"receipt {receipt.id[:15]} and pixels belong together")
    yield from _origin(name, receipt)
    seen.add(receipt.id)
    told = receipt.data.get("finish", [])
    for entry in receipt.data["inputs"]:
        if any(pictures.pixel_hash(mask) == entry["pixels"] for mask in masks(told, entry["size"])):
            continue  # a box's, made again from its corners
        what = f"{entry['role']} {(entry['file'] or entry['pixels'])[:24]}"
        path, parent, exact = _find(entry, around)
        if path is None:
            yield Finding(name, "note", f"made from {what}, which is not here to be checked")
        elif parent is None and entry["receipt"] is not None:
            yield Finding(_called(path), "broken", f"as {what} it had a receipt, which another program has stripped")
        elif not exact:
            yield Finding(_called(path), "note", f"as {what} only a lossy copy is here; its receipt is the right one")
        elif parent is None:
            yield Finding(_called(path), "sound", f"as {what} it has the right pixels; it came without a receipt")
        if path is not None and parent is not None and parent.id not in seen:
            yield from _chain(_called(path), parent, around, seen)


def _called(path: Path) -> str:
    """A file's name; of a session's own its first digits."""
    return path.name if path.suffix else path.name[:12]


def _find(entry: dict[str, Any], around: Sequence[Path]) -> tuple[Path | None, Receipt | None, bool]:
    """The file of an input: the very pixels, best with their receipt; else a lossy copy with that receipt."""
    best: tuple[int, Path | None, Receipt | None, bool] = (0, None, None, False)
    for path in around:
        try:
            if sorted(pictures.size_of(path)) != sorted(entry["size"]):
                continue
            found, rgb = pictures.read(path)
        except BadInput:
            continue
        verdict = examine(found, rgb)
        exact = pictures.pixel_hash(rgb) == entry["pixels"]
        own = verdict.receipt if verdict.state == "intact" else None
        right = own is not None and own.id == entry["receipt"]
        rank = 2 * exact + right
        if rank > best[0]:
            best = (rank, path, own if right else None, exact)
    return best[1:]


def _origin(name: str, receipt: Receipt) -> Iterator[Finding]:
    """What of the model and of the program has changed since."""
    model, content = receipt.data["model"].get("name"), receipt.data["model"].get("content")
    if model not in MODELS:
        yield Finding(name, "note", f"drawn by {model}, a model that this version does not know")
    elif not MODELS[model].embedded:
        yield Finding(name, "note", f"drawn by {model}; its weights are compared when it is drawn again")
    elif (here := verified(ASSETS / model)) != content:
        said = f"drawn with weights {str(content)[:15]} of {model}, which are missing: installed are {here[:15]}"
        yield Finding(name, "note", said)
    now = {"fluxloom": fluxloom.__version__, **versions()}
    then = {"fluxloom": receipt.data["fluxloom"], **receipt.data["versions"]}
    for part in sorted(now.keys() & then.keys()):
        if now[part] != then[part]:
            yield Finding(name, "note", f"drawn with {part} {then[part]}, here is {now[part]}")


# -------------------------------------------------------------------------------------------------------------- replay


@dataclass(frozen=True)
class Redrawn:
    """One node drawn again.

    verdict  ``given`` (an import), ``bit-exact``, ``different``, or ``failed`` with what was missing in ``causes``
    psnr     in dB, where the pictures differ
    """

    node: Node
    verdict: Literal["given", "bit-exact", "different", "failed"]
    max_difference: int | None = None
    psnr: float | None = None
    causes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "node": self.node.id, "causes": list(self.causes)}


def replay_session(
    session: Session,
    replay: Callable[[Path, Sequence[Picture]], Replay],
    ref: str | None = None,
    inputs: Sequence[Picture] = (),
) -> Iterator[Redrawn]:
    """Draw all nodes again in the order of their making, or those that lead to ``ref``; imports are given.

    ``replay`` is :meth:`fluxloom.Loom.replay` or the like; ``inputs`` are what the session does not keep, as LoRAs.
    Each is drawn from its parent's very pixels: where that came out bit-exact, too, the whole way follows from the
    imports and the receipts.
    """
    given = [*inputs, *session.given()]
    for node in session.log() if ref is None else session.lineage(session.node(ref)):
        if node.kind == "import":
            problem = session.store.problem(node.picture)
            yield Redrawn(node, "failed", causes=(problem,)) if problem else Redrawn(node, "given")
            continue
        try:
            parents = [] if node.parent is None else [session.picture(session.node(node.parent))]
            found = replay(session.store.object(node.picture), [*parents, *given])
        except FluxloomError as error:
            yield Redrawn(node, "failed", causes=(str(error),))
            continue
        same = found.verdict == "bit-exact"
        causes = found.causes or (() if same else ("nothing that receipts record: kernels that round as they like",))
        yield Redrawn(node, found.verdict, found.max_difference, None if same else found.psnr, causes)


# --------------------------------------------------------------------------------------------------------------- drift


def drift_rows(session: Session, ref: str | None = None) -> list[dict[str, Any]]:
    """The meters of every edit that leads to a node (the current one unless given): against the turn before, and
    against the first picture outside of all that was changed since."""
    from fluxloom.edit.drift import Drift

    way = session.lineage(session.node(ref))
    before = measurable(_upright(session.picture(way[0])))
    chain, rows = Drift(np.asarray(before)), []
    for node in way[1:]:
        after = pictures.resize(_upright(session.picture(node)), *before.size)
        turn = chain.add(np.asarray(after), changed(before, after, session.receipt(node)))
        rows.append({"id": node.id, "instruction": node.instruction, **turn.to_dict()})
        before = after
    return rows


def _upright(picture: str | os.PathLike[str] | Result) -> Image.Image:
    return picture.image if isinstance(picture, Result) else pictures.read(picture)[1]
