"""The path, its inverse relations, the schedule and the times of training."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxloom.core.flow import (
    estimate_noise,
    estimate_x0,
    interpolate,
    sample_times,
    schedule,
    shift,
    shift_mu,
    target,
)

times = st.floats(0, 1)
counts = st.integers(1, 16384)


@given(st.lists(times, min_size=1, max_size=4), st.integers(0, 2**31), st.booleans())
def test_estimates_invert_the_path(at: list[float], seed: int, scalar: bool) -> None:
    """From x_t and the true velocity both ends come back, for one time or one each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(at), 3, 2, 4)
    x, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    t = at[0] if scalar else torch.tensor(at, dtype=torch.float64)
    x_t, v = interpolate(x, noise, t), target(x, noise)
    torch.testing.assert_close(estimate_x0(x_t, v, t), x)
    torch.testing.assert_close(estimate_noise(x_t, v, t), noise)
    if not scalar:
        one_by_one = [interpolate(x[i], noise[i], time) for i, time in enumerate(at)]
        torch.testing.assert_close(x_t, torch.stack(one_by_one))


def test_ends_of_the_path() -> None:
    x, noise = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(interpolate(x, noise, 0.0), x)
    assert torch.equal(interpolate(x, noise, torch.ones(2)), noise)
    assert torch.equal(interpolate(x, noise, torch.tensor(1.0)), noise)
    torch.testing.assert_close(interpolate(x, noise, 0.3) - interpolate(x, noise, 0.2), 0.1 * target(x, noise))


@given(st.integers(1, 1000), st.none() | counts)
def test_schedule(steps: int, tokens: int | None) -> None:
    """Strictly down, the ends exact."""
    grid = schedule(steps, tokens)
    assert len(grid) == steps + 1
    assert grid[0] == 1.0
    assert grid[-1] == 0.0
    assert all(a > b for a, b in pairwise(grid))


@given(st.integers(2, 100), counts, counts)
def test_more_tokens_stay_longer_in_noise(steps: int, one: int, other: int) -> None:
    fewer, more = sorted((one, other))
    assert all(a <= b for a, b in zip(schedule(steps, fewer), schedule(steps, more), strict=True))
    assert schedule(steps)[1] < schedule(steps, fewer)[1]


def test_known_values() -> None:
    assert shift_mu(256) == 0.5
    assert shift_mu(4096) == pytest.approx(1.15)
    assert shift_mu(1024) == pytest.approx(0.63)
    assert shift_mu(4080) == pytest.approx(1.14729, abs=1e-5)
    assert schedule(4, 4096) == pytest.approx([1, 0.9045, 0.7595, 0.5128, 0], abs=1e-4)
    assert schedule(4) == [1, 0.75, 0.5, 0.25, 0]


@given(times, st.floats(-2, 2))
def test_shift_is_linear_in_the_odds(t: float, mu: float) -> None:
    """The equivalent form a t / (1 + (a - 1) t) with a = e^mu; shifting back undoes it."""
    a = math.exp(mu)
    assert shift(t, mu) == pytest.approx(a * t / (1 + (a - 1) * t), abs=1e-12)
    assert shift(shift(t, mu), -mu) == pytest.approx(t, abs=1e-12)


@pytest.mark.parametrize("steps", [0, -1])
def test_schedule_needs_a_step(steps: int) -> None:
    with pytest.raises(ValueError, match=f"got {steps} steps"):
        schedule(steps)


def test_sample_times() -> None:
    """Logit-normal: the logits have the mean and deviation asked for, and a shift of the times is one of the mean."""
    t = sample_times(20_000, mean=0.4, std=0.8, generator=torch.Generator().manual_seed(3))
    assert t.shape == (20_000,)
    assert float(t.min()) > 0
    assert float(t.max()) < 1
    assert float(t.logit().mean()) == pytest.approx(0.4, abs=0.02)
    assert float(t.logit().std()) == pytest.approx(0.8, abs=0.02)

    shifted = sample_times(50, mean=0.4 + 1.15, std=0.8, generator=torch.Generator().manual_seed(3))
    plain = sample_times(50, mean=0.4, std=0.8, generator=torch.Generator().manual_seed(3))
    expected = torch.tensor([shift(float(time), 1.15) for time in plain])
    torch.testing.assert_close(shifted, expected)


def test_sample_times_follow_the_generator() -> None:
    torch.manual_seed(5)
    without = sample_times(8)
    torch.manual_seed(5)
    assert torch.equal(sample_times(8), without)
    one, two = (sample_times(8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    assert not torch.equal(one, two)
