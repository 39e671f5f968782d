"""How scenes are drawn at random: the probabilities of a mix, and the layout of items in the frame."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fluxloom.errors import BadInput
from fluxloom.world.atlas import STYLES, Concept, load_atlas
from fluxloom.world.render import lettering_width, sign_box
from fluxloom.world.scene import COLOURLESS_FILTERS, FILTERS, LAYERS, PLACES, SEASONS, Backdrop, Item, Scene, Sign
from fluxloom.world.split import Split, allowed, colour_held, style_held
from fluxloom.world.words import SIGN_WORDS

WATER = ("sea", "underwater", "beach")


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Probabilities of what a random scene shows. Counts are weights, the rest are shares."""

    large: float = 0.30  # one item over 62-92 % of the frame
    medium: float = 0.12  # one item, smaller
    two: float = 0.34
    three: float = 0.17
    four: float = 0.07
    sign: float = 0.08
    filter: float = 0.08
    recolour: float = 0.45  # of the items that can be repainted
    plain: float = 0.10  # plain backdrop instead of a place
    times: tuple[float, ...] = (0.52, 0.17, 0.17, 0.14)  # day, sunset, night, dawn
    clear: float = 0.55  # clear sky; the rest is shared by the other weathers
    styles: tuple[tuple[str, float], ...] = tuple((s, 1.0) for s in STYLES)

    @classmethod
    def objects(cls) -> Mix:
        """First lessons: three of four scenes show one large thing, mostly in plain light."""
        return cls(
            large=0.75, medium=0.03, two=0.20, three=0.02, four=0.0, sign=0.01, filter=0.02, plain=0.2, clear=0.7
        )

    @classmethod
    def scenes(cls) -> Mix:
        """The balanced mix that training ends with."""
        return cls()

    @classmethod
    def signs(cls) -> Mix:
        """Lessons in lettering."""
        return cls(large=0.1, medium=0.5, two=0.4, three=0.0, four=0.0, sign=0.85, filter=0.02, clear=0.7)


def pick(rng: random.Random, weighted: tuple[tuple[str, float], ...]) -> str:
    return rng.choices([k for k, _ in weighted], [w for _, w in weighted])[0]


def new_seeds(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(1 << 30) for _ in LAYERS)


def sample_backdrop(rng: random.Random, mix: Mix, watery: bool = False) -> Backdrop:
    if rng.random() < mix.plain:
        place = "plain"
    elif watery and rng.random() < 0.4:
        place = rng.choice(WATER)
    else:
        place = rng.choice([p for p in PLACES if p != "plain"])
    rules = PLACES[place]
    time = rng.choices(("day", "sunset", "night", "dawn"), mix.times)[0]
    weather = "clear" if rng.random() < mix.clear else rng.choice(rules.weathers[1:] or ("clear",))
    hue = rng.choice(rules.hues) if rules.hues else None
    return Backdrop(place, time, weather, rng.choice(SEASONS), hue, new_seeds(rng)).fit(default_hue=hue or "blue")


def fitted(concept: Concept, wide: float, high: float, size: float) -> float:
    """The largest size up to `size` that stays within width and height in every trained style."""
    width, height = concept.extent
    return min(size, wide / width, high / height)


def foot(rng: random.Random, concept: Concept, high: float, low: float = 0.84, lowest: float = 0.96) -> float:
    """The lower edge for an item of height `high`: on the ground, or somewhere in the air."""
    if concept.stance == "stands":
        return max(rng.uniform(low, lowest), high + 0.02)
    centre = rng.uniform(0.38, 0.56)
    return min(max(centre + high / 2, high + 0.03), 0.97)


def _single(rng: random.Random, concept: Concept, large: bool, lo: float, hi: float) -> Item:
    size = fitted(concept, min(0.96, hi - lo), 0.93, rng.uniform(0.62, 0.92) if large else rng.uniform(0.34, 0.6))
    wide, high = (size * e for e in concept.extent)
    slack = (hi - lo - wide) / 2
    x = (lo + hi) / 2 + rng.uniform(-1, 1) * max(0.0, slack) * (0.5 if large else 0.9)
    return Item(concept.key, x, foot(rng, concept, high, 0.86 if large else 0.8, 0.97), size)


def row(rng: random.Random, concepts: list[Concept], lo: float, hi: float, uneven: bool = False) -> list[Item]:
    slot = (hi - lo) / len(concepts)
    items = []
    biggest = rng.randrange(len(concepts))
    for k, concept in enumerate(concepts):
        factor = rng.uniform(0.8, 1.0)
        if uneven:
            factor = 1.0 if k == biggest else rng.uniform(0.45, 0.55)
        # The slot bounds the size first, so that "uneven" really is uneven.
        size = fitted(concept, slot * 0.94, 0.62, 0.6) * factor
        wide, high = (size * e for e in concept.extent)
        x = lo + slot * (k + 0.5) + rng.uniform(-0.5, 0.5) * max(0.0, slot - wide)
        items.append(Item(concept.key, x, foot(rng, concept, high, 0.82), size))
    return items


