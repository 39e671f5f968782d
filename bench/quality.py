"""What an evaluation of the model buys: solvers, the adaptive one, and step caches against fewer steps, on nano.

    python bench/quality.py --draw 2 --edit 2 --size 192 --reference 12 --out quality.json     # ten minutes on a core
    python bench/quality.py --draw 33 --edit 38 --reference 32 --device cuda --out ...         # where there is a GPU

Cases are those of ``fluxloom evals world`` (development split), taken in turn from its groups. Each is walked to its
end from the same noise by every arm, and by a reference: rk4 on times that are shifted towards noise as for a picture
of 4096 tokens. Of each arm are printed, for drawings and edits apart:

cost      whole forward passes a picture; a step that a cache answered counts as much as it computed
error     of the final latent, |x - reference| / |reference|: the geometric mean over cases (single ones range from 0.01
          to 0.6: where a path comes near another picture a small error decides which one it is), and the median
psnr      of the decoded picture to the reference's, dB, the mean over cases
held      the facts of the cases that the recogniser finds in the picture, of all of them; of the reference too
versus    for arms of a cache, against controls of about the same cost: in how many cases its error is smaller, the mean
          of the log of the ratio of the two errors, and its standard error
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from caches import FirstBlock, Taylor
from torch import Tensor

import fluxloom as fl
from fluxloom.core.flow import shift
from fluxloom.core.shapes import latent_hw
from fluxloom.core.solvers import SOLVERS, Run, Times
from fluxloom.evals.cases import SIZE, SUITES, Case, case_of
from fluxloom.evals.world import request_for
from fluxloom.infer.conditions import Conditioning, condition
from fluxloom.infer.executor import Executor, Plain
from fluxloom.infer.request import resolve
from fluxloom.infer.runtime import Runtime
from fluxloom.infer.sample import drive, trajectory
from fluxloom.measure.pixels import psnr
from fluxloom.measure.recogniser import Reading, Recogniser

SEED = 1  # of the development split
HIGH = 1.15  # mu of 4096 tokens: half of the steps above t = 0.76
Cache = Callable[[Runtime], "Counted"]


class Counted:
    """An executor whose cost is counted in whole forward passes."""

    name, lossy = "counted", True

    def __init__(self, inner: Executor, cached: float = 0.0) -> None:
        """``cached``: what a step costs that ``inner`` did not compute, as a share of one that it did."""
        self.inner, self.cached, self.calls = inner, cached, 0

    def __call__(self, img: Tensor, t: Sequence[float], given: Any) -> Tensor:
        self.calls += 1
        return self.inner(img, t, given)

    @property
    def cost(self) -> float:
        computed = int(getattr(self.inner, "computed", self.calls))
        return computed + self.cached * (self.calls - computed)


@dataclass(frozen=True)
class Arm:
    """A way to walk: ``steps`` of ``solver``, under a cache or not; ``controls`` name the arms it is held against;
    ``high``: on times that are shifted like the reference's."""

    solver: str
    steps: int
    tolerance: float | None = None
    cache: Cache | None = None
    controls: tuple[str, ...] = ()
    high: bool = False

    @property
    def run(self) -> Callable[[Tensor, Times], Run]:
        run = SOLVERS[self.solver].run
        return run if self.tolerance is None else partial(run, tolerance=self.tolerance)


def taylor(every: int, order: int) -> Cache:
    return lambda runtime: Counted(Taylor(Plain(runtime.transformer), every, order))


def first_block(threshold: float) -> Cache:
    def made(runtime: Runtime) -> Counted:
        spec = runtime.transformer.spec
        return Counted(FirstBlock(runtime.transformer, threshold), 1 / (spec.depth + spec.depth_single_blocks))

    return made


def arms() -> dict[str, Arm]:
    found = {f"euler {n}": Arm("euler", n) for n in (16, 28, 50)}
    found |= {f"dpmpp_2m {n}": Arm("dpmpp_2m", n) for n in (8, 12, 16)}
    found |= {f"ab2 {n}": Arm("ab2", n) for n in (15, 18)}
    found |= {f"ab2 {n}, more shift": Arm("ab2", n, high=True) for n in (12, 15, 18)}
    found |= {f"adaptive {tol:g}": Arm("adaptive", 24, tol) for tol in (0.03, 0.02, 0.01, 0.004, 0.002)}
    found["adaptive 0.03, first of 8"] = Arm("adaptive", 8, 0.03)
    # What is cached; the Taylor cache's ``every``; controls of about the same cost, or of more.
    for solver, n, every, controls in (
        ("dpmpp_2m", 16, 2, ("dpmpp_2m 12", "adaptive 0.02")),
        ("euler", 28, 2, ("euler 16", "ab2 15", "ab2 15, more shift", "adaptive 0.01")),
        ("euler", 50, 3, ("euler 28", "ab2 18", "ab2 18, more shift", "adaptive 0.01")),
    ):
        found[f"{solver} {n}, Taylor 1 every {every}"] = Arm(solver, n, None, taylor(every, 1), controls)
        found[f"{solver} {n}, first block 0.12"] = Arm(solver, n, None, first_block(0.12), controls)
    found["adaptive 0.004, first block 0.12"] = Arm("adaptive", 24, 0.004, first_block(0.12), ("adaptive 0.01",))
    return found


def ready(runtime: Runtime, case: Case, steps: int, size: int) -> Conditioning:
    """What a case's path needs, with so many steps."""
    request = resolve(request_for(case, case.truth(), {"steps": steps, "width": size, "height": size}), runtime.spec)
    return condition(request, runtime.spec, runtime.read, runtime.encode, runtime.see)


