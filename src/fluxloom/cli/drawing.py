"""What ``generate`` and ``edit`` share: load a model, watch it draw, save what comes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxloom.cli.lora import weighted
from fluxloom.cli.output import Destination, plain, print_json
from fluxloom.cli.progress import Watch
from fluxloom.errors import BadInput

if TYPE_CHECKING:
    from fluxloom.api import Loom
    from fluxloom.infer.request import Result

_SIZE = re.compile(r"(\d+)(?:[x×](\d+))?", re.IGNORECASE)
MAX_THREADS = 1024


def load(model: str, device: str = "cpu", threads: int | None = None, dtype: str | None = None, **more: Any) -> Loom:
    """The model, ready to draw. ``more`` are further arguments of :func:`fluxloom.api.load`."""
    # Read when torch is loaded. By default GNU OpenMP's threads spin long while they wait: on a machine that has other
    # work a picture then takes 3 to 8 times as long. Never spinning costs a third on an idle one; 2,000 turns cost
    # neither (measured, nano at 256 x 256, two threads on two cores, alone and two at a time).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    import torch

    from fluxloom.api import load as load_model

    if threads is not None:
        if not 1 <= threads <= MAX_THREADS:
            raise BadInput(f"got --threads {threads}, allowed 1 to {MAX_THREADS}, try {torch.get_num_threads()}")
        torch.set_num_threads(threads)
    return load_model(model, device, dtype, **more)


def size_fields(size: str | None) -> dict[str, int]:
    """``256x192`` as fields of a request; ``256`` is square."""
    if size is None:
        return {}
    match = _SIZE.fullmatch(size.strip())
    if match is None or len(size) > 20:
        raise BadInput(f"got --size {size[:20]!r}, allowed WIDTHxHEIGHT in pixels, try 256x256")
    return {"width": int(match[1]), "height": int(match[2] or match[1])}


def margins(text: str | None) -> tuple[int, ...] | None:
    """``0,0,64,0``: left, top, right, bottom."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isdecimal() and len(part) < 6 for part in parts):
        raise BadInput(f"got --expand {text[:20]!r}, allowed left,top,right,bottom in pixels, try 0,0,64,0")
    return tuple(map(int, parts))


def draw(given: Mapping[str, Any], *, verb: str, prompt: str, pictures: Sequence[tuple[Path, str]]) -> None:
    """Run one request; save and name each picture as soon as it is done.

    ``given`` are the options of the command by name: those that are fields of a request go into it. ``pictures``:
    references with their roles.
    """
    asked: dict[str, Any] = {**size_fields(given["size"]), "expand": margins(given.get("expand")), "prompt": prompt}
    place = Destination.at(given["out"], given["force"])
    glances = given["preview"] or given["preview_decoder"] is not None
    done = []
    with Watch(f"loading {given['model']}", quiet=given["quiet"], preview=glances) as watch:
        more = {name: given[name] for name in ("variant", "base", "offline", "preview_decoder")}
        loom = load(given["model"], given["device"], given["threads"], given["dtype"], progress=watch.part, **more)
        from fluxloom.infer.loras import Lora
        from fluxloom.infer.request import Reference, Request, Result

        asked |= {name: given[name] for name in _names(Request) if name in given and name not in asked}
        asked["references"] = tuple(Reference(path, role) for path, role in pictures)
        asked["loras"] = tuple(Lora(*weighted(word)) for word in given["lora"] or ())
        request = Request(**asked)
        events = loom.stream(request)  # raises BadInput before anything is drawn
        place.probe()
        watch.what = verb
        for event in events:
            if isinstance(event, Result):
                path = event.save(place.path(prompt, event.seed, many=request.n > 1), receipt=given["receipt"])
                done.append((path, event))
                if not given["json"]:
                    print(path, flush=True)
            else:
                watch.step(event)
    for note in done[0][1].warnings:
        print(plain(f"fluxloom: note: {note}"), file=sys.stderr)
    if given["json"]:
        print_json({"pictures": [_facts(path, result) for path, result in done]})


def _names(form: type[Any]) -> list[str]:
    return [item.name for item in fields(form)]


def _facts(path: Path, result: Result) -> dict[str, Any]:
    return {
        "path": str(path),
        "width": result.image.width,
        "height": result.image.height,
        "seed": result.seed,
        "seconds": result.receipt.data["seconds"],
        "receipt": result.receipt.id,
        "warnings": list(result.warnings),
    }
