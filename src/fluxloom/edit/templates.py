"""Prompt templates: texts with gaps, as data in two languages (``assets/templates.toml``, whose head says its form),
and :func:`compose`, which makes a prompt of a template, what was typed, and an enhancer. Importing this is light."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from fluxloom.core.specs import MODELS
from fluxloom.edit.enhance import Language, enhancer_named, language_of, spoken
from fluxloom.errors import BadInput
from fluxloom.infer.written import Written

TASKS = ("generate", "edit")
FILE = "FLUXLOOM_TEMPLATES"  # in the environment: a file of one's own
SUBJECT = "subject"  # the gap that the prompt fills
_GAP = re.compile(r"\{(\w+)\}")
_KEYS = ("title", "title_zh", "text", "text_zh", "slots", "nano", "settings")
_SETTINGS = ("size", "steps", "guidance", "true_cfg", "solver", "strength", "negative")  # options of generate and edit
_SLOT_KEYS = ("default", "default_zh", "values")

_Texts = dict[Language, str]


@dataclass(frozen=True)
class Slot:
    """A gap: its default by language, if any, and the words allowed (English = Chinese), if not all are."""

    name: str
    default: Mapping[Language, str]
    values: Mapping[str, str]

    def word(self, given: str | None, language: Language) -> str:
        """What stands in the gap: an allowed word may be given in either language. Raises BadInput."""
        if given is None:
            if not self.default:
                hint = "the prompt for it" if self.name == SUBJECT else self._example(language)
                raise BadInput(f"got no {self.name}, allowed {self.allowed}, try {hint}")
            return self.default[language]
        if not given.strip():
            raise BadInput(f"got an empty {self.name}, allowed {self.allowed}, try {self._example(language)}")
        if not self.values:
            return given
        for english, chinese in self.values.items():
            if given.strip().lower() in (english.lower(), chinese.lower()):
                return english if language == "en" else chinese
        near = _near(given, [*self.values, *self.values.values()])
        raise BadInput(f"got slot {self.name}={given}, allowed {self.allowed}, try {self.name}={near}")

    @property
    def allowed(self) -> str:
        """The words allowed, for people."""
        pairs = (one if one == other else f"{one} ({other})" for one, other in self.values.items())
        return ", ".join(pairs) or "any text"

    def _example(self, language: Language) -> str:
        words = self.values if language == "en" else self.values.values()
        return f"{self.name}={next(iter(words), '...')}"


@dataclass(frozen=True)
class Template:
    """One template; ``own`` tells those of the user's file from the package's."""

    name: str
    task: str
    title: Mapping[Language, str]
    text: Mapping[Language, str]
    slots: Mapping[str, Slot]
    nano: bool
    settings: Mapping[str, Any]
    own: bool

    @cached_property
    def gaps(self) -> tuple[str, ...]:
        """Every gap, in the order of the text."""
        return _gaps(self.text["en"])

    @property
    def models(self) -> tuple[str, ...]:
        """The members that it suits: those with the task, and nano where it has the words."""
        return tuple(
            spec.name for spec in MODELS.values() if self.task in spec.tasks and (self.nano or not spec.embedded)
        )

    def fill(self, slots: Mapping[str, str], language: Language) -> str:
        """The text with its gaps filled. Raises BadInput for unknown or missing slots and for words not allowed."""
        for name in slots:
            if name not in self.gaps:
                allowed = ", ".join(self.gaps) or "none"
                raise BadInput(f"got slot {name} for {self.name}, allowed {allowed}, try {_near(name, self.gaps)}")
        words = {name: self.slots[name].word(slots.get(name), language) for name in self.gaps}
        text = self.text[language]
        for name, word in words.items():  # "a orange", as far as letters tell
            if word[0].lower() in "aeiou":
                text = re.sub(rf"\b([Aa]) (?={{{name}}})", r"\1n ", text)
        return _GAP.sub(lambda gap: words[gap[1]], text)

    def to_dict(self) -> dict[str, Any]:
        """As ``fluxloom templates --json`` shows it."""
        slots = {
            name: {"default": dict(slot.default) or None, "values": dict(slot.values) or None}
            for name, slot in self.slots.items()
        }
        return {
            "name": self.name,
            "task": self.task,
            "title": dict(self.title),
            "text": dict(self.text),
            "slots": slots,
            "models": list(self.models),
            "settings": dict(self.settings),
            "own": self.own,
        }


def library(file: str | os.PathLike[str] | None = None) -> dict[tuple[str, str], Template]:
    """All templates by task and name: the package's, and over them those of a file; without one given, of the file that
    FLUXLOOM_TEMPLATES names. Raises BadInput where that is none."""
    text = (files("fluxloom") / "assets" / "templates.toml").read_text("utf-8")
    found = _templates(tomllib.loads(text), "templates.toml", own=False)
    chosen = file or os.environ.get(FILE)
    if not chosen:
        return found
    try:
        tables = tomllib.loads(Path(chosen).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(
            f"got {os.fspath(chosen)} as templates ({error}), allowed TOML with tables such as [edit.mine], try another"
        ) from error
    return found | _templates(tables, os.fspath(chosen), own=True)


def find(task: str, name: str, file: str | os.PathLike[str] | None = None) -> Template:
    """The template of a name. Raises BadInput with those that are near."""
    known = library(file)
    if (task, name) not in known:
        there = [f"`fluxloom {of}`" for of, one in known if one == name]
        near = there or get_close_matches(name, [one for of, one in known if of == task], n=3, cutoff=0.5)
        hint = " or ".join(near or [f"`fluxloom templates --task {task}`"])
        raise BadInput(f"got template {name!r} for {task}, allowed what `fluxloom templates` lists, try {hint}")
    return known[task, name]


def pairs(words: Iterable[str]) -> dict[str, str]:
    """``colour=red`` of the command line, as slots."""
    found: dict[str, str] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name.strip():
            raise BadInput(f"got --slot {word[:40]!r}, allowed NAME=VALUE, try --slot colour=red")
        if name.strip() in found:
            raise BadInput(f"got --slot {name.strip()} twice, allowed once, try one of the two")
        found[name.strip()] = value
    return found


def compose(
    task: str,
    prompt: str | None,
    template: str | None = None,
    slots: Mapping[str, str] | Sequence[str] = (),
    *,
    enhancer: str | None = None,
    language: str | None = None,
    seed: int | None = None,
    file: str | os.PathLike[str] | None = None,
) -> tuple[str, Written | None]:
    """The prompt to draw, and how it came to be (None where it is what was typed).

    prompt    what was typed: with a template its subject, unless that is among ``slots``
    slots     what fills the template's gaps, as a mapping or as words such as ``colour=red``
    enhancer  a name of :func:`fluxloom.edit.enhance.enhancers`
    language  en or zh; that of what was typed unless given
    seed      of what an enhancer chooses; 0 unless given
    file      templates of one's own: see :func:`library`

    Raises BadInput for what cannot be put together, and Failure where an enhancer does not answer.
    """
    given = dict(slots) if isinstance(slots, Mapping) else pairs(slots)
    typed = prompt or ""
    if prompt is None and template is None:
        what = "instruction" if task == "edit" else "prompt"
        raise BadInput(f"got no {what}, allowed one in words, or --template NAME, try `fluxloom templates`")
    if template is None and given:
        raise BadInput(f"got slot {next(iter(given))} without a template, allowed only with one, try --template NAME")
    speaks = spoken(language) if language else language_of(" ".join([typed, *given.values()]))
    text, model = typed, None
    if template is not None:
        chosen = find(task, template, file)
        text = chosen.fill(_with_subject(chosen, typed, given), speaks)
    if enhancer is not None:
        helper = enhancer_named(enhancer)
        text = helper.enhance(text, task=task, language=speaks, seed=seed or 0)
        model = helper.model
    if template is None and enhancer is None:
        return text, None
    return text, Written(text=typed, template=template, slots=given, enhancer=enhancer, model=model)


def _with_subject(template: Template, typed: str, slots: dict[str, str]) -> dict[str, str]:
    """The slots, and what was typed as the subject among them."""
    if not typed.strip():
        return slots
    if SUBJECT not in template.gaps:
        allowed = f"its slots {', '.join(template.gaps)}" if template.gaps else "nothing more"
        raise BadInput(f"got {typed[:40]!r} with {template.name}, allowed {allowed}, try without those words")
    if SUBJECT in slots:
        raise BadInput(f"got a subject as prompt {typed[:40]!r} and as slot, allowed once, try without the slot")
    return {**slots, SUBJECT: typed.strip()}


def told(prompt: str, written: Written) -> str:
    """One line about how a prompt came to be, for the user."""
    by = [f"template {written.template}"] if written.template else []
    by += [f"enhancer {written.enhancer}{f' ({written.model})' if written.model else ''}"] if written.enhancer else []
    return f"prompt by {' and '.join(by)}: {prompt}"


# ---------------------------------------------------------------------------------------------- reading a file


def _templates(tables: Mapping[str, Any], source: str, own: bool) -> dict[tuple[str, str], Template]:
    _known(f"in {source}", "table", tables, TASKS)
    found = {}
    for task, named in tables.items():
        for name, row in (named if isinstance(named, dict) else {"": named}).items():
            where = f"of [{task}.{name}] in {source}"
            if not isinstance(row, dict):
                raise BadInput(f"got {row!r} {where}, allowed a table, try [{task}.mine] with text = ...")
            found[task, name] = _template(task, name, row, where, own)
    return found


def _template(task: str, name: str, row: Mapping[str, Any], where: str, own: bool) -> Template:
    _known(where, "key", row, _KEYS)
    text = _both(row, "text", where)
    gaps, slots = _gaps(text["en"]), _table(row, "slots", where)
    if set(gaps) != set(_gaps(text["zh"])):
        raise BadInput(
            f"got other gaps in text_zh than in text {where}, allowed the same, try {{{gaps[0] if gaps else ''}}}"
        )
    _known(where, "slot", slots, gaps)
    return Template(
        name=name,
        task=task,
        title=_both({"title": name, **row}, "title", where),
        text=text,
        slots={gap: _slot(gap, _table(slots, gap, where), where) for gap in gaps},
        nano=_typed(row.get("nano", False), bool, "nano", where),
        settings=_settings(row, where),
        own=own,
    )


def _settings(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    found = _table(row, "settings", where)
    _known(where, "setting", found, _SETTINGS)
    return found


def _slot(name: str, row: Mapping[str, Any], where: str) -> Slot:
    where = f"of slot {name} {where}"
    _known(where, "key", row, _SLOT_KEYS)
    values = row.get("values", {})
    if isinstance(values, list):
        values = {value: value for value in values if isinstance(value, str)}
    values = {one: _typed(other, str, "values", where) for one, other in _typed(values, dict, "values", where).items()}
    if "default" not in row:
        return Slot(name, {}, values)
    default = _both(row, "default", where)
    if values and default["en"] not in values:
        raise BadInput(f"got default {default['en']!r} {where}, allowed {', '.join(values)}, try one of these")
    return Slot(name, {"en": default["en"], "zh": values[default["en"]]} if values else default, values)


def _both(row: Mapping[str, Any], key: str, where: str) -> _Texts:
    """A text in both languages: where one is not written, the other stands for it."""
    given = [_typed(row[name], str, name, where) for name in (key, f"{key}_zh") if name in row]
    if not given or not all(text.strip() for text in given):
        raise BadInput(f"got no {key} {where}, allowed {key} and {key}_zh, try {key} = '...'")
    return {"en": given[0], "zh": given[-1]}


def _table(row: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = _typed(row.get(key, {}), dict, key, where)
    return found


def _typed(value: Any, kind: type[Any], key: str, where: str) -> Any:
    if not isinstance(value, kind):
        names = {str: "a text", dict: "a table", bool: "true or false"}
        raise BadInput(f"got {key} = {value!r} {where}, allowed {names[kind]}, try leaving it out")
    return value


def _known(where: str, what: str, given: Iterable[str], allowed: Collection[str]) -> None:
    for name in given:
        if name not in allowed:
            listed = ", ".join(allowed) or "none"
            raise BadInput(f"got unknown {what} {name!r} {where}, allowed {listed}, try {_near(name, allowed)}")


def _near(word: str, words: Collection[str]) -> str:
    return next(iter(get_close_matches(word, words, n=1, cutoff=0.4) or words), "leaving it out")


def _gaps(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_GAP.findall(text)))
