"""Where a value comes from: flag, then environment, then fluxloom.toml, then the model's row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import Run

from fluxloom.core.specs import MODELS


def request_of(run: Run, *words: str) -> dict[str, Any]:
    ended = run("generate", "a cat", "--json", *words)
    assert (ended.code, ended.err) == (0, "")
    (picture,) = json.loads(ended.out)["pictures"]
    ended = run("info", picture["path"], "--json")
    found: dict[str, Any] = json.loads(ended.out)["receipt"]["request"]
    return found


def test_precedence(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "fluxloom.toml").write_text(
        "[generate]\nsize = 64\nsteps = 3\nguidance = 1.5\ntrue-cfg = 1\nseed = 4\n[edit]\nsteps = 9\n"
    )
    inner = here / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)  # the file of a parent counts
    monkeypatch.setenv("FLUXLOOM_STEPS", "2")
    monkeypatch.setenv("FLUXLOOM_SEED", "5")
    monkeypatch.setenv("FLUXLOOM_TRUE_CFG", "")  # set to nothing is not set
    found = request_of(run, "--seed", "6")
    assert (found["seed"], found["steps"], found["guidance"], found["true_cfg"]) == (6, 2, 1.5, 1.0)
    assert (found["width"], found["height"]) == (64, 64)
    assert found["solver"] == MODELS["nano"].tasks["generate"].solver


def test_flags_can_be_set_and_unset(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "fluxloom.toml").write_text('[generate]\nreceipt = false\nsize = "64x80"\nsteps = 1\n')
    for words, state in ((["-o", "a.png"], "none"), (["--receipt", "-o", "b.png"], "intact")):
        assert run("generate", "a cat", *words).code == 0
        shown = run("info", words[-1]).out
        assert f"state    {state}" in shown
        assert "size     64x80" in shown


@pytest.mark.parametrize("given", ["'gone.safetensors'", "['gone.safetensors:0.5', 'other.safetensors']"])
def test_what_may_be_given_several_times(run: Run, here: Path, given: str) -> None:
    (here / "fluxloom.toml").write_text(f"[generate]\nlora = {given}\nsteps = 1\n")
    ended = run("generate", "a cat")
    assert ended.code == 2
    assert "got LoRA 'gone.safetensors', which is not there" in ended.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[generate]\nstepz = 3\n", "got unknown key in [generate] 'stepz'"),
        ("[generat]\nsteps = 3\n", "got unknown table 'generat'"),
        ("steps = 3\n", "got unknown table 'steps'"),
        ("generate = 3\n", "got generate = 3"),
        ("[generate]\nsteps = 'few'\n", "got steps in fluxloom.toml 'few', allowed a valid integer"),
        ("[generate]\nsteps = true\n", "got steps in fluxloom.toml 'True', allowed a valid integer"),
        ("[generate]\nforce = 3\n", "got force in fluxloom.toml '3', allowed a valid boolean"),
        ("[generate\n", "which is no TOML"),
        ("[generate]\nprompt = 'a dog'\n", "got unknown key in [generate] 'prompt'"),
    ],
)
def test_a_wrong_file_is_an_error(run: Run, here: Path, content: str, said: str) -> None:
    (here / "fluxloom.toml").write_text(content)
    ended = run("generate", "a cat")
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert run("models").code == 0  # no business of other commands


def test_a_wrong_variable_is_named(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXLOOM_STEPS", "few")
    ended = run("generate", "a cat")
    assert ended.code == 2
    assert "got FLUXLOOM_STEPS 'few', allowed a valid integer" in ended.err
