"""How an edited picture lies on its source: a shift and a scale, found to a fraction of a pixel although a part of the
picture is another one. Kontext models move and zoom by a few pixels what they were told to leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Plane = NDArray[np.float32]

SCALES = np.linspace(0.96, 1.04, 9)  # tried at first; between them the refinement finds its way
COARSE = 320  # longer side, pixels, of the first search
FINE = 1 << 20  # pixels of the last refinement: more would make it slower, not better
REACH = 0.03  # of the longer side, or 16 pixels: the largest shift that is looked for
TILE = 24  # pixels a side
TEXTURE = 2.0  # of 255, mean deviation in a tile: less is flat, and tells nothing about where it lies
ALIKE = 0.6  # correlation from which on a tile shows the same thing
ENOUGH = 0.3  # share of textured tiles that must; the rest may be what was edited
FEW = 4  # textured tiles: with fewer nothing can be known


@dataclass(frozen=True)
class Registration:
    """What lies at p in the fixed picture lies at c + scale (p - c) + (dx, dy) in the moving one, stretched to the same
    size; c is the middle.

    dx, dy  pixels of the fixed picture
    score   share of the textured tiles that show the same in both, so laid; 1 where there is no texture
    plain   whether that share is large enough for a shift and a scale to be the whole story
    """

    dx: float
    dy: float
    scale: float
    score: float
    plain: bool

    def matrix(self, size: tuple[int, int]) -> NDArray[np.float64]:
        """[2, 3]: from pixels of the fixed picture, (width, height), to those of the moving one at that size."""
        x, y = ((side - 1) / 2 for side in size)
        slack = 1 - self.scale
        return np.array([[self.scale, 0, slack * x + self.dx], [0, self.scale, slack * y + self.dy]])


NONE = Registration(0.0, 0.0, 1.0, 1.0, True)


def register(moving: Pixels, fixed: Pixels) -> Registration:
    """Find how ``moving`` lies on ``fixed``; both RGB, of any size. Phase correlation of normalised gradients at
    several scales, then robust least squares, coarse to fine; about a second for a megapixel on one core."""
    height, width = fixed.shape[:2]
    shrink = min(1.0, (FINE / (width * height)) ** 0.5)
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    a, b = _band(_luma(moving, size)), _band(_luma(fixed, size))
    if min(size) < 2 * TILE or _textured(b).sum() < FEW:
        return NONE
    first, *rest = _sides(max(size))
    rough = _smaller(a, first), _smaller(b, first)
    # Patterns repeat, and one peak may be a step beside the true one: each is refined before any is believed.
    tried = [_refine(*rough, start, 8) for start in _search(*rough)]
    found = max(tried, key=lambda one: _alike(_laid(rough[0], one), rough[1])[1])
    for before, side in pairwise((first, *rest)):
        unit = np.array([side / before, side / before, 1.0])  # a scale has none
        found = _refine(_smaller(a, side), _smaller(b, side), found * unit)
    still, score = _alike(a, b)[0], _alike(_laid(a, found), b)[0]
    reach = max(16.0, REACH * max(size))
    inside = np.abs(found[:2]).max() <= reach and abs(found[2]) <= 0.05
    if not inside or score < max(ENOUGH, 0.9 * still):
        return Registration(0.0, 0.0, 1.0, still, still >= ENOUGH)
    dx, dy, log_scale = (float(value) for value in found)
    return Registration(dx * width / size[0], dy * height / size[1], float(np.exp(log_scale)), score, True)


def align(moving: Pixels, registration: Registration, size: tuple[int, int]) -> Pixels:
    """``moving`` brought onto the fixed picture, at its size (width, height): one Lanczos resampling for both. What it
    does not show is taken from its edge."""
    return resample(moving, registration, size, (0, 0, *size))


def resample(
    moving: NDArray[np.uint8], registration: Registration, size: tuple[int, int], box: tuple[int, int, int, int]
) -> NDArray[np.uint8]:
    """A box (left, top, right, bottom) of :func:`align`, without making the rest."""
    height, width = moving.shape[:2]
    left, top, right, bottom = box
    if registration == NONE and size == (width, height):
        return moving[top:bottom, left:right]
    if size[0] < width or size[1] < height:  # Lanczos of the warp looks at 8 x 8 pixels, however much it shrinks
        width, height = min(size[0], width), min(size[1], height)
        moving = np.asarray(cv2.resize(moving, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    matrix = registration.matrix(size)
    rows = np.array([[width / size[0]], [height / size[1]]])
    # Pixel centres: x of the stretched picture lies at (x + 1/2) r - 1/2 of the moving one itself.
    matrix[:, 2:] += matrix[:, :2] @ np.array([[left], [top]])
    matrix[:, 2:] = (matrix[:, 2:] + 0.5) * rows - 0.5
    matrix[:, :2] *= rows
    flags = cv2.INTER_LANCZOS4 | cv2.WARP_INVERSE_MAP
    extent = (right - left, bottom - top)
    return np.asarray(cv2.warpAffine(moving, matrix, extent, flags=flags, borderMode=cv2.BORDER_REPLICATE), np.uint8)


def _luma(picture: Pixels, size: tuple[int, int]) -> Plane:
    grey = np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), np.float32)
    small = size[0] < grey.shape[1]
    return np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA if small else cv2.INTER_LINEAR), np.float32)


def _band(luma: Plane) -> Plane:
    """Without noise and without shades: neither tells where a thing lies, and casts change the shades."""
    return np.asarray(cv2.GaussianBlur(luma, (0, 0), 0.8) - cv2.GaussianBlur(luma, (0, 0), 6), np.float32)


def _sides(side: int) -> Iterator[int]:
    """Longer sides of the refinements, from the coarse one to the whole."""
    steps = [side]
    while steps[-1] > 1.5 * COARSE:
        steps.append((steps[-1] + 1) // 2)
    yield from reversed(steps)


def _smaller(plane: Plane, side: int) -> Plane:
    shrink = side / max(plane.shape)
    if shrink >= 1:
        return plane
    return np.asarray(cv2.resize(plane, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA), np.float32)


def _laid(moving: Plane, found: NDArray[np.float64]) -> Plane:
    """The moving plane on the fixed one, by (dx, dy, log scale)."""
    size = (moving.shape[1], moving.shape[0])
    matrix = Registration(found[0], found[1], float(np.exp(found[2])), 0, True).matrix(size)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(moving, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE), np.float32)


def _search(moving: Plane, fixed: Plane, peaks: int = 5) -> list[NDArray[np.float64]]:
    """Guesses of (dx, dy, log scale), each to a pixel and half a hundredth, and rest. They are the highest peaks, at
    several scales, of the correlation of gradients, of which only the direction counts (Fitch et al. 2002): no strong
    edge outvotes the rest."""
    height, width = fixed.shape
    window = np.outer(np.hanning(height), np.hanning(width)).astype(np.float32)
    reach = int(max(16, REACH * max(fixed.shape)))
    wanted = np.conj(np.fft.fft2(window * _directions(fixed)))
    found: list[tuple[float, NDArray[np.float64]]] = []
    for scale in SCALES:
        zoomed = _laid(moving, np.array([0, 0, np.log(scale)]))
        across = np.fft.ifft2(wanted * np.fft.fft2(window * _directions(zoomed))).real
        near = np.roll(across, (reach, reach), (0, 1))[: 2 * reach + 1, : 2 * reach + 1]
        for _ in range(2):
            row, column = np.unravel_index(int(near.argmax()), near.shape)
            # The zoomed picture moved by d: the moving one by scale * d.
            found.append((near[row, column], np.array([*(scale * (np.array([column, row]) - reach)), np.log(scale)])))
            near[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3] = -np.inf
    found.sort(key=lambda one: -one[0])
    return [np.zeros(3), *(guess for _, guess in found[:peaks])]


def _slopes(plane: Plane) -> tuple[Plane, Plane]:
    kernel = np.array([[-0.5, 0, 0.5]], np.float32)
    across, down = (cv2.filter2D(plane, -1, k, borderType=cv2.BORDER_REPLICATE) for k in (kernel, kernel.T))
    return np.asarray(across, np.float32), np.asarray(down, np.float32)


def _directions(plane: Plane) -> NDArray[np.complex64]:
    across, down = _slopes(plane)
    slope = across + 1j * down
    return np.asarray(slope / (np.abs(slope) + TEXTURE), np.complex64)


def _refine(moving: Plane, fixed: Plane, start: NDArray[np.float64], rounds: int = 12) -> NDArray[np.float64]:
    """Least squares for shift, log scale and contrast over what has edges, by Gauss and Newton; pixels that do not fit
    (Tukey 1974) lose their say."""
    across, down = _slopes(fixed)
    steep = np.hypot(across, down)
    chosen = np.flatnonzero(steep > max(1.0, float(np.quantile(steep, 0.7))))
    if chosen.size < 64:
        return start
    height, width = fixed.shape
    x = (chosen % width - (width - 1) / 2).astype(np.float64)
    y = (chosen // width - (height - 1) / 2).astype(np.float64)
    found, goal = start.copy(), fixed.ravel()[chosen]
    for _ in range(rounds):
        laid = _laid(moving, found)
        # Slopes of both pictures: second order steps (Benhimane and Malis 2004).
        slopes = zip(_slopes(laid), (across, down), strict=True)
        ix, iy = ((one.ravel()[chosen] + other.ravel()[chosen]) / 2 for one, other in slopes)
        value = laid.ravel()[chosen]
        error = (goal - value).astype(np.float64)
        spread = max(1.4826 * float(np.median(np.abs(error))), 0.25)
        weight = np.square(np.clip(1 - np.square(error / (4.685 * spread)), 0, None))
        columns = np.stack((ix, iy, ix * x + iy * y, value))
        # einsum sums in one order; a matrix product would not, with another number of threads.
        normal = np.einsum("in,jn,n->ij", columns, columns, weight, optimize=False)
        step = np.linalg.lstsq(normal, np.einsum("in,n->i", columns, weight * error), rcond=1e-10)[0]
        found += step[:3]
        if np.abs(step[:2]).max() < 1e-3 and abs(step[2]) < 1e-5:
            break
    return found


def _tiles(plane: Plane) -> NDArray[np.float32]:
    """[tiles, pixels], without what is left over at the right and at the bottom."""
    rows, columns = (side // TILE for side in plane.shape)
    cut = plane[: rows * TILE, : columns * TILE].reshape(rows, TILE, columns, TILE)
    return np.asarray(cut.transpose(0, 2, 1, 3).reshape(rows * columns, TILE * TILE), np.float32)


def _textured(plane: Plane) -> NDArray[np.bool_]:
    return np.asarray(_tiles(plane).std(axis=1) > TEXTURE, np.bool_)


def _alike(first: Plane, second: Plane) -> tuple[float, float]:
    """Of the tiles with texture in the second plane: the share that correlates, and the mean correlation."""
    where = _textured(second)
    if not where.any():
        return 0.0, 0.0
    a, b = (tiles[where] - tiles[where].mean(axis=1, keepdims=True) for tiles in (_tiles(first), _tiles(second)))
    size = np.sqrt(np.square(a).sum(axis=1) * np.square(b).sum(axis=1))
    alike = (a * b).sum(axis=1) / np.maximum(size, 1e-6)
    return float((alike > ALIKE).mean()), float(alike.clip(0).mean())
