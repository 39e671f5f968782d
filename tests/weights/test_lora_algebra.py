"""Each kind of change against its definition, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import DEV, relative, transformer
from torch import Tensor

from fluxloom.weights.lora import (
    Change,
    Decomposed,
    Full,
    Hadamard,
    Kronecker,
    Linear,
    LowRank,
    Part,
    Replacement,
    Update,
    dense_weight,
    merged,
    swap_halves,
    tensor_shapes,
    widen,
)

ROWS, COLS, RANK = 12, 20, 3
GENERATOR = torch.Generator().manual_seed(0)


def new(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def low_rank() -> tuple[Linear, Tensor]:
    a, b = new(RANK, COLS), new(ROWS, RANK)
    want = torch.zeros(ROWS, COLS, dtype=torch.float64)
    for r in range(RANK):
        want += 0.5 * torch.outer(b[:, r].double(), a[r].double())
    return LowRank(a, b, 0.5), want


def kronecker() -> tuple[Linear, Tensor]:
    w1, w2 = new(3, 4), new(4, 5)
    rows = [torch.cat([w1[i, j].double() * w2.double() for j in range(4)], dim=1) for i in range(3)]
    return Kronecker(w1, w2, 0.25), 0.25 * torch.cat(rows)


def hadamard() -> tuple[Linear, Tensor]:
    a1, b1, a2, b2 = new(ROWS, RANK), new(RANK, COLS), new(ROWS, 2), new(2, COLS)
    return Hadamard(a1, b1, a2, b2, 2.0), 2 * (a1.double() @ b1.double()) * (a2.double() @ b2.double())


def full() -> tuple[Linear, Tensor]:
    diff = new(ROWS, COLS)
    return Full(diff, 0.1), 0.1 * diff.double()


KINDS: dict[str, Callable[[], tuple[Linear, Tensor]]] = {
    "low rank": low_rank,
    "kronecker": kronecker,
    "hadamard": hadamard,
    "full": full,
}


@pytest.mark.parametrize("name", KINDS)
def test_dense_applied_and_swapped(name: str) -> None:
    change, want = KINDS[name]()
    x, weight = new(2, 7, COLS), new(ROWS, COLS)
    assert change.shape == (ROWS, COLS)
    assert relative(change.delta(weight).double(), want) < 1e-6
    assert relative(change.apply(x).double(), x.double() @ want.T) < 1e-6
    swapped = torch.cat((want[ROWS // 2 :], want[: ROWS // 2]))
    assert relative(change.swapped().delta(weight).double(), swapped) < 1e-6
    assert relative(change.map(lambda t: t.double()).delta(weight).double(), want) < 1e-6


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
def test_magnitudes(name: str, axis: int) -> None:
    """W' has the direction of W + D and the lengths m, row by row or column by column."""
    change, delta = KINDS[name]()
    weight = new(ROWS, COLS)
    magnitude = 1 + new(ROWS, 1).abs() if axis == 1 else 1 + new(1, COLS).abs()
    tuned = Decomposed(change, magnitude)
    got = weight + tuned.delta(weight)
    assert relative(got.norm(dim=axis, keepdim=True), magnitude) < 1e-5
    direction = weight.double() + delta
    cosine = torch.cosine_similarity(got.double(), direction, dim=axis)
    assert float(cosine.min()) > 1 - 1e-6
    assert relative(tuned.swapped().delta(swap_halves(weight)), swap_halves(tuned.delta(weight))) < 1e-6


def test_magnitudes_of_nothing() -> None:
    tuned = Decomposed(LowRank(torch.zeros(RANK, COLS), torch.zeros(ROWS, RANK)), torch.ones(ROWS, 1))
    assert torch.equal(tuned.delta(torch.zeros(ROWS, COLS)), torch.zeros(ROWS, COLS))


def test_an_update_of_parts() -> None:
    (first, one), (second, two) = low_rank(), full()
    update = Update("x.weight", (4 * ROWS, COLS), (Part(0, ROWS, first), Part(2 * ROWS, 3 * ROWS, second)))
    zero = torch.zeros_like(one)
    want = torch.cat((one, zero, two, zero))
    x = new(5, COLS)
    assert relative(update.delta(new(4 * ROWS, COLS)).double(), want) < 1e-6
    assert relative(update.delta(new(4 * ROWS, COLS), 0.5).double(), 0.5 * want) < 1e-6
    assert relative(update.apply(x).double(), x.double() @ want.T) < 1e-6
    whole = Update("x.weight", (ROWS, COLS), (Part(0, ROWS, Decomposed(first, torch.ones(ROWS, 1))),))
    with pytest.raises(TypeError, match="depends on the weight"):
        whole.apply(x)


def test_a_replacement_counts_whole_or_not_at_all() -> None:
    value, weight = new(ROWS), new(ROWS)
    update = Update("x.scale", (ROWS,), (Part(0, ROWS, Replacement(value)),))
    assert torch.allclose(weight + update.delta(weight, 0.3), value)
    assert torch.equal(update.delta(weight, 0.0), torch.zeros(ROWS))
    assert torch.equal(Replacement(value).swapped().value, swap_halves(value))


def test_merging_keeps_the_dtype_and_rounds_once() -> None:
    weight = new(ROWS, COLS).bfloat16()
    changes: list[Change] = [low_rank()[0], full()[0]]
    updates = [(Update("x.weight", (ROWS, COLS), (Part(0, ROWS, change),)), 0.5) for change in changes]
    want = (weight.float() + sum(0.5 * change.delta(weight) for change in changes)).bfloat16()
    assert torch.equal(merged(weight, updates), want)


def test_widening() -> None:
    weight = new(ROWS, COLS)
    assert torch.equal(widen(weight, COLS + 4), torch.cat((weight, torch.zeros(ROWS, 4)), 1))
    assert widen(weight, COLS - 4) is weight


def test_a_weight_is_found_by_what_it_does() -> None:
    linear = torch.nn.Linear(COLS, ROWS)

    class Hidden(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = linear(x)
            return out

    hidden = Hidden()
    hidden.bias = linear.bias
    assert relative(dense_weight(hidden, COLS), linear.weight.detach()) < 1e-6
    assert dense_weight(linear, COLS).data_ptr() == linear.weight.data_ptr()


def test_shapes_of_tensors() -> None:
    state = transformer(DEV, 0).state_dict()
    assert tensor_shapes(DEV) == {name: tuple(tensor.shape) for name, tensor in state.items()}
