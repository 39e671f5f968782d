"""The report of a batch: a page with before and after, outliers first, and a table for other programs."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

Row = Mapping[str, Any]

COLUMNS = (
    "source", "output", "state", "error", "instruction", "seed", "width", "height", "changed", "whole", "psnr", "ssim",
    "delta_e", "sharpness", "shift", "identical", "seconds", "notes",
)  # fmt: skip
# What makes a picture odd: the meter, which side, and the least distance from the median that anyone would see.
_METERS = (
    ("psnr", -1, 3.0, "the rest drifted"),
    ("delta_e", 1, 1.0, "colours drifted"),
    ("shift", 1, 1.0, "the picture moved"),
    ("changed", 1, 0.1, "more changed than in others"),
    ("changed", -1, 0.1, "less changed than in others"),
)
_FAR = 3.5  # modified z-score of an outlier (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993)
_LITTLE = 0.001  # share of a picture: nothing that anybody asked for is smaller
_STYLE = """
body{font:15px/1.4 system-ui,sans-serif;margin:2em auto;max-width:80em;padding:0 1em;color:#222;background:#fff}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(21em,1fr));gap:1em}
article{border:1px solid #ccc;border-radius:6px;padding:.6em;overflow-wrap:anywhere}
article.odd{border-color:#c80}article.failed{border-color:#c22}
img{width:100%;height:auto;display:block}b{font-weight:600}p{margin:.3em 0}small{color:#666}
.odd b+p{color:#a60}.failed b+p{color:#c22}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}small{color:#999}}
"""


def oddities(rows: Sequence[Row]) -> list[tuple[float, list[str]]]:
    """How far each row is from the others (0: an ordinary one), and why."""
    found: list[tuple[float, list[str]]] = [(0.0, []) for _ in rows]
    done = [index for index, row in enumerate(rows) if row.get("state") == "done"]

    def add(index: int, score: float, reason: str) -> None:
        before, reasons = found[index]
        found[index] = max(before, score), [*reasons, reason]

    for meter, side, least, reason in _METERS:
        values = {index: float(rows[index][meter]) for index in done if rows[index].get(meter) is not None}
        if len(values) < 5:  # too few to say what is ordinary
            continue
        middle = statistics.median(values.values())
        spread = statistics.median(abs(value - middle) for value in values.values())
        for index, value in values.items():
            away = side * (value - middle)
            score = 0.6745 * away / max(spread, least / 10)
            if away > least and score > _FAR:
                add(index, score, f"{reason}: {meter} {value:.3g}, median {middle:.3g}")
    whole = [index for index in done if rows[index].get("whole")]
    for index in done:
        changed = rows[index].get("changed")
        if changed is not None and changed < _LITTLE:
            add(index, 100.0, "nothing changed")
        if rows[index].get("whole") and 2 * len(whole) < len(done):
            add(index, 50.0, "the whole picture changed")
        for note in rows[index].get("warnings") or ():
            add(index, _FAR, note)
    return found


def page(title: str, rows: Sequence[Row]) -> str:
    """An HTML page: failures, then outliers, the oddest first, then the rest in their order."""
    scores = oddities(rows)
    order = sorted(range(len(rows)), key=lambda k: (rows[k]["state"] != "failed", -scores[k][0], k))
    failed = sum(row["state"] == "failed" for row in rows)
    odd = sum(score > 0 for score, _ in scores)
    cells = "\n".join(_cell(rows[index], scores[index][1]) for index in order)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><h1>{escape(title)}</h1>'
        f"<p>{len(rows) - failed} done, {failed} failed, {odd} to look at. Left: before; right: after.</p>"
        f"<main>\n{cells}\n</main></html>\n"
    )


def table(rows: Sequence[Row]) -> str:
    """All rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "notes": "; ".join(row.get("notes") or ())})
    return text.getvalue()


def _cell(row: Row, reasons: Sequence[str]) -> str:
    failed = row["state"] == "failed"
    name = escape(str(row["source"]))
    thumb = f'<img loading="lazy" src="{quote(row["thumb"])}" alt="{name}, before and after">' if not failed else ""
    if not failed:
        name = f'<a href="{quote(row["output"])}">{escape(row["output"])}</a>'
    why = escape(row["error"]) if failed else escape("; ".join(reasons))
    facts = ", ".join(f"{key} {_short(row[key])}" for key in _SHOWN if row.get(key) is not None)
    told = "".join(f"<p><small>{escape(text)}</small>" for text in (facts, *(row.get("notes") or ())) if text)
    kind = "failed" if failed else "odd" if reasons else "fine"
    return f'<article class="{kind}">{thumb}<b>{name}</b>{f"<p>{why}" if why else ""}{told}</article>'


_SHOWN = ("instruction", "seed", "changed", "psnr", "ssim", "delta_e", "shift", "seconds")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
