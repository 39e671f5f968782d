"""What ``generate`` and ``edit`` share: load a model, watch it draw, save what comes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxloom.cli.lora import weighted
from fluxloom.cli.output import Destination, plain, print_json
from fluxloom.cli.progress import Watch
from fluxloom.errors import BadInput, Failure

if TYPE_CHECKING:
    from fluxloom.api import Loom
    from fluxloom.infer.finish import Finisher
    from fluxloom.infer.loras import Lora
    from fluxloom.infer.preview import Preview
    from fluxloom.infer.request import Request, Result
    from fluxloom.infer.written import Written

_SIZE = re.compile(r"(\d+)(?:[x×](\d+))?", re.IGNORECASE)
MAX_THREADS = 1024


def load(model: str, device: str = "auto", threads: int | None = None, dtype: str | None = None, **more: Any) -> Loom:
    """The model, ready to draw. ``more`` are further arguments of :func:`fluxloom.api.load`."""
    # Read when torch is loaded. By default GNU OpenMP's threads spin long while they wait: on a machine that has other
    # work a picture then takes 3 to 8 times as long. Never spinning costs a third on an idle one; 2,000 turns cost
    # neither (measured, nano at 256 x 256, two threads on two cores, alone and two at a time).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")

    from fluxloom.api import load as load_model

    set_threads(threads)
    return load_model(model, device, dtype, **more)


def set_threads(threads: int | None) -> None:
    """As ``--threads`` says; None: as many as torch takes by itself."""
    import torch

    if threads is not None:
        if not 1 <= threads <= MAX_THREADS:
            raise BadInput(f"got --threads {threads}, allowed 1 to {MAX_THREADS}, try {torch.get_num_threads()}")
        torch.set_num_threads(threads)


def loaded(given: Mapping[str, Any], watch: Watch) -> Loom:
    """The model that the options of a command ask for, ``given`` by name."""
    names = ("variant", "base", "offline", "preview_decoder", "executor", "linears", "attention", "gpus", "vram")
    more = {name: given[name] for name in names if name in given}
    return load(given["model"], given["device"], given["threads"], given["dtype"], progress=watch.part, **more)


def lend(given: Mapping[str, Any]) -> None:
    """First of all in a command with ``--gpus``: have it run by a process a GPU; in all but the first, load the model
    and compute what the first one asks for, never to return."""
    from fluxloom.speed.launch import lends

    if lends(given["gpus"]):
        loaded(given, Watch("", quiet=True))


def loras(words: Sequence[str] | None) -> tuple[Lora, ...]:
    """What ``--lora FILE[:WEIGHT]`` says, each time it was given."""
    from fluxloom.infer.loras import Lora

    return tuple(Lora(*weighted(word)) for word in words or ())


def size_fields(size: str | None) -> dict[str, int]:
    """``256x192`` as fields of a request; ``256`` is square."""
    if size is None:
        return {}
    match = _SIZE.fullmatch(size.strip())
    if match is None or len(size) > 20:
        raise BadInput(f"got --size {size[:20]!r}, allowed WIDTHxHEIGHT in pixels, try 256x256")
    return {"width": int(match[1]), "height": int(match[2] or match[1])}


def sides(flag: str, text: str | None) -> tuple[int, int, int, int] | None:
    """``0,0,64,0``: left, top, right, bottom."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isdecimal() and len(part) < 6 for part in parts):
        raise BadInput(f"got {flag} {text[:20]!r}, allowed left,top,right,bottom in pixels, try 0,0,64,0")
    left, top, right, bottom = map(int, parts)
    return left, top, right, bottom


