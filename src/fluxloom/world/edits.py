"""Edit pairs with exact truth: two scenes that differ in what one instruction asks for, and in nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxloom.errors import BadInput
from fluxloom.world import mix as draw
from fluxloom.world.atlas import STYLES, load_atlas
from fluxloom.world.instructions import instruction
from fluxloom.world.mix import Mix
from fluxloom.world.render import Picture, change_mask, render, sign_box
from fluxloom.world.scene import COLOURLESS_FILTERS, FILTERS, PLACES, Item, Scene
from fluxloom.world.split import Split, allowed
from fluxloom.world.words import SIGN_WORDS, Language

EDIT_KINDS: dict[str, str] = {  # kind -> KontextBench category
    "add": "local", "remove": "local", "replace": "local", "recolour": "local",
    "resize": "local", "move": "local", "swap": "local",
    "background": "global", "time": "global", "weather": "global", "season": "global",
    "filter": "global", "style": "global",
    "sign_text": "text", "sign_add": "text", "sign_remove": "text",
    "style_reference": "style reference",
    "character_scene": "character reference", "character_companion": "character reference",
}  # fmt: skip
# Environment edits are learned first (trial run): together 22 of 100. What draws a new shape inside an edit is learned
# last (first run of nano): replace, style, signs, references and characters have half of all.
WEIGHTS: dict[str, float] = {
    "add": 9, "remove": 5, "replace": 10, "recolour": 6, "resize": 4, "move": 4, "swap": 3,
    "background": 4, "time": 3, "weather": 3, "season": 3, "filter": 3, "style": 24,
    "sign_text": 7, "sign_add": 4, "sign_remove": 2,
    "style_reference": 18, "character_scene": 4, "character_companion": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """What changes: `subject` and `other` are indices into the source's items (or, for things that are
    new, the target's), `value` the new colour, place, word or side."""

    kind: str
    source: Scene
    target: Scene
    subject: int = -1
    other: int = -1
    value: str = ""
    split: Split = "train"

    @property
    def category(self) -> str:
        return EDIT_KINDS[self.kind]

    def instruction(self, rng: random.Random, language: Language = "en") -> str:
        return instruction(self, rng, language)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "source": self.source.to_dict(), "target": self.target.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Edit:
        scenes = {k: Scene.from_dict(data[k]) for k in ("source", "target")}
        return cls(**{**data, **scenes})


@dataclass(frozen=True)
class EditPicture:
    """Both pictures, and the pixels [S, S] that differ between them by more than 2 of 255 in some channel."""

    source: Picture
    target: Picture
    change: NDArray[np.bool_]


def render_edit(edit: Edit, size: int) -> EditPicture:
    source, target = render(edit.source, size), render(edit.target, size)
    return EditPicture(source, target, change_mask(source.pixels, target.pixels))


Draft = tuple[Scene, Scene, int, int, str]
Proposer = Callable[[random.Random, Mix, Split], Draft | None]


def _two_or_more(rng: random.Random) -> str:
    return rng.choices(("two", "three", "four"), (0.66, 0.26, 0.08))[0]


