"""``fluxloom batch``"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxloom.cli import drawing, interrupts, options
from fluxloom.cli.output import plain, print_json
from fluxloom.cli.progress import Watch
from fluxloom.errors import BadInput

if TYPE_CHECKING:
    from fluxloom.edit.workflow import Step

app = typer.Typer(add_completion=False)


@app.command()
def batch(
    source: Annotated[
        Path,
        typer.Argument(help="A folder, or a .csv file with columns path, instruction, seed, ...", show_default=False),
    ],
    instruction: Annotated[
        str | None, typer.Argument(help="What to change, in English or Chinese.", show_default=False)
    ] = None,
    template: options.Template = None,
    slot: options.Slots = None,
    workflow: Annotated[
        Path | None, typer.Option("--workflow", metavar="FILE", help="Steps in TOML, instead of one instruction.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the pictures and the report; what is in it is not redone.")
    ] = Path("batch"),
    workers: Annotated[
        int, typer.Option("--workers", min=1, max=64, help="Pictures read and written at a time, beside the model.")
    ] = 1,
    lock: Annotated[
        str, typer.Option("--lock", metavar="auto|off", help="Keep what was not edited byte for byte.")
    ] = "auto",
    model: options.Model = "nano",
    variant: options.Variant = None,
    base: options.Base = None,
    offline: options.Offline = False,
    negative: options.Negative = "",
    seed: Annotated[int | None, typer.Option("--seed", "-s", help="Of all; default: each picture's own.")] = None,
    size: options.Size = None,
    quality: options.Quality = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    true_cfg: options.TrueCfg = None,
    solver: options.Solver = None,
    lora: options.Loras = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    executor: options.Executor = "auto",
    linears: options.Linears = None,
    attention: options.Attention = "auto",
    vram: options.Vram = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Edit every picture of a folder or a list; stopped, it goes on where it was."""
    given = locals()
    asked = {**drawing.size_fields(size), **{name: given[name] for name in _FIELDS if given[name] not in (None, "")}}
    if workflow is not None and (instruction or template or slot or asked or lora or lock != "auto"):
        raise BadInput("got --workflow beside an instruction or settings, allowed one of the two, try them in the file")
    with Watch(f"loading {model}", quiet=quiet) as watch:
        loom = drawing.loaded(given, watch)
        from fluxloom.edit.batch import Batch, tasks
        from fluxloom.edit.workflow import load

        todo = load(workflow) if workflow is not None else (_edit(given, asked),)
        work = Batch(loom.pipeline, tasks(source, todo, out), out, workers)  # raises BadInput before anything is drawn
        interrupts.unwind()
        with work:
            try:
                _run(work, watch, json)
            finally:
                pages = work.report(instruction or (workflow.stem if workflow else source.stem))
    _end(work.rows, pages, json)


_FIELDS = ("negative", "seed", "quality", "steps", "guidance", "true_cfg", "solver")


def _edit(given: dict[str, Any], asked: dict[str, Any]) -> Step:
    """The one step that the options ask for."""
    from fluxloom.edit.templates import compose
    from fluxloom.edit.workflow import Edit, lock_of

    loras = {"loras": drawing.loras(given["lora"])} if given["lora"] else {}
    edit = Edit(None, {**asked, **loras}, lock_of(given["lock"]))
    if given["instruction"] is None and given["template"] is None and not given["slot"]:
        return edit  # a list may say it
    text, written = compose("edit", given["instruction"], given["template"], given["slot"] or ())
    return replace(edit, instruction=text, written=written)


def _run(work: Any, watch: Watch, json: bool) -> None:
    total, drawn, began = len(work.todo), 0, time.monotonic()
    watch.what = "editing"
    watch.count(0, total)
    for number, row in enumerate(work.run(), 1):
        if row["state"] == "failed":
            print(plain(f"fluxloom: {row['source']}: {row['error']}"), file=sys.stderr)
        elif not json and not row.get("resumed"):
            print(work.out / row["output"], flush=True)
        drawn += not row.get("resumed")
        left = (time.monotonic() - began) / max(drawn, 1) * (total - number)
        watch.what = f"editing, {_minutes(left)} left" if drawn else "editing"
        watch.count(number, total)


def _minutes(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _end(rows: list[dict[str, Any]], pages: list[Path], json: bool) -> None:
    failed = sum(row["state"] == "failed" for row in rows)
    before = sum(bool(row.get("resumed")) for row in rows)
    if json:
        print_json({"done": len(rows) - failed, "failed": failed, "resumed": before, "pictures": rows})
    else:
        print(f"{len(rows) - failed} done ({before} of them before), {failed} failed; see {pages[0]}")
    if failed:
        raise typer.Exit(1)
