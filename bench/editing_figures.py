"""The pictures of docs/editing.md, drawn by nano on a processor in about two minutes.

    python bench/editing_figures.py docs/images

``lock.webp``     one edit of a picture of 768 pixels, with locked pixels and without, and what else changed (8 times)
``session.webp``  a session of ten turns with branches, as a tree
``drift.webp``    the curves of bench/results/*-drift.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import fluxloom as fl
from fluxloom import world
from fluxloom.edit.curves import curves
from fluxloom.edit.session import Session
from fluxloom.infer.pictures import resize

SIDE, GAP, LINE = 200, 10, 16  # pixels of a picture, between two, of a line of text
BACKDROP = world.Backdrop("meadow", "day", "clear", "summer", None, (1, 2, 3, 4, 5, 6))
ITEMS = (world.Item("car", 0.3, 0.9, 0.42, "red"), world.Item("cat", 0.75, 0.88, 0.3, None))
# Where a turn begins (a turn's number, or the one before it), and what is asked.
TURNS = [
    (None, "make the car blue"), (None, "make it night"), (None, "add a tree"), (None, "remove the cat"),
    (1, "make it winter"), (None, "replace the cat with a dog"), (None, "make the car yellow"),
    (5, "make it sunset"), (None, "turn it into a pencil sketch"), (1, "make it a flat illustration"),
]  # fmt: skip


def titled(cells: list[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures in a row, with their titles."""
    page = Image.new("RGB", (GAP + len(cells) * (SIDE + GAP), SIDE + 2 * GAP + LINE), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for k, (picture, title) in enumerate(cells):
        left = GAP + k * (SIDE + GAP)
        page.paste(resize(picture, SIDE, SIDE), (left, GAP))
        draw.text((left, GAP + SIDE + 2), title, "black", font)
    return page


def locked(pipe: fl.Loom) -> Image.Image:
    """An edit with and without locked pixels."""
    scene = world.Scene(BACKDROP, "3d", ITEMS)
    photo = Image.fromarray(world.render(scene, 768).pixels)
    loose, tight = (pipe.edit(photo, "make the car blue", seed=1, lock=lock).image for lock in ("off", "auto"))

    def changes(edited: Image.Image) -> Image.Image:
        both = [np.asarray(resize(picture, 768, 768)).astype(int) for picture in (photo, edited)]
        return Image.fromarray((255 - np.clip(8 * np.abs(both[0] - both[1]), 0, 255)).astype(np.uint8))

    titles = "768 x 768 pixels", "lock off: 256 x 256", "changes, 8 times", "locked: 768 x 768", "changes, 8 times"
    return titled(list(zip((photo, loose, changes(loose), tight, changes(tight)), titles, strict=True)))


def tree(pipe: fl.Loom, folder: Path) -> Image.Image:
    """Ten turns with branches; columns are turns from the root, a row begins where a branch does."""
    session = Session.create(folder, seed=1)
    scene = world.Scene(BACKDROP, "3d", ITEMS)
    nodes = [session.import_picture(Image.fromarray(world.render(scene, 256).pixels))]
    for start, instruction in TURNS:
        nodes.append(session.edit(pipe.edit, instruction, at=None if start is None else nodes[start].id))
    parents = {node.id: node.parent for node in nodes}
    column: dict[str, int] = {}
    row: dict[str, int] = {}
    children = Counter(parent for parent in parents.values() if parent)
    seen: Counter[str] = Counter()
    rows = 0
    for node in nodes:
        column[node.id] = column[node.parent] + 1 if node.parent else 0
        if node.parent and seen[node.parent]:
            rows += 1
        row[node.id] = rows if not node.parent or seen[node.parent] else row[node.parent]
        if node.parent:
            seen[node.parent] += 1
    side = 128
    step = side + 3 * LINE
    page = Image.new("RGB", (GAP + (max(column.values()) + 1) * (side + GAP), GAP + (rows + 1) * step), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for node in nodes:
        left, top = GAP + column[node.id] * (side + GAP), GAP + row[node.id] * step
        if node.parent and row[node.parent] != row[node.id]:
            x, y = GAP + column[node.parent] * (side + GAP) + side // 2, GAP + row[node.parent] * step + side + 2 * LINE
            draw.line([(x, y), (x, top + side // 2), (left, top + side // 2)], "grey", 2)
        kept = session.picture(node)
        picture = kept.image if isinstance(kept, fl.Result) else Image.open(kept).convert("RGB")
        page.paste(resize(picture, side, side), (left, top))
        draw.text((left, top + side + 2), node.instruction or "imported", "black", font)
    assert sum(children.values()) == len(TURNS)
    return page


def drift() -> Image.Image:
    """The newest measured chains, of those without an edit of everything (which starts the count anew)."""
    found = json.loads(sorted(Path("bench/results").glob("*-drift.json"))[-1].read_text("utf-8"))
    names = ("psnr", "delta_e", "sharpness", "identity")
    rows = [
        {"chain": run["chain"], "run": run["run"], **{name: run[name][turn] for name in names}}
        for run in found["runs"]
        if run["run"] % 2 == 0
        for turn in range(found["turns"])
    ]
    return curves(rows, names)


def main() -> None:
    out = Path(sys.argv[1])
    pipe = fl.load("nano")
    with tempfile.TemporaryDirectory() as folder:
        pictures = {"lock": locked(pipe), "session": tree(pipe, Path(folder) / "session"), "drift": drift()}
    for name, picture in pictures.items():
        picture.save(out / f"{name}.webp", quality=60, method=6)
        print(out / f"{name}.webp")


if __name__ == "__main__":
    main()
