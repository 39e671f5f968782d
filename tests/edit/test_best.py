"""The best of several: the order is that of the scores, and on nano the scores know what was asked for."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pico import SPEC, photo, save_model
from PIL import Image

import fluxloom as fl
from fluxloom.core import flow, shapes
from fluxloom.edit import best
from fluxloom.edit.best import Try, best_of, fulfilment, rank
from fluxloom.edit.drift import limits
from fluxloom.errors import BadInput
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.request import Reference, Request, resolve
from fluxloom.infer.runtime import Runtime
from fluxloom.world import Mix, Scene, render, sample_edit


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = save_model(tmp_path_factory.mktemp("pico"), SPEC)
    return Pipeline(Runtime.from_folder(folder, SPEC, torch.device("cpu"), torch.float32))


def asked(**fields: Any) -> Request:
    given = {"prompt": "make it blue", "references": (Reference(photo()),), "seed": 5, **fields}
    return Request(**given)


def test_tries_are_those_of_a_request_for_several(pipeline: Pipeline) -> None:
    chosen, tries = best_of(pipeline, asked(), 3)
    plain = pipeline.run(asked(n=3))
    assert sorted(one.result.seed for one in tries) == [5, 6, 7]
    assert {one.result.receipt.pixels for one in tries} == {result.receipt.pixels for result in plain}
    assert chosen is tries[0].result
    assert [one.score for one in tries] == sorted((one.score for one in tries), reverse=True)
    assert len({one.score for one in tries}) == 3
    assert tries[0].to_dict().keys() == {"seed", "score", "fulfilment", "delta_e", "changed", "exceeded"}
    again = pipeline.run(asked(seed=chosen.seed))[0]
    assert again.receipt.pixels == chosen.receipt.pixels


def test_drawings_have_nothing_to_keep(pipeline: Pipeline) -> None:
    _, tries = best_of(pipeline, asked(prompt="a red cat", references=()), 2)
    assert [(one.delta_e, one.changed) for one in tries] == [(None, None)] * 2
    assert all(one.score == one.fulfilment for one in tries)


def test_fulfilment_is_a_difference_of_losses(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one time, spelled out; and the empty instruction explains nothing."""
    monkeypatch.setattr(best, "TIMES", (0.7,))
    runtime, picture = pipeline.runtime, photo(seed=3)
    found = fulfilment(runtime, resolve(asked(), SPEC), picture)
    with torch.inference_mode():
        latent, source = runtime.encode(picture), shapes.pack(runtime.encode(photo()))
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
        x = shapes.pack(0.3 * latent + 0.7 * noise)
        ids = torch.cat((shapes.image_ids(6, 8), shapes.image_ids(6, 8, 1)))[None]
        losses = []
        for states in (runtime.read("make it blue"), runtime.read("")):
            v = runtime.transformer(
                torch.cat((x, source), 1), ids, states.tokens, torch.zeros(1, 8, 3), torch.tensor([0.7]),
                states.pooled, torch.ones(1),
            )[:, : x.shape[1]]  # fmt: skip
            losses.append(float((v - shapes.pack(flow.target(latent, noise))).square().mean()))
    assert found == pytest.approx(losses[1] - losses[0], rel=1e-3)
    assert abs(found) > 1e-4
    nothing = replace(resolve(asked(), SPEC), prompt="")
    assert fulfilment(runtime, nothing, picture) == pytest.approx(0, abs=1e-6)
    louder = resolve(asked(guidance=4.0, true_cfg=3.0), SPEC)
    assert fulfilment(runtime, louder, picture) == found  # of guidance no word


def test_scores_put_the_words_first_and_the_rest_second(pipeline: Pipeline) -> None:
    result = pipeline.run(asked())[0]

    def score(value: float, delta_e: float | None) -> float:
        return Try(result, value, delta_e, 0.1).score

    assert score(0.02, 1) > score(0.02, 4) > score(0.001, None) > score(-0.001, 0) > score(-0.02, 0)
    assert score(0.03, 5) == pytest.approx(0.03 / math.e)
    assert score(0.021, 4) < score(0.020, 1)


def test_a_lock_on_the_way_is_taken_at_its_word(pipeline: Pipeline) -> None:
    result = pipeline.run(asked())[0]
    request = resolve(asked(), SPEC)
    tried = best._try(pipeline.runtime, request, result)
    assert tried.changed is not None
    report = {"delta_e_outside": 7.5, "changed": 0.25, "whole": False}
    result.receipt.data["finish"] = [{"name": "lock", "settings": {}, "report": report}]
    locked = best._try(pipeline.runtime, request, result)
    assert (locked.delta_e, locked.changed, locked.fulfilment) == (7.5, 0.25, tried.fulfilment)
    report["whole"] = True
    assert best._try(pipeline.runtime, request, result).delta_e is None


def test_what_drifts_too_far_comes_last(pipeline: Pipeline) -> None:
    """Untouched and grainy: neither follows the words; where grain is not allowed, it comes last whatever its score."""
    first = pipeline.run(asked())[0]
    grain = np.random.default_rng(0).integers(-4, 5, (48, 64, 3))
    pictures = {"same": photo(), "grainy": Image.fromarray((np.asarray(photo()) + grain).clip(0, 255).astype(np.uint8))}
    results = {name: replace(first, image=image) for name, image in pictures.items()}
    for order in (["same", "grainy"], ["grainy", "same"]):
        tries = rank(pipeline.runtime, asked(), [results[name] for name in order], limits("psnr=50"))
        assert [one.result is results["same"] for one in tries] == [True, False]
        assert tries[0].exceeded == ()
        assert tries[1].exceeded[0].startswith("psnr 39")
    free = rank(pipeline.runtime, asked(), list(results.values()))
    assert [one.exceeded for one in free] == [(), ()]
    assert free[0].score > free[1].score


def test_numbers_that_make_no_sense(pipeline: Pipeline) -> None:
    with pytest.raises(BadInput, match="got best_of 0, allowed 1 to 64, try 1"):
        best_of(pipeline, asked(), 0)
    with pytest.raises(BadInput, match="got n 2 in a request for the best of 3, allowed 1"):
        best_of(pipeline, asked(n=2), 3)


def picture(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene, 256).pixels)


@pytest.mark.slow
def test_nano_knows_a_fulfilled_instruction() -> None:
    """The exact result of an edit, before the unchanged source and the result of another instruction."""
    runtime = fl.load("nano").pipeline.runtime
    edit = sample_edit(random.Random("fulfilled"), Mix.scenes(), "train", ["recolour"])
    words = edit.instruction(random.Random(0))
    request = resolve(Request(prompt=words, references=(Reference(picture(edit.source)),), seed=1), runtime.spec)
    other = edit.source.put(place="desert" if edit.source.backdrop.place != "desert" else "sea")
    right, undone, wrong = (fulfilment(runtime, request, picture(scene)) for scene in (edit.target, edit.source, other))
    assert right > 0 > undone > wrong, (words, right, undone, wrong)
