"""Sessions on the command line: a whole piece of work, from new to replay."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import QUICK, Run

from fluxloom.cli import edit as edit_command
from fluxloom.cli.session import shortcut
from fluxloom.errors import BadInput

STEPS = ("--steps", "1")


@pytest.fixture
def begun(run: Run, here: Path) -> str:
    """A session with a picture and one edit of it."""
    assert run("session", "new", "work", "--seed", "1").out == "work\n"
    assert run("session", "generate", "work", "a cat", *QUICK).code == 0
    ended = run("session", "edit", "work", "make it snow", *STEPS, "--json")
    assert (ended.code, ended.err) == (0, "")
    return str(json.loads(ended.out)["id"])


def test_a_piece_of_work(run: Run, here: Path, begun: str) -> None:
    root = run("session", "undo", "work").out.split()[0]
    assert run("session", "redo", "work").out.startswith(begun[:8])
    assert "(main, night)" in run("session", "branch", "work", "night").out
    pair = run("session", "edit", "work", "add a dog", "-n", "2", "--at", root, "--box", "0,0,32,64", *STEPS, "--json")
    first, second = json.loads(pair.out)["nodes"]
    assert [first["current"], second["current"], first["seed"] != second["seed"]] == [True, False, True]
    assert run("session", "checkout", "work", "night").code == 0
    assert run("session", "log", "work").out.splitlines() == [
        f"○ {root}  a cat",
        f"├─● {begun[:8]}  make it snow  (main, night*)  <- here",
        f"├─○ {first['id'][:8]}  add a dog",
        f"○ {second['id'][:8]}  add a dog",
    ]
    log = json.loads(run("session", "log", "work", "--json").out)
    assert [len(log["nodes"]), log["branch"], log["branches"]] == [4, "night", {"main": begun, "night": begun}]
    shown = json.loads(run("session", "show", "work", "main", "--json").out)
    assert Path(shown["path"]).is_file()
    assert shown["receipt"]["request"]["prompt"] == "make it snow"
    assert json.loads(run("session", "compare", "work", "main", root, "--json").out)["common"].startswith(root)
    assert run("session", "export", "work", "way").out.splitlines() == [
        f"way/00-{root}.png", f"way/01-{begun[:8]}.png"
    ]  # fmt: skip
    assert run("session", "gc", "work").out == "0 files, 0 bytes removed\n"
    ended = run("session", "replay", "work", "night")
    assert (ended.code, ended.out) == (0, f"{root}  bit-exact\n{begun[:8]}  bit-exact\n")


def test_drift_is_shown_and_drawn(run: Run, here: Path, begun: str) -> None:
    ended = run("session", "drift", "work", "--out", "curves.webp")
    lines = ended.out.splitlines()
    assert lines[0].startswith("turn\tnode\tinstruction\tchanged\tpsnr")
    assert lines[1].startswith(f"1\t{begun[:8]}\tmake it snow\t")
    assert lines[2] == "curves.webp"
    with Image.open(here / "curves.webp") as picture:
        assert picture.width > picture.height
    (turn,) = json.loads(run("session", "drift", "work", "--json").out)["turns"]
    assert turn["id"] == begun


def test_verify_says_what_is_wrong(run: Run, here: Path, begun: str) -> None:
    assert run("verify", "work").out == "all 2 sound\n"
    assert run("session", "export", "work", "a.png").code == 0
    facts = json.loads(run("verify", "a.png", "--session", "work", "--json").out)
    assert facts["sound"]
    with Image.open(here / "a.png") as picture:
        Image.fromarray(np.asarray(picture)).save(here / "stripped.png")
    ended = run("verify", "stripped.png", "--session", "work")
    assert (ended.code, ended.err) == (1, "")
    assert "another program has stripped it" in ended.out
    assert f"its pixels are those of node {begun[:8]}: make it snow" in ended.out
    shown = json.loads(run("session", "show", "work", "--json").out)
    Path(shown["path"]).unlink()
    ended = run("session", "verify", "work")
    assert (ended.code, ended.out.splitlines()[-1]) == (1, "1 sound, 1 broken")
    ended = run("session", "replay", "work", "--json")
    assert (ended.code, json.loads(ended.out)["bit_exact"]) == (1, False)
    ended = run("session", "edit", "work", "add a dog", *STEPS)
    assert (ended.code, ended.err.startswith("fluxloom: error: got no file")) == (1, True)


def test_an_edit_may_name_a_session(run: Run, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64), "teal").save(here / "photo.jpg")
    given = {name: found.default for name, found in signature(edit_command.edit).parameters.items()}
    for seed in (4, 5):  # the picture is taken in once
        shortcut({**given, "steps": 1, "seed": seed}, here / "work", here / "photo.jpg", "make it snow")
    capsys.readouterr()
    nodes = json.loads(run("session", "log", "work", "--json").out)["nodes"]
    assert [(node["kind"], node["seed"]) for node in nodes] == [("import", None), ("edit", 4), ("edit", 5)]
    assert nodes[1]["parent"] == nodes[2]["parent"] == nodes[0]["id"]
    for more, flag in (({"out": Path("a.png")}, "--out"), ({"receipt": False}, "--no-receipt")):
        with pytest.raises(BadInput, match=f"got {flag} with --session, which keeps every picture itself"):
            shortcut({**given, **more}, here / "work", here / "photo.jpg", "make it snow")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("log", "nowhere"), 2, "got 'nowhere', which is no session"),
        (("new", "work"), 2, "is a session already"),
        (("import", "work", "nothing.png"), 2, "which does not exist"),
        (("edit", "work", "x", "--at", "nope"), 2, "which is no branch and no node here"),
        (("edit", "work", "x", "-n", "0"), 2, "got -n 0, allowed 1 or more"),
        (("edit", "work", "x", "--box", "1,2"), 2, "got --box '1,2'"),
        (("redo", "work"), 2, "got redo with nothing to redo"),
        (("export", "work", "a.gif"), 2, "allowed .png"),
    ],
)
def test_a_wrong_word_gets_one_line(run: Run, begun: str, words: tuple[str, ...], code: int, said: str) -> None:
    ended = run("session", *words)
    assert (ended.code, ended.out, ended.err.count("\n")) == (code, "", 1)
    assert said in ended.err
