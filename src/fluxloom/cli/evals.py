"""``fluxloom evals``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fluxloom.cli import drawing, options
from fluxloom.cli.output import Destination
from fluxloom.cli.progress import Watch

app = typer.Typer(add_completion=False)
SHOWN = 6  # cases of each group on the sheets


@app.callback()
def evals() -> None:
    """Measure a model."""


@app.command()
def world(
    split: Annotated[str, typer.Option("--split", help="dev, or test: seeds from the weights' hash.")] = "dev",
    count: Annotated[int, typer.Option("--count", min=1, help="Cases of each group.")] = 8,
    only: Annotated[
        str, typer.Option("--only", metavar="NAMES", help="Groups or suites (draw, held-out, edits), with commas.")
    ] = "",
    model: options.Model = "nano",
    seed: Annotated[
        int | None, typer.Option("--seed", "-s", help="Seed of the cases, of --split dev.", show_default="1")
    ] = None,
    steps: options.Steps = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures drawn at a time: 1 is best on a CPU.")] = 1,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    executor: options.Executor = "auto",
    linears: options.Linears = None,
    attention: options.Attention = "auto",
    threads: options.Threads = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report and the sheets.")] = Path("evals"),
    quiet: options.Quiet = False,
) -> None:
    """Count how often a model draws and edits what was asked, as the embedded recogniser sees it; write a report."""
    with Watch(f"loading {model}", quiet=quiet) as watch:
        loom = drawing.load(model, device, threads, dtype, executor=executor, linears=linears, attention=attention)
        from fluxloom.evals.suite import Plan, write_report
        from fluxloom.measure.recogniser import Recogniser

        reader = Recogniser.load(device=str(loom.pipeline.runtime.device))
        plan = Plan.of(
            loom.pipeline,
            reader,
            split,
            seed,
            [name.strip() for name in only.split(",") if name.strip()],
            count=count,
            batch=batch,
            settings={} if steps is None else {"steps": steps},
        )
        Destination(out).probe()
        print(f"{plan.total} pictures to draw: {count} of each of {len(plan.groups)} groups", flush=True)
        watch.what = "drawing and reading"
        outcomes = []
        for outcome in plan.run(keep=SHOWN):
            outcomes.append(outcome)
            watch.count(len(outcomes), plan.total)
        for path in write_report(out, plan, outcomes):
            print(path)
