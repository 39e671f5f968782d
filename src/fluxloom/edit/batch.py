"""The batch darkroom: the same steps for every picture of a folder or a list, at full resolution, with all that the
files hold; to be stopped and taken up again at any time."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fluxloom.edit.drift import meters
from fluxloom.edit.journal import FILE as JOURNAL
from fluxloom.edit.journal import Journal
from fluxloom.edit.lock import Lock
from fluxloom.edit.page import page, table
from fluxloom.edit.photo import FORMATS, READABLE, Photo, scaled
from fluxloom.edit.workflow import Convert, Edit, Resize, Step, describe, field_of
from fluxloom.errors import BadInput, FluxloomError, OutputError
from fluxloom.infer import files, pictures
from fluxloom.infer.finish import Finisher
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.request import Picture, Reference, Request, Resolved, Result, resolve

REPORT, TABLE, THUMBS = "report.html", "report.csv", "report-thumbs"
THUMB = 160  # pixels a side
_SUFFIXES = {form: suffix for suffix, form in reversed(FORMATS.items())}
_CHECKED = (256, 256)  # size of the picture that settings are tried on before the work


@dataclass(frozen=True)
class Task:
    """One picture of a batch: where it is, what it is called in the report, what its file shall be called, and what is
    done with it. ``where``: the line of a list that asks for it."""

    path: Path
    source: str
    stem: str
    steps: tuple[Step, ...]
    where: str = ""


# ---------------------------------------------------------------------------------------------- what there is to do


def tasks(given: Path, steps: Sequence[Step], out: Path) -> list[Task]:
    """The pictures of a folder (and the folders in it), or the rows of a CSV file with a column ``path`` and perhaps
    ``instruction`` and fields of a request. Raises BadInput, with the line of what is wrong."""
    if given.is_dir():
        if given.resolve() == out.resolve():
            raise BadInput(f"got {str(out)!r} for the pictures and for --out, allowed two folders, try another --out")
        names = [str(path.relative_to(given)) for path in _pictures(given, out.resolve())]
        if not names:
            raise BadInput(f"got {str(given)!r} without pictures, allowed {', '.join(READABLE)}, try another folder")
        own = _for_row(steps, None, {}, "")
        found = [Task(given / name, name, name, own) for name in names]
    elif given.suffix.lower() == ".csv" and given.is_file():
        found = list(_listed(given, steps))
    else:
        raise BadInput(f"got {str(given)!r}, allowed a folder or a .csv file with a column path, try a folder")
    return _named(found)


def _pictures(folder: Path, out: Path) -> Iterator[Path]:
    """Of a folder and those in it, but neither hidden ones nor what a batch has written."""
    for path in sorted(folder.rglob("*")):
        inside = [one for one in path.parents if folder in one.parents]
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        written = any(one.resolve() == out or (one / JOURNAL).is_file() for one in inside)
        if path.suffix.lower() in READABLE and not hidden and not written and path.is_file():
            yield path


def _listed(given: Path, steps: Sequence[Step]) -> Iterator[Task]:
    try:
        reader = csv.DictReader(io.StringIO(given.read_text("utf-8-sig"), newline=""), restkey="", strict=True)
        rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"got {str(given)!r} ({error}), allowed CSV in UTF-8, try another") from error
    if not rows or "path" not in (reader.fieldnames or ()):
        got = ", ".join(reader.fieldnames or ()) or "nothing"
        raise BadInput(f"got columns {got} in {given.name}, allowed path, instruction and fields, try path,instruction")
    for line, row in rows:
        where = f"{given.name}, line {line}: "
        if "" in row or not row["path"] or None in row.values():
            raise BadInput(f"{where}got a row without a path or of another length, allowed a cell a column, try quotes")
        try:
            own = {name: field_of(name, cell) for name, cell in row.items() if name not in _NAMED and cell}
        except BadInput as error:
            raise BadInput(f"{where}{error}") from error
        path = Path(row["path"])
        stem = path.name if path.is_absolute() or ".." in path.parts else str(path)
        stem = stem if path.name else "picture"
        yield Task(
            given.parent / path, row["path"], stem, _for_row(steps, row.get("instruction") or None, own, where), where
        )


_NAMED = ("path", "instruction")


def _for_row(steps: Sequence[Step], instruction: str | None, own: Mapping[str, Any], where: str) -> tuple[Step, ...]:
    found = tuple(step.of_row(instruction, own) if isinstance(step, Edit) else step for step in steps)
    if any(isinstance(step, Edit) and not step.instruction for step in found):
        raise BadInput(f"{where}got no instruction, allowed one in words, try 'make the sky red'")
    return found


def _named(found: list[Task]) -> list[Task]:
    """With stems that differ, also where case does not count and where files of one name become one format."""
    taken: dict[str, int] = {}
    named = []
    for task in found:
        stem = Path(task.stem)
        if stem.suffix.lower() not in FORMATS:
            stem = stem.with_name(stem.name + (".jpg" if stem.suffix.lower() in (".jpe", ".jfif") else ".png"))
        plain = str(stem.with_suffix("") if _converts(task.steps) else stem).lower()
        number = taken[plain] = taken.get(plain, 0) + 1
        named.append(replace(task, stem=str(stem if number == 1 else stem.with_stem(f"{stem.stem}-{number}"))))
    return named


def _converts(steps: Sequence[Step]) -> bool:
    return any(isinstance(step, Convert) for step in steps)


# ---------------------------------------------------------------------------------------------------- doing it


@dataclass(frozen=True)
class Scale:
    """Finisher: the picture at another size."""

    width: int
    height: int
    name: str = "resize"

    def settings(self) -> dict[str, Any]:
        """What replay needs to do it again."""
        return {"width": self.width, "height": self.height}

    def __call__(self, image: Image.Image, request: Resolved) -> tuple[Image.Image, dict[str, Any]]:
        """The resized picture; there is nothing to report."""
        return Image.fromarray(scaled(np.asarray(image), self.width, self.height)), {}


@dataclass
class _Tap:
    """A finisher that lets on what went in and what came out."""

    inner: Finisher
    given: Image.Image | None = None
    made: Image.Image | None = None

    @property
    def name(self) -> str:
        return self.inner.name

    def settings(self) -> dict[str, Any]:
        return self.inner.settings()

    def __call__(self, image: Image.Image, request: Resolved) -> tuple[Image.Image, dict[str, Any]]:
        self.given = image
        self.made, report = self.inner(image, request)
        return self.made, report


class Batch:
    """Tasks, done one after another; what an earlier run in the same folder has finished is not done again.

    workers  pictures that are read, locked and written at a time; the model draws one at a time. Ctrl-C then ends
             those that are begun, and a killed process loses as many

    Raises BadInput for settings that the model does not take and for a folder that holds other files.
    """

    def __init__(self, pipeline: Pipeline, todo: Sequence[Task], out: Path, workers: int = 1) -> None:
        self.pipeline, self.todo, self.out, self.workers = pipeline, list(todo), out, workers
        self._settings = self._checked()
        self._journal = Journal(out)
        self._drawing = threading.Lock()
        self._rows: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *error: object) -> None:
        self._journal.close()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What is known by now, in the order of the tasks."""
        return [self._rows[index] for index in sorted(self._rows)]

    def run(self) -> Iterator[dict[str, Any]]:
        """The row of each picture as it is done; its ``state`` is ``done`` or ``failed``, and ``resumed`` tells what
        was finished before. A picture that fails stops nothing. Raises OutputError where nothing can be written."""
        if self.workers == 1:
            for index in range(len(self.todo)):
                yield self._do(index)
            return
        pool = ThreadPoolExecutor(self.workers)
        try:
            for future in as_completed([pool.submit(self._do, index) for index in range(len(self.todo))]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def report(self, title: str) -> list[Path]:
        """Write the page and the table of what is known by now."""
        written = {REPORT: page(title, self.rows), TABLE: table(self.rows)}
        return [files.write(self.out / name, text.encode()) for name, text in written.items()]

    def _checked(self) -> list[Any]:
        """The settings of each task as the model takes them, for the journal: all that the pictures depend on."""
        known: dict[str, Any] = {}
        found = []
        for task in self.todo:
            asked = json.dumps([describe(step) for step in task.steps], sort_keys=True, default=str)
            if asked not in known:
                try:
                    known[asked] = [self._resolved(step) for step in task.steps]
                except BadInput as error:
                    raise BadInput(f"{task.where}{error}") from error
            found.append(known[asked])
        return found

    def _resolved(self, step: Step) -> dict[str, Any]:
        if not isinstance(step, Edit):
            return describe(step)
        resolved = resolve(_request(step, Image.new("RGB", _CHECKED), None), self.pipeline.runtime.spec)
        for lora in resolved.loras:
            self.pipeline.runtime.loras.read(lora)
        seed = {} if "seed" in step.fields else {"seed": None}  # it will follow the picture
        return {"do": "edit", "lock": step.lock, **resolved.to_dict(), **seed}

    def _do(self, index: int) -> dict[str, Any]:
        task, began = self.todo[index], time.perf_counter()
        row: dict[str, Any] = {"source": task.source}
        try:
            row |= self._done(task, self._settings[index])
            row["seconds"] = row.get("seconds", round(time.perf_counter() - began, 3))
        except OutputError:
            raise
        except FluxloomError as error:
            row |= {"state": "failed", "error": str(error)}
        except Exception as error:  # one bad picture, whatever it does, is not the end of the others
            row |= {"state": "failed", "error": f"got an unexpected {type(error).__name__}: {error}"}
        self._rows[index] = row
        return row

    def _done(self, task: Task, settings: Any) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            content = hashlib.sha256(task.path.read_bytes()).hexdigest()
        except OSError as error:
            raise BadInput(
                f"got {task.source!r}, which cannot be read ({error.strerror}), allowed a picture"
            ) from error
        made = [content, task.stem, self.pipeline.runtime.content, settings]
        key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
        known = self._journal.done(key)
        if known is not None:
            return {**known, "resumed": True}
        original = Photo.open(task.path)
        photo, result, facts = self._worked(original, task, content)
        quality = next((step.quality for step in task.steps if isinstance(step, Convert)), None)
        name = _file_name(task, photo.form)
        saved = photo.save(self.out / name, None if result is None else result.receipt, quality)
        thumb = f"{THUMBS}/{name}.jpg"
        files.write(self.out / thumb, files.encode(_pair(original.flat(), saved.picture), "JPEG", quality=80))
        row = {
            "key": key, "source": task.source, "output": name, "thumb": thumb, "state": "done",
            "sha256": hashlib.sha256(saved.data).hexdigest(), "width": photo.size[0], "height": photo.size[1],
            "identical": saved.identical, "notes": list(saved.notes), **facts,
            "seconds": round(time.perf_counter() - began, 3),
        }  # fmt: skip
        self._journal.add(row)
        return row

    def _worked(self, photo: Photo, task: Task, content: str) -> tuple[Photo, Result | None, dict[str, Any]]:
        """A photograph after all steps, the last edit of it, and what is to be reported of that."""
        source: Picture = task.path
        result: Result | None = None
        facts: dict[str, Any] = {}
        for number, (step, sizes) in enumerate(_grouped(task.steps)):
            if isinstance(step, Edit):
                seed = int.from_bytes(hashlib.sha256(f"{content} {number}".encode()).digest()[:4], "big")
                photo, result, facts = self._edited(photo, _request(step, source, seed), step.lock, sizes)
                same = np.array_equal(np.asarray(result.image), np.asarray(photo.flat()))
                source = result if same else photo.flat()
            elif isinstance(step, Resize):
                photo = photo.resized(*step.size(*photo.size))
                source = photo.flat()
            else:
                photo = step(photo)
        return photo, result, facts

    def _edited(
        self, photo: Photo, request: Request, lock: str, sizes: Sequence[Resize]
    ) -> tuple[Photo, Result, dict[str, Any]]:
        before, ends = photo.flat(), [photo.size]
        for resize in sizes:
            ends.append(resize.size(*ends[-1]))
        first: Finisher = Lock() if lock == "auto" else Scale(*photo.size)
        tap = _Tap(first)
        with self._drawing:
            result = self.pipeline.run(request, finishers=(tap, *(Scale(*size) for size in ends[1:])))[0]
        assert tap.given is not None
        assert tap.made is not None
        photo = photo.edited(before, tap.made)
        for size in ends[1:]:
            photo = photo.resized(*size)
        photo = photo.matched(result.image)  # so that the receipt's picture is in the file
        facts = _facts(np.asarray(before), np.asarray(tap.made), tap.given)
        report = result.receipt.data["finish"][0]["report"] if lock == "auto" else {}
        warnings = [report["note"]] if report.get("note") and not report.get("whole") else []
        return photo, result, {
            **facts, "whole": bool(report.get("whole")), "instruction": request.prompt, "seed": result.seed,
            "lock": report, "receipt": result.receipt.id, "warnings": [*warnings, *result.warnings],
        }  # fmt: skip


def _request(step: Edit, source: Picture, seed: int | None) -> Request:
    assert step.instruction is not None
    asked = {"seed": seed, **step.fields}
    return Request(prompt=step.instruction, references=(Reference(source),), written=step.written, **asked)


def _grouped(steps: Sequence[Step]) -> list[tuple[Step, list[Resize]]]:
    """The steps, an edit with the resizing that follows it, which its receipt tells of."""
    found: list[tuple[Step, list[Resize]]] = []
    for step in steps:
        if isinstance(step, Resize) and found and isinstance(found[-1][0], Edit):
            found[-1][1].append(step)
        else:
            found.append((step, []))
    return found


def _facts(before: NDArray[np.uint8], after: NDArray[np.uint8], drawn: Image.Image) -> dict[str, Any]:
    """How much an edit changed, and how far the model's own drawing is from the rest, at the size that it worked at:
    what was locked has not drifted, and would tell nothing of how the edit went."""
    changed = (before != after).any(axis=-1)
    small = pictures.resize(Image.fromarray(before), *drawn.size)
    where = cv2.resize(changed.astype(np.float32), drawn.size, interpolation=cv2.INTER_AREA) > 0
    return {**meters(np.asarray(small), np.asarray(drawn), where).to_dict(), "changed": float(changed.mean())}


def _file_name(task: Task, form: str) -> str:
    """Of the output: the stem, with another suffix where the format is not what that says."""
    stem = Path(task.stem)
    if FORMATS.get(stem.suffix.lower()) == form:
        return stem.as_posix()
    stem = stem.with_suffix("") if _converts(task.steps) else stem
    return stem.with_name(stem.name + _SUFFIXES[form]).as_posix()


def _pair(before: Image.Image, after: Image.Image) -> Image.Image:
    """Two small pictures side by side."""
    pair = Image.new("RGB", (2 * THUMB, THUMB), "white")
    for left, one in ((0, before), (THUMB, after)):
        small = one.copy()
        small.thumbnail((THUMB - 2, THUMB))
        pair.paste(small, (left + (THUMB - small.width) // 2, (THUMB - small.height) // 2))
    return pair
