"""Faces by a tiny ONNX model that pools what it is shown, and things of the illustrated world."""

from __future__ import annotations

import importlib.util
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fluxloom.errors import BadInput, Failure
from fluxloom.measure.identity import TEMPLATE, FaceIdentity, WorldIdentity, aligned, similarity
from fluxloom.measure.recogniser import Recogniser
from fluxloom.world import Mix, Scene, load_atlas, render, sample_edit


def field(number: int, value: int | bytes | str) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def varint(value: int) -> bytes:
    return (bytes([value & 127 | 128]) + varint(value >> 7)) if value > 127 else bytes([value])


def tensor(name: str, *shape: int) -> bytes:
    dims = b"".join(field(1, field(1, side)) for side in shape)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))


def pooling_model(path: Path) -> Path:
    """An ONNX file: [1, 3, 112, 112] to the means of 4 x 4 squares of each channel, [1, 48]."""
    sides = [field(5, field(1, name) + field(8, 28) * 2 + field(20, 7)) for name in ("kernel_shape", "strides")]
    pool = field(1, "face") + field(2, "squares") + field(4, "AveragePool") + b"".join(sides)
    flat = field(1, "squares") + field(2, "who") + field(4, "Flatten")
    nodes = field(1, pool) + field(1, flat) + field(2, "tiny")
    graph = nodes + field(11, tensor("face", 1, 3, 112, 112)) + field(12, tensor("who", 1, 48))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13)))
    return path


class Session:
    """onnxruntime's interface over OpenCV's engine, for where onnxruntime is not installed."""

    def __init__(self, path: str, providers: list[str]) -> None:
        self.net = cv2.dnn.readNetFromONNX(path)

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="face")]

    def run(self, _: None, feed: dict[str, Any]) -> list[Any]:
        self.net.setInput(feed["face"])
        return [self.net.forward()]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if importlib.util.find_spec("onnxruntime") is None:
        monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    return pooling_model(tmp_path / "face.onnx")


def face(seed: int = 0) -> NDArray[np.uint8]:
    """An aligned one: a soft pattern."""
    values = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(values).resize((112, 112), Image.Resampling.BICUBIC))


def test_a_face_is_a_unit_vector_of_what_the_model_says(model: Path) -> None:
    found = FaceIdentity(model).embed(Image.fromarray(face()))
    squares = ((face().astype(float) - 127.5) / 127.5).reshape(4, 28, 4, 28, 3).mean((1, 3)).transpose(2, 0, 1).ravel()
    assert found is not None
    np.testing.assert_allclose(found, squares / np.linalg.norm(squares), atol=1e-5)


def test_faces_are_aligned_by_their_landmarks(model: Path) -> None:
    """A face turned by 20 degrees and made larger is the same face; seen by wrong landmarks, or another, it is not."""
    turn = np.vstack([cv2.getRotationMatrix2D((56, 56), 20, 1.7), [0, 0, 1]])
    turn[:2, 2] += 110, 100
    points = (np.c_[TEMPLATE, np.ones(5)] @ turn.T)[:, :2]

    def photo(seed: int) -> Image.Image:
        return Image.fromarray(cv2.warpAffine(face(seed), turn[:2], (340, 320)))

    def cosine(seed: int, landmarks: NDArray[np.float64] | None) -> float:
        found = FaceIdentity(model, lambda _: landmarks).embed(photo(seed))
        return 0.0 if found is None else float(found @ known)

    known = FaceIdentity(model).embed(Image.fromarray(face()))
    assert known is not None
    assert cosine(0, points) > 0.995
    assert cosine(0, points[::-1]) < 0.9
    assert cosine(1, points) < 0.7
    assert cosine(0, None) == 0
    nobody = FaceIdentity(model, lambda _: None)
    assert similarity(nobody, photo(0), photo(1)) is None
    with pytest.raises(BadInput, match=r"got points \[4, 2\], allowed five finite"):
        aligned(face(), points[:4])


