"""What stands beside and behind the noise: each part as the official preparations make it, and the last latent as the
official loop comes to it from them. And where diffusers goes another way, that it does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from mutations import TOLERANCE, WIDE
from PIL import Image
from pipelines import HEIGHT, SIZES, WIDTH, Scene, clip, mask, official, picture, sampling, t5
from tiny import relative
from torch import Tensor

from fluxloom.core import shapes
from fluxloom.core.redux import Redux, ReduxSpec
from fluxloom.infer import control
from fluxloom.infer.pictures import to_tensor
from fluxloom.infer.request import Reference, Request, resolve

photo = picture(100, 70, seed=3)


def start() -> Tensor:
    return torch.zeros(1, 16, HEIGHT // 8, WIDTH // 8)


def save(image: Image.Image, folder: Path, name: str) -> str:
    image.save(folder / name)
    return str(folder / name)


@pytest.mark.parametrize("kind", ["aligned", "ragged", "soft"])
def test_fill(kind: str, tmp_path: Path) -> None:
    scene = Scene.of("flux1-fill-dev", init=picture(), mask=mask(kind))
    paths = save(picture(), tmp_path, "picture.png"), save(mask(kind), tmp_path, "mask.png")
    with official():
        theirs = sampling.prepare_fill(t5, clip, start(), "a cat", pipelines.official_encoder(scene), *paths)
    (row,) = scene.conditions().rows
    assert row.channels is not None
    assert row.channels.shape == (1, 24, 64 + 256)
    assert torch.equal(row.channels[..., 64:], theirs["img_cond"][..., 64:])
    assert relative(row.channels, theirs["img_cond"]) < TOLERANCE
    assert relative(scene.ours(), pipelines.official_journey(scene, theirs)) < TOLERANCE


def test_edges(tmp_path: Path) -> None:
    scene = Scene.of("flux1-canny-dev", control=photo, width=WIDTH, height=HEIGHT)
    encoder = pipelines.image_embedders.CannyImageEncoder(torch.device("cpu"))
    path = save(photo, tmp_path, "photo.png")
    with official():
        args = (pipelines.official_encoder(scene), encoder, path)
        theirs = sampling.prepare_control(t5, clip, start(), "a cat", *args)
    shown = photo.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    assert torch.equal(control.edges(shown), encoder(to_tensor(shown)))
    assert set(control.edges(shown).unique().tolist()) == {-1.0, 1.0}
    (row,) = scene.conditions().rows
    assert row.channels is not None
    assert relative(row.channels, theirs["img_cond"]) < TOLERANCE
    assert relative(scene.ours(), pipelines.official_journey(scene, theirs)) < TOLERANCE
    assert relative(scene.ours(control_ready=True), pipelines.official_journey(scene, theirs)) > WIDE
    found_before_resizing = Scene.of(
        "flux1-canny-dev", control=control_picture(control.edges(photo)), control_ready=True, width=WIDTH, height=HEIGHT
    )
    assert relative(found_before_resizing.ours(), pipelines.official_journey(scene, theirs)) > WIDE


def control_picture(found: Tensor) -> Image.Image:
    return Image.fromarray(((found[0].permute(1, 2, 0) + 1) * 127.5).to(torch.uint8).numpy())


def test_kontext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "PREFERED_KONTEXT_RESOLUTIONS", SIZES)
    scene = Scene.of("flux1-kontext-dev", references=(Reference(photo),))
    args = (pipelines.official_encoder(scene), save(photo, tmp_path, "photo.png"), 5, torch.device("cpu"))
    with official():
        theirs, height, width = sampling.prepare_kontext(t5, clip, "a cat", *args)
    request = resolve(Request(prompt="a cat", references=(Reference(photo),)), scene.spec)
    assert (request.width, request.height) == (width, height) == (96, 64)
    (row,) = scene.conditions().rows
    assert row.context is not None
    assert relative(row.context, theirs["img_cond_seq"]) < TOLERANCE
    assert torch.equal(row.ids, torch.cat((theirs["img_ids"], theirs["img_cond_seq_ids"]), dim=1)[0])
    assert torch.equal(scene.conditions().start(0), theirs["img"])  # their noise in float32 is ours, seed for seed
    assert relative(scene.ours(), pipelines.official_journey(scene, theirs)) < TOLERANCE


def test_redux(tmp_path: Path) -> None:
    ours, *others = pipelines.redux()
    scene = Scene.of("flux1-redux-dev", references=(Reference(photo, "image"),), width=WIDTH, height=HEIGHT)
    scene.redux = ours
    with official():
        encoder = pipelines.official_redux(ours, *others)
        path = save(photo, tmp_path, "photo.png")
        theirs = sampling.prepare_redux(t5, clip, start(), "a cat", encoder, path)
    (row,) = scene.conditions().rows
    assert row.text.tokens.shape == theirs["txt"].shape == (1, 7 + 9, 24)
    assert relative(row.text.tokens, theirs["txt"]) < TOLERANCE
    assert torch.equal(row.text.pooled, theirs["vec"])
    assert relative(scene.ours(), pipelines.official_journey(scene, theirs)) < TOLERANCE


def test_redux_at_its_true_size() -> None:
    spec = ReduxSpec()
    with torch.device("meta"):
        whole = Redux(spec)
    adapter = sum(value.numel() for value in pipelines.adapter(whole).values())
    assert (spec.tokens, adapter) == (729, 64_503_808)
    assert whole.redux_up.weight.shape == (12_288, 1_152)
    assert whole.redux_down.weight.shape == (4_096, 12_288)


@pytest.mark.parametrize("spoilt", ["silu", "gelu", "last norm"])
def test_redux_notices(spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, tower, processor = pipelines.redux()
    x = torch.from_numpy(np.asarray(processor.preprocess(photo)["pixel_values"][0]))[None]
    with torch.no_grad():
        theirs = pipelines.official_redux(ours, tower, processor)(photo)
        assert relative(ours(x), theirs) < TOLERANCE
        if spoilt == "last norm":
            ours.vision_model.post_layernorm = torch.nn.Identity()
        else:
            monkeypatch.setattr(torch.nn.functional, spoilt, lambda x, **_: x.relu())
        assert relative(ours(x), theirs) > WIDE


# ---------------------------------------------------------------------------------------------- depth


class Session:
    """A depth model that sees how red things are; its answer is smaller than what it is given."""

    given: list[Any]

    def __init__(self, path: str, providers: list[str]) -> None:
        self.given = []

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="pixels", shape=["batch", 3, "height", 28])]

    def run(self, _: None, feed: dict[str, Any]) -> list[Any]:
        assert feed["pixels"].shape == (1, 3, 518, 28)
        assert feed["pixels"].dtype == np.float32
        return [feed["pixels"][:, 0, ::7, ::2] * 9 + 40]


def test_depth_is_stretched_as_the_official_encoder_resizes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    (tmp_path / "depth.onnx").write_bytes(b"a model")
    model = control.DepthModel.of(tmp_path / "depth.onnx")
    found = control.depth(photo, model)
    assert found.shape == (1, 3, 70, 100)
    assert (float(found.min()), float(found.max())) == (-1.0, 1.0)
    seen = to_tensor(photo.resize((28, 518), Image.Resampling.BICUBIC))[:, 0] / 2 + 0.5
    estimate = ((seen - 0.485) / 0.229)[:, ::7, ::2] * 9 + 40
    encoder = pipelines.image_embedders.DepthImageEncoder.__new__(pipelines.image_embedders.DepthImageEncoder)
    encoder.device = torch.device("cpu")
    encoder.processor = lambda x, return_tensors: {"pixel_values": x}
    encoder.depth_model = lambda x: SimpleNamespace(predicted_depth=estimate)
    theirs = encoder(to_tensor(photo))
    low, high = theirs.min(), theirs.max()
    torch.testing.assert_close(found, 2 * (theirs - low) / (high - low) - 1, atol=1e-4, rtol=0)
    made = Scene.of("flux1-depth-dev", control=photo, control_model=tmp_path / "depth.onnx", width=WIDTH, height=HEIGHT)
    (row,) = made.conditions().rows
    assert row.channels is not None
    shown = photo.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    assert torch.equal(row.channels, shapes.pack(made.runtime().encode(control.depth(shown, model))))


# ---------------------------------------------------------------------------------------------- differences


def test_diffusers_rounds_the_start_of_image_to_image_differently() -> None:
    """int((1 - strength) N) is official; diffusers takes int(N - N strength), which floating point tells apart: at
    strength 0.9 in 10 steps the official code starts at the first step, diffusers at the second."""
    init = picture(seed=2)
    pairs = [(steps, percent / 100) for steps in range(2, 51) for percent in range(5, 100, 5)]
    differ = [(n, s) for n, s in pairs if int((1 - s) * n) != int(max(n - min(n * s, n), 0))]
    assert 0 < len(differ) < len(pairs) / 20
    scene = Scene.of("flux1-dev", init=init)
    for steps, strength in differ:
        if int((1 - strength) * steps):  # from the first step nothing of the picture is left: that is refused
            request = resolve(Request(prompt="x", init=init, steps=steps, strength=strength), scene.spec)
            assert request.first_step == int((1 - strength) * steps)


def test_diffusers_makes_every_mask_black_and_white() -> None:
    scene = Scene.of("flux1-fill-dev", init=picture(), mask=mask("soft"))
    theirs = scene.diffusers("fill", image=picture(), mask_image=mask("soft"))
    assert relative(scene.ours(), theirs) > WIDE
    hard = mask("soft").point(lambda value: 255 if value >= 128 else 0)
    assert relative(scene.ours(mask=hard), theirs) < TOLERANCE


def test_diffusers_takes_one_pixel_of_a_mask_for_a_cell_where_it_repaints() -> None:
    """And we the most repainted one: of a cell that the mask touches, nothing is held that may have to go."""
    scene = Scene.of("flux1-dev", init=picture(), mask=mask())
    assert relative(scene.ours(), scene.diffusers("inpaint", image=picture(), mask_image=mask(), strength=1.0)) > WIDE


@pytest.mark.parametrize(
    ("kind", "name", "fields", "arguments"),
    [
        ("fill", "flux1-fill-dev", {"init": picture(), "mask": mask()}, {"image": picture(), "mask_image": mask()}),
        ("control", "flux1-canny-dev", {"control": picture(), "control_ready": True}, {"control_image": picture()}),
        ("image", "flux1-dev", {"init": picture(), "strength": 0.5}, {"image": picture(), "strength": 0.5}),
    ],
)
def test_diffusers_draws_latents_of_pictures(kind: str, name: str, fields: Any, arguments: Any) -> None:
    scene = Scene.of(name, **fields)
    assert relative(scene.ours(), scene.diffusers(kind, **arguments)) < TOLERANCE
    assert relative(scene.ours(), scene.diffusers(kind, means=False, **arguments)) > WIDE


def test_diffusers_scales_an_edit_to_its_own_area(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.KONTEXT, "PREFERRED_KONTEXT_RESOLUTIONS", SIZES)
    scene = Scene.of("flux1-kontext-dev", references=(Reference(photo),), width=64, height=64)
    theirs = scene.diffusers("kontext", image=photo, width=64, height=64, max_area=128 * 128)
    assert (scene.ours().shape[1], theirs.shape[1]) == (16, 64)
