"""``fluxloom bench``: tables, files, pictures, and one line for what cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import Run

QUICK = ("--size", "64", "--repeats", "1", "--device", "cpu")


def test_a_step_is_a_table_a_file_and_a_picture(run: Run, here: Path) -> None:
    recipes = ("--recipe", "plain", "--recipe", "fused+bfloat16", "--recipe", "captured")
    ended = run("bench", "step", *QUICK, *recipes, "--json", "new/step.json", "--plot", "step.svg", "--kernels")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].split("\t")[:2] == ["recipe", "ms"]
    assert [line.split("\t")[0] for line in lines[1:4]] == ["noise", "plain", "fused+bfloat16"]
    assert lines[4:] == ["captured: skipped: CUDA graphs need a GPU", "step.svg"]
    assert ".. fused+bfloat16" in ended.err
    kept = json.loads((here / "new/step.json").read_text("utf-8"))
    assert (kept["model"], kept["size"], kept["what"]) == ("nano", [64, 64], "step")
    assert [row["recipe"] for row in kept["rows"]] == ["noise", "plain", "fused+bfloat16", "captured"]
    assert (here / "step.svg").read_text("utf-8").startswith("<svg ")
    again = run("bench", "plot", "new/step.json", "--out", "again.svg")
    assert (again.code, again.out) == (0, "again.svg\n")
    assert (here / "again.svg").read_bytes() == (here / "step.svg").read_bytes()


def test_the_floor_is_counted_measured_and_compared_with(run: Run, here: Path) -> None:
    ended = run("bench", "floor", *QUICK, "--references", "1", "--quiet", "--json", "floor.json")
    assert (ended.code, ended.err) == (0, "")
    assert {"operations\tTFLOP", "best rate\tTFLOP/s\theld", "floor\tms\theld"} <= set(ended.out.splitlines())
    kept = json.loads((here / "floor.json").read_text("utf-8"))
    row = kept["rows"][-1]
    assert row["times_floor"] == pytest.approx(row["ms"] / kept["floor_ms"]["float32"], rel=1e-3)
    assert kept["tokens"] == [48, 32]


def test_a_picture_and_a_load_in_stages(run: Run) -> None:
    ended = run(
        "bench", "image", "--size", "64", "--steps", "2", "--pictures", "2", "--device", "cpu", "--quiet",
        "--recipe", "fused+bfloat16",
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    head, cold, warm, decoder = (line.split("\t") for line in ended.out.splitlines())
    assert head[:3] == ["picture", "text s", "first step s"]
    assert (cold[0], warm[0], decoder[0]) == ("cold", "warm", "decoder alone")
    ended = run("bench", "load", "nano", "--repeats", "1", "--device", "cpu", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    assert "in page cache" in ended.out


@pytest.mark.slow
def test_peers_run_beside_ours(run: Run, here: Path) -> None:
    ended = run(
        "bench", "peers", *QUICK, "--only", "ours plain+float32,compiled fa3", "--scenes", "t2i", "--json", "peers.json"
    )
    assert ended.code == 0
    assert "ours plain+float32\tt2i" in ended.out
    assert "diffusers compiled fa3: skipped: not installed" in ended.out
    kept = json.loads((here / "peers.json").read_text("utf-8"))
    assert kept["rows"][0]["tokens"] == [48, 16]
    assert kept["compile_cache"] == "fresh for each"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["step", "--recipe", "warp"], "got recipe 'warp', allowed one each of plain, fused"),
        (["step", "--turns", "--kernels"], "got --turns and --kernels, allowed one of them"),
        (["step", "--size", "100"], "got a side of 100 px, allowed multiples of 16"),
        (["step", "--plot", "a.png"], "got 'a.png' to draw into, allowed names that end in .svg, try a.svg"),
        (["step", "--device", "tpu"], "got device 'tpu'"),
        (["step", "--threads", "0"], "got --threads 0, allowed 1 to 1024"),
        (["step", "--batch", "0"], "got --batch"),
        (["image", "--dtype", "int8"], "got dtype 'int8'"),
        (["image", "--recipe", "openvino"], "got recipe 'openvino', allowed those of auto, plain"),
        (["load", "flux1-dev"], "there is nothing to load"),
        (["load", "nano", "--cache", "hot"], "got --cache 'hot'"),
        (["peers", "--only", "nobody"], "got --only nobody"),
        (["peers", "--scenes", "film"], "got --scenes 'film', allowed t2i, kontext"),
        (["peers", "--model", "flux9"], "got model 'flux9', allowed nano"),
        (["plot", "none.json", "--out", "a.svg"], "allowed a file of `fluxloom bench --json`"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, run: Run, here: Path) -> None:
    ended = run("bench", *words)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert list(here.iterdir()) == []
