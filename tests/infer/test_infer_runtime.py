"""The runtime: loading, text states, pictures to latents and back, velocities of several rows at once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import LENGTH, SPEC, VOCABULARY, photo, save_model

from fluxloom.core import shapes
from fluxloom.core.specs import MODELS, ModelSpec
from fluxloom.errors import Failure, WeightsError
from fluxloom.infer.conditions import Row
from fluxloom.infer.pictures import to_tensor
from fluxloom.infer.reading import OwnTower
from fluxloom.infer.runtime import Runtime
from fluxloom.weights.load import save_card, save_compact

HW = (6, 8)
CPU = torch.device("cpu")


def open_model(folder: Path, spec: ModelSpec = SPEC, dtype: torch.dtype = torch.float32) -> Runtime:
    return Runtime.from_folder(folder, spec, CPU, dtype)


def make_row(runtime: Runtime, prompt: str, context: torch.Tensor | None = None, guidance: float | None = 1.0) -> Row:
    ids = shapes.image_ids(*HW)
    if context is not None:
        ids = torch.cat((ids, shapes.image_ids(*HW, index=1)))
    return Row(runtime.read(prompt), ids, context, guidance)


@torch.inference_mode()
def direct(runtime: Runtime, x: torch.Tensor, t: float, row: Row) -> torch.Tensor:
    """One row by hand."""
    img = x if row.context is None else torch.cat((x, row.context.expand(len(x), -1, -1)), dim=1)
    size = len(x)
    out: torch.Tensor = runtime.transformer(
        img,
        row.ids.expand(size, -1, -1),
        row.text.tokens.expand(size, -1, -1),
        torch.zeros(size, LENGTH, 3),
        torch.full((size,), t),
        row.text.pooled.expand(size, -1),
        None if row.guidance is None else torch.full((size,), row.guidance),
    )
    return out[:, : x.shape[1]]


# ---------------------------------------------------------------------------------------------- velocity


def test_velocity_is_one_forward_of_all_rows(runtime: Runtime) -> None:
    calls: list[torch.Size] = []
    hook = runtime.transformer.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    x = torch.randn(3, 12, 64)
    rows = (make_row(runtime, "a red cat"), make_row(runtime, "a dog", guidance=4.0))
    got = runtime.velocity(x, 0.7, rows)
    hook.remove()
    assert calls == [(6, 12, 64)]
    for v, row in zip(got, rows, strict=True):
        torch.testing.assert_close(v, direct(runtime, x, 0.7, row), atol=1e-5, rtol=1e-5)
    assert float((got[0] - got[1]).abs().max()) > 1e-3


def test_reference_tokens_are_seen_and_not_returned(runtime: Runtime) -> None:
    x, context = torch.randn(2, 12, 64), torch.randn(1, 12, 64)
    row = make_row(runtime, "make it red", context)
    (v,) = runtime.velocity(x, 0.4, (row,))
    assert v.shape == x.shape
    torch.testing.assert_close(v, direct(runtime, x, 0.4, row), atol=1e-5, rtol=1e-5)
    (without,) = runtime.velocity(x, 0.4, (make_row(runtime, "make it red"),))
    assert float((v - without).abs().max()) > 1e-3
    as_target = replace(row, ids=torch.cat((shapes.image_ids(*HW), shapes.image_ids(*HW))))
    assert float((v - runtime.velocity(x, 0.4, (as_target,))[0]).abs().max()) > 1e-5  # its index 1 matters


def test_members_without_guidance(tmp_path: Path) -> None:
    spec = replace(SPEC, transformer=replace(SPEC.transformer, guidance_embed=False))
    runtime = open_model(save_model(tmp_path, spec), spec)
    row = make_row(runtime, "a cat", guidance=None)
    x = torch.randn(1, 12, 64)
    torch.testing.assert_close(runtime.velocity(x, 1.0, (row,))[0], direct(runtime, x, 1.0, row))


def test_bfloat16_computes_in_it_and_answers_in_float32(folder: Path, runtime: Runtime) -> None:
    half = open_model(folder, dtype=torch.bfloat16)
    x = torch.randn(1, 12, 64)
    (v,) = half.velocity(x, 0.7, (make_row(half, "a cat"),))
    (exact,) = runtime.velocity(x, 0.7, (make_row(runtime, "a cat"),))
    assert v.dtype == torch.float32
    assert half.transformer.img_in.weight.dtype == torch.bfloat16
    assert half.autoencoder.decoder.conv_in.weight.dtype == torch.float32
    relative = float((v - exact).norm() / exact.norm())
    assert 1e-4 < relative < 0.03
    assert half.machine()["dtype"] == "bfloat16"


# ---------------------------------------------------------------------------------------------- text


def test_text_states_are_those_of_the_tower_and_remembered(folder: Path) -> None:
    runtime = open_model(folder)
    reader = runtime.reader
    assert isinstance(reader, OwnTower)
    states = runtime.read("a red cat")
    expected = reader.tower(torch.tensor([reader.tokenizer.encode("a red cat")]))
    assert torch.equal(states.tokens, expected.tokens)
    assert torch.equal(states.pooled, expected.pooled)
    assert states.tokens.shape == (1, LENGTH, 16)
    assert runtime.read("a red cat") is states
    assert runtime.read("a red dog") is not states


def test_the_cache_forgets_what_was_used_longest_ago(folder: Path) -> None:
    runtime = open_model(folder)
    first, second = runtime.read("a"), runtime.read("b")
    for i in range(62):
        runtime.read(f"cat {i}")
    assert runtime.read("a") is first  # still there, and used again
    runtime.read("one more")
    assert runtime.read("a") is first
    assert runtime.read("b") is not second


@pytest.mark.parametrize(
    ("prompt", "notes"),
    [
        ("a red cat", []),
        ("a red cat a red cat a blue dog", ["the prompt is too long for pico; this was cut off: blue dog"]),
        ("make it 狗 ! 狗 猫", ["pico does not know these words: 狗, !"]),
        ("a a a a a a reds 5", ["cut off: s", "words: 5"]),
        ("", []),
        ("a " * 30, ["a a a … and 3 more"]),
    ],
)
def test_notes(runtime: Runtime, prompt: str, notes: list[str]) -> None:
    got = runtime.notes(prompt)
    assert len(got) == len(notes)
    for text, expected in zip(got, notes, strict=True):
        assert expected in text


# ---------------------------------------------------------------------------------------------- pictures


def test_encode_and_decode_go_through_the_autoencoder(runtime: Runtime) -> None:
    z = runtime.encode(photo())
    assert z.shape == (1, 16, *HW)
    assert torch.equal(z, runtime.autoencoder.encode(to_tensor(photo())))
    picture = runtime.decode(shapes.pack(z), HW)
    assert picture.size == (64, 48)
    assert len(set(picture.tobytes())) > 20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_make_no_picture(runtime: Runtime, value: float) -> None:
    x = torch.zeros(1, 12, 64)
    x[0, 3, 3] = value
    with pytest.raises(Failure, match="not finite"):
        runtime.decode(x, HW)


# ---------------------------------------------------------------------------------------------- loading


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_damage_is_found_at_loading(copy: Path) -> None:
    shard = next(copy.glob("model-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(WeightsError, match=shard.name):
        open_model(copy)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (VOCABULARY[:-1], "different words"),
        ([*VOCABULARY[:-1], VOCABULARY[4]], "different words"),
        ([*VOCABULARY[3:], *VOCABULARY[:3]], "no usable"),
    ],
)
def test_vocabulary_that_does_not_fit(copy: Path, words: list[str], message: str) -> None:
    (copy / "vocab.txt").write_text("\n".join(words), "utf-8")
    save_card(copy, SPEC.name, {})
    with pytest.raises(WeightsError, match=message):
        open_model(copy)


def test_no_vocabulary(copy: Path) -> None:
    (copy / "vocab.txt").unlink()
    save_card(copy, SPEC.name, {})
    with pytest.raises(WeightsError, match=r"no usable .*vocab\.txt"):
        open_model(copy)


def test_weights_of_another_shape(copy: Path) -> None:
    wider: Any = replace(SPEC.transformer, depth_single_blocks=2)
    with pytest.raises(WeightsError, match=r"Transformer: missing: single_blocks\.1"):
        open_model(copy, replace(SPEC, transformer=wider))


def test_weights_of_no_module(copy: Path) -> None:
    save_compact({"adapter.weight": torch.ones(3)}, copy)
    save_card(copy, SPEC.name, {})
    with pytest.raises(WeightsError, match=r"weights adapter\.weight in .* allowed those of transformer"):
        open_model(copy)


def test_members_with_other_text_encoders(copy: Path) -> None:
    with pytest.raises(WeightsError, match="members with their own text tower"):
        open_model(copy, MODELS["flux1-dev"])


def test_machine(runtime: Runtime) -> None:
    machine = runtime.machine()
    assert (machine["device"], machine["dtype"], machine["threads"]) == ("cpu", "float32", 1)
    assert machine["processor"]
    assert "-" in machine["system"]
