"""What is asked for, checked once and completely here, and what comes back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from fluxloom.core.solvers import Run
from fluxloom.core.specs import MODELS, ModelSpec, Size, TaskDefaults
from fluxloom.errors import BadInput
from fluxloom.infer.canvas import Margins
from fluxloom.infer.checks import either, flag, number, whole
from fluxloom.infer.control import WITH_MODEL, DepthModel
from fluxloom.infer.loras import Lora, ResolvedLora, resolve_loras
from fluxloom.infer.pace import quality_of, solver_of, tolerance_of, walker
from fluxloom.infer.pictures import MAX_PIXELS, pixel_hash, read
from fluxloom.infer.receipt import Receipt, examine
from fluxloom.infer.receipt import save as save_picture
from fluxloom.infer.sizes import allowed_size, working_size
from fluxloom.infer.written import MAX_PROMPT
from fluxloom.infer.written import Written as Written

MAX_STEPS = 1_000
MAX_PICTURES = 1_000
MAX_SCALE = 100.0  # of guidance and true CFG; trained and useful values are under 40
MAX_SEED = 2**64 - 1  # what torch's generator takes
MAX_REFERENCES = 10  # of a megapixel each: 40,000 tokens beside those of the picture
MAX_MARGIN = 8_192  # pixels
MAX_WEIGHT = 10.0  # of a picture among words
POSITIONS = ("index", "offset")
_ROLES = {"context": "edit", "image": "redux"}  # of references, and the task that they make
_PICTURES = {"edit": "references", "fill": "init with mask", "control": "control", "redux": "references as image"}
_WORDLESS = ("fill", "redux")  # tasks in which the prompt may be empty, as in the official command line
STRENGTH = 0.8  # of an init picture, as in the official demo


class PromptWarning(UserWarning):
    """A part of a request does not reach the model."""


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
    """A picture that the drawing looks at.

    role    ``context``: a picture that an instruction edits or takes from; ``image``: one that stands for words (Redux)
    weight  of an ``image``: how strongly it speaks, 0 to 10
    """

    image: Picture
    role: str = "context"
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that can be asked for. Fields left at None take the model's own values; none is ever ignored.

    prompt        what to draw, or with a reference: what to change; at most 2,000 characters. It may be empty where
                  a picture says enough: with a mask for a Fill model, with pictures for Redux
    negative      what not to draw; needs ``true_cfg`` over 1
    prompt_t5     another text for T5 alone, where the model has T5; ``prompt`` then goes to CLIP
    references    pictures to edit or to take from, up to 10; or, for Redux, pictures that stand for words
    positions     of several references: ``index`` (each on a plane of its own) or ``offset`` (side by side on one)
    init          a picture to start from instead of pure noise, kept the more the smaller ``strength`` is; with
                  ``mask`` or ``expand``: the picture of which a part is repainted
    strength      0 < strength <= 1: how much of the path is walked from ``init``; 0.8 unless given, and the whole path
                  where a part is repainted
    mask          of the size of ``init``: white (or transparent) is repainted, black stays, grey is between. A Fill
                  model sees what stays; with any other the latent of what stays is led back to the picture's own
    expand        (left, top, right, bottom): pixels of new canvas around ``init``, in its own scale, to be painted
    control       a picture whose edges or depth the drawing follows, for a model that was taught to
    control_ready ``control`` is itself a picture of edges or depth, and taken as it is
    control_model path of a depth model (ONNX) that makes the depth map of ``control``; runs in onnxruntime
    loras         LoRAs to draw with, up to 16: :class:`Lora`, or paths of files, which then count with weight 1
    width, height in pixels: multiples of 16 (Fill: 32) that the model allows. Left out, they are the model's own, or
                  follow the first input picture (:func:`sizes.working_size`); that is resized without cropping
    n             how many pictures; picture k takes seed + k
    quality       draft, standard (what the model's tasks say) or best: the steps, solver and tolerance that the model
                  has for it, where they are left out
    steps         1 to 1,000; ``adaptive`` takes it as the greatest length of its first step
    guidance      a number that the model was taught to follow (dev and its kin)
    true_cfg      classifier-free guidance by a second evaluation; 1 is off
    solver        a name of ``core.solvers.SOLVERS``
    tolerance     of the ``adaptive`` solver: 0.0001 to 1, the smaller the more steps
    shift         whether times are shifted towards noise for larger pictures
    text_length   tokens of text given to the model
    seed          0 to 2**64 - 1; drawn and recorded where left out
    written       how ``prompt`` came to be, for the receipt: :class:`Written`, or its JSON; changes no picture
    """

    prompt: str
    negative: str = ""
    prompt_t5: str | None = None
    references: tuple[Reference, ...] = ()
    positions: str | None = None
    init: Picture | None = None
    strength: float | None = None
    mask: Picture | None = None
    expand: Margins | None = None
    control: Picture | None = None
    control_ready: bool = False
    control_model: str | os.PathLike[str] | None = None
    loras: Sequence[Lora | str | os.PathLike[str]] = ()
    width: int | None = None
    height: int | None = None
    n: int = 1
    quality: str | None = None
    steps: int | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    solver: str | None = None
    tolerance: float | None = None
    shift: bool | None = None
    text_length: int | None = None
    seed: int | None = None
    written: Written | Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Input:
    """A picture that goes in, decoded: its role (``context``, ``image``, ``init``, ``mask`` or ``control``), where it
    came from, what it hashes to; of an ``image`` its weight."""

    role: str
    image: Image.Image
    pixels: str
    file: str | None
    receipt: str | None
    weight: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """As a receipt records it."""
        left_out = ("image",) if self.role == "image" else ("image", "weight")
        found = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in left_out}
        return {**found, "size": list(self.image.size)}


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A request without open ends: every field set and checked, every picture decoded."""

    task: str
    prompt: str
    prompt_t5: str | None
    negative: str
    inputs: tuple[Input, ...]
    positions: str
    strength: float | None
    expand: Margins | None
    control_ready: bool
    control_model: DepthModel | None
    loras: tuple[ResolvedLora, ...]
    width: int
    height: int
    n: int
    quality: str
    steps: int
    guidance: float | None
    true_cfg: float
    solver: str
    tolerance: float | None
    shift: bool
    text_length: int
    seed: int
    written: Written | None

    @property
    def first_step(self) -> int:
        """The step at which the path is entered: later than 0 where it starts from an init picture."""
        return 0 if self.strength is None else _first_step(self.strength, self.steps)

    @property
    def walk(self) -> Callable[[Tensor, Sequence[float]], Run]:
        """The solver, with its tolerance where it has one."""
        return walker(self.solver, self.tolerance)

    def input(self, role: str) -> Input | None:
        """The input picture of a role."""
        return next(iter(self.all_of(role)), None)

    def all_of(self, role: str) -> list[Input]:
        """All input pictures of a role, in their order."""
        return [found for found in self.inputs if found.role == role]

    @property
    def repaints(self) -> bool:
        """Whether a part of the init picture stays."""
        return self.expand is not None or self.input("mask") is not None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a receipt records them; pictures are recorded beside."""
        found = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "inputs"}
        expand = None if self.expand is None else list(self.expand)
        model, written = (one and one.to_dict() for one in (self.control_model, self.written))
        loras = [one.to_dict() for one in self.loras]
        return {**found, "expand": expand, "control_model": model, "loras": loras, "written": written}


