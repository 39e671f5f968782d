"""What each way to compute costs in quality: nano draws and edits the same cases from the same noise by every recipe.

    python bench/recipes.py --draw 33 --edit 38 --device cuda --out bench/results/DATE-recipes.json
    python bench/recipes.py --draw 2 --edit 2 --recipe fused+float32 --recipe fused+int8 --out recipes.json   # anywhere

Cases are those of ``fluxloom evals world`` (development split), taken in turn from its groups, at the model's own
settings. The truth is the plain pass in float32 to the end of the path; the noise floor is the plain pass in bfloat16,
always the first row. Of each recipe, for drawings and edits apart:

error   of the final latent, |x - truth| / |truth|: the geometric mean over cases
noise   that, over the noise floor's; a recipe is called lossy where it is above 1.25
psnr    of the decoded picture to the truth's, dB, the mean over cases; each recipe decodes by itself
held    the facts of the cases that the recogniser finds in the picture, of all of them; of the truth too
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import in_turn, share, walked

import fluxloom as fl
from fluxloom.bench.results import versions
from fluxloom.bench.step import NOISE, said
from fluxloom.bench.ways import way
from fluxloom.core.shapes import latent_hw
from fluxloom.core.solvers import SOLVERS
from fluxloom.evals.cases import Case
from fluxloom.evals.world import request_for
from fluxloom.infer.conditions import condition
from fluxloom.infer.request import resolve
from fluxloom.infer.runtime import Runtime
from fluxloom.measure.pixels import psnr
from fluxloom.measure.recogniser import Recogniser

FLOOR = "plain+bfloat16"
USUAL = {
    "cuda": ("fused", "captured+fa3", "captured+cudnn", "captured+fp8", "captured+int8", "captured+fp8+fa3-fp8"),
    "cpu": ("fused+float32", "fused+bfloat16", "fused+int8"),
}  # fmt: skip


def loaded(recipe: str, device: str) -> Runtime:
    """nano, computing by a recipe. Raises BadInput for what this machine cannot do."""
    one = way(recipe)
    how = {"executor": one.executor, "linears": one.linears, "attention": one.attention or "auto"}
    return fl.load("nano", device, one.dtype, **how).pipeline.runtime


def drawn(runtime: Runtime, reader: Recogniser, case: Case) -> tuple[torch.Tensor, Any, list[bool]]:
    """The final latent [1, L, C] in float32, its pixels, and which facts hold."""
    request = resolve(request_for(case, case.truth(), {}), runtime.spec)
    made = condition(request, runtime.spec, runtime.read, runtime.encode, runtime.see)
    end = walked(runtime, made, SOLVERS[request.solver].run, made.times)
    image = runtime.decode(end, latent_hw(request.width, request.height))
    reading = reader.read([image])[0]
    return end.float(), np.asarray(image), [fact.holds(reading) for fact in case.facts]


def summary(rows: list[dict[str, Any]], recipes: list[str]) -> dict[str, Any]:
    told: dict[str, Any] = {"cases": len(rows), "truth held": share([row["truth"] for row in rows])}
    for name in recipes:
        found = [row["recipes"][name] for row in rows]
        error = statistics.geometric_mean(max(one["error"], 1e-9) for one in found)
        told[name] = {
            "error": float(f"{error:.4g}"),
            "psnr": round(statistics.fmean(one["psnr"] for one in found), 1),
            "held": share([one["held"] for one in found]),
        }
        told[name]["noise"] = round(told[name]["error"] / told[FLOOR]["error"], 2)
        told[name]["lossy"] = told[name]["noise"] > NOISE
    return told


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=int, default=11, help="cases")
    parser.add_argument("--edit", type=int, default=19, help="cases")
    parser.add_argument("--recipe", action="append", help="repeatable; default: those of the device")
    parser.add_argument("--device", default="cpu", choices=tuple(USUAL))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    reader, truth = Recogniser.load(device=given.device), loaded("plain+float32", given.device)
    runtimes, skipped = {FLOOR: loaded(FLOOR, given.device)}, {}
    for name in given.recipe or USUAL[given.device]:
        try:
            runtimes[name] = loaded(name, given.device)
        except Exception as fault:  # what this machine cannot do is told, and the rest goes on
            skipped[name] = said(fault)
    about: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
    about |= {"model": truth.content, "recogniser": reader.content, "machine": truth.machine()}
    about |= {"executors": {name: one.executor.name for name, one in runtimes.items()}, "skipped": skipped}
    told: dict[str, Any] = {}
    for what, suite, count in (("draw", "draw", given.draw), ("edit", "edits", given.edit)):
        rows = []
        for number in range(count):
            case = in_turn(suite, number)
            exact, pixels, held = drawn(truth, reader, case)
            row: dict[str, Any] = {"case": f"{case.group} {case.index}", "truth": held, "recipes": {}}
            for name, runtime in runtimes.items():
                x, picture, facts = drawn(runtime, reader, case)
                error = float((x - exact).norm() / exact.norm())
                near = round(min(psnr(picture, pixels), 99.0), 2)
                row["recipes"][name] = {"error": error, "psnr": near, "held": facts}
            rows.append(row)
        if rows:
            told[what] = summary(rows, list(runtimes))
            print(json.dumps({what: told[what]}, indent=1), flush=True)
    given.out.write_text(json.dumps(about | {"summary": told}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
