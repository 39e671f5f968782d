"""Builds the art atlas of the illustrated world from openly licensed icon packages.

    python -m fluxloom.recipes.atlas --packages DIR [--out src/fluxloom/assets/world]

DIR holds these npm packages, each unpacked into a folder named after its tarball (`npm pack NAME`, `tar xf`):

    @lobehub/fluent-emoji-3d 1.1.0                    MIT         style "3d"
    @iconify-json/fluent-emoji-flat 1.2.6             MIT         style "flat"
    @iconify-json/noto 1.2.9                          Apache-2.0  style "cartoon"
    @iconify-json/fluent-emoji-high-contrast 1.2.6    MIT         style "line"

SVG is drawn by resvg-py (`pip install resvg-py`), which only this builder needs. The result is `atlas.zip`,
one WebP per style and concept (those of a concept in one entry), and `concepts.json`, the curated table of
`concepts.tsv` with what was measured on the sprites: their sizes, their natural colours, and the colours into which
they can be repainted truly.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from fluxloom.errors import BadInput
from fluxloom.world.atlas import RESERVED_STYLES, STYLES
from fluxloom.world.colours import Pixels, name_shares, recolour

RASTER = "lobehub-fluent-emoji-3d"
VECTORS = {
    "flat": "iconify-json-fluent-emoji-flat",
    "cartoon": "iconify-json-noto",
    "line": "iconify-json-fluent-emoji-high-contrast",
}
LONG_SIDE = 176  # pixels; keeps the whole atlas under 4 MB and large sprites sharp at 256 px
QUALITY = 84
LETTERS = {
    "r": "red", "o": "orange", "y": "yellow", "g": "green", "b": "blue",
    "p": "purple", "k": "pink", "n": "brown", "x": "black", "w": "white",
}  # fmt: skip
COLUMNS = (
    "code",
    "en",
    "en_more",
    "zh",
    "zh_more",
    "measure",
    "category",
    "stance",
    "size",
    "flip",
    "colours",
    "natural",
)


def read_table() -> list[dict[str, str]]:
    """The curated table, one row a concept; refused where two concepts share a name."""
    lines = Path(__file__).with_name("concepts.tsv").read_text(encoding="utf-8").splitlines()
    rows = [dict(zip(COLUMNS, line.split("|"), strict=True)) for line in lines if line and line[0] != "#"]
    for language in ("en", "zh"):
        seen: dict[str, str] = {}
        for row in rows:
            for name in [row[language], *filter(None, row[f"{language}_more"].split(","))]:
                if name.lstrip("~") in seen:
                    raise BadInput(f"concepts.tsv: {name!r} names both {seen[name.lstrip('~')]} and {row['en']}")
                seen[name.lstrip("~")] = row["en"]
    return rows


class Packages:
    """Finds the drawing of a code point in each unpacked package."""

    def __init__(self, folder: Path) -> None:
        self.raster = self._package(folder, RASTER) / "assets"
        self.vectors: dict[str, tuple[dict[str, str], dict[str, Any]]] = {}
        for style, name in VECTORS.items():
            root = self._package(folder, name)
            self.vectors[style] = (
                json.loads((root / "chars.json").read_text(encoding="utf-8")),
                json.loads((root / "icons.json").read_text(encoding="utf-8")),
            )

    @staticmethod
    def _package(folder: Path, name: str) -> Path:
        found = sorted(p for p in folder.glob(f"{name}-[0-9]*") if p.is_dir())
        if not found:
            raise BadInput(f"got no folder {name}-<version> in {folder}; try `npm pack` and `tar xf` there")
        return found[-1]

    def drawing(self, style: str, code: str) -> Pixels | None:
        code = code.lower()
        if style == "3d":
            for name in (code, f"{code}-fe0f"):
                if (path := self.raster / f"{name}.webp").exists():
                    return np.asarray(Image.open(path).convert("RGBA"))
            return None
        codes, icons = self.vectors[style]
        known = codes.get(code) or codes.get(f"{code}-fe0f")
        if known is None:
            return None
        name = icons.get("aliases", {}).get(known, {}).get("parent", known)
        icon = icons["icons"][name]
        width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        resvg = importlib.import_module("resvg_py")
        png = bytes(resvg.svg_to_bytes(svg_string=svg.replace("currentColor", "#26262e"), width=512, height=512))
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def trim(rgba: Pixels, long_side: int = LONG_SIDE) -> Pixels:
    """Cut the empty border away and bring the long side to `long_side`, filtering premultiplied colour."""
    ys, xs = np.nonzero(rgba[..., 3] > 12)
    cut: Pixels = rgba[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].astype(np.float32)
    cut[..., :3] *= cut[..., 3:] / 255
    scale = long_side / max(cut.shape[:2])
    size = (max(1, round(cut.shape[1] * scale)), max(1, round(cut.shape[0] * scale)))
    small: Pixels = cv2.resize(cut, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    small[..., :3] *= 255 / np.maximum(small[..., 3:], 1)
    return np.clip(small + 0.5, 0, 255).astype(np.uint8)


def paper_inside(rgba: Pixels) -> Pixels:
    """Line drawings are hollow; fill what their outline encloses with paper, so that no backdrop shows through."""
    solid = np.pad((rgba[..., 3] > 100).astype(np.uint8), 1)
    outside = solid.copy()
    cv2.floodFill(outside, np.zeros((solid.shape[0] + 2, solid.shape[1] + 2), np.uint8), (0, 0), 2)
    inside = (outside[1:-1, 1:-1] != 2)[..., None]
    alpha = rgba[..., 3:].astype(np.float32) / 255
    filled = np.dstack([rgba[..., :3] * alpha + 255 * (1 - alpha), np.full_like(alpha, 255)])
    return np.where(inside, filled, rgba).astype(np.uint8)


def webp(rgba: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "WEBP", quality=QUALITY, method=6, alpha_quality=90)
    return buffer.getvalue()


def unpack(file: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGBA"))


def true_colours(sprites: dict[str, Pixels], candidates: str) -> list[str]:
    """The candidates that, painted on, really are the main colour of the sprite in every trained style."""
    good = []
    for letter in candidates.lstrip("*"):
        colour = LETTERS[letter]
        if all(is_truly(recolour(sprites[s], colour, candidates[:1] == "*"), colour) for s in STYLES):
            good.append(colour)
    return good


def is_truly(rgba: Pixels, colour: str) -> bool:
    """Whether people would call the sprite by this colour: it covers enough and no other hue competes."""
    shares = name_shares(rgba)
    neutral = {"black", "white", "grey"}
    rivals = [v for n, v in shares.items() if n != colour and n not in neutral]
    enough = 0.36 if colour in neutral else 0.18
    return shares.get(colour, 0) >= max(enough, 1.25 * max(rivals, default=0))


def concept(row: dict[str, str], sprites: dict[str, Pixels]) -> dict[str, Any]:
    english = [row["en"], *filter(None, row["en_more"].split(","))]
    return {
        "code": row["code"].lower(),
        "en": english[0].lstrip("~"),
        "en_more": [n.lstrip("~") for n in english[1:]],
        "bare": [n[1:] for n in english if n[0] == "~"],
        "zh": row["zh"],
        "zh_more": [n for n in row["zh_more"].split(",") if n],
        "measure": row["measure"],
        "category": row["category"],
        "stance": {"g": "stands", "f": "flies", "w": "floats"}[row["stance"]],
        "size": int(row["size"]),
        "flip": row["flip"] == "y",
        "whole": row["colours"].startswith("*"),
        "colours": true_colours(sprites, row["colours"]),
        "natural": LETTERS.get(row["natural"]),
        "pixels": {s: [int(p.shape[1]), int(p.shape[0])] for s, p in sprites.items()},
    }


def build(packages: Path, out: Path) -> Iterator[str]:
    """Write the atlas and the table; yield one line per concept about what was left out."""
    drawings = Packages(packages)
    table: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out / "atlas.zip", "w", zipfile.ZIP_STORED) as archive:
        for row in read_table():
            found = {s: d for s in (*STYLES, *RESERVED_STYLES) if (d := drawings.drawing(s, row["code"])) is not None}
            if missing := set(STYLES) - found.keys():
                raise BadInput(f"concepts.tsv: {row['en']} ({row['code']}) has no drawing in {sorted(missing)}")
            files = {s: webp(trim(paper_inside(d) if s == "line" else d)) for s, d in found.items()}
            # Measured on what ships: WebP moves colours a little.
            entry = concept(row, {s: unpack(f) for s, f in files.items()})
            name = entry["en"].replace(" ", "_")
            table[name] = entry
            # A fixed date keeps the archive byte for byte reproducible.
            archive.writestr(zipfile.ZipInfo(name, (2025, 1, 1, 0, 0, 0)), b"".join(files.values()))
            dropped = [LETTERS[c] for c in row["colours"].lstrip("*") if LETTERS[c] not in entry["colours"]]
            if dropped:
                yield f"{entry['en']}: not truly {', '.join(dropped)}"
    text = (
        "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in table.items()) + "\n}\n"
    )
    (out / "concepts.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="build the art atlas of the illustrated world")
    parser.add_argument("--packages", type=Path, required=True, help="folder of unpacked npm packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "assets" / "world")
    args = parser.parse_args()
    for line in build(args.packages, args.out):
        print(line)
    print(f"{args.out / 'atlas.zip'}: {(args.out / 'atlas.zip').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
