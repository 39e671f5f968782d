"""Meters of what should not have changed, and the count of them over a chain."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fluxloom.edit.drift import Drift, Limits, Meters, exceeded, limits, meters
from fluxloom.errors import BadInput


def picture(seed: int = 0, side: int = 96) -> NDArray[np.uint8]:
    """Smooth patches with fine grain: something to register, and something to blur."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 200, (12, 12, 3), dtype=np.uint8)).resize((side, side))
    return (np.asarray(coarse) + rng.integers(0, 16, (side, side, 3))).astype(np.uint8)


def box(side: int = 96, left: int = 10, right: int = 40) -> NDArray[np.bool_]:
    where = np.zeros((side, side), bool)
    where[left:right, left:right] = True
    return where


class Brightness:
    """Knows a picture by its mean colour, and nobody in the dark."""

    def embed(self, picture: Image.Image) -> NDArray[np.float32] | None:
        mean = np.asarray(picture, np.float32).mean((0, 1))
        return None if mean.max() < 1 else mean / np.linalg.norm(mean)


def test_nothing_drifts_where_only_the_change_was_touched() -> None:
    before = picture()
    after = before.copy()
    after[box()] = 255 - after[box()]
    kept = meters(before, after, box())
    assert kept == Meters(math.inf, pytest.approx(1), 0.0, pytest.approx(1), pytest.approx(0, abs=0.05), None)
    assert json.loads(json.dumps(kept.to_dict(), allow_nan=False))["psnr"] == 100
    whole = meters(before, after)
    assert whole.psnr is not None
    assert whole.psnr < 25
    assert whole.delta_e is not None
    assert whole.delta_e > 1
    sixteen = meters(before.astype(np.uint16) * 257, after.astype(np.uint16) * 257, box())
    assert sixteen.to_dict() == pytest.approx(kept.to_dict())


def test_each_meter_tells_its_own() -> None:
    before = picture()
    soft = np.asarray(Image.fromarray(before).resize((48, 48)).resize((96, 96)))
    brighter, moved = (before + 12).astype(np.uint8), np.roll(before, 3, axis=1)
    grainy = (before + np.random.default_rng(1).integers(0, 24, before.shape)).astype(np.uint8)
    blur, cast, shift, grain = (meters(before, after) for after in (soft, brighter, moved, grainy))
    assert blur.sharpness is not None
    assert blur.sharpness < 0.6
    assert grain.sharpness is not None
    assert grain.sharpness > 1.5
    assert cast.psnr == pytest.approx(20 * math.log10(255 / 12))
    assert cast.sharpness == pytest.approx(1)
    assert (cast.delta_e or 0) > 2
    assert shift.shift == pytest.approx(3, abs=0.3)
    assert meters(before, picture(9)).shift is None  # another picture is not a moved one


def test_identity_looks_at_the_whole_picture() -> None:
    before, dark = picture(), np.zeros((96, 96, 3), np.uint8)
    red = before * np.array([1, 0, 0], np.uint8)
    assert meters(before, before, box(), Brightness()).identity == pytest.approx(1)
    assert 0.3 < (meters(before, red, box(), Brightness()).identity or 0) < 0.8
    assert meters(before, dark, identity=Brightness()).identity == 0  # gone
    assert meters(dark, before, identity=Brightness()).identity is None  # never there


def test_nothing_is_said_of_almost_nothing() -> None:
    almost = np.ones((96, 96), bool)
    almost[:12, :12] = False  # 1.6 %
    left = meters(picture(), picture(1), almost, Brightness())
    assert (left.psnr, left.ssim, left.delta_e, left.sharpness, left.shift) == (None,) * 5
    assert left.identity is not None
    flat = np.full((96, 96, 3), 7, np.uint8)
    assert meters(flat, flat).sharpness == 1
    assert meters(flat, picture()).sharpness is None
    with pytest.raises(BadInput, match="allowed two of one size"):
        meters(picture(), picture(side=64))


def test_a_chain_counts_from_its_start_outside_of_all_that_changed() -> None:
    first = picture()
    second = first.copy()
    second[box()] = 0
    third = (second + 1).astype(np.uint8)
    chain = Drift(first)
    one, two = chain.add(second, box()), chain.add(third, box(left=50, right=60))
    assert one.step == one.total
    assert (one.changed, two.changed) == (pytest.approx(900 / 96**2), pytest.approx(1000 / 96**2))
    assert two.step.psnr == two.total.psnr == pytest.approx(20 * math.log10(255))
    three = chain.add((third + 1).astype(np.uint8))
    assert three.step.psnr == pytest.approx(20 * math.log10(255))
    assert three.total.psnr == pytest.approx(20 * math.log10(255 / 2))
    assert three.changed == two.changed
    night = chain.add(third // 4, np.ones((96, 96), bool))
    assert (night.step.psnr, night.total.psnr, night.changed, night.start) == (None, None, 1, 0)
    after = chain.add(third // 4)
    assert (after.total.psnr, after.changed, after.start) == (math.inf, 0, 4)
    assert chain.turns == [one, two, three, night, after]
    json.dumps([turn.to_dict() for turn in chain.turns], allow_nan=False)


def test_limits() -> None:
    found = limits("psnr=28, delta_e=3,sharpness=0.8,shift=1,identity=.5,ssim=0.9")
    assert found == Limits(28, 0.9, 3, 0.8, 1, 0.5)
    fine = Meters(28, 0.95, 3, 1.2, 0.5, None)
    assert exceeded(fine, found) == []
    assert exceeded(Meters(None, None, None, None, None, None), found) == []
    assert exceeded(Meters(27.96, 0.95, 3.5, 1.26, 2, 0.4), found) == [
        "psnr 27.96, allowed at least 28",
        "delta_e 3.5, allowed at most 3",
        "sharpness 1.26, allowed from 0.8 to its inverse",
        "shift 2, allowed at most 1",
        "identity 0.4, allowed at least 0.5",
    ]
    assert exceeded(Meters(99, 1, 0, 0.7, 0, 1), limits("sharpness=0.8")) == [
        "sharpness 0.7, allowed from 0.8 to its inverse"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got limit '', allowed psnr, ssim, delta_e, sharpness, shift, identity, each with =, try psnr=28"),
        ("lpips=1", "got limit 'lpips=1', allowed psnr"),
        ("psnr", "got limit psnr '', allowed 0 to 100"),
        ("psnr=high", "got limit psnr 'high', allowed 0 to 100"),
        ("identity=1.5", "got limit identity '1.5', allowed 0 to 1,"),
        ("psnr=nan", "got limit psnr 'nan'"),
        ("psnr=20,psnr=30", "got limit psnr twice, allowed once"),
    ],
)
def test_limits_that_are_none(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        limits(text)
