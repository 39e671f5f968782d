"""Workflows: what is done with each picture of a batch, as a list of steps in a small TOML file.

[[step]]
do = "edit"                       # any scalar field of a request may stand here: seed, steps, guidance ...
instruction = "make the sky red"

[[step]]
do = "template"                   # an instruction from `fluxloom templates`
name = "fog"
slots = { amount = "thin" }

[[step]]
do = "resize"                     # longest, width or height; nothing is cropped
longest = 2048

[[step]]
do = "convert"                    # format: png, jpg, webp or tiff; quality; depth 8 or 16
format = "webp"
quality = 85
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fluxloom.edit.photo import FORMATS, Photo
from fluxloom.edit.templates import compose
from fluxloom.errors import BadInput
from fluxloom.infer.checks import whole
from fluxloom.infer.pictures import MAX_PIXELS, MIN_SIDE
from fluxloom.infer.request import Request
from fluxloom.infer.written import Written

_OWN = (
    "prompt",
    "n",
    "positions",
    "strength",
    "expand",
    "written",
)  # of a request: given otherwise, or for other tasks
_SCALARS = {"int | None": int, "float | None": float, "bool | None": bool, "str": str, "str | None": str}
_TYPES = {item.name: _SCALARS.get(str(item.type)) for item in fields(Request) if item.name not in _OWN}
FIELDS = {name: kind for name, kind in _TYPES.items() if kind is not None}
LOCKS = ("auto", "off")
_STEP = re.compile(r"\s*\[\[\s*step\s*\]\]")


@dataclass(frozen=True)
class Edit:
    """An edit by instruction (None: that of the list of pictures) with fields of a request; see ``lock`` of
    :meth:`fluxloom.api.Loom.edit`."""

    instruction: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    lock: str = "auto"
    written: Written | None = None

    def of_row(self, instruction: str | None, row: Mapping[str, Any]) -> Edit:
        """As a row of a list asks for it: its fields before the step's, its instruction where the step has none."""
        return replace(self, instruction=self.instruction or instruction, fields={**self.fields, **row})


