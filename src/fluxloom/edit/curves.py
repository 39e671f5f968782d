"""Drift curves: meters over the turns of one or several chains of edits, drawn plainly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from PIL import Image, ImageColor, ImageDraw, ImageFont

from fluxloom.errors import BadInput

# What the meters of :mod:`fluxloom.edit.drift` are called on an axis, and where nothing is lost.
TITLES = {
    "psnr": "PSNR, dB (more is better)", "ssim": "SSIM (1 is best)", "delta_e": "CIEDE2000, mean (0 is best)",
    "sharpness": "sharpness, ratio (1 is best)", "shift": "shift, pixels (0 is best)",
    "identity": "identity, cosine (1 is best)",
}  # fmt: skip
_INKS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8a5a9e", "#c77d1a", "#4a4a4a")  # told apart in grey, too
_PANEL = (400, 280)  # pixels of one meter
_EDGES = (58, 34, 14, 44)  # left, top, right, bottom of a panel, around its axes
_DOUBLE = 2  # drawn so many times larger and shrunk, for smooth lines

Row = Mapping[str, Any]
Line = list[tuple[int, float]]


def curves(rows: Sequence[Row], meters: Sequence[str] = ("psnr", "delta_e")) -> Image.Image:
    """One panel a meter, one line a chain; of several runs of a chain each is thin, and their mean thick.

    rows  of turns in their order, as :meth:`fluxloom.edit.drift.Turn.to_dict` gives them or with the meters themselves;
          ``chain`` names the line that a row belongs to (one without), ``run`` one of several runs of it. Meters that
          are None are left out.

    Raises BadInput for no rows, or an unknown meter.
    """
    if not rows:
        raise BadInput("got no turns to draw, allowed one or more, try a chain with edits")
    if unknown := [name for name in meters if name not in TITLES]:
        raise BadInput(f"got meters {', '.join(unknown)}, allowed {', '.join(TITLES)}, try psnr")
    chains = list(dict.fromkeys(str(row.get("chain", "")) for row in rows))
    width, height = _PANEL
    columns = min(2, len(meters))
    size = width * columns, height * -(-len(meters) // columns)
    sheet = Image.new("RGB", (_DOUBLE * size[0], _DOUBLE * size[1]), "white")
    for place, meter in enumerate(meters):
        lines = {chain: _lines(rows, chain, meter) for chain in chains}
        corner = _DOUBLE * width * (place % columns), _DOUBLE * height * (place // columns)
        sheet.paste(_panel(TITLES[meter], lines), corner)
    return sheet.resize(size, Image.Resampling.LANCZOS)


def _lines(rows: Sequence[Row], chain: str, meter: str) -> list[Line]:
    """The runs of a chain: (turn, value), turns from 1."""
    runs: dict[Any, Line] = {}
    turns: dict[Any, int] = {}
    for row in rows:
        if str(row.get("chain", "")) == chain:
            run = row.get("run")
            turns[run] = turns.get(run, 0) + 1
            value = row.get("total", row).get(meter)
            line = runs.setdefault(run, [])
            if value is not None:
                line.append((turns[run], float(value)))
    return list(runs.values())


def _mean(lines: Sequence[Line]) -> Line:
    values: dict[int, list[float]] = {}
    for turn, value in (point for line in lines for point in line):
        values.setdefault(turn, []).append(value)
    return [(turn, sum(found) / len(found)) for turn, found in sorted(values.items())]


def _panel(title: str, lines: Mapping[str, Sequence[Line]]) -> Image.Image:
    width, height = (_DOUBLE * side for side in _PANEL)
    left, top, right, bottom = (_DOUBLE * edge for edge in _EDGES)
    panel = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(panel)
    font = ImageFont.load_default(size=12 * _DOUBLE)
    points = [point for runs in lines.values() for line in runs for point in line]
    last = max((turn for turn, _ in points), default=1)
    ticks = _ticks([value for _, value in points] or [0.0, 1.0])

    def at(turn: float, value: float) -> tuple[float, float]:
        across = (turn - 1) / max(1, last - 1)
        up = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    for tick in ticks:
        y = at(1, tick)[1]
        pen.line((left, y, width - right, y), "#dddddd", _DOUBLE)
        pen.text((left - 6 * _DOUBLE, y), f"{tick:.6g}", "black", font, "rm")
    for turn in range(1, last + 1, 1 + (last - 1) // 12):
        pen.text((at(turn, ticks[0])[0], height - bottom + 6 * _DOUBLE), str(turn), "black", font, "mt")
    pen.text((left + (width - left - right) / 2, height - 4 * _DOUBLE), "turn", "black", font, "mb")
    pen.text((left, 4 * _DOUBLE), title, "black", font, "lt")
    for (chain, runs), ink, row in zip(lines.items(), cycle(_INKS), range(len(lines)), strict=False):
        red, green, blue = ((value + 2 * 255) // 3 for value in ImageColor.getrgb(ink))
        faint = f"#{red:02x}{green:02x}{blue:02x}"
        thin = [(run, faint, 1) for run in runs if len(runs) > 1]
        for line, colour, thick in [*thin, (_mean(runs), ink, 3)]:
            where = [at(*point) for point in line]
            if len(where) > 1:
                pen.line(where, colour, thick * _DOUBLE, "curve")
            elif where:  # a line of one point would not be seen
                (x, y), r = where[0], thick * _DOUBLE
                pen.ellipse((x - r, y - r, x + r, y + r), colour)
        pen.text((width - right, (4 + 14 * row) * _DOUBLE), chain, ink, font, "rt")
    return panel


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers from at or below the least to at or above the largest."""
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    power = 10.0 ** len(f"{spread / 4:.0f}") if spread >= 40 else 1.0
    while power > spread / 4:
        power /= 10
    step = next(power * factor for factor in (1, 2, 5, 10) if spread / (power * factor) <= 5)
    first = int(low // step)
    count = next(k for k in range(1, 20) if (first + k) * step >= high - 1e-9 * spread)
    return [round((first + k) * step, 10) for k in range(count + 1)]
