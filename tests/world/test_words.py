"""Captions and instructions: true, short, spelled from a modest vocabulary, and split from the held-out phrasings."""

from __future__ import annotations

import random
import re
from dataclasses import replace

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


CLAIMS = {
    "time": "time",
    "weather": "weather",
    "season": "season",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_never_lie(language: str) -> None:
    """Whatever a caption says of time, weather, season, style, filter, sign and items holds in the scene."""
    checked = dict.fromkeys((*CLAIMS, "style", "filter", "sign"), 0)
    for scene, lang, full in texts(600):
        if lang != language:
            continue
        quoted = re.findall(r'["“]([A-Z]+)["”]', full)
        assert quoted == ([scene.sign.text] if scene.sign else [])
        checked["sign"] += len(quoted)
        text = re.sub(r'["“][A-Z]+["”]', "", full)
        for kind, field in CLAIMS.items():
            for value, options in phrases()[language][kind].items():
                if any(
                    re.search(rf"(?<!\w){re.escape(p)}(?!\w)" if language == "en" else re.escape(p), text)
                    for p in options
                ):
                    assert getattr(scene.backdrop, field) == value, (text, kind, value)
                    checked[kind] += 1
        for kind in ("style_prefix", "style_suffix"):
            for value, options in phrases()[language][kind].items():
                if value != "line" and any(text.startswith(p) or text.endswith(p) for p in options):
                    assert scene.style == value
                    checked["style"] += 1
        for value, options in phrases()[language]["filter"].items():
            if any(f", {p}" in text or f"，{p}" in text for p in options):
                assert scene.filter == value
                checked["filter"] += 1
    assert min(checked.values()) >= 20, checked


def test_captions_name_every_item_and_its_colour() -> None:
    atlas = world.load_atlas()
    for scene, lang, text in texts(300):
        for item in scene.items:
            concept = atlas.concept(item.concept)
            names = (concept.en, *concept.en_more) if lang == "en" else (concept.zh, *concept.zh_more)
            assert any(name in text for name in names), (text, concept.key)
            if item.colour and lang == "en":
                assert item.colour in text


def test_left_and_right_are_told_truly() -> None:
    atlas = world.load_atlas()
    told = 0
    for scene, lang, text in texts(600):
        if lang == "en" and len(scene.items) == 2 and " to the left of " in text:
            left = text.split(" to the left of ")[0]
            a = next(
                k
                for k, i in enumerate(scene.items)
                if any(n in left for n in (atlas.concept(i.concept).en, *atlas.concept(i.concept).en_more))
            )
            assert (a, "left", 1 - a) in relations(scene)
            told += 1
    assert told >= 10


def test_a_wrong_scene_would_be_caught() -> None:
    """The control of the tests above: a caption of one scene does not fit its negation."""
    rng = random.Random(0)
    for _ in range(200):
        scene = world.sample_scene(rng, replace(MIX, sign=1.0, three=0.0, four=0.0))
        text = world.caption(scene, rng)
        other = "ZOO" if scene.sign and scene.sign.text != "ZOO" else "CAFE"
        assert f'"{other}"' not in text


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
    held = {"get rid of ", "让太阳下山", "put something"} - {"put something"}
    seen = {split: set() for split in ("train", "test")}  # type: ignore[var-annotated]
    for split in seen:
        for _ in range(400):
            edit = world.sample_edit(rng, MIX, split, ["remove", "time"])  # type: ignore[arg-type]
            for lang in LANGUAGES:
                text = edit.instruction(rng, lang)  # type: ignore[arg-type]
                seen[split] |= {h for h in held if h in text}
    assert seen["train"] == set()
    assert seen["test"] == held