@dataclass(frozen=True)
class Resize:
    """To a width, a height, both, or a longest side; what is left out follows the aspect."""

    width: int | None = None
    height: int | None = None
    longest: int | None = None

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The new size of a picture. Raises BadInput where it is none."""
        if self.longest is not None:
            scale = self.longest / max(width, height)
        else:
            scale = (self.width / width) if self.width is not None else (self.height or height) / height
        wide, high = self.width or max(1, round(width * scale)), self.height or max(1, round(height * scale))
        if min(wide, high) < MIN_SIDE or wide * high > MAX_PIXELS:
            raise BadInput(
                f"got resize to {wide}x{high}, allowed {MIN_SIDE} or more a side and {MAX_PIXELS:,} pixels in all, "
                "try another size"
            )
        return wide, high


@dataclass(frozen=True)
class Convert:
    """To another format, for the file; ``depth``: 8 or 16 bits a channel."""

    format: str
    quality: int | None = None
    depth: int | None = None

    def __call__(self, photo: Photo) -> Photo:
        return photo.converted(self.format, self.depth)


Step = Edit | Resize | Convert


def describe(step: Step) -> dict[str, Any]:
    """As JSON, for settings and reports."""
    return {"do": type(step).__name__.lower(), **asdict(step)}


def load(path: Path) -> tuple[Step, ...]:
    """The steps of a file. Raises BadInput with the line and the step of what is wrong."""
    try:
        text = path.read_text("utf-8")
        tables = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"got {str(path)!r} as workflow ({error}), allowed TOML with [[step]]s, try another") from error
    rows = tables.get("step")
    if tables.keys() - {"step"} or not isinstance(rows, list) or not rows:
        got = ", ".join(tables.keys() - {"step"}) or "no step"
        raise BadInput(f"got {got} in {path.name}, allowed only [[step]]s, try [[step]] with do = 'edit'")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if _STEP.match(line)]
    found: list[Step] = []
    for number, row in enumerate(rows, 1):
        line = f" line {lines[number - 1]}," if len(lines) == len(rows) else ""  # an inline array has no such lines
        try:
            found.append(_step(row))
            _order(found)
        except BadInput as error:
            raise BadInput(f"{path.name},{line} step {number}: {error}") from error
    return tuple(found)


def field_of(name: str, value: Any) -> Any:
    """A field of a request, written as text in a table or with its type in TOML. Raises BadInput."""
    if name not in FIELDS:
        near = get_close_matches(name, FIELDS, n=1)
        raise BadInput(f"got field {name!r}, allowed {', '.join(FIELDS)}, try {near[0] if near else 'leaving it out'}")
    kind = FIELDS[name]
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "1": True, "false": False, "0": False}[value.strip().lower()]
        if isinstance(value, str) or (kind is float and type(value) is int):
            return kind(value)
    except (ValueError, KeyError):
        value = repr(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise BadInput(f"got {name} {value}, allowed {names[kind]}, try leaving it out")
    return value


def _step(row: Any) -> Step:
    makers: dict[str, Callable[[dict[str, Any]], Step]] = {
        "edit": _edit,
        "template": _template,
        "resize": _resize,
        "convert": _convert,
    }
    given = dict(row) if isinstance(row, dict) else {}
    do = given.pop("do", None)
    if do not in makers:
        near = get_close_matches(str(do), makers, n=1) or ["edit"]
        raise BadInput(f"got do = {do!r}, allowed {', '.join(makers)}, try {near[0]!r}")
    return makers[str(do)](given)


def _order(steps: list[Step]) -> None:
    if any(isinstance(step, Convert) for step in steps[:-1]):
        raise BadInput("got a step after convert, allowed convert as the last, try moving it to the end")


def _edit(given: dict[str, Any]) -> Edit:
    instruction, lock = given.pop("instruction", None), given.pop("lock", "auto")
    if instruction is not None and (not isinstance(instruction, str) or not instruction.strip()):
        raise BadInput(f"got instruction {instruction!r}, allowed words, try 'make the sky red'")
    return Edit(instruction, {name: field_of(name, value) for name, value in given.items()}, lock_of(lock))


def lock_of(lock: Any) -> str:
    """``auto`` or ``off``. Raises BadInput."""
    if lock not in LOCKS:
        raise BadInput(f"got lock {lock!r}, allowed {' or '.join(LOCKS)}, try auto")
    return str(lock)


def _template(given: dict[str, Any]) -> Edit:
    name, slots, subject = given.pop("name", None), given.pop("slots", {}), given.pop("subject", None)
    texts = [*slots, *slots.values()] if isinstance(slots, dict) else [None]
    if not isinstance(name, str) or not all(isinstance(one, str) for one in texts):
        raise BadInput(f"got name {name!r} and slots {slots!r}, allowed texts, try name = 'fog'")
    text, written = compose("edit", subject, name, slots)
    return replace(_edit(given), instruction=text, written=written)


def _resize(given: dict[str, Any]) -> Resize:
    _known(given, Resize)
    if not given or ("longest" in given and len(given) > 1):
        got = ", ".join(given) or "nothing"
        raise BadInput(f"got {got} to resize to, allowed longest, or width and height, try longest = 2048")
    return Resize(**{name: whole(name, value, MIN_SIDE, 65_535) for name, value in given.items()})


def _convert(given: dict[str, Any]) -> Convert:
    _known(given, Convert)
    suffix = f".{str(given.get('format')).lower().removeprefix('.')}"
    if suffix not in FORMATS:
        near = ", ".join(name[1:] for name in FORMATS)
        raise BadInput(f"got format {given.get('format')!r}, allowed {near}, try 'png'")
    form, quality, depth = FORMATS[suffix], given.get("quality"), given.get("depth")
    if quality is not None:
        if form in ("PNG", "TIFF"):
            raise BadInput(f"got quality for {form}, which loses nothing, allowed for jpg and webp, try leaving it out")
        whole("quality", quality, 1, 100)
    if depth is not None and (depth not in (8, 16) or (depth == 16 and form not in ("PNG", "TIFF"))):
        raise BadInput(f"got depth {depth!r} for {form}, allowed 8, or 16 for png and tiff, try leaving it out")
    return Convert(form, quality, depth)


def _known(given: Iterable[str], form: type[Any]) -> None:
    names = [item.name for item in fields(form)]
    for name in given:
        if name not in names:
            near = get_close_matches(name, names, n=1) or ["leaving it out"]
            raise BadInput(f"got {name!r}, allowed {', '.join(names)}, try {near[0]}")
