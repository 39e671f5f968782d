"""nano has read every word that the world can say: what one changes without the other would reach it as letters."""

from __future__ import annotations

from pathlib import Path

import fluxloom
from fluxloom import world
from fluxloom.core.text import split_words

VOCABULARY = Path(fluxloom.__file__).parent / "assets" / "nano" / "vocab.txt"


def test_every_word_of_the_world_is_in_the_shipped_vocabulary() -> None:
    known = set(VOCABULARY.read_text("utf-8").splitlines())
    said = {word for text in world.vocabulary_texts() for word in split_words(text)}
    assert len(said) > 1000
    assert said <= known, sorted(said - known)
