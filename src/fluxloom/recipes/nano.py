"""How nano was made: vocabulary, autoencoder, text tower and transformer together, then guidance as an input.

    python -m fluxloom.recipes.nano vocabulary --out runs/nano
    python -m fluxloom.recipes.nano autoencoder --out runs/nano --minutes 3.6
    torchrun --nproc-per-node 4 -m fluxloom.recipes.nano train --out runs/nano --minutes 13
    torchrun --nproc-per-node 4 -m fluxloom.recipes.nano refine --out runs/nano --minutes 14
    torchrun --nproc-per-node 4 -m fluxloom.recipes.nano distil --out runs/nano --minutes 4
    python -m fluxloom.recipes.nano export --out runs/nano
    python -m fluxloom.recipes.nano measure --out runs/nano

The autoencoder's latent statistics go by hand into core/specs.py (``scale_factor``, ``shift_factor``): the row is the
one place that knows them. Everything runs at toy size on a laptop with ``--toy``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxloom import world
from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.specs import MODELS, AutoencoderSpec, ModelSpec, TextSpec, TransformerSpec
from fluxloom.core.text import SPECIALS, Tokenizer, split_words
from fluxloom.errors import BadInput
from fluxloom.train.autoencoder import AutoencoderRun, fit_autoencoder, latent_statistics
from fluxloom.train.data import Chunks, DataSpec, Pool, to_unit
from fluxloom.train.loop import DRAW, Rank, RunSpec, Stage, Trainer
from fluxloom.train.model import Draw, Trainee, flow_loss
from fluxloom.weights.load import ASSETS, build, load_folder, part, save_card, save_compact

NANO = MODELS["nano"]
SHIPPED = ASSETS / NANO.name
# One double block is the thinnest member of the family; width, heads and axes are the smallest that attention accepts.
TOY = replace(
    NANO,
    transformer=TransformerSpec(
        hidden_size=32,
        num_heads=2,
        axes_dim=(4, 6, 6),
        depth=1,
        depth_single_blocks=1,
        context_in_dim=32,
        vec_in_dim=32,
    ),
    autoencoder=AutoencoderSpec(ch=8, num_res_blocks=1, norm_groups=4, scale_factor=1.0, shift_factor=0.0),
    text=replace(NANO.text or TextSpec(vocab_size=0), width=32, layers=1, heads=2),
)


def vocabulary() -> list[str]:
    """Every word the world can say, single letters for signs, and pieces to spell what it cannot."""
    counts: Counter[str] = Counter(word for text in world.vocabulary_texts() for word in split_words(text))
    letters = [
        *string.ascii_uppercase,
        *string.digits,
        *string.ascii_lowercase,
        *(f"##{c}" for c in string.ascii_lowercase),
    ]
    endings = ["##s", "##es", "##ed", "##ing"]  # so that a plural the world never says still means its word
    known = dict.fromkeys([*SPECIALS, *letters, *endings, *string.punctuation])
    words = list(known) + sorted(word for word in counts if word not in known)
    return words + [f"[SPARE{i}]" for i in range(-len(words) % 64)]


def autoencoder_run(minutes: float | None = None) -> AutoencoderRun:
    """3.9 M parameters; 34.3 dB on unseen scenes after 3,860 steps, 3.6 minutes on one H200."""
    return AutoencoderRun(
        spec=NANO.autoencoder,
        data=DataSpec(mix=world.Mix.scenes(), size=256, draws=32, edits=0),
        steps=30_000,
        minutes=minutes,
    )


def run(minutes: float | None = None) -> RunSpec:
    """Text tower and transformer from random numbers; batches are for each of four ranks."""
    return RunSpec(
        spec=NANO,
        stages=(
            # Large single objects at low resolution first: that is how a small model learns shapes (measured).
            Stage(
                until=0.22,
                data=DataSpec(mix=world.Mix.objects(), size=128, draws=64, edits=64),
                draws=512, edits=160, pool=8_192,
            ),
            Stage(
                until=0.6,
                data=DataSpec(mix=world.Mix.objects(), size=256, draws=48, edits=48),
                draws=192, edits=96, pool=8_192,
            ),
            Stage(
                until=1.0,
                data=DataSpec(mix=world.Mix.scenes(), size=256, draws=48, edits=48),
                draws=192, edits=96, pool=8_192,
            ),
        ),
        steps=60_000,
        minutes=minutes,
        lr=1.5e-3,
    )  # fmt: skip


# Single things keep their share, as they are what scenes are made of; signs are twice as many as in the balanced mix.
LESSONS = replace(world.Mix.scenes(), large=0.42, medium=0.12, two=0.34, three=0.09, four=0.03, sign=0.16, filter=0.06)


def _lessons(draw: Draw, edit: Draw) -> tuple[Stage, ...]:
    # A chunk every other step: encoding one takes the GPU as long as a fifth of a step, rendering two processors.
    data = DataSpec(mix=LESSONS, size=256, draws=28, edits=60)
    return (Stage(until=1.0, data=data, draws=96, edits=176, pool=12_288, refresh=2, draw=draw, edit=edit),)


def refinement(minutes: float | None = None) -> RunSpec:
    """More of the same from trained weights, on everything at once; batches are for each of four ranks."""
    return RunSpec(
        spec=NANO,
        stages=_lessons(DRAW, DRAW),
        steps=60_000,
        minutes=minutes,
        lr=1.5e-3,
        decay_from=0.5,
        seed=1,
    )


def distillation(minutes: float | None = None) -> RunSpec:
    """Guidance becomes an input: the two evaluations of a step become one. The teacher is the starting model."""
    return RunSpec(
        spec=NANO,
        stages=_lessons(
            Draw(mean=0.8, std=1.2, dropout=0.05, guidance=(1.0, 6.0)),
            Draw(mean=0.8, std=1.2, dropout=0.05, guidance=(1.0, 4.0)),
        ),
        steps=60_000,
        minutes=minutes,
        lr=5e-4,
        warmup=100,
        decay_from=0.4,
        distil=True,
        seed=2,
    )


def toy_run(steps: int = 40) -> RunSpec:
    """The same loop in seconds on a processor."""
    data = DataSpec(mix=world.Mix.objects(), size=64, draws=4, edits=2)
    stage = Stage(until=1.0, data=data, draws=8, edits=4, pool=16)
    return RunSpec(
        spec=TOY,
        stages=(stage,),
        steps=steps,
        lr=3e-3,
        warmup=5,
        dtype=torch.float32,
        compile=False,
        workers=0,
        log_every=5,
    )


def toy_autoencoder_run(steps: int = 40) -> AutoencoderRun:
    data = DataSpec(mix=world.Mix.objects(), size=64, draws=8, edits=0)
    return AutoencoderRun(
        spec=TOY.autoencoder,
        data=data,
        steps=steps,
        workers=0,
        dtype=torch.float32,
        compile=False,
    )


def _save_vocabulary(out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "vocab.txt"
    path.write_text("\n".join(vocabulary()) + "\n", "utf-8")
    return path


def _tokenizer(out: Path, spec: ModelSpec) -> Tokenizer:
    path = out / "vocab.txt" if (out / "vocab.txt").exists() else SHIPPED / "vocab.txt"
    return Tokenizer(path.read_text("utf-8").splitlines(), spec.text.max_length if spec.text else 0)


def make_autoencoder(out: Path, spec: AutoencoderRun) -> dict[str, float]:
    """Train the autoencoder, write it to ``out/autoencoder`` and return its latent statistics and quality."""
    rank = Rank.find()
    if rank.count > 1:
        raise BadInput(f"got {rank.count} processes for the autoencoder, allowed 1, try python instead of torchrun")
    model = fit_autoencoder(
        spec,
        rank.device,
        log=lambda row: print(json.dumps({k: round(v, 4) for k, v in row.items()}), flush=True),
    )
    save_compact({f"autoencoder.{k}": v for k, v in model.state_dict().items()}, out / "autoencoder", default="float16")
    unseen = Chunks(replace(spec.data, draws=2 * spec.data.draws), Tokenizer(SPECIALS, 1), spec.seed + 1, 0, 0, 1)[0]
    x = to_unit(unseen["draw.image"], torch.device("cpu"))
    scale, shift = latent_statistics(model, x)
    facts = {"scale_factor": scale, "shift_factor": shift, **round_trip(model, x)}
    (out / "autoencoder" / "facts.json").write_text(json.dumps(facts))
    return facts


@torch.no_grad()
def round_trip(model: Autoencoder, x: Tensor) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB of pictures through the autoencoder: the mean and the tenth percentile."""
    psnr = 10 * torch.log10(4 / (model(x).clamp(-1, 1) - x).square().mean(dim=(1, 2, 3)))
    return {"psnr": float(psnr.mean()), "psnr_p10": float(psnr.quantile(0.1))}


