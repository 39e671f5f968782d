"""The atlas that ships: its size, its speed, its colours."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.resources import files

import numpy as np
import pytest
from PIL import ImageFont

from fluxloom import world
from fluxloom.recipes.atlas import is_truly, paper_inside, read_table, trim
from fluxloom.world import preview
from fluxloom.world.atlas import RESERVED_STYLES, STYLES, Atlas
from fluxloom.world.colours import name_shares
from fluxloom.world.preview import contact_sheet


def test_atlas_is_small_and_loads_fast() -> None:
    folder = files("fluxloom") / "assets" / "world"
    table, archive = (folder / "concepts.json").read_bytes(), (folder / "atlas.zip").read_bytes()
    assert len(archive) + len(table) < 4 * 1024 * 1024
    start = time.process_time()
    atlas = Atlas(table, archive)
    assert time.process_time() - start < 0.5
    assert 200 <= len(atlas.concepts) <= 250


def test_every_concept_has_every_style_and_clean_names() -> None:
    atlas = world.load_atlas()
    rows = read_table()  # raises where two concepts share a name
    assert [r["en"].lstrip("~") for r in rows] == [c.en for c in atlas.concepts.values()]
    for concept in atlas.concepts.values():
        assert set(concept.pixels) == {*STYLES, *RESERVED_STYLES}
        assert concept.en == concept.en.lower()
        assert 1 <= len(concept.en_more) <= 4
        assert 1 <= len(concept.zh_more) <= 3
        assert len(concept.measure) == 1
        assert concept.stance in ("stands", "flies", "floats")
        assert set(concept.bare) <= {concept.en, *concept.en_more}


def test_sprites_fill_their_frame() -> None:
    atlas = world.load_atlas()
    for key in ("dog", "bicycle", "castle", "jeans"):
        for style in (*STYLES, *RESERVED_STYLES):
            sprite = atlas.sprite(key, style)
            assert (sprite.shape[1], sprite.shape[0]) == atlas.concept(key).pixels[style]
            assert max(sprite.shape[:2]) == 176
            assert (sprite[..., :3] <= sprite[..., 3:]).mean() > 0.99  # premultiplied
            for edge in (sprite[0], sprite[-1], sprite[:, 0], sprite[:, -1]):
                assert edge[..., 3].max() > 0


def unpremultiplied(sprite: np.ndarray) -> np.ndarray:
    alpha = np.maximum(sprite[..., 3:].astype(np.float32), 1)
    rgb = np.clip(sprite[..., :3] * (255 / alpha), 0, 255)
    return np.dstack([rgb, sprite[..., 3:]]).astype(np.uint8)


@pytest.mark.parametrize("style", STYLES)
def test_repainted_things_really_have_their_colour(style: str) -> None:
    """Measured on the sprites as they ship; the unpainted sprite of another colour is the control."""
    atlas = world.load_atlas()
    checked = controls = 0
    for key in list(atlas.concepts)[::7]:
        concept = atlas.concept(key)
        for colour in concept.colours:
            checked += 1
            controls += is_truly(unpremultiplied(atlas.sprite(key, style)), colour)
            assert is_truly(unpremultiplied(atlas.sprite(key, style, colour)), colour), (key, colour)
    assert checked > 30
    assert controls < checked / 3


def test_natural_colours_are_seen_in_every_style() -> None:
    atlas = world.load_atlas()
    natural = [c for c in atlas.concepts.values() if c.natural]
    assert len(natural) > 60
    for concept in natural:
        for style in STYLES:
            shares = name_shares(unpremultiplied(atlas.sprite(concept.key, style)))
            # Neighbours on the circle count: art shades its reds into orange and pink.
            near = sum(shares.get(n, 0) for n in NEIGHBOURS.get(concept.natural, (concept.natural,)))
            assert near > 0.25, (concept.key, style, shares)


NEIGHBOURS = {
    "red": ("red", "pink", "orange"), "yellow": ("yellow", "orange"), "brown": ("brown", "orange", "red"),
    "orange": ("orange", "red", "yellow"), "pink": ("pink", "red", "orange"),
    "purple": ("purple", "pink", "blue", "black"),
}  # fmt: skip


def test_trim_and_paper() -> None:
    ring = np.zeros((90, 120, 4), np.uint8)
    ring[20:70, 30:80, 3] = 255
    ring[35:55, 45:65, 3] = 0
    assert trim(ring, 100).shape == (100, 100, 4)
    filled = paper_inside(ring)
    assert (filled[45, 55] == 255).all()
    assert filled[5, 5, 3] == 0


def test_the_world_needs_no_torch() -> None:
    code = "import sys, fluxloom.world; fluxloom.world.load_atlas(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_sheet_without_chinese_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(font: preview.Font | None) -> np.ndarray:
        monkeypatch.setattr(preview, "chinese_font", lambda size: font)
        return np.asarray(contact_sheet(3, scenes=1, edits=0, columns=6, size=64))

    silent, told = drawn(ImageFont.load_default(11)), drawn(None)
    assert (silent[: preview.HEAD, :64] == told[preview.HEAD : 2 * preview.HEAD, :64]).all()
    note = told[: preview.HEAD]
    assert (note[-2:] == 255).all()
    assert 0.02 < (note.mean(-1) < 128).mean() < 0.3


def test_contact_sheet() -> None:
    sheet = contact_sheet(3, scenes=5, edits=3, columns=6, size=64)
    assert sheet.size[0] == 6 * 68
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 500
    assert (np.asarray(contact_sheet(3, scenes=5, edits=3, columns=6, size=64)) == np.asarray(sheet)).all()
    assert (np.asarray(contact_sheet(4, scenes=5, edits=3, columns=6, size=64)) != np.asarray(sheet)).any()
