"""``fluxloom bench``"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxloom.cli import drawing, options
from fluxloom.cli.output import plain, print_table
from fluxloom.errors import BadInput

if TYPE_CHECKING:
    import torch

    from fluxloom.bench.results import Results
    from fluxloom.core.specs import Size

app = typer.Typer(add_completion=False)

MODEL = "A name of `fluxloom models`: with random weights, except nano; or a folder or a file, loaded."
Model = Annotated[str, typer.Option("--model", "-m", metavar="REF", help=MODEL)]
Sized = Annotated[str | None, typer.Option("--size", metavar="WxH", help="Of the picture; default: the model's own.")]
Count = Annotated[int, typer.Option("--references", min=0, max=8, help="Reference pictures beside it.")]
Seen = Annotated[
    str | None,
    typer.Option("--reference-size", metavar="WxH", help="Of each; default: 1024x1024, or the size to draw."),
]
Batch = Annotated[int, typer.Option("--batch", min=1, max=256, help="Pictures in one pass.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or auto.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, max=1000, help="Warm runs that the median is of.")]
Kept = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Keep the rows, complete after every one.")]
Plotted = Annotated[Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw them as bars.")]
Recipes = Annotated[
    list[str] | None,
    typer.Option("--recipe", metavar="WORDS", help="Such as fused+bfloat16 or captured+fp8; repeatable."),
]
_COLUMNS = {
    "recipe": "recipe", "peer": "who", "scene": "scene", "ms": "ms", "ms_low": "least", "ms_high": "most",
    "times_floor": "x floor", "cold_s": "cold s", "peak_bytes": "peak GiB", "error": "error",
    "times_noise": "x noise", "lossy": "lossy", "sm_mhz": "MHz", "watts": "W",
}  # fmt: skip


@app.callback()
def bench() -> None:
    """Measure how fast it is here, beside other implementations and the floor of the machine."""


@app.command()
def step(
    model: Model = "nano",
    size: Sized = None,
    references: Count = 0,
    reference_size: Seen = None,
    batch: Batch = 1,
    recipe: Recipes = None,
    device: Device = "auto",
    threads: options.Threads = None,
    repeats: Repeats = 10,
    turns: Annotated[
        bool, typer.Option("--turns", help="By turns, one run each: what else the machine does falls on all alike.")
    ] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Also name the largest kernels of each.")] = False,
    json: Kept = None,
    plot: Plotted = None,
    quiet: options.Quiet = False,
) -> None:
    """Time one denoise step by recipe, with its memory, and its error beside the noise of 16 bits."""
    if turns and kernels:
        raise BadInput("got --turns and --kernels, allowed one of them, try --kernels alone")
    where, own = _begin(device, threads, plot)
    from fluxloom.bench import step as steps
    from fluxloom.bench import subject
    from fluxloom.bench.ways import ways

    asked = ways(recipe or (), where)
    sizes = {"size": drawing.size_fields(size), "reference": drawing.size_fields(reference_size)}
    found = subject.runtime(model, where, own)
    drawn, seen = subject.own_sizes(found.spec, _pair(sizes["size"]), references, _pair(sizes["reference"]))
    one = subject.Step.of(found.spec, drawn, seen, batch, where)
    run = _results("step", where, json, model=model, weights=found.content, size=drawn, references=seen,
                   batch=batch, by_turns=turns)  # fmt: skip
    rows = steps.run(found, one, asked, repeats=repeats, turns=turns, profiled=kernels, told=_teller(quiet))
    _finish(run, rows, plot, quiet)


@app.command()
def image(
    model: Model = "nano",
    size: Sized = None,
    references: Count = 0,
    steps: options.Steps = None,
    recipe: Annotated[str, typer.Option("--recipe", metavar="WORDS", help="How to compute; one of `step`.")] = "",
    device: Device = "auto",
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    pictures: Annotated[int, typer.Option("--pictures", min=1, max=100, help="The first is cold.")] = 3,
    json: Kept = None,
    quiet: options.Quiet = False,
) -> None:
    """Time a picture from the prompt to the file: text, steps, decoding and saving, cold and warm."""
    where, own = _begin(device, threads, None, dtype)
    from fluxloom.bench import image as images
    from fluxloom.bench import subject
    from fluxloom.bench import ways as kinds
    from fluxloom.infer.runtime import dtype_named
    from fluxloom.speed.recipe import apply

    given = _pair(drawing.size_fields(size))
    way = kinds.way(recipe) if recipe else None
    how = None if way is None else kinds.recipe(way)
    found = subject.runtime(model, where, dtype_named(way.dtype, where) if way and way.dtype else own, words=True)
    drawn, _ = subject.own_sizes(found.spec, given, references, None)
    if how is not None:
        apply(found, how)
    run = _results("image", where, json, model=model, weights=found.content, size=drawn, references=references)
    run.note(executor=found.executor.name)
    _finish(run, images.run(found, drawn, references, steps, pictures, _teller(quiet)), None, quiet)


@app.command()
def load(
    model: Annotated[str, typer.Argument(help="A folder, a file, or nano.")],
    cache: Annotated[str, typer.Option("--cache", help="as-is; warm: read before; cold: dropped before.")] = "as-is",
    variant: options.Variant = None,
    device: Device = "auto",
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, max=100, help="How often to load.")] = 3,
    json: Kept = None,
    quiet: options.Quiet = False,
) -> None:
    """Time loading, from files to a model that is ready; the share of them in the page cache is told."""
    where, own = _begin(device, threads, None, dtype)
    from fluxloom.bench import load as loads

    loads.prepare((), cache)  # a wrong word is found before the work
    run = _results("load", where, json, model=model, cache=cache)
    _finish(run, loads.run(model, where, own, cache, repeats, _teller(quiet), variant), None, quiet)


@app.command()
def floor(
    model: Model = "nano",
    size: Sized = None,
    references: Count = 0,
    reference_size: Seen = None,
    batch: Batch = 1,
    recipe: Recipes = None,
    device: Device = "auto",
    threads: options.Threads = None,
    repeats: Repeats = 10,
    json: Kept = None,
    quiet: options.Quiet = False,
) -> None:
    """Measure this machine's ceilings at the model's shapes, and how far from the floor a step is."""
    where, own = _begin(device, threads, None)
    from fluxloom.bench import floor as floors
    from fluxloom.bench import step as steps
    from fluxloom.bench import subject
    from fluxloom.bench.ways import ways

    asked = ways(recipe, where) if recipe else ways(("fused",) if where.type == "cpu" else ("captured",), where)
    pair = _pair(drawing.size_fields(size)), _pair(drawing.size_fields(reference_size))
    found = subject.runtime(model, where, own)
    spec = found.spec.transformer
    drawn, seen = subject.own_sizes(found.spec, pair[0], references, pair[1])
    one = subject.Step.of(found.spec, drawn, seen, batch, where)
    run = _results("floor", where, json, model=model, size=drawn, references=seen, batch=batch, tokens=one.tokens)
    counted = floors.count(spec, *one.tokens, batch)
    rates = partial(floors.ceilings, spec, *one.tokens, batch, where, _teller(quiet), repeats)
    facts = floors.reached(counted, rates, where)
    least = facts["floor_ms"]
    run.note(**facts)
    _show_floor(facts)
    own_dtype = "bfloat16" if where.type == "cuda" else "float32"
    rows = steps.run(found, one, asked, repeats=repeats, told=_teller(quiet))
    _finish(
        run,
        (floors.beside(row, floors.floor_of(row["recipe"].split("+"), least, own_dtype)) for row in rows),
        None,
        quiet,
    )


@app.command()
def peers(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME", help="Of `fluxloom models`: random weights, except nano.")
    ] = "nano",
    size: Sized = None,
    reference_size: Seen = None,
    only: Annotated[
        str, typer.Option("--only", metavar="NAMES", help="Parts of names, with commas: ours, official, fp8 ...")
    ] = "",
    scenes: Annotated[str, typer.Option("--scenes", help="t2i, kontext (one reference), or both.")] = "t2i,kontext",
    batch: Batch = 1,
    device: Device = "auto",
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    repeats: Repeats = 10,
    seconds: Annotated[float, typer.Option("--seconds", min=20, help="For all; then the rest is skipped.")] = 520,
    each: Annotated[float, typer.Option("--each", min=10, help="Seconds for one of them, at most.")] = 260,
    shared_cache: Annotated[
        bool, typer.Option("--shared-cache", help="Keep compiled code between peers: cold starts then mean nothing.")
    ] = False,
    json: Kept = None,
    plot: Plotted = None,
    quiet: options.Quiet = False,
) -> None:
    """Time ours and others side by side: the same weights and inputs, each in a process of its own."""
    where, own = _begin(device, threads, plot, dtype)
    from fluxloom.bench import subject
    from fluxloom.bench.peers import Comparison
    from fluxloom.bench.worker import Scene, Task

    pair = _pair(drawing.size_fields(size)), _pair(drawing.size_fields(reference_size))
    spec = subject.known(model)
    drawn, seen = subject.own_sizes(spec, pair[0], 1, pair[1])
    known = {"t2i": Scene("t2i", drawn), "kontext": Scene("kontext", drawn, tuple(seen))}
    names = [name.strip() for name in scenes.split(",") if name.strip()]
    if not names or any(name not in known for name in names):
        raise BadInput(f"got --scenes {scenes!r}, allowed {', '.join(known)}, try t2i")
    dtype_name = str(own).removeprefix("torch.")
    task = Task("", model, str(where), dtype_name, tuple(known[n] for n in names), "", batch, repeats=repeats)
    words = [word.strip() for word in only.split(",") if word.strip()]
    compared = Comparison(task, words, seconds, each, shared_cache, _teller(quiet))
    compared.names()  # a wrong --only is found before the work
    run = _results("peers", where, json, model=model, size=drawn, references=seen, dtype=dtype_name,
                   batch=batch, compile_cache="shared" if shared_cache else "fresh for each")  # fmt: skip
    _finish(run, compared.run(), plot, quiet)


@app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="A file of --json.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture (SVG).")],
) -> None:
    """Draw the bars of a run that was kept."""
    _svg_only(out)
    from fluxloom.bench.results import read

    _draw(read(result), out)


# ------------------------------------------------------------------------------------------------------------- parts


def _begin(
    device: str, threads: int | None, plot: Path | None, dtype: str | None = None
) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype, with the threads set."""
    _svg_only(plot)
    from fluxloom.infer.runtime import device_named, dtype_named

    drawing.set_threads(threads)
    where = device_named(device)
    return where, dtype_named(dtype, where)