def load_autoencoder(folder: Path, spec: AutoencoderSpec) -> Autoencoder:
    """The autoencoder of an earlier ``make_autoencoder``, or of the shipped model."""
    return build(lambda: Autoencoder(spec), part(load_folder(folder), "autoencoder"))


def fit(out: Path, spec: RunSpec, start_from: Path | None = None) -> list[dict[str, float]]:
    """Train text tower and transformer; rank 0 writes the averaged weights to ``out/model`` as it goes."""
    home = out / "autoencoder" if (out / "autoencoder").exists() else SHIPPED
    trainer = Trainer(spec, load_autoencoder(home, spec.spec.autoencoder), _tokenizer(out, spec.spec), out)
    if start_from is not None:
        trainer.start_from({k: v for k, v in load_folder(start_from).items() if not k.startswith("autoencoder.")})
    losses = trainer.fit(save=lambda t: _save_weights(t.optimiser.weights(), out))
    trainer.rank.leave()
    return losses


def _save_weights(weights: dict[str, Tensor], out: Path) -> None:
    save_compact(weights, out / "model", default="int8")  # 0.1 % more loss, and small enough to carry and resume from


def run_weights(out: Path) -> dict[str, Tensor]:
    """All weights that a run left in its folder."""
    return load_folder(out / "model") | load_folder(out / "autoencoder")


