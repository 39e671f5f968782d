"""The batch darkroom on nano, at a size at which it draws nothing and takes no time: what is done, and not redone."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fluxloom import load
from fluxloom.api import Loom
from fluxloom.edit import workflow
from fluxloom.edit.batch import Batch, tasks
from fluxloom.edit.page import oddities, page, table
from fluxloom.edit.photo import Photo
from fluxloom.edit.workflow import Convert, Edit, Resize
from fluxloom.errors import BadInput
from fluxloom.infer.receipt import read_receipt, verify

QUICK = {"steps": 1, "width": 64, "height": 64, "true_cfg": 1.0}
RED = Edit("make the sky red", QUICK)


@pytest.fixture(scope="module")
def loom() -> Loom:
    return load("nano")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three formats, one of them deep, in a folder of a folder; and one that is none."""
    made = tmp_path / "in"
    (made / "more").mkdir(parents=True)
    colours = np.random.default_rng(0).integers(0, 65536, (5, 6, 3), dtype=np.uint16)
    deep = cv2.resize(colours, (96, 80), interpolation=cv2.INTER_LINEAR)
    cv2.imwrite(str(made / "deep.png"), deep)
    small = Image.fromarray((deep >> 8).astype(np.uint8))
    small.save(made / "more" / "a.jpg")
    small.save(made / "b.bmp")
    (made / "bad.png").write_text("hello")
    (made / "notes.txt").write_text("no picture")
    return made


def run(
    loom: Loom, given: Path, steps: tuple[workflow.Step, ...], out: Path, workers: int = 1
) -> list[dict[str, object]]:
    with Batch(loom.pipeline, tasks(given, steps, out), out, workers) as batch:
        list(batch.run())
        batch.report("a <title>")
        return batch.rows


@pytest.mark.parametrize("workers", [1, 3])
def test_a_folder(loom: Loom, folder: Path, workers: int) -> None:
    out = folder / "out"  # inside: what is written is not read
    read: list[object] = []
    loom.pipeline.runtime.reader.place(loom.pipeline.runtime.device, loom.pipeline.runtime.dtype)  # forgets all texts
    hook = loom.pipeline.runtime.reader.tower.register_forward_hook(lambda *call: read.append(call))  # type: ignore[attr-defined]
    rows = run(loom, folder, (RED,), out, workers)
    hook.remove()
    assert len(read) == 1  # of one instruction, for all pictures
    assert [(row["source"], row["state"]) for row in rows] == [
        ("b.bmp", "done"), ("bad.png", "failed"), ("deep.png", "done"), ("more/a.jpg", "done"),
    ]  # fmt: skip
    assert str(rows[1]["error"]).startswith("got ")
    for name in ("b.bmp.png", "deep.png", "more/a.jpg"):
        assert loom.replay(out / name, sorted(folder.rglob("*.*"))).verdict == "bit-exact"
        assert Photo.open(out / name).size == (96, 80)
    assert Photo.open(out / "deep.png").pixels.dtype == np.uint16
    again = run(loom, folder, (RED,), out)
    assert [row.get("resumed") for row in again] == [True, None, True, True]
    assert [{**row, "resumed": True} for row in rows if row["state"] == "done"] == [again[0], *again[2:]]
    (out / "deep.png").write_bytes(b"")  # not as it was written
    other = run(loom, folder, (Edit("make the sky red", {**QUICK, "seed": 3}),), folder.parent / "other")
    assert [row.get("resumed") for row in run(loom, folder, (RED,), out)] == [True, None, None, True]
    assert {row.get("seed") for row in other} == {3, None}
    assert len({row.get("seed") for row in rows}) == 4  # each its own


@pytest.mark.slow
def test_what_one_edit_leaves_alone_stays_to_the_last_bit(loom: Loom, tmp_path: Path) -> None:
    drawn = np.asarray(loom.generate("a red bicycle on the beach at sunset", seed=7, steps=8).image).astype(np.uint16)
    deep = cv2.resize(drawn, (640, 640), interpolation=cv2.INTER_CUBIC) * 256 + 77
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), deep[..., ::-1])
    (row,) = run(loom, tmp_path / "in", (Edit("make the bicycle blue", {"seed": 7, "steps": 8}),), tmp_path / "out")
    after = Photo.open(tmp_path / "out" / "a.png").pixels
    same = (after == deep).all(axis=-1)
    assert 0.4 < same.mean() < 1
    assert row["changed"] == pytest.approx(1 - same.mean(), abs=1e-3)
    assert 15 < float(str(row["psnr"])) < 60  # of the model's own drawing
    assert (after[same] & 255 == 77).all()
    assert loom.replay(tmp_path / "out" / "a.png", [tmp_path / "in" / "a.png"]).verdict == "bit-exact"


