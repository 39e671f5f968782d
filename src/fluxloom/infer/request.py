"""What is asked for, checked once and completely here, and what comes back."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from PIL import Image

from fluxloom.core.shapes import fit_size, nearest_size
from fluxloom.core.solvers import SOLVERS
from fluxloom.core.specs import MODELS, ModelSpec, Size, TaskDefaults
from fluxloom.errors import BadInput
from fluxloom.infer.pictures import pixel_hash, read
from fluxloom.infer.receipt import Receipt, examine
from fluxloom.infer.receipt import save as save_picture

MAX_PROMPT = 2_000  # characters; the longest text length of the family (512 tokens) is under that
MAX_STEPS = 1_000
MAX_PICTURES = 1_000
MAX_SCALE = 100.0  # of guidance and true CFG; trained and useful values are under 40
MAX_SEED = 2**64 - 1  # what torch's generator takes
STRENGTH = 0.8  # of an init picture, as in the official demo


class PromptWarning(UserWarning):
    """A part of a prompt does not reach the model."""


@dataclass(frozen=True)
class Result:
    """A picture (RGB), how it was made, and what the user should know about it."""

    image: Image.Image
    receipt: Receipt

    @property
    def seed(self) -> int:
        """The seed that draws this very picture with n = 1."""
        return self.receipt.seed

    @property
    def warnings(self) -> tuple[str, ...]:
        """What of the request did not reach the model."""
        return tuple(self.receipt.data["warnings"])

    def save(self, path: str | os.PathLike[str], *, receipt: bool = True, quality: int | None = None) -> Path:
        """Write the picture whole or not at all, as .png, .jpg or .webp; missing folders are made.

        The receipt goes into the file (it tells the prompt) unless ``receipt`` is false. ``quality``, 1 to 100,
        is for .jpg (95 unless given) and .webp (lossless unless given). Raises BadInput for another suffix,
        OutputError where the file cannot be written, and ReceiptError where ``image`` was drawn on since.
        """
        return save_picture(self.image, path, self.receipt if receipt else None, quality)


Picture = Image.Image | str | os.PathLike[str] | Result


@dataclass(frozen=True)
class Reference:
    """A picture that the drawing looks at; the role ``context`` is the picture that an instruction edits."""

    image: Picture
    role: str = "context"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that can be asked for. Fields left at None take the model's own values; none is ever ignored.

    prompt        what to draw, or with a reference: what to change; at most 2,000 characters
    negative      what not to draw; needs ``true_cfg`` over 1
    references    the picture to edit (this release: one)
    init          a picture to start from instead of pure noise, kept the more the smaller ``strength`` is
    strength      0 < strength <= 1: how much of the path is walked from ``init``; 0.8 unless given
    width, height in pixels: multiples of 16 that the model allows. Left out, they are the model's own, or follow
                  the reference or init picture (:func:`working_size`); that is resized without cropping
    n             how many pictures; picture k takes seed + k
    steps         1 to 1,000; ``adaptive`` takes it as the length of its first step
    guidance      a number that the model was taught to follow (dev and its kin)
    true_cfg      classifier-free guidance by a second evaluation; 1 is off
    solver        a name of ``core.solvers.SOLVERS``
    shift         whether times are shifted towards noise for larger pictures
    text_length   tokens of text given to the model
    seed          0 to 2**64 - 1; drawn and recorded where left out
    """

    prompt: str
    negative: str = ""
    references: tuple[Reference, ...] = ()
    init: Picture | None = None
    strength: float | None = None
    width: int | None = None
    height: int | None = None
    n: int = 1
    steps: int | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    solver: str | None = None
    shift: bool | None = None
    text_length: int | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Input:
    """A picture that goes in, decoded: its role (``context`` or ``init``), where it came from, what it hashes to."""

    role: str
    image: Image.Image
    pixels: str
    file: str | None
    receipt: str | None

    def to_dict(self) -> dict[str, Any]:
        """As a receipt records it."""
        found = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "image"}
        return {**found, "size": list(self.image.size)}


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A request without open ends: every field set and checked, every picture decoded."""

    task: str
    prompt: str
    negative: str
    inputs: tuple[Input, ...]
    strength: float | None
    width: int
    height: int
    n: int
    steps: int
    guidance: float | None
    true_cfg: float
    solver: str
    shift: bool
    text_length: int
    seed: int

    @property
    def first_step(self) -> int:
        """The step at which the path is entered: later than 0 where it starts from an init picture."""
        return 0 if self.strength is None else _first_step(self.strength, self.steps)

    def input(self, role: str) -> Input | None:
        """The input picture of a role."""
        return next((found for found in self.inputs if found.role == role), None)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a receipt records them; pictures are recorded beside."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "inputs"}


def resolve(request: Request, spec: ModelSpec) -> Resolved:
    """Check a request against a model and fill in what it leaves open. Raises BadInput."""
    task = "edit" if request.references else "generate"
    row = _row(spec, task)
    steps = _whole("steps", _or(request.steps, row.steps), 1, MAX_STEPS)
    n = _whole("n", request.n, 1, MAX_PICTURES)
    true_cfg = _number("true_cfg", _or(request.true_cfg, row.true_cfg), 1.0, MAX_SCALE)
    seed = int.from_bytes(os.urandom(4), "little") if request.seed is None else request.seed
    inputs = _inputs(request)
    width, height = _size(request, spec, row, inputs)
    return Resolved(
        task=task,
        prompt=_prompt(request.prompt, task),
        negative=_negative(request.negative, true_cfg),
        inputs=inputs,
        strength=_strength(request, steps),
        width=width,
        height=height,
        n=n,
        steps=steps,
        guidance=_guidance(request, spec, row),
        true_cfg=true_cfg,
        solver=_solver(_or(request.solver, row.solver)),
        shift=_flag("shift", _or(request.shift, spec.shift)),
        text_length=_text_length(request.text_length, spec),
        seed=_whole("seed", seed, 0, MAX_SEED - n + 1),
    )


def working_size(spec: ModelSpec, row: TaskDefaults, width: int, height: int) -> Size:
    """The size at which a model works on a picture: of its preferred sizes the one nearest in aspect, or, where it
    has none, the picture's own, scaled down to the area of the task's default size and rounded to what is allowed:
    nano, taught at 256 x 256, sees a photo of 4000 x 3000 at 288 x 224."""
    if spec.preferred_sizes:
        return nearest_size(width, height, spec.preferred_sizes)
    return fit_size(width, height, spec.size_multiple, spec.min_side, math.prod(row.size))


def _row(spec: ModelSpec, task: str) -> TaskDefaults:
    row = spec.task(task)
    if row is None:
        others = [other.name for other in MODELS.values() if other.task(task)]
        raise BadInput(f"got {task} for {spec.name}, allowed {', '.join(spec.tasks)}, try {' or '.join(others)}")
    return row


def _prompt(prompt: object, task: str) -> str:
    what = "an instruction" if task == "edit" else "a prompt"
    example = "make the sky red" if task == "edit" else "a red bicycle on the beach"
    if not isinstance(prompt, str) or not prompt.strip():
        got = "an empty text" if isinstance(prompt, str) else type(prompt).__name__
        raise BadInput(f"got {got} as prompt, allowed {what} in words, try {example!r}")
    return _short(prompt, "prompt")


def _short(text: str, name: str) -> str:
    if len(text) > MAX_PROMPT:
        raise BadInput(
            f"got a {name} of {len(text):,} characters, allowed {MAX_PROMPT:,}, try saying it in fewer words"
        )
    return text


def _negative(negative: object, true_cfg: float) -> str:
    if not isinstance(negative, str):
        raise BadInput(f"got {type(negative).__name__} as negative prompt, allowed a text, try 'trees, people'")
    if negative.strip() and true_cfg == 1:
        raise BadInput("got a negative prompt with true_cfg 1, allowed only over 1, try true_cfg 3")
    return _short(negative, "negative prompt")


def _strength(request: Request, steps: int) -> float | None:
    if request.init is None:
        if request.strength is not None:
            raise BadInput("got strength without init, allowed only with a picture to start from, try init")
        return None
    strength = _number("strength", _or(request.strength, STRENGTH), 0.0, 1.0)
    first = _first_step(strength, steps)
    if first >= steps:
        raise BadInput(f"got strength {strength:g}, allowed over 0 and at most 1, try {STRENGTH}")
    if first == 0 and strength < 1:
        raise BadInput(
            f"got strength {strength:g} in {steps} steps, which starts from noise and leaves nothing of init, "
            f"allowed a smaller strength or shorter steps, try {math.ceil(1 / (1 - strength))} steps"
        )
    return strength


def _guidance(request: Request, spec: ModelSpec, row: TaskDefaults) -> float | None:
    if spec.transformer.guidance_embed:
        return _number("guidance", _or(request.guidance, row.guidance), 0.0, MAX_SCALE)
    if request.guidance is not None:
        raise BadInput(f"got guidance for {spec.name}, which was not taught to follow it, allowed none, try true_cfg")
    return None


def _first_step(strength: float, steps: int) -> int:
    """The official rule."""
    return int((1 - strength) * steps)


def _solver(name: object) -> str:
    if not isinstance(name, str) or name not in SOLVERS:
        near = get_close_matches(str(name), SOLVERS, n=2, cutoff=0.4) or ["euler"]
        raise BadInput(f"got solver {name!r}, allowed {', '.join(SOLVERS)}, try {' or '.join(near)}")
    return name


def _text_length(length: int | None, spec: ModelSpec) -> int:
    if length is None:
        return spec.text_length
    # A tower of the model's own has learned one length, padding included.
    return _whole("text_length", length, spec.text_length if spec.text else 1, spec.text_length)


def _inputs(request: Request) -> tuple[Input, ...]:
    if len(request.references) > 1:
        raise BadInput(f"got {len(request.references)} references, allowed one in this release, try the first")
    for reference in request.references:
        if reference.role != "context":
            raise BadInput(f"got a reference with role {reference.role!r}, allowed context, try leaving it out")
    found = [_input(reference.image, "context") for reference in request.references]
    return (*found, _input(request.init, "init")) if request.init is not None else tuple(found)


def _input(picture: Picture, role: str) -> Input:
    if isinstance(picture, Result):
        rgb, pixels = picture.image, pixel_hash(picture.image)
        parent = picture.receipt if pixels == picture.receipt.pixels else None  # its image may have been drawn on
        return Input(role=role, image=rgb, pixels=pixels, file=None, receipt=parent.id if parent else None)
    if not isinstance(picture, (Image.Image, str, os.PathLike)):
        raise BadInput(f"got {type(picture).__name__} as picture, allowed a path, a PIL image or a Result, try a path")
    found, rgb = read(picture)
    verdict = examine(found, rgb)
    return Input(
        role=role,
        image=rgb,
        pixels=pixel_hash(rgb),
        file=None if isinstance(picture, Image.Image) else Path(picture).name,
        receipt=verdict.receipt.id if verdict.receipt and verdict.state == "intact" else None,
    )


def _size(request: Request, spec: ModelSpec, row: TaskDefaults, inputs: tuple[Input, ...]) -> Size:
    """What was asked for; sides left out follow the first input picture, or else the row."""
    default = working_size(spec, row, *inputs[0].image.size) if inputs else row.size
    width = _whole("width", _or(request.width, default[0]))
    height = _whole("height", _or(request.height, default[1]))
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


def _whole(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadInput(f"got {name} {value!r}, allowed a whole number, try leaving it out")
    if (low is not None and value < low) or (high is not None and value > high):
        only = f"only {low}" if low == high else f"{low} to {high}"
        nearest = low if low is not None and value < low else high
        raise BadInput(f"got {name} {value}, allowed {only}, try {nearest}")
    return value


def _number(name: str, value: object, low: float, high: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise BadInput(f"got {name} {value!r}, allowed a number, try leaving it out")
    if not low <= value <= high:  # nor is NaN
        raise BadInput(f"got {name} {value}, allowed {low:g} to {high:g}, try {low if value < low else high:g}")
    return float(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise BadInput(f"got {name} {value!r}, allowed true or false, try leaving it out")
    return value


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
