"""The training loop of nano: rank and file, one step after another, resumable at any of them."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.specs import ModelSpec
from fluxloom.core.text import Tokenizer
from fluxloom.train.data import Chunk, Chunks, DataSpec, Pool, load_chunks
from fluxloom.train.graphs import CapturedBackward
from fluxloom.train.model import Batch, Draw, Trainee, flow_loss, guidance_loss
from fluxloom.train.optim import Optimiser

# Times: objects are decided at t > 0.75, so look there (measured); the deviation is wider than 1, so that the clean
# end, where edges sharpen, is seen too.
DRAW = Draw(mean=0.8, std=1.2, dropout=0.1)
EDIT = Draw(mean=0.6, std=1.2, dropout=0.1)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the curriculum: up to ``until`` of the run (0..1), on this data, with these batches on each rank.

    One chunk is rendered every ``refresh`` steps; the pool holds ``pool`` samples of each kind.
    """

    until: float
    data: DataSpec
    draws: int
    edits: int
    pool: int
    refresh: int = 1
    draw: Draw = DRAW
    edit: Draw = EDIT


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A whole training run."""

    spec: ModelSpec
    stages: tuple[Stage, ...]
    steps: int
    minutes: float | None = None  # the run also ends when this much time has passed: the rate falls by the nearer end
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.999
    warmup: int = 300
    decay_from: float = 0.6  # of the run; the rate falls linearly to zero from there
    distil: bool = False  # instead of data, learn from the starting weights under guidance
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    compile: bool = True
    workers: int = 14
    log_every: int = 50
    save_every: float = 280.0  # seconds


@dataclass(frozen=True)
class Rank:
    """This process among all."""

    index: int
    count: int
    device: torch.device

    @classmethod
    def find(cls) -> Rank:
        """From torchrun's environment; alone without it."""
        index, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(index, count, device)

    def leave(self) -> None:
        """After the last step."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def rate_at(progress: float, step: int, run: RunSpec) -> float:
    """Warm-up, plateau, linear fall to zero, as a share of the base rate."""
    fall = (1 - progress) / (1 - run.decay_from)
    return max(0.0, min(1.0, (step + 1) / run.warmup, fall))


class Progress:
    """How much of the run is done, by steps or by the clock, the same on all ranks."""

    def __init__(self, run: RunSpec, rank: Rank) -> None:
        self.run, self.rank = run, rank
        self.start = time.monotonic()
        self.by_clock = 0.0

    def at(self, step: int) -> float:
        if self.run.minutes is not None and step % 20 == 0:
            share = torch.tensor((time.monotonic() - self.start) / (60 * self.run.minutes), device=self.rank.device)
            if self.rank.count > 1:
                dist.broadcast(share, src=0)
            self.by_clock = float(share)
        return min(1.0, max(step / self.run.steps, self.by_clock))


class Trainer:
    """One rank of a run."""

    def __init__(self, run: RunSpec, autoencoder: Autoencoder, tokenizer: Tokenizer, out: Path) -> None:
        self.run, self.tokenizer, self.out = run, tokenizer, out
        self.rank = Rank.find()
        torch.manual_seed(run.seed)  # the same first weights on every rank
        self.model = Trainee(run.spec)
        self.model.initialise()
        self.model.to(self.rank.device, run.dtype)
        self.autoencoder = autoencoder.to(self.rank.device, run.dtype).eval().requires_grad_(False)
        self.optimiser = Optimiser(
            self.model, lr=run.lr, weight_decay=run.weight_decay, betas=run.betas, ema=run.ema, clip=run.clip
        )
        self.teacher: Trainee | None = None
        self.captured: dict[tuple[str, int], CapturedBackward] = {}
        if run.compile:
            compile_blocks(self.model)
            # Chunks have one size a stage.
            self.autoencoder.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.autoencoder.encoder.compile(dynamic=False)
        self.empty = torch.tensor(tokenizer.encode(""), device=self.rank.device)
        self.step = 0
        self.losses: list[dict[str, float]] = []

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begin from given weights, with fresh moments; of a distillation they are the teacher's too."""
        self.optimiser.start_from(weights)
        if self.run.distil:
            self.teacher = Trainee(self.run.spec).requires_grad_(False).eval()
            self.teacher.load_state_dict(weights)
            self.teacher.to(self.rank.device, self.run.dtype)
            if self.run.compile:
                compile_blocks(self.teacher)

    def fit(self, save: Callable[[Trainer], None] | None = None, until: int | None = None) -> list[dict[str, float]]:
        """Run to the end, or until a step; ``save`` is called on rank 0 now and then, and at the end. Returns the
        logged losses."""
        progress = Progress(self.run, self.rank)
        saved = time.monotonic()
        stage: Stage | None = None
        seconds = time.monotonic()
        last = self.run.steps if until is None else min(until, self.run.steps)
        while self.step < last and (share := progress.at(self.step)) < 1.0:
            now = next(s for s in self.run.stages if share < s.until or s is self.run.stages[-1])
            if now is not stage:
                stage = now
                feed = Feed(self, stage)
            feed.advance(self.step + 1)
            loss = self._update(stage, feed.pool, share)
            self.step += 1
            if self.step % self.run.log_every == 0:
                row = {k: float(v) for k, v in loss.items()}  # the only synchronisation with the device
                row |= {
                    "step": self.step,
                    "progress": share,
                    "seconds": time.monotonic() - seconds,
                    "size": stage.data.size,
                }
                self._log(row)
            if save is not None and self.rank.index == 0 and time.monotonic() - saved > self.run.save_every:
                save(self)
                saved = time.monotonic()
        if save is not None and self.rank.index == 0:
            save(self)
        return self.losses

    def _update(self, stage: Stage, pool: Pool, share: float) -> dict[str, Tensor]:
        generator = torch.Generator(self.rank.device).manual_seed(
            (self.run.seed * 1_000_003 + self.step) * 1_000_003 + self.rank.index
        )
        out: dict[str, Tensor] = {}
        for kind, count, draw in (("draw", stage.draws, stage.draw), ("edit", stage.edits, stage.edit)):
            if count:
                batch = draw.add(pool.draw(kind, count, generator), self.empty, generator)
                share_of_batch = count / (stage.draws + stage.edits)
                out[kind] = self._backward(f"{kind}/{stage.data.size}", batch, share_of_batch) / share_of_batch
        out["norm"] = self.optimiser.step(rate_at(share, self.step, self.run), self.step)
        return out

    def _backward(self, name: str, batch: Batch, share: float) -> Tensor:
        """Add the gradients of ``share`` times the loss; on a GPU by a graph captured at the first batch."""

        def loss(batch: Batch) -> Tensor:
            if self.run.distil:
                assert self.teacher is not None, "a distillation starts from weights"
                return share * guidance_loss(self.model, self.teacher, self.empty, batch)
            return share * flow_loss(self.model, batch)

        if self.rank.device.type != "cuda":
            value = loss(batch)
            value.backward()
            return value.detach()
        key = (name, len(batch["image"]))
        if key not in self.captured:
            self.captured[key] = CapturedBackward(loss, batch, self.optimiser.gradient)
        return self.captured[key](batch)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] to latents in the run's precision."""
        return self.autoencoder.encode(pixels.to(self.run.dtype, memory_format=torch.channels_last))

    def _log(self, row: dict[str, float]) -> None:
        self.losses.append(row)
        if self.rank.index == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "log.jsonl").open("a") as file:
                file.write(json.dumps({k: round(v, 5) for k, v in row.items()}) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs; the pool is rendered again from the step number."""
        return {"step": self.step, "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimiser.load_state_dict(state["optimiser"])


class Feed:
    """The pool of one stage and the stream of chunks that refreshes it. Its content depends on the step alone."""

    def __init__(self, trainer: Trainer, stage: Stage) -> None:
        self.stage = stage
        run, rank = trainer.run, trainer.rank
        data = stage.data
        per_chunk = max(data.draws, data.edits)
        first_fill = math.ceil(max(stage.draws, stage.edits) * 2 / per_chunk)
        chunks_by_now = first_fill + trainer.step // stage.refresh
        ring = math.ceil(stage.pool / min(n for n in (data.draws, data.edits) if n))
        first = max(0, chunks_by_now - ring)
        count = run.steps // stage.refresh + first_fill + 1 - first
        self.pool = Pool(stage.pool, trainer.encode, rank.device)
        # Slots are a function of the samples ever written, so a resumed ring is the same ring.
        self.pool.written = {"draw": first * data.draws, "edit": first * data.edits}
        chunks = Chunks(data, trainer.tokenizer, run.seed, rank.index, first, count)
        self.chunks: Iterator[Chunk] = load_chunks(chunks, data.mix, run.workers)
        for _ in range(chunks_by_now - first):
            self.pool.put(next(self.chunks))

    def advance(self, step: int) -> None:
        """Refresh the pool for step ``step``, counted from 1."""
        if step % self.stage.refresh == 0:
            self.pool.put(next(self.chunks))


def compile_blocks(model: Trainee) -> None:
    """Compile what repeats, once for all repetitions of a kind: quick to start, nearly as fast as the whole."""
    for blocks in (model.text.blocks, model.transformer.double_blocks, model.transformer.single_blocks):
        for block in blocks:
            block.compile(dynamic=False)  # a graph for each shape runs 8 % faster than one for all
