"""Pictures that go into a drawing besides the prompt: masks, new canvas, further references, control."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import Run

STEPS = ("--steps", "4", "--seed", "1", "--json")


def test_only_what_the_mask_shows_is_repainted(run: Run, here: Path, drawn: Path) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    Image.fromarray(mask).save(here / "mask.png")
    ended = run("generate", "a dog", "--init", drawn.name, "--mask", "mask.png", "--out", "new.png", *STEPS)
    assert (ended.code, ended.err) == (0, "")
    with Image.open(drawn) as before, Image.open(here / "new.png") as after:
        apart = np.abs(np.asarray(before).astype(int) - np.asarray(after)).mean(axis=(1, 2))
    assert apart[48:].mean() < 0.5 * apart[:24].mean()
    inputs = json.loads(run("info", "new.png", "--json").out)["receipt"]["inputs"]
    assert [picture["role"] for picture in inputs] == ["init", "mask"]


def test_new_canvas_makes_the_picture_wider(run: Run, here: Path, drawn: Path) -> None:
    ended = run("generate", "a cat", "--init", drawn.name, "--expand", "0, 0, 32, 0", "--out", "wide.png", *STEPS)
    (picture,) = json.loads(ended.out)["pictures"]
    assert (picture["width"], picture["height"]) == (96, 64)


def test_an_edit_takes_from_further_pictures(run: Run, here: Path, drawn: Path) -> None:
    ended = run("edit", drawn.name, "make it blue", "--reference", drawn.name, "--out", "two.png", *STEPS)
    assert (ended.code, ended.err) == (0, "")
    inputs = json.loads(run("info", "two.png", "--json").out)["receipt"]["inputs"]
    assert [picture["role"] for picture in inputs] == ["context", "context"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--init", "a.png", "--expand", "1,2"), "got --expand '1,2', allowed left,top,right,bottom"),
        (("--init", "a.png", "--expand", "1,2,3,-4"), "allowed left,top,right,bottom"),
        (("--mask", "a.png"), "mask"),
        (("--control", "a.png"), "got control for nano, allowed generate, edit, try flux1-canny-dev"),
        (("--image", "a.png"), "got redux for nano"),
        (("--control-ready",), "control"),
    ],
)
def test_what_a_model_cannot_use_is_refused(words: tuple[str, ...], message: str, run: Run, here: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(here / "a.png")
    ended = run("generate", "a cat", "--size", "64", *words)
    assert ended.code == 2
    assert message in ended.err
    assert [path.name for path in here.iterdir()] == ["a.png"]


def test_an_edit_says_what_it_kept(run: Run, here: Path, drawn: Path) -> None:
    words = ("edit", drawn.name, "make it blue", "--box", "8,8,40,40", "--steps", "2", "--seed", "1")
    ended = run(*words, "--out", "new.png")
    assert (ended.code, ended.out) == (0, "new.png\n")
    assert ended.err.startswith("changed 25 % of the picture; 100 % of the rest identical; shift ")
    assert "file format" not in ended.err
    assert "survived the file format" in run(*words, "--out", "new.jpg").err
    assert run(*words, "--out", "quiet.png", "--quiet").err == ""
    (picture,) = json.loads(run(*words, "--out", "json.png", "--json").out)["pictures"]
    assert (picture["lock"]["mode"], picture["lock"]["identical"]) == ("mask", 1)
    with Image.open(drawn) as before, Image.open(here / "new.png") as after:
        apart = (np.asarray(before) != np.asarray(after)).any(axis=-1)
    assert apart[8:40, 8:40].any()
    assert apart.sum() == apart[8:40, 8:40].sum()
    for name in ("new.png", "new.jpg"):
        assert json.loads(run("replay", name, "--json").out)["verdict"] == "bit-exact"
    assert "delta_e_outside" in run("info", "new.png").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--box", "1,2"), "got --box '1,2', allowed left,top,right,bottom"),
        (("--box", "0,0,65,64"), "got box (0, 0, 65, 64), allowed left, top, right, bottom inside 64x64"),
        (("--box", "0,0,9,9", "--mask", "small.png"), "got mask and box"),
        (("--mask", "small.png"), "got a mask of 32x32 for a picture of 64x64"),
        (("--lock", "small.png"), "got a lock of 32x32 for a picture of 64x64"),
        (("--lock", "on"), "got 'on', which does not exist"),
    ],
)
def test_where_an_edit_cannot_be(words: tuple[str, ...], message: str, run: Run, here: Path, drawn: Path) -> None:
    Image.new("RGB", (32, 32), "white").save(here / "small.png")
    ended = run("edit", drawn.name, "make it blue", "--steps", "1", *words)
    assert ended.code == 2
    assert message in ended.err
