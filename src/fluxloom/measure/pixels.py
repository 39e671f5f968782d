"""How far two pictures are apart, pixel by pixel: fidelity, structure, colour, sharpness.

Pictures are RGB arrays [H, W, 3], uint8 or uint16, both alike. ``where`` [H, W] marks the pixels that count; left out,
all do. A mean over no pixels is nan.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fluxloom.errors import BadInput

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
Mask = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_WINDOW, _SIGMA = 11, 1.5  # Wang et al. 2004, section III-C; so are the two constants
_C1, _C2 = 0.01**2, 0.03**2
# Linear sRGB to XYZ (IEC 61966-2-1). White is the sum of each row, so that grey has no colour at all.
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_STRIP = 256  # rows of a picture whose colours are compared at a time: some 30 arrays of float64 each


def psnr(a: Pixels, b: Pixels, where: Mask | None = None) -> float:
    """Peak signal-to-noise ratio in dB; inf where nothing differs."""
    peak = _checked(a, b, where)
    squares = np.square(a.astype(np.float64) - b)
    mean = _mean(squares if where is None else squares[where])
    return math.inf if mean == 0 else 10 * math.log10(peak**2 / mean)


def ssim(a: Pixels, b: Pixels, where: Mask | None = None) -> float:
    """Structural similarity of luma (Wang et al. 2004): the mean over all windows that lie wholly in what counts."""
    peak = _checked(a, b, where)
    if min(a.shape[:2]) < _WINDOW:
        raise BadInput(f"got pictures of {a.shape[1]}x{a.shape[0]}, allowed {_WINDOW} or more a side, try larger ones")
    x, y = luma(a, peak), luma(b, peak)
    mx, my = _blurred(x), _blurred(y)
    vx, vy, cov = _blurred(x * x) - mx * mx, _blurred(y * y) - my * my, _blurred(x * y) - mx * my
    found = (2 * mx * my + _C1) * (2 * cov + _C2) / ((mx * mx + my * my + _C1) * (vx + vy + _C2))
    return _mean(_inner(found, _WINDOW // 2, where))


def ciede2000(a: Pixels, b: Pixels) -> NDArray[np.float32]:
    """Colour difference CIEDE2000 of each pixel [H, W], by sRGB under D65; 1 is about what an eye can just tell."""
    _checked(a, b, None)
    out = np.zeros(a.shape[:2], np.float32)
    for top in range(0, len(out), _STRIP):
        rows = slice(top, top + _STRIP)
        where = (a[rows] != b[rows]).any(axis=-1)  # a locked edit leaves most of a picture as it was
        out[rows][where] = delta_e(lab(a[rows][where]), lab(b[rows][where]))
    return out


def sharpness(a: Pixels, where: Mask | None = None) -> float:
    """Mean absolute Laplacian of luma: says nothing by itself, but the ratio of two pictures tells blur (under 1) and
    grain (over 1)."""
    peak = _checked(a, a, where)
    found = np.abs(cv2.Laplacian(luma(a, peak), cv2.CV_64F, ksize=1))
    return _mean(_inner(found, 1, where))


def luma(a: Pixels, peak: int) -> NDArray[np.float64]:
    """[H, W], 0 to 1."""
    return np.asarray(a @ (np.array(_LUMA) / peak), dtype=np.float64)


def lab(a: Pixels) -> NDArray[np.float64]:
    """CIELAB [..., 3] of sRGB under D65."""
    levels = np.linspace(0, 1, np.iinfo(a.dtype).max + 1)
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    xyz = linear[a] @ (_XYZ / _XYZ.sum(1, keepdims=True)).T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -1)


def delta_e(one: Floats, other: Floats) -> NDArray[np.float64]:
    """CIEDE2000 of CIELAB colours [..., 3] (Sharma, Wu and Dalal 2005, equations 2 to 22)."""
    (l1, a1, b1), (l2, a2, b2) = np.moveaxis(one, -1, 0), np.moveaxis(other, -1, 0)
    # Near grey, a is stretched, so that greys of different tints lie further apart.
    stretch = 1.5 - 0.5 * _steep((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2)
    c1, c2 = np.hypot(a1 * stretch, b1), np.hypot(a2 * stretch, b2)
    h1, h2 = np.arctan2(b1, a1 * stretch) % (2 * np.pi), np.arctan2(b2, a2 * stretch) % (2 * np.pi)
    far = (
        np.abs(h2 - h1) > np.pi + 1e-9
    )  # the way round is longer than the other; exactly opposite hues stay as they are
    coloured = c1 * c2 != 0
    turn = np.where(coloured, h2 - h1 - 2 * np.pi * np.sign(h2 - h1) * far, 0)
    dl, dc, dh = l2 - l1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(turn / 2)
    ml, mc = (l1 + l2) / 2, (c1 + c2) / 2
    mh = np.where(coloured, (h1 + h2) / 2 + np.pi * far, h1 + h2)  # a grey has no hue: the mean is the other's
    t = (
        1 - 0.17 * np.cos(mh - np.radians(30)) + 0.24 * np.cos(2 * mh)
        + 0.32 * np.cos(3 * mh + np.radians(6)) - 0.2 * np.cos(4 * mh - np.radians(63))
    )  # fmt: skip
    sl = 1 + 0.015 * (ml - 50) ** 2 / np.sqrt(20 + (ml - 50) ** 2)
    sc, sh = 1 + 0.045 * mc, 1 + 0.015 * mc * t
    blue = np.exp(-(((np.degrees(mh) % 360 - 275) / 25) ** 2))
    rotation = -2 * _steep(mc) * np.sin(np.radians(60) * blue)
    found = (dl / sl) ** 2 + (dc / sc) ** 2 + (dh / sh) ** 2 + rotation * (dc / sc) * (dh / sh)
    return np.asarray(np.sqrt(np.maximum(found, 0)))


def _steep(chroma: Floats) -> Floats:
    return np.asarray(np.sqrt(chroma**7 / (chroma**7 + 25.0**7)))


def _checked(a: Pixels, b: Pixels, where: Mask | None) -> int:
    """The largest value a pixel can have. Raises BadInput for pictures that cannot be compared."""
    for one in (a, b):
        if one.dtype not in (np.uint8, np.uint16) or one.ndim != 3 or one.shape[2] != 3:
            raise BadInput(f"got an array {one.dtype} {list(one.shape)}, allowed uint8 or uint16 [H, W, 3], try RGB")
    if a.shape != b.shape or a.dtype != b.dtype:
        got = " and ".join(f"{one.shape[1]}x{one.shape[0]} {one.dtype}" for one in (a, b))
        raise BadInput(f"got pictures of {got}, allowed two of one size and depth, try resizing one")
    if where is not None and (where.shape != a.shape[:2] or where.dtype != np.bool_):
        raise BadInput(
            f"got where {where.dtype} {list(where.shape)}, allowed bool {list(a.shape[:2])}, try a mask of it"
        )
    return int(np.iinfo(a.dtype).max)


def _blurred(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(cv2.GaussianBlur(x, (_WINDOW, _WINDOW), _SIGMA), dtype=np.float64)


def _inner(values: NDArray[np.float64], reach: int, where: Mask | None) -> NDArray[np.float64]:
    """Of values that look ``reach`` pixels around, those that saw only what counts."""
    own = np.ones(values.shape, np.uint8) if where is None else where.astype(np.uint8)
    side = 2 * reach + 1
    # Beyond the edge of the picture nothing counts.
    kept = cv2.erode(own, np.ones((side, side), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=(0, 0, 0, 0))
    found: NDArray[np.float64] = values[kept.astype(bool)]
    return found


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else math.nan