def _add(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    target = draw.draw_scene(rng, mix, split, _two_or_more(rng) if rng.random() < 0.85 else None)
    k = rng.randrange(len(target.items))
    return target.without_item(k), target, -1, k, ""


def _remove(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    source = draw.draw_scene(rng, mix, split, _two_or_more(rng) if rng.random() < 0.7 else None)
    k = rng.randrange(len(source.items))
    return source, source.without_item(k), k, -1, ""


def _substitute(rng: random.Random, scene: Scene, k: int, mix: Mix, split: Split) -> Item | None:
    """Another thing in the place of item k, no larger than the room that it had."""
    old = scene.items[k]
    was = load_atlas().concept(old.concept)
    new = draw.sample_concepts(rng, 1, scene.style, split)[0]
    if any(i.concept == new.key for i in scene.items) or (was.stance == "flies") != (new.stance == "flies"):
        return None
    wide, high = (old.size * e for e in was.extent)
    size = draw.fitted(new, max(wide, 0.9 * old.size), max(high, 0.9 * old.size), old.size)
    half = size * new.extent[0] / 2
    x = min(max(old.x, half + 0.01), 0.99 - half)
    colour = None if scene.filter in COLOURLESS_FILTERS else draw.colour_for(rng, new, mix.recolour * 0.7, split)
    return Item(new.key, x, max(old.y, size * new.extent[1] + 0.01), size, colour, old.mirror and new.flip)


def _replace(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    source = draw.draw_scene(rng, mix, split)
    k = rng.randrange(len(source.items))
    new = _substitute(rng, source, k, mix, split)
    if new is None:
        return None
    items = tuple(new if j == k else i for j, i in enumerate(source.items))
    return source, replace(source, items=items), k, k, ""


def _recolour(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    source = draw.draw_scene(rng, mix, split)
    if source.filter in COLOURLESS_FILTERS:
        return None
    k = rng.randrange(len(source.items))
    item = source.items[k]
    concept = load_atlas().concept(item.concept)
    colour = draw.colour_for(rng, concept, 1.0, split)
    if colour is None or colour in (item.colour, concept.natural):
        return None
    return source, source.with_item(k, colour=colour), k, -1, colour


def _inside(item: Item, scene: Scene) -> bool:
    left, top, right, bottom = item.box(scene.style)
    return left > -0.01 and right < 1.01 and top > -0.01 and bottom < 1.0


def _clear_of_others(item: Item, k: int, scene: Scene) -> bool:
    """Whether an item in its new place covers no other by much, sign included."""
    left, top, right, bottom = item.box(scene.style)
    boxes = [i.box(scene.style) for j, i in enumerate(scene.items) if j != k]
    if scene.sign:
        boxes.append(sign_box(scene.sign))
    return not any(
        min(right, b[2]) - max(left, b[0]) > 0.03 and min(bottom, b[3]) - max(top, b[1]) > 0.03 for b in boxes
    )


def _resize(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    source = draw.draw_scene(rng, mix, split)
    k = rng.randrange(len(source.items))
    value = rng.choice(("bigger", "smaller"))
    factor = rng.uniform(1.4, 1.7) if value == "bigger" else rng.uniform(0.5, 0.66)
    old = source.items[k]
    target = source.with_item(k, size=old.size * factor)
    if load_atlas().concept(old.concept).stance == "flies":  # what flies grows and shrinks around its middle
        high = old.box(source.style)[3] - old.box(source.style)[1]
        target = target.with_item(k, y=old.y + (factor - 1) * high / 2)
    new = target.items[k]
    if new.size < 0.14 or not _inside(new, target) or (value == "bigger" and not _clear_of_others(new, k, target)):
        return None
    return source, target, k, -1, value


def _move(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    source = draw.draw_scene(rng, mix, split, "medium" if rng.random() < 0.7 else "two")
    k = rng.randrange(len(source.items))
    old = source.items[k]
    half = (old.box(source.style)[2] - old.box(source.style)[0]) / 2
    x = rng.uniform(half + 0.02, 0.36) if old.x > 0.5 else rng.uniform(0.64, 0.98 - half)
    target = source.with_item(k, x=x)
    new = target.items[k]
    if abs(x - old.x) < 0.25 or not _inside(new, target) or not _clear_of_others(new, k, target):
        return None
    return source, target, k, -1, "left" if x < 0.5 else "right"


def _swap(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    source = draw.draw_scene(rng, mix, split, "two")
    a, b = source.items
    target = replace(source, items=(replace(a, x=b.x), replace(b, x=a.x)))
    if abs(a.x - b.x) < 0.25 or not all(_inside(i, target) for i in target.items):
        return None
    return source, target, 0, 1, ""


def _new_place(rng: random.Random, scene: Scene) -> dict[str, Any]:
    """Another place, and the colour of its walls where it has some, as changes of the scene."""
    place = rng.choice([p for p in PLACES if p != scene.backdrop.place])
    hues = PLACES[place].hues
    return {"place": place, "hue": rng.choice(hues) if hues else None}


def _background(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    source = draw.draw_scene(rng, mix, split)
    new = _new_place(rng, source)
    return source, source.put(**new), -1, -1, new["place"]


def _environment(field: str) -> Proposer:
    def propose(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
        source = draw.draw_scene(rng, mix, split)
        rules = PLACES[source.backdrop.place]
        options = [v for v in getattr(rules, field + "s") if v != getattr(source.backdrop, field)]
        if not options:
            return None
        value = rng.choice(options)
        asked: dict[str, Any] = {field: value}
        if field == "time" and value == "night" and source.backdrop.weather == "fog":
            return None
        if field == "weather" and value == "fog" and source.backdrop.time == "night":
            return None
        if field == "season" and source.backdrop.weather == "snow":
            asked["weather"] = "clear"  # outside winter it does not snow
        return source, source.put(**asked), -1, -1, value

    return propose


def _filter(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    target = replace(draw.draw_scene(rng, mix, split), filter=rng.choice(FILTERS))
    return replace(target, filter=None), target, -1, -1, target.filter or ""


def _style(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    source = draw.draw_scene(rng, mix, split)
    trained = [s for s, _ in mix.styles if s != source.style] or [s for s in STYLES if s != source.style]
    style = rng.choice(trained)
    return source, replace(source, style=style), -1, -1, style


def _with_sign(rng: random.Random, mix: Mix, split: Split) -> Scene:
    return draw.draw_scene(rng, replace(mix, sign=1.0), split, rng.choice(("medium", "medium", "large", "two")))


def _sign_text(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    source = _with_sign(rng, mix, split)
    assert source.sign is not None
    text = rng.choice([w for w in SIGN_WORDS if w != source.sign.text])
    # The board keeps its place and the letters their height; its width follows the word.
    sign = replace(source.sign, text=text)
    left, _, right, _ = sign_box(sign)
    if left < 0.01 or right > 0.99:
        return None
    return source, replace(source, sign=sign), -1, -1, text


def _sign_add(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    target = _with_sign(rng, mix, split)
    assert target.sign is not None
    return replace(target, sign=None), target, -1, -1, target.sign.text


def _sign_remove(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    source = _with_sign(rng, mix, split)
    assert source.sign is not None
    return source, replace(source, sign=None), -1, -1, source.sign.text


def _elsewhere(rng: random.Random, scene: Scene) -> dict[str, Any]:
    """A new place, and now and then a new time; the rest stays as far as the place allows."""
    out = _new_place(rng, scene)
    times = PLACES[out["place"]].times
    if times and rng.random() < 0.35:
        out["time"] = rng.choice(times)
    return out


def _style_reference(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    # Half of the sources carry a picture filter: there the style is most plainly more than the sprite's.
    source = draw.draw_scene(rng, replace(mix, filter=0.5, sign=0.0), split)
    fresh = draw.draw_scene(rng, replace(mix, filter=0.0, sign=0.0), split, rng.choice(("large", "medium")))
    item = fresh.items[0]
    if any(i.concept == item.concept for i in source.items):
        return None
    if source.filter in COLOURLESS_FILTERS:
        item = replace(item, colour=None)
    target = replace(source, items=(item,)).put(**_elsewhere(rng, source), seeds=draw.new_seeds(rng))
    return source, target, -1, 0, target.backdrop.place


def _character(rng: random.Random, mix: Mix, split: Split) -> Scene:
    """A scene whose first item can be a hero: an animal, a character or a vehicle."""
    while True:
        scene = draw.draw_scene(rng, replace(mix, sign=0.0), split, rng.choice(("large", "medium", "medium", "two")))
        if load_atlas().concept(scene.items[0].concept).category in ("animal", "character", "vehicle"):
            return scene


def _character_scene(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    source = _character(rng, mix, split)
    hero = source.items[0]
    laid = draw.arrange(rng, [load_atlas().concept(hero.concept)], rng.choice(("large", "medium")))[0]
    moved = replace(hero, x=laid.x, y=laid.y, size=laid.size)
    target = replace(source, items=(moved,)).put(**_elsewhere(rng, source), seeds=draw.new_seeds(rng))
    return source, target, 0, -1, target.backdrop.place


def _character_companion(rng: random.Random, mix: Mix, split: Split) -> Draft | None:
    source = _character(rng, mix, split)
    hero = source.items[0]
    friend = draw.sample_concepts(rng, 1, source.style, split)[0]
    if any(i.concept == friend.key for i in source.items):
        return None
    atlas = load_atlas()
    order = [atlas.concept(hero.concept), friend]
    rng.shuffle(order)
    laid = {i.concept: i for i in draw.row(rng, order, 0.02, 0.98)}
    place = laid[hero.concept]
    colour = None if source.filter in COLOURLESS_FILTERS else draw.colour_for(rng, friend, mix.recolour, split)
    items = (replace(hero, x=place.x, y=place.y, size=place.size), replace(laid[friend.key], colour=colour))
    target = replace(source, items=items)
    if rng.random() < 0.5:
        target = target.put(**_elsewhere(rng, source), seeds=draw.new_seeds(rng))
        return source, target, 0, 1, target.backdrop.place
    return source, target, 0, 1, ""


PROPOSERS: dict[str, Proposer] = {
    "add": _add, "remove": _remove, "replace": _replace, "recolour": _recolour, "resize": _resize, "move": _move,
    "swap": _swap, "background": _background, "time": _environment("time"), "weather": _environment("weather"),
    "season": _environment("season"), "filter": _filter, "style": _style, "sign_text": _sign_text,
    "sign_add": _sign_add, "sign_remove": _sign_remove, "style_reference": _style_reference,
    "character_scene": _character_scene, "character_companion": _character_companion,
}  # fmt: skip


def sample_edit(rng: random.Random, mix: Mix, split: Split = "train", kinds: Sequence[str] | None = None) -> Edit:
    """A random edit of one of the kinds (all by default, in the proportions of WEIGHTS)."""
    kinds = tuple(kinds or EDIT_KINDS)
    if unknown := [k for k in kinds if k not in EDIT_KINDS]:
        raise BadInput(f"got edit kinds {unknown}; allowed are {', '.join(EDIT_KINDS)}")
    kind = rng.choices(kinds, [WEIGHTS[k] for k in kinds])[0]
    while True:
        draft = PROPOSERS[kind](rng, mix, split)
        if draft and allowed(split, draft[0], draft[1]):
            source, target, subject, other, value = draft
            return Edit(kind, source, target, subject, other, value, split)


__all__ = ["EDIT_KINDS", "Edit", "EditPicture", "render_edit", "sample_edit"]
