"""Every request is complete after resolving, or refused in one sentence that helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pico import SPEC, photo
from PIL import Image

from fluxloom.core.specs import KONTEXT_SIZES, MODELS
from fluxloom.errors import BadInput
from fluxloom.infer.pictures import pixel_hash
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.request import MAX_SEED, Reference, Request, Result, resolve
from fluxloom.infer.sizes import working_size

EDIT = SPEC.tasks["edit"]
DEV, SCHNELL, KONTEXT = MODELS["flux1-dev"], MODELS["flux1-schnell"], MODELS["flux1-kontext-dev"]


def test_open_fields_take_the_row() -> None:
    got = resolve(Request(prompt="a red cat"), SPEC)
    assert (got.task, got.steps, got.guidance, got.true_cfg) == ("generate", 3, 1.0, 3.0)
    assert (got.width, got.height, got.n, got.solver) == (64, 48, 1, "euler")
    assert (got.shift, got.text_length, got.strength, got.first_step) == (True, 8, None, 0)
    edit = resolve(Request(prompt="make it red", references=(Reference(photo()),)), SPEC)
    assert (edit.task, edit.steps, edit.true_cfg) == ("edit", 2, 1.5)


def test_given_fields_are_kept() -> None:
    given = {
        "negative": "dog", "width": 32, "height": 64, "n": 3, "steps": 7, "guidance": 2.5, "true_cfg": 2,
        "solver": "heun", "shift": False, "text_length": 8, "seed": 5,
    }  # fmt: skip
    got = resolve(Request(prompt="a cat", **given), SPEC)  # type: ignore[arg-type]
    assert {name: getattr(got, name) for name in given} == given
    assert got.to_dict().keys() == {field for field in got.__dataclass_fields__ if field != "inputs"}


def test_zero_is_a_value_and_not_unset() -> None:
    got = resolve(Request(prompt="a cat", guidance=0, seed=0, shift=False), SPEC)
    assert (got.guidance, got.seed, got.shift) == (0.0, 0, False)


def test_a_seed_left_out_is_drawn_in_32_bits() -> None:
    seeds = {resolve(Request(prompt="a cat"), SPEC).seed for _ in range(20)}
    assert len(seeds) > 15
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert max(seeds) > 2**24


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "an empty text as prompt, allowed a prompt in words"),
        ({"prompt": " \n\t"}, "an empty text"),
        ({"prompt": None}, "NoneType as prompt"),
        ({"prompt": "x" * 2_001}, "2,001 characters, allowed 2,000"),
        ({"negative": "x" * 2_001}, "negative prompt of 2,001 characters"),
        ({"negative": 5}, "int as negative prompt"),
        ({"negative": "dog", "true_cfg": 1}, "negative prompt with true_cfg 1"),
        ({"steps": 0}, "steps 0, allowed 1 to 1000, try 1"),
        ({"steps": -4}, "steps -4"),
        ({"steps": 1001}, "steps 1001, allowed 1 to 1000, try 1000"),
        ({"steps": 2.5}, "steps 2.5, allowed a whole number"),
        ({"steps": True}, "steps True, allowed a whole number"),
        ({"n": 0}, "n 0, allowed 1 to 1000"),
        ({"n": "two"}, "n 'two'"),
        ({"guidance": -1}, "guidance -1, allowed 0 to 100"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"guidance": "strong"}, "guidance 'strong', allowed a number"),
        ({"true_cfg": 0.5}, "true_cfg 0.5, allowed 1 to 100"),
        ({"true_cfg": float("inf")}, "true_cfg inf"),
        ({"true_cfg": 10**400}, "allowed 1 to 100"),
        ({"solver": "eular"}, "solver 'eular', allowed euler, heun, .* try euler"),
        ({"solver": "zzz"}, "try euler"),
        ({"solver": 3}, "solver 3"),
        ({"shift": 1.15}, "shift 1.15, allowed true or false"),
        ({"text_length": 4}, "text_length 4, allowed only 8"),
        ({"seed": -1}, "seed -1"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"seed": MAX_SEED, "n": 2}, "seed"),
        ({"strength": 0.5}, "strength without init"),
        ({"init": photo(), "strength": 0}, "strength 0, allowed over 0"),
        ({"init": photo(), "strength": 1.1}, "strength 1.1, allowed 0 to 1"),
        ({"init": photo()}, "strength 0.8 in 3 steps, which .* leaves nothing of init, .* try 6 steps"),
        ({"init": 5}, "int as picture"),
        ({"init": "no/such.png"}, "does not exist"),
        ({"width": 0}, "size 0x48"),
        ({"width": 17}, "size 17x48, allowed for pico: sides in multiples of 16, 32 or more, .* try 32x48"),
        ({"width": 16}, "try 32x48"),
        ({"width": 100_000, "height": 100_000}, "try 128x128"),
        ({"width": 10**30}, "size 1000000000"),
        ({"width": -64}, "size -64x48"),
        ({"width": -64, "height": 10**400}, "try 32x512"),
        ({"width": 144, "height": 128}, "at most 16,384 pixels"),
        ({"width": 64.0}, "width 64.0, allowed a whole number"),
        ({"references": (Reference(photo()),) * 11}, "11 references, allowed 10, try the 10 that matter most"),
        ({"references": (Reference(photo(), "style"),)}, "role 'style', allowed context or image"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        resolve(Request(**{"prompt": "a cat", **fields}), SPEC)


def test_limits_themselves_are_allowed() -> None:
    resolve(Request(prompt="x" * 2_000, steps=1_000, n=1_000, guidance=100, seed=MAX_SEED - 999), SPEC)
    resolve(Request(prompt="x", width=32, height=512, seed=0, true_cfg=1), SPEC)
    resolve(Request(prompt="x", init=photo(), strength=1), SPEC)


def test_members_refuse_what_they_cannot_do() -> None:
    with pytest.raises(BadInput, match="edit for flux1-dev, allowed generate, try nano or flux1-kontext-dev"):
        resolve(Request(prompt="x", references=(Reference(photo()),)), DEV)
    with pytest.raises(BadInput, match="generate for flux1-fill-dev, allowed fill"):
        resolve(Request(prompt="x"), MODELS["flux1-fill-dev"])
    with pytest.raises(BadInput, match="guidance for flux1-schnell"):
        resolve(Request(prompt="x", guidance=3.5), SCHNELL)
    assert resolve(Request(prompt="x"), SCHNELL).guidance is None
    assert resolve(Request(prompt="x"), SCHNELL).shift is False
    assert resolve(Request(prompt="x", text_length=128), DEV).text_length == 128
    with pytest.raises(BadInput, match="text_length 513, allowed 1 to 512, try 512"):
        resolve(Request(prompt="x", text_length=513), DEV)


# ---------------------------------------------------------------------------------------------- pictures


@given(st.integers(16, 3000), st.integers(16, 3000))
def test_every_picture_finds_an_allowed_size(width: int, height: int) -> None:
    w, h = working_size(SPEC, EDIT, width, height)
    assert resolve(Request(prompt="x", width=w, height=h), SPEC).width == w
    assert working_size(SPEC, EDIT, w, h) == (w, h)
    assert working_size(KONTEXT, KONTEXT.tasks["edit"], width, height) in KONTEXT_SIZES


@given(st.integers(600, 6000), st.floats(0.5, 2.0))
def test_large_pictures_are_worked_on_at_the_area_of_the_task(width: int, aspect: float) -> None:
    nano = MODELS["nano"]
    for row in nano.tasks.values():
        w, h = working_size(nano, row, width, round(width / aspect))
        assert 0.85 * 256**2 < w * h <= 256**2
        assert w / h == pytest.approx(aspect, rel=0.1)


def test_a_photo_is_edited_by_nano_at_the_size_it_was_taught() -> None:
    nano, reference = MODELS["nano"], (Reference(photo(4000, 3000)),)
    got = resolve(Request(prompt="x", references=reference), nano)
    assert (got.width, got.height) == (288, 224)
    got = resolve(Request(prompt="x", references=reference, width=512, height=384), nano)
    assert (got.width, got.height) == (512, 384)  # asked for
    got = resolve(Request(prompt="x", references=(Reference(photo(192, 128)),)), nano)
    assert (got.width, got.height) == (192, 128)  # nothing is enlarged


def test_output_follows_the_picture_unless_given() -> None:
    reference = (Reference(photo(57, 50)),)
    got = resolve(Request(prompt="x", references=reference), SPEC)
    assert (got.width, got.height) == (64, 48)
    assert got.inputs[0].image.size == (57, 50)  # resized later, for the model; the receipt hashes what came in
    got = resolve(Request(prompt="x", references=reference, height=128), SPEC)
    assert (got.width, got.height) == (64, 128)
    got = resolve(Request(prompt="x", init=photo(44, 80), steps=6), SPEC)
    assert (got.width, got.height, got.strength, got.task) == (48, 64, 0.8, "generate")


@pytest.mark.parametrize(("strength", "steps", "first"), [(1.0, 10, 0), (0.8, 10, 1), (0.75, 8, 2), (0.05, 10, 9)])
def test_strength_enters_the_path_by_the_official_rule(strength: float, steps: int, first: int) -> None:
    got = resolve(Request(prompt="x", init=photo(), strength=strength, steps=steps), SPEC)
    assert got.first_step == int((1 - strength) * steps) == first


def test_inputs_know_where_they_come_from(tmp_path: Path, pipeline: Pipeline) -> None:
    result = pipeline.run(Request(prompt="a cat", seed=1))[0]
    result.save(tmp_path / "drawn.png")
    photo().save(tmp_path / "photo.png")

    def only(picture: Any) -> dict[str, Any]:
        return resolve(Request(prompt="x", references=(Reference(picture),)), SPEC).inputs[0].to_dict()

    drawn, pixels = result.receipt.id, pixel_hash(result.image)
    size = [64, 48]
    assert only(result) == {"role": "context", "pixels": pixels, "file": None, "receipt": drawn, "size": size}
    assert only(tmp_path / "drawn.png") == {**only(result), "file": "drawn.png"}
    assert only(Image.open(tmp_path / "drawn.png")) == only(result)
    assert only(str(tmp_path / "photo.png"))["receipt"] is None


def test_a_result_that_was_drawn_on_is_no_parent(pipeline: Pipeline) -> None:
    result = pipeline.run(Request(prompt="a cat", seed=1))[0]
    touched = Result(result.image.copy(), result.receipt)
    touched.image.putpixel((0, 0), (1, 2, 3))
    entry = resolve(Request(prompt="x", init=touched, steps=6), SPEC).inputs[0]
    assert entry.receipt is None
    assert entry.pixels == pixel_hash(touched.image) != result.receipt.pixels
