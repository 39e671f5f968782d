"""One denoise step on one GPU and on several: milliseconds, speed-up, and how far apart the velocities are.

    torchrun --standalone --nproc-per-node 2 bench/parallel.py --out bench/results/DATE-parallel.json
    ... bench/parallel.py --toy                                 # on processors, a toy of the same class

Random weights at full size; with and without a reference, fused and captured, by copies between GPUs and by NCCL.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fluxloom.bench.floor import HEAT
from fluxloom.bench.results import versions
from fluxloom.bench.subject import Step, error, random_module
from fluxloom.bench.timing import measure
from fluxloom.core.specs import MODELS, ModelSpec
from fluxloom.core.transformer import Transformer
from fluxloom.infer.executor import Executor
from fluxloom.infer.loras import Rack
from fluxloom.speed.attention import Attend, backend_for
from fluxloom.speed.fused import Fused
from fluxloom.speed.graphs import Captured
from fluxloom.speed.linear8 import quantise
from fluxloom.speed.ops import ops_for
from fluxloom.speed.parallel import Recorded, Spread
from fluxloom.speed.team import Team, join, together

ROW = MODELS["flux1-kontext-dev"]
TOY = replace(
    ROW.transformer,
    hidden_size=192,
    num_heads=24,
    axes_dim=(2, 2, 4),
    depth=1,
    depth_single_blocks=2,
    context_in_dim=64,
)


def compared(
    team: Team, spec: ModelSpec, model: Transformer, make: Callable[[Attend], Executor], step: Step
) -> Iterator[dict[str, Any]]:
    """Rows on rank 0, by what exchanges; the others serve. The step is one that others follow."""
    given = replace(step.given, times=(step.t[0], 0.0))

    def velocity(executor: Executor) -> Tensor:
        return executor(step.img, step.t, given)

    attend = backend_for(step.img[:0], spec.transformer.head_dim)
    alone = make(attend)
    one = None if team.rank else measure(lambda: velocity(alone), team.device, heat=HEAT)
    group = dist.get_backend()
    for exchange, team.near in (("direct", True), (group, False)):
        spread = Spread(team, Recorded(Rack(model, spec)), attend, make)
        if one is None:
            spread.serve()
            continue
        many = measure(lambda spread=spread: velocity(spread), team.device, heat=HEAT)
        apart = error(velocity(spread), velocity(alone))
        spread.stop()
        yield {
            "executor": spread.name, "exchange": exchange, "one_ms": one.median, **many.facts(),
            "speed_up": one.median / many.median, "apart": apart,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    team = join(torch.device("cpu" if given.toy else "cuda"))
    dtype = torch.float32 if given.toy else torch.bfloat16
    spec = replace(ROW, transformer=TOY, text_length=32) if given.toy else ROW
    size = (64, 64) if given.toy else (1024, 1024)
    rows: list[dict[str, Any]] = []
    with together(team), torch.inference_mode():
        model = random_module(lambda: Transformer(spec.transformer), team.device, dtype)
        ops = ops_for(team.device)
        makes: dict[str, Callable[[Attend], Executor]] = {"fused": lambda attend: Fused(model, attend, ops)}
        if not given.toy:
            makes["captured"] = lambda attend: Captured(Fused(model, attend, ops))
        for linears in (None,) if given.toy else (None, "fp8"):
            if linears is not None:
                quantise(model, linears)
            for references in (0, 1):
                step = Step.of(spec, size, [size] * references, 1, team.device).to(dtype)
                for name, make in makes.items():
                    for row in compared(team, spec, model, make, step):
                        rows.append({"references": references, "linears": linears, "by": name, **row})
                        print(json.dumps(rows[-1]), flush=True)
    if not team.rank and given.out is not None:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": "processor" if given.toy else f"{team.size} x {torch.cuda.get_device_name()}",
            "versions": versions(),
            "rows": rows,
        }
        given.out.write_text(json.dumps(about, indent=1) + "\n")
    team.leave()


if __name__ == "__main__":
    main()