def test_the_largest_face_of_a_detector(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    answers = iter([None, np.array([[0, 0, 9, 9, *range(10), 0.9], [0, 0, 20, 20, *TEMPLATE.ravel(), 0.8]])])
    stand_in = SimpleNamespace(
        setInputSize=seen.append, detect=lambda picture: (seen.append(picture[0, 0].tolist()), next(answers))
    )
    monkeypatch.setattr(cv2, "FaceDetectorYN", SimpleNamespace(create=lambda *_: stand_in))
    both = FaceIdentity(model, model)  # any file that exists
    red = np.zeros((112, 130, 3), np.uint8)
    red[..., 0] = 200
    assert both.embed(Image.fromarray(red)) is None
    found, plain = both.embed(Image.fromarray(red)), FaceIdentity(model).embed(Image.fromarray(red[:, :112]))
    assert plain is not None
    np.testing.assert_allclose(found, plain, atol=0.02)
    assert seen == [(130, 112), [0, 0, 200], (130, 112), [0, 0, 200]]  # blue first


def test_models_that_cannot_be_had(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"got 'no\.onnx', which does not exist, allowed a face model as ONNX"):
        FaceIdentity("no.onnx")
    with pytest.raises(BadInput, match=r"got 'no\.onnx', which does not exist, allowed a face detector"):
        FaceIdentity(model, "no.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(Failure, match=r"(?s)got broken\.onnx, which cannot be run .* try another"):
        FaceIdentity(broken)
    with pytest.raises(Failure, match=r"got broken\.onnx, which OpenCV cannot read .* allowed YuNet"):
        FaceIdentity(model, broken)
    odd = FaceIdentity(model)
    monkeypatch.setattr(odd, "_session", SimpleNamespace(get_inputs=list))  # a model without inputs
    with pytest.raises(Failure, match=r"got face\.onnx, which cannot read a face .* try another"):
        odd.embed(Image.fromarray(face()))
    with pytest.raises(Failure, match=r"face\.onnx answering with shape \(1, 48\), allowed one finite vector"):
        odd._unit(np.full((1, 48), np.nan, np.float32))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Failure, match=r"got a face model without onnxruntime.*try pip install onnxruntime"):
        FaceIdentity(model)


def hero_and_others(number: int) -> tuple[Scene, dict[str, Scene]]:
    """A scene with a hero in front, and what becomes of it."""
    edit = sample_edit(random.Random(f"hero {number}"), Mix.scenes(), "train", ["character_scene"])
    own = replace(edit.source, filter=None)
    keys = [key for key, concept in load_atlas().concepts.items() if own.style in concept.pixels]
    other = next(key for key in keys[17 * number :] if key not in {item.concept for item in own.items})
    return own, {
        "night": own.put(time="night"),
        "elsewhere": replace(edit.target, filter=None),
        "another": own.with_item(0, concept=other, colour=None),
        "gone": own.without_item(0),
    }


@pytest.mark.slow
def test_things_of_the_world_are_known_again() -> None:
    """By night and elsewhere the hero is itself; where another stands in its place, it is not there."""
    reader = Recogniser.load()
    for number in range(4):
        own, others = hero_and_others(number)
        hero = WorldIdentity(reader, own.items[0].concept)

        def seen(scene: Scene, who: WorldIdentity = hero, own: Scene = own) -> float:
            before, after = (Image.fromarray(render(s, 256).pixels) for s in (own, scene))
            return similarity(who, before, after) or 0.0

        found = {name: seen(scene) for name, scene in others.items()}
        assert min(found["night"], found["elsewhere"]) > 0.65, found
        assert max(found["another"], found["gone"]) < 0.3, found
        assert seen(own) == pytest.approx(1)
    anything = WorldIdentity(reader).embed(Image.fromarray(render(own, 256).pixels))
    assert anything is not None
    assert np.linalg.norm(anything) == pytest.approx(1)
    grey = Image.new("RGB", (256, 256), (120, 120, 120))
    assert hero.embed(grey) is None
    with pytest.raises(BadInput, match=r"got concept 'unicorm', allowed \d+ of the recogniser, try"):
        WorldIdentity(reader, "unicorm")
