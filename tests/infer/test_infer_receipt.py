"""Receipts: what they say, and that a tampered, damaged or foreign picture is told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

import fluxloom
from fluxloom.errors import BadInput, ReceiptError
from fluxloom.infer import files
from fluxloom.infer.pictures import pixel_hash
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.receipt import Receipt, read_receipt, verify
from fluxloom.infer.request import Request, Result


@pytest.fixture(scope="module")
def result(pipeline: Pipeline) -> Result:
    return pipeline.run(Request(prompt='a 猫 "<&>" cat', seed=11, n=2))[1]


def altered(result: Result, path: Path, **options: Any) -> Path:
    """The same note over other pixels, as an editor that keeps metadata would leave it."""
    picture = Image.open(result.save(path))
    picture.load()
    note = files.note_in(picture)
    picture.putpixel((3, 3), tuple(255 - value for value in picture.getpixel((3, 3))))  # type: ignore[union-attr]
    path.write_bytes(files.encode(picture, files.format_of(path), note, **options))
    return path


def with_note(path: Path, note: str) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(files.KEY, note)
    Image.new("RGB", (32, 32)).save(path, pnginfo=info)
    return path


def test_a_receipt_says_everything(result: Result, pipeline: Pipeline) -> None:
    data = result.receipt.to_dict()
    assert data["id"] == result.receipt.id
    assert data["fluxloom"] == fluxloom.__version__
    assert data["model"] == {"name": "pico", "content": pipeline.runtime.content}
    assert (data["request"]["seed"], data["request"]["index"], data["request"]["n"]) == (12, 1, 2)
    assert (data["request"]["prompt"], data["request"]["solver"]) == ('a 猫 "<&>" cat', "euler")
    assert data["inputs"] == []
    assert data["pixels"] == pixel_hash(result.image)
    assert data["versions"].keys() == {"python", "torch", "numpy", "pillow", "opencv-python-headless", "safetensors"}
    assert data["machine"]["threads"] == 1
    assert data["machine"]["processor"]
    assert data["seconds"] > 0
    assert data["created"].endswith("+00:00")
    assert json.loads(json.dumps(data)) == data


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg", "a.webp"])
def test_saved_files_are_intact(tmp_path: Path, result: Result, name: str) -> None:
    path = result.save(tmp_path / name)
    assert verify(path).state == "intact"
    assert read_receipt(path) == result.receipt
    assert read_receipt(path).id == result.receipt.id


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_the_longest_texts_fit_into_every_format(tmp_path: Path, pipeline: Pipeline, name: str) -> None:
    longest = "".join(chr(0x1F600 + i % 80) for i in range(2_000))  # each takes 12 bytes of ASCII JSON
    (result,) = pipeline.run(Request(prompt=longest, negative=longest[::-1], seed=1))
    assert read_receipt(result.save(tmp_path / name)) == result.receipt


def test_lossy_webp_is_intact(tmp_path: Path, result: Result) -> None:
    path = result.save(tmp_path / "a.webp", quality=50)
    assert pixel_hash(Image.open(path)) != result.receipt.pixels  # the loss is real
    assert read_receipt(path) == result.receipt


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_one_changed_pixel_is_found(tmp_path: Path, result: Result, name: str) -> None:
    path = altered(result, tmp_path / name)
    verdict = verify(path)
    assert (verdict.state, verdict.receipt) == ("changed", result.receipt)
    with pytest.raises(ReceiptError, match="pixels were changed"):
        read_receipt(path)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_pictures_without_a_receipt(tmp_path: Path, result: Result, name: str) -> None:
    path = result.save(tmp_path / name, receipt=False)
    assert b"cat" not in path.read_bytes()  # the prompt stays private
    assert verify(path).state == "none"
    with pytest.raises(ReceiptError, match="carries no fluxloom receipt"):
        read_receipt(path)


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_frames_behind_the_true_one_are_found(tmp_path: Path, result: Result, name: str) -> None:
    path = result.save(tmp_path / name)
    with Image.open(path) as picture:
        picture.load()
        notes = {"pnginfo": PngImagePlugin.PngInfo()} if path.suffix == ".png" else {"xmp": picture.info["xmp"]}
        if path.suffix == ".png":
            notes["pnginfo"].add_itxt(files.KEY, files.note_in(picture) or "")
        other = Image.new("RGB", picture.size, "red")
        picture.save(path, save_all=True, append_images=[other], lossless=True, **notes)
    assert verify(path).state == "changed"


def test_what_other_software_writes_is_no_receipt(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat, steps: 20")
    Image.new("RGB", (32, 32)).save(tmp_path / "foreign.png", pnginfo=info)
    assert verify(tmp_path / "foreign.png").state == "none"


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", "null", '{"receipt": 3, "decoded": "x"}', "[" * 100_000])
def test_notes_that_are_no_receipts(tmp_path: Path, note: str) -> None:
    verdict = verify(with_note(tmp_path / "a.png", note))
    assert (verdict.state, verdict.receipt) == ("damaged", None)
    with pytest.raises(ReceiptError, match="damaged"):
        read_receipt(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2, allowed 1"),
        ({"seconds": 0.5}, "its id is not right"),
        ({"id": "sha256:0"}, "its id is not right"),
        ({"pixels": 3}, "pixels is not right"),
        ({"inputs": None, "request": []}, "request, inputs is not right"),
        ({"extra": 1}, "its id is not right"),
    ],
)
def test_altered_receipts(tmp_path: Path, result: Result, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ReceiptError, match=message):
        Receipt.from_dict({**result.receipt.to_dict(), **change})
    note = json.dumps({"receipt": {**result.receipt.to_dict(), **change}, "decoded": "x"})
    assert verify(with_note(tmp_path / "a.png", note)).state == "damaged"


def test_the_id_does_not_depend_on_the_order_of_keys(result: Result) -> None:
    data = result.receipt.to_dict()
    assert Receipt.from_dict(dict(reversed(data.items()))).id == data["id"]


def test_verify_needs_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="cannot be read"):
        verify(tmp_path / "a.png")


def test_saving_refuses_other_formats_before_it_writes(tmp_path: Path, result: Result) -> None:
    with pytest.raises(BadInput, match=r"a\.bmp"):
        result.save(tmp_path / "a.bmp")
    assert list(tmp_path.iterdir()) == []


def test_result_tells_seed_and_warnings(result: Result) -> None:
    assert result.seed == 12
    assert result.warnings == tuple(result.receipt.data["warnings"])
