"""Rates with intervals, the bars, and the tables and sheets that show them.

Intervals are of 95 %: Wilson's for a rate, Newcombe's (1998, method 10) for a difference of two, and the normal one for
a mean difference of decibels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan, nan, sqrt
from statistics import fmean, stdev
from typing import Any

from fluxloom.evals.cases import EDIT, FREE, GROUPS, SUITES
from fluxloom.evals.world import PAINTERS, UNTOUCHED, Outcome, partners

Z = 1.959964  # the normal quantile of 97.5 %
FLOORS = ("shuffled", UNTOUCHED)
TRAINED = "trained"  # draw and edits together: all that is no held-out combination
BOUND = "edits that leave nothing open"
TITLES = {"draw": "Drawing", "held-out": "Drawing what was held out of training", "edits": "Edits"}


@dataclass(frozen=True)
class Rate:
    """``hits`` of ``n``."""

    hits: int
    n: int

    @classmethod
    def of(cls, verdicts: Iterable[bool]) -> Rate:
        found = list(verdicts)
        return cls(sum(found), len(found))

    @property
    def share(self) -> float:
        return self.hits / self.n if self.n else nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval."""
        if not self.n:
            return 0.0, 1.0
        p, z2 = self.share, Z**2 / self.n
        middle, half = p + z2 / 2, Z * sqrt(p * (1 - p) / self.n + z2 / (4 * self.n))
        return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": _number(self.share), "interval": [*map(_number, self.interval)]}

    def __str__(self) -> str:
        if not self.n:
            return "–"
        low, high = self.interval
        return f"{self.share:.1%} [{low:.0%}, {high:.0%}]".replace("%", " %")


@dataclass(frozen=True)
class Difference:
    """A difference and its interval; of shares, or in decibels."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        return {name: _number(value) for name, value in asdict(self).items()}

    def show(self, scale: float, digits: int) -> str:
        if isnan(self.value):
            return "–"
        value, low, high = (f"{scale * x:+.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def difference(first: Rate, second: Rate) -> Difference:
    """First less second: Newcombe's interval, made of Wilson's two."""
    if not first.n or not second.n:
        return Difference(nan, nan, nan)
    (low_1, high_1), (low_2, high_2) = first.interval, second.interval
    value = first.share - second.share
    down = sqrt((first.share - low_1) ** 2 + (high_2 - second.share) ** 2)
    up = sqrt((high_1 - first.share) ** 2 + (second.share - low_2) ** 2)
    return Difference(value, value - down, value + up)


def mean_difference(pairs: Sequence[tuple[float, float]]) -> Difference:
    """The mean of first less second over pairs."""
    found = [first - second for first, second in pairs]
    if not found:
        return Difference(nan, nan, nan)
    half = Z * stdev(found) / sqrt(len(found)) if len(found) > 1 else nan
    return Difference(fmean(found), fmean(found) - half, fmean(found) + half)


# ------------------------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Row:
    """One group, or several taken together."""

    name: str
    rates: Mapping[str, Rate]  # by painter, and of both floors
    english: Rate
    chinese: Rate

    @property
    def gap(self) -> Difference:
        """Chinese less English, of the model."""
        return difference(self.chinese, self.english)

    def to_dict(self) -> dict[str, Any]:
        rates = {**self.rates, "english": self.english, "chinese": self.chinese}
        return {"name": self.name, **{k: rate.to_dict() for k, rate in rates.items()}, "gap": self.gap.to_dict()}


@dataclass(frozen=True)
class Preservation:
    """Mean PSNR outside of what was to change, over the fulfilled edits of a kind, the autoencoder's beside it."""

    name: str
    n: int
    model: float
    ceiling: float
    difference: Difference

    def to_dict(self) -> dict[str, Any]:
        means = {"model": _number(self.model), "ceiling": _number(self.ceiling)}
        return {"name": self.name, "n": self.n, **means, "difference": self.difference.to_dict()}


def row(name: str, outcomes: Sequence[Outcome], groups: Iterable[str]) -> Row:
    """The rates of all outcomes that belong to the groups."""
    wanted = frozenset(groups)
    mine = [outcome for outcome in outcomes if outcome.case.group in wanted]
    rates = {painter: Rate.of(outcome.passed(painter) for outcome in mine) for painter in PAINTERS}
    shuffled = [(outcome, other) for outcome, other in zip(mine, partners(mine), strict=True) if other is not None]
    rates["shuffled"] = Rate.of(outcome.passed("model", other) for outcome, other in shuffled)
    rates[UNTOUCHED] = Rate.of(outcome.passed(UNTOUCHED) for outcome in mine if UNTOUCHED in outcome.readings)
    english, chinese = (
        Rate.of(outcome.passed() for outcome in mine if outcome.case.language == language) for language in ("en", "zh")
    )
    return Row(name, rates, english, chinese)


