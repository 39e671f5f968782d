"""The T5 v1.1 encoder against transformers: float32, the same random weights, and mistakes that must show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny import randomise, relative
from torch import Tensor

from fluxloom.core import t5
from fluxloom.core.specs import T5Spec
from fluxloom.core.t5 import T5Encoder, position_buckets

SPEC = T5Spec(vocab_size=90, width=40, layers=3, heads=4, head_dim=12, mlp=64)  # heads x head_dim is not the width
LENGTH = 200  # beyond the largest bucket
TOLERANCE = 1e-5


def encoder(seed: int, spec: T5Spec = SPEC) -> T5Encoder:
    module = randomise(T5Encoder(spec), seed)
    assert isinstance(module, T5Encoder)
    return module


def texts(seed: int, length: int = LENGTH) -> Tensor:
    """Two texts padded with 0."""
    ids = torch.randint(2, SPEC.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    ids[0, length // 4 :] = 0
    return ids


def oracle(ours: T5Encoder, ids: Tensor) -> Tensor:
    """transformers' encoder with our weights, without an attention mask."""
    from transformers import T5Config, T5EncoderModel

    spec = ours.spec
    config = T5Config(
        vocab_size=spec.vocab_size,
        d_model=spec.width,
        d_kv=spec.head_dim,
        d_ff=spec.mlp,
        num_layers=spec.layers,
        num_heads=spec.heads,
        relative_attention_num_buckets=spec.buckets,
        relative_attention_max_distance=spec.max_distance,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    theirs = T5EncoderModel(config).eval()
    own = dict(ours.state_dict())
    state = {key: own[key.replace("encoder.embed_tokens", "shared")] for key in theirs.state_dict()}
    assert {key.replace("encoder.embed_tokens", "shared") for key in state} == own.keys()
    theirs.load_state_dict(state, strict=True)
    with torch.no_grad():
        out: Tensor = theirs(ids).last_hidden_state
    return out


@pytest.mark.parametrize("seed", range(3))
def test_parity(seed: int) -> None:
    ours, ids = encoder(seed), texts(seed)
    assert relative(ours(ids), oracle(ours, ids)) < TOLERANCE


def exact_gelu(patch: pytest.MonkeyPatch) -> None:
    true = F.gelu
    patch.setattr(t5.F, "gelu", lambda x, approximate: true(x))


def gate_and_value_exchanged(patch: pytest.MonkeyPatch) -> None:
    def forward(self: t5._FeedForward, x: Tensor) -> Tensor:
        dense, h = self.DenseReluDense, self.layer_norm(x)
        out: Tensor = x + dense["wo"](F.gelu(dense["wi_1"](h), approximate="tanh") * dense["wi_0"](h))
        return out

    patch.setattr(t5._FeedForward, "forward", forward)


def half_the_buckets(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(t5, "position_buckets", lambda n, b, m, d: position_buckets(n, b // 2, m, d))


def shorter_distances(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(t5, "position_buckets", lambda n, b, m, d: position_buckets(n, b, m // 2, d))


def before_and_after_exchanged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(t5, "position_buckets", lambda n, b, m, d: position_buckets(n, b, m, d).T)


def scale_of_attention(patch: pytest.MonkeyPatch) -> None:
    true = F.scaled_dot_product_attention
    patch.setattr(t5.F, "scaled_dot_product_attention", lambda q, k, v, attn_mask, scale: true(q, k, v, attn_mask))


def biases_in_the_first_layer_alone(patch: pytest.MonkeyPatch) -> None:
    def forward(self: t5._Attention, x: Tensor, bias: Tensor) -> Tensor:
        return attend(self, x, bias if hasattr(self, "relative_attention_bias") else torch.zeros_like(bias))

    attend = t5._Attention.forward
    patch.setattr(t5._Attention, "forward", forward)


def mean_subtracted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(t5._RMSNorm, "forward", lambda self, x: F.layer_norm(x, x.shape[-1:], self.weight, None, 1e-6))


MISTAKES = [
    exact_gelu,
    gate_and_value_exchanged,
    half_the_buckets,
    shorter_distances,
    before_and_after_exchanged,
    scale_of_attention,
    biases_in_the_first_layer_alone,
    mean_subtracted,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_show(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, ids = encoder(1), texts(1)
    expected = oracle(ours, ids)
    assert relative(ours(ids), expected) < TOLERANCE
    mistake(monkeypatch)
    assert relative(ours(ids), expected) > 10 * TOLERANCE


def test_buckets_are_those_of_transformers() -> None:
    """At every distance of a text of 512, and at edges that a logarithm may round across."""
    from transformers.models.t5.modeling_t5 import T5Attention

    place = torch.arange(512)
    for buckets, farthest in ((32, 128), (16, 64), (64, 256)):
        expected = T5Attention._relative_position_bucket(place[None] - place[:, None], True, buckets, farthest)
        assert torch.equal(position_buckets(512, buckets, farthest), expected)


def test_buckets() -> None:
    row = position_buckets(512, 32, 128)[200]
    assert row[200:208].tolist() == [0, *range(17, 24)]  # one distance each, after the query
    assert row[193:200].tolist() == [*range(7, 0, -1)]
    assert (row[208], row[211], row[212], row[192]) == (24, 24, 25, 8)
    assert (row[290], row[291], row[400]) == (30, 31, 31)
    assert (int(row.min()), int(row.max())) == (0, 31)


def test_padding_is_attended() -> None:
    """What FLUX.1 was trained with: the same text at another length gives other states."""
    ours = encoder(2)
    ids = texts(2)[:1, : LENGTH // 4]
    padded = F.pad(ids, (0, 30))
    assert relative(ours(padded)[:, : LENGTH // 4], ours(ids)) > 0.01


def test_sixteen_bits() -> None:
    ours, ids = encoder(3), texts(3, 32)
    exact = ours(ids)
    rounded = ours.to(torch.bfloat16)(ids)
    assert rounded.dtype == torch.bfloat16
    assert 1e-4 < relative(rounded.float(), exact) < 0.05
    assert relative(rounded.float(), oracle(ours.float(), ids)) < 0.05


def test_the_full_size_has_the_published_tensors() -> None:
    """Shapes of the published file: 4,762,310,656 numbers in 219 tensors."""
    with torch.device("meta"):
        state = T5Encoder(T5Spec()).state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (219, 4_762_310_656)
    block, dense = "encoder.block.23.layer.", "layer.1.DenseReluDense."
    assert {key: tuple(value.shape) for key, value in state.items() if key.startswith(block)} == {
        **{f"{block}0.SelfAttention.{part}.weight": (4096, 4096) for part in "qkvo"},
        f"{block}0.layer_norm.weight": (4096,),
        f"encoder.block.23.{dense}wi_0.weight": (10_240, 4096),
        f"encoder.block.23.{dense}wi_1.weight": (10_240, 4096),
        f"encoder.block.23.{dense}wo.weight": (4096, 10_240),
        f"{block}1.layer_norm.weight": (4096,),
    }
    rest = {key: tuple(value.shape) for key, value in state.items() if ".block." not in key or "relative" in key}
    assert rest == {
        "shared.weight": (32_128, 4096),
        "encoder.final_layer_norm.weight": (4096,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
    }


def test_gradients_reach_every_weight() -> None:
    module = encoder(0).requires_grad_(True)
    module(texts(0)).square().mean().backward()
    idle = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []
