"""What the transformer promises beyond parity: symmetries, independence within a batch, dtypes and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fluxloom.core.shapes import image_ids, text_ids
from fluxloom.core.specs import TransformerSpec
from fluxloom.core.transformer import Transformer, modulate, sinusoid

SPEC = TransformerSpec(
    hidden_size=32, num_heads=2, axes_dim=(4, 6, 6), depth=1, depth_single_blocks=1, context_in_dim=6, vec_in_dim=5
)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(1)
    return Transformer(SPEC).eval().requires_grad_(False)


def arguments(batch: int = 2) -> dict[str, Tensor]:
    ids = torch.cat((image_ids(4, 6), image_ids(2, 4, index=1)))
    return {
        "img": torch.randn(batch, len(ids), 64),
        "img_ids": ids.expand(batch, -1, -1),
        "txt": torch.randn(batch, 4, 6),
        "txt_ids": text_ids(4).expand(batch, -1, -1),
        "t": torch.linspace(0.2, 0.9, batch),
        "pooled": torch.randn(batch, 5),
        "guidance": torch.linspace(1, 4, batch),
    }


def test_every_token_has_a_velocity(model: Transformer) -> None:
    """References too; the caller keeps the first ones."""
    given = arguments()
    assert model(**given).shape == given["img"].shape


def test_order_is_in_the_ids(model: Transformer) -> None:
    """Tokens that change places together with their ids change nothing else."""
    given = arguments()
    places = torch.randperm(given["img"].shape[1])
    moved = given | {"img": given["img"][:, places], "img_ids": given["img_ids"][:, places]}
    torch.testing.assert_close(model(**moved), model(**given)[:, places])
    assert not torch.allclose(model(**given | {"img": given["img"][:, places]}), model(**given)[:, places], atol=1e-3)


def test_pictures_of_a_batch_do_not_meet(model: Transformer) -> None:
    given = arguments(3)
    whole = model(**given)
    for i in range(3):
        torch.testing.assert_close(model(**{key: value[i : i + 1] for key, value in given.items()}), whole[i : i + 1])


@pytest.mark.parametrize("key", ["img", "txt", "t", "pooled", "guidance", "img_ids"])
def test_everything_given_matters(model: Transformer, key: str) -> None:
    given = arguments()
    other = given | {key: given[key] * 1.5}
    assert not torch.allclose(model(**other), model(**given), atol=1e-3)


def test_guidance_exactly_where_it_is_embedded(model: Transformer) -> None:
    given = arguments()
    guidance = given.pop("guidance")
    with pytest.raises(ValueError, match="got guidance None; this transformer needs a guidance value"):
        model(**given)
    schnell = Transformer(replace(SPEC, guidance_embed=False))
    assert schnell(**given).shape == given["img"].shape
    assert not any("guidance" in key for key in schnell.state_dict())
    with pytest.raises(ValueError, match="needs none: it does not embed it"):
        schnell(**given, guidance=guidance)


def test_bfloat16(model: Transformer) -> None:
    """Half the memory, the same answer in a few digits; ids stay in float32, as bfloat16 would round them."""
    given = arguments()
    want = model(**given)
    floats = {"img", "txt", "pooled"}
    halves = {key: value.bfloat16() if key in floats else value for key, value in given.items()}
    got = model.bfloat16()(**halves)
    assert got.dtype == torch.bfloat16
    assert float((got.float() - want).norm() / want.norm()) < 0.02


def test_sinusoid() -> None:
    out = sinusoid(torch.tensor([0.0, 0.25], dtype=torch.float64))
    assert out.dtype == torch.float64
    assert out[0].tolist() == [1.0] * 128 + [0.0] * 128
    freqs = 10_000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    torch.testing.assert_close(out[1], torch.cat(((250 * freqs).cos(), (250 * freqs).sin())), rtol=0, atol=1e-4)


def test_modulate_keeps_its_epsilon() -> None:
    """At a size of 1e-3 the 1e-6 beside the variance halves it."""
    x, shift, scale = 1e-3 * torch.randn(2, 3, 64), torch.randn(2, 1, 64), torch.randn(2, 1, 64)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(modulate(x, shift, scale), (1 + scale) * normed + shift)


def test_gradients_reach_every_weight() -> None:
    model = Transformer(SPEC)
    model(**arguments()).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
