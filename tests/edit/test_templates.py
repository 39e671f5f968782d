"""Templates: the package's are whole, in two languages, users' own are checked, and nano does as those for it say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import fluxloom as fl
from fluxloom.cli.main import main
from fluxloom.core.specs import MODELS
from fluxloom.core.text import Tokenizer
from fluxloom.edit.templates import Template, compose, find, library, pairs, told
from fluxloom.errors import BadInput
from fluxloom.infer.sizes import allowed_size
from fluxloom.infer.written import Written
from fluxloom.measure.recogniser import Reading, Recogniser
from fluxloom.weights.load import ASSETS

ALL = list(library().values())
WORDS = {
    "en": {
        "subject": "the red car",
        "colour": "blue",
        "new": "a bicycle",
        "scene": "the beach",
        "place": "in the snow",
    },
    "zh": {"subject": "红色的汽车", "colour": "蓝色", "new": "自行车", "scene": "海滩", "place": "雪地里"},
}


def filled(template: Template, language: Any) -> list[str]:
    """A template with every combination of the words that it allows."""
    gaps = [list(slot.values or [WORDS[language].get(name, "OPEN")]) for name, slot in template.slots.items()]
    return [template.fill(dict(zip(template.slots, words, strict=True)), language) for words in product(*gaps)]


def test_there_are_many_in_both_tasks() -> None:
    assert len(ALL) >= 50
    assert {task: sum(one.task == task for one in ALL) > 15 for task in ("generate", "edit")} == {
        "generate": True,
        "edit": True,
    }
    assert 15 <= sum(one.nano for one in ALL) < len(ALL)


@pytest.mark.parametrize("template", ALL, ids=lambda one: f"{one.task}.{one.name}")
def test_each_is_whole_in_both_languages(template: Template) -> None:
    for english, chinese in (template.title.values(), (filled(template, "en")[0], filled(template, "zh")[0])):
        assert not re.search(r"[一-鿿]", english)
        assert re.search(r"[一-鿿]", chinese)
    assert all(set(slot.default) in (set(), {"en", "zh"}) for slot in template.slots.values())
    for language in ("en", "zh"):
        texts = filled(template, language)
        assert len(set(texts)) == len(texts)
        assert not any("{" in text or len(text) > 400 for text in texts)
    assert "flux1-kontext-dev" in template.models
    assert ("nano" in template.models) == template.nano
    if "size" in template.settings:
        size = [int(side) for side in template.settings["size"].split("x")]
        assert [*allowed_size(MODELS["flux1-dev"], *size)] == size


def test_nano_knows_every_word_of_those_for_it() -> None:
    spec = MODELS["nano"].text
    assert spec is not None
    tokenizer = Tokenizer((ASSETS / "nano" / "vocab.txt").read_text("utf-8").splitlines(), spec.max_length)
    unknown = {
        text: tokenizer.unknown(text) + tokenizer.overflow(text)
        for template in ALL
        if template.nano
        for language in ("en", "zh")
        for text in filled(template, language)
    }
    assert {text: words for text, words in unknown.items() if words} == {}
    assert tokenizer.unknown(filled(find("generate", "cyanotype"), "en")[0])  # a control


# ---------------------------------------------------------------------------------------------- nano for real


@cache
def nano() -> tuple[fl.Loom, Recogniser]:
    return fl.load("nano"), Recogniser.load()


@cache
def drawn(prompt: str, of: str | None = None) -> fl.Result:
    loom, fields = nano()[0], {"seed": 3, "steps": 8}
    return loom.generate(prompt, **fields) if of is None else loom.edit(drawn(of), prompt, **fields)


def seen(result: fl.Result) -> Reading:
    return nano()[1].read([result.image])[0]


@pytest.mark.slow
def test_nano_draws_as_templates_say() -> None:
    cat, sign = "a cat on the beach", compose("generate", "海滩上，一只猫", "sign", {"text": "OPEN"})[0]
    assert seen(drawn(compose("generate", cat, "pixel-art")[0])).filter.label == "pixel"
    assert seen(drawn(compose("generate", cat, "watercolor")[0])).filter.label == "watercolour"
    assert seen(drawn(sign)).sign == "OPEN"
    plain = seen(drawn(cat))
    assert (plain.filter.label, plain.sign) == ("none", "")


@pytest.mark.slow
def test_nano_edits_as_templates_say() -> None:
    car = "a red car on the beach"
    night = compose("edit", None, "time", ["time=晚上"])[0]
    blue = compose("edit", "the car", "recolour", ["colour=blue"])[0]
    forest = compose("edit", None, "background", ["scene=a forest"])[0]
    before = seen(drawn(car))
    assert (before.time.label, before.place.label, before.things[0].colour) == ("day", "beach", None)
    assert seen(drawn(night, car)).time.label == "night"
    assert seen(drawn(blue, car)).things[0].colour == "blue"
    assert seen(drawn(forest, car)).place.label == "forest"


# ---------------------------------------------------------------------------------------------- composing


def test_the_prompt_is_the_subject() -> None:
    prompt, written = compose("generate", "a cat", "plain", ["colour=orange"])
    assert prompt == "a cat on an orange background"
    assert written == Written(text="a cat", template="plain", slots={"colour": "orange"})
    assert told(prompt, written) == "prompt by template plain: a cat on an orange background"
    assert compose("generate", None, "plain", {"subject": "a cat"})[0] == "a cat on a white background"
    assert compose("edit", None, "restore")[0].startswith("Restore this old photograph")
    assert compose("generate", " a cat ") == (" a cat ", None)


def test_the_language_is_that_of_what_was_typed() -> None:
    assert compose("generate", "一只猫", "plain")[0] == "白色背景前，一只猫"
    assert compose("edit", None, "season", ["season=冬天"])[0] == "改成冬天"
    assert compose("edit", None, "season", ["season=Winter"])[0] == "make it winter"
    assert compose("edit", None, "season", ["season=冬天"], language="en")[0] == "make it winter"
    assert compose("generate", "a cat", "sign", ["text=茶"], language="en")[0].endswith('"茶"')


def test_what_is_filled_in_is_no_template() -> None:
    assert compose("generate", "a {colour} cat", "plain")[0] == "a {colour} cat on a white background"
    assert pairs(["text=a=b"]) == {"text": "a=b"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", None), "got no prompt, allowed one in words, or --template"),
        (("edit", None), "got no instruction"),
        (("edit", None, "sesaon"), "got template 'sesaon' for edit, .* try season"),
        (("edit", "x", "golden-hour"), "try `fluxloom generate`"),
        (("generate", "x", "zzzz"), "try `fluxloom templates --task generate`"),
        (("generate", None, "golden-hour"), "got no subject, allowed any text, try the prompt for it"),
        (("edit", None, "season"), r"got no season, allowed spring \(春天\), .* try season=spring"),
        (("edit", None, "season", ["season=wintr"]), "got slot season=wintr, .* try season=winter"),
        (("edit", None, "season", ["saison=winter"]), "got slot saison for season, allowed season, try season"),
        (("edit", None, "sign-text", ["text= "]), "got an empty text, allowed any text"),
        (("edit", "the cat", "season", ["season=winter"]), "got 'the cat' with season, allowed its slots season"),
        (("edit", "the cat", "restore"), "allowed nothing more"),
        (("generate", "a", "plain", {"subject": "b"}), "got a subject as prompt 'a' and as slot"),
        (("generate", "a", None, ["colour=red"]), "got slot colour without a template"),
        (("generate", "a", "plain", ["red"]), "got --slot 'red', allowed NAME=VALUE"),
        (("generate", "a", "plain", ["colour=red", "colour=blue"]), "got --slot colour twice"),
    ],
)
def test_what_cannot_be_composed(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        compose(*arguments)


# ---------------------------------------------------------------------------------------------- one's own


def test_a_file_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[generate.toy]\ntext = "toy {subject} of {stuff}"\nslots.stuff.values = ["wood", "tin"]\n'
        '[edit.season]\ntext = "mine"\n',
        "utf-8",
    )
    assert compose("generate", "car", "toy", ["stuff=tin"], file=file)[0] == "toy car of tin"
    assert compose("generate", "车", "toy", ["stuff=tin"], file=file)[0] == "toy 车 of tin"
    monkeypatch.setenv("FLUXLOOM_TEMPLATES", str(file))
    assert compose("edit", None, "season")[0] == "mine"
    assert find("generate", "plain").own is False
    assert main(["templates", "toy", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["templates"]
    assert (shown["task"], shown["title"]["zh"], shown["own"]) == ("generate", "toy", True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text = ", "got .*mine.toml as templates"),
        ("[draw.a]\ntext = 'a'", "unknown table 'draw' in .*, allowed generate, edit"),
        ("[edit]\na = 1", r"got 1 of \[edit.a\] in .*, allowed a table"),
        ("[edit.a]\ntitle = 'a'", r"got no text of \[edit.a\]"),
        ("[edit.a]\ntext = 'a'\ntxt_zh = 'b'", "unknown key 'txt_zh' .* try text_zh"),
        ("[edit.a]\ntext = 'a {b}'\ntext_zh = 'c'", "got other gaps in text_zh than in text"),
        ("[edit.a]\ntext = 'a'\nslots.b.default = 'c'", "unknown slot 'b' .* allowed none"),
        ("[edit.a]\ntext = '{b}'\nslots.b.defalt = 'c'", "unknown key 'defalt' of slot b .* try default"),
        ("[edit.a]\ntext = '{b}'\nslots.b = {default = 'c', values = ['d']}", "got default 'c' .* allowed d"),
        ("[edit.a]\ntext = 'a'\nnano = 1", "got nano = 1 .* allowed true or false"),
        ("[edit.a]\ntext = 'a'\nsettings.guidence = 1", "unknown setting 'guidence' .* try guidance"),
    ],
)
def test_a_wrong_file_says_where(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(content, "utf-8")
    with pytest.raises(BadInput, match=message):
        library(file)
    with pytest.raises(BadInput, match="as templates"):
        library(tmp_path / "none.toml")


# ---------------------------------------------------------------------------------------------- the command


def test_composing_loads_nothing_heavy() -> None:
    """It is done before a model is loaded, so that what is wrong is told at once."""
    code = "from fluxloom.edit.templates import compose; compose('generate', 'a cat', 'plain', enhancer='rules')"
    code += "; import sys; sys.exit({'torch', 'numpy', 'PIL'} & sys.modules.keys() != set())"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["templates", "--task", "edit", "--lang", "zh"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["task", "name", "title", "slots", "for nano"]
    assert ["edit", "season", "换季节", "season", "yes"] in rows
    assert {row[0] for row in rows[1:]} == {"edit"}
    assert main(["templates", "season"]) == 0
    shown = capsys.readouterr().out
    assert "make it {season}" in shown
    assert "{subject} in {season}" in shown
    assert main(["templates", "teal-orange"]) == 0
    assert "--size 1344x576" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sesaon"], "got template 'sesaon', allowed what `fluxloom templates` lists, try season"),
        (["--task", "paint"], "got --task 'paint', allowed generate, edit"),
        (["--lang", "fr"], "got language 'fr', allowed en, zh"),
    ],
)
def test_the_command_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["templates", *words]) == 2
    assert message in capsys.readouterr().err
