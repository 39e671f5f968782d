"""The fixed split: combinations that training never shows, so that composition can be measured afterwards.

Hashes decide, so the split is the same on every machine. Held out are one style each of 15 % of the concepts
(5 % of concept x style), 10 % of concept x colour, 5 % of the unordered pairs of concepts, and in the texts the
last phrasing of every list (see `choose`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import Literal, TypeVar

from fluxloom.world.atlas import STYLES
from fluxloom.world.scene import Scene

Split = Literal["train", "test"]
T = TypeVar("T")


@lru_cache(65536)
def _share(*parts: str) -> float:
    """A number in [0, 1) that depends on the words alone."""
    digest = hashlib.blake2b("|".join(("fluxloom split 1", *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def style_held(concept: str, style: str) -> bool:
    share = _share("style", concept)
    # One style at most is held out per concept: every concept is trained in at least two.
    return style in STYLES and share < 0.15 and STYLES[int(share / 0.15 * len(STYLES))] == style


def colour_held(concept: str, colour: str) -> bool:
    return _share("colour", concept, colour) < 0.10


def pair_held(a: str, b: str) -> bool:
    return _share("pair", *sorted((a, b))) < 0.05


def heldout_reasons(*scenes: Scene) -> set[str]:
    """Which held-out combinations the scenes contain, such as "colour:car|blue"; empty for training scenes."""
    reasons: set[str] = set()
    for scene in scenes:
        for item in scene.items:
            if style_held(item.concept, scene.style):
                reasons.add(f"style:{item.concept}|{scene.style}")
            if item.colour and colour_held(item.concept, item.colour):
                reasons.add(f"colour:{item.concept}|{item.colour}")
        for a, b in combinations(sorted({i.concept for i in scene.items}), 2):
            if pair_held(a, b):
                reasons.add(f"pair:{a}|{b}")
    return reasons


def allowed(split: Split, *scenes: Scene) -> bool:
    """Training scenes hold nothing that is held out; test scenes hold something."""
    return bool(heldout_reasons(*scenes)) == (split == "test")


def choose(rng: random.Random, options: Sequence[T], split: Split) -> T:
    """One phrasing of several; the last is held out: tests use it half of the time, training never."""
    if split == "test" and rng.random() < 0.5:
        return options[-1]
    return rng.choice(options[:-1])
