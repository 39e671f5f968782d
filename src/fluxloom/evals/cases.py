"""What is asked of a model, and what must then hold: drawing prompts and edit instructions in the world's own words.

Every case is a function of the split, a seed, its group and its number alone, so that groups can be run by themselves
and a larger count goes on where a smaller one ended. Even numbers ask in English, odd ones in Chinese; labels (places,
times, ...) are asked for in turn, in a shuffled order. Scenes follow the training mix, on fresh layouts and backdrops;
one sample a prompt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fluxloom.errors import BadInput
from fluxloom.evals.facts import Beyond, Coloured, Fact, Gone, Label, LeftOf, NoBoard, Sized, There, Word
from fluxloom.world import (
    EDIT_KINDS,
    STYLES,
    Edit,
    Mix,
    Scene,
    caption,
    heldout_reasons,
    load_atlas,
    render,
    render_edit,
    sample_edit,
    sample_scene,
)
from fluxloom.world.scene import COLOURLESS_FILTERS, FILTERS, PLACES, SEASONS, TIMES, WEATHERS, relations
from fluxloom.world.split import Split
from fluxloom.world.words import Language, colour_word, fill, phrases

SIZE = 256  # pixels, a side
DEV_SEED = 1
PLAIN_SIGHT = 5.0  # of 255: mean difference to the same scene with another label, from which on a label can be seen
Part = Literal["dev", "test"]


@dataclass(frozen=True)
class Truth:
    """The exact pictures of a case; ``change`` [S, S] marks the pixels that an edit has to change."""

    target: Image.Image
    source: Image.Image | None = None
    change: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Case:
    """One prompt, or one instruction for the picture of ``edit.source``, with the facts that must hold."""

    group: str
    index: int
    language: Language
    prompt: str
    seed: int  # of the model's noise
    facts: tuple[Fact, ...]
    scene: Scene  # as it should come out
    edit: Edit | None = None

    def truth(self) -> Truth:
        if self.edit is None:
            return Truth(Image.fromarray(render(self.scene, SIZE).pixels))
        pair = render_edit(self.edit, SIZE)
        target, source = (Image.fromarray(picture.pixels) for picture in (pair.target, pair.source))
        return Truth(target, source, pair.change)


# ------------------------------------------------------------------------------------------------ drawing


Said = Callable[[Scene, str, Language], bool]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A group of drawing cases.

    judged    the facts of a scene
    mix       of the scenes
    label     the label that is judged: the prompt has to mention it, and its ``values`` are asked for in turn
    said      what else the prompt has to say
    held      the kind of combination, never trained, that every scene shows: style, pair or colour
    phrasing  "test": the label is said in the phrasing that training never used
    """

    judged: Callable[[Scene], tuple[Fact, ...]]
    mix: Mix = field(default_factory=Mix)
    label: str = ""
    values: tuple[str, ...] = ()
    said: Said = lambda scene, text, language: True
    held: str = ""
    phrasing: Split = "train"


_ONE = Mix(large=0.7, medium=0.3, two=0.0, three=0.0, four=0.0)
_TWO = Mix(large=0.0, medium=0.0, two=1.0, three=0.0, four=0.0)


def value_of(scene: Scene, label: str) -> str | None:
    """The place, time, weather, season, style, filter or sign of a scene, or None where it has none."""
    if label == "sign":
        return scene.sign.text if scene.sign else None
    found: str | None = getattr(scene if label in ("style", "filter") else scene.backdrop, label)
    return found


def mentions(scene: Scene, label: str, text: str, language: Language, phrasing: Split) -> bool:
    """Whether a text tells a label of the scene, in a phrasing that is trained ("train") or never is ("test")."""
    value = value_of(scene, label)
    if value is None:
        return False
    table: Any = phrases()[language]
    lists = [table[key] for key in ((f"{label}_prefix", f"{label}_suffix") if label == "style" else (label,))]
    options = [group if label == "sign" else group[value] for group in lists]
    told = [phrase for group in options for phrase in (group[-1:] if phrasing == "test" else group[:-1])]
    hue = colour_word(scene.backdrop.hue or "blue", language)
    return any(_contains(text, fill(phrase, hue=hue, text=value).removeprefix("在"), language) for phrase in told)


