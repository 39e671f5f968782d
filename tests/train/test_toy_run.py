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
from fluxloom.weights.load import load_compact


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


def test_rate_warms_up_stays_and_falls() -> None:
    run = RunSpec(spec=nano.TOY, stages=(), steps=1000, warmup=10, decay_from=0.5)
    assert rate_at(0.0, 0, run) == pytest.approx(0.1)
    assert rate_at(0.3, 300, run) == 1.0
    assert rate_at(0.75, 750, run) == pytest.approx(0.5)
    assert rate_at(1.0, 1000, run) == 0.0


def test_recipe_commands_end_to_end_and_ranks_agree(tmp_path: Path) -> None:
    """vocabulary, autoencoder, train on two processes, export: as the recipe's docstring says."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    recipe = ["-m", "fluxloom.recipes.nano"]

    def run(*command: str) -> None:
        done = subprocess.run(
            [sys.executable, *command, "--out", str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]

    run(*recipe, "vocabulary")
    run(*recipe, "autoencoder", "--toy")
    facts = json.loads((tmp_path / "autoencoder" / "facts.json").read_text())
    assert facts["psnr"] > 5
    run(
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29533",
        *recipe,
        "train",
        "--toy",
    )
    weights = load_compact(sorted((tmp_path / "model").glob("*.safetensors")))
    assert all(torch.isfinite(w).all() for w in weights.values())
    run(*recipe, "export", "--assets", str(tmp_path / "assets"), "--facts", '{"note": "toy"}')
    card = json.loads((tmp_path / "assets" / "card.json").read_text())
    assert card["note"] == "toy"
    assert "vocab.txt" in card["files"]
