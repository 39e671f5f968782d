"""Group formats: what goes in comes back within a stated bound, packed as small as promised."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxloom.errors import WeightsError
from fluxloom.weights.formats import FORMATS, GROUP, LIMITS, _pack6, _unpack6, dequantise, quantise

GRID_FORMATS = sorted(LIMITS)


def error_bound(w: torch.Tensor, form: str) -> torch.Tensor:
    """Half a step, the 1.5 % that a searched scale may clip, and the rounding of the scale, to float16 or to a rung."""
    rows = w.reshape(w.shape[0], -1) if w.ndim > 1 else w.reshape(1, -1)
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = padded.abs().amax(-1, keepdim=True).expand_as(padded).flatten(1)[:, : rows.shape[1]]
    step = largest / LIMITS[form]
    return (0.51 * step + 0.016 * largest + LIMITS[form] * 2**-24).reshape(w.shape)


@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3).filter(lambda s: prod(s) < 20_000),
    form=st.sampled_from(GRID_FORMATS),
    magnitude=st.sampled_from([1e-4, 1.0, 3e3]),
    seed=st.integers(0, 2**16),
)
def test_round_trip_stays_within_the_bound(shape: list[int], form: str, magnitude: float, seed: int) -> None:
    w = magnitude * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    back = dequantise(quantise(w, form), shape)
    assert back.shape == w.shape
    assert back.dtype == torch.float32
    assert torch.all((back - w).abs() <= error_bound(w, form))


@pytest.mark.parametrize(("form", "error"), [("int8", 0.0075), ("int6", 0.031)])
def test_relative_error_of_gaussian_weights(form: str, error: float) -> None:
    w = torch.randn(512, 512)
    back = dequantise(quantise(w, form), w.shape)
    relative = float((back - w).norm() / w.norm())
    assert error / 2 < relative < error  # under the half it would not be this format


def test_the_search_for_scales_gains() -> None:
    w = torch.randn(256, GROUP)
    plain_scale = w.abs().amax(-1, keepdim=True) / LIMITS["int6"]
    plain = (w / plain_scale).round() * plain_scale
    searched = dequantise(quantise(w, "int6"), w.shape)
    gain = 1 - float((searched - w).square().sum() / (plain - w).square().sum())
    assert 0.05 < gain < 0.15


@given(st.integers(0, 2**16))
def test_six_bit_packing_is_a_bijection(seed: int) -> None:
    limit = LIMITS["int6"]
    codes = torch.randint(-limit, limit + 1, (3, 2, GROUP), generator=torch.Generator().manual_seed(seed))
    codes = codes.to(torch.int8)
    packed = _pack6(codes)
    assert packed.dtype == torch.uint8
    assert torch.equal(_unpack6(packed.view(3, 2, -1)), codes)


def test_every_six_bit_code_survives_in_every_place() -> None:
    limit = LIMITS["int6"]
    for place in (0, 8, 16, 24, 31):  # one in each plane, and the last
        codes = torch.zeros(1, 2 * limit + 1, GROUP, dtype=torch.int8)
        codes[0, :, place] = torch.arange(-limit, limit + 1)
        assert torch.equal(_unpack6(_pack6(codes).view(1, 2 * limit + 1, -1)), codes)


@pytest.mark.parametrize(
    ("form", "bytes_a_weight"), [("int8", 1.0625), ("int6", 0.78125), ("float16", 2), ("float32", 4)]
)
def test_size_on_disk(form: str, bytes_a_weight: float) -> None:
    stored = quantise(torch.randn(64, 128), form)
    assert sum(stored[part].nbytes for part in {"codes", "scale"} & stored.keys()) == 64 * 128 * bytes_a_weight


@pytest.mark.parametrize("form", GRID_FORMATS)
def test_zeros_stay_zeros(form: str) -> None:
    w = torch.randn(4, 100)
    w[1] = 0
    w[2, 32:64] = 0
    back = dequantise(quantise(w, form), w.shape)
    assert torch.equal(back == 0, (back == 0) | (w == 0))
    assert torch.all(back[1] == 0)
    assert torch.all(back[2, 32:64] == 0)


def test_plain_formats_are_exact_casts() -> None:
    w = torch.randn(5, 7)
    assert torch.equal(dequantise(quantise(w, "float32"), w.shape), w)
    assert torch.equal(dequantise(quantise(w, "float16"), w.shape), w.half().float())


def test_dequantises_into_other_dtypes() -> None:
    w = torch.randn(8, 64)
    assert dequantise(quantise(w, "int8"), w.shape, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(form: str, value: float) -> None:
    w = torch.ones(4, 64)
    w[2, 3] = value
    with pytest.raises(WeightsError, match="not finite"):
        quantise(w, form)


@pytest.mark.parametrize(("form", "value"), [("float16", 1e5), ("int8", 1e8)])
def test_refuses_what_is_too_large(form: str, value: float) -> None:
    with pytest.raises(WeightsError, match="too large for"):
        quantise(torch.full((2, 32), value), form)


def test_refuses_an_unknown_format() -> None:
    with pytest.raises(WeightsError, match=r"'int5', allowed int8, int6"):
        quantise(torch.ones(2, 32), "int5")


@pytest.mark.parametrize("form", FORMATS)
def test_refuses_sizes_that_do_not_agree(form: str) -> None:
    stored = quantise(torch.ones(4, 64), form)
    with pytest.raises(WeightsError, match=r"\[4, 97\]"):
        dequantise(stored, (4, 97))
