"""What is asked: the same on every run, worded by the world, true of the truth and false of everything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from fluxloom.core.specs import MODELS
from fluxloom.errors import BadInput
from fluxloom.evals.cases import (
    DRAWING,
    GROUPS,
    HELD_OUT,
    LABELS,
    SUITES,
    Case,
    cases,
    chosen,
    mentions,
    part_of,
    seed_from,
    value_of,
    visible,
)
from fluxloom.evals.facts import Coloured, Fact, Gone, Label, LeftOf, NoBoard, Sized, There, Word
from fluxloom.evals.world import request_for
from fluxloom.infer.request import resolve
from fluxloom.measure.recogniser import Reading, Seen
from fluxloom.world import EDIT_KINDS, Backdrop, Item, Scene, heldout_reasons, load_atlas
from fluxloom.world.split import style_held

COUNT = 4
ReadScene = Callable[[Scene], Reading]


@cache
def made(group: str) -> tuple[Case, ...]:
    return tuple(cases("dev", 7, COUNT, [group]))


# ---------------------------------------------------------------------------------------------- every group


@pytest.mark.parametrize("group", GROUPS)
def test_the_truth_holds_and_nothing_else_does(group: str, read_scene: ReadScene, blank: Reading) -> None:
    for case in made(group):
        assert case.facts
        truth = read_scene(case.scene)
        assert [str(fact) for fact in case.facts if not fact.holds(truth)] == [], case.prompt
        assert not all(fact.holds(blank) for fact in case.facts), case.prompt
        if case.edit is not None:  # nor is the picture that is to be edited what it should become
            assert not all(fact.holds(read_scene(case.edit.source)) for fact in case.facts), case.prompt


@pytest.mark.parametrize("group", GROUPS)
def test_both_languages_and_requests_that_the_model_takes(group: str) -> None:
    assert [case.language for case in made(group)] == ["en", "zh"] * (COUNT // 2)
    for case in made(group):
        assert any("一" <= letter <= "鿿" for letter in case.prompt) == (case.language == "zh")
        request = resolve(request_for(case, case.truth(), {}), MODELS["nano"])
        task = "edit" if case.edit else "generate"
        row = MODELS["nano"].task(task)
        assert row is not None
        assert (request.task, request.seed, request.n) == (task, case.seed, 1)
        assert (request.steps, request.true_cfg, request.solver) == (row.steps, row.true_cfg, row.solver)
        assert (request.width, request.height) == (256, 256)


def test_a_case_is_a_function_of_split_seed_group_and_number() -> None:
    one = list(cases("dev", 1, 3, ["single", "edit-add"]))
    assert one == list(cases("dev", 1, 3, ["single", "edit-add"]))
    longer = list(cases("dev", 1, 5, ["edit-add", "single"]))
    assert one == longer[5:8] + longer[:3]
    for part, seed in (("dev", 2), ("test", 1)):
        other = list(cases(part_of(part), seed, 3, ["single", "edit-add"]))
        assert not {case.prompt for case in one} & {case.prompt for case in other}
    assert len({case.seed for case in longer}) == len(longer)


def test_seeds_of_the_test_split_follow_the_weights() -> None:
    first, second = seed_from("sha256:" + "0123456789abcdef" * 4), seed_from("sha256:" + "1" * 64)
    assert (first, second) == (0x0123456789AB, 0x111111111111)


def test_groups_and_suites_by_name() -> None:
    assert chosen(()) == GROUPS
    assert chosen(("edits",)) == SUITES["edits"] == tuple(f"edit-{kind}" for kind in EDIT_KINDS)
    assert chosen(("time", "single", "single")) == ("single", "time")
    with pytest.raises(BadInput, match=r"got groups cats, allowed draw, .*edit-add.*, try draw"):
        chosen(("single", "cats"))
    with pytest.raises(BadInput, match="got split 'train', allowed dev, test"):
        part_of("train")


# ---------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("group", DRAWING)
def test_drawing_asks_for_trained_combinations_only(group: str) -> None:
    assert all(not heldout_reasons(case.scene) for case in made(group))


@pytest.mark.parametrize("group", [name for name, ask in HELD_OUT.items() if ask.held])
def test_held_out_groups_show_what_was_held_out(group: str) -> None:
    for case in made(group):
        reasons = {reason.partition(":")[0] for reason in heldout_reasons(case.scene)}
        assert reasons == {group.removeprefix("held-")}
    if group == "held-style":
        assert all(style_held(case.scene.items[0].concept, case.scene.style) for case in made(group))


@pytest.mark.parametrize("label", LABELS)
def test_a_label_that_is_judged_is_said(label: str) -> None:
    for case in made(label):
        assert mentions(case.scene, label, case.prompt, case.language, "train")
        assert not mentions(case.scene, label, "a cat" if case.language == "en" else "一只猫", case.language, "train")
        value = value_of(case.scene, label)
        assert case.facts == ((Word(str(value)) if label == "sign" else Label(label, str(value))),)


def test_labels_are_asked_for_evenly_in_both_languages() -> None:
    for label in ("time", "style"):
        values = LABELS[label]
        asked = Counter((c.language, value_of(c.scene, label)) for c in cases("dev", 3, 2 * len(values), [label]))
        assert asked == {(language, value): 1 for language in ("en", "zh") for value in values}


def test_the_phrasing_group_uses_what_training_never_said() -> None:
    for case in cases("dev", 7, 14, ["phrasing"]):
        (fact,) = case.facts
        label = "sign" if isinstance(fact, Word) else fact.field if isinstance(fact, Label) else ""
        assert mentions(case.scene, label, case.prompt, case.language, "test")
        assert not heldout_reasons(case.scene)


def test_sides_are_said_where_order_is_judged() -> None:
    for case in cases("dev", 7, 8, ["order"]):
        words = ("左", "右") if case.language == "zh" else ("left", "right")
        assert any(word in case.prompt for word in words)


def test_synonyms_stand_for_the_usual_name() -> None:
    for case in made("synonym"):
        concept = load_atlas().concept(case.scene.items[0].concept)
        names = concept.en_more if case.language == "en" else concept.zh_more
        assert any(name in case.prompt for name in names)


def test_what_cannot_be_seen_is_not_judged() -> None:
    item = Item("cat", 0.5, 0.9, 0.4)

    def scene(place: str, time: str, season: str | None = None) -> Scene:
        return Scene(Backdrop(place, time, "clear" if season else None, season, "blue", (1,) * 6).fit(), "3d", (item,))

    assert not visible(scene("room", "dawn"), "time")  # a room at dawn is a room by day
    assert visible(scene("meadow", "dawn", "summer"), "time")
    assert not visible(scene("city", "day", "spring"), "season")
    assert visible(scene("meadow", "day", "winter"), "season")
    assert visible(scene("room", "dawn"), "place")
    for group in ("time", "weather", "season", "colour", "sign", "edit-time", "edit-sign_text"):
        for case in made(group):
            assert case.scene.filter is None
            assert visible(case.scene, group.removeprefix("edit-"))


# ---------------------------------------------------------------------------------------------- facts


def seen(concept: str, **more: object) -> Seen:
    fields = {"p": 0.9, "x": 0.5, "y": 0.5, "area": 0.1, "colour": None, "colour_p": 0.9}
    return Seen(concept, **{**fields, **more})  # type: ignore[arg-type]


FALSE_THEN_TRUE: list[tuple[Fact, list[Seen], list[Seen]]] = [
    (There("cat"), [seen("dog")], [seen("dog"), seen("cat")]),
    (Gone("cat"), [seen("dog"), seen("cat")], [seen("dog")]),
    (Coloured("cat", "blue"), [seen("cat")], [seen("cat", colour="blue")]),
    (Coloured("cat", "blue"), [seen("dog", colour="blue")], [seen("cat", colour="blue")]),
    (Coloured("apple", "red"), [seen("apple", colour="green")], [seen("apple")]),  # apples are red by themselves
    (LeftOf("cat", "dog"), [seen("cat", x=0.6), seen("dog")], [seen("cat", x=0.4), seen("dog")]),
    (LeftOf("cat", "dog"), [seen("cat", x=0.4)], [seen("cat", x=0.4), seen("dog")]),
    (Sized("cat", "bigger", 0.2), [seen("cat", area=0.19)], [seen("cat", area=0.21)]),
    (Sized("cat", "smaller", 0.2), [seen("dog")], [seen("cat", area=0.19)]),
]


@pytest.mark.parametrize(("fact", "false", "true"), FALSE_THEN_TRUE)
def test_facts_of_things(fact: Fact, false: list[Seen], true: list[Seen], blank: Reading) -> None:
    assert not fact.holds(replace(blank, things=tuple(false)))
    assert fact.holds(replace(blank, things=tuple(true)))
    assert not isinstance(fact, There) or not fact.holds(replace(blank, top=tuple(true)))  # unsure ones do not count


def test_facts_of_signs(blank: Reading) -> None:
    assert Word("OPEN").holds(replace(blank, sign="OPEN"))
    assert not Word("OPEN").holds(replace(blank, sign="OPFN"))
    assert NoBoard().holds(replace(blank, sign_board=0.3))
    assert not NoBoard().holds(replace(blank, sign_board=0.6))


def test_resizing_half_way_is_enough(read_scene: ReadScene) -> None:
    for case in made("edit-resize"):
        (fact,) = case.facts
        edit = case.edit
        assert isinstance(fact, Sized)
        assert edit is not None
        before, after = (read_scene(s).things[edit.subject].area for s in (edit.source, edit.target))
        np.testing.assert_allclose(np.log(fact.area), (np.log(before) + np.log(after)) / 2, rtol=1e-6)
        assert fact.way == edit.value == ("bigger" if after > before else "smaller")


def test_removal_keeps_the_place(blank: Reading) -> None:
    assert all(any(isinstance(fact, Label) and fact.field == "place" for fact in c.facts) for c in made("edit-remove"))
