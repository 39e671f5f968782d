"""Statistics against published values, and bars that can fail."""

from __future__ import annotations

import math

import pytest

from fluxloom.evals.cases import GROUPS
from fluxloom.evals.report import BARS, Bar, Difference, Rate, Row, Summary, difference, markdown, mean_difference

# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3 (95 %).
WILSON = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
# Newcombe 1998, "Interval estimation for the difference between independent proportions", table II, method 10.
DIFFERENCES = {
    ((56, 70), (48, 80)): (0.2000, 0.0524, 0.3339),
    ((9, 10), (3, 10)): (0.6000, 0.1705, 0.8090),
    ((10, 10), (0, 10)): (1.0000, 0.6075, 1.0000),
}


@pytest.mark.parametrize(("hits", "n"), WILSON)
def test_wilson(hits: int, n: int) -> None:
    assert Rate(hits, n).interval == pytest.approx(WILSON[hits, n], abs=6e-5)


@pytest.mark.parametrize("pair", DIFFERENCES)
def test_newcombe(pair: tuple[tuple[int, int], tuple[int, int]]) -> None:
    found = difference(Rate(*pair[0]), Rate(*pair[1]))
    assert (found.value, found.low, found.high) == pytest.approx(DIFFERENCES[pair], abs=6e-5)


def test_nothing_measured_claims_nothing() -> None:
    none = Rate.of([])
    assert (math.isnan(none.share), none.interval, str(none)) == (True, (0.0, 1.0), "–")
    assert math.isnan(difference(none, Rate(1, 2)).value)
    assert mean_difference([]).show(1, 1) == "–"
    assert none.to_dict() == {"hits": 0, "n": 0, "share": None, "interval": [0.0, 1.0]}
    assert math.isnan(mean_difference([(3.0, 1.0)]).low)


def test_mean_difference() -> None:
    found = mean_difference([(30.0, 31.0), (29.0, 32.0), (28.0, 33.0)])
    assert found.value == -3
    assert found.high - found.value == pytest.approx(1.959964 * 2 / math.sqrt(3))
    assert found.show(1, 1) == "-3.0 [-5.3, -0.7]"


def a_row(name: str, share: int, english: int | None = None) -> Row:
    """``share`` of 100; of the 50 English ones ``english``."""
    first = share // 2 if english is None else english
    rates = {"model": Rate(share, 100), "true": Rate(100, 100), "round trip": Rate(99, 100)}
    rates |= {"shuffled": Rate(1, 100), "source": Rate(0, 0)}
    return Row(name, rates, Rate(first, 50), Rate(share - first, 50))


NAMES = (*GROUPS, "draw", "edits", "trained")


def verdicts(rows: list[Row]) -> dict[str, bool | None]:
    summary = Summary({row.name: row for row in rows}, {})
    return {bar.name: bar.judge(summary)["reached"] for bar in BARS}


def test_bars_are_reached_or_not() -> None:
    reached = verdicts([a_row(name, 100) for name in NAMES])
    assert reached.pop("edits, lost outside of the change") is None
    assert set(reached.values()) == {True}
    assert set(verdicts([a_row(name, 40, 30) for name in NAMES]).values()) == {False, None}
    assert set(verdicts([]).values()) == {None}


def test_a_bar_of_a_whole_suite_is_not_reached_by_a_part_of_it() -> None:
    some = verdicts([a_row(name, 100) for name in ("single", "edit-add", "edits", "trained")])
    assert [name for name, reached in some.items() if reached is not None] == ["the one thing is right"]


@pytest.mark.parametrize(("english", "reached"), [(45, True), (46, True), (47, False), (44, True), (43, False)])
def test_languages_may_differ_either_way_by_five_points(english: int, reached: bool) -> None:
    rows = [a_row(name, 90, english) for name in NAMES]  # of 50 in each language; 46 and 44 are four points apart
    assert verdicts(rows)["Chinese and English apart"] is reached


def test_markdown_shows_rates_with_their_intervals() -> None:
    text = markdown(Summary({"single": a_row("single", 90)}, {}), {"model": "nano", "versions": {"torch": "2"}})
    assert "- versions: torch 2\n" in text
    assert "| single | 100 | 90.0 % [83 %, 94 %] | 100.0 % [96 %, 100 %] |" in text
    assert "| group | n | model | true | round trip | shuffled | English |" in text
    assert isinstance(BARS[0], Bar)
    assert Difference(0.1, 0.05, 0.15).show(100, 0) == "+10 [+5, +15]"