def export(out: Path, assets: Path, facts: dict[str, Any]) -> None:
    """Shards, vocabulary and card as the package ships them, all in 6 bits."""
    state = run_weights(out)
    save_compact(state, assets, default="int6")
    (assets / "vocab.txt").write_bytes((out / "vocab.txt").read_bytes())
    count = sum(tensor.numel() for tensor in state.values())
    date = datetime.date.today().isoformat()
    save_card(assets, NANO.name, {"recipe": "fluxloom.recipes.nano", "date": date, "parameters": count, **facts})


@torch.no_grad()
def measure(out: Path, assets: Path, count: int = 64) -> dict[str, dict[str, float]]:
    """What compact storage costs: the denoising losses and the autoencoder's round trip on unseen scenes, from the
    run's own weights and from the shipped ones, with the same noise, times and texts."""
    data = DataSpec(mix=world.Mix.scenes(), size=256, draws=count, edits=count)
    tokenizer = _tokenizer(out, NANO)
    chunk = Chunks(data, tokenizer, 1_000_003, 0, 0, 1)[0]
    pool = Pool(count, load_autoencoder(out / "autoencoder", NANO.autoencoder).encode, torch.device("cpu"))
    pool.put(chunk)
    pictures = to_unit(chunk["draw.image"], torch.device("cpu"))
    empty = torch.tensor(tokenizer.encode(""))
    rows: dict[str, dict[str, float]] = {}
    for name, state in {"run": run_weights(out), "shipped": load_folder(assets)}.items():
        model = build(lambda: Trainee(NANO), {k: v for k, v in state.items() if not k.startswith("autoencoder.")})
        rows[name] = {}
        for kind in ("draw", "edit"):
            generator = torch.Generator().manual_seed(0)
            batch = Draw(mean=0.8, std=1.2).add(pool.draw(kind, count, generator), empty, generator)
            rows[name][kind] = float(flow_loss(model, batch))
        rows[name] |= round_trip(build(lambda: Autoencoder(NANO.autoencoder), part(state, "autoencoder")), pictures)
    return rows


RUNS: dict[str, Callable[[bool, float | None], RunSpec]] = {
    "train": lambda toy, minutes: toy_run() if toy else run(minutes),
    "refine": lambda toy, minutes: toy_run() if toy else refinement(minutes),
    "distil": lambda toy, minutes: replace(toy_run(), distil=True) if toy else distillation(minutes),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fluxloom.recipes.nano", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["vocabulary", "autoencoder", *RUNS, "export", "measure"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="end by the clock")
    parser.add_argument(
        "--start-from", type=Path, help="folder of compact weights to go on from; refine, distil: out/model"
    )
    parser.add_argument("--assets", type=Path, default=SHIPPED, help="where export writes")
    parser.add_argument("--facts", type=json.loads, default={}, help="what else the model card should say, as JSON")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, seconds on a processor")
    args = parser.parse_args(arguments)
    if args.what == "vocabulary":
        print(_save_vocabulary(args.out))
    elif args.what == "autoencoder":
        print(
            json.dumps(make_autoencoder(args.out, toy_autoencoder_run() if args.toy else autoencoder_run(args.minutes)))
        )
    elif args.what in RUNS:
        earlier = None if args.what == "train" else args.out / "model"
        fit(args.out, RUNS[args.what](args.toy, args.minutes), args.start_from or earlier)
    elif args.what == "export":
        export(args.out, args.assets, args.facts)
    else:
        print(json.dumps(measure(args.out, args.assets), indent=2))


if __name__ == "__main__":
    main()
