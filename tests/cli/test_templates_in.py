"""Templates and enhancers on the command line: shown, recorded, and refused before a model is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from runs import QUICK, Run


def written(run: Run, name: str) -> dict[str, object]:
    request = json.loads(run("info", name, "--json").out)["receipt"]["request"]
    return {"prompt": request["prompt"], **request["written"]}


def test_generate_with_a_template_and_an_enhancer(run: Run) -> None:
    words = ("--template", "plain", "--slot", "colour=blue", "--enhance", "rules", "--seed", "1", "--out", "a.png")
    ended = run("generate", "a cat", *words, *QUICK)
    assert ended.code == 0
    assert "note: prompt by template plain and enhancer rules: a cat on a blue background, " in ended.err
    found = written(run, "a.png")
    assert str(found.pop("prompt")) in ended.err
    told = {"text": "a cat", "template": "plain", "slots": {"colour": "blue"}, "enhancer": "rules", "model": None}
    assert found == told
    assert "bit-exact" in run("replay", "a.png").out


def test_edit_with_a_template_alone(run: Run, drawn: Path) -> None:
    words = ("--template", "season", "--slot", "season=冬天", "--steps", "1", "--out", "b.png")
    assert run("edit", drawn.name, *words).code == 0
    assert (written(run, "b.png")["prompt"], written(run, "b.png")["text"]) == ("改成冬天", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "a cat", "--template", "plian"], "got template 'plian' for generate, .* try plain"),
        (["generate", "a cat", "--enhance", "rule"], "got enhancer 'rule'"),
        (["edit", "none.png", "--template", "season"], "got no season, allowed spring"),
    ],
)
def test_refused_before_a_model_is_loaded(run: Run, words: list[str], message: str) -> None:
    ended = run(*words, "--model", "nowhere/at-all")
    assert ended.code == 2
    assert re.search(message, ended.err)
