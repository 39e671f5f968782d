"""The graph of a session: edges, positions and branches against a simple model, and clean pixels for every turn."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pico import SPEC, photo, save_model
from PIL import Image

from fluxloom.api import Loom
from fluxloom.edit.session import Session
from fluxloom.errors import BadInput
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.receipt import read_receipt
from fluxloom.infer.request import Reference, Result
from fluxloom.infer.runtime import Runtime

TINY = {"width": 32, "height": 32, "steps": 1, "true_cfg": 1.0}


@pytest.fixture(scope="module")
def loom(tmp_path_factory: pytest.TempPathFactory) -> Loom:
    folder = save_model(tmp_path_factory.mktemp("pico"), SPEC)
    return Loom(Pipeline(Runtime.from_folder(folder, SPEC, torch.device("cpu"), torch.float32)))


@pytest.fixture
def session(tmp_path: Path) -> Session:
    photo().save(tmp_path / "photo.jpg", quality=80)
    found = Session.create(tmp_path / "session", seed=1)
    found.import_picture(tmp_path / "photo.jpg")
    return found


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_imports_and_exports_keep_the_bytes(session: Session, tmp_path: Path, name: str) -> None:
    photo(seed=2).save(tmp_path / name)
    node = session.import_picture(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert session.store.object(node.picture).read_bytes() == data
    assert (node.file, node.receipt, node.parent, node.branches, node.current) == (name, None, None, (), True)
    (path,) = session.export(tmp_path / f"out{Path(name).suffix}")
    assert path.read_bytes() == data
    with pytest.raises(BadInput, match=r"out.*which exists, allowed a new name"):
        session.export(path)
    (other,) = session.export(tmp_path / "other.webp", force=True)
    with Image.open(other) as found, Image.open(tmp_path / name) as first:
        assert np.array_equal(found.convert("RGB"), first.convert("RGB"))


def test_a_turn_starts_from_clean_pixels_with_a_fresh_seed(session: Session, loom: Loom, tmp_path: Path) -> None:
    seen: list[Any] = []

    def edit(picture: Any, instruction: str, **fields: Any) -> Result:
        seen.append((picture, fields["seed"]))
        return loom.edit(picture, instruction, **fields)

    first, second = session.edit(edit, "make it red", **TINY), session.edit(edit, "snow", **TINY)
    assert (first.parent, second.parent) == (session.log()[0].id, first.id)
    assert seen[0][0].read_bytes() == (tmp_path / "photo.jpg").read_bytes()
    assert seen[1][0].receipt.id == first.receipt
    assert (first.seed, second.seed) == (seen[0][1], seen[1][1])
    assert first.seed != second.seed
    assert first.meters is not None
    assert 0 <= first.meters["changed"] <= 1
    # The same in another session of the same seed; a seed that was given is not drawn again.
    twin = Session.create(tmp_path / "twin", seed=1)
    twin.import_picture(tmp_path / "photo.jpg")
    assert twin.edit(edit, "make it red", seed=second.seed, **TINY).seed == second.seed
    assert [twin.edit(edit, "snow", **TINY).seed for _ in range(2)] != [first.seed, second.seed]
    seeds = [node.seed for node in twin.log()[1:]]
    assert len(set(seeds)) == 3
    assert seeds[1] == first.seed
    # A lossy copy of a node is known by its receipt, and never the beginning of a turn.
    (copy,) = session.export(tmp_path / "copy.jpg")
    assert read_receipt(copy).id == second.receipt
    assert session.find(copy) == session.node(second.id)
    assert session.find(photo(seed=9)) is None


def test_further_pictures_are_kept(session: Session, loom: Loom, tmp_path: Path) -> None:
    photo(seed=5).save(tmp_path / "other.png")

    def edit(picture: Any, instruction: str, references: Any = (), **fields: Any) -> Result:
        from fluxloom.infer.request import Request

        both = (Reference(picture), *references)
        return loom.run(Request(prompt=instruction, references=both, **fields))[0]

    session.edit(edit, "a cat", references=(Reference(tmp_path / "other.png"),), **TINY)
    (kept,) = session.given()
    assert kept.read_bytes() == (tmp_path / "other.png").read_bytes()
    session.gc(age=0)
    assert session.given() == [kept]


def test_several_of_one_turn_stand_beside_each_other(session: Session, loom: Loom) -> None:
    root = session.log()[0]
    first = session.edit(loom.edit, "snow", **TINY)
    second = session.edit(loom.edit, "snow", at=root.id, stay=True, **TINY)
    assert (second.parent, second.current, session.node().id) == (root.id, False, first.id)
    # So does what another process was drawing while the session moved on.
    late = session.edit(lambda *a, **k: (session.undo(), loom.edit(*a, **k))[1], "a dog", **TINY)
    assert (late.parent, late.current, session.node().id) == (first.id, False, root.id)
    facts = session.compare(late.id, second.id)
    assert facts["common"] == root.id
    assert [facts[side]["way"] for side in "ab"] == [["snow", "a dog"], ["snow"]]
    assert facts["max_difference"] > 0


def test_a_wrong_word_gets_a_clear_answer(session: Session, loom: Loom, tmp_path: Path) -> None:
    node = session.node()
    for ref in ("abcd" if not node.id.startswith("abcd") else "dcba", node.id[:3], "night", node.id + "0", "%"):
        with pytest.raises(BadInput, match="which is no branch and no node here, allowed a branch or 4 and more"):
            session.node(ref)
    for name in ("beef", "", "a b", "-x", "x" * 101):
        with pytest.raises(BadInput, match="allowed letters, digits"):
            session.branch(name)
    with pytest.raises(BadInput, match="'main', which exists, allowed a new name"):
        session.branch("main")
    with pytest.raises(BadInput, match="got redo with nothing to redo"):
        session.redo()
    assert session.undo() is None
    with pytest.raises(BadInput, match="got undo with nothing to undo"):
        session.undo()
    with pytest.raises(BadInput, match="got main without a picture, allowed with one, try import"):
        session.edit(loom.edit, "snow")
    assert session.import_picture(photo(seed=4)).branches == ("main",)
    for folder, why in ((session.store.folder, "is a session already"), (tmp_path, "holds other things")):
        with pytest.raises(BadInput, match=why):
            Session.create(folder)
    with pytest.raises(BadInput, match="got seed -1, allowed 0 to"):
        Session.create(tmp_path / "new", seed=-1)
    with pytest.raises(BadInput, match="which is no session, allowed one, try `fluxloom session new"):
        Session.open(tmp_path)


class Graph(RuleBasedStateMachine):
    """A session beside what it should be: parents by node, positions with an index, branches."""

    loom: Loom

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.session = Session.create(Path(self.folder.name) / "s", seed=7)
        self.parents: dict[str, str | None] = {}
        self.branches: dict[str, str | None] = {"main": None}
        self.moves: list[tuple[str | None, str | None]] = [(None, "main")]
        self.at = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    def move(self, node: str | None, branch: str | None) -> None:
        self.moves[self.at + 1 :] = [(node, branch)]
        self.stand(self.at + 1)

    def stand(self, at: int) -> None:
        self.at = at
        node, branch = self.moves[at]
        if branch is not None:
            self.branches[branch] = node

    def pick(self, number: int) -> tuple[str, str, str | None]:
        """A word for a node or a branch, and the position it means."""
        tips = [(name, node, name) for name, node in self.branches.items() if node]
        words = [*((node[:12], node, None) for node in self.parents), *tips]
        return words[number % len(words)]

    @rule(seed=st.integers(0, 2))
    def import_picture(self, seed: int) -> None:
        node = self.session.import_picture(photo(32, 32, seed=seed)).id
        self.parents[node] = None
        here, branch = self.moves[self.at]
        self.move(node, branch if here is None else None)

    @precondition(lambda self: self.moves[self.at][0])
    @rule()
    def edit(self) -> None:
        node = self.session.edit(self.loom.edit, "snow", **TINY).id
        self.parents[node] = self.moves[self.at][0]
        self.move(node, self.moves[self.at][1])

    @precondition(lambda self: self.parents)
    @rule(number=st.integers(0, 99))
    def edit_elsewhere(self, number: int) -> None:
        word, parent, branch = self.pick(number)
        node = self.session.edit(self.loom.edit, "a cat", at=word, **TINY).id
        self.parents[node] = parent
        self.move(node, branch)

    @precondition(lambda self: self.parents)
    @rule(number=st.integers(0, 99))
    def checkout(self, number: int) -> None:
        word, node, branch = self.pick(number)
        assert self.session.checkout(word).id == node
        self.move(node, branch)

    @precondition(lambda self: self.parents)
    @rule(number=st.integers(0, 99))
    def branch(self, number: int) -> None:
        word, node, _ = self.pick(number)
        name = f"b{len(self.branches)}"
        assert name in self.session.branch(name, word).branches
        self.move(node, name)

    @precondition(lambda self: self.at > 0)
    @rule()
    def undo(self) -> None:
        self.stand(self.at - 1)
        node = self.session.undo()
        assert (node and node.id) == self.moves[self.at][0]

    @precondition(lambda self: self.at + 1 < len(self.moves))
    @rule()
    def redo(self) -> None:
        self.stand(self.at + 1)
        node = self.session.redo()
        assert (node and node.id) == self.moves[self.at][0]

    @rule()
    def reopen_and_clean(self) -> None:
        self.session = Session.open(self.session.store.folder)
        assert self.session.gc(age=0) == {"removed": 0, "bytes": 0}

    @invariant()
    def agrees(self) -> None:
        nodes, place = self.session.log(), self.session.position
        assert {node.id: node.parent for node in nodes} == self.parents
        assert [node.number for node in nodes] == list(range(1, len(nodes) + 1))
        assert (place.node, place.branch) == self.moves[self.at]
        assert self.session.branches == self.branches
        assert all(
            node.branches == tuple(sorted(b for b, n in self.branches.items() if n == node.id)) for node in nodes
        )
        seeds = [node.seed for node in nodes if node.kind == "edit"]
        assert len(set(seeds)) == len(seeds)


def test_the_graph_is_what_it_should_be(loom: Loom) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    made = type("MadeGraph", (Graph,), {"loom": loom})
    run_state_machine_as_test(made, settings=settings(max_examples=8, stateful_step_count=16, deadline=None))
