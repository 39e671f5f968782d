"""Contact sheets: what the illustrated world looks like, with its captions and its edit pairs."""

from __future__ import annotations

import random
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fluxloom.world.captions import caption
from fluxloom.world.edits import EDIT_KINDS, render_edit, sample_edit
from fluxloom.world.mix import Mix, sample_scene
from fluxloom.world.render import render
from fluxloom.world.split import Split

FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "C:/Windows/Fonts",
)
CHINESE_FONTS = (
    "NotoSansCJK*",
    "NotoSansSC*",
    "SourceHanSans*",
    "wqy-*",
    "DroidSansFallback*",
    "PingFang*",
    "msyh*",
    "simhei*",
)
HEAD = 18  # pixels over the pictures for this note:
NO_CHINESE = "The Chinese texts are left out: no font for them was found on this machine. Noto Sans CJK would do."
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def chinese_font(size: int) -> Font | None:
    """A font of this machine that has Chinese characters; Pillow's own has none."""
    for folder in map(Path, FONT_FOLDERS):
        for pattern in CHINESE_FONTS:
            for path in sorted(folder.rglob(pattern)) if folder.is_dir() else ():
                if path.suffix.lower() in (".ttf", ".otf", ".ttc"):
                    return ImageFont.truetype(str(path), size)
    return None


def contact_sheet(
    seed: int = 0,
    *,
    scenes: int = 24,
    edits: int = len(EDIT_KINDS),
    columns: int = 6,
    size: int = 192,
    mix: Mix | None = None,
    split: Split = "train",
) -> Image.Image:
    """Scenes with their captions, then edits as source, target and changed pixels with their instruction.

    Chinese texts are printed below the English ones; where the machine has no font for them, the sheet says so.
    """
    rng, mix = random.Random(seed), mix or Mix.scenes()
    latin, chinese = ImageFont.load_default(11), chinese_font(11)
    text_height = 62 if chinese is None else 90
    cells: list[tuple[list[np.ndarray], str, str]] = []
    for _ in range(scenes):
        scene = sample_scene(rng, mix, split)
        picture = render(scene, size).pixels
        cells.append(([picture], caption(scene, rng, "en", split), caption(scene, rng, "zh", split)))
    kinds = list(EDIT_KINDS)
    for k in range(edits):
        edit = sample_edit(rng, mix, split, [kinds[k % len(kinds)]])
        pair = render_edit(edit, size)
        mask = np.repeat(pair.change[..., None], 3, axis=2) * np.uint8(255)
        texts = f"{edit.kind}: {edit.instruction(rng, 'en')}", edit.instruction(rng, "zh")
        cells.append(([pair.source.pixels, pair.target.pixels, mask], *texts))
    return _sheet(cells, columns, size, text_height, latin, chinese)


def _sheet(
    cells: list[tuple[list[np.ndarray], str, str]],
    columns: int,
    size: int,
    text_height: int,
    latin: Font,
    chinese: Font | None,
) -> Image.Image:
    """Cells from left to right; each is as wide as its pictures, and a row ends where the next would not fit."""
    columns = max(columns, 3)
    spots: list[tuple[int, int, int]] = []
    x = row = 0
    for pictures, _, _ in cells:
        if x + len(pictures) > columns or (spots and len(pictures) > 1 and spots[-1][2] == 1):
            x, row = 0, row + (x > 0)
        spots.append((x, row, len(pictures)))
        x += len(pictures)
    step, head = size + text_height, 0 if chinese else HEAD
    sheet = Image.new("RGB", (columns * (size + 4), head + (row + 1) * step), "white")
    draw = ImageDraw.Draw(sheet)
    if not chinese:
        draw.text((2, 2), NO_CHINESE, "black", latin)
    for (pictures, english, other), (x, row, wide) in zip(cells, spots, strict=True):
        left, top = x * (size + 4), head + row * step
        for k, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (left + k * size, top))
        letters = max(8, wide * size // 6)
        draw.multiline_text((left + 2, top + size + 1), textwrap.fill(english, letters), "black", latin, spacing=1)
        if chinese is not None:
            lines = textwrap.fill(other, max(6, wide * size // 12))
            draw.multiline_text((left + 2, top + size + 62), lines, "black", chinese, spacing=1)
    return sheet
