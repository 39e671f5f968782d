"""Locked pixels: of an edited picture only what the edit changed goes back into the original, at the original's size
and depth. All other pixels stay the bytes that they were: no autoencoder, no resizing and no cast touches them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fluxloom.errors import BadInput
from fluxloom.infer.finish import Box, boxed
from fluxloom.infer.request import Input, Picture, Resolved, input_of
from fluxloom.measure.pixels import ciede2000
from fluxloom.measure.register import NONE, Registration, align, register, resample

Depth = TypeVar("Depth", np.uint8, np.uint16)
Plane = NDArray[np.float32]
Where = NDArray[np.bool_]

# A difference in Lab, blurred by so many pixels, counts from a + b c on, where c is the contrast of the surroundings:
# an autoencoder errs where there is detail, and its errors cancel in a blur, as those of an edit do not. What nano's
# own round trip leaves over 2 (a + b c) are specks (bench/lock.py).
SCALES = ((1.0, 12.0, 1.5), (2.0, 7.0, 1.0), (4.0, 5.0, 0.75))  # sigma, a, b
SURE, LIKELY = 2.0, 0.35  # times that: where a change is certain, and how far it reaches around
NEAR = 12 / 256  # of the longer side: no further than this; and gaps so wide are closed. A letter of which half is old
# cannot be read, while what is replaced without need was nearly the same: be generous around a change
CALM = 0.1  # a quarter of the pixels of a local edit differ less, in those units; of a noisier model all limits rise
NOISIEST = 3.0  # with it, but not further
SPECK = 3e-4  # of the picture, or 24 pixels: smaller islands far from larger ones are not what anybody asked for
HOLE = 0.02  # of the picture: smaller holes are filled
MOSTLY = 0.6  # of the picture changed: the edit is of all of it
UNREST, RESTLESS = 0.5, 0.35  # so too where over so many of the rest differ by half a threshold: style, light, weather
CAST, TINT = 8.0, 2.5  # mean Lab difference of a cast: so much is meant, and so much if nothing else was changed
FEATHER = 1 / 64  # of the longer side, at least 3 pixels


@dataclass(frozen=True)
class LockReport:
    """What was kept and what was changed.

    mode       ``auto``: the change was found; ``mask``: it was given
    shift      of the edited picture, (dx, dy) in pixels of the original; scale beside it; both are undone
    changed    share of the original's pixels that were touched
    delta_e_outside    mean CIEDE2000, outside of them, that the edited picture had drifted by: it is gone
    identical  share of the bytes outside that are the original's, counted; 0 where there is no outside
    whole      an edit of everything: the edited picture was passed on as it is, at the original's size
    note       what there is to know about it, or nothing
    """

    mode: str
    shift: tuple[float, float]
    scale: float
    changed: float
    delta_e_outside: float
    identical: float
    whole: bool
    note: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "shift": list(self.shift)}


@dataclass(frozen=True, eq=False)
class Change:
    """How an edited picture differs from the small original.

    mask    bool [h, w]: where
    registration, cast    how it lies there, and the gain and offset [3, 2] of its channels, 0 to 255: both are undone
    tint    mean Lab difference that the cast makes
    unrest  share of the pixels outside of the mask that differ by half as much as those inside must
    drift   CIEDE2000 [h, w], with the cast
    """

    mask: Where
    registration: Registration
    cast: Plane
    tint: float
    unrest: float
    drift: Plane

    @property
    def everywhere(self) -> bool:
        """Whether nothing is left to lock."""
        share = float(self.mask.mean())
        return share > MOSTLY or self.unrest > RESTLESS or self.tint > (TINT if share < SPECK else CAST)


def lock(
    original: NDArray[Depth], edited: NDArray[np.uint8], mask: NDArray[np.floating[Any]] | None = None
) -> tuple[NDArray[Depth], Plane, LockReport]:
    """Put into the original what was edited, and nothing else.

    original  RGB [H, W, 3] of 8 or 16 bits, at full resolution
    edited    RGB [h, w, 3] of 8 bits, at the size that the model worked at
    mask      [H, W], 0 to 1: where the edit may be, grey for a softer edge; None: found by comparing

    Returns the picture, like the original; its mask, float32 [H, W]: where it is 0 every byte is the original's; and
    the report. Raises BadInput where the arrays are no such pictures.
    """
    _check(original, edited, mask)
    size: tuple[int, int] = (original.shape[1], original.shape[0])
    at = (edited.shape[1], edited.shape[0])
    given = None if mask is None else np.asarray(mask, np.float32)
    outside = None if given is None else np.asarray(cv2.resize(given, at, interpolation=cv2.INTER_AREA)) == 0
    found = find_change(_small(original, at), edited, outside)
    mode, note = ("auto" if given is None else "mask"), ""
    if given is None and found.everywhere:
        out = _deep(resample(edited, NONE, size, (0, 0, *size)), original.dtype)
        full = np.ones(original.shape[:2], np.float32)
        found = replace(found, registration=NONE)
        return out, full, _report(mode, original, out, full, found, "the edit is of the whole picture")
    if given is None and not found.mask.any():
        note = "the edit changed nothing that can be seen"
    elif not found.registration.plain:
        note = "no shift or zoom explains how the edited picture lies on the original; look at the seams"
    full = _feathered(found.mask, size) if given is None else _softened(given)
    out = _composite(original, edited, full, found)
    return out, full, _report(mode, original, out, full, found, note)


def find_change(small: NDArray[np.uint8], edited: NDArray[np.uint8], outside: Where | None = None) -> Change:
    """Compare an edited picture with its original at one size, [h, w, 3]. ``outside``: where it is known to be the
    same thing, which its cast is then measured by."""
    size = (small.shape[1], small.shape[0])
    registration = register(edited, small)
    if abs(registration.dx) + abs(registration.dy) < 0.1 and abs(registration.scale - 1) * max(size) < 0.2:
        registration = replace(registration, dx=0.0, dy=0.0, scale=1.0)  # below what can be told, or seen
    laid = align(edited, registration, size)
    cast = _cast(laid, small, outside)
    bare, plain, goal = (_lab(picture) for picture in (laid, _cured(laid, cast), small))
    ratios = [_ratio(plain, goal, *scale) for scale in SCALES]
    most = np.max(ratios, axis=0)
    noise = float(np.clip(np.quantile(most, 0.25) / CALM, 1, NOISIEST))
    shown = _shown(registration, size)
    likely = np.max(ratios[:2], axis=0) > LIKELY * noise  # the widest blur reaches beyond the change
    mask = _grown((most > SURE * noise) & shown, likely & shown)
    unrest = float((most[~mask] > UNREST).mean()) if not mask.all() else 1.0
    tint = float(np.sqrt(np.square(bare - plain).sum(axis=-1)).mean())
    return Change(mask, registration, cast, tint, unrest, ciede2000(laid, small))


class Lock:
    """Finisher: an edit locked onto the first picture that it was made from; see :func:`lock`.

    mask  of that picture's size: white is where the edit may be; box: the same for a rectangle. Neither: it is found
    """

    name = "lock"

    def __init__(self, mask: Picture | None = None, box: Box | None = None) -> None:
        if mask is not None and box is not None:
            raise BadInput("got mask and box, allowed one of them, try the mask alone")
        self.inputs: tuple[Input, ...] = () if mask is None else (input_of(mask, self.name),)
        self.box = box

    @classmethod
    def remade(cls, settings: Mapping[str, Any], pictures: Sequence[Picture]) -> Lock:
        """From a receipt."""
        (mask,) = pictures or (None,)
        return cls(mask, None if settings["box"] is None else tuple(settings["box"]))

    def settings(self) -> dict[str, Any]:
        """The box; a mask is an input."""
        return {"box": None if self.box is None else list(self.box)}

    def check(self, request: Resolved) -> None:
        """Raises BadInput where there is nothing to lock onto, or the mask is not of its size."""
        size = _source(request).size
        if self.inputs and self.inputs[0].image.size != size:
            got, allowed = ("x".join(map(str, one)) for one in (self.inputs[0].image.size, size))
            raise BadInput(f"got a lock of {got} for a picture of {allowed}, allowed the same size, try resizing it")
        self._mask(request)

    def __call__(self, image: Image.Image, request: Resolved) -> tuple[Image.Image, dict[str, Any]]:
        """The locked picture, at the size of the original."""
        out, _, report = lock(np.asarray(_source(request)), np.asarray(image), self._mask(request))
        return Image.fromarray(out), report.to_dict()

    def _mask(self, request: Resolved) -> Plane | None:
        if self.inputs:
            found = self.inputs[0].image
        elif self.box is not None:
            found = boxed(_source(request).size, self.box)
        else:
            return None
        return np.asarray(found.convert("L"), np.float32) / np.float32(255)


def _source(request: Resolved) -> Image.Image:
    found = request.input("context") or request.input("init")
    if found is None:
        raise BadInput("got a lock for a drawing, allowed for edits, try it without")
    return found.image


def _check(original: NDArray[Any], edited: NDArray[Any], mask: NDArray[Any] | None) -> None:
    if original.ndim != 3 or original.shape[2] != 3 or original.dtype not in (np.uint8, np.uint16):
        got = f"{original.dtype} {list(original.shape)}"
        raise BadInput(f"got an original {got}, allowed RGB [H, W, 3] of uint8 or uint16, try converting it")
    if edited.ndim != 3 or edited.shape[2] != 3 or edited.dtype != np.uint8:
        got = f"{edited.dtype} {list(edited.shape)}"
        raise BadInput(f"got an edited picture {got}, allowed RGB [h, w, 3] of uint8, try converting it")
    if mask is not None and mask.shape != original.shape[:2]:
        got, allowed = (f"{size[1]}x{size[0]}" for size in (mask.shape, original.shape))
        raise BadInput(f"got a mask of {got} for a picture of {allowed}, allowed the same size, try resizing it")


# ---------------------------------------------------------------------------------------------- finding the change


def _small(original: NDArray[Depth], size: tuple[int, int]) -> NDArray[np.uint8]:
    shrinks = size[0] < original.shape[1]
    small = cv2.resize(original, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(small if small.dtype == np.uint8 else (small.astype(np.uint32) + 128) // 257, np.uint8)


def _lab(picture: NDArray[Any]) -> Plane:
    values = picture.astype(np.float32).clip(0, 255) / np.float32(255)
    return np.asarray(cv2.cvtColor(values, cv2.COLOR_RGB2LAB), np.float32)


def _cast(laid: NDArray[np.uint8], small: NDArray[np.uint8], outside: Where | None, rounds: int = 10) -> Plane:
    """Gain and offset [3, 2] that lead the colours of the edited picture to those of the original, where it was left
    alone: least squares in which what does not fit loses its say (Tukey)."""
    a, b = (cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 2)[::2, ::2] for picture in (laid, small))
    where = np.ones(a.shape[:2], np.bool_) if outside is None else outside[::2, ::2]
    found = np.tile(np.array([1.0, 0.0]), (3, 1))
    if where.mean() < 0.02:  # too little to measure by
        return found.astype(np.float32)
    a, b = a[where], b[where]
    found[:, 1] = np.median(b - a, axis=0)
    for _ in range(rounds):
        error = b - (a * found[:, 0] + found[:, 1])
        size = np.abs(error).max(axis=1)
        spread = max(1.4826 * float(np.median(size)), 1.0)
        weight = np.square(np.clip(1 - np.square(size / (4.685 * spread)), 0, None)).astype(np.float64)
        total = max(float(weight.sum()), 1e-9)
        for channel in range(3):
            x, y = a[:, channel].astype(np.float64), b[:, channel].astype(np.float64)
            mean_x, mean_y = float((weight * x).sum()) / total, float((weight * y).sum()) / total
            variance = float((weight * np.square(x - mean_x)).sum()) / total
            # A surface of one colour says nothing about a gain: 4 squared of 255 pull it to 1.
            gain = (float((weight * (x - mean_x) * (y - mean_y)).sum()) / total + 16) / (variance + 16)
            found[channel] = gain, mean_y - gain * mean_x
    return found.astype(np.float32)


def _cured(picture: NDArray[np.uint8], cast: Plane) -> Plane:
    return np.asarray(picture * cast[:, 0] + cast[:, 1], np.float32)


def _ratio(first: Plane, second: Plane, sigma: float, least: float, detail: float) -> Plane:
    """How many times more two Lab pictures differ at one scale than an autoencoder makes them."""
    apart = np.sqrt(np.square(cv2.GaussianBlur(first - second, (0, 0), sigma)).sum(axis=-1))
    contrast = np.minimum(_contrast(first), _contrast(second))
    return np.asarray(apart / (least + detail * contrast), np.float32)


def _contrast(lab: Plane) -> Plane:
    mean, square = (cv2.GaussianBlur(plane, (0, 0), 2) for plane in (lab, np.square(lab)))
    return np.asarray(np.sqrt((square - np.square(mean)).clip(0).sum(axis=-1)), np.float32)


def _shown(registration: Registration, size: tuple[int, int]) -> Where:
    """What of the original the edited picture shows: a shift leaves an edge without."""
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    ones = np.ones((size[1], size[0]), np.uint8)
    return np.asarray(cv2.warpAffine(ones, registration.matrix(size), size, flags=flags) > 0, np.bool_)


def _grown(sure: Where, likely: Where) -> Where:
    """From what is certain to the whole change: islands and what is near them, the likely places around, gaps and
    holes."""
    near = max(2, round(NEAR * max(sure.shape)))
    islands = _areas(_closed(sure, 2)) >= max(24, SPECK * sure.size)
    sure = sure & _widened(islands, 2 * near)
    _, labels = cv2.connectedComponents(((sure | likely) & _widened(sure, near)).astype(np.uint8))
    kept = np.unique(labels[sure])
    mask = _closed(np.isin(labels, kept[kept > 0]), near)
    return mask | (_areas(~mask) < HOLE * mask.size) & ~mask


def _areas(where: Where) -> NDArray[np.int64]:
    """Of each pixel the area of its island, or 0."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(where.astype(np.uint8), connectivity=4)
    areas = np.asarray(stats[:, cv2.CC_STAT_AREA], np.int64)
    areas[0] = 0
    return np.asarray(areas[labels])


