"""What ``make demo`` draws and edits, and the contact sheet that shows it.

Seeds are 1, 2, 3, ... in the order below, fixed before anything was drawn: nothing here is picked by result.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

from fluxloom.world.preview import Font, chinese_font


@dataclass(frozen=True)
class Line:
    """A prompt or an instruction; ``gloss`` is its English where it is Chinese."""

    text: str
    gloss: str = ""


PROMPTS = (
    Line("a red bicycle on the beach at sunset"),
    Line("a panda in the forest"),
    Line("a sailboat at sea at dawn"),
    Line("草地上有一只猫", "a cat in a meadow"),
    Line("a penguin in a snowy field, flat style"),
    Line("an owl in the forest at night"),
    Line("一辆黄色的汽车在城市里，下着雨", "a yellow car in the city in the rain"),
    Line('a robot in the city with a sign that says "HELLO"'),
    Line("a dog to the left of a house in a meadow"),
    Line("a green dragon in the mountains in autumn"),
    Line("海底有一只章鱼", "an octopus underwater"),
    Line("a rocket in outer space"),
    Line("a birthday cake on a pink background"),
    Line("沙漠里有一头骆驼和一棵仙人掌", "a camel and a cactus in the desert"),
    Line("a teddy bear in a room, pencil sketch"),
    Line("一座城堡在群山前，下着雪，卡通风格", "a castle in front of mountains, snow falling, cartoon style"),
)

# Each: what to draw first, then three instructions, each applied to the picture before.
CHAINS = (
    (
        Line("a red car on the road"),
        Line("make the car blue"),
        Line("make it night"),
        Line("add a tree"),
    ),
    (
        Line("草地上有一只兔子和一个苹果", "a rabbit and an apple in a meadow"),
        Line("去掉苹果", "remove the apple"),
        Line("变成冬天", "turn it into winter"),
        Line("把兔子换成一只狐狸", "replace the rabbit with a fox"),
    ),
    (
        Line('a penguin in a snowy field with a sign that says "HELLO"'),
        Line('change the sign to "OPEN"'),
        Line("make it sunset"),
        Line("turn it into a watercolor painting"),
    ),
)

COLUMNS = 4
_PICTURE, _GAP, _TYPE, _LINE = 224, 12, 13, 17  # pixels
_LINES, _LETTERS = 3, 34  # of a caption
_CELL = (_PICTURE + _GAP, _PICTURE + _LINES * _LINE + _GAP)

Shown = tuple[Image.Image, Line]


def sheet(drawn: Sequence[Shown], chains: Sequence[Sequence[Shown]] = ()) -> Image.Image:
    """Pictures with captions in rows of four; below, each chain in a row of its own, with arrows."""
    rows = [drawn[i : i + COLUMNS] for i in range(0, len(drawn), COLUMNS)]
    columns = max(map(len, [*rows, *chains]))
    width, height = columns * _CELL[0] + _GAP, (len(rows) + len(chains)) * _CELL[1] + _GAP
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for number, row in enumerate([*rows, *chains]):
        for column, (picture, line) in enumerate(row):
            x, y = _GAP + column * _CELL[0], _GAP + number * _CELL[1]
            page.paste(ImageOps.pad(picture, (_PICTURE, _PICTURE), Image.Resampling.LANCZOS, "white"), (x, y))
            caption, font = _caption(line)
            for at, words in enumerate(caption):
                draw.text((x, y + _PICTURE + 3 + at * _LINE), words, "black", font)
            if column and number >= len(rows):
                _arrow(draw, x - _GAP, y + _PICTURE // 2)
    return page


def _caption(line: Line) -> tuple[list[str], Font]:
    """The text in lines that fit, and the font that can draw it; without a Chinese font, the gloss."""
    latin, chinese = _fonts()
    if line.gloss and chinese is not None:
        lines = [*textwrap.wrap(line.text, _PICTURE // _TYPE), *textwrap.wrap(line.gloss, _LETTERS)]
        return lines[:_LINES], chinese
    text = f"(zh) {line.gloss}" if line.gloss else line.text
    return textwrap.wrap(text, _LETTERS)[:_LINES], latin


def _arrow(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.polygon([(x + 2, y - 6), (x + _GAP - 2, y), (x + 2, y + 6)], "black")


@cache
def _fonts() -> tuple[Font, Font | None]:
    return ImageFont.load_default(_TYPE), chinese_font(_TYPE)
