"""``fluxloom evals world``: plumbing, with a reader that sees nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runs import Run

from fluxloom.measure.recogniser import Guess, Reading, Recogniser

QUICK = ("--count", "1", "--steps", "1")


class Blind:
    """Sees nothing in any picture."""

    content = "sha256:blind"

    def read(self, batch: Sequence[Image.Image]) -> list[Reading]:
        return [Reading((), (), *[Guess("none", 0.0)] * 7, sign="", sign_p=0.0, sign_board=0.0) for _ in batch]


@pytest.fixture(autouse=True)
def _blind(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(folder: Any = None, device: str = "cpu") -> Blind:
        assert (folder, device) == (None, "cpu")
        return Blind()

    monkeypatch.setattr(Recogniser, "load", load)


def test_a_run_leaves_its_report_and_sheets(run: Run, here: Path) -> None:
    ended = run("evals", "world", "--only", "single, edit-add", "--batch", "2", "--out", "new/folder", *QUICK)
    assert (ended.code, ended.err) == (0, "")
    names = ["report.md", "report.json", "sheet-draw.webp", "sheet-edit.webp"]
    lines = ["2 pictures to draw: 1 of each of 2 groups", *(f"new/folder/{name}" for name in names)]
    assert ended.out.splitlines() == lines
    report = json.loads((here / "new/folder/report.json").read_text("utf-8"))
    assert [case["group"] for case in report["cases"]] == ["single", "edit-add"]
    assert (report["model"], report["recogniser"], report["settings"]) == ("nano", "sha256:blind", {"steps": 1})
    assert (report["batch"], report["seed"]) == (2, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "cats"], "got groups cats, allowed draw, held-out, edits, single"),
        (["--split", "train"], "got split 'train', allowed dev, test, try dev"),
        (["--split", "test", "--seed", "3"], "got seed 3 for test"),
        (["--count", "0"], "got --count"),
        (["--batch", "0"], "got --batch"),
        (["--dtype", "int8"], "got dtype 'int8', allowed float32, bfloat16"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, run: Run, here: Path) -> None:
    ended = run("evals", "world", *words)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert list(here.iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Blind, batch: Sequence[Image.Image]) -> list[Reading]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Blind, "read", read)
    ended = run("evals", "world", "--only", "single", "--out", "report", *QUICK)
    assert (ended.code, ended.err) == (130, "fluxloom: interrupted\n")
    assert list((here / "report").iterdir()) == []
