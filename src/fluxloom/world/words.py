"""Words in both languages: phrasings, names with their articles and measure words, the words on signs."""

from __future__ import annotations

import random
import tomllib
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

from fluxloom.world.atlas import load_atlas
from fluxloom.world.colours import COLOURS
from fluxloom.world.scene import Item
from fluxloom.world.split import Split, choose

Language = Literal["en", "zh"]

SIGN_WORDS = (
    "OPEN", "CAFE", "SALE", "STOP", "HELLO", "LOVE", "PARK", "ZOO", "TAXI", "PIZZA", "MUSIC", "JAZZ",
    "BOOK", "ART", "FARM", "TEA", "HOTEL", "EXIT", "HOME", "FISH", "MILK", "NEWS", "PLAY", "DREAM",
    "HAPPY", "SUN", "MOON", "STAR", "GO", "YES", "WOW", "KIDS", "BUS", "TOYS", "SHOP", "ICE", "NEW", "OK",
)  # fmt: skip


@lru_cache(1)
def phrases() -> dict[str, Any]:
    """All phrasings by language and kind, from `assets/world/phrases.toml`; the last of each list is held out."""
    return tomllib.loads((files("fluxloom") / "assets" / "world" / "phrases.toml").read_text(encoding="utf-8"))


def say(rng: random.Random, split: Split, language: Language, *path: str) -> str:
    """One phrasing of a kind, such as say(rng, "train", "en", "place", "beach")."""
    options: Any = phrases()[language]
    for key in path:
        options = options[key]
    phrase: str = choose(rng, options, split)
    return phrase


def fixed(language: Language, key: str) -> str:
    """A word of which there is but one, such as fixed("zh", "left")."""
    return str(phrases()[language][key])


def fill(phrase: str, **slots: str) -> str:
    """A phrasing with its gaps filled: orange is the one colour that turns "a" into "an"."""
    return phrase.format(**slots).replace(" a orange", " an orange")


LIKE_A = ("unicorn", "ufo")
LIKE_AN = ("hourglass",)


def article(phrase: str) -> str:
    """ "a" or "an", by sound."""
    first = phrase.split()[0].lower()
    if first in LIKE_A:
        return "a"
    return "an" if first in LIKE_AN or first[0] in "aeiou" else "a"


def colour_word(colour: str, language: Language) -> str:
    return COLOURS[colour].en if language == "en" else COLOURS[colour].zh


def name_of(item: Item, rng: random.Random, language: Language) -> str:
    """The thing's name; in one of five texts a synonym."""
    concept = load_atlas().concept(item.concept)
    main, more = (concept.en, concept.en_more) if language == "en" else (concept.zh, concept.zh_more)
    name = rng.choice(more) if more and rng.random() < 0.2 else main
    # Synonyms that are colour phrases of their own ("red apple") would contradict a repainted thing.
    return main if item.colour and _tells_colour(name, language) else name


def noun(item: Item, rng: random.Random, language: Language, adjective: str = "") -> str:
    """ "a red bicycle", "一辆红色的自行车"."""
    concept = load_atlas().concept(item.concept)
    name = name_of(item, rng, language)
    colour = colour_word(item.colour, language) if item.colour else ""
    if language == "zh":
        return f"一{concept.measure}{adjective}{colour}{'的' if colour else ''}{name}"
    words = " ".join(filter(None, (adjective, colour, name)))
    return words if name in concept.bare else f"{article(words)} {words}"


def _tells_colour(name: str, language: Language) -> bool:
    if language == "en":
        return any(c.en in name.split() for c in COLOURS.values()) or "golden" in name or "gold" in name.split()
    return any(c.zh[0] in name for c in COLOURS.values()) or "金" in name


def definite(item: Item, rng: random.Random, language: Language) -> str:
    """ "the red bicycle", "红色的自行车"."""
    name = name_of(item, rng, language)
    colour = colour_word(item.colour, language) if item.colour and rng.random() < 0.5 else ""
    if language == "zh":
        return f"{colour}的{name}" if colour else name
    return f"the {colour} {name}" if colour else f"the {name}"
