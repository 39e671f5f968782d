"""Contact sheets of an evaluation: the first cases of each group as they came, what succeeded framed green, what
failed red, with what was read instead."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from fluxloom.evals.world import Outcome
from fluxloom.world.preview import HEAD, NO_CHINESE, Font, chinese_font

SIDE, FRAME, GAP = 160, 4, 8  # pixels
LINE, LINES, TYPE = 14, 5, 11  # of the texts: pixels from line to line, lines a cell, pixels of a letter
GREEN, RED = (38, 160, 70), (214, 40, 40)


def sheet(outcomes: Sequence[Outcome]) -> Image.Image:
    """A row for each group, a cell for each outcome that kept its picture; an edit's source stands before it."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.picture is not None:
            groups.setdefault(outcome.case.group, []).append(outcome)
    latin, chinese = ImageFont.load_default(TYPE), chinese_font(TYPE)
    head = HEAD if chinese is None else 0
    wide = {name: sum(map(_width, group)) for name, group in groups.items()}
    step = SIDE + 2 * FRAME + (LINES + 1) * LINE + GAP
    page = Image.new("RGB", (GAP + max(wide.values(), default=0), GAP + head + step * len(groups)), "white")
    draw = ImageDraw.Draw(page)
    if chinese is None:
        draw.text((GAP, 2), NO_CHINESE, "black", latin)
    for number, (name, group) in enumerate(groups.items()):
        left, top = GAP, GAP + head + number * step
        draw.text((left, top), name, "black", latin)
        for outcome in group:
            _cell(page, outcome, (left, top + LINE), latin, chinese)
            left += _width(outcome)
    return page


def _width(outcome: Outcome) -> int:
    return (SIDE + 2 * FRAME) * (1 if outcome.source is None else 2) + GAP


def _cell(page: Image.Image, outcome: Outcome, at: tuple[int, int], latin: Font, chinese: Font | None) -> None:
    draw = ImageDraw.Draw(page)
    left, top = at
    right, bottom = left + _width(outcome) - GAP, top + SIDE + 2 * FRAME
    draw.rectangle((left, top, right - 1, bottom - 1), GREEN if outcome.passed() else RED)
    for number, picture in enumerate(filter(None, (outcome.source, outcome.picture))):
        x = left + FRAME + number * (SIDE + 2 * FRAME)
        page.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, top + FRAME))
    y = bottom + 1
    is_chinese = outcome.case.language == "zh"
    font = chinese if is_chinese else latin
    letters = (right - left) // (TYPE if is_chinese else 6)
    told = [] if font is None else textwrap.wrap(outcome.case.prompt, letters)[:3]
    for text in told:
        draw.text((left, y), text, "black", font)
        y += LINE
    for text in textwrap.wrap(failure(outcome), (right - left) // 6)[: LINES - len(told)]:
        draw.text((left, y), text, RED, latin)
        y += LINE


def failure(outcome: Outcome) -> str:
    """What does not hold in the model's picture and what was read there; nothing for a success."""
    seen = outcome.readings["model"]
    missed = [fact for fact in outcome.case.facts if not fact.holds(seen)]
    read = dict.fromkeys(fact.instead(seen) for fact in missed)
    return f"not {', '.join(map(str, missed))}; read {'; '.join(read)}" if missed else ""