def preservation(name: str, outcomes: Sequence[Outcome], groups: Iterable[str]) -> Preservation:
    """How well fulfilled edits of the groups kept the rest."""
    wanted = frozenset(groups)
    mine = [outcome for outcome in outcomes if outcome.case.group in wanted and outcome.passed()]
    pairs = [(outcome.kept.model, outcome.kept.ceiling) for outcome in mine if outcome.kept is not None]
    model, ceiling = (fmean(pair[k] for pair in pairs) if pairs else nan for k in (0, 1))
    return Preservation(name, len(pairs), model, ceiling, mean_difference(pairs))


@dataclass(frozen=True)
class Summary:
    """Everything that the tables say."""

    rows: Mapping[str, Row]  # by group and by suite
    kept: Mapping[str, Preservation]  # by edit group, and BOUND

    def to_dict(self) -> dict[str, Any]:
        return {
            "rates": [entry.to_dict() for entry in self.rows.values()],
            "preservation": [entry.to_dict() for entry in self.kept.values()],
        }


def summarise(outcomes: Sequence[Outcome]) -> Summary:
    """The rows of every group that was run, and of every suite of which something was."""
    present = {outcome.case.group for outcome in outcomes}
    groups = [group for group in GROUPS if group in present]
    rows = {group: row(group, outcomes, (group,)) for group in groups}
    for suite, members in SUITES.items():
        if present & set(members):
            rows[suite] = row(suite, outcomes, members)
    if trained := [group for suite in ("draw", "edits") for group in SUITES[suite] if group in present]:
        rows[TRAINED] = row(TRAINED, outcomes, trained)
    edits = [group for group in groups if group.startswith(EDIT)]
    kept = {group: preservation(group, outcomes, (group,)) for group in edits}
    if bound := [group for group in edits if group.removeprefix(EDIT) not in FREE]:
        kept[BOUND] = preservation(BOUND, outcomes, bound)
    return Summary(rows, kept)


# ------------------------------------------------------------------------------------------------ bars


@dataclass(frozen=True)
class Bar:
    """What a version of nano has to reach. ``measure`` gives a figure, NaN where it was not measured; it has to be
    ``wanted`` at least or, where ``most``, at most."""

    name: str
    wanted: float
    measure: Callable[[Summary], float]
    unit: str = "%"
    most: bool = False

    def judge(self, summary: Summary) -> dict[str, Any]:
        found = self.measure(summary)
        reached = None if isnan(found) else (found <= self.wanted if self.most else found >= self.wanted)
        wanted = f"{'at most' if self.most else 'at least'} {self.wanted:g} {self.unit}"
        return {"bar": self.name, "wanted": wanted, "measured": _number(found), "unit": self.unit, "reached": reached}


def _share(group: str) -> Callable[[Summary], float]:
    return lambda summary: 100 * summary.rows[group].rates["model"].share if group in summary.rows else nan


def _whole(measure: Callable[[Summary], float], *suites: str) -> Callable[[Summary], float]:
    """A measure that means something only where whole suites were run."""
    groups = [group for suite in suites for group in SUITES[suite]]
    return lambda summary: measure(summary) if all(group in summary.rows for group in groups) else nan


def _gap(summary: Summary) -> float:
    return 100 * abs(summary.rows[TRAINED].gap.value)


def _weakest_edit(summary: Summary) -> float:
    return 100 * min(summary.rows[group].rates["model"].share for group in SUITES["edits"])


def _loss(summary: Summary) -> float:
    return -summary.kept[BOUND].difference.value if BOUND in summary.kept else nan


