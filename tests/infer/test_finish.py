"""What is done to a picture after it is drawn stands in its receipt, and is done again by replay."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pico import photo
from PIL import Image, ImageOps

from fluxloom.edit.lock import Lock
from fluxloom.errors import BadInput, ReceiptError
from fluxloom.infer.finish import Demanding, boxed, masks
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.receipt import Receipt
from fluxloom.infer.replay import replay
from fluxloom.infer.request import Picture, Reference, Request, Resolved, Result
from fluxloom.infer.runtime import Runtime


@dataclass(frozen=True)
class Border:
    """A frame around the picture: nothing that a model would do."""

    width: int
    name: str = "border"

    def settings(self) -> dict[str, Any]:
        return {"width": self.width}

    def __call__(self, image: Image.Image, request: Resolved) -> tuple[Image.Image, dict[str, Any]]:
        return ImageOps.expand(image, self.width, "red"), {"steps": request.steps}


def border(settings: Mapping[str, Any], pictures: Sequence[Picture]) -> Border:
    assert not pictures
    return Border(**settings)


@pytest.fixture(scope="module")
def pipeline(runtime: Runtime) -> Pipeline:
    return Pipeline(runtime, {"border": border, "lock": Lock.remade})


def edit(pipeline: Pipeline, picture: Picture, *finishers: Any, **fields: Any) -> Result:
    request = Request(prompt="make it blue", seed=1, references=(Reference(picture),), **fields)
    return pipeline.run(request, finishers=finishers)[0]


def test_finishers_run_in_turn_and_are_recorded(pipeline: Pipeline, tmp_path: Path) -> None:
    request = Request(prompt="a cat", seed=1, n=2)
    plain, framed = pipeline.run(request), pipeline.run(request, finishers=(Border(2), Border(3)))
    assert "finish" not in plain[0].receipt.data
    for before, after in zip(plain, framed, strict=True):
        assert after.image.size == (before.image.width + 10, before.image.height + 10)
        assert np.array_equal(np.asarray(after.image)[5:-5, 5:-5], np.asarray(before.image))
    told = framed[1].receipt.data["finish"]
    assert [(one["name"], one["settings"], one["report"]) for one in told] == [
        ("border", {"width": 2}, {"steps": 3}),
        ("border", {"width": 3}, {"steps": 3}),
    ]
    again = replay(pipeline, framed[1].save(tmp_path / "a.jpg"))
    assert (again.verdict, again.causes) == ("bit-exact", ())
    assert again.result.receipt.pixels == framed[1].receipt.pixels
    (many,) = pipeline.run_many([request], finishers=(Border(2), Border(3)))
    assert [one.receipt.pixels for one in many] == [one.receipt.pixels for one in framed]


def locked(pipeline: Pipeline, folder: Path, *, box: bool) -> Result:
    """An edit of a picture three times as large as what the model works at, held to a part of it."""
    photo(192, 144).save(folder / "photo.png")
    mask: Any = boxed((192, 144), (0, 0, 100, 144))
    if not box:
        mask.save(folder / "mask.png")
        mask = folder / "mask.png"
    lock = Lock(box=(0, 0, 100, 144)) if box else Lock(mask)
    return edit(pipeline, folder / "photo.png", lock, init=folder / "photo.png", mask=mask, width=64, height=48)


@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_locked_edit_is_replayed_to_the_bit(pipeline: Pipeline, tmp_path: Path, box: bool, name: str) -> None:
    result = locked(pipeline, tmp_path, box=box)
    before, after = (np.asarray(one) for one in (photo(192, 144), result.image))
    assert np.array_equal(before[:, 100:], after[:, 100:])
    assert not np.array_equal(before[:, :100], after[:, :100])
    roles = [one["role"] for one in result.receipt.data["inputs"]]
    assert roles == ["context", "init", "mask"] + ([] if box else ["lock"])
    assert result.receipt.data["finish"][0]["report"]["mode"] == "mask"
    path = result.save(tmp_path / name)
    again = replay(pipeline, path)
    assert again.verdict == "bit-exact"
    assert again.result.receipt.data["finish"] == result.receipt.data["finish"]
    if not box:
        (tmp_path / "mask.png").unlink()
        with pytest.raises(ReceiptError, match=r"made from mask\.png"):
            replay(pipeline, path)


def forget(data: dict[str, Any]) -> None:
    data["finish"] = [{"name": "border"}]


def rename(data: dict[str, Any]) -> None:
    data["finish"][0]["name"] = "glow"


def confuse(data: dict[str, Any]) -> None:
    data["finish"][0]["settings"] = {"height": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [(forget, "finish is not in order"), (rename, "'glow', allowed border, lock"), (confuse, "unusable settings")],
)
def test_receipts_that_cannot_be_followed(
    pipeline: Pipeline, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    result = pipeline.run(Request(prompt="a cat", seed=1), finishers=(Border(2),))[0]
    data = json.loads(json.dumps(result.receipt.data))
    change(data)
    with pytest.raises(ReceiptError, match=message):
        replay(pipeline, Result(result.image, Receipt(data)).save(tmp_path / "a.png"))


def test_a_lock_that_does_not_fit_is_refused_before_anything_is_drawn(pipeline: Pipeline) -> None:
    assert isinstance(Lock(), Demanding)
    assert not isinstance(Border(1), Demanding)
    with pytest.raises(BadInput, match="got a lock of 64x48 for a picture of 32x32"):
        pipeline.stream(Request(prompt="a", references=(Reference(photo(32, 32)),)), [Lock(photo())])
    with pytest.raises(BadInput, match=r"got box \(0, 0, 99, 9\), allowed .* inside 64x48"):
        pipeline.stream(Request(prompt="a", references=(Reference(photo()),)), [Lock(box=(0, 0, 99, 9))])
    with pytest.raises(BadInput, match="got a lock for a drawing"):
        pipeline.stream(Request(prompt="a cat"), [Lock()])


def test_masks_of_a_receipt() -> None:
    told = [
        {"name": "lock", "settings": {"box": [1, 2, 30, 20]}},
        {"name": "lock", "settings": {"box": [0, 0, 999, 9]}},
    ]
    (mask,) = masks(told, [64, 48])  # the other cannot be, and is passed over
    assert mask.getbbox() == (1, 2, 30, 20)
