"""Finishing: what happens to a picture after it is decoded, recorded in its receipt so that replay does it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from fluxloom.errors import BadInput, FluxloomError, ReceiptError
from fluxloom.infer.request import Input, Picture, Resolved

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels; right and bottom are the first outside


class Finisher(Protocol):
    """Turns a decoded picture into the one that is handed out; the same one for the same settings and inputs."""

    @property
    def name(self) -> str: ...

    def settings(self) -> dict[str, Any]:
        """What another of this name needs to do the same: JSON."""
        ...

    def __call__(self, image: Image.Image, request: Resolved) -> tuple[Image.Image, dict[str, Any]]:
        """The picture, and a report as JSON."""
        ...


@runtime_checkable
class Demanding(Protocol):
    """A finisher that takes pictures of its own, recorded as inputs in the role of its name, and may say before
    anything is drawn that a request is not for it."""

    @property
    def inputs(self) -> tuple[Input, ...]: ...

    def check(self, request: Resolved) -> None:
        """Raises BadInput."""
        ...


Maker = Callable[[Mapping[str, Any], Sequence[Picture]], Finisher]  # from settings and inputs


def check(request: Resolved, finishers: Sequence[Finisher]) -> None:
    """Ask those who may refuse."""
    for one in finishers:
        if isinstance(one, Demanding):
            one.check(request)


def inputs(finishers: Sequence[Finisher]) -> list[Input]:
    """All pictures that finishers take."""
    return [found for one in finishers if isinstance(one, Demanding) for found in one.inputs]


def finish(
    image: Image.Image, request: Resolved, finishers: Sequence[Finisher]
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """A picture through all of them in turn, and what a receipt says of each."""
    told = []
    for one in finishers:
        image, report = one(image, request)
        told.append({"name": one.name, "settings": one.settings(), "report": report})
    return image, told


def remake(told: object, makers: Mapping[str, Maker], pictures: Sequence[tuple[str, Picture]]) -> tuple[Finisher, ...]:
    """The finishers of a receipt. ``pictures``: their inputs, by role. Raises ReceiptError."""
    entries = list(_entries(told))
    names = [name for name, _ in entries]
    for name in (*names, *(role for role, _ in pictures)):
        if name not in makers or name not in names:
            allowed = ", ".join(makers) or "none here"
            raise ReceiptError(f"got a picture finished by {name!r}, allowed {allowed}, try a newer fluxloom")
    try:
        return tuple(
            makers[name](settings, [picture for role, picture in pictures if role == name])
            for name, settings in entries
        )
    except (FluxloomError, TypeError, ValueError, KeyError) as error:
        raise ReceiptError(
            f"got a receipt with unusable settings ({error}), allowed whole ones, try another"
        ) from error


def boxed(size: tuple[int, int], box: Box) -> Image.Image:
    """The mask of a box in a picture of (width, height): white inside. Raises BadInput where it is not inside."""
    try:
        left, top, right, bottom = box
        inside = 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    except (TypeError, ValueError):
        inside = False
    if not inside:
        raise BadInput(
            f"got box {box!r}, allowed left, top, right, bottom inside {size[0]}x{size[1]} pixels, try 0, 0, "
            f"{size[0] // 2}, {size[1]}"
        )
    mask = Image.new("L", size, 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


def masks(told: object, size: Sequence[int]) -> Iterator[Image.Image]:
    """The masks that a receipt tells of by their boxes, for which there is no file."""
    for _, settings in _entries(told):
        if settings.get("box") is not None:
            try:
                yield boxed((size[0], size[1]), tuple(settings["box"])).convert("RGB")
            except (BadInput, TypeError, IndexError):
                continue  # the receipt is wrong; the mask will be missed


def _entries(told: object) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in told if isinstance(told, list) else [None]:
        match entry:
            case {"name": str(name), "settings": dict(settings)}:
                yield name, settings
            case _:
                raise ReceiptError(
                    "got a receipt whose finish is not in order, allowed names and settings, try another"
                )
