"""What locked pixels keep and cost: nano's edits of the test world against exact renders, and registration against
known shifts. ``python bench/lock.py OUT.json [CASES]``; five cases of a kind take ten minutes on two cores."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

import fluxloom as fl
from fluxloom.edit.lock import find_change, lock
from fluxloom.evals.cases import SIZE, case_of
from fluxloom.evals.world import round_trip
from fluxloom.infer.request import Reference, Request
from fluxloom.measure.pixels import psnr
from fluxloom.measure.register import Registration, register
from fluxloom.world import render

LOCAL = ("add", "remove", "replace", "recolour", "resize", "move", "swap", "sign_text", "sign_add", "sign_remove")
GLOBAL = ("background", "time", "weather", "season", "filter", "style")
FULL = 3 * SIZE  # of the original; the model works at SIZE
SEED = 5  # of the cases, which are those of the development split

Pixels = NDArray[np.uint8]


def sized(picture: Pixels, side: int) -> Pixels:
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))


def edited(pipe: fl.Loom, kind: str, index: int) -> dict[str, Any]:
    """One case: the model's edit of a large original, as it came and locked."""
    case = case_of("dev", SEED, f"edit-{kind}", index)
    assert case.edit is not None
    source, target = (render(scene, FULL).pixels for scene in (case.edit.source, case.edit.target))
    changed = (np.abs(source.astype(int) - target) > 2).any(axis=-1)
    original = Image.fromarray(source)
    asked = Request(prompt=case.prompt, seed=case.seed, references=(Reference(original),), width=SIZE, height=SIZE)
    drawn = np.asarray(pipe.run(asked)[0].image)
    began = time.perf_counter()
    out, mask, report = lock(source, drawn)
    seconds = time.perf_counter() - began
    small = Image.fromarray(sized(source, SIZE))
    trip = find_change(np.asarray(small), np.asarray(round_trip(pipe.pipeline.runtime, small)))
    plain, found = sized(drawn, FULL), mask > 0.5
    row = {
        "kind": kind, "prompt": case.prompt, "whole": report.whole, "truly_changed": float(changed.mean()),
        "iou": float((found & changed).sum() / (found | changed).sum()),
        "recall": float((found & changed).sum() / changed.sum()),
        "round_trip_mask": float(trip.mask.mean()), "round_trip_whole": trip.everywhere, "seconds": seconds,
        **{name: getattr(report, name) for name in ("shift", "scale", "changed", "delta_e_outside", "identical")},
    }  # fmt: skip
    if (~changed).mean() > 0.05:
        row |= {
            f"outside_psnr_{name}": psnr(one, target, ~changed) for name, one in (("plain", plain), ("locked", out))
        }
    return row | {
        f"inside_psnr_{name}": psnr(one, target, changed) for name, one in (("plain", plain), ("locked", out))
    }


def laid(kind: str, index: int) -> dict[str, Any]:
    """One case of registration: the exact target, moved, in another light, through JPEG."""
    case = case_of("dev", SEED, f"edit-{kind}", index)
    assert case.edit is not None
    rng = np.random.default_rng(index)
    source, target = (render(scene, SIZE).pixels for scene in (case.edit.source, case.edit.target))
    angle, far, scale = rng.uniform(0, 2 * np.pi), rng.uniform(0, 12), rng.uniform(0.97, 1.03)
    dx, dy = far * np.cos(angle), far * np.sin(angle)
    matrix = Registration(dx, dy, scale, 1, True).matrix((SIZE, SIZE))
    moved = cv2.warpAffine(target, matrix, (SIZE, SIZE), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    cast = (moved * rng.uniform(0.9, 1.1, 3) + rng.uniform(-8, 8, 3)).clip(0, 255).astype(np.uint8)
    _, data = cv2.imencode(".jpg", cast, [cv2.IMWRITE_JPEG_QUALITY, 80])
    began = time.perf_counter()
    found = register(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8), source)
    return {
        "kind": kind, "plain": found.plain, "score": found.score, "seconds": time.perf_counter() - began,
        "pixels": float(np.hypot(found.dx - dx, found.dy - dy)), "scale": abs(found.scale - scale),
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means by kind, and of all local kinds."""
    names = ("iou", "recall", "round_trip_mask", "outside_psnr_plain", "outside_psnr_locked", "inside_psnr_plain",
             "inside_psnr_locked", "delta_e_outside", "identical", "seconds")  # fmt: skip

    def means(some: list[dict[str, Any]]) -> dict[str, Any]:
        held = {name: [row[name] for row in some if name in row] for name in names}
        told = {name: round(float(np.mean(values)), 4) for name, values in held.items() if values}
        return {"cases": len(some), "whole": sum(row["whole"] for row in some), **told}

    kinds = {kind: means([row for row in rows if row["kind"] == kind]) for kind in (*LOCAL, *GLOBAL)}
    locked = [row for row in rows if row["kind"] in LOCAL and not row["whole"]]
    return {"local, locked": means(locked), **kinds}


def main(out: str, cases: int = 5) -> None:
    pipe = fl.load("nano")
    rows = []
    for kind in (*LOCAL, *GLOBAL):
        for index in range(cases if kind in LOCAL else max(1, cases // 2)):
            rows.append(edited(pipe, kind, index))
            print(json.dumps(rows[-1]), flush=True)
    known = [laid(kind, index) for kind in LOCAL for index in range(cases)]
    sure = [row for row in known if row["plain"]]
    near = [row for row in sure if row["pixels"] < 0.1 and row["scale"] < 1e-3]
    registered = {
        "cases": len(known), "taken": len(sure), "under 0.1 px and 0.001": len(near),
        "median pixels": float(np.median([row["pixels"] for row in sure])),
        "median scale": float(np.median([row["scale"] for row in sure])),
        "wrong": [row for row in sure if row not in near],
    }  # fmt: skip
    told = {"model": pipe.pipeline.runtime.content, "full": FULL, "seed": SEED, "registration": registered}
    Path(out).write_text(json.dumps({**told, "summary": summary(rows)}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