def draw(
    given: Mapping[str, Any],
    *,
    verb: str,
    prompt: str | None,
    pictures: Sequence[tuple[Path, str]],
    picture: Path | None = None,
) -> None:
    """Run one request; save and name each picture as soon as it is done.

    ``given`` are the options of the command by name: those that are fields of a request go into it. ``pictures``:
    references with their roles; ``picture``: the one that is edited, and that the edit is locked onto.
    """
    text, written = _composed(given, prompt, "generate" if picture is None else "edit")
    box = sides("--box", given.get("box"))
    own: dict[str, Any] = {**size_fields(given["size"]), "expand": sides("--expand", given.get("expand"))}
    own |= {"prompt": text, "written": written}
    best = _best(given)
    place = Destination.at(given["out"], given["force"])
    glances = given["preview"] or given["preview_decoder"] is not None
    done = []
    with Watch(f"loading {given['model']}", quiet=given["quiet"], preview=glances) as watch:
        loom = loaded(given, watch)
        from fluxloom.api import within
        from fluxloom.infer.request import Reference, Request, Result

        asked = {name: given[name] for name in _names(Request) if name in given} | own
        asked["references"] = tuple(Reference(path, role) for path, role in pictures)
        asked["loras"] = loras(given["lora"])
        inside, finishers = within(picture, given["lock"], given["mask"], box) if picture else ({}, ())
        request = Request(**{**asked, **inside})
        # Raises BadInput before anything is drawn.
        events = loom.stream(request, finishers) if best is None else best(loom, request, finishers, watch)
        place.probe()
        watch.what = verb
        for event in events:
            if isinstance(event, Result):
                path = event.save(place.path(text, event.seed, many=request.n > 1), receipt=given["receipt"])
                done.append((path, event))
                if not given["json"]:
                    print(path, flush=True)
                    if (told := kept(path, event)) and not given["quiet"]:
                        print(plain(told), file=sys.stderr)
            else:
                watch.step(event)
    for note in done[0][1].warnings:
        print(plain(f"fluxloom: note: {note}"), file=sys.stderr)
    if given["json"]:
        print_json({"pictures": [_facts(path, result) for path, result in done]})


def _best(given: Mapping[str, Any]) -> Callable[..., Iterator[Preview | Result]] | None:
    """What draws instead of a plain stream where the best of several, or none that drifts too far, was asked for."""
    count, words = given.get("best_of"), given.get("max_drift")
    if count is None and words is None:
        return None
    from fluxloom.edit.drift import limits

    allowed = None if words is None else limits(words)

    def draw(loom: Loom, request: Request, finishers: Sequence[Finisher], watch: Watch) -> Iterator[Preview | Result]:
        from fluxloom.edit.best import best_of

        result, tries = best_of(loom.pipeline, request, count or 1, finishers, watch.step, allowed)
        if tries[0].exceeded:
            what = "; ".join(tries[0].exceeded)
            raise Failure(f"got an edit that drifts too far ({what}), allowed {words}, try other seeds with --best-of")
        if len(tries) > 1 and not given["quiet"]:
            scores = ", ".join(f"{one.result.seed}: {one.score:.3g}" for one in tries)
            print(plain(f"fluxloom: note: the best of {len(tries)} (seed: score): {scores}"), file=sys.stderr)
        yield result

    return draw


def _composed(given: Mapping[str, Any], prompt: str | None, task: str) -> tuple[str, Written | None]:
    """The prompt with its template and enhancer, which the user is shown."""
    from fluxloom.edit.templates import compose, told

    text, written = compose(
        task,
        prompt,
        given["template"],
        given["slot"] or (),
        enhancer=given["enhance"],
        seed=given["seed"],
        file=given["templates"],
    )
    if written is not None:
        print(plain(f"fluxloom: note: {told(text, written)}"), file=sys.stderr)
    return text, written


def kept(path: Path, result: Result) -> str | None:
    """What a lock left as it was, in a line; of a file that loses, also how much it lost."""
    from fluxloom.infer.pictures import read
    from fluxloom.infer.replay import equal

    report = _lock(result)
    if report is None:
        return None
    dx, dy = report["shift"]
    told = [
        f"changed {100 * report['changed']:.3g} % of the picture",
        f"{100 * report['identical']:.5g} % of the rest identical",
        f"shift {dx:.1f}, {dy:.1f} px" + (f", scale {report['scale']:.3f}" if report["scale"] != 1 else ""),
    ]
    share = equal(read(path)[1], result.image)
    lost = [] if share == 1 else [f"of its bytes {100 * share:.3g} % survived the file format: PNG keeps all"]
    return "; ".join([*([] if report["whole"] else told), *filter(None, [report["note"]]), *lost])


def _lock(result: Result) -> dict[str, Any] | None:
    """The report of the lock, where there was one."""
    told = result.receipt.data.get("finish", ())
    return next((dict(one["report"]) for one in told if one["name"] == "lock"), None)


def _names(form: type[Any]) -> list[str]:
    return [item.name for item in fields(form)]


def _facts(path: Path, result: Result) -> dict[str, Any]:
    report = _lock(result)
    return {
        "path": str(path),
        "width": result.image.width,
        "height": result.image.height,
        "seed": result.seed,
        "seconds": result.receipt.data["seconds"],
        "receipt": result.receipt.id,
        "warnings": list(result.warnings),
        **({} if report is None else {"lock": report}),
    }
