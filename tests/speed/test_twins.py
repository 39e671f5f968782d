"""The plain operations: core's numbers in float32, rounded once in 16 bits, and codes within half a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fluxloom.core.attention import QKNorm, rotate
from fluxloom.core.transformer import modulate
from fluxloom.errors import BadInput
from fluxloom.speed import ops, twins

# B, L, N, D_head: odd lengths, widths that are no power of two
sizes = st.tuples(st.integers(1, 2), st.integers(1, 5), st.sampled_from([1, 3, 6]), st.sampled_from([2, 6, 16]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def view(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows that lie in a wider and longer buffer."""
    batch, length, width = shape
    return torch.randn(batch, length + 2, width + 3).to(dtype)[:, 1:-1, 2:-1]


def vectors(count: int, batch: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Random vectors [B, D] out of a row of many, as modulations are."""
    return torch.randn(batch, (count + 1) * width).to(dtype).unflatten(-1, (-1, width)).unbind(1)[1:]


def error(got: Any, wanted: Tensor) -> float:
    """The largest error, of numbers about 1 large and relative of larger ones."""
    return float(((got.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=1)).max())


def once_rounded(got: Any, wanted: Tensor) -> bool:
    """Whether bf16 numbers are float32 ones, rounded: half of the last of 8 bits, and what float32 arithmetic adds."""
    assert got.dtype == torch.bfloat16
    return bool(((got.float() - wanted).abs() <= wanted.abs() * 2**-8 + 3e-6).all())


def agrees(got: Any, wanted: Tensor) -> bool:
    return once_rounded(got, wanted) if got.dtype == torch.bfloat16 else error(got, wanted) < 2e-6


@given(sizes, dtypes)
def test_modulated_is_core_s(size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, width = size[0], size[1], size[2] * size[3]
    x, (shift, scale) = view(batch, length, width, dtype=dtype), vectors(2, batch, width, dtype)
    wanted = modulate(x.float(), shift.float()[:, None], scale.float()[:, None])
    assert agrees(twins.modulated(x, shift, scale), wanted)


def test_core_rounds_more_than_once() -> None:
    x, (shift, scale) = view(2, 5, 96, dtype=torch.bfloat16), vectors(2, 2, 96, torch.bfloat16)
    wanted = modulate(x.float(), shift.float()[:, None], scale.float()[:, None])
    assert not once_rounded(modulate(x, shift[:, None], scale[:, None]), wanted)


@given(sizes, dtypes, st.sampled_from(["new", "itself", "view"]))
def test_gated_adds_and_modulates(size: tuple[int, ...], dtype: torch.dtype, where: str) -> None:
    batch, length, width = size[0], size[1], size[2] * size[3]
    x, y = view(batch, length, width, dtype=dtype), view(batch, length, width, dtype=dtype)
    gate, shift, scale = vectors(3, batch, width, dtype)
    total = x.float() + gate.float()[:, None] * y.float()
    wanted = modulate(total, shift.float()[:, None], scale.float()[:, None])
    joint = torch.full((batch, length + 4, width), 7.0, dtype=dtype)
    out = {"new": None, "itself": x, "view": joint[:, 1 : 1 + length]}[where]
    got, low = twins.gated(x, y, gate, shift, scale, out=out)
    assert agrees(got, total)
    assert agrees(low, wanted)
    assert out is None or got.data_ptr() == out.data_ptr()
    assert bool((joint[:, :1] == 7).all() and (joint[:, 1 + length :] == 7).all())


def test_gated_without_a_norm_after() -> None:
    x, y, (gate,) = view(2, 3, 8), view(2, 3, 8), vectors(1, 2, 8)
    total, low = twins.gated(x, y, gate)
    assert low is None
    assert error(total, x + gate[:, None] * y) < 1e-6
    for rest in ({"shift": gate}, {"scale": gate}, {"form": "int8"}):
        with pytest.raises(ValueError, match="try giving both"):
            twins.gated(x, y, gate, **rest)


@given(sizes, dtypes, st.booleans())
def test_placed_is_core_s(size: tuple[int, ...], dtype: torch.dtype, shared: bool) -> None:
    batch, length, heads, width = size
    norm = QKNorm(width)
    torch.nn.init.normal_(norm.query_norm.scale)
    torch.nn.init.normal_(norm.key_norm.scale)
    angle = torch.randn(1 if shared else batch, length, width // 2)
    scales = norm.query_norm.scale.detach(), norm.key_norm.scale.detach()
    qkv = view(batch, length, 3 * heads * width, dtype=dtype)
    q, k, v = (part.transpose(1, 2).float() for part in twins.split(qkv.clone(), heads))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    wanted = [rotate(one.detach(), (cos, sin)).transpose(1, 2) for one in norm(q, k, v)] + [v.transpose(1, 2)]

    room = tuple(torch.full((batch, length + 3, heads, width), 7.0, dtype=dtype) for _ in range(3))
    filled = twins.placed(qkv, *scales, angle.cos(), angle.sin(), heads, out=room, at=2)  # type: ignore[arg-type]
    assert all(got is one for got, one in zip(filled, room, strict=True))
    for got, one in zip(filled, wanted, strict=True):
        assert agrees(got[:, 2 : 2 + length], one)
        assert bool((got[:, :2] == 7).all() and (got[:, 2 + length :] == 7).all())

    groups = torch.full((3, heads, batch, length, 1, width), 7.0, dtype=dtype).permute(0, 2, 3, 1, 4, 5)
    twins.placed(qkv, *scales, angle.cos(), angle.sin(), heads, out=(groups[0], groups[1], groups[2]))
    for got, one in zip(groups, wanted, strict=True):
        assert agrees(got.flatten(2, 3), one)

    inside = twins.placed(qkv, *scales, angle.cos(), angle.sin(), heads)
    for got, one in zip(inside, wanted, strict=True):
        assert agrees(got, one)
    assert inside[0].data_ptr() == qkv.data_ptr()
    assert error(inside[2].flatten(2), qkv[..., 2 * heads * width :]) == 0


@given(sizes, dtypes)
def test_gelu_and_beside(size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, width = size[0], size[1], size[2] * size[3]
    attended, hidden = view(batch, length, width, dtype=dtype), 3 * view(batch, length, 2 * width, dtype=dtype)
    wanted = F.gelu(hidden.float(), approximate="tanh")
    assert agrees(twins.gelu(hidden), wanted)
    both = twins.beside(attended, hidden)
    assert isinstance(both, Tensor)
    assert agrees(both[..., width:], wanted)
    assert torch.equal(both[..., :width], attended)


def decoded(low: Any) -> Tensor:
    codes, scale = low
    assert scale.dtype == torch.float32
    assert scale.shape == (*codes.shape[:-1], 1)
    return codes.double() * scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", twins.FORMS)
def test_codes_are_within_half_a_step(form: str, dtype: torch.dtype) -> None:
    x = 5 * view(2, 5, 100, dtype=dtype)
    codes, scale = twins.quantised(x, form)
    assert codes.dtype == twins.FORMS[form][0]
    assert bool((codes.double().abs().amax(-1) == twins.FORMS[form][1]).all())
    off = (decoded((codes, scale)) - x.double()).abs()
    # int8: half a step; e4m3: half of the last of 4 bits, and under 2^-6 half of 2^-9
    half = scale.double() / 2 if form == "int8" else torch.maximum(x.double().abs() * 2**-4, scale.double() * 2**-10)
    assert bool((off <= half * (1 + 1e-6)).all())
    assert float((off / half).max()) > 0.9


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "modulated": lambda form: twins.modulated(*inputs()[:3], form),
    "gated": lambda form: twins.gated(inputs()[0], inputs()[3], inputs()[1], *inputs()[1:3], form)[1],
    "gelu": lambda form: twins.gelu(inputs()[0], form),
    "beside": lambda form: twins.beside(inputs()[0], inputs()[3], form),
}


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return view(2, 3, 40), *vectors(2, 2, 40), view(2, 3, 40)


@pytest.mark.parametrize("form", twins.FORMS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_form_is_the_plain_result_quantised(name: str, form: str) -> None:
    codes, scale = OPERATIONS[name](form)
    wanted = twins.quantised(OPERATIONS[name](None), form)
    assert torch.equal(codes.float(), wanted[0].float())
    assert torch.equal(scale, wanted[1])


@pytest.mark.parametrize("form", twins.FORMS)
def test_rows_of_nothing_and_of_nonsense(form: str) -> None:
    x = torch.randn(1, 4, 8)
    x[0, 0], x[0, 1, 3], x[0, 2, 5] = 0, torch.nan, torch.inf
    codes, scale = twins.quantised(x, form)
    assert bool((codes[0, 0].float() == 0).all())
    assert scale[0, 0] == pytest.approx(twins.LEAST)
    assert torch.isfinite(scale[0]).flatten().tolist() == [True, False, False, True]


def test_codes_for_attention() -> None:
    """Queries and keys as they are, but no larger than e4m3 goes; values with a scale for each head."""
    x = torch.randn(2, 50, 3, 16) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    codes, scale = twins.by_head(x)
    assert scale.shape == (2, 3)
    assert float(codes.float().abs().max()) == 448
    off = (codes.float() * scale[:, None, :, None] - x).norm(dim=(1, 3)) / x.norm(dim=(1, 3))
    assert bool((off < 0.03).all())

    qkv, norms = torch.randn(1, 50, 3 * 3 * 16), (torch.rand(16) + 0.5, torch.full((16,), 500.0))
    angle = torch.randn(1, 50, 8)
    exact = twins.placed(qkv.clone(), *norms, angle.cos(), angle.sin(), 3)
    room = [torch.empty(1, 50, 3, 16, dtype=twins.CODES) for _ in range(2)]
    q, k, v = twins.placed(qkv, *norms, angle.cos(), angle.sin(), 3, (*room, None))
    assert error(q, exact[0].double()) < 2**-4 + 1e-6  # half of the last of 4 bits
    assert bool((k.float() == exact[1].clamp(-448, 448).to(twins.CODES).float()).all() and exact[1].max() > 448)
    assert v.data_ptr() == twins.split(qkv, 3)[2].data_ptr()


def test_rescaled_sums() -> None:
    sums = torch.randint(-(10**6), 10**6, (3, 5), dtype=torch.int32)
    rows, columns, bias = torch.rand(3, 1), torch.rand(5), torch.randn(5)
    wanted = sums.double() * rows.double() * columns.double()
    assert error(twins.rescaled(sums, rows, columns, None, torch.float32), wanted) < 1e-6
    assert error(twins.rescaled(sums, rows, columns, bias, torch.float32), wanted + bias) < 1e-6
    assert twins.rescaled(sums, rows, columns, bias.bfloat16(), torch.bfloat16).dtype == torch.bfloat16


def test_unknown_forms_are_named() -> None:
    with pytest.raises(BadInput, match=r"got form 'fp4', allowed fp8, int8"):
        twins.quantised(torch.zeros(1, 1, 4), "fp4")


def test_a_processor_has_the_twins() -> None:
    assert ops.ops_for(torch.device("cpu")) is twins
