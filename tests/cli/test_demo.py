"""The demo: what it promises to draw, that nano can read it, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from runs import Run

from fluxloom import world
from fluxloom.cli.output import slug
from fluxloom.core.text import split_words
from fluxloom.infer.receipt import read_receipt
from fluxloom.recipes import demo

LINES = [*demo.PROMPTS, *(line for chain in demo.CHAINS for line in chain)]


def is_chinese(line: demo.Line) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in line.text)


def test_the_demo_keeps_its_promises() -> None:
    assert len(demo.PROMPTS) >= 14
    assert sum(map(is_chinese, demo.PROMPTS)) >= 4
    assert [len(chain) for chain in demo.CHAINS] == [4, 4, 4]
    assert [all(map(is_chinese, chain)) for chain in demo.CHAINS].count(True) >= 1
    assert [line.text for line in LINES if is_chinese(line) != bool(line.gloss)] == []
    assert len({slug(line.text) for line in demo.PROMPTS}) == len(demo.PROMPTS)


def test_nano_knows_every_word_of_the_demo() -> None:
    known = {word for text in world.vocabulary_texts() for word in split_words(text)}
    assert {word for line in LINES for word in split_words(line.text)} - known == set()


def test_it_leaves_pictures_with_receipts_and_a_sheet(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[2:4])
    monkeypatch.setattr(demo, "CHAINS", (demo.CHAINS[1][:3],))
    ended = run("demo", "--out", "demo", "--sheet", "docs/all.png", "--steps", "1", "--size", "64")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[-2] == "docs/all.png"
    assert ended.out.splitlines()[-1].startswith("drew 3 pictures and edited 2 in ")
    names = sorted(path.name for path in (here / "demo").iterdir())
    texts = [demo.PROMPTS[0], demo.PROMPTS[1], *demo.CHAINS[0]]
    numbers = ["01", "02", "chain-1-0", "chain-1-1", "chain-1-2"]
    drawn = [f"{number}-{slug(line.text)}.png" for number, line in zip(numbers, texts, strict=True)]
    assert names == sorted([*drawn, "chain-1.webp"])
    receipts = [read_receipt(here / "demo" / name) for name in drawn]
    assert [receipt.seed for receipt in receipts] == [1, 2, 3, 4, 5]
    assert [receipt.data["request"]["prompt"] for receipt in receipts] == [line.text for line in texts]
    parents = [receipt.data["inputs"][0]["receipt"] for receipt in receipts[3:]]
    assert parents == [receipt.id for receipt in receipts[2:4]]
    with Image.open(here / "docs" / "all.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 3 * 224
        assert sheet.height > 2 * 224


def test_a_sheet_keeps_the_aspect_of_its_pictures() -> None:
    page = demo.sheet([(Image.new("RGB", (128, 64), "red"), demo.PROMPTS[0])])
    assert page.crop((12, 12, 236, 236)).getcolors() is not None
    reds = [y for y in range(12, 236) if page.getpixel((124, y)) == (255, 0, 0)]
    assert len(reds) == 112
