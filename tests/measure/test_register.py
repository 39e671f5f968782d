"""Known shifts and scales are found again, whatever else was done to the picture; what is neither is refused."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from fluxloom.measure.register import NONE, Registration, align, register, resample

Pixels = NDArray[np.uint8]


def scenery(side: int = 256, seed: int = 0) -> Pixels:
    """Blobs of all sizes, some with edges."""
    rng = np.random.default_rng(seed)
    picture = np.full((side, side, 3), 128, np.uint8)
    for _ in range(90):
        centre = tuple(int(value) for value in rng.integers(0, side, 2))
        radius, colour = int(rng.integers(4, side // 8)), [int(value) for value in rng.integers(0, 256, 3)]
        cv2.circle(picture, centre, radius, colour, -1, cv2.LINE_AA)
    return picture


def moved(picture: Pixels, dx: float, dy: float, scale: float) -> Pixels:
    """The picture zoomed around its middle, then shifted: what was at p is at c + scale (p - c) + d."""
    size = (picture.shape[1], picture.shape[0])
    matrix = Registration(dx, dy, scale, 1, True).matrix(size)
    return np.asarray(cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT))


@pytest.mark.parametrize("seed", range(6))
def test_shift_and_scale_under_cast_jpeg_and_a_local_change(seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = scenery(seed=seed)
    dx, dy, scale = rng.uniform(-8.4, 8.4), rng.uniform(-8.4, 8.4), rng.uniform(0.97, 1.03)
    edited = source.copy()
    left, top = rng.integers(20, 130, 2)
    edited[top : top + 100, left : left + 100] = scenery(seed=seed + 50)[:100, :100]
    cast = moved(edited, dx, dy, scale) * rng.uniform(0.9, 1.1, 3) + rng.uniform(-8, 8, 3)
    _, data = cv2.imencode(".jpg", cast.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 80])
    found = register(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8), source)
    assert found.plain
    assert abs(found.dx - dx) < 0.1
    assert abs(found.dy - dy) < 0.1
    assert abs(found.scale - scale) < 0.001


def test_twelve_pixels_of_a_megapixel_and_another_working_size() -> None:
    source = scenery(1024)
    edited = moved(source, 11.5, -3.25, 1.01)
    found = register(edited, source)
    assert (found.dx, found.dy, found.scale) == pytest.approx((11.5, -3.25, 1.01), abs=0.1)
    half = np.asarray(cv2.resize(edited, (512, 512), interpolation=cv2.INTER_AREA), np.uint8)
    found = register(half, source)  # in pixels of the larger one
    assert (found.dx, found.dy, found.scale) == pytest.approx((11.5, -3.25, 1.01), abs=0.2)


def test_align_undoes_it() -> None:
    source = scenery()
    edited = moved(source, 6.5, -4.25, 1.02)
    laid = align(edited, register(edited, source), (256, 256))
    inner = (slice(16, -16), slice(16, -16))
    before, after = (np.abs(one[inner].astype(int) - source[inner]).mean() for one in (edited, laid))
    assert after < 0.1 * before
    box = resample(edited, register(edited, source), (256, 256), (40, 30, 90, 120))
    assert np.abs(box.astype(int) - laid[30:120, 40:90]).max() <= 4  # warps count in 32nds of a pixel
    assert np.array_equal(align(source, NONE, (256, 256)), source)


def test_what_is_no_shift_is_refused() -> None:
    source = scenery()
    turn = cv2.getRotationMatrix2D((128, 128), 12, 1)
    turned = np.asarray(cv2.warpAffine(source, turn, (256, 256), borderMode=cv2.BORDER_REFLECT), np.uint8)
    for other in (turned, source[:, ::-1].copy(), scenery(seed=9)):
        found = register(other, source)
        assert not found.plain
        assert (found.dx, found.dy, found.scale) == (0, 0, 1)


def test_without_texture_nothing_moves() -> None:
    flat = np.full((128, 96, 3), 90, np.uint8)
    assert register(flat, flat) == NONE
    assert register(scenery()[:32, :32], scenery()[:32, 1:33]) == NONE  # too small to tell
