"""The training stack at toy size: the loss falls, a resumed run is the same run, ranks stay equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.text import Tokenizer
from fluxloom.recipes import nano
from fluxloom.train.loop import RunSpec, Trainer, rate_at
from fluxloom.weights.load import load_folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(nano.vocabulary(), 48)


def trainer(run: RunSpec, tokenizer: Tokenizer, out: Path) -> Trainer:
    torch.manual_seed(1)
    return Trainer(run, Autoencoder(run.spec.autoencoder), tokenizer, out)


def test_vocabulary_fits_the_row() -> None:
    assert nano.NANO.text is not None
    assert len(nano.vocabulary()) <= nano.NANO.text.vocab_size


def test_loss_falls(tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = replace(nano.toy_run(steps=60), log_every=5)
    losses = [row["draw"] + row["edit"] for row in trainer(run, tokenizer, tmp_path).fit()]
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == list(range(5, 65, 5))


def test_resume_is_exact(tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = nano.toy_run(steps=12)
    whole = trainer(run, tokenizer, tmp_path)
    whole.fit()

    first = trainer(run, tokenizer, tmp_path)
    first.fit(until=7)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = trainer(run, tokenizer, tmp_path)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.step == 7
    second.fit()
    for name, weight in whole.optimiser.weights().items():
        assert torch.equal(weight, second.optimiser.weights()[name]), name


def test_resume_without_moments_is_not_exact(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The negative control of the test above: forgetting the optimiser's state must show."""
    run = nano.toy_run(steps=12)
    whole, second = trainer(run, tokenizer, tmp_path), trainer(run, tokenizer, tmp_path)
    whole.fit()
    first = trainer(run, tokenizer, tmp_path)
    first.fit(until=7)
    second.optimiser.start_from(first.optimiser.weights())
    second.step = 7
    second.fit()
    assert not all(torch.equal(w, second.optimiser.weights()[n]) for n, w in whole.optimiser.weights().items())


def test_distillation_learns_its_teacher(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """At first the student, which was never told a scale, is off by the guidance; then less."""
    run = replace(nano.toy_run(steps=60), distil=True, log_every=5, lr=5e-4)
    stage = replace(run.stages[0], draw=replace(run.stages[0].draw, guidance=(2.0, 5.0)))
    teacher = trainer(run, tokenizer, tmp_path).optimiser.weights()
    for name in ("transformer.final_layer.linear.weight", "transformer.single_blocks.0.modulation.lin.weight"):
        torch.nn.init.normal_(teacher[name], std=0.1)
    student = trainer(replace(run, stages=(stage,)), tokenizer, tmp_path)
    student.start_from(teacher)
    losses = [row["draw"] for row in student.fit()]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_rate_warms_up_stays_and_falls() -> None:
    run = RunSpec(spec=nano.TOY, stages=(), steps=1000, warmup=10, decay_from=0.5)
    assert rate_at(0.0, 0, run) == pytest.approx(0.1)
    assert rate_at(0.3, 300, run) == 1.0
    assert rate_at(0.75, 750, run) == pytest.approx(0.5)
    assert rate_at(1.0, 1000, run) == 0.0


# What torchrun starts on each rank: the recipe's own command, and at its end what that rank holds.
RANK = """
import sys, torch
from fluxloom.recipes import nano

class Kept(nano.Trainer):
    def fit(self, **options):
        losses = super().fit(**options)
        torch.save((self.optimiser.master, losses), self.out / f"rank{self.rank.index}.pt")
        return losses

nano.Trainer = Kept
nano.main(sys.argv[1:])
"""


def test_recipe_commands_end_to_end_and_ranks_agree(tmp_path: Path) -> None:
    """vocabulary, autoencoder, train on two processes, export: as the recipe's docstring says."""
    out = ["--out", str(tmp_path)]
    nano.main(["vocabulary", *out])
    nano.main(["autoencoder", "--toy", *out])
    facts = json.loads((tmp_path / "autoencoder" / "facts.json").read_text())
    print(facts)
    assert facts["psnr"] > 10

    (tmp_path / "rank.py").write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "rank.py"), "train", "--toy", *out],
        env=os.environ | {"PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (one, losses), (two, others) = (torch.load(tmp_path / f"rank{k}.pt", weights_only=True) for k in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert losses[-1]["draw"] != others[-1]["draw"], "both ranks saw the same pictures"
    weights = load_folder(tmp_path / "model")
    assert all(torch.isfinite(w).all() for w in weights.values())

    nano.main(["export", "--assets", str(tmp_path / "assets"), "--facts", '{"note": "toy"}', *out])
    card = json.loads((tmp_path / "assets" / "card.json").read_text())
    assert card["note"] == "toy"
    assert "vocab.txt" in card["files"]
