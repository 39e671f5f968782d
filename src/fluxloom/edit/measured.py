"""What one edit did to a picture, in the numbers of :mod:`fluxloom.edit.drift`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxloom.infer import pictures

MOST = 4_000_000  # pixels that are compared, of a larger picture at a smaller size: 12 million took 5 s and 1 GB

if TYPE_CHECKING:
    from PIL import Image

    from fluxloom.infer.receipt import Receipt
    from fluxloom.measure.pixels import Mask


def turn_meters(before: Image.Image, after: Image.Image, receipt: Receipt | None) -> dict[str, Any]:
    """The meters of one edit outside of what it changed, and the share that it changed."""
    from fluxloom.edit.drift import meters

    before = measurable(before)
    after = pictures.resize(after, *before.size)
    where = changed(before, after, receipt)
    return {**meters(np.asarray(before), np.asarray(after), where).to_dict(), "changed": float(where.mean())}


def measurable(picture: Image.Image) -> Image.Image:
    """A picture at a size at which it is compared in a second or two."""
    shrink = max(1.0, math.sqrt(picture.width * picture.height / MOST))
    return pictures.resize(picture, round(picture.width / shrink), round(picture.height / shrink))


def changed(before: Image.Image, after: Image.Image, receipt: Receipt | None) -> Mask:
    """What an edit changed, of pictures of one size: where its pixels were locked, all that differs; else what the
    lock would have let through."""
    one, other = np.asarray(before), np.asarray(after)
    finish: Any = () if receipt is None else receipt.data.get("finish", ())
    if any(isinstance(step, Mapping) and step.get("name") == "lock" for step in finish):
        return np.asarray((one != other).any(axis=2))
    from fluxloom.edit.lock import lock

    return np.asarray(lock(one, other, None)[1] > 0)