def _contains(text: str, words: str, language: Language) -> bool:
    if language == "zh":
        return words in text
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def visible(scene: Scene, label: str) -> bool:
    """Whether time, weather or season can be seen: with any other value the same scene would look different.

    In a city season hardly shows, in a room dawn is day; such pictures are not asked for by that label.
    """
    if label not in ("time", "weather", "season"):
        return True
    own = render(scene, SIZE // 4).pixels.astype(np.int16)
    for value in getattr(PLACES[scene.backdrop.place], f"{label}s"):
        other = scene.put(**{label: value})
        if other.backdrop != scene.backdrop:
            difference = np.abs(own - render(other, SIZE // 4).pixels)
            if difference.mean() < PLAIN_SIGHT:
                return False
    return True


def _things(scene: Scene) -> tuple[Fact, ...]:
    return tuple(There(item.concept) for item in scene.items)


def _coloured(scene: Scene) -> tuple[Fact, ...]:
    """Things in another colour than they have by themselves."""
    return tuple(
        Coloured(item.concept, item.colour)
        for item in scene.items
        if item.colour and item.colour != load_atlas().concept(item.concept).natural
    )


def _order(scene: Scene) -> tuple[Fact, ...]:
    lefts = [(a, b) for a, kind, b in relations(scene) if kind == "left"]
    return tuple(LeftOf(scene.items[a].concept, scene.items[b].concept) for a, b in lefts)


def _sides_said(scene: Scene, text: str, language: Language) -> bool:
    sides = ("左", "右") if language == "zh" else ("left", "right")
    return any(_contains(text, side, language) for side in sides)


def _synonym_said(scene: Scene, text: str, language: Language) -> bool:
    concept = load_atlas().concept(scene.items[0].concept)
    main, more = (concept.en, concept.en_more) if language == "en" else (concept.zh, concept.zh_more)
    return any(_contains(text.replace(main, ""), name, language) for name in more if main not in name)


def _labelled(label: str, values: tuple[str, ...] = (), **more: Any) -> Ask:
    """A label judged alone. Filters hide much of it, so they are left out where they are not what is judged."""

    def judged(scene: Scene) -> tuple[Fact, ...]:
        value = value_of(scene, label) or ""
        return (Word(value) if label == "sign" else Label(label, value),)

    mix = Mix(filter=float(label == "filter"), sign=float(label == "sign"))
    return Ask(judged=judged, mix=mix, label=label, values=values, **more)


LABELS: dict[str, tuple[str, ...]] = {
    "place": tuple(PLACES), "time": TIMES, "weather": WEATHERS, "season": SEASONS, "style": STYLES, "filter": FILTERS,
    "sign": (),
}  # fmt: skip
DRAWING: dict[str, Ask] = {
    "single": Ask(judged=_things, mix=_ONE),
    "pair": Ask(judged=_things, mix=_TWO),
    "order": Ask(judged=_order, mix=_TWO, said=_sides_said),
    "colour": Ask(judged=_coloured, mix=replace(_ONE, recolour=1.0, filter=0.0)),
    **{label: _labelled(label, values) for label, values in LABELS.items()},
}
PHRASING = "phrasing"
HELD_OUT: dict[str, Ask] = {
    "held-style": Ask(
        judged=lambda s: (*_things(s), Label("style", s.style)), mix=replace(_ONE, filter=0.0), label="style",
        held="style",
    ),
    "held-pair": Ask(judged=_things, mix=_TWO, held="pair"),
    "held-colour": Ask(judged=_coloured, mix=replace(_ONE, recolour=1.0, filter=0.0), held="colour"),
    "synonym": Ask(judged=_things, mix=_ONE, said=_synonym_said),
}  # fmt: skip


def _draw_case(group: str, index: int, rng: random.Random, order: random.Random) -> Case:
    """``order`` is the same for the whole group: it shuffles the values that are asked for in turn."""
    language, turn = _turn(index)

    def of_turn(values: tuple[str, ...]) -> str:
        return order.sample(values, len(values))[turn % len(values)]

    if group == PHRASING:  # of each label in turn
        ask = _labelled(of_turn(tuple(LABELS)), phrasing="test")
    else:
        ask = {**DRAWING, **HELD_OUT}[group]
    value = of_turn(ask.values) if ask.values else None
    while True:
        scene = sample_scene(rng, ask.mix, "test" if ask.held else "train")
        if value is not None and value_of(scene, ask.label) != value:
            continue
        if ask.held and {reason.partition(":")[0] for reason in heldout_reasons(scene)} != {ask.held}:
            continue
        text = caption(scene, rng, language, ask.phrasing)
        told = not ask.label or mentions(scene, ask.label, text, language, ask.phrasing)
        facts = ask.judged(scene)
        if facts and told and ask.said(scene, text, language) and visible(scene, ask.label):
            return Case(group, index, language, text, rng.randrange(2**32), facts, scene)


# ------------------------------------------------------------------------------------------------ edits


def _others(edit: Edit) -> tuple[Fact, ...]:
    """The things of the source, but for the one that the instruction names."""
    return tuple(There(item.concept) for k, item in enumerate(edit.source.items) if k != edit.subject)


def _new(edit: Edit) -> Fact:
    return There(edit.target.items[edit.other].concept)


def _removed(edit: Edit) -> tuple[Fact, ...]:
    # The place as well: otherwise an empty picture would pass wherever the only thing goes.
    place = Label("place", edit.target.backdrop.place)
    return Gone(edit.source.items[edit.subject].concept), *_others(edit), place


def _replaced(edit: Edit) -> tuple[Fact, ...]:
    return _new(edit), Gone(edit.source.items[edit.subject].concept), *_others(edit)


def _resized(edit: Edit) -> tuple[Fact, ...]:
    """At least half way, in proportion, to the true size: beyond the geometric mean of both areas."""
    before, after = (
        np.count_nonzero(render(scene, SIZE).items == edit.subject + 1) / SIZE**2
        for scene in (edit.source, edit.target)
    )
    way: Literal["bigger", "smaller"] = "bigger" if edit.value == "bigger" else "smaller"
    return (Sized(edit.target.items[edit.subject].concept, way, float(np.sqrt(before * after))),)


def _moved(edit: Edit) -> tuple[Fact, ...]:
    """On the side that was asked for, and nearer to the true target than to where it was."""
    item = edit.target.items[edit.subject]
    half_way = (edit.source.items[edit.subject].x + item.x) / 2
    left = edit.value == "left"
    return (Beyond(item.concept, "left" if left else "right", min(half_way, 0.5) if left else max(half_way, 0.5)),)


def _swapped(edit: Edit) -> tuple[Fact, ...]:
    first, second = sorted(edit.target.items, key=lambda item: item.x)
    return (LeftOf(first.concept, second.concept),)


def _relabelled(edit: Edit, label: str) -> tuple[Fact, ...]:
    return Label(label, value_of(edit.target, label) or ""), *_others(edit)


def _restyled(edit: Edit) -> tuple[Fact, ...]:
    look = "filter" if edit.source.filter else "style"
    place = Label("place", edit.target.backdrop.place)
    return _new(edit), place, Label(look, value_of(edit.source, look) or "")


def _hero(edit: Edit) -> Fact:
    item = edit.source.items[edit.subject]
    plain = item.colour is None or edit.source.filter in COLOURLESS_FILTERS
    return There(item.concept) if plain else Coloured(item.concept, str(item.colour))


def _companion(edit: Edit) -> tuple[Fact, ...]:
    place = Label("place", edit.target.backdrop.place)
    return _hero(edit), _new(edit), *((place,) if edit.value else ())


EDITS: dict[str, Callable[[Edit], tuple[Fact, ...]]] = {
    "add": lambda edit: _things(edit.target),
    "remove": _removed,
    "replace": _replaced,
    "recolour": lambda edit: (Coloured(edit.source.items[edit.subject].concept, edit.value),),
    "resize": _resized,
    "move": _moved,
    "swap": _swapped,
    "background": partial(_relabelled, label="place"),
    **{label: partial(_relabelled, label=label) for label in ("time", "weather", "season", "filter", "style")},
    "sign_text": lambda edit: (Word(edit.value),),
    "sign_add": lambda edit: (Word(edit.value), *_others(edit)),
    "sign_remove": lambda edit: (NoBoard(), *_others(edit)),
    "style_reference": _restyled,
    "character_scene": lambda edit: (_hero(edit), Label("place", edit.target.backdrop.place)),
    "character_companion": _companion,
}
# Where the words leave open where the new thing stands or how large it gets: whatever a model decides, it paints over
# pixels that the one true target leaves alone, so that preservation is not judged by them.
FREE = ("add", "resize", "move", "sign_add", "style_reference", "character_scene", "character_companion")
# Where a filter in the source would hide what is judged.
_UNFILTERED = (
    "background", "time", "weather", "season", "style", "sign_text", "sign_add", "sign_remove", "character_scene",
    "character_companion",
)  # fmt: skip


def _edit_case(group: str, index: int, rng: random.Random) -> Case:
    language, _ = _turn(index)
    kind = group.removeprefix(EDIT)
    while True:
        edit = sample_edit(rng, Mix.scenes(), "train", [kind])
        if (edit.source.filter and kind in _UNFILTERED) or not visible(edit.target, kind):
            continue
        text = edit.instruction(rng, language)
        return Case(group, index, language, text, rng.randrange(2**32), EDITS[kind](edit), edit.target, edit)


# ------------------------------------------------------------------------------------------------ suites


EDIT = "edit-"
SUITES: Mapping[str, tuple[str, ...]] = {
    "draw": tuple(DRAWING),
    "held-out": (*HELD_OUT, PHRASING),
    "edits": tuple(EDIT + kind for kind in EDIT_KINDS),
}
GROUPS = tuple(group for groups in SUITES.values() for group in groups)


def chosen(only: Sequence[str]) -> tuple[str, ...]:
    """The groups that names of groups and suites stand for, in their order; all of them for no names. Raises
    BadInput."""
    if unknown := [name for name in only if name not in (*SUITES, *GROUPS)]:
        raise BadInput(f"got groups {', '.join(unknown)}, allowed {', '.join((*SUITES, *GROUPS))}, try draw")
    wanted = {group for name in only for group in SUITES.get(name, (name,))}
    return tuple(group for group in GROUPS if group in wanted or not only)


def seed_from(content: str) -> int:
    """The seed of the test split: drawn from the hash of the weights, so that nobody can have tuned them on it."""
    return int(content.rpartition(":")[2][:12], 16)


def part_of(name: str) -> Part:
    """The split of a name. Raises BadInput for an unknown one."""
    for part in get_args(Part):
        if part == name:
            return cast(Part, part)
    raise BadInput(f"got split {name!r}, allowed {', '.join(get_args(Part))}, try dev")


def case_of(part: Part, seed: int, group: str, index: int) -> Case:
    """One case; always the same for the same arguments."""
    rng = random.Random(f"{part} {seed} {group} {index}")
    if group.startswith(EDIT):
        return _edit_case(group, index, rng)
    return _draw_case(group, index, rng, random.Random(f"{part} {seed} {group}"))


def cases(part: Part, seed: int, count: int, groups: Sequence[str] = GROUPS) -> Iterator[Case]:
    """``count`` cases of each group, group by group, each made when it is asked for."""
    return (case_of(part, seed, group, index) for group in groups for index in range(count))


def _turn(index: int) -> tuple[Language, int]:
    """The language of a case, and how many of its group in that language came before."""
    return ("zh" if index % 2 else "en"), index // 2
