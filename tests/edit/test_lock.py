"""What an edit did not change stays the original's bytes, at any size and depth."""

from __future__ import annotations

import random

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fluxloom.edit.lock import Lock, find_change, lock
from fluxloom.errors import BadInput
from fluxloom.measure.pixels import psnr
from fluxloom.measure.register import Registration
from fluxloom.world import Mix, render, sample_edit
from fluxloom.world.edits import Edit

Pixels = NDArray[np.uint8]


def pair(kind: str, seed: int = 1) -> Edit:
    return sample_edit(random.Random(seed), Mix.scenes(), "train", [kind])


def worn(picture: Pixels, blur: float = 0.7, noise: float = 2.0) -> Pixels:
    """About as an autoencoder gives it back: detail lost, a little noise."""
    values = cv2.GaussianBlur(picture, (0, 0), blur) + np.random.default_rng(0).normal(0, noise, picture.shape)
    return np.asarray(values.clip(0, 255), np.uint8)


def drifted(picture: Pixels, dx: float, dy: float, scale: float) -> Pixels:
    """Shifted, zoomed, and in another light."""
    size = (picture.shape[1], picture.shape[0])
    matrix = Registration(dx, dy, scale, 1, True).matrix(size)
    laid = cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    return np.asarray((laid * np.array([1.05, 1.0, 0.95]) + np.array([3, -2, 4])).clip(0, 255), np.uint8)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ["recolour", "remove"])
def test_only_the_change_goes_into_the_large_original(kind: str, depth: type[np.uint8] | type[np.uint16]) -> None:
    edit = pair(kind)
    large, goal = (render(scene, 640).pixels for scene in (edit.source, edit.target))
    inside = (np.abs(large.astype(int) - goal) > 8).any(axis=-1)
    small = np.asarray(cv2.resize(goal, (256, 256), interpolation=cv2.INTER_AREA), np.uint8)
    original = large.astype(depth) * (257 if depth == np.uint16 else 1)
    if depth == np.uint16:
        original -= np.minimum(original, 5)  # no byte twice
    out, mask, report = lock(original, drifted(worn(small), 1.5, -0.75, 1.008))
    assert (out.dtype, out.shape, mask.shape) == (depth, original.shape, original.shape[:2])
    assert np.array_equal(out[mask == 0], original[mask == 0])
    assert (report.mode, report.whole, report.identical) == ("auto", False, 1.0)
    assert report.shift == pytest.approx((1.5 * 2.5, -0.75 * 2.5), abs=0.25)
    assert report.scale == pytest.approx(1.008, abs=0.001)
    assert report.changed == pytest.approx(float((mask > 0).mean()), abs=1e-5)
    assert report.delta_e_outside > 1
    found, step = mask > 0.5, 257 if depth == np.uint16 else 1
    assert (found & inside).sum() / (found | inside).sum() > 0.6
    # Inside the target is there, and without the cast and the shift.
    assert psnr((out // step).astype(np.uint8), goal, inside) > psnr(large, goal, inside) + 6


def test_an_autoencoder_alone_changes_nothing() -> None:
    for seed in range(3):
        source = render(pair("recolour", seed).source, 256).pixels
        out, mask, report = lock(source, worn(source))
        assert not mask.any()
        assert np.array_equal(out, source)
        assert (report.changed, report.identical) == (0, 1)
        assert "nothing" in report.note


@pytest.mark.parametrize("kind", ["time", "background", "filter"])
def test_an_edit_of_everything_passes_whole(kind: str) -> None:
    edit = pair(kind)
    original = render(edit.source, 384).pixels
    target = render(edit.target, 256).pixels
    out, mask, report = lock(original, worn(target))
    assert report.whole
    assert (report.changed, report.identical, float(mask.min())) == (1, 0, 1)
    assert psnr(out, render(edit.target, 384).pixels) > psnr(original, render(edit.target, 384).pixels) + 3


def test_a_cast_alone_is_an_edit_only_where_it_is_strong() -> None:
    source = render(pair("recolour").source, 256).pixels
    slight, strong = ((source * gain).astype(np.uint8) for gain in (0.98, 0.7))
    assert not lock(source, slight)[1].any()
    assert lock(source, strong)[2].whole


def test_a_given_mask_is_the_limit() -> None:
    edit = pair("time")
    source, target = (render(scene, 256).pixels for scene in (edit.source, edit.target))
    limit = np.zeros((256, 256), np.float32)
    limit[64:192, 32:96] = 1
    out, mask, report = lock(source, target, limit)
    assert (report.mode, report.whole, report.identical) == ("mask", False, 1)
    assert (mask <= limit).all()
    assert np.array_equal(out[limit == 0], source[limit == 0])
    assert (out[limit == 1] != source[limit == 1]).mean() > 0.5


def test_what_a_shift_uncovers_is_no_change() -> None:
    source = render(pair("recolour").source, 256).pixels
    size = (256, 256)
    matrix = Registration(9.0, 5.0, 1.0, 1, True).matrix(size)
    bare = np.asarray(cv2.warpAffine(worn(source), matrix, size, borderValue=(0, 0, 0)), np.uint8)
    assert find_change(source, bare).mask.mean() < 0.02


@pytest.mark.parametrize(
    ("shape", "dtype", "mask", "message"),
    [
        ((64, 64), np.uint8, None, r"got an original uint8 \[64, 64\]"),
        ((64, 64, 3), np.float32, None, "allowed RGB .* of uint8 or uint16"),
        ((64, 64, 3), np.uint8, (64, 32), "got a mask of 32x64 for a picture of 64x64"),
    ],
)
def test_wrong_arrays_are_refused(
    shape: tuple[int, ...], dtype: type, mask: tuple[int, int] | None, message: str
) -> None:
    given = None if mask is None else np.ones(mask, np.float32)
    with pytest.raises(BadInput, match=message):
        lock(np.zeros(shape, dtype), np.zeros((64, 64, 3), np.uint8), given)


def test_one_way_to_say_where() -> None:
    with pytest.raises(BadInput, match="mask and box"):
        Lock(Image.new("L", (64, 64), 255), (0, 0, 9, 9))
