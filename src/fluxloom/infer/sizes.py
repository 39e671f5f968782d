"""Sizes of pictures: the one to work at, and whether a model allows it."""

from __future__ import annotations

import math

from fluxloom.core.shapes import fit_size, nearest_size
from fluxloom.core.specs import ModelSpec, Size, TaskDefaults
from fluxloom.errors import BadInput
from fluxloom.infer.canvas import Margins


def working_size(spec: ModelSpec, row: TaskDefaults, width: int, height: int, expand: Margins = (0, 0, 0, 0)) -> Size:
    """The size at which a model works on a picture: of its preferred sizes the one nearest in aspect, or, where it
    has none, the picture's own, scaled down to the area of the task's default size and rounded to what is allowed:
    nano, taught at 256 x 256, sees a photo of 4000 x 3000 at 288 x 224. With new canvas around it (``expand``) the
    picture keeps the scale that it would have alone, as far as the model's largest area allows."""
    left, top, right, bottom = expand
    canvas = (left + width + right, top + height + bottom)
    if spec.preferred_sizes:
        return nearest_size(*canvas, spec.preferred_sizes)
    area = math.prod(row.size) * math.prod(canvas) // (width * height)
    return fit_size(*canvas, spec.size_multiple, spec.min_side, min(area, spec.max_area))


def allowed_size(spec: ModelSpec, width: int, height: int) -> Size:
    """The size, if a model allows it. Raises BadInput, with the nearest that it does."""
    multiple, low, area = spec.size_multiple, spec.min_side, spec.max_area
    if min(width, height) < low or width * height > area or width % multiple or height % multiple:
        near = [max(low, (side + multiple // 2) // multiple * multiple) for side in (width, height)]
        if near[0] * near[1] > area:
            near[:] = fit_size(min(near[0], area), min(near[1], area), multiple, low, area)
        raise BadInput(
            f"got size {width}x{height}, allowed for {spec.name}: sides in multiples of {multiple}, {low} or more, "
            f"at most {area:,} pixels in all, try {near[0]}x{near[1]}"
        )
    return width, height
