"""Along a chain: what is sound, what was done to it since, and drawing all of it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import SPEC, photo, save_model
from PIL import Image

from fluxloom.api import MAKERS, Loom
from fluxloom.edit import chain
from fluxloom.edit.chain import drift_rows, replay_session, verify_picture, verify_session
from fluxloom.edit.graph import canonical
from fluxloom.edit.measured import measurable
from fluxloom.edit.session import Session
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.receipt import Receipt
from fluxloom.infer.request import Result
from fluxloom.infer.runtime import Runtime

TINY = {"steps": 1, "true_cfg": 1.0}


def load(folder: Path, seed: int) -> Loom:
    save_model(folder, SPEC, seed)
    return Loom(Pipeline(Runtime.from_folder(folder, SPEC, torch.device("cpu"), torch.float32), MAKERS))


@pytest.fixture(scope="module")
def loom(tmp_path_factory: pytest.TempPathFactory) -> Loom:
    return load(tmp_path_factory.mktemp("pico"), 0)


@pytest.fixture
def session(tmp_path: Path, loom: Loom) -> Session:
    """An import with two edits after it, the second of half the picture, and a picture drawn from words."""
    photo().save(tmp_path / "photo.jpg", quality=80)
    found = Session.create(tmp_path / "session", seed=1)
    found.import_picture(tmp_path / "photo.jpg")
    found.edit(loom.edit, "make it red", **TINY)
    found.edit(loom.edit, "a cat", box=(0, 0, 32, 48), **TINY)
    found.generate(loom.generate, "a dog", **TINY)
    return found


def said(found: list[chain.Finding], state: str) -> list[str]:
    return [f"{one.subject} {one.detail}" for one in found if one.state == state]


def test_a_session_is_sound_and_replays(session: Session, loom: Loom, tmp_path: Path) -> None:
    found = verify_session(session)
    assert [len(said(found, state)) for state in ("sound", "broken")] == [4, 0]
    assert [detail.partition(" ")[2] for detail in said(found, "note")] == [
        "drawn by pico, a model that this version does not know"
    ]
    rows = list(replay_session(session, loom.replay))
    assert [row.verdict for row in rows] == ["given", "bit-exact", "bit-exact", "bit-exact"]
    assert [row.node for row in replay_session(session, loom.replay, session.log()[1].id)] == session.log()[:2]
    other = load(tmp_path / "other", 5)
    rows = list(replay_session(session, other.replay))
    assert [row.verdict for row in rows] == ["given", "different", "different", "different"]
    assert all("weights content" in " ".join(row.causes) and (row.psnr or 99) < 60 for row in rows[1:])
    session.store.object(session.log()[1].picture).unlink()
    rows = list(replay_session(session, loom.replay))
    assert [row.verdict for row in rows] == ["given", "failed", "failed", "bit-exact"]
    assert "no file" in rows[2].causes[0]
    assert json.loads(json.dumps([row.to_dict() for row in rows]))[1]["node"] == session.log()[1].id


def test_drift_is_measured_turn_by_turn(session: Session) -> None:
    rows = drift_rows(session, session.log()[2].id)
    assert [row["instruction"] for row in rows] == ["make it red", "a cat"]
    assert rows[1]["step"]["psnr"] == 100  # the other half is locked
    assert 0.3 < session.log()[2].meters["changed"] <= 0.51
    assert json.loads(json.dumps(rows)) == rows
    assert measurable(Image.new("RGB", (8000, 2000))).size == (4000, 1000)
    assert measurable(photo(1999, 2001)).size == (1999, 2001)


def body(session: Session, number: int, **change: Any) -> None:
    with session.store.writing() as db:
        (text,) = db.execute("SELECT body FROM nodes WHERE number = ?", (number,)).fetchone()
        db.execute("UPDATE nodes SET body = ? WHERE number = ?", (canonical({**json.loads(text), **change}), number))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: body(s, 2, instruction="make it green"), "what it says is not what its id was made of"),
        (lambda s: body(s, 3, parent=s.log()[0].id), "by its receipt it was not made from"),
        (lambda s: body(s, 3, parent="0" * 64), "its parent is not in the session"),
        (lambda s: body(s, 2, pixels=s.log()[0].pixels), "its file has other pixels than the session recorded"),
        (lambda s: body(s, 2, receipt=s.log()[2].receipt), "its receipt in the session is not the one it names"),
        (lambda s: body(s, 2, picture=s.log()[2].picture), "the receipt in its file is not the session's"),
        (lambda s: s.store.object(s.log()[0].picture).write_bytes(b"other"), "an altered file"),
    ],
)
def test_what_was_tampered_with_comes_out(session: Session, change: Any, why: str) -> None:
    change(session)
    assert why in " ".join(said(verify_session(session), "broken"))


def test_a_picture_is_followed_to_its_beginning(session: Session, tmp_path: Path) -> None:
    way = session.export(tmp_path / "out", session.log()[2].id)
    found = verify_picture(way[2])
    assert [len(said(found, state)) for state in ("sound", "broken")] == [3, 0]
    assert not any("not here" in line for line in said(found, "note"))  # the box needs no mask file
    assert any("the right pixels; it came without a receipt" in line for line in said(found, "sound"))
    # A lossy copy of the parent still tells of it; a stripped one does not, and nor does none.
    session.export(way[1].with_suffix(".jpg"), session.log()[1].id)
    way[1].unlink()
    assert any("only a lossy copy is here" in line for line in said(verify_picture(way[2]), "note"))
    way[1].with_suffix(".jpg").unlink()
    with Image.open(session.store.object(session.log()[1].picture)) as parent:
        Image.fromarray(np.asarray(parent)).save(way[1])
    assert any("another program has stripped" in line for line in said(verify_picture(way[2]), "broken"))
    way[1].unlink()
    assert any("which is not here to be checked" in line for line in said(verify_picture(way[2]), "note"))
    assert said(verify_picture(way[2], session), "note")[-1].endswith(f"node {session.log()[2].id[:8]}: a cat")
    # The picture itself without its receipt: the session knows it by its pixels.
    with Image.open(way[2]) as found_picture:
        Image.fromarray(np.asarray(found_picture)).save(way[2])
    found = verify_picture(way[2], session)
    assert "carries no receipt: not one of ours, or another program has stripped it" in said(found, "broken")[0]
    assert "its pixels are those of node" in said(found, "note")[0]


def test_other_weights_and_versions_are_named(loom: Loom, tmp_path: Path) -> None:
    drawn = loom.generate("a cat", seed=1, **TINY)
    data = json.loads(json.dumps(drawn.receipt.data))
    data["model"]["name"], data["fluxloom"] = "nano", "0.0.9"
    path = Result(drawn.image, Receipt(data)).save(tmp_path / "a.png")
    notes = said(verify_picture(path), "note")
    assert "of nano, which are missing: installed are sha256:" in notes[0]
    assert "drawn with fluxloom 0.0.9, here is" in notes[1]
