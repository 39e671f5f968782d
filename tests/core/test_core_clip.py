"""CLIP's text tower against transformers: float32, the same random weights, and mistakes that must show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny import randomise, relative
from torch import Tensor, nn

from fluxloom.core import clip
from fluxloom.core.clip import ClipText
from fluxloom.core.specs import ClipSpec

SPEC = ClipSpec(vocab_size=99, width=48, layers=3, heads=4, mlp=80, max_length=16)
END, PAD = 98, 98
TOLERANCE = 1e-5


def tower(seed: int, spec: ClipSpec = SPEC) -> ClipText:
    module = randomise(ClipText(spec), seed)
    assert isinstance(module, ClipText)
    return module


def texts(seed: int) -> Tensor:
    """Three texts of different lengths, each ended and padded with the end token."""
    ids = torch.randint(0, END, (3, SPEC.max_length), generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate((5, 11, SPEC.max_length - 1)):
        ids[row, length:] = END
    return ids


def oracle(ours: ClipText, ids: Tensor, eos: int = END) -> tuple[Tensor, Tensor]:
    """transformers' tower with our weights. Its file names keep the prefix that its module has lost."""
    from transformers import CLIPTextConfig, CLIPTextModel

    spec = ours.spec
    config = CLIPTextConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.width,
        intermediate_size=spec.mlp,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        max_position_embeddings=spec.max_length,
        hidden_act="quick_gelu",
        bos_token_id=0,
        eos_token_id=eos,
    )
    theirs = CLIPTextModel(config).eval()
    bare = not hasattr(theirs, "text_model")
    state = {key.removeprefix("text_model.") if bare else key: value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    with torch.no_grad():
        out = theirs(ids)
    return out.last_hidden_state, out.pooler_output


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("eos", [END, 2], ids=["by its id", "by the largest id"])
def test_parity(seed: int, eos: int) -> None:
    """Both ways in which transformers finds the end: older configurations say 2 and mean the largest id."""
    ours, ids = tower(seed), texts(seed)
    states, pooled = ours(ids)
    expected, expected_pooled = oracle(ours, ids, eos)
    assert relative(states, expected) < TOLERANCE
    assert relative(pooled, expected_pooled) < TOLERANCE


def exact_gelu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clip._MLP, "forward", lambda self, x: self.fc2(F.gelu(self.fc1(x))))


def no_causal_mask(patch: pytest.MonkeyPatch) -> None:
    true = F.scaled_dot_product_attention
    patch.setattr(clip.F, "scaled_dot_product_attention", lambda q, k, v, is_causal: true(q, k, v))


def no_scale(patch: pytest.MonkeyPatch) -> None:
    true = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return true(q, k, v, is_causal=is_causal, scale=1.0)

    patch.setattr(clip.F, "scaled_dot_product_attention", attend)


def no_final_norm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clip.nn.LayerNorm, "forward", lambda self, x: x)


@pytest.mark.parametrize("mistake", [exact_gelu, no_causal_mask, no_scale, no_final_norm])
def test_mistakes_show(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, ids = tower(1), texts(1)
    _, expected = oracle(ours, ids)
    assert relative(ours(ids)[1], expected) < TOLERANCE
    mistake(monkeypatch)
    assert relative(ours(ids)[1], expected) > 100 * TOLERANCE


def test_pooled_is_the_state_of_the_first_end() -> None:
    ours, ids = tower(2), texts(2)
    states, pooled = ours(ids)
    for row, length in enumerate((5, 11, SPEC.max_length - 1)):
        assert torch.equal(pooled[row], states[row, length])
    assert relative(pooled[0], states[0, -1]) > 0.01  # the last end has another position
    assert relative(pooled[0], states[0, 4]) > 0.01


def test_padding_does_not_reach_the_pooled_state() -> None:
    ours, ids = tower(2), texts(2)
    _, pooled = ours(ids)
    shorter = ours(ids[:1, :6])[1]
    torch.testing.assert_close(shorter, pooled[:1], atol=1e-5, rtol=1e-5)


def test_texts_that_it_cannot_read() -> None:
    ours = tower(0)
    with pytest.raises(ValueError, match="at most 16"):
        ours(torch.full((1, 17), END))
    with pytest.raises(ValueError, match="without its end token 98"):
        ours(torch.zeros(1, 5, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    ours, ids = tower(3), texts(3)
    exact = ours(ids)[1]
    pooled = ours.to(dtype)(ids)[1]
    assert pooled.dtype == dtype
    assert 1e-5 < relative(pooled.float(), exact) < 0.05


def test_the_full_size_has_the_published_tensors() -> None:
    """Shapes of the published file: 123,060,480 numbers in 196 tensors."""
    with torch.device("meta"):
        state = ClipText(ClipSpec()).state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (196, 123_060_480)
    layer = "text_model.encoder.layers.11."
    assert {key: tuple(value.shape) for key, value in state.items() if key.startswith(layer)} == {
        f"{layer}{name}.{kind}": (*shape, *rest) if kind == "weight" else shape
        for name, shape, rest in [
            *((f"self_attn.{part}_proj", (768,), (768,)) for part in ("q", "k", "v", "out")),
            ("layer_norm1", (768,), ()),
            ("layer_norm2", (768,), ()),
            ("mlp.fc1", (3072,), (768,)),
            ("mlp.fc2", (768,), (3072,)),
        ]
        for kind in ("weight", "bias")
    }
    rest = {key: tuple(value.shape) for key, value in state.items() if ".layers." not in key}
    assert rest == {
        "text_model.embeddings.token_embedding.weight": (49_408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
        "text_model.final_layer_norm.weight": (768,),
        "text_model.final_layer_norm.bias": (768,),
    }


def test_gradients_reach_every_weight() -> None:
    module: nn.Module = tower(0).requires_grad_(True)
    states, pooled = module(texts(0))
    (states.square().mean() + pooled.sum()).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())