def resolve(request: Request, spec: ModelSpec) -> Resolved:
    """Check a request against a model and fill in what it leaves open. Raises BadInput."""
    task = _task(request, spec)
    row = _row(spec, task)
    quality = quality_of(request.quality)
    named = None if request.solver is None else solver_of(request.solver)
    pace = row.pace(quality, named)
    steps = whole("steps", either(request.steps, pace.steps), 1, MAX_STEPS)
    solver = named or pace.solver
    n = whole("n", request.n, 1, MAX_PICTURES)
    true_cfg = number("true_cfg", either(request.true_cfg, row.true_cfg), 1.0, MAX_SCALE)
    seed = int.from_bytes(os.urandom(4), "little") if request.seed is None else request.seed
    inputs = _inputs(request)
    expand = _expand(request, inputs)
    width, height = _size(request, spec, row, inputs, expand)
    return Resolved(
        task=task,
        prompt=_prompt(request.prompt, task),
        prompt_t5=_prompt_t5(request.prompt_t5, spec),
        negative=_negative(request.negative, true_cfg),
        inputs=inputs,
        positions=_positions(request),
        strength=_strength(request, steps),
        expand=expand,
        control_ready=_control_ready(request),
        control_model=_control_model(request, spec),
        loras=resolve_loras(request.loras, spec),
        width=width,
        height=height,
        n=n,
        quality=quality,
        steps=steps,
        guidance=_guidance(request, spec, row),
        true_cfg=true_cfg,
        solver=solver,
        tolerance=tolerance_of(request.tolerance, solver, pace),
        shift=flag("shift", either(request.shift, spec.shift)),
        text_length=_text_length(request.text_length, spec),
        seed=whole("seed", seed, 0, MAX_SEED - n + 1),
        written=Written.of(request.written),
    )


