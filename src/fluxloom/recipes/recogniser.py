"""How the recogniser was made: training, calibration and measurement, as plain Python.

    python -m fluxloom.recipes.recogniser train --out runs/recogniser --minutes 4
    python -m fluxloom.recipes.recogniser measure --out runs/recogniser

``train`` ends with the averaged weights in ``runs/recogniser/weights``, calibrates them on scenes that were not trained
on, measures them on others and leaves a folder ``runs/recogniser/recogniser`` as the package ships it; its files go by
hand into ``src/fluxloom/assets/recogniser``. Everything runs at toy size on a laptop with ``--toy``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.measure.recogniser import HEADS, Network, Recogniser, RecogniserSpec
from fluxloom.recipes.nano import NANO, SHIPPED, load_autoencoder
from fluxloom.recipes.recogniser_data import (
    CLEAR,
    LABELS,
    SHADES,
    SIGN_AT,
    THINGS,
    UNCLEAR_AT,
    UNSEEN,
    Pictures,
    PictureSpec,
    Ring,
    concepts,
    load_pictures,
    prepare,
    presence_target,
)
from fluxloom.recipes.recogniser_measure import CALIBRATION_SEED, MEASUREMENT_SEED, calibrate, measure, unseen
from fluxloom.train.model import Batch
from fluxloom.train.optim import Optimiser
from fluxloom.weights.load import save_card, save_compact

Log = Callable[[dict[str, float]], None]


def network_spec() -> RecogniserSpec:
    """The network that ships, with a class for every word of the world."""
    heads = {name: len(LABELS[name]) for name in HEADS}
    return RecogniserSpec(concepts=len(concepts()), colours=len(SHADES), heads=heads)


@dataclass(frozen=True, kw_only=True)
class RecogniserRun:
    """A run: pictures rendered once, used about ``reuse`` times, in batches of ``batch``."""

    spec: RecogniserSpec = field(default_factory=network_spec)
    data: PictureSpec = field(default_factory=PictureSpec)
    steps: int = 40_000
    minutes: float | None = None  # the run also ends by the clock
    batch: int = 192
    reuse: int = 3
    ring: int = 12_288
    spoil: float = 0.22
    trips: float = 0.5  # of the pictures go through nano's autoencoder
    lr: float = 3e-3
    warmup: int = 200
    decay_from: float = 0.35
    weight_decay: float = 0.02
    clip: float = 2.0
    ema: float = 0.998
    seed: int = 0
    workers: int = 15
    compile: bool = False
    log_every: int = 50
    unseen: int = 40  # chunks each for calibration and for measurement


def toy_run(steps: int = 6) -> RecogniserRun:
    """The same in seconds on a processor."""
    return RecogniserRun(
        spec=replace(network_spec(), widths=(8, 16, 24), depths=(1, 1, 1), pooled=16, letters=16),
        data=PictureSpec(count=4), steps=steps, batch=4, reuse=1, ring=16, trips=0.25, warmup=2, workers=0,
        log_every=1, unseen=1,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ training


def losses(network: Network, batch: Batch) -> dict[str, Tensor]:
    """What is wrong with the network's view of a batch, by part."""
    image = batch["image"].contiguous(memory_format=torch.channels_last)
    scores = network(image)
    heads = [known_loss(scores.heads[name], batch["heads"][:, i]) for i, name in enumerate(HEADS)]
    out = {
        "cells": cell_loss(scores.cells, batch),
        "presence": presence_loss(scores.presence, batch),
        "colour": colour_loss(scores.colour, batch),
        "heads": torch.stack(heads).mean(),
    }
    signed = torch.nonzero(batch["letters"][:, 0])[:, 0]
    if len(signed):
        box, letters = batch["box"][signed], batch["letters"][signed]
        out["box"] = (scores.box[signed] - box).abs().mean() * 16
        out["letters"] = letter_loss(network, batch["image"][signed], box, letters)
    return out


WEIGHTS = {"cells": 1.0, "presence": 0.25, "colour": 0.4, "heads": 0.8, "box": 0.4, "letters": 0.4}