BARS = (
    Bar("the one thing is right", 85, _share("single")),
    Bar("both of two things are right", 65, _share("pair")),
    Bar("colour", 75, _share("colour")),
    Bar("order", 85, _share("order")),
    *(Bar(label, 95, _share(label)) for label in ("place", "time", "weather", "season")),
    Bar("style", 85, _share("style")),
    Bar("sign, letter by letter", 60, _share("sign")),
    Bar("Chinese and English apart", 5, _whole(_gap, "draw", "edits"), "points", most=True),
    Bar("edits, mean", 75, _whole(_share("edits"), "edits")),
    Bar("edits, weakest kind", 50, _whole(_weakest_edit, "edits")),
    Bar("edits, lost outside of the change", 5, _whole(_loss, "edits"), "dB", most=True),
)


# ------------------------------------------------------------------------------------------------ texts


def markdown(summary: Summary, facts: Mapping[str, Any]) -> str:
    """The report to be read: what was run, the bars, the tables."""
    bars = [bar.judge(summary) for bar in BARS]
    reached = {True: "yes", False: "**no**", None: "not measured"}
    parts = [
        "# What was asked, and what came\n",
        *(f"- {name}: {_told(value)}" for name, value in facts.items()),
        "\nA case counts if all its facts hold. `true`: the world's own pictures, `round trip`: those through the "
        "autoencoder; both are ceilings. `shuffled`: the model's pictures judged by the facts of another case of the "
        "group, `source`: an edit's picture left as it was; both are floors. In brackets: 95 % intervals.\n",
        "## Bars\n",
        *_table(
            ("bar", "wanted", "measured", "reached"),
            [
                (bar["bar"], bar["wanted"], _figure(bar["measured"], bar["unit"]), reached[bar["reached"]])
                for bar in bars
            ],
        ),
    ]
    for suite, members in SUITES.items():
        rows = [summary.rows[name] for name in (*members, suite) if name in summary.rows]
        if rows:
            parts += [f"\n## {TITLES[suite]}\n", *_rates_table(rows)]
    if TRAINED in summary.rows:
        parts += ["\n## Drawing and edits together\n", *_rates_table([summary.rows[TRAINED]])]
    if any(entry.n for entry in summary.kept.values()):
        heads = ("edit", "n", "model, dB", "round trip, dB", "difference, dB")
        cells = [
            (p.name, str(p.n), _figure(p.model), _figure(p.ceiling), p.difference.show(1, 1))
            for p in summary.kept.values()
            if p.n
        ]
        parts += [
            "\n## Kept outside of the change: PSNR of fulfilled edits\n",
            f"Against the one true picture. {', '.join(FREE)} leave open where things go, which costs a model dearly "
            "here; the bar leaves them out.\n",
            *_table(heads, cells),
        ]
    return "\n".join(parts) + "\n"


def _rates_table(rows: Sequence[Row]) -> list[str]:
    columns = (*PAINTERS, *(floor for floor in FLOORS if any(entry.rates[floor].n for entry in rows)))
    heads = ("group", "n", *columns, "English", "Chinese", "Chinese − English, points")
    cells = [
        (
            entry.name,
            str(entry.rates["model"].n),
            *(str(entry.rates[column]) for column in columns),
            str(entry.english),
            str(entry.chinese),
            entry.gap.show(100, 0),
        )
        for entry in rows
    ]
    return _table(heads, cells)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _told(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(f"{name} {entry}" for name, entry in value.items()) or "the model's own"


def _figure(value: float | None, unit: str = "") -> str:
    return "–" if value is None or isnan(value) else f"{value:.1f} {unit}".strip()


def _number(value: float) -> float | None:
    """As JSON has it: without NaN."""
    return None if isnan(value) else round(value, 4)


def entries(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Every case for report.json: what was asked, which facts held in whose picture, what was read in the model's."""
    found = []
    for outcome, other in zip(outcomes, partners(outcomes), strict=True):
        case = outcome.case
        verdicts: dict[str, Any] = {painter: outcome.verdicts(painter) for painter in outcome.readings}
        verdicts["shuffled"] = None if other is None else outcome.verdicts("model", other)
        found.append(
            {
                "group": case.group,
                "index": case.index,
                "language": case.language,
                "prompt": case.prompt,
                "seed": case.seed,
                "facts": [fact.to_dict() for fact in case.facts],
                "verdicts": verdicts,
                "shuffled_with": None if other is None else other.index,
                "kept": None if outcome.kept is None else {k: _number(v) for k, v in asdict(outcome.kept).items()},
                "read": _rounded(asdict(outcome.readings["model"])),
            }
        )
    return found


def _rounded(value: Any) -> Any:
    """Floats to four places, all the way down."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return round(value, 4) if isinstance(value, float) else value
