"""Every word that captions and instructions can use, training and held-out phrasings alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fluxloom.world import words
from fluxloom.world.atlas import load_atlas
from fluxloom.world.colours import COLOURS


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield re.sub(r"\{\w+\}", " ", node)
    else:
        for child in node.values() if isinstance(node, dict) else node:
            yield from _strings(child)


def vocabulary_texts() -> Iterator[str]:
    """Strings that together hold every word, character, digit and sign; sign words stand in quotes."""
    yield from _strings(words.phrases())
    for concept in load_atlas().concepts.values():
        yield from (concept.en, *concept.en_more, concept.zh, *concept.zh_more, "一" + concept.measure)
    for colour in COLOURS.values():
        yield f"{colour.en} {colour.zh}的"
    for word in words.SIGN_WORDS:
        yield f'"{word}"'
    yield "a an the and ,"
    yield "、，的有在和"