def _disc(radius: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)), np.uint8)


def _widened(where: Where, radius: int) -> Where:
    away = cv2.distanceTransform((~where).astype(np.uint8), cv2.DIST_L2, 5)
    return np.asarray(away <= radius, np.bool_) & bool(where.any())


def _closed(where: Where, radius: int) -> Where:
    """Without gaps up to twice the radius; the border of the picture closes none."""
    padded = cv2.copyMakeBorder(where.astype(np.uint8), *(radius,) * 4, cv2.BORDER_CONSTANT, value=0)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, _disc(radius))
    return np.asarray(closed[radius:-radius, radius:-radius], np.bool_)


# ---------------------------------------------------------------------------------------------- putting it together


def _feathered(mask: Where, size: tuple[int, int]) -> Plane:
    """The mask at full size, 1 where something changed, falling to 0 around it; exactly 0 beyond."""
    if not mask.any():
        return np.zeros((size[1], size[0]), np.float32)
    width = max(3.0, FEATHER * max(mask.shape))
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)
    slope = np.clip(1 - away / width, 0, 1)
    full = cv2.resize(np.asarray(slope * slope * (3 - 2 * slope), np.float32), size, interpolation=cv2.INTER_LINEAR)
    return np.where(full < 1 / 512, np.float32(0), np.asarray(full, np.float32).clip(0, 1))


