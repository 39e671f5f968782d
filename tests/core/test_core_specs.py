"""The rows of the family agree with themselves and with the modules that read them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.shapes import CELL, PATCH, token_count
from fluxloom.core.solvers import SOLVERS
from fluxloom.core.specs import KONTEXT_SIZES, MODELS, ModelSpec, TransformerSpec
from fluxloom.core.text import TextTower
from fluxloom.core.transformer import Transformer

each = pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)


@each
def test_members(spec: ModelSpec) -> None:
    assert MODELS[spec.name] is spec
    assert spec.autoencoder.downsampling == CELL
    assert spec.transformer.out_channels == PATCH**2 * spec.autoencoder.z_channels
    assert spec.transformer.in_channels in (64, 128, 384)
    assert spec.min_side % spec.size_multiple == spec.size_multiple % (CELL * PATCH) == 0
    for size in spec.preferred_sizes:
        assert all(side % spec.size_multiple == 0 for side in size)
    assert spec.licence
    assert spec.title


@each
def test_defaults_of_tasks(spec: ModelSpec) -> None:
    """What a request takes when it says nothing must itself be allowed."""
    assert spec.tasks
    for name, task in spec.tasks.items():
        assert spec.task(name) is task
        assert task.solver in SOLVERS
        assert task.steps >= 1
        assert task.true_cfg >= 1
        assert (task.guidance is not None) == spec.transformer.guidance_embed
        width, height = task.size
        assert width % spec.size_multiple == height % spec.size_multiple == 0
        assert min(task.size) >= spec.min_side
        assert width * height <= spec.max_area
    assert spec.task("sing") is None


def test_nano_fits_together() -> None:
    nano = MODELS["nano"]
    assert nano.embedded
    assert nano.text is not None
    assert nano.text.width == nano.transformer.context_in_dim == nano.transformer.vec_in_dim
    assert nano.text.max_length == nano.text_length
    with torch.device("meta"):
        modules = Transformer(nano.transformer), Autoencoder(nano.autoencoder), TextTower(nano.text)
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    assert parameters * 0.82 < 28e6, "all weights in six bits, in the repository"


def test_only_nano_is_embedded() -> None:
    assert [name for name, spec in MODELS.items() if spec.embedded] == ["nano"]


def test_schnell_takes_no_guidance_and_no_shift() -> None:
    schnell = MODELS["flux1-schnell"]
    assert not schnell.shift
    assert not schnell.transformer.guidance_embed
    assert schnell.text_length == 256


def test_kontext_sizes_are_about_a_megapixel() -> None:
    assert len(set(KONTEXT_SIZES)) == 17
    assert {(h, w) for w, h in KONTEXT_SIZES} == set(KONTEXT_SIZES)
    assert all(0.97 < token_count(w, h) / 4096 < 1.03 for w, h in KONTEXT_SIZES)


def test_rows_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        MODELS["nano"].shift = False  # type: ignore[misc]
    with pytest.raises(TypeError):
        MODELS["mine"] = MODELS["nano"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": 100, "num_heads": 3}, "got hidden_size 100"),
        ({"axes_dim": (16, 56, 55)}, r"got axes_dim \(16, 56, 55\); need even numbers that add up to 128"),
        ({"axes_dim": (15, 57, 56)}, "need even numbers"),
    ],
)
def test_impossible_transformers(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerSpec(**wrong)  # type: ignore[arg-type]
