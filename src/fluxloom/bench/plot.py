"""A bar chart of a run as SVG, written by hand: one panel a scene, the quickest first, the floor as a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fluxloom.errors import BadInput

_WIDTH, _LEFT, _RIGHT = 960, 270, 90  # of the picture; of the names before the bars, of the figures behind them
_BAR, _GAP, _HEAD, _FOOT = 20, 8, 70, 46
_COLOURS = {"ours": "#2563eb", "ours lossy": "#93b4f5", "others": "#6b7280", "others lossy": "#c3c8d0"}
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2937;paint-order:stroke;stroke:#fff;stroke-width:3px}"
    ".title{font-size:17px;font-weight:600}"
    ".small{font-size:11px;fill:#4b5563}.floor{stroke:#b91c1c;stroke-width:1.5;stroke-dasharray:5 3}"
    ".floors{font-size:11px;fill:#b91c1c}"
)


@dataclass(frozen=True)
class Bar:
    """One measured way: milliseconds of a step."""

    name: str
    ms: float
    ours: bool
    lossy: bool

    @property
    def colour(self) -> str:
        return _COLOURS[("ours" if self.ours else "others") + (" lossy" if self.lossy else "")]


def bars(run: Mapping[str, Any]) -> dict[str, list[Bar]]:
    """The bars of each scene of a run of `bench peers` or `bench step`, the quickest first. Raises BadInput where
    nothing was measured."""
    found: dict[str, list[Bar]] = {}
    for row in run["rows"]:
        if "ms" in row and (name := row.get("peer", row.get("recipe"))):
            bar = Bar(name, float(row["ms"]), bool(row.get("ours", "recipe" in row)), bool(row.get("lossy")))
            found.setdefault(row.get("scene", "one step"), []).append(bar)
    if not found:
        raise BadInput("got a run without times of steps, allowed those of `bench peers` and `bench step`, try another")
    return {scene: sorted(rows, key=lambda bar: bar.ms) for scene, rows in found.items()}


def floors(run: Mapping[str, Any], scene: str) -> dict[str, float]:
    """The floors of a scene, in milliseconds by what they allow."""
    rows = [row for row in run["rows"] if "tflop" in row and row.get("scene", scene) == scene]
    return dict((rows[0] if rows else run).get("floor_ms", {}))


def svg(run: Mapping[str, Any]) -> str:
    """The picture of a run, complete: it needs no fonts, styles or scripts from elsewhere."""
    panels, y, parts = bars(run), float(_HEAD), []
    for scene, rows in panels.items():
        drawn, height = _panel(scene, rows, floors(run, scene), y)
        parts += drawn
        y += height
    machine = run.get("machine", {})
    versions = run.get("versions", {})
    said = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "triton", "diffusers", "torchao") if name in versions
    )
    head = [
        _text(16, 28, f"Milliseconds of one denoise step, {run.get('model', 'a model')}", "title"),
        _text(16, 48, f"{machine.get('name', '')}; {said}; {run.get('created', '')[:10]}", "small"),
    ]
    foot = _legend(y)
    height = round(y + _FOOT)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
            f'height="{height}" role="img" aria-label="Milliseconds of one denoise step">',
            f"<style>{_STYLE}</style>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
            *head, *parts, *foot, "</svg>", "",
        ]
    )  # fmt: skip


def _panel(scene: str, rows: Sequence[Bar], least: Mapping[str, float], y: float) -> tuple[list[str], float]:
    """The bars of one scene from ``y`` on, and how high they are."""
    width = _WIDTH - _LEFT - _RIGHT
    scale = width / max(rows[-1].ms, 1e-9)
    lines = sorted((name for name in least if least[name] <= rows[-1].ms), key=lambda name: -least[name])
    top = y + 26 + 13 * len(lines)
    bottom = top + len(rows) * (_BAR + _GAP)
    parts = [_text(16, y + 16, scene, "title")]
    for k, bar in enumerate(rows):
        at, long = top + k * (_BAR + _GAP), bar.ms * scale
        parts += [
            _text(_LEFT - 8, at + 15, bar.name + (" (lossy)" if bar.lossy else ""), anchor="end"),
            f'<rect x="{_LEFT}" y="{at:.1f}" width="{long:.1f}" height="{_BAR}" rx="2" fill="{bar.colour}"/>',
        ]
    for k, name in enumerate(lines):  # the rightmost highest: a name stands left of its line, above the shorter ones
        x = _LEFT + least[name] * scale
        parts += [
            f'<line class="floor" x1="{x:.1f}" y1="{y + 18 + 13 * k:.1f}" x2="{x:.1f}" y2="{bottom:.1f}"/>',
            _text(x - 4, y + 28 + 13 * k, f"floor {name}: {_figure(least[name])}", "floors", "end"),
        ]
    parts += [
        _text(_LEFT + bar.ms * scale + 6, top + k * (_BAR + _GAP) + 15, _figure(bar.ms)) for k, bar in enumerate(rows)
    ]
    return parts, bottom - y + 14


def _legend(y: float) -> list[str]:
    parts, x = [], 16.0
    for name, colour in _COLOURS.items():
        parts += [f'<rect x="{x:.0f}" y="{y + 8:.0f}" width="14" height="14" rx="2" fill="{colour}"/>']
        parts += [_text(x + 20, y + 20, name, "small")]
        x += 110
    return [*parts, _text(x, y + 20, "floor: counted operations at this machine's best rates", "floors")]


def _figure(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 1000 else f"{ms:.3g} ms" if ms < 100 else f"{ms:.1f} ms"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    more = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(text)}</text>'
