"""Differences of pictures against published values, a slow reference, and pictures whose difference is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from fluxloom.errors import BadInput
from fluxloom.measure.pixels import ciede2000, delta_e, lab, psnr, sharpness, ssim

# Sharma, Wu and Dalal 2005 (Color Research & Application 30), table 1: L, a, b; L, a, b; difference.
_SHARMA = """
50 2.6772 -79.7751 50 0 -82.7485 2.0425; 50 3.1571 -77.2803 50 0 -82.7485 2.8615
50 2.8361 -74.0200 50 0 -82.7485 3.4412; 50 -1.3802 -84.2814 50 0 -82.7485 1
50 -1.1848 -84.8006 50 0 -82.7485 1; 50 -0.9009 -85.5211 50 0 -82.7485 1
50 0 0 50 -1 2 2.3669; 50 -1 2 50 0 0 2.3669
50 2.49 -0.001 50 -2.49 0.0009 7.1792; 50 2.49 -0.001 50 -2.49 0.001 7.1792
50 2.49 -0.001 50 -2.49 0.0011 7.2195; 50 2.49 -0.001 50 -2.49 0.0012 7.2195
50 -0.001 2.49 50 0.0009 -2.49 4.8045; 50 -0.001 2.49 50 0.001 -2.49 4.8045
50 -0.001 2.49 50 0.0011 -2.49 4.7461; 50 2.5 0 50 0 -2.5 4.3065
50 2.5 0 73 25 -18 27.1492; 50 2.5 0 61 -5 29 22.8977
50 2.5 0 56 -27 -3 31.9030; 50 2.5 0 58 24 15 19.4535
50 2.5 0 50 3.1736 0.5854 1; 50 2.5 0 50 3.2972 0 1
50 2.5 0 50 1.8634 0.5757 1; 50 2.5 0 50 3.2592 0.3350 1
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644; 63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
61.2901 3.7196 -5.3901 61.4292 2.2480 -4.9620 1.8731; 35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373; 36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441; 90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377; 2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
"""
SHARMA = np.array([row.split() for row in _SHARMA.strip().replace("\n", ";").split(";")], dtype=float)


def noise(seed: int = 0, shape: tuple[int, ...] = (20, 24, 3), bits: int = 8) -> NDArray[np.uint8] | NDArray[np.uint16]:
    kind = np.uint8 if bits == 8 else np.uint16
    return np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=kind)


def test_colour_differences_are_the_published_ones() -> None:
    assert SHARMA.shape == (34, 7)
    for one, other in ((SHARMA[:, :3], SHARMA[:, 3:6]), (SHARMA[:, 3:6], SHARMA[:, :3])):
        np.testing.assert_allclose(delta_e(one, other), SHARMA[:, 6], atol=5e-5)


def test_lab_of_known_colours() -> None:
    """White, grey and the primaries, as Lindbloom's calculator gives them for sRGB and D65."""
    colours = np.array([[[255, 255, 255], [119, 119, 119], [255, 0, 0], [0, 0, 255], [0, 0, 0]]], np.uint8)
    known = [[100, 0, 0], [50.034, 0, 0], [53.241, 80.092, 67.203], [32.297, 79.188, -107.860], [0, 0, 0]]
    np.testing.assert_allclose(lab(colours)[0], known, atol=0.02)
    np.testing.assert_allclose(lab(colours.astype(np.uint16) * 257), lab(colours), atol=1e-9)


def test_colour_differences_of_pictures_go_strip_by_strip() -> None:
    a, b = noise(1, (300, 7, 3)), noise(2, (300, 7, 3))
    found = ciede2000(a, b)
    assert (found.dtype, found.shape) == (np.float32, (300, 7))
    np.testing.assert_allclose(found, delta_e(lab(a), lab(b)), rtol=1e-5)
    assert not ciede2000(a, a).any()
    white, grey = (np.full((1, 1, 3), level, np.uint8) for level in (255, 250))
    assert 0.9 < ciede2000(white, grey).item() < 1.2


