"""Captions: from terse to long, in both languages; what they say is always true, what they leave out is open."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import pairwise

from fluxloom.world.atlas import load_atlas
from fluxloom.world.scene import COLOURLESS_FILTERS, Backdrop, Scene, relations
from fluxloom.world.split import Split
from fluxloom.world.words import Language, colour_word, fill, fixed, noun, say

LIMIT = 45  # tokens; nano reads 47 and the start mark
_QUOTED = re.compile(r"[\"“]([^\"”]*)[\"”]")
_PIECE = re.compile(r"[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]")


def tokens(text: str) -> list[str]:
    """Words, digits, single Chinese characters and signs; what stands in quotes letter by letter."""
    spelled = _QUOTED.sub(lambda m: '"' + " ".join(m[1]) + '"', text)
    return _PIECE.findall(spelled)


def place_phrase(backdrop: Backdrop, rng: random.Random, language: Language, split: Split) -> str:
    phrase = say(rng, split, language, "place", backdrop.place)
    return fill(phrase, hue=colour_word(backdrop.hue or "blue", language))


def environment(
    backdrop: Backdrop, rng: random.Random, language: Language, split: Split, eager: float = 1.0
) -> list[str]:
    """Phrases for time, weather and season; the unusual is mentioned more often than the usual."""
    out = []
    if backdrop.time and rng.random() < eager * (0.3 if backdrop.time == "day" else 0.85):
        out.append(say(rng, split, language, "time", backdrop.time))
    if backdrop.weather and rng.random() < eager * (0.2 if backdrop.weather == "clear" else 0.85):
        out.append(say(rng, split, language, "weather", backdrop.weather))
    if backdrop.season and rng.random() < eager * 0.6:
        out.append(say(rng, split, language, "season", backdrop.season))
    return out


def _natural(scene: Scene, rng: random.Random) -> Scene:
    """Now and then say the colour that a thing has by itself."""
    if scene.filter in COLOURLESS_FILTERS:
        return replace(scene, items=tuple(replace(i, colour=None) for i in scene.items))
    items = []
    for item in scene.items:
        natural = load_atlas().concept(item.concept).natural
        items.append(replace(item, colour=natural) if natural and not item.colour and rng.random() < 0.25 else item)
    return replace(scene, items=tuple(items))


def subject(scene: Scene, rng: random.Random, language: Language, split: Split) -> str:
    """The items and, where it is plain, how they stand to each other."""
    nouns = [noun(i, rng, language) for i in scene.items]
    if len(nouns) == 1:
        return nouns[0]
    if len(nouns) == 2:
        facts = relations(scene)
        a, kind, b = rng.choice(facts) if facts and rng.random() < 0.8 else (0, "plain", 1)
        big_a, small_b = (
            noun(scene.items[k], rng, language, fixed(language, w)) for k, w in ((a, "big"), (b, "small"))
        )
        pattern = say(rng, split, language, "pair", kind)
        return pattern.format(a=nouns[a], b=nouns[b], big_a=big_a, small_b=small_b)
    order = sorted(range(len(nouns)), key=lambda k: scene.items[k].x)
    facts = relations(scene)
    lined = all((a, "left", b) in facts for a, b in pairwise(order))
    told = lined and rng.random() < 0.5
    if not told:
        rng.shuffle(order)
    named = [nouns[k] for k in order]
    names = ("、" if language == "zh" else ", ").join(named[:-1])
    names += ("和" if language == "zh" else " and ") + named[-1]
    return fixed(language, "in_a_row").format(names=names) if told else names


def _english(scene: Scene, rng: random.Random, split: Split, terse: float) -> list[tuple[int, str]]:
    """Parts in order with a rank; parts of a higher rank are left out first when the text is too long."""
    about = subject(scene, rng, "en", split)
    parts: list[tuple[int, str]] = []
    style = rng.random() < 0.6
    front = style and rng.random() < 0.5
    if front:
        parts.append((1, say(rng, split, "en", "style_prefix", scene.style)))
        if rng.random() < 0.12 and parts[-1][1].startswith("a "):
            parts[-1] = (1, say(rng, split, "en", "cheer") + parts[-1][1][2:])
    elif rng.random() < 0.3:
        parts.append((3, say(rng, split, "en", "opening")))
    parts.append((0, about))
    if rng.random() < 0.92 * terse:
        parts.append((1, place_phrase(scene.backdrop, rng, "en", split)))
    parts += [(2, p) for p in environment(scene.backdrop, rng, "en", split, terse)]
    if scene.sign:
        parts.append((0, ", " + say(rng, split, "en", "sign").format(text=scene.sign.text)))
    if style and not front:
        parts.append((1, ", " + say(rng, split, "en", "style_suffix", scene.style)))
    if scene.filter:
        parts.append((0, ", " + say(rng, split, "en", "filter", scene.filter)))
    return parts


def _chinese(scene: Scene, rng: random.Random, split: Split, terse: float) -> list[tuple[int, str]]:
    about = subject(scene, rng, "zh", split)
    parts: list[tuple[int, str]] = []
    style = rng.random() < 0.6
    front = style and rng.random() < 0.5
    where = place_phrase(scene.backdrop, rng, "zh", split) if rng.random() < 0.92 * terse else ""
    if front:
        parts.append((1, say(rng, split, "zh", "style_prefix", scene.style) + "，"))
    around = [(2, p + "，") for p in environment(scene.backdrop, rng, "zh", split, terse)]
    simple = not any(mark in about for mark in "在是位挡")  # otherwise a second clause of place would not be Chinese
    if where and simple and rng.random() < 0.5:
        parts += [*around, (0, where.removeprefix("在") + "有" + about + "，")]
    elif where and simple and scene.backdrop.place != "plain":
        parts += [(0, about + ("" if where.startswith("在") else "在") + where + "，"), *around]
    else:
        if not front and simple and rng.random() < 0.3:
            parts.append((3, say(rng, split, "zh", "opening")))
        parts += [(0, about + "，"), *([(1, where + "，")] if where else []), *around]
    if scene.sign:
        parts.append((0, say(rng, split, "zh", "sign").format(text=scene.sign.text) + "，"))
    if style and not front:
        parts.append((1, say(rng, split, "zh", "style_suffix", scene.style) + "，"))
    if scene.filter:
        parts.append((0, say(rng, split, "zh", "filter", scene.filter) + "，"))
    return parts


def joined(parts: list[str], language: Language) -> str:
    if language == "zh":
        return "".join(parts).strip("，")
    return re.sub(r"\s+,", ",", " ".join(parts)).strip(" ,")


def caption(scene: Scene, rng: random.Random, language: Language = "en", split: Split = "train") -> str:
    """A true text about the scene, of at most 45 tokens."""
    terse = 0.25 if rng.random() < 0.15 else 1.0
    shown = _natural(scene, rng)
    parts = (_english if language == "en" else _chinese)(shown, rng, split, terse)
    while True:
        text = joined([p for _, p in parts], language)
        rank = max(r for r, _ in parts)
        if len(tokens(text)) <= LIMIT or rank == 0:
            return text
        del parts[max(k for k, (r, _) in enumerate(parts) if r == rank)]
