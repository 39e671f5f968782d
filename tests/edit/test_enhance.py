"""Enhancers: rules that contradict nothing, a chat endpoint and all that it may answer, and plug-ins."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from chat_server import Endpoint, answer, serving

from fluxloom.edit.enhance import ChatEnhancer, Language, Rules, enhancer_named, enhancers, language_of
from fluxloom.edit.templates import compose, told
from fluxloom.errors import BadInput, Failure
from fluxloom.infer.written import MAX_PROMPT

SEEDS = range(12)


def added(text: str, task: str = "generate", language: Language | None = None) -> set[str]:
    """Everything that some seed adds."""
    spoken = language or language_of(text)
    return {phrase for seed in SEEDS for phrase in Rules().added(text, task=task, language=spoken, seed=seed)}


# ---------------------------------------------------------------------------------------------- rules


def test_a_bare_prompt_gets_all_four() -> None:
    for text in ("a red bicycle", "一辆红色的自行车"):
        prompt, written = compose("generate", text, enhancer="rules", seed=1)
        assert prompt.startswith(text)
        assert len(prompt.replace("，", ",").split(",")) == 5
        assert written is not None
        assert (written.text, written.enhancer, written.model) == (text, "rules", None)
        assert told(prompt, written) == f"prompt by enhancer rules: {prompt}"
        assert compose("generate", text, enhancer="rules", seed=1)[0] == prompt
        assert len({compose("generate", text, enhancer="rules", seed=seed)[0] for seed in SEEDS}) > 4
    assert compose("generate", "a cat.", enhancer="rules")[0].startswith("a cat, ")
    assert compose("generate", "", enhancer="rules")[0] == ""


@pytest.mark.parametrize(
    ("text", "never"),
    [
        ("a cat at night", ("light", "sky")),
        ("a street in the fog", ("light", "sky")),
        ("an oil painting of a dog in the garden", ("photo", "lens", "mm")),
        ("pixel art of a car", ("photo", "lens")),
        ("Isometric drawings of a house", ("photo", "lens", "eye-level", "third", "space")),
        ("a girl, 35mm f/2, bokeh", ("lens",)),
        ("close-up of a bee, macro", ("lens", "eye-level", "third", "space")),
        ("a chair in the kitchen", ("daylight", "sky", "24 mm")),
        ("a desk in a room by the sea", ("window", "daylight", "sky", "24 mm")),
        ("a dog on the beach", ("window",)),
        ("夜晚的街道", ("光",)),
        ("花园里的狗，油画", ("照片", "镜头")),
        ("厨房里的女孩", ("自然光", "大景深")),
        ("一只猫的特写", ("镜头", "视角", "三分", "余地")),
    ],
)
def test_nothing_contradicts_the_prompt(text: str, never: tuple[str, ...]) -> None:
    found = added(text)
    assert found  # something is left to be said
    assert [(phrase, word) for phrase, word in product(found, never) if word in phrase] == []


def test_what_is_known_of_the_place_is_used() -> None:
    assert "soft window light" in added("a chair in the kitchen")
    assert "soft window light" not in added("a chair")
    assert "85 mm lens" in added("portraits of two women") | added("a woman")
    assert "柔和的窗光" in added("厨房里的椅子")


def test_words_in_quotes_are_of_the_picture() -> None:
    assert added('a cat with a sign that says "NIGHT"') & added("a cat") == added("a cat")
    assert added("一只猫，木牌上写着“夜晚的油画”") == added("一只猫")
    assert (language_of('a sign "茶"'), language_of("“茶”"), language_of("一块“TEA”牌")) == ("en", "zh", "zh")


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("remove the car", {"leave everything else unchanged"}),
        ("make it winter", {"keep the composition"}),
        ("make it winter and remove the car", {"leave everything else unchanged"}),
        ("give the man another background", {"keep the person's face, pose and scale"}),
        ("give the smiling man another background", {"leave everything else unchanged"}),
        ('change the sign to "OPEN"', {"keep the lettering's size and place"}),
        ("make the text bigger", {"leave everything else unchanged"}),
        ("make it night, keep the car", set()),
        ("改成冬天", {"构图保持不变"}),
        ("去掉汽车", {"其余一切保持不变"}),
        ("去掉汽车，其余不变", set()),
    ],
)
def test_an_instruction_gets_what_stays(text: str, phrases: set[str]) -> None:
    assert added(text, "edit") == phrases


def test_rules_keep_within_the_longest_prompt() -> None:
    text = "a cat" * (MAX_PROMPT // 5)
    assert compose("generate", text, enhancer="rules")[0] == text


def test_templates_and_enhancers_go_together() -> None:
    prompt, written = compose("generate", "a cat", "golden-hour", enhancer="rules")
    assert "last hour of sun" in prompt
    assert "photograph" in prompt
    assert written is not None
    assert told(prompt, written).startswith("prompt by template golden-hour and enhancer rules: a cat in the last")


# ---------------------------------------------------------------------------------------------- chat


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    with serving(monkeypatch) as made:
        monkeypatch.setenv("FLUXLOOM_ENHANCER_URL", made.url)
        monkeypatch.setenv("FLUXLOOM_ENHANCER_MODEL", "small")
        yield made


def test_chat_writes_it_out(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXLOOM_ENHANCER_KEY", "secret")
    endpoint.body = answer('"a red cat on a sofa, soft light"')
    prompt, written = compose("generate", "a red cat", enhancer="chat", seed=7)
    assert prompt == "a red cat on a sofa, soft light"
    assert written is not None
    assert (written.enhancer, written.model) == ("chat", "small")
    compose("edit", "去掉猫", enhancer="chat")
    (_, headers, body), (_, _, second) = endpoint.asked
    assert (headers["Authorization"], body["model"], body["seed"]) == ("Bearer secret", "small", 7)
    assert body["messages"][1] == {"role": "user", "content": "a red cat"}
    systems = [asked["messages"][0]["content"] for asked in (body, second)]
    assert ["must stay unchanged" in text for text in systems] == [False, True]
    assert ["Answer in English" in text for text in systems] == [True, False]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"no json", "another form"),
        (answer(" "), "empty answer"),
        (answer("a cat", finish_reason="length"), "cut off"),
        (answer(None, refusal="not that"), "a refusal: not that"),
        (answer("I’m sorry, but I can’t help with that."), "a refusal: I’m sorry"),
        (answer("抱歉，我不能画这个。"), "a refusal: 抱歉"),
        (answer("word " * 500), "2,499 characters, over 2,000"),
        (answer("a cat with a sign"), "lost the words 'OPEN'"),
    ],
)
def test_answers_that_are_no_prompt(endpoint: Endpoint, body: bytes, message: str) -> None:
    endpoint.body = body
    with pytest.raises(
        Failure, match=rf"no enhanced prompt from {endpoint.url} \(.*{message}.*try the enhancer rules, or none"
    ):
        compose("generate", 'a cat and a sign "OPEN"', enhancer="chat")


def test_chat_does_not_wait_for_ever(endpoint: Endpoint) -> None:
    endpoint.delay = 1.0
    began = time.perf_counter()
    with pytest.raises(Failure, match="timed out"):
        ChatEnhancer(url=endpoint.url, model="small", timeout=0.2).enhance(
            "a cat", task="generate", language="en", seed=0
        )
    assert time.perf_counter() - began < 0.9


def test_chat_without_an_endpoint() -> None:
    with pytest.raises(
        BadInput, match=r"got enhancer chat and no FLUXLOOM_ENHANCER_URL, .* try FLUXLOOM_ENHANCER_URL="
    ):
        enhancer_named("chat")


# ---------------------------------------------------------------------------------------------- plug-ins


def test_a_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shouting.py").write_text(
        "class Shout:\n    model = None\n    def enhance(self, text, **more): return text.upper()\n", "utf-8"
    )
    about: dict[str, Any] = {
        "METADATA": "Metadata-Version: 2.1\nName: shouting\nVersion: 1\n",
        "entry_points.txt": "[fluxloom.enhancers]\nshout = shouting:Shout\nbroken = nowhere:Shout\n"
        "rules = shouting:Shout\n",
    }
    (tmp_path / "shouting-1.dist-info").mkdir()
    for name, text in about.items():
        (tmp_path / "shouting-1.dist-info" / name).write_text(text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert {"rules", "chat", "shout", "broken"} <= enhancers().keys()
    assert compose("generate", "a cat", enhancer="shout")[0] == "A CAT"
    assert compose("generate", "a cat", enhancer="rules")[0] != "A CAT"
    with pytest.raises(Failure, match="got enhancer 'broken' from nowhere:Shout, which does not load"):
        enhancer_named("broken")
    with pytest.raises(BadInput, match="got enhancer 'shuot', allowed broken, chat, rules, shout, try shout"):
        enhancer_named("shuot")