def _task(request: Request, spec: ModelSpec) -> str:
    """What is asked for, by what is given. Repainting is a task of its own where the model was taught it; any other
    model repaints on the way of its own tasks."""
    for reference in request.references:
        if reference.role not in _ROLES:
            raise BadInput(
                f"got a reference with role {reference.role!r}, allowed {' or '.join(_ROLES)}, try leaving it out"
            )
    given = {_ROLES[reference.role] for reference in request.references}
    if request.control is not None:
        given.add("control")
    if (request.mask is not None or request.expand is not None) and spec.task("fill"):
        given.add("fill")
    if len(given) > 1:
        raise BadInput(f"got pictures for {' and '.join(sorted(given))}, allowed one task a request, try two requests")
    return next(iter(given), "generate")


def _row(spec: ModelSpec, task: str) -> TaskDefaults:
    row = spec.task(task)
    if row is None:
        others = [other.name for other in MODELS.values() if other.task(task)]
        # Who gave no picture to a model that needs one is told of the picture, not of another model.
        near = others if task != "generate" else [_PICTURES[own] for own in spec.tasks]
        raise BadInput(f"got {task} for {spec.name}, allowed {', '.join(spec.tasks)}, try {' or '.join(near)}")
    return row


def _prompt(prompt: object, task: str) -> str:
    what = "an instruction" if task == "edit" else "a prompt"
    example = "make the sky red" if task == "edit" else "a red bicycle on the beach"
    if not isinstance(prompt, str) or not (prompt.strip() or task in _WORDLESS):
        got = "an empty text" if isinstance(prompt, str) else type(prompt).__name__
        raise BadInput(f"got {got} as prompt, allowed {what} in words, try {example!r}")
    return _short(prompt, "prompt")


def _prompt_t5(prompt: object, spec: ModelSpec) -> str | None:
    if prompt is None:
        return None
    if spec.text is not None:
        raise BadInput(f"got prompt_t5 for {spec.name}, which has no T5, allowed none, try prompt")
    if not isinstance(prompt, str):
        raise BadInput(f"got {type(prompt).__name__} as prompt_t5, allowed a text, try leaving it out")
    return _short(prompt, "prompt_t5")


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
    if request.strength is None and (request.mask is not None or request.expand is not None):
        return None
    strength = number("strength", either(request.strength, STRENGTH), 0.0, 1.0)
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
        return number("guidance", either(request.guidance, row.guidance), 0.0, MAX_SCALE)
    if request.guidance is not None:
        raise BadInput(f"got guidance for {spec.name}, which was not taught to follow it, allowed none, try true_cfg")
    return None


def _first_step(strength: float, steps: int) -> int:
    """The official rule."""
    return int((1 - strength) * steps)


def _text_length(length: int | None, spec: ModelSpec) -> int:
    if length is None:
        return spec.text_length
    # A tower of the model's own has learned one length, padding included.
    return whole("text_length", length, spec.text_length if spec.text else 1, spec.text_length)


def _positions(request: Request) -> str:
    if request.positions is None:
        return POSITIONS[0]
    if request.positions not in POSITIONS:
        raise BadInput(f"got positions {request.positions!r}, allowed {', '.join(POSITIONS)}, try {POSITIONS[0]}")
    if sum(reference.role == "context" for reference in request.references) < 2:
        raise BadInput("got positions without several references, allowed only with them, try leaving it out")
    return request.positions