@pytest.mark.parametrize("bits", [8, 16])
def test_psnr_counts_what_counts(bits: int) -> None:
    a = noise(bits=bits) // 2
    b = a + 1
    assert psnr(a, b) == pytest.approx(20 * math.log10(2**bits - 1))
    where = np.zeros(a.shape[:2], bool)
    where[3:9, 2:5] = True
    b[where] -= 1
    assert psnr(a, b, where) == math.inf
    assert psnr(a, b, ~where) == pytest.approx(20 * math.log10(2**bits - 1))
    assert math.isnan(psnr(a, b, np.zeros_like(where)))


def slow_ssim(a: NDArray[np.uint8], b: NDArray[np.uint8], where: NDArray[np.bool_]) -> float:
    """Equations 13 and 14 to 16 of Wang et al. 2004, window by window, in the 8-bit values of the paper."""
    x, y = (one.astype(float) @ [0.299, 0.587, 0.114] for one in (a, b))
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for i in range(len(x) - 10):
        for j in range(x.shape[1] - 10):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            if where[i : i + 11, j : j + 11].all():
                mp, mq = (w * p).sum(), (w * q).sum()
                vp, vq, cov = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
                found.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(found))


def test_ssim_is_the_formula() -> None:
    a = noise(1)
    b = (0.6 * a + 0.4 * noise(2)).astype(np.uint8)
    everywhere, part = np.ones((20, 24), bool), np.ones((20, 24), bool)
    part[:4, 20:] = False
    assert ssim(a, b) == pytest.approx(slow_ssim(a, b, everywhere), abs=1e-9)
    assert ssim(a, b, part) == pytest.approx(slow_ssim(a, b, part), abs=1e-9)
    assert abs(ssim(a, b, part) - ssim(a, b)) > 1e-4
    assert ssim(a, a) == pytest.approx(1)
    assert math.isnan(ssim(a, b, ~everywhere))
    assert ssim(a.astype(np.uint16) * 257, b.astype(np.uint16) * 257) == pytest.approx(ssim(a, b))


def test_sharpness_falls_with_blur_and_stays_within_what_counts() -> None:
    a = noise(0, (40, 40, 3))
    soft = ((a.astype(int) + np.roll(a, 1, 0) + np.roll(a, 1, 1)) // 3).astype(np.uint8)
    assert sharpness(soft) < 0.8 * sharpness(a)
    where = np.zeros((40, 40), bool)
    where[:, :20] = True
    half = np.where(where[..., None], np.uint8(128), a)
    assert sharpness(half, where) == pytest.approx(0, abs=1e-12)  # the edge of the other half is not seen
    ramp = np.repeat(np.arange(40, dtype=np.uint8)[:, None, None] ** 2 // 8, 3, 2).repeat(40, 1)
    assert sharpness(a.astype(np.uint16) * 257) == pytest.approx(sharpness(a))
    assert 0 < sharpness(ramp) < sharpness(a)


def test_what_cannot_be_compared() -> None:
    a = noise()
    for other, message in (
        (a[:, :9], "got pictures of 24x20 uint8 and 9x20 uint8, allowed two of one size"),
        (a.astype(np.uint16), "uint8 and 24x20 uint16"),
        (a.astype(float), r"got an array float64 \[20, 24, 3\], allowed uint8 or uint16"),
        (a[..., 0], r"got an array uint8 \[20, 24\]"),
    ):
        with pytest.raises(BadInput, match=message):
            psnr(a, other)
    with pytest.raises(BadInput, match=r"got where int64 .* allowed bool \[20, 24\]"):
        psnr(a, a, np.ones((20, 24), int))
    with pytest.raises(BadInput, match="got pictures of 24x8, allowed 11 or more a side"):
        ssim(a[:8], a[:8])