def _softened(mask: Plane) -> Plane:
    """A given mask, falling to its edge: outside of it nothing may change, so the seam is made within."""
    inside = cv2.distanceTransform((mask > 0).astype(np.uint8), cv2.DIST_L2, 5)
    slope = np.clip(inside / max(2.0, FEATHER / 2 * max(mask.shape)), 0, 1)
    return np.asarray(np.minimum(mask, slope * slope * (3 - 2 * slope)), np.float32)


def _composite(original: NDArray[Depth], edited: NDArray[np.uint8], full: Plane, found: Change) -> NDArray[Depth]:
    """The original with the edited picture, laid on it and freed of its cast, where the mask says so. In strips: of a
    large picture only some rows are ever there as floating point numbers."""
    out, (height, width) = original.copy(), original.shape[:2]
    top_value = int(np.iinfo(original.dtype).max)
    rows, columns = (np.flatnonzero(full.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return out
    left, right = int(columns[0]), int(columns[-1]) + 1
    for top in range(int(rows[0]), int(rows[-1]) + 1, 256):
        bottom = min(top + 256, int(rows[-1]) + 1)
        part = (slice(top, bottom), slice(left, right))
        weight = full[part][..., None]
        laid = resample(edited, found.registration, (width, height), (left, top, right, bottom))
        new = _cured(laid, found.cast).clip(0, 255) * np.float32(top_value / 255)
        mixed = original[part] + weight * (new - original[part])
        out[part] = np.where(weight > 0, np.rint(mixed).clip(0, top_value), original[part]).astype(original.dtype)
    return out


def _deep(picture: NDArray[np.uint8], depth: Any) -> NDArray[Any]:
    return picture if depth == np.uint8 else picture.astype(np.uint16) * 257


def _report(mode: str, original: NDArray[Any], out: NDArray[Any], full: Plane, found: Change, note: str) -> LockReport:
    height, width = found.mask.shape
    outside = full == 0
    beyond = np.asarray(cv2.resize(full, (width, height), interpolation=cv2.INTER_AREA)) == 0
    left, same = np.count_nonzero(outside), np.count_nonzero((out == original) & outside[..., None])
    lies = found.registration
    return LockReport(
        mode=mode,
        shift=(round(lies.dx * original.shape[1] / width, 3), round(lies.dy * original.shape[0] / height, 3)),
        scale=round(lies.scale, 5),
        changed=round(1 - float(outside.mean()), 6),
        delta_e_outside=round(float(found.drift[beyond].mean()), 3) if beyond.any() else 0.0,
        identical=same / (3 * left) if left else 0.0,
        whole=mode == "auto" and found.everywhere,
        note=note,
    )
