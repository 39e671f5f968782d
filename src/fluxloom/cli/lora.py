"""``fluxloom lora``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fluxloom.cli.options import Json
from fluxloom.cli.output import print_facts, print_json
from fluxloom.errors import BadInput

app = typer.Typer(add_completion=False)

File = Annotated[Path, typer.Argument(help="A LoRA: a .safetensors file or a PEFT folder.", show_default=False)]
Base = Annotated[str, typer.Argument(help="nano, a model folder, or a checkpoint.", show_default=False)]
Out = Annotated[Path, typer.Argument(metavar="DST", help="The .safetensors file to write.", show_default=False)]
To = Annotated[str, typer.Option("--to", help="Dialect to write: diffusers, kohya or official.")]


@app.callback()
def lora() -> None:
    """Examine, convert, merge and extract LoRAs, of every trainer's dialect."""


@app.command()
def inspect(
    file: File,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="nano, a model folder or a checkpoint, to measure the effect on.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Tell what a LoRA is, which model it is for, and what it does; exit code 1 for one that would do nothing."""
    from fluxloom.weights.lora_doctor import diagnose
    from fluxloom.weights.lora_file import open_lora

    state, metadata = open_lora(file)
    report = diagnose(state, metadata, None if base is None else _transformer(base), [file.name]).to_dict()
    facts: dict[str, Any] = {"file": str(file), **report}
    if not json:
        facts["ranks"] = {f"rank {rank}": count for rank, count in report["ranks"].items()}
        facts["change"] = None if report["change"] is None else f"{100 * report['change']:.3g} % of the velocity"
    (print_json if json else print_facts)(facts)


@app.command()
def convert(file: File, out: Out, to: To, json: Json = False) -> None:
    """Write a LoRA in another dialect; nothing of it is approximated."""
    from fluxloom.weights.lora_doctor import fitting
    from fluxloom.weights.lora_file import open_lora, save_lora
    from fluxloom.weights.lora_write import write_lora

    found = fitting(*open_lora(file))
    _need_whole(file, found)
    state = write_lora(found, to)
    save_lora(state, out, {**_kept(found.metadata), "format": "pt"})
    facts = {"path": str(out), "from": found.dialect, "to": to, "tensors": len(state), "layers": len(found.updates)}
    (print_json if json else print_facts)({**facts, "left_out": list(found.text)})


@app.command()
def merge(
    words: Annotated[
        list[str],
        typer.Argument(metavar="BASE LORA[:WEIGHT]... DST", help="A model, LoRAs, where to write.", show_default=False),
    ],
    json: Json = False,
) -> None:
    """Write a model with LoRAs merged into its weights: a folder for a folder, a .safetensors file for a checkpoint."""
    if len(words) < 3:
        raise BadInput(f"got {len(words)} words, allowed BASE LORA[:WEIGHT]... DST, try `fluxloom lora merge --help`")
    from fluxloom.infer.loras import lora_weight
    from fluxloom.weights.lora_file import load_lora, merge_files, open_base

    pairs = [(path, lora_weight(weight)) for path, weight in map(weighted, words[1:-1])]
    base = open_base(words[0])
    loras = [load_lora(path, base.spec, weight) for path, weight in pairs]
    path = merge_files(base, loras, [path for path, _ in pairs], Path(words[-1]))
    facts = {"path": str(path), "base": words[0]}
    facts["merged"] = [{"file": str(path), "weight": weight} for path, weight in pairs]  # type: ignore[assignment]
    (print_json if json else print_facts)(facts)


@app.command()
def extract(
    base: Base,
    tuned: Annotated[str, typer.Argument(help="The same model, trained further.", show_default=False)],
    out: Out,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of each matrix.")] = 16,
    to: To = "official",
    json: Json = False,
) -> None:
    """Write what turns one model into another as a LoRA: the best approximation of its rank, layer by layer."""
    from fluxloom.weights.lora_file import open_base, save_lora
    from fluxloom.weights.lora_write import extract as extract_lora
    from fluxloom.weights.lora_write import write_lora

    one, other = open_base(base), open_base(tuned)
    if one.spec != other.spec:
        raise BadInput(f"got {base} and {tuned}, which are of different shapes, allowed two of one shape, try others")
    found = extract_lora(one.state, other.state, one.spec, rank)
    state = write_lora(found, to)
    save_lora(state, out, {"format": "pt"})
    (print_json if json else print_facts)({"path": str(out), "rank": rank, "to": to, "tensors": len(state)})


def weighted(word: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:WEIGHT``, unchecked; a file whose own name ends so is taken whole."""
    path, colon, number = word.rpartition(":")
    if not colon or Path(word).exists():
        return Path(word), 1.0
    try:
        return Path(path), float(number)
    except ValueError:
        return Path(word), 1.0


def _transformer(reference: str) -> Any:
    from fluxloom.core.transformer import Transformer
    from fluxloom.weights.load import build
    from fluxloom.weights.lora_file import open_base

    base = open_base(reference)
    return build(lambda: Transformer(base.spec), dict(base.state))


def _need_whole(file: Path, found: Any) -> None:
    if found.unmatched:
        from fluxloom.errors import WeightsError

        raise WeightsError(
            f"got {file} with {len(found.unmatched)} tensors that are not understood ({found.unmatched[0]}), "
            "allowed none, try `fluxloom lora inspect` to see them all"
        )


def _kept(metadata: Any) -> dict[str, str]:
    """Metadata that stay true in another dialect: PEFT's scales are in the tensors now."""
    return {name: value for name, value in metadata.items() if name not in ("lora_adapter_metadata", "format")}