def test_a_list_and_a_workflow(loom: Loom, folder: Path) -> None:
    (folder / "steps.toml").write_text(
        '[[step]]\ndo = "edit"\nsteps = 1\nwidth = 64\nheight = 64\n\n[[step]]\ndo = "resize"\nlongest = 60\n\n'
        '[[step]]\ndo = "template"\nname = "time"\nslots = {time = "night"}\nsteps = 1\ntrue_cfg = 1\nlock = "off"\n\n'
        '[[step]]\ndo = "resize"\nwidth = 48\n\n[[step]]\ndo = "convert"\nformat = "webp"\n'
    )
    (folder / "list.csv").write_text(
        "path,instruction,seed,true_cfg\ndeep.png,make it snow,5,1\nmore/a.jpg,make it night,,1\nmore/a.jpg,a fog,8,1\n"
    )
    steps = workflow.load(folder / "steps.toml")
    rows = run(loom, folder / "list.csv", steps, folder / "out")
    assert [row["output"] for row in rows] == ["deep.webp", "more/a.webp", "more/a-2.webp"]
    assert [row["seed"] == seed for row, seed in zip(rows, (5, None, 8), strict=True)] == [True, False, True]
    photo = Photo.open(folder / "out" / "more/a-2.webp")
    assert (photo.form, photo.size) == ("WEBP", (48, 40))
    receipt = read_receipt(folder / "out" / "deep.webp")
    assert [step["name"] for step in receipt.data["finish"]] == ["resize", "resize"]  # not locked: as large as before
    assert receipt.data["request"]["written"]["template"] == "time"
    assert receipt.data["inputs"][0]["size"] == [60, 50]
    assert "16 bits a channel have become 8" in str(rows[0]["notes"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[step]]\ndo = 'edit'\n\n[[step]]\ndo = 'resiz'", r"line 4, step 2: got do = 'resiz'.*try 'resize'"),
        ("[[step]]\ndo = 'resize'\nlongst = 4", r"line 1, step 1: got 'longst'.*try longest"),
        ("[[step]]\ndo = 'resize'\nlongest = 40\nwidth = 40", "allowed longest, or width and height"),
        ("[[step]]\ndo = 'edit'\nstep = 4", "step 1: got field 'step'.*try steps"),
        ("[[step]]\ndo = 'edit'\nsteps = 'x'", "got steps 'x', allowed a whole number"),
        ("[[step]]\ndo = 'edit'\nlock = 'on'", "got lock 'on', allowed auto or off"),
        ("[[step]]\ndo = 'template'\nname = 'fogg'", "step 1: got template 'fogg'"),
        ("[[step]]\ndo = 'convert'\nformat = 'png'\nquality = 5", "got quality for PNG"),
        ("[[step]]\ndo = 'convert'\nformat = 'jpg'\ndepth = 16", "got depth 16 for JPEG"),
        ("[[step]]\ndo = 'convert'\nformat = 'png'\n[[step]]\ndo = 'edit'", "step 2: got a step after convert"),
        ("[[step]\n", "line 1"),
        ("steps = 4", "got steps in"),
        ("", "got no step"),
    ],
)
def test_workflows_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "steps.toml").write_text(text)
    with pytest.raises(BadInput, match=said):
        workflow.load(tmp_path / "steps.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,instruction,seed\na.png,x,4\nb.png,x,x\n", r"list.csv, line 3: got seed 'x', allowed a whole number"),
        ("path,sed\na.png,4\n", "line 2: got field 'sed'.*try seed"),
        ("path,seed\na.png\n", "line 2: got a row"),
        ("file\na.png\n", "got columns file"),
        ("path,instruction\na.png,\n", "line 2: got no instruction"),
        ("path,instruction,steps\na.png,x,0\n", "line 2: got steps 0, allowed 1 to"),
    ],
)
def test_lists_that_are_refused(loom: Loom, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(BadInput, match=said):
        run(loom, tmp_path / "list.csv", (Edit(),), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_places_that_are_refused(loom: Loom, folder: Path) -> None:
    for out, said in ((folder, "for the pictures and for --out"), (folder / "more", "which holds other files")):
        with pytest.raises(BadInput, match=said):
            run(loom, folder, (RED,), out)
    out = folder / "out"
    with Batch(loom.pipeline, tasks(folder, (RED,), out), out), pytest.raises(BadInput, match="another batch is at"):
        run(loom, folder, (RED,), out)
    with pytest.raises(BadInput, match="without pictures"):
        tasks(folder / "out", (RED,), folder.parent)
    with pytest.raises(BadInput, match="allowed a folder or a"):
        tasks(folder / "notes.txt", (RED,), folder.parent)


def test_names_that_would_meet(folder: Path) -> None:
    for name in ("c.png", "c.jpg", "C.PNG"):
        (folder / name).touch()
    plain, same = (tasks(folder, steps, folder / "out") for steps in ((RED,), (RED, Convert("PNG"))))
    assert {task.stem.lower() for task in plain} >= {"c.png", "c.jpg", "c-2.png", "b.bmp.png"}
    assert len({Path(task.stem).with_suffix("").name.lower() for task in same}) == len(same) == 7


def test_sizes() -> None:
    assert Resize(longest=100).size(400, 300) == (100, 75)
    assert Resize(width=100).size(400, 300) == (100, 75)
    assert Resize(height=30).size(400, 300) == (40, 30)
    assert Resize(50, 60).size(400, 300) == (50, 60)
    with pytest.raises(BadInput, match="got resize to 100x1"):
        Resize(width=100).size(4000, 40)


def test_the_page_shows_the_odd_ones_first() -> None:
    row = {"state": "done", "thumb": "t/<a>.jpg", "whole": False, "changed": 0.2, "delta_e": 1.0, "psnr": 30.0}
    rows = [{**row, "source": f"p{k}", "output": f"p{k}<&", "psnr": 30 + k % 3 * 0.1} for k in range(9)]
    rows[4]["psnr"], rows[5]["changed"], rows[6]["whole"], rows[7]["warnings"] = 12.0, 0.0, True, ["look"]
    rows += [{"source": "<script>", "state": "failed", "error": "got <b>"}]
    found = oddities(rows)
    assert [index for index, (score, _) in enumerate(found) if score] == [4, 5, 6, 7]
    assert found[4][1] == ["the rest drifted: psnr 12, median 30.1"]
    text = page("<title>", rows)
    names: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag != "script"
            names.extend(value or "" for key, value in attrs if key in ("class", "src"))

    Reader().feed(text)
    assert [name for name in names if "/" not in name] == ["failed", *["odd"] * 4, *["fine"] * 5]
    assert text.index("p5") < text.index("p6") < text.index("p4") < text.index("p0")
    assert "t/%3Ca%3E.jpg" in names
    assert table(rows).splitlines()[-1].startswith("<script>,,failed,got <b>")


def test_states_of_a_request_are_what_the_journal_is_about(loom: Loom, folder: Path) -> None:
    """Another setting of any kind is other work; the very same is not."""
    out = folder / "out"
    run(loom, folder / "more", (RED,), out)
    changes = ({"guidance": 3.3}, {"steps": 2}, {"negative": "dog", "true_cfg": 2.0}, {"solver": "heun"})
    for more in changes:
        (row,) = run(loom, folder / "more", (Edit(RED.instruction, {**QUICK, **more}),), out)
        assert "resumed" not in row
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    assert len({line.get("key") for line in lines}) == len(lines) == 2 + len(changes)
    assert verify(out / "a.jpg").state == "intact"
    assert workflow.FIELDS.keys() == {
        *("negative", "prompt_t5", "width", "height", "solver", "shift", "seed", "quality", "tolerance"),
        *_NUMBERS,
    }


_NUMBERS = ("steps", "guidance", "true_cfg", "text_length")
