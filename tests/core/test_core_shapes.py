"""Patch arithmetic: properties that hold for every size. (The parity tests hold the layouts against the oracles.)"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fluxloom.core.shapes import (
    CELL,
    TOKEN,
    fit_size,
    image_ids,
    latent_hw,
    nearest_size,
    pack,
    text_ids,
    token_count,
    unpack,
)
from fluxloom.core.specs import KONTEXT_SIZES

sides = st.integers(1, 5000)
halves = st.integers(1, 9)


@given(st.integers(1, 3), st.integers(1, 5), halves, halves)
def test_unpack_inverts_pack(batch: int, channels: int, rows: int, columns: int) -> None:
    z = torch.arange(batch * channels * rows * columns * 4).reshape(batch, channels, 2 * rows, 2 * columns)
    x = pack(z)
    assert x.shape == (batch, rows * columns, 4 * channels)
    assert torch.equal(unpack(x, 2 * rows, 2 * columns), z)
    assert torch.equal(pack(unpack(x, 2 * rows, 2 * columns)), x)


@given(halves, halves, st.data())
def test_the_place_of_a_cell(rows: int, columns: int, data: st.DataObject) -> None:
    """Cell (c, y, x) lies in token (y // 2, x // 2), row-major, at 4 c + 2 (y % 2) + x % 2."""
    z = torch.randn(1, 3, 2 * rows, 2 * columns)
    c, y, x = (data.draw(st.integers(0, size - 1)) for size in z.shape[1:])
    assert pack(z)[0, (y // 2) * columns + x // 2, 4 * c + 2 * (y % 2) + x % 2] == z[0, c, y, x]


@given(sides, sides)
def test_token_count(width: int, height: int) -> None:
    h, w = latent_hw(width, height)
    assert token_count(width, height) == math.ceil(width / TOKEN) * math.ceil(height / TOKEN) == h * w // 4
    assert h % 2 == w % 2 == 0
    assert 0 <= h * CELL - height < TOKEN
    assert 0 <= w * CELL - width < TOKEN


@pytest.mark.parametrize(("width", "height", "tokens"), [(1024, 1024, 4096), (1360, 768, 4080), (17, 16, 2), (1, 1, 1)])
def test_token_count_of_known_sizes(width: int, height: int, tokens: int) -> None:
    assert token_count(width, height) == tokens


@given(halves, halves, st.integers(0, 3))
def test_image_ids(rows: int, columns: int, index: int) -> None:
    ids = image_ids(2 * rows, 2 * columns, index)
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[index, r, c] for r in range(rows) for c in range(columns)]


def test_text_ids() -> None:
    assert torch.equal(text_ids(5), torch.zeros(5, 3))


sizes = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=8)


@given(sides, sides, sizes)
def test_nearest_size(width: int, height: int, sizes: list[tuple[int, int]]) -> None:
    """Of the nearest aspect ratios the smallest width, then the smallest height, in whatever order they come."""
    w, h = nearest_size(width, height, sizes)
    assert (w, h) in sizes
    distance = abs(width / height - w / h)
    for other in sizes:
        assert (distance, w, h) <= (abs(width / height - other[0] / other[1]), *other)
    assert nearest_size(width, height, sizes[::-1]) == (w, h)


def test_nearest_size_ties() -> None:
    """3:2 lies as far from 1:1 as from 2:1."""
    assert nearest_size(3, 2, [(20, 10), (10, 10)]) == (10, 10)
    assert nearest_size(3, 2, [(10, 10), (20, 10)]) == (10, 10)
    assert nearest_size(1, 1, [(30, 30), (10, 10), (20, 20)]) == (10, 10)


@pytest.mark.parametrize("size", KONTEXT_SIZES)
def test_a_preferred_size_is_its_own_nearest(size: tuple[int, int]) -> None:
    assert nearest_size(*size, KONTEXT_SIZES) == size


@st.composite
def limits(draw: st.DrawFn) -> tuple[int, int, int]:
    multiple = draw(st.sampled_from([16, 32]))
    least = multiple * draw(st.integers(1, 16))
    return multiple, least, least**2 + draw(st.integers(0, 4_000_000))


@given(st.integers(1, 100_000), st.integers(1, 100_000), limits())
def test_fit_size_is_allowed(width: int, height: int, limits: tuple[int, int, int]) -> None:
    multiple, least, area = limits
    w, h = fit_size(width, height, *limits)
    assert w % multiple == h % multiple == 0
    assert min(w, h) >= least
    assert w * h <= area
    assert fit_size(w, h, *limits) == (w, h), "what is allowed stays"
    assert fit_size(height, width, *limits) in ((h, w), (w, h)), "a picture on its side"


@given(st.integers(1, 4000), st.integers(1, 4000), limits())
def test_fit_size_keeps_the_aspect(width: int, height: int, limits: tuple[int, int, int]) -> None:
    """As far as whole multiples allow, unless the limits leave no such size."""
    multiple, least, area = limits
    room = area / (least + 2 * multiple) ** 2  # the longest aspect with a margin for rounding
    assume(max(width / height, height / width) < room)
    w, h = fit_size(width, height, *limits)
    slack = math.log((least + 2 * multiple) / least)  # each side is off by at most a multiple or two
    assert abs(math.log((w / h) / (width / height))) <= 2 * slack


@pytest.mark.parametrize(
    ("given_size", "expected"),
    [
        ((256, 256), (256, 256)),
        ((100, 130), (96, 128)),
        ((30, 60), (64, 128)),
        ((4000, 2000), (704, 368)),
        ((1, 9999), (64, 4096)),
    ],
)
def test_fit_size_of_known_sizes(given_size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit_size(*given_size, multiple=16, min_side=64, max_area=512 * 512) == expected
