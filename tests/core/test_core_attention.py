"""Rotary positions, norms and joint attention, by their defining properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fluxloom.core.attention import QKNorm, RMSNorm, attention, rope, rotate, split_heads

AXES = (4, 6, 6)
positions = st.tuples(st.integers(0, 3), st.integers(0, 200), st.integers(0, 200))


def angles(*ids: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    return rope(torch.tensor([ids], dtype=torch.float32), AXES, 10_000)


def test_rope_angles() -> None:
    """Pair k of an axis of d turns by position / 10000^(2k/d)."""
    cos, sin = angles((1, 5, 7))
    turns = [
        1,
        1e-2,
        5,
        5 * 10_000 ** (-1 / 3),
        5 * 10_000 ** (-2 / 3),
        7,
        7 * 10_000 ** (-1 / 3),
        7 * 10_000 ** (-2 / 3),
    ]
    assert cos.shape == sin.shape == (1, 1, 1, 8)
    assert cos.flatten().tolist() == pytest.approx([math.cos(turn) for turn in turns], abs=1e-6)
    assert sin.flatten().tolist() == pytest.approx([math.sin(turn) for turn in turns], abs=1e-6)


def test_rope_is_exact_far_out() -> None:
    """In float32 the angle itself would be off by 1e-4 here."""
    cos, sin = rope(torch.tensor([[[3.0, 4095.0, 2047.0]]]), (16, 56, 56), 10_000)
    turns = [at * 10_000 ** (-2 * k / d) for at, d in ((3, 16), (4095, 56), (2047, 56)) for k in range(d // 2)]
    assert cos.flatten().tolist() == pytest.approx([math.cos(turn) for turn in turns], abs=2e-7)
    assert sin.flatten().tolist() == pytest.approx([math.sin(turn) for turn in turns], abs=2e-7)


def test_rotate_turns_neighbours() -> None:
    x = torch.zeros(1, 1, 1, 16)
    x[..., 4] = 1.0  # the first of pair 2, which is pair 0 of the rows
    turned = rotate(x, angles((0, 1, 0)))
    assert turned.flatten()[4:6].tolist() == pytest.approx([math.cos(1), math.sin(1)])
    assert turned.abs().sum() == turned[..., 4:6].abs().sum()


@given(positions, positions, positions, st.integers(0, 2**31))
def test_scores_depend_on_distance_alone(
    one: tuple[int, int, int], two: tuple[int, int, int], by: tuple[int, int, int], seed: int
) -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(seed)).unbind(0)

    def score(at: tuple[int, int, int], other: tuple[int, int, int]) -> float:
        return float((rotate(q, angles(at)) * rotate(k, angles(other))).sum())

    def moved(at: tuple[int, int, int]) -> tuple[int, int, int]:
        return at[0] + by[0], at[1] + by[1], at[2] + by[2]

    assert score(one, two) == pytest.approx(score(moved(one), moved(two)), abs=1e-3)
    assert float(rotate(q, angles(one)).norm()) == pytest.approx(float(q.norm()), rel=1e-5)


def test_no_position_is_no_rotation() -> None:
    x = torch.randn(2, 3, 5, 16)
    assert torch.equal(rotate(x, rope(torch.zeros(2, 5, 3), AXES, 10_000)), x)


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_rms_norm(size: float) -> None:
    """At a size of 1e-3 the 1e-6 under the root halves the square: it must be there, and inside."""
    norm = RMSNorm(8)
    norm.scale.data = torch.linspace(0.5, 2, 8)
    x = size * torch.randn(3, 8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.scale
    torch.testing.assert_close(norm(x), expected)


def test_qk_norm_comes_back_in_the_dtype_of_v() -> None:
    norm = QKNorm(8)
    q, k, v = (torch.randn(1, 2, 3, 8, dtype=torch.bfloat16) for _ in range(3))
    assert {out.dtype for out in norm(q, k, v)} == {torch.bfloat16}
    assert {out.dtype for out in norm(q.float(), k.float(), v)} == {torch.bfloat16}
    assert rotate(q, rope(torch.zeros(1, 3, 3), (2, 2, 4), 10_000)).dtype == torch.bfloat16


def test_split_heads() -> None:
    """All queries first; a head is a run of neighbours."""
    qkv = torch.arange(2 * 3 * 12.0).reshape(2, 3, 12)
    q, k, v = split_heads(qkv, 2)
    assert q.shape == (2, 2, 3, 2)
    assert torch.equal(q[:, 1], qkv[..., 2:4])
    assert torch.equal(k[:, 0], qkv[..., 4:6])
    assert torch.equal(v[:, 1], qkv[..., 10:12])


def test_attention_by_hand() -> None:
    q, k, v = (torch.randn(2, 3, 5, 16) for _ in range(3))
    turn = rope(torch.randint(0, 9, (2, 5, 3)).float(), AXES, 10_000)
    scores = rotate(q, turn) @ rotate(k, turn).transpose(-1, -2) / 4
    expected = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(2, 5, 48)
    torch.testing.assert_close(attention(q, k, v, turn), expected)