def _above(rng: random.Random, concepts: list[Concept], lo: float, hi: float) -> list[Item]:
    upper, lower = concepts
    low_size = fitted(lower, (hi - lo) * 0.9, 0.42, rng.uniform(0.36, 0.5))
    top = rng.uniform(0.9, 0.96) - low_size * lower.extent[1]
    high_size = fitted(upper, (hi - lo) * 0.9, top - 0.06, rng.uniform(0.26, 0.42))
    x = (lo + hi) / 2 + rng.uniform(-0.05, 0.05)
    return [
        Item(upper.key, x + rng.uniform(-0.06, 0.06), top - rng.uniform(0.015, 0.03), high_size),
        Item(lower.key, x, top + low_size * lower.extent[1], low_size),
    ]


def _behind(rng: random.Random, concepts: list[Concept], lo: float, hi: float) -> list[Item]:
    back, front = sorted(concepts, key=lambda c: -c.size)
    span = hi - lo
    back_size = fitted(back, span * 0.66, 0.64, rng.uniform(0.5, 0.66))
    front_size = fitted(front, span * 0.5, 0.42, rng.uniform(0.34, 0.46))
    side = rng.choice((-1, 1))
    reach = (back_size * back.extent[0] + front_size * front.extent[0]) / 2 * rng.uniform(0.5, 0.7)
    middle = (lo + hi) / 2
    return [
        Item(back.key, middle - side * reach * 0.42, rng.uniform(0.74, 0.8), back_size),
        Item(front.key, middle + side * reach * 0.58, rng.uniform(0.91, 0.96), front_size),
    ]


def arrange(rng: random.Random, concepts: list[Concept], layout: str, lo: float = 0.02, hi: float = 0.98) -> list[Item]:
    """Items for the concepts between two edges of the frame."""
    if layout in ("large", "medium"):
        return [_single(rng, concepts[0], layout == "large", lo, hi)]
    if len(concepts) == 2:
        kind = rng.choices(("row", "uneven", "above", "behind"), (0.5, 0.18, 0.16, 0.16))[0]
        if kind == "above":
            return _above(rng, concepts, lo, hi)
        if kind == "behind":
            return _behind(rng, concepts, lo, hi)
        return row(rng, concepts, lo, hi, kind == "uneven")
    return row(rng, concepts, lo, hi)


def sample_sign(rng: random.Random) -> Sign:
    """A sign at one side, its capitals between a twelfth and a sixth of the picture high."""
    text = rng.choice(SIGN_WORDS)
    per_letter = lettering_width(text) + 0.9
    letters = min(rng.uniform(0.095, 0.16), 0.5 / per_letter)
    half = letters * per_letter / 2
    x = rng.choice((half + 0.03, 1 - half - 0.03))
    return Sign(text, x, rng.uniform(0.84, 0.94), max(letters, 1 / 12))


def free_span(sign: Sign | None) -> tuple[float, float]:
    """The part of the frame's width that the sign leaves to the items."""
    if sign is None:
        return 0.02, 0.98
    left, _, right, _ = sign_box(sign)
    return (0.02, left - 0.02) if sign.x > 0.5 else (right + 0.02, 0.98)


def colour_for(rng: random.Random, concept: Concept, share: float, split: Split) -> str | None:
    usable = [c for c in concept.colours if split == "test" or not colour_held(concept.key, c)]
    return rng.choice(usable) if usable and rng.random() < share else None


def sample_concepts(rng: random.Random, count: int, style: str, split: Split) -> list[Concept]:
    pool = list(load_atlas().concepts.values())
    chosen: list[Concept] = []
    while len(chosen) < count:
        concept = rng.choice(pool)
        if (
            concept not in chosen
            and style in concept.pixels
            and (split == "test" or not style_held(concept.key, style))
        ):
            chosen.append(concept)
    return chosen


def draw_scene(rng: random.Random, mix: Mix, split: Split, layout: str | None = None) -> Scene:
    """One random scene, not yet checked against the split."""
    layout = layout or pick(rng, tuple((k, getattr(mix, k)) for k in ("large", "medium", "two", "three", "four")))
    count = {"large": 1, "medium": 1, "two": 2, "three": 3, "four": 4}[layout]
    style = pick(rng, mix.styles)
    concepts = sample_concepts(rng, count, style, split)
    sign = sample_sign(rng) if count < 3 and rng.random() < mix.sign else None
    name = rng.choice(FILTERS) if rng.random() < mix.filter else None
    atlas = load_atlas()
    items = [
        Item(
            i.concept, i.x, i.y, i.size,
            None if name in COLOURLESS_FILTERS else colour_for(rng, atlas.concept(i.concept), mix.recolour, split),
            atlas.concept(i.concept).flip and rng.random() < 0.5,
        )
        for i in arrange(rng, concepts, layout, *free_span(sign))
    ]  # fmt: skip
    watery = any(c.stance == "floats" for c in concepts)
    return Scene(sample_backdrop(rng, mix, watery), style, tuple(items), sign, name)


def sample_scene(rng: random.Random, mix: Mix, split: Split = "train") -> Scene:
    """A random scene: free of held-out combinations for "train", with at least one for "test"."""
    if split not in ("train", "test"):
        raise BadInput(f"got split {split!r}; allowed are train, test")
    while True:
        scene = draw_scene(rng, mix, split)
        if allowed(split, scene):
            return scene