def _inputs(request: Request) -> tuple[Input, ...]:
    """All pictures, decoded: references, then init, mask, control. What the size follows comes first."""
    if len(request.references) > MAX_REFERENCES:
        got = len(request.references)
        raise BadInput(f"got {got} references, allowed {MAX_REFERENCES}, try the {MAX_REFERENCES} that matter most")
    found = [input_of(item.image, item.role, _weight(item)) for item in request.references]
    for role in ("init", "mask", "control"):
        picture = getattr(request, role)
        if picture is not None:
            found.append(input_of(picture, role))
    if request.mask is not None:
        _check_mask(request, found)
    return tuple(found)


def _weight(reference: Reference) -> float:
    if reference.role == "context" and reference.weight != 1:
        raise BadInput(f"got a context reference with weight {reference.weight!r}, allowed 1, try leaving it out")
    return number("weight", reference.weight, 0.0, MAX_WEIGHT)


def _check_mask(request: Request, inputs: list[Input]) -> None:
    if request.init is None:
        raise BadInput("got mask without init, allowed only with the picture that it belongs to, try init")
    sizes = {found.role: found.image.size for found in inputs}
    if sizes["mask"] != sizes["init"]:
        (w, h), (width, height) = sizes["mask"], sizes["init"]
        raise BadInput(f"got a mask of {w}x{h} for a picture of {width}x{height}, allowed the same size, try resizing")
    mask = next(found.image for found in inputs if found.role == "mask")
    if mask.convert("L").getbbox() is None and request.expand is None:
        raise BadInput("got a mask that is black all over, allowed some white: what is repainted, try inverting it")


def _expand(request: Request, inputs: tuple[Input, ...]) -> Margins | None:
    given: object = request.expand
    if given is None:
        return None
    if request.init is None:
        raise BadInput("got expand without init, allowed only with a picture to expand, try init")
    if not isinstance(given, (tuple, list)) or len(given) != 4:
        raise BadInput(f"got expand {given!r}, allowed (left, top, right, bottom) in pixels, try (0, 0, 256, 0)")
    left, top, right, bottom = (whole("expand", side, 0, MAX_MARGIN) for side in given)
    if not left + top + right + bottom:
        raise BadInput("got expand by 0 pixels all round, allowed more on some side, try leaving it out")
    width, height = next(found.image.size for found in inputs if found.role == "init")
    if (left + width + right) * (top + height + bottom) > MAX_PIXELS:
        raise BadInput(
            f"got expand {(left, top, right, bottom)} around {width}x{height} pixels, allowed at most {MAX_PIXELS:,} "
            "in all, try less"
        )
    return left, top, right, bottom


def _control_ready(request: Request) -> bool:
    ready = flag("control_ready", request.control_ready)
    if ready and request.control is None:
        raise BadInput("got control_ready without control, allowed only with a control picture, try control")
    if ready and request.control_model is not None:
        raise BadInput("got control_model with control_ready, allowed one of the two, try leaving out control_ready")
    return ready


def _control_model(request: Request, spec: ModelSpec) -> DepthModel | None:
    wanted = spec.control in WITH_MODEL and request.control is not None
    if request.control_model is None:
        if wanted and not request.control_ready:
            raise BadInput(
                f"got a picture to take {spec.control} from and no model to do it, allowed a {spec.control} map, "
                "try control_ready with a map, or control_model"
            )
        return None
    if not wanted:
        raise BadInput(f"got control_model for {spec.name}, allowed where depth is followed, try leaving it out")
    return DepthModel.of(request.control_model)


def input_of(picture: Picture, role: str, weight: float = 1.0) -> Input:
    """A picture decoded and hashed, with the receipt that it carries."""
    if isinstance(picture, Result):
        rgb, pixels = picture.image, pixel_hash(picture.image)
        parent = picture.receipt if pixels == picture.receipt.pixels else None  # its image may have been drawn on
        source = parent.id if parent else None
        return Input(role=role, image=rgb, pixels=pixels, file=None, receipt=source, weight=weight)
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
        weight=weight,
    )


def _size(
    request: Request, spec: ModelSpec, row: TaskDefaults, inputs: tuple[Input, ...], expand: Margins | None
) -> Size:
    """What was asked for; sides left out follow the first input picture, with its new canvas, or else the row."""
    default = row.size
    if inputs:
        margins = expand if expand is not None and inputs[0].role == "init" else (0, 0, 0, 0)
        default = working_size(spec, row, *inputs[0].image.size, margins)
    return allowed_size(
        spec, whole("width", either(request.width, default[0])), whole("height", either(request.height, default[1]))
    )
