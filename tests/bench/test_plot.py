"""Results as files and as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from fluxloom.bench.plot import bars, floors, svg
from fluxloom.bench.results import Results, read
from fluxloom.errors import BadInput, OutputError

CPU = torch.device("cpu")
RUN: dict[str, Any] = {
    "model": "flux1-dev",
    "machine": {"name": "one <GPU>"},
    "versions": {"torch": "2.11"},
    "created": "2026-11-22T00:00:00",
    "rows": [
        {"peer": "ground", "scene": "t2i", "tflop": {}, "floor_ms": {"bfloat16": 100.0, "fp8": 64.0, "far": 9e9}},
        {"peer": "other", "scene": "t2i", "ms": 200.0, "ours": False, "lossy": False},
        {"peer": "ours captured", "scene": "t2i", "ms": 110.0, "ours": True, "lossy": False},
        {"peer": "gone", "scene": "t2i", "skipped": "not installed"},
        {"peer": "ours captured", "scene": "kontext", "ms": 240.0, "ours": True, "lossy": True},
    ],
}
NS = "{http://www.w3.org/2000/svg}"


def test_bars_are_as_long_as_the_times_and_the_quickest_comes_first() -> None:
    assert {scene: [bar.name for bar in rows] for scene, rows in bars(RUN).items()} == {
        "t2i": ["ours captured", "other"],
        "kontext": ["ours captured"],
    }
    tree = ElementTree.fromstring(svg(RUN))
    drawn = [box for box in tree.iter(f"{NS}rect") if box.get("height") == "20"]
    ours, other, kontext = (float(box.get("width", "0")) for box in drawn)
    assert ours / other == pytest.approx(110 / 200, abs=1e-3)
    assert kontext == pytest.approx(other, abs=0.1)  # every scene has its own scale
    lines = [line for line in tree.iter(f"{NS}line") if line.get("class") == "floor"]
    left = float(drawn[0].get("x", "0"))
    at = sorted(float(line.get("x1", "0")) - left for line in lines)
    assert at == pytest.approx([other * 64 / 200, other * 100 / 200], abs=0.2)  # the far one is off the picture
    words = [text.text or "" for text in tree.iter(f"{NS}text")]
    assert "floor fp8: 64 ms" in words
    assert "ours captured (lossy)" in words
    assert any("one <GPU>" in text and "torch 2.11" in text for text in words)
    assert len({box.get("fill") for box in drawn}) == 3


def test_runs_of_steps_are_drawn_too() -> None:
    run = {"rows": [{"recipe": "noise", "error": 0.1}, {"recipe": "plain", "ms": 3.0}], "floor_ms": {"float32": 1.0}}
    assert [bar.ours for bar in bars(run)["one step"]] == [True]
    assert floors(run, "one step") == {"float32": 1.0}
    assert "floor float32" in svg(run)
    with pytest.raises(BadInput, match="got a run without times of steps"):
        svg({"rows": [{"load": 1, "ready_s": 3.0}]})


def test_a_run_is_kept_after_every_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    run = Results.begin("step", CPU, path, model="nano")
    assert read(path)["rows"] == []
    run.add({"recipe": "plain", "ms": 3.0})
    run.note(floor_ms={"float32": 1.0})
    kept = read(path)
    assert kept == json.loads(json.dumps(run.to_dict()))
    assert (kept["schema"], kept["what"], kept["model"], kept["floor_ms"]) == (1, "step", "nano", {"float32": 1.0})
    assert kept["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in kept["versions"]["torch"]
    assert {"created", "machine"} <= kept.keys()
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_places_and_files_that_will_not_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="try another --json"):
        Results.begin("step", CPU, tmp_path / "file" / "run.json")
    for text in ("", "[]", '{"schema": 2, "rows": []}', '{"schema": 1}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(BadInput, match=r"allowed a file of `fluxloom bench --json`"):
            read(tmp_path / "run.json")
