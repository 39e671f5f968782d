"""Whatever is wrong with the input is said in one line, with exit code 2, before anything is written."""

from __future__ import annotations

import struct
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image
from runs import QUICK, Run

BAD = {
    "empty prompt": (["generate", ""], "try 'a red bicycle"),
    "blank prompt": (["generate", " \n\t "], "try 'a red bicycle"),
    "endless prompt": (["generate", "cat " * 2500], "10,000 characters"),
    "no prompt": (["generate"], "got no prompt, allowed one in words"),
    "two prompts": (["generate", "a cat", "a dog"], "(a dog)"),
    "negative steps": (["generate", "a cat", "--steps", "-3"], "got steps -3, allowed 1 to"),
    "no number": (["generate", "a cat", "--steps", "few"], "got --steps 'few', allowed a valid integer"),
    "no true number": (["generate", "a cat", "--guidance", "nan"], "got guidance nan"),
    "option without value": (["generate", "a cat", "--steps"], "'--steps' requires an argument"),
    "unknown model": (["generate", "a cat", "--model", "flux1-deb"], "try flux1-dev"),
    "model without weights": (["generate", "a cat", "--model", "tiny-1b", "--offline"], "allowed weights of your own"),
    "unknown solver": (["generate", "a cat", "--solver", "eular"], "try euler"),
    "unknown option": (["generate", "a cat", "--stepz", "3"], "got unknown option --stepz"),
    "unknown command": (["genrate", "a cat"], "try `fluxloom generate`"),
    "no subcommand": (["world"], "got no command, allowed preview, try `fluxloom world preview`"),
    "unknown subcommand": (["train", "nanno"], "got unknown command 'nanno', allowed nano, try `fluxloom train nano`"),
    "unknown device": (["generate", "a cat", "--device", "abacus"], "allowed cpu, cuda or auto"),
    "size 0": (["generate", "a cat", "--size", "0"], "got size 0x0, allowed for nano: sides in multiples of 16"),
    "size 17": (["generate", "a cat", "--size", "256x17"], "got size 256x17"),
    "size 100000": (["generate", "a cat", "--size", "100000"], "got size 100000x100000"),
    "size in words": (["generate", "a cat", "--size", "large"], "got --size 'large', allowed WIDTHxHEIGHT"),
    "no pictures": (["generate", "a cat", "-n", "0"], "got n 0"),
    "negative seed": (["generate", "a cat", "--seed", "-1"], "got seed -1"),
    "no threads": (["generate", "a cat", "--threads", "0"], "got --threads 0"),
    "strength alone": (["generate", "a cat", "--strength", "0.5"], "got strength without init"),
    "negative without guidance": (
        ["generate", "a cat", "--negative", "dog", "--true-cfg", "1"],
        "negative prompt",
    ),
    "foreign format": (["generate", "a cat", "--out", "cat.gif"], "try cat.png"),
    "a sheet of no format": (["demo", "--sheet", "sheet"], "got 'sheet', allowed .png"),
    "threads of then": (["replay", "cat.png", "--threads", "2"], "got unknown option --threads"),
    "missing picture": (["edit", "cat.png", "make it blue"], "got 'cat.png', "),
    "unknown part": (["train", "nano", "--out", "run", "--part", "vae"], "allowed vocabulary, autoencoder, train"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line_and_exit_code_2(name: str, run: Run, here: Path) -> None:
    words, said = BAD[name]
    ended = run(*words)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("fluxloom: error: got ")
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert len(ended.err) < 400
    assert list(here.iterdir()) == []


def test_what_was_typed_cannot_paint_the_terminal(run: Run) -> None:
    ended = run("generate", "a cat", "--solver", "eu\x1b[31mler\nred")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "\x1b" not in ended.err


def png_of(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(b"\0"),
        b"IEND": b"",
    }
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_pictures_that_are_none(run: Run, here: Path) -> None:
    Image.new("RGB", (8, 8)).save(here / "tiny.png")
    Image.new("RGB", (64, 64)).save(here / "whole.png")
    (here / "cut.png").write_bytes((here / "whole.png").read_bytes()[:60])
    (here / "text.png").write_text("I am no picture")
    (here / "huge.png").write_bytes(png_of(40_000, 40_000))
    (here / "folder.png").mkdir()
    before = sorted(here.iterdir())
    said = {"tiny": "8x8 pixels, allowed 16", "cut": "cannot be read", "text": "cannot be read", "folder": "folder.png"}
    said["huge"] = "allowed at most 178,956,970"
    for name, words in said.items():
        began = time.perf_counter()
        for command in (["edit", f"{name}.png", "make it blue"], ["generate", "a cat", "--init", f"{name}.png"]):
            ended = run(*command, *QUICK)
            assert (ended.code, ended.out) == (2, "")
            assert words in ended.err
            assert ended.err.count("\n") == 1
        assert time.perf_counter() - began < 10  # 40,000 x 40,000 pixels would be 4.8 GB
    assert sorted(here.iterdir()) == before


def test_a_picture_without_receipt_has_nothing_to_replay(run: Run, here: Path, drawn: Path) -> None:
    picture = Image.open(drawn)
    picture.save(here / "stripped.png")
    pixels = picture.load()
    pixels[0, 0] = (1, 2, 3)
    picture.save(here / "changed.png", pnginfo=_notes(picture))
    for name, state, said in (
        ("stripped", "none", "no fluxloom receipt"),
        ("changed", "changed", "pixels were changed"),
    ):
        ended = run("replay", f"{name}.png")
        assert (ended.code, ended.out) == (1, "")
        assert ended.err.startswith("fluxloom: error: got ")
        assert said in ended.err
        ended = run("info", f"{name}.png")
        assert (ended.code, ended.err) == (0, "")
        assert f"state    {state}" in ended.out


def _notes(picture: Image.Image) -> object:
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    for key, value in picture.text.items():  # type: ignore[attr-defined]
        notes.add_itxt(key, value)
    return notes
