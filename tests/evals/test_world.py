"""Running cases: what is read of whom, what is kept, and pictures judged by the facts of others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fluxloom as fl
from fluxloom.errors import BadInput
from fluxloom.evals.cases import GROUPS, SUITES, Case, Truth, cases
from fluxloom.evals.report import BARS, BOUND, Summary, summarise
from fluxloom.evals.suite import Plan, write_report
from fluxloom.evals.world import PAINTERS, UNTOUCHED, Kept, Outcome, evaluate, partners, preserved, rendered
from fluxloom.infer.pipeline import Pipeline
from fluxloom.measure.recogniser import Reading
from fluxloom.world import Scene

ReadScene = Callable[[Scene], Reading]
FEW = ("single", "edit-add")


@cache
def pipeline() -> Pipeline:
    return fl.load("nano").pipeline


@cache
def pairs() -> tuple[tuple[Case, Truth], ...]:
    return tuple((case, case.truth()) for case in few())


@cache
def few() -> tuple[Case, ...]:
    return tuple(cases("dev", 1, 2, FEW))


def outcome_of(case: Case, read_scene: ReadScene, scene: Scene | None = None) -> Outcome:
    """As if the model had drawn a scene; without one, the truth."""
    readings = {painter: read_scene(case.scene) for painter in PAINTERS}
    readings["model"] = read_scene(scene or case.scene)
    return Outcome(case, readings)


# ---------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("batch", [1, 3])
def test_every_painter_is_read(batch: int, truth_reader: Any) -> None:
    reader = truth_reader(few())
    outcomes = list(evaluate(pairs(), pipeline(), reader, batch, keep=1, settings={"steps": 1, "true_cfg": 1.0}))
    assert [outcome.case for outcome in outcomes] == list(few())
    for outcome in outcomes:
        edit = outcome.case.edit is not None
        assert tuple(outcome.readings) == ((*PAINTERS, UNTOUCHED) if edit else PAINTERS)
        assert outcome.passed("true")
        assert not outcome.passed("model")  # which the reader does not know
        assert not outcome.passed("round trip")
        assert not edit or not outcome.passed(UNTOUCHED)
        assert (outcome.picture is not None) == (outcome.case.index == 0)
        assert (outcome.source is not None) == (outcome.case.index == 0 and edit)
        assert (outcome.kept is not None) == edit
        assert outcome.kept is None or 20 < outcome.kept.ceiling < 60
    assert reader.batches == {1: [3, 3, 4, 4], 3: [10, 4]}[batch]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_render_the_same_in_the_same_order() -> None:
    for (case, truth), (expected, pictures) in zip(rendered("dev", 1, 2, FEW, workers=2), pairs(), strict=True):
        assert case == expected
        assert truth.target.tobytes() == pictures.target.tobytes()
        assert (truth.source is None) == (pictures.source is None)
        assert truth.change is None or np.array_equal(truth.change, pictures.change)


def test_settings_reach_the_model(truth_reader: Any) -> None:
    with pytest.raises(BadInput, match="steps"):
        list(evaluate(pairs()[:1], pipeline(), truth_reader(()), settings={"steps": 0}))


def test_what_was_kept_is_measured_outside_of_the_change() -> None:
    target, change = np.full((8, 8, 3), 100, np.uint8), np.zeros((8, 8), bool)
    change[:, :4] = True
    drawn, trip = target.copy(), target.copy()
    drawn[:, :4], drawn[:, 4:] = 255, 110  # what was to change does not count
    trip[:, 4:] = 101
    pictures = [Image.fromarray(array) for array in (drawn, trip)]
    kept = preserved(Truth(Image.fromarray(target), Image.fromarray(target), change), *pictures)
    assert kept is not None
    assert kept.model == pytest.approx(20 * np.log10(255 / 10))
    assert kept.ceiling == pytest.approx(20 * np.log10(255 / 1))
    change[:, :5] = True
    assert preserved(Truth(Image.fromarray(target), Image.fromarray(target), change), *pictures) is None
    assert preserved(Truth(Image.fromarray(target)), *pictures) is None


# ---------------------------------------------------------------------------------------------- shuffling


def test_a_picture_is_never_judged_twice_by_the_same_facts(read_scene: ReadScene) -> None:
    outcomes = [outcome_of(case, read_scene) for case in cases("dev", 1, 6, ("single", "style", "edit-filter"))]
    for outcome, other in zip(outcomes, partners(outcomes), strict=True):
        assert other is not None
        assert other.group == outcome.case.group
        assert other is not outcome.case
        assert other.facts != outcome.case.facts
        assert not outcome.passed("model", other)  # what shows the truth does not show another's


def test_without_other_facts_there_is_no_partner(read_scene: ReadScene) -> None:
    (case,) = cases("dev", 1, 1, ("single",))
    twin = replace(case, index=1)
    assert partners([outcome_of(case, read_scene), outcome_of(twin, read_scene)]) == [None, None]


def test_rates_of_the_truth_of_others_and_of_nothing(read_scene: ReadScene, blank: Reading) -> None:
    asked = list(cases("dev", 1, 2, GROUPS))
    summary = summarise([outcome_of(case, read_scene) for case in asked])
    assert {row.rates["model"].share for row in summary.rows.values()} == {1.0}
    assert all(bar.judge(summary)["reached"] for bar in BARS if bar.unit != "dB")
    nothing = [Outcome(case, dict.fromkeys(PAINTERS, blank)) for case in asked]
    assert {row.rates["model"].hits for row in summarise(nothing).rows.values()} == {0}


# ---------------------------------------------------------------------------------------------- reports


def plan_of(reader: Any, **more: Any) -> Plan:
    fields = {"part": "dev", "seed": None, "only": FEW, "count": 2, "settings": {"steps": 1, "true_cfg": 1.0}}
    return Plan.of(pipeline(), reader, **{**fields, **more})


def test_a_report_names_everything_that_made_it(truth_reader: Any, tmp_path: Path) -> None:
    plan = plan_of(truth_reader(few()))
    outcomes = list(plan.run(keep=2))
    paths = write_report(tmp_path / "new", plan, outcomes)
    assert [path.name for path in paths] == ["report.md", "report.json", "sheet-draw.webp", "sheet-edit.webp"]
    whole = json.loads(paths[1].read_text("utf-8"))
    assert (whole["weights"], whole["recogniser"]) == (pipeline().runtime.content, "sha256:truth")
    assert (whole["seed"], whole["split"], whole["settings"]["steps"]) == (1, "dev", 1)
    assert whole["versions"]["torch"]
    assert len(whole["cases"]) == plan.total == 4
    for case, entry in zip(few(), whole["cases"], strict=True):
        assert (entry["prompt"], entry["seed"]) == (case.prompt, case.seed)
        assert entry["facts"] == json.loads(json.dumps([fact.to_dict() for fact in case.facts]))
        assert all(entry["verdicts"]["true"])
        assert not all(entry["verdicts"]["model"])
        assert entry["read"]["place"]["label"] == "none"
        assert case.edit is None or entry["kept"]["ceiling"] > 20
    text = paths[0].read_text("utf-8")
    assert "| the one thing is right | at least 85 % | 0.0 % | **no** |" in text
    assert "| place | at least 95 % | – | not measured |" in text
    assert pipeline().runtime.content in text
    with Image.open(paths[2]) as draw, Image.open(paths[3]) as edit:
        assert edit.width > draw.width > 2 * 160


def test_plans(truth_reader: Any) -> None:
    reader = truth_reader(())
    assert plan_of(reader, part="test").seed == int(pipeline().runtime.content[7:19], 16)
    assert plan_of(reader, seed=5).seed == 5
    assert plan_of(reader, only=()).total == 2 * len(GROUPS)
    with pytest.raises(BadInput, match="got seed 5 for test"):
        plan_of(reader, part="test", seed=5)
    with pytest.raises(BadInput, match="got split 'train'"):
        plan_of(reader, part="train")


def test_sheets_are_framed_by_success(read_scene: ReadScene, blank: Reading) -> None:
    from fluxloom.evals.sheet import FRAME, GAP, GREEN, RED, failure, sheet

    case = few()[0]
    truth = case.truth().target
    good = replace(outcome_of(case, read_scene), picture=truth)
    bad = replace(good, readings={**good.readings, "model": blank})
    page = np.asarray(sheet([good, bad]))
    frames = {tuple(int(v) for v in page[y, GAP + 1]) for y in range(page.shape[0])}
    assert GREEN in frames
    colours = [tuple(int(v) for v in pixel) for pixel in page[page.shape[0] // 3]]
    assert colours.count(GREEN) == colours.count(RED) == 2 * FRAME
    assert (failure(good), failure(bad)) == ("", f"not {', '.join(map(str, case.facts))}; read no thing")


def test_preservation_is_of_fulfilled_edits_that_leave_nothing_open(read_scene: ReadScene, blank: Reading) -> None:
    kept = {"edit-add": 10.0, "edit-remove": 30.0, "edit-recolour": 32.0}
    outcomes = [
        replace(outcome_of(case, read_scene), kept=Kept(kept[case.group] - case.index, 34.0))
        for case in cases("dev", 1, 2, tuple(kept))
    ]
    failed = [replace(outcomes[-1], readings=dict.fromkeys(PAINTERS, blank), kept=Kept(1.0, 34.0))]
    summary = summarise(outcomes + failed)
    assert [(p.name, p.n, p.model) for p in summary.kept.values()] == [
        ("edit-add", 2, 9.5),
        ("edit-remove", 2, 29.5),
        ("edit-recolour", 2, 31.5),
        (BOUND, 4, 30.5),
    ]
    assert summary.kept[BOUND].difference.value == -3.5
    (bar,) = (bar for bar in BARS if bar.unit == "dB")
    assert bar.judge(summary)["reached"] is None  # the other kinds were not run
    every = dict.fromkeys(SUITES["edits"], summary.rows["edits"])
    whole = bar.judge(Summary(every, summary.kept))
    assert (whole["measured"], whole["reached"]) == (3.5, True)


def rows(outcomes: Sequence[Outcome]) -> list[str]:
    return list(summarise(outcomes).rows)


def test_only_what_was_run_has_rows(read_scene: ReadScene) -> None:
    outcomes = [outcome_of(case, read_scene) for case in few()[:2]]
    assert rows(outcomes) == ["single", "draw", "trained"]
    assert list(summarise(outcomes).kept) == []
    assert rows([]) == []
