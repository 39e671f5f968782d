"""``fluxloom plan``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxloom.cli import options
from fluxloom.cli.output import plain, print_json, print_table
from fluxloom.errors import BadInput

if TYPE_CHECKING:
    from fluxloom.core.specs import ModelSpec
    from fluxloom.infer.plan import Plan
    from fluxloom.infer.work import Machine, Work

app = typer.Typer(add_completion=False)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(help="A name of `fluxloom models`, or a folder or file with a transformer.", show_default=False),
    ],
    vram: Annotated[
        str | None, typer.Option("--vram", help="Memory to stay under: 12GB, 8GiB; default: as if there were enough.")
    ] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="Of the picture, in pixels.")] = None,
    references: Annotated[int | None, typer.Option("--references", min=0, help="Pictures that an edit sees.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many pictures.")] = 1,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps of the solver.")] = None,
    solver: Annotated[str | None, typer.Option("--solver", help="A name that generate knows.")] = None,
    true_cfg: Annotated[bool, typer.Option("--true-cfg", help="Classifier-free guidance: two rows a pass.")] = False,
    lora: Annotated[list[Path] | None, typer.Option("--lora", help="A LoRA to draw with; repeatable.")] = None,
    linears: Annotated[
        str | None, typer.Option("--linears", help="Products of the blocks in fp8 or int8 (lossy).")
    ] = None,
    variant: options.Variant = None,
    machine: Annotated[str, typer.Option("--machine", help="Whose rates to reckon with: h200 or cpu.")] = "h200",
    rate: Annotated[
        list[str] | None,
        typer.Option("--rate", metavar="NAME=VALUE", help="A rate as you measured it: bfloat16=160, upload=24."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Tell what a request would take, in memory and time, stage by stage, and how it is made to fit a GPU."""
    from fluxloom.infer.plan import fit, parse_bytes

    spec, rates = _spec(model, variant), _machine(machine, rate or ())
    work = _work(spec, size, references, n, steps, solver, true_cfg, lora or ())
    cap = None if vram is None else parse_bytes(vram)
    dtype = "float32" if not rates.upload else "bfloat16"  # as load takes them, unless told otherwise
    found = fit(spec, cap, work, machine=rates, linears=linears, dtype=dtype)
    if json:
        print_json(facts(found, work))
        return
    print_table(("stage", "weights", "activations", "peak", "seconds"), _rows(found))
    print()
    for word in found.words:
        print(plain(f"- {word}"))


def _rows(found: Plan) -> list[tuple[str, ...]]:
    from fluxloom.infer.plan import gigabytes

    return [
        (one.name, *map(gigabytes, (one.weights, one.activations, one.peak)), f"{one.seconds:.2f}")
        for one in found.stages
    ] + [("all", "", "", gigabytes(found.peak), f"{found.seconds:.2f}")]


def facts(found: Plan, work: Work) -> dict[str, Any]:
    """A plan for machines: bytes and seconds."""
    from dataclasses import asdict

    return {
        **{name: value for name, value in asdict(found).items() if name != "words"},
        "stays": sorted(found.stays),
        "peak": found.peak,
        "seconds": found.seconds,
        "request": asdict(work),
        "words": list(found.words),
    }


def _spec(model: str, variant: str | None) -> ModelSpec:
    """The row of a member by its name, or that of what is in a file or folder, with the shapes that it has there."""
    from dataclasses import replace
    from difflib import get_close_matches

    from fluxloom.core.specs import MODELS, TransformerSpec
    from fluxloom.errors import UnknownModel, WeightsError

    if model in MODELS:
        return MODELS[model]
    path = Path(model)
    if not path.exists():
        near = next(iter(get_close_matches(model, MODELS, n=1)), "flux1-dev")
        raise UnknownModel(f"got model {model[:80]!r}, allowed {', '.join(MODELS)}, a folder or a file, try {near}")
    from fluxloom.weights.checkpoint import open_checkpoint
    from fluxloom.weights.identify import choose, identify
    from fluxloom.weights.load import CARD, read_card

    if (path / CARD).is_file():
        return _spec(read_card(path)["model"], None)
    inner = path / "transformer"
    for component in identify(open_checkpoint(inner if inner.is_dir() else path)):
        if isinstance(component.spec, TransformerSpec):
            return replace(choose(component, variant), transformer=component.spec)
    raise WeightsError(f"got {model} without a transformer, allowed a checkpoint of FLUX.1, try another")


def _machine(name: str, rates: list[str] | tuple[str, ...]) -> Machine:
    from fluxloom.infer.work import MACHINES

    if name not in MACHINES:
        raise BadInput(f"got machine {name[:40]!r}, allowed {', '.join(MACHINES)}, try h200 with --rate")
    measured = {}
    for word in rates:
        key, _, value = word.partition("=")
        try:
            measured[key] = float(value)
        except ValueError:
            raise BadInput(f"got --rate {word[:40]!r}, allowed NAME=VALUE, try bfloat16=160") from None
    return MACHINES[name].measured(measured)


def _work(
    spec: ModelSpec,
    size: str | None,
    references: int | None,
    n: int,
    steps: int | None,
    solver: str | None,
    true_cfg: bool,
    loras: list[Path] | tuple[Path, ...],
) -> Work:
    from fluxloom.cli.drawing import size_fields
    from fluxloom.core.solvers import SOLVERS
    from fluxloom.infer.sizes import allowed_size
    from fluxloom.infer.work import Work, evaluations

    changed: dict[str, Any] = {**size_fields(size), "pictures": n, "loras": sum(map(_lora_bytes, loras))}
    if size is not None:
        allowed_size(spec, changed["width"], changed["height"])
    row = next(iter(spec.tasks.values()))
    if solver is not None and solver not in SOLVERS:
        raise BadInput(f"got solver {solver[:40]!r}, allowed {', '.join(SOLVERS)}, try {row.solver}")
    if solver is not None or steps is not None:
        changed["evaluations"] = evaluations(solver or row.solver, steps or row.steps)
    if references and "edit" not in spec.tasks:
        raise BadInput(
            f"got --references {references} for {spec.name}, allowed for models that edit, try leaving it out"
        )
    if references is not None:
        square = (changed.get("width", row.size[0]), changed.get("height", row.size[1]))
        changed["references"] = (square,) * references
    if true_cfg:
        changed["rows"] = 2
    return Work.typical(spec, **changed)


def _lora_bytes(path: Path) -> int:
    """What the matrices of a LoRA take in 16 bits: it has them so on a GPU, whatever it is stored in."""
    from math import prod

    from fluxloom.weights.checkpoint import open_checkpoint
    from fluxloom.weights.lora_file import held

    file = held(path) if path.is_dir() else path
    if file is None or not file.is_file():
        raise BadInput(f"got LoRA {str(path)!r}, which is not there, allowed a .safetensors file, try another path")
    return sum(2 * prod(entry.shape) for entry in open_checkpoint(file).values())
