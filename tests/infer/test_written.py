"""How a prompt came to be: checked where it comes in, kept in the receipt, and through a replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pico import SPEC, photo

from fluxloom.errors import BadInput
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.receipt import Receipt, read_receipt
from fluxloom.infer.replay import replay
from fluxloom.infer.request import Reference, Request, Result, Written, resolve

WRITTEN = Written(text="a cat", template="sign", slots={"text": "猫"}, enhancer="rules")


def test_the_receipt_tells_it_and_a_replay_keeps_it(pipeline: Pipeline, tmp_path: Path) -> None:
    (result,) = pipeline.run(Request(prompt="a red cat", seed=1, written=WRITTEN))
    path = result.save(tmp_path / "a.png")
    told = {"text": "a cat", "template": "sign", "slots": {"text": "猫"}, "enhancer": "rules", "model": None}
    assert read_receipt(path).data["request"]["written"] == told
    again = replay(pipeline, path)
    assert again.verdict == "bit-exact"
    assert again.result.receipt.data["request"]["written"] == told


def test_it_changes_no_picture(pipeline: Pipeline) -> None:
    edits = [
        pipeline.run(Request(prompt="make it red", seed=1, references=(Reference(photo()),), written=written))[0]
        for written in (None, WRITTEN)
    ]
    assert edits[0].receipt.pixels == edits[1].receipt.pixels
    assert edits[0].receipt.data["request"]["written"] is None
    assert edits[0].receipt.id != edits[1].receipt.id


def test_a_receipt_from_before_is_replayed(pipeline: Pipeline, tmp_path: Path) -> None:
    (result,) = pipeline.run(Request(prompt="a red cat", seed=1))
    request = {name: value for name, value in result.receipt.data["request"].items() if name != "written"}
    old = Result(result.image, Receipt({**result.receipt.data, "request": request}))
    assert replay(pipeline, old.save(tmp_path / "a.png")).verdict == "bit-exact"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("a cat", "got written 'a cat', allowed text, template, slots"),
        ({"template": "sign"}, "allowed text, template"),
        ({"text": "a", "enhancers": "rules"}, "got 'enhancers' in written, .* try 'enhancer'"),
        ({"text": None}, "written.text 'None', allowed text"),
        ({"text": "a", "slots": {"a": 1}}, "written.slots"),
        ({"text": "a", "slots": "red"}, "written.slots"),
    ],
)
def test_what_is_none(written: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        resolve(Request(prompt="a cat", written=written), SPEC)


def test_its_json_will_do() -> None:
    assert resolve(Request(prompt="a cat", written=WRITTEN.to_dict()), SPEC).written == WRITTEN
