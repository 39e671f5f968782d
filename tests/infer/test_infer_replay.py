"""A picture is drawn again from its file alone, to the bit, or the difference is measured and explained."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import SPEC, photo, save_model
from PIL import Image

from fluxloom.errors import ReceiptError
from fluxloom.infer import files
from fluxloom.infer import receipt as receipts
from fluxloom.infer.pictures import pixel_hash
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.receipt import Receipt
from fluxloom.infer.replay import difference, replay
from fluxloom.infer.request import Reference, Request, Result
from fluxloom.infer.runtime import Runtime


def draw(pipeline: Pipeline, prompt: str = "a red cat", **fields: Any) -> Result:
    return pipeline.run(Request(**{"prompt": prompt, "seed": 1, **fields}))[0]


def edited(pipeline: Pipeline, picture: Any) -> Result:
    return draw(pipeline, "make it blue", references=(Reference(picture),))


def forged(result: Result, change: Callable[[dict[str, Any]], None]) -> Result:
    """The same picture with a consistent receipt that says something else."""
    data = json.loads(json.dumps(result.receipt.data))
    change(data)
    return Result(result.image, Receipt(data))


def test_bit_exact_at_any_quality(pipeline: Pipeline, tmp_path: Path) -> None:
    for name in ("a.jpg", "a.webp"):
        assert replay(pipeline, draw(pipeline).save(tmp_path / name, quality=30)).verdict == "bit-exact"


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_bit_exact_whatever_the_format(pipeline: Pipeline, tmp_path: Path, name: str) -> None:
    result = draw(pipeline, negative="dog", steps=4, guidance=2.0, true_cfg=2.0, solver="heun", width=48)
    again = replay(pipeline, result.save(tmp_path / name))
    assert again.verdict == "bit-exact"
    assert (again.max_difference, again.psnr, again.causes) == (0, math.inf, ())
    assert again.receipt == result.receipt
    assert again.result.receipt.pixels == result.receipt.pixels


def test_picture_k_of_n_replays_alone(pipeline: Pipeline, tmp_path: Path) -> None:
    third = pipeline.run(Request(prompt="a cat", seed=40, n=3))[2]
    again = replay(pipeline, third.save(tmp_path / "a.png"))
    assert again.verdict == "bit-exact"
    assert again.result.seed == 42


def test_edit_of_a_file_beside(pipeline: Pipeline, tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    path = edited(pipeline, tmp_path / "photo.png").save(tmp_path / "edit.png")
    (tmp_path / "photo.png").rename(tmp_path / "renamed.png")
    (tmp_path / "broken.png").write_bytes(b"")  # passed over
    photo(seed=1).save(tmp_path / "another.png")
    photo(48, 64).save(tmp_path / "lying.png")
    photo(80, 64).save(tmp_path / "larger.png")
    assert replay(pipeline, path).verdict == "bit-exact"


def test_image_to_image(pipeline: Pipeline, tmp_path: Path) -> None:
    result = draw(pipeline, init=photo(), strength=0.5, steps=4)
    again = replay(pipeline, result.save(tmp_path / "a.png"), inputs=[photo()])
    assert again.verdict == "bit-exact"


@pytest.mark.parametrize("kind", ["picture", "path", "result"])
def test_inputs_may_be_given(pipeline: Pipeline, tmp_path: Path, kind: str) -> None:
    parent = draw(pipeline)
    elsewhere = parent.save(tmp_path / "elsewhere" / "a.png")
    path = edited(pipeline, parent).save(tmp_path / "edit.png")
    with pytest.raises(ReceiptError, match="not beside it, allowed with that picture, try giving it"):
        replay(pipeline, path)
    given = {"picture": parent.image, "path": elsewhere, "result": parent}[kind]
    assert replay(pipeline, path, [photo(), given]).verdict == "bit-exact"


def test_a_lossy_parent_is_drawn_again(pipeline: Pipeline, tmp_path: Path) -> None:
    first = draw(pipeline)
    second = edited(pipeline, first)
    third = edited(pipeline, second)
    first.save(tmp_path / "1.jpg")
    second.save(tmp_path / "2.webp", quality=50)
    assert replay(pipeline, third.save(tmp_path / "3.jpg")).verdict == "bit-exact"
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(ReceiptError, match="not beside it"):
        replay(pipeline, tmp_path / "3.jpg")


def test_a_parent_that_no_longer_draws_the_same_is_no_parent(pipeline: Pipeline, tmp_path: Path) -> None:
    parent = forged(draw(pipeline), lambda data: data["request"].update(steps=5))
    child = forged(edited(pipeline, draw(pipeline)), lambda data: data["inputs"][0].update(receipt=parent.receipt.id))
    parent.save(tmp_path / "parent.jpg")
    with pytest.raises(ReceiptError, match="not beside it"):
        replay(pipeline, child.save(tmp_path / "child.png"))


def test_other_weights_give_another_picture_and_say_why(pipeline: Pipeline, tmp_path: Path) -> None:
    path = draw(pipeline).save(tmp_path / "a.png")
    folder = save_model(tmp_path / "other", SPEC, seed=5)
    other = Pipeline(Runtime.from_folder(folder, SPEC, torch.device("cpu"), torch.float32))
    again = replay(other, path)
    assert again.verdict == "different"
    assert again.max_difference > 20
    assert again.psnr < 30
    assert len(again.causes) == 1
    assert again.causes[0].startswith("weights content: sha256:")


def test_other_precision_is_measured(folder: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    path = draw(pipeline).save(tmp_path / "a.png")
    again = replay(Pipeline(Runtime.from_folder(folder, SPEC, torch.device("cpu"), torch.bfloat16)), path)
    assert again.verdict == "different"
    assert 1 <= again.max_difference < 100
    assert again.causes == ("machine dtype: float32 then, bfloat16 now",)


def test_causes_name_what_has_changed(pipeline: Pipeline, tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["fluxloom"] = "0.0.1"
        data["versions"]["torch"] = "1.0"
        data["machine"]["threads"] = 10**6

    again = replay(pipeline, forged(draw(pipeline), change).save(tmp_path / "a.png"))
    assert again.verdict == "bit-exact"
    assert again.causes == (
        f"fluxloom: 0.0.1 then, {again.result.receipt.data['fluxloom']} now",
        f"versions torch: 1.0 then, {receipts.versions()['torch']} now",
        "machine threads: 1000000 then, 1 now",
    )


def test_computes_with_the_threads_of_then(pipeline: Pipeline, tmp_path: Path) -> None:
    used: list[int] = []
    hook = pipeline.runtime.transformer.register_forward_hook(lambda *args: used.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        path = forged(draw(pipeline), lambda data: data["machine"].update(threads=1)).save(tmp_path / "a.png")
        used.clear()
        replay(pipeline, path)
        assert set(used) == {1}
        assert torch.get_num_threads() == 2
    finally:
        hook.remove()
        torch.set_num_threads(1)


def test_a_parent_is_drawn_again_with_its_own_threads(pipeline: Pipeline, tmp_path: Path) -> None:
    parent = forged(draw(pipeline), lambda data: data["machine"].update(threads=2))
    parent.save(tmp_path / "parent.jpg")
    path = edited(pipeline, parent).save(tmp_path / "child.png")
    used: list[int] = []
    hook = pipeline.runtime.transformer.register_forward_hook(lambda *args: used.append(torch.get_num_threads()))
    try:
        assert replay(pipeline, path).receipt.data["machine"]["threads"] == 1
    finally:
        hook.remove()
    assert used == [min(2, os.cpu_count() or 1)] * 3 + [1] * 2  # three steps of the parent, two of the edit


def test_the_receipt_of_another_model(pipeline: Pipeline, tmp_path: Path) -> None:
    result = forged(draw(pipeline), lambda data: data["model"].update(name="flux9"))
    with pytest.raises(ReceiptError, match="drawn by 'flux9', allowed one by the loaded 'pico'"):
        replay(pipeline, result.save(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["request"].pop("solver"),
        lambda data: data["inputs"].append({}),
        lambda data: data["inputs"].append(3),
        lambda data: data["inputs"].append({"role": "context", "size": [64, 48]}),
        lambda data: data["inputs"].append(
            {"role": "context", "pixels": "sha256:0", "size": 5, "file": None, "receipt": None}
        ),
    ],
)
def test_receipts_with_parts_missing(
    pipeline: Pipeline, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    with pytest.raises(ReceiptError, match="without all its parts"):
        replay(pipeline, forged(draw(pipeline), change).save(tmp_path / "a.png"))


def test_tampered_and_foreign_pictures_are_not_replayed(pipeline: Pipeline, tmp_path: Path) -> None:
    photo().save(tmp_path / "foreign.png")
    with pytest.raises(ReceiptError, match="no fluxloom receipt"):
        replay(pipeline, tmp_path / "foreign.png")
    with pytest.raises(ReceiptError, match="changed since it was drawn"):
        Result(photo(), draw(pipeline).receipt).save(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_forgery_comes_out(pipeline: Pipeline, tmp_path: Path, name: str) -> None:
    form, path, true = files.format_of(name), tmp_path / name, draw(pipeline)
    decoded = pixel_hash(files.through(photo(), form))
    note = json.dumps({"receipt": true.receipt.to_dict(), "decoded": decoded, "quality": None})
    files.write(path, files.encode(photo(), form, note))
    assert receipts.verify(path).state == "intact"  # receipt and pixels agree, but it was never drawn
    again = replay(pipeline, path)
    assert again.verdict == "different"
    assert again.result.receipt.pixels == true.receipt.pixels


def test_a_receipt_of_another_size(pipeline: Pipeline, tmp_path: Path) -> None:
    result = forged(draw(pipeline), lambda data: data["request"].update(width=32))
    with pytest.raises(ReceiptError, match=r"of \(64, 48\) pixels, allowed \(32, 48\), as its receipt draws"):
        replay(pipeline, result.save(tmp_path / "a.png"))


def test_a_copy_in_another_format_with_its_notes(pipeline: Pipeline, tmp_path: Path) -> None:
    with Image.open(draw(pipeline).save(tmp_path / "a.webp")) as picture:
        picture.save(tmp_path / "a.tiff", tiffinfo={700: picture.info["xmp"]})
    assert replay(pipeline, tmp_path / "a.tiff").verdict == "bit-exact"


def test_difference() -> None:
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (0, 0, 51))
    assert difference(black, black) == (0, math.inf)
    largest, psnr = difference(black, grey)
    assert largest == 51
    assert psnr == pytest.approx(10 * np.log10(3 * 25))
    assert difference(grey, black) == (largest, psnr)
