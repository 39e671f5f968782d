"""``fluxloom batch``: a hundred pictures, five of them bad, with the plug pulled twice."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms
from runs import QUICK, Run, Start

from fluxloom.edit.photo import Photo
from fluxloom.infer import xmp
from fluxloom.infer.receipt import verify

COUNT, SECONDS = 95, 120.0
SIZES = [(96, 64), (64, 96), (130, 97), (80, 80), (201, 150)]


def picture(number: int) -> bytes:
    """One of mixed sizes and formats; each is another."""
    values = np.random.default_rng(number).integers(0, 65536, (4, 5, 3), dtype=np.uint16)
    deep = cv2.resize(values, SIZES[number % len(SIZES)], interpolation=cv2.INTER_LINEAR)
    if number % 4 == 3:
        return cv2.imencode(".png", deep)[1].tobytes()
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010F] = 1 + number % 8, "Maker"
    options = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), "exif": exif}
    theirs = xmp.pack("x").replace(b"fluxloom", b"them")
    form = ("JPEG", "TIFF", "WEBP")[number % 4]
    options |= {} if form == "TIFF" else {"xmp": theirs}
    Image.fromarray((deep >> 8).astype(np.uint8)).save(file, form, dpi=(300, 300), **options)
    return file.getvalue()


def fill(folder: Path) -> None:
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number:02}{('.jpg', '.tif', '.webp', '.png')[number % 4]}").write_bytes(picture(number))
    gif, dot = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 64)).save(gif, "GIF", save_all=True, append_images=[Image.new("RGB", (64, 64), "red")])
    Image.new("RGB", (1, 1)).save(dot, "PNG")
    bad = [picture(0)[:-900], gif.getvalue(), b"", b"a text", dot.getvalue()]
    for number, data in enumerate(bad):
        (folder / f"{19 * number:02}-bad.png").write_bytes(data)


def journal(out: Path) -> list[dict[str, str]]:
    """Whole lines but the head."""
    path = out / "journal.jsonl"
    lines = path.read_text().split("\n")[1:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.slow
def test_a_hundred_pictures_interrupted_twice(start: Start, run: Run, here: Path) -> None:
    fill(here / "in")
    words, out = ("batch", "in", "make the sky red", "--out", "out", *QUICK), here / "out"

    process = start(*words)
    wait_for(lambda: len(journal(out)) >= 20, process)
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=SECONDS)
    first = journal(out)
    assert process.returncode == 130
    assert told.endswith("fluxloom: interrupted\n")
    names = [str(Path("out") / row["output"]) for row in first]
    assert printed.splitlines() in (names, names[:-1])  # the last may not have come to that
    assert first[-2]["output"] in (out / "report.html").read_text()

    process = start(*words)
    wait_for(lambda: len(journal(out)) >= 50, process)
    process.kill()
    process.communicate()
    with open(out / "journal.jsonl", "ab") as file:
        file.write(b'{"key": "cut off')  # as where the power fails
    second = {row["output"]: (out / row["output"]).stat().st_mtime_ns for row in journal_of_whole(out)}
    (out / f".{'0' * 16}.part").touch()

    ended = run(*words, "--json")
    summary = json.loads(ended.out)
    assert ended.code == 1
    assert (summary["done"], summary["failed"], summary["resumed"]) == (COUNT, 5, len(second))
    assert [line.split(":")[1] for line in ended.err.splitlines()] == [f" {19 * k:02}-bad.png" for k in range(5)]
    keys = [row["key"] for row in journal_of_whole(out)]
    assert len(keys) == len(set(keys)) == COUNT  # nothing twice
    assert {name: (out / name).stat().st_mtime_ns for name in second} == second
    assert list(out.glob(".*")) == []
    for path in sorted((here / "in").glob("??.*")):
        before, after = Photo.open(path), Photo.open(out / path.name)
        assert (after.size, after.pixels.dtype) == (before.size, before.pixels.dtype)
        assert after.kept == before.kept
        assert verify(out / path.name).state == "intact"


def journal_of_whole(out: Path) -> list[dict[str, str]]:
    """Lines that are JSON, whatever was cut off between."""
    found = []
    for line in (out / "journal.jsonl").read_text().splitlines()[1:]:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def test_what_the_command_refuses(run: Run, here: Path) -> None:
    (here / "in").mkdir()
    (here / "in" / "a.jpg").write_bytes(picture(0))
    (here / "steps.toml").write_text("[[step]]\ndo = 'resize'\nlongest = 50\n")
    for words, said in {
        ("in",): "got no instruction",
        ("in", "make it red", "--workflow", "steps.toml"): "got --workflow beside",
        ("in", "make it red", "--lock", "on"): "got lock 'on'",
        ("in", "make it red", "--size", "63"): "got size 63x63",
        ("none", "make it red"): "got 'none', allowed a folder",
    }.items():
        ended = run("batch", *words)
        assert (ended.code, ended.out) == (2, "")
        assert said in ended.err
    assert not (here / "batch").exists()
    ended = run("batch", "in", "--workflow", "steps.toml", "--out", "small")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[1] == "1 done (0 of them before), 0 failed; see small/report.html"
    assert max(Photo.open(here / "small" / "a.jpg").size) == 50
    ended = run("batch", "in", "--template", "time", "--slot", "time=night", "--out", "night", *QUICK)
    assert ended.code == 0
    assert "night" in (here / "night" / "report.csv").read_text()