def _svg_only(path: Path | None) -> None:
    if path is not None and path.suffix != ".svg":
        raise BadInput(f"got {str(path)!r} to draw into, allowed names that end in .svg, try {path.stem}.svg")


def _pair(fields: Mapping[str, int]) -> Size | None:
    return (fields["width"], fields["height"]) if fields else None


def _teller(quiet: bool) -> Any:
    """Says on standard error what is being done."""
    return (lambda _: None) if quiet else (lambda text: print(plain(f".. {text}"), file=sys.stderr, flush=True))


def _results(what: str, where: torch.device, path: Path | None, **facts: Any) -> Results:
    from fluxloom.bench.results import Results

    return Results.begin(what, where, path, **facts)


def _finish(run: Results, rows: Iterable[dict[str, Any]], plot: Path | None, quiet: bool) -> None:
    """Keep and tell every row as it comes, then the table, then the picture."""
    tell = _teller(quiet)
    for row in rows:
        kept = run.add(row)
        tell("   " + ", ".join(f"{key} {_short(value)}" for key, value in kept.items() if not isinstance(value, dict)))
    _show(run.rows)
    if plot is not None:
        _draw(run.to_dict(), plot)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key.endswith("bytes"):
        return f"{value / 2**30:.2f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _short(value)


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a table; what was skipped stands below, with the reason."""
    told = [row for row in rows if "skipped" not in row and not {"notes", "tflop"} & row.keys()]
    known = list(_COLUMNS) if any("recipe" in row or "peer" in row for row in told) else list(told[0]) if told else []
    columns = [key for key in known if any(key in row for row in told)]
    if columns:
        cells = [[_cell(key, row.get(key)) for key in columns] for row in told]
        print_table([_COLUMNS.get(key, key.replace("_bytes", " GiB").replace("_", " ")) for key in columns], cells)
    for row in rows:
        if "skipped" in row:
            print(plain(f"{row.get('recipe', row.get('peer', ''))}: skipped: {row['skipped']}"))


def _show_floor(facts: Mapping[str, Any]) -> None:
    """The rates of short runs and of those that are held, and what follows from each: of :func:`floor.reached`."""
    print_table(("operations", "TFLOP"), [(name, f"{value:.4g}") for name, value in facts["tflop"].items()])
    short, held = facts["ceilings"], facts["held"]
    rates = [
        (f"{kind} {name}", f"{rate:.4g}", f"{held[f'{kind}_tflops'].get(name, 0):.4g}")
        for kind in ("products", "attention")
        for name, rate in short[f"{kind}_tflops"].items()
    ]
    print_table(("best rate", "TFLOP/s", "held"), rates)
    print_table(("copies", "GB/s"), [("read and written", f"{short['copies_gb_s']:.4g}")])
    least = [(name, f"{ms:.4g}", f"{facts['held_floor_ms'][name]:.4g}") for name, ms in facts["floor_ms"].items()]
    print_table(("floor", "ms", "held"), least)


def _draw(run: Mapping[str, Any], out: Path) -> None:
    from fluxloom.bench.plot import svg
    from fluxloom.errors import OutputError

    picture = svg(run)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(picture, "utf-8")
    except OSError as fault:
        where = f"got {str(out)!r} to write to ({fault.strerror})"
        raise OutputError(f"{where}, allowed a place with room, try another") from fault
    print(out)