def shifted(steps: int) -> list[float]:
    """Times with more steps where noise is high."""
    return [shift(1 - i / steps, HIGH) for i in range(steps + 1)]


def walked(runtime: Runtime, made: Conditioning, run: Callable[[Tensor, Times], Run], times: Times) -> Tensor:
    """The final latent [1, L, C]."""
    return drive(trajectory(made.start(0).to(runtime.device), run, times, made.rows), runtime.velocity)


def measured(
    runtime: Runtime, reader: Recogniser, case: Case, chosen: Mapping[str, Arm], reference: int, size: int
) -> dict[str, Any]:
    """Cost, error, PSNR and facts of every arm in one case."""

    def seen(x: Tensor) -> tuple[np.ndarray[Any, Any], Reading]:
        image = runtime.decode(x, latent_hw(size, size))
        return np.asarray(image), reader.read([image])[0]

    def held(reading: Reading) -> list[bool]:
        return [fact.holds(reading) for fact in case.facts]

    plain = Plain(runtime.transformer)
    runtime.executor = plain
    made = ready(runtime, case, reference, size)
    end = walked(runtime, made, SOLVERS["rk4"].run, shifted(reference))
    picture, reading = seen(end)
    row: dict[str, Any] = {"case": f"{case.group} {case.index}", "reference": held(reading), "arms": {}}
    for name, arm in chosen.items():
        counted = Counted(plain) if arm.cache is None else arm.cache(runtime)
        runtime.executor = counted
        made = ready(runtime, case, arm.steps, size)
        x = walked(runtime, made, arm.run, shifted(arm.steps) if arm.high else made.times)
        drawn, reading = seen(x)
        row["arms"][name] = {
            "cost": round(counted.cost, 2),
            "error": round(float((x - end).norm() / end.norm()), 5),
            "psnr": round(min(psnr(drawn, picture), 99.0), 2),
            "held": held(reading),
        }
    return row


def summary(rows: list[dict[str, Any]], chosen: Mapping[str, Arm]) -> dict[str, Any]:
    """Every arm over cases."""
    told: dict[str, Any] = {"cases": len(rows), "reference held": share([row["reference"] for row in rows])}
    for name, arm in chosen.items():
        found = [row["arms"][name] for row in rows]
        errors = [one["error"] for one in found]
        told[name] = {
            "cost": round(statistics.fmean(one["cost"] for one in found), 1),
            "error": round(statistics.geometric_mean(errors), 4),
            "median": round(statistics.median(errors), 4),
            "psnr": round(statistics.fmean(one["psnr"] for one in found), 1),
            "held": share([one["held"] for one in found]),
        }
        if arm.controls:
            told[name]["versus"] = {other: _versus(rows, name, other) for other in arm.controls}
    return told


def _versus(rows: list[dict[str, Any]], name: str, control: str) -> dict[str, Any]:
    logs = [math.log(row["arms"][name]["error"] / row["arms"][control]["error"]) for row in rows]
    spread = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    better = f"{sum(log < 0 for log in logs)} of {len(logs)}"
    return {"better": better, "log ratio": round(statistics.fmean(logs), 3), "standard error": round(spread, 3)}


def in_turn(suite: str, number: int) -> Case:
    """A case of the development split: from each group of a suite in turn."""
    groups = SUITES[suite]
    return case_of("dev", SEED, groups[number % len(groups)], number // len(groups))


def share(verdicts: list[list[bool]]) -> str:
    return f"{sum(map(sum, verdicts))} of {sum(map(len, verdicts))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=int, default=8, help="cases")
    parser.add_argument("--edit", type=int, default=5, help="cases")
    parser.add_argument("--reference", type=int, default=16, help="steps of rk4, four evaluations each")
    parser.add_argument("--size", type=int, default=SIZE, help="of a side, in pixels")
    parser.add_argument("--only", default="", help="arms whose names begin so, with semicolons; and their controls")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    runtime = fl.load("nano", options.device, "float32").pipeline.runtime
    reader, chosen, began = Recogniser.load(device=options.device), arms(), time.perf_counter()
    wanted = tuple(name.strip() for name in options.only.split(";") if name.strip())
    if wanted:
        picked = {name for name in chosen if name.startswith(wanted)}
        picked |= {other for name in picked for other in chosen[name].controls}
        chosen = {name: arm for name, arm in chosen.items() if name in picked}
    about: dict[str, Any] = {"model": runtime.content, "recogniser": reader.content, "machine": runtime.machine()}
    about |= {"reference": options.reference, "size": options.size}
    rows: dict[str, list[dict[str, Any]]] = {}
    for number in range(max(options.draw, options.edit)):
        for what, suite, count in (("draw", "draw", options.draw), ("edit", "edits", options.edit)):
            if number >= count:
                continue
            case = in_turn(suite, number)
            row = measured(runtime, reader, case, chosen, options.reference, options.size)
            rows.setdefault(what, []).append(row)
            about["minutes"] = round((time.perf_counter() - began) / 60, 1)
            about["summary"] = {name: summary(some, chosen) for name, some in rows.items()}
            lines = ",\n".join(json.dumps(row) for some in rows.values() for row in some)
            text = json.dumps(about, indent=1)[:-2] + f',\n "runs": [\n{lines}\n]\n}}\n'
            options.out.write_text(text, "utf-8")
    print(json.dumps(about["summary"], indent=1), flush=True)


if __name__ == "__main__":
    main()
