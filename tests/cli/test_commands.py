"""What the commands do when all is well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from runs import QUICK, Run

from fluxloom.cli.output import Destination, print_facts, slug
from fluxloom.cli.progress import half_blocks
from fluxloom.core.specs import MODELS


def test_generate_names_files_and_overwrites_nothing(run: Run, here: Path) -> None:
    said = [run("generate", "A cat, 1!", "--seed", "5", *QUICK).out.strip() for _ in range(2)]
    assert said == ["a-cat-1-5.png", "a-cat-1-5-2.png"]
    assert sorted(path.name for path in here.iterdir()) == sorted(said)
    first = (here / said[0]).stat().st_mtime_ns
    assert run("generate", "A cat, 1!", "--seed", "5", "--force", *QUICK).out.strip() == said[0]
    assert (here / said[0]).stat().st_mtime_ns > first
    assert len(list(here.iterdir())) == 2


def test_n_pictures_take_n_seeds(run: Run, here: Path) -> None:
    ended = run("generate", "一只猫", "-n", "2", "--seed", "8", "--out", "new/folder", "--json", *QUICK)
    assert (ended.code, ended.err) == (0, "")
    pictures = json.loads(ended.out)["pictures"]
    assert [(picture["path"], picture["seed"]) for picture in pictures] == [
        ("new/folder/一只猫-8.png", 8),
        ("new/folder/一只猫-9.png", 9),
    ]
    assert [(picture["width"], picture["height"]) for picture in pictures] == [(64, 64), (64, 64)]
    with Image.open(here / pictures[0]["path"]) as first, Image.open(here / pictures[1]["path"]) as second:
        assert (first.size, second.size) == ((64, 64), (64, 64))
        assert first.tobytes() != second.tobytes()


def test_edit_follows_its_picture(run: Run, here: Path, drawn: Path) -> None:
    ended = run("edit", drawn.name, "make it blue", "--steps", "1", "--seed", "1", "--out", "blue.webp", "--json")
    assert (ended.code, ended.err) == (0, "")
    (picture,) = json.loads(ended.out)["pictures"]
    assert (picture["path"], picture["width"], picture["height"]) == ("blue.webp", 64, 64)
    receipt = json.loads(run("info", "blue.webp", "--json").out)["receipt"]
    parent = json.loads(run("info", drawn.name, "--json").out)["receipt"]
    assert receipt["request"]["task"] == "edit"
    assert receipt["inputs"][0]["receipt"] == parent["id"]


def test_replay_is_bit_exact(run: Run, here: Path, drawn: Path) -> None:
    ended = run("replay", drawn.name)
    assert (ended.code, ended.err) == (0, "")
    assert "verdict         bit-exact" in ended.out
    assert list(here.iterdir()) == [drawn]  # saved only when asked for
    ended = run("replay", drawn.name, "--out", "again.png", "--json")
    facts = json.loads(ended.out)
    assert (facts["verdict"], facts["max_difference"], facts["path"]) == ("bit-exact", 0, "again.png")
    with Image.open(here / "again.png") as again, Image.open(drawn) as first:
        assert again.tobytes() == first.tobytes()


def test_info_shows_the_receipt(run: Run, drawn: Path) -> None:
    shown = run("info", drawn.name).out
    assert "state    intact" in shown
    assert "prompt         a cat" in shown
    about = json.loads(run("info", "--json").out)
    assert about["versions"]["torch"]
    assert about["nano"]["model"] == "nano"


def test_models_lists_the_family(run: Run) -> None:
    rows = [line.split("\t") for line in run("models").out.splitlines()]
    assert {row[0] for row in rows[1:]} == set(MODELS)
    edit = MODELS["nano"].tasks["edit"]
    shown = next(row for row in rows if row[:2] == ["nano", "edit"])
    assert shown[2:] == [
        str(edit.steps),
        f"{edit.guidance:g}",
        f"{edit.true_cfg:g}",
        "256x256",
        "in the package",
        "Apache-2.0",
    ]
    assert {model["name"] for model in json.loads(run("models", "--json").out)["models"]} == set(MODELS)


def test_world_preview_is_a_contact_sheet(run: Run, here: Path) -> None:
    ended = run("world", "preview", "--rows", "1", "--seed", "3", "--out", "sheet.png")
    assert (ended.code, ended.out, ended.err) == (0, "sheet.png\n", "")
    with Image.open(here / "sheet.png") as sheet:
        assert sheet.width > 6 * 192
        colours = sheet.convert("RGB").quantize(64).getcolors()
        assert colours is not None
        assert len(colours) == 64
    assert run("world", "preview", "--rows", "1", "--seed", "3", "--out", "sheet.png").out == "sheet-2.png\n"
    assert (here / "sheet.png").read_bytes() == (here / "sheet-2.png").read_bytes()


def test_train_runs_the_recipe(run: Run, here: Path) -> None:
    ended = run("train", "nano", "--out", "run", "--part", "vocabulary")
    assert (ended.code, ended.out, ended.err) == (0, "run/vocab.txt\n", "")
    assert (here / "run" / "vocab.txt").read_text("utf-8").startswith("[PAD]\n")


def test_words_that_nano_never_learned_are_told(run: Run) -> None:
    ended = run("generate", "a cat and a refrigerator", *QUICK)
    assert (ended.code, ended.err) == (0, "fluxloom: note: nano does not know these words: refrigerator\n")


def test_a_prompt_may_begin_with_a_dash(run: Run) -> None:
    assert run("generate", *QUICK, "--seed", "1", "--", "--debug").out == "debug-1.png\n"


def test_no_arguments_is_help(run: Run) -> None:
    ended = run()
    assert (ended.code, ended.err) == (0, "")
    assert "generate" in ended.out


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("a red bicycle", "a-red-bicycle"),
        ("../../etc/passwd", "etc-passwd"),
        ("夜晚的海滩，两只猫", "夜晚的海滩-两只猫"),
        ("!?", "picture"),
        ("word " * 40, "word-word-word-word-word-word-word-word-word-wor"),
    ],
)
def test_slug(title: str, name: str) -> None:
    assert slug(title) == name


def test_destination(here: Path) -> None:
    (here / "shots").mkdir()
    cases = {
        None: "a-cat-7.png",
        "shots": "shots/a-cat-7.png",
        "new/one": "new/one/a-cat-7.png",
        "cat.JPG": "cat.JPG",
        "shots/cat.webp": "shots/cat.webp",
    }
    for out, path in cases.items():
        assert Destination.at(out and Path(out)).path("a cat", 7, many=False) == Path(path)
    assert Destination.at(Path("cat.png")).path("a cat", 7, many=True) == Path("cat-7.png")


def test_half_blocks_put_two_pixels_into_a_character() -> None:
    picture = Image.new("RGB", (2, 2))
    for at, colour in {(0, 0): (255, 0, 0), (1, 0): (0, 255, 0), (0, 1): (0, 0, 255), (1, 1): (9, 9, 9)}.items():
        picture.putpixel(at, colour)
    text = half_blocks(picture, 80, 24)
    assert text.plain == "▀▀\n"
    styles = [str(span.style) for span in text.spans]
    assert styles == ["#ff0000 on #0000ff", "#00ff00 on #090909"]
    wide = half_blocks(Image.new("RGB", (512, 256)), 80, 24)
    assert [len(line) for line in wide.plain.splitlines()] == [80] * 20


def test_what_others_wrote_into_a_picture_cannot_paint_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts({"prompt": "a \x1b[31mred\ncat", "versions": {"to\x1brch": "2"}, "warnings": ["\x07ring"]})
    assert capsys.readouterr().out == "prompt    a [31mred cat\nversions\n  to rch  2\nwarnings  ring\n"
