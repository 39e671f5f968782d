"""Instructions for every kind of edit, in both languages."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from fluxloom.world.atlas import load_atlas
from fluxloom.world.captions import place_phrase
from fluxloom.world.scene import relations
from fluxloom.world.words import Language, colour_word, definite, fill, fixed, name_of, noun, say

if TYPE_CHECKING:
    from fluxloom.world.edits import Edit


def _where(edit: Edit, rng: random.Random, language: Language) -> str:
    """Place and, where it is new, time of the target."""
    after, before = edit.target.backdrop, edit.source.backdrop
    out = place_phrase(after, rng, language, edit.split)
    if after.time and after.time != before.time and (after.time != "day" or before.time):
        time = say(rng, edit.split, language, "time", after.time)
        out = f"{out} {time}" if language == "en" else f"{out}，{time}"
    return out


def _add_template(edit: Edit, rng: random.Random) -> tuple[str, int, str]:
    """Which list to phrase from, the item that is referred to, and the side."""
    scene, k = edit.target, edit.other
    beside = [(j, "left") for a, r, j in relations(scene) if a == k and r == "left"]
    beside += [(j, "right") for j, r, b in relations(scene) if b == k and r == "left"]
    x = scene.items[k].x
    if beside and rng.random() < 0.4:
        return "add_next", *rng.choice(beside)
    if abs(x - 0.5) > 0.12 and rng.random() < 0.6:
        return "add_side", -1, "left" if x < 0.5 else "right"
    return "add", -1, ""


def _slots(edit: Edit, rng: random.Random, language: Language) -> tuple[str, dict[str, str]]:
    """The list to phrase from and what fills its gaps."""
    source, target, kind = edit.source, edit.target, edit.kind
    slots: dict[str, str] = {}
    if edit.subject >= 0:
        item = source.items[edit.subject]
        slots["it"] = definite(item, rng, language)
        slots["name"] = name_of(replace(item, colour=None), rng, language)
        slots["measure"] = load_atlas().concept(item.concept).measure
    if edit.other >= 0:
        slots["new"] = noun(target.items[edit.other], rng, language)
    side = edit.value
    if kind == "add":
        kind, near, side = _add_template(edit, rng)
        if near >= 0:
            slots["ref"] = definite(target.items[near], rng, language)
    elif kind == "swap":
        slots["ref"] = definite(source.items[edit.other], rng, language)
    elif kind == "resize":
        kind = edit.value
    elif kind == "recolour":
        slots["colour"] = colour_word(edit.value, language)
    elif kind in ("style_reference", "character_scene"):
        slots["place"] = _where(edit, rng, language)
    elif kind == "background":
        hue = colour_word(target.backdrop.hue or "blue", language)
        slots["scene"] = fill(say(rng, edit.split, language, "scenery", edit.value), hue=hue)
    elif kind in ("style", "filter"):
        slots[kind] = say(rng, edit.split, language, f"{kind}_noun", edit.value)
    elif kind in ("sign_text", "sign_add", "sign_remove"):
        slots["text"] = target.sign.text if target.sign else ""
        slots["old"] = source.sign.text if source.sign else ""
    if side in ("left", "right"):
        slots["side"] = fixed(language, side)
    return kind, slots


def instruction(edit: Edit, rng: random.Random, language: Language = "en") -> str:
    """What a user would say to get from the source to the target."""
    if edit.kind in ("time", "weather", "season"):
        return say(rng, edit.split, language, f"edit_{edit.kind}", edit.value)
    kind, slots = _slots(edit, rng, language)
    text = fill(say(rng, edit.split, language, "edit", kind), **slots)
    if edit.kind == "character_companion" and edit.value:
        where = _where(edit, rng, language)
        text = f"{text} {where}" if language == "en" else f"{text}，{where}"
    return text
