"""Captions and instructions: true, short, spelled from a modest vocabulary, and split from the held-out phrasings."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from fluxloom import world
from fluxloom.core.text import split_words
from fluxloom.world.captions import LIMIT, tokens
from fluxloom.world.scene import relations
from fluxloom.world.split import colour_held, pair_held, style_held
from fluxloom.world.words import article, noun, phrases

MIX = world.Mix.scenes()
LANGUAGES = ("en", "zh")


def texts(count: int, split: str = "train") -> list[tuple[world.Scene, str, str]]:
    rng = random.Random(f"texts {split}")
    out = []
    for _ in range(count):
        scene = world.sample_scene(rng, MIX, split)  # type: ignore[arg-type]
        out += [(scene, lang, world.caption(scene, rng, lang, split)) for lang in LANGUAGES]  # type: ignore[arg-type]
    return out


def test_texts_are_short_enough_and_spelled_from_the_vocabulary() -> None:
    known = {piece for text in world.vocabulary_texts() for piece in split_words(text)}
    rng = random.Random(4)
    said = [text for split in ("train", "test") for _, _, text in texts(400, split)]
    for split in ("train", "test"):
        for _ in range(500):
            edit = world.sample_edit(rng, MIX, split)  # type: ignore[arg-type]
            said += [edit.instruction(rng, lang) for lang in LANGUAGES]  # type: ignore[arg-type]
    for text in said:
        assert text
        assert "{" not in text
        assert "  " not in text
        pieces = split_words(text)
        assert len(pieces) == len(tokens(text)) <= LIMIT, text
        assert set(pieces) <= known, (text, set(pieces) - known)
    assert len({piece for piece in known if piece.isascii()}) < 1500
    assert max(len(split_words(t)) for t in said) > 25


def test_terse_and_long_texts_occur() -> None:
    lengths = [len(tokens(text)) for _, lang, text in texts(400) if lang == "en"]
    assert min(lengths) <= 3
    assert max(lengths) >= 28


def claims(text: str, language: str) -> list[tuple[str, str]]:
    """What a caption says of time, weather, season, style, filter and sign."""
    out = [("sign", word) for word in re.findall(r'["“]([A-Z]+)["”]', text)]
    text = re.sub(r'["“][A-Z]+["”]', "", text)

    def says(phrase: str, kind: str) -> bool:
        if kind == "filter":
            return f", {phrase}" in text or f"，{phrase}" in text
        if kind.startswith("style"):
            return text.startswith(phrase) or text.endswith(phrase)
        return bool(re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)" if language == "en" else re.escape(phrase), text))

    for kind in ("time", "weather", "season", "style_prefix", "style_suffix", "filter"):
        for value, options in phrases()[language][kind].items():
            if value != "line" and any(says(phrase, kind) for phrase in options):
                out.append((kind.split("_")[0], value))
    return out


def facts(scene: world.Scene) -> dict[str, str | None]:
    b = scene.backdrop
    return {
        "time": b.time, "weather": b.weather, "season": b.season,
        "style": scene.style, "filter": scene.filter, "sign": scene.sign and scene.sign.text,
    }  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_never_lie(language: str) -> None:
    """Whatever a caption says of time, weather, season, style, filter and sign holds in its scene; in the scene
    before, which is the control, most of it does not."""
    said = [(scene, claims(text, lang)) for scene, lang, text in texts(600) if lang == language]
    for scene, told in said:
        assert all(facts(scene)[kind] == value for kind, value in told), (scene, told)
        assert (scene.sign is None) == ("sign" not in dict(told))
    counts = Counter(kind for _, told in said for kind, _ in told)
    assert len(counts) == 6
    assert min(counts.values()) >= 20, counts
    wrong = sum(facts(scene)[kind] != value for (scene, _), (_, told) in pairwise(said) for kind, value in told)
    assert wrong > 0.5 * counts.total()


def test_captions_name_every_item_and_its_colour() -> None:
    atlas = world.load_atlas()
    for scene, lang, text in texts(300):
        for item in scene.items:
            concept = atlas.concept(item.concept)
            names = (concept.en, *concept.en_more) if lang == "en" else (concept.zh, *concept.zh_more)
            assert any(name in text for name in names), (text, concept.key)
            if item.colour and lang == "en":
                assert item.colour in text


@pytest.mark.parametrize("relation", ["left", "above", "behind", "bigger"])
def test_relations_are_told_truly(relation: str) -> None:
    """Whatever stands before the words bears the relation to what stands after them, and not the other way round."""
    words = {"left": "to the left of", "above": "above", "behind": "behind", "bigger": "and a small"}[relation]
    atlas, rng, told = world.load_atlas(), random.Random(relation), 0
    mix = replace(MIX, large=0.0, medium=0.0, two=1.0, three=0.0, four=0.0)
    for _ in range(900):
        scene = world.sample_scene(rng, mix)
        before, found, _ = world.caption(scene, rng).partition(f" {words} ")
        if found:
            names = [(c.en, *c.en_more) for c in (atlas.concept(item.concept) for item in scene.items)]
            a = next(k for k in (0, 1) if any(name in before for name in names[k]))
            assert (a, relation, 1 - a) in relations(scene), before
            assert (1 - a, relation, a) not in relations(scene), before
            told += 1
    assert told >= 10, told


def test_articles() -> None:
    assert [article(w) for w in ("unicorn", "ufo", "hourglass", "apple", "orange", "bus", "x")] == [
        "a",
        "a",
        "an",
        "an",
        "an",
        "a",
        "a",
    ]
    rng = random.Random(1)
    for _ in range(30):
        assert not noun(world.Item("jeans", 0.5, 0.9, 0.5), rng, "en").startswith(("a ", "an "))
        assert noun(world.Item("apple", 0.5, 0.9, 0.5, "orange"), rng, "en").startswith("an orange ")
        assert noun(world.Item("bicycle", 0.5, 0.9, 0.5, "red"), rng, "zh").startswith("一辆红色的")


def test_training_never_sees_what_is_held_out() -> None:
    rng = random.Random(9)
    for _ in range(1500):
        scene = world.sample_scene(rng, MIX)
        edit = world.sample_edit(rng, MIX)
        for shown in (scene, edit.source, edit.target):
            keys = [i.concept for i in shown.items]
            assert not any(style_held(k, shown.style) for k in keys)
            assert not any(i.colour and colour_held(i.concept, i.colour) for i in shown.items)
            assert not any(pair_held(a, b) for a in keys for b in keys if a != b)


def test_test_split_always_holds_something_new() -> None:
    rng = random.Random(9)
    kinds = set()
    for _ in range(150):
        kinds |= {r.split(":")[0] for r in world.heldout_reasons(world.sample_scene(rng, MIX, "test"))}
        edit = world.sample_edit(rng, MIX, "test")
        reasons = world.heldout_reasons(edit.source, edit.target)
        assert reasons
        kinds |= {r.split(":")[0] for r in reasons}
    assert kinds == {"style", "colour", "pair"}


def test_the_split_is_the_one_that_was_trained() -> None:
    """Shares as documented; and fixed members, so that a change of the hash cannot pass unseen."""
    concepts = world.load_atlas().concepts
    combos = [(k, s) for k in concepts for s in world.STYLES]
    assert 0.03 < sum(style_held(*c) for c in combos) / len(combos) < 0.08
    paints = [(k, c) for k, v in concepts.items() for c in v.colours]
    assert 0.06 < sum(colour_held(*p) for p in paints) / len(paints) < 0.14
    keys = sorted(concepts)
    pairs = [(a, b) for a in keys for b in keys if a < b]
    assert 0.04 < sum(pair_held(*p) for p in pairs) / len(pairs) < 0.06
    assert all(pair_held(b, a) for a, b in pairs[:3000] if pair_held(a, b))
    assert [k for k in keys if style_held(k, "3d")][:3] == HELD_3D


HELD_3D = ["avocado", "camel", "chair"]


def every_list(node: object, path: str = "") -> list[tuple[str, list[str]]]:
    if isinstance(node, dict):
        return [pair for k, v in node.items() for pair in every_list(v, f"{path}.{k}")]
    return [(path, node)] if isinstance(node, list) else []


def test_held_out_phrasings_appear_in_tests_only() -> None:
    rng = random.Random(0)
    kinds = {f"{lang}.edit.{k}" for lang in LANGUAGES for k in phrases()[lang]["edit"]}
    lists = every_list(phrases())
    assert len(lists) > 150
    assert all(len(options) >= 3 and len(set(options)) == len(options) for _, options in lists), lists
    assert {path.lstrip(".") for path, _ in lists} >= kinds
    held = {"get rid of ", "让太阳下山"}
    seen = {split: set() for split in ("train", "test")}  # type: ignore[var-annotated]
    for split in seen:
        for _ in range(400):
            edit = world.sample_edit(rng, MIX, split, ["remove", "time"])  # type: ignore[arg-type]
            for lang in LANGUAGES:
                text = edit.instruction(rng, lang)  # type: ignore[arg-type]
                seen[split] |= {h for h in held if h in text}
    assert seen["train"] == set()
    assert seen["test"] == held
