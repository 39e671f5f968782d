"""The best of several tries, limits of drift, and sessions, asked for on ``edit``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import QUICK, Run


@pytest.fixture
def source(run: Run, here: Path) -> Path:
    assert run("generate", "a red car", "--seed", "1", "-o", "source.png", *QUICK).code == 0
    return here / "source.png"


def test_the_best_of_several_is_one_of_them(run: Run, source: Path) -> None:
    ended = run("edit", str(source), "make it blue", "--best-of", "3", "--seed", "5", "-o", "best.png", *QUICK)
    assert (ended.code, ended.out) == (0, "best.png\n")
    assert "the best of 3 (seed: score)" in ended.err
    receipt = json.loads(run("info", "best.png", "--json").out)["receipt"]
    assert receipt["request"]["seed"] in (5, 6, 7)
    assert run("replay", "best.png", "--quiet").code == 0


def test_what_drifts_too_far_is_refused(run: Run, here: Path) -> None:
    """At full size, where a part stays as it was: through the autoencoder alone it keeps 30 dB or so."""
    assert run("generate", "a red car on the road", "--seed", "4", "-o", "source.png", "--steps", "6").code == 0
    words = "edit", "source.png", "make the car blue", "--lock", "off", "--seed", "5", "-o", "out.png", "--steps", "4"
    ended = run(*words, "--max-drift", "psnr=60")
    assert ended.code == 1
    assert "drifts too far" in ended.err
    assert "psnr=60" in ended.err
    assert not (here / "out.png").exists()
    assert run(*words, "--max-drift", "psnr=5").code == 0
    ended = run(*words, "--max-drift", "pnsr=5")
    assert ended.code == 2
    assert "got limit 'pnsr=5'" in ended.err


def test_an_edit_becomes_a_step_of_a_session(run: Run, source: Path, here: Path) -> None:
    for instruction in ("make it blue", "make it night"):
        assert run("edit", str(source), instruction, "--session", "work", *QUICK).code == 0
    nodes = json.loads(run("session", "log", "work", "--json").out)["nodes"]
    assert [node["instruction"] for node in nodes] == ["", "make it blue", "make it night"]
    assert nodes[1]["parent"] == nodes[2]["parent"] == nodes[0]["id"]
    assert run("verify", "work").code == 0
    assert run("replay", "work").code == 0
    ended = run("replay", "work", "--out", "x.png")
    assert ended.code == 2
    assert "got --out with a session" in ended.err