def total(parts: dict[str, Tensor]) -> Tensor:
    """The parts, weighted to be of like size in the middle of training."""
    return torch.stack([WEIGHTS[name] * value for name, value in parts.items()]).sum()


def cell_loss(cells: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy against the share that each class has of a cell; things weigh more than what lies behind them.

    cells [B, N + 3, h, w]; the classes are the concepts, nothing, unclear, sign.
    """
    logs = cells.log_softmax(1)
    shares = batch["shares"].float()
    n = len(concepts())
    nothing = shares[:, 0] * logs[:, n]
    unclear = shares[:, UNCLEAR_AT] * logs[:, n + 1]
    sign = shares[:, SIGN_AT] * logs[:, n + 2]
    ids = batch["ids"].clamp_min(0)
    of_things = logs.gather(1, ids[:, :, None, None].expand(-1, -1, *logs.shape[2:]))
    things = (shares[:, 1 : THINGS + 1] * of_things).sum(1)
    return -(0.5 * nothing + 2 * unclear + sign + 2 * things).mean()


def presence_loss(presence: Tensor, batch: Batch) -> Tensor:
    """Binary cross-entropy over all concepts and the sign [B, N + 1], summed; what cannot be known is left out."""
    target, asked = presence_target(batch)
    each = F.binary_cross_entropy_with_logits(presence, target, reduction="none")
    return (each * asked).sum(1).mean()


def known_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy [B, labels] over the pictures whose label can be known; zero where there are none."""
    each = F.cross_entropy(logits, label, ignore_index=UNSEEN, reduction="sum")
    return each / (label != UNSEEN).sum().clamp_min(1)


def colour_loss(colour: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the colours [B, N, colours] of what is clearly there."""
    known = (batch["state"] == CLEAR) & (batch["colours"] >= 0)
    picture, k = torch.nonzero(known, as_tuple=True)
    if not len(picture):
        return colour.sum() * 0
    return F.cross_entropy(colour[picture, batch["ids"][picture, k]], batch["colours"][picture, k])


def letter_loss(network: Network, image: Tensor, box: Tensor, letters: Tensor) -> Tensor:
    """CTC, per letter, on boards [B, 4] that are cut out a little wrong: the network's own boxes will be."""
    high = (box[:, 3] - box[:, 1])[:, None]
    scores = network.spell(image, box + high * 0.05 * torch.randn_like(box).clamp(-2, 2))
    lengths = (letters > 0).sum(1)
    columns = torch.full_like(lengths, scores.shape[1])
    each = F.ctc_loss(scores.transpose(0, 1), letters, columns, lengths, reduction="none", zero_infinity=True)
    return (each / lengths).mean()


class Feed:
    """The ring of pictures, and the stream of fresh ones into it."""

    def __init__(self, run: RecogniserRun, vae: Autoencoder | None, device: torch.device) -> None:
        self.run, self.vae = run, vae
        self.generator = torch.Generator(device).manual_seed(run.seed)
        self.ring = Ring(run.ring)
        pictures = Pictures(run.data, run.seed, 10**9)
        self.chunks: Iterator[Batch] = load_pictures(pictures, run.workers)
        self.owed = 2 * run.batch  # pictures that should have been put by now

    def next(self) -> Batch:
        while self.ring.written < self.owed:
            fresh = prepare(next(self.chunks), self.vae, self.run.spoil, self.run.trips, self.generator)
            self.ring.put(fresh)
        self.owed += self.run.batch // self.run.reuse
        return self.ring.draw(self.run.batch, self.generator)


def fit(
    run: RecogniserRun, vae: Autoencoder | None, device: torch.device, out: Path, log: Log | None = None
) -> dict[str, Tensor]:
    """Train on this device, write the averaged weights to ``out/weights`` at the end, and return them (CPU)."""
    torch.manual_seed(run.seed)
    network = Network(run.spec)
    network.initialise()
    network.to(device)
    optimiser = Optimiser(
        network, lr=run.lr, weight_decay=run.weight_decay, betas=(0.9, 0.98), ema=run.ema, clip=run.clip
    )
    if run.compile:
        network.body.compile()
    start = time.monotonic()
    feed = Feed(run, vae, device)
    for step in range(run.steps):
        share = max(step / run.steps, (time.monotonic() - start) / (60 * run.minutes) if run.minutes else 0.0)
        if share >= 1:
            break
        batch = feed.next()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts = losses(network, batch)
        total(parts).backward()
        norm = optimiser.step(min(1.0, (step + 1) / run.warmup, (1 - share) / (1 - run.decay_from)), step)
        if log is not None and step % run.log_every == 0:
            row = {name: float(value.detach()) for name, value in parts.items()} | {"norm": float(norm)}
            log({"step": step, "seconds": time.monotonic() - start, "pictures": feed.ring.written, **row})
    state = {name: value.cpu() for name, value in optimiser.weights().items()}
    save_compact(state, out / "weights", default="float32")
    return state


def export(state: dict[str, Tensor], run: RecogniserRun, folder: Path) -> None:
    """Weights in 6 bits and the card: every word the recogniser knows, its sizes, and no calibration yet."""
    save_compact(state, folder, default="int6")
    sizes = {key: value for key, value in asdict(run.spec).items() if key in ("widths", "depths", "pooled", "letters")}
    card = {
        "recipe": "fluxloom.recipes.recogniser",
        "parameters": sum(value.numel() for value in state.values()),
        "concepts": list(concepts()),
        "colours": list(SHADES),
        "heads": {name: list(labels) for name, labels in LABELS.items()},
        "sizes": sizes,
        "threshold": 0.5,
        "calibration": {"presence": [1.0, 0.0], "board": [1.0, 0.0], "sign": [1.0, 0.0]},
    }
    save_card(folder, "recogniser", card)


def finish(run: RecogniserRun, vae: Autoencoder, device: torch.device, out: Path) -> dict[str, Any]:
    """Calibrate and measure the recogniser in ``out/recogniser``, write both into its card, and all of the
    measurements to ``out/measured.json``; returns the latter."""
    folder = out / "recogniser"
    judge = Recogniser.load(folder, device.type)
    batches = partial(unseen, run.data, chunks=run.unseen, vae=vae, workers=run.workers, device=device)
    facts: dict[str, Any] = {"date": datetime.date.today().isoformat()}
    facts["calibration"] = calibrate(judge, batches(seed=CALIBRATION_SEED))
    judge = Recogniser(judge.network, {**judge.card, **facts})
    measured = measure(judge, batches(seed=MEASUREMENT_SEED))
    (out / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
    brief = {name: _without_slices(value) for name, value in measured.items()}
    card = {key: value for key, value in judge.card.items() if key not in ("schema", "model", "files")}
    save_card(folder, "recogniser", {**card, "measured": brief})
    return measured


def _without_slices(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in rows.items() if " with " not in name}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fluxloom.recipes.recogniser", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="end training by the clock")
    parser.add_argument("--steps", type=int, help="end training by steps")
    parser.add_argument("--workers", type=int, help="processes that render")
    parser.add_argument("--batch", type=int, help="pictures a step")
    parser.add_argument("--compile", action="store_true", help="compile the network's body")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, seconds on a processor")
    args = parser.parse_args(arguments)
    run = toy_run() if args.toy else RecogniserRun()
    given = {key: getattr(args, key) for key in ("minutes", "steps", "workers", "batch")}
    run = replace(run, compile=args.compile, **{key: value for key, value in given.items() if value is not None})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)

    def log(row: dict[str, float]) -> None:
        line = json.dumps({key: round(value, 4) for key, value in row.items()})
        print(line, flush=True)
        with (args.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    vae = load_autoencoder(SHIPPED, NANO.autoencoder).to(device, torch.bfloat16 if device.type == "cuda" else None)
    if args.what == "train":
        export(fit(run, vae, device, args.out, log), run, args.out / "recogniser")
    for name, rows in finish(run, vae, device, args.out).items():
        print(name, *(f"  {what}: {value}" for what, value in rows.items()), sep="\n")


if __name__ == "__main__":
    main()
