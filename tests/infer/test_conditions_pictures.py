"""Masks, new canvas, control pictures, several references and pictures among words: what is asked for, what is refused,
and what comes of it on a whole model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pico import SPEC, photo, save_model
from PIL import Image
from tiny import randomise
from torch import Tensor

from fluxloom.core import shapes
from fluxloom.core.redux import Redux, ReduxSpec
from fluxloom.core.solvers import SOLVERS
from fluxloom.core.specs import MODELS, ModelSpec
from fluxloom.core.text import TextStates
from fluxloom.errors import BadInput, Failure, ReceiptError, WeightsError
from fluxloom.infer import canvas, conditions, request
from fluxloom.infer.conditions import Known, Place, by_index, by_offset, condition
from fluxloom.infer.pictures import to_tensor
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.reading import OwnTower
from fluxloom.infer.receipt import Receipt
from fluxloom.infer.replay import replay
from fluxloom.infer.request import Reference, Request, Result, resolve
from fluxloom.infer.runtime import Runtime
from fluxloom.infer.sample import drive, trajectory

DEV, FILL, REDUX = MODELS["flux1-dev"], MODELS["flux1-fill-dev"], MODELS["flux1-redux-dev"]
CANNY, DEPTH = MODELS["flux1-canny-dev"], MODELS["flux1-depth-dev"]
CPU = torch.device("cpu")


def marked(width: int = 64, height: int = 48, box: tuple[int, int, int, int] = (16, 16, 40, 32)) -> Image.Image:
    """A mask: white in a box."""
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def like(name: str, **facts: Any) -> ModelSpec:
    """pico with the task, the channels and the control of another member."""
    member = MODELS[name]
    tasks = {task: replace(SPEC.tasks["generate"], true_cfg=1.0) for task in member.tasks}
    transformer = replace(SPEC.transformer, in_channels=member.transformer.in_channels)
    return replace(
        SPEC, tasks=MappingProxyType(tasks), transformer=transformer, control=member.control, name=name, **facts
    )


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pipeline]:
    made: dict[str, Pipeline] = {}

    def make(name: str) -> Pipeline:
        if name not in made:
            spec = like(name, size_multiple=MODELS[name].size_multiple)
            folder = save_model(tmp_path_factory.mktemp(name), spec)
            made[name] = Pipeline(Runtime.from_folder(folder, spec, CPU, torch.float32))
        return made[name]

    return make


# ---------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("spec", "fields", "task"),
    [
        (SPEC, {"init": photo(), "mask": marked()}, "generate"),
        (SPEC, {"init": photo(), "expand": (16, 0, 0, 0), "references": (Reference(photo()),)}, "edit"),
        (FILL, {"init": photo(), "mask": marked()}, "fill"),
        (FILL, {"init": photo(), "expand": [0, 8, 0, 0], "prompt": ""}, "fill"),
        (CANNY, {"control": photo()}, "control"),
        (CANNY, {"control": photo(), "init": photo(), "mask": marked()}, "control"),
        (DEPTH, {"control": photo(), "control_ready": True}, "control"),
        (REDUX, {"references": (Reference(photo(), "image"), Reference(photo(), "image", 0.5)), "prompt": ""}, "redux"),
    ],
)
def test_the_task_is_what_the_pictures_say(spec: ModelSpec, fields: dict[str, Any], task: str) -> None:
    got = resolve(Request(**{"prompt": "a cat", **fields}), spec)
    assert got.task == task
    assert (got.steps, got.guidance) == (spec.tasks[task].steps, spec.tasks[task].guidance)


@pytest.mark.parametrize(
    ("spec", "fields", "message"),
    [
        (SPEC, {"mask": marked()}, "mask without init, allowed only with the picture"),
        (SPEC, {"init": photo(), "mask": marked(64, 32)}, "a mask of 64x32 for a picture of 64x48, allowed the same"),
        (SPEC, {"init": photo(), "mask": Image.new("L", (64, 48))}, "black all over, allowed some white"),
        (SPEC, {"init": photo(), "mask": 3}, "int as picture"),
        (SPEC, {"expand": (1, 1, 1, 1)}, "expand without init"),
        (SPEC, {"init": photo(), "expand": (0, 0, 0, 0)}, "expand by 0 pixels all round"),
        (SPEC, {"init": photo(), "expand": (1, 1, 1)}, r"expand \(1, 1, 1\), allowed \(left, top, right, bottom\)"),
        (SPEC, {"init": photo(), "expand": 5}, "expand 5"),
        (SPEC, {"init": photo(), "expand": (0, 0, -8, 0)}, "expand -8, allowed 0 to 8192, try 0"),
        (SPEC, {"init": photo(), "expand": (0, 0, 1.5, 0)}, "expand 1.5, allowed a whole number"),
        (SPEC, {"init": photo(), "expand": (8192,) * 4}, "around 64x48 pixels, allowed at most 178,956,970 in all"),
        (SPEC, {"control": photo()}, "control for pico, allowed generate, edit, try flux1-canny"),
        (CANNY, {"control": photo(), "control_model": "x.onnx"}, "control_model for flux1-canny-dev, allowed where"),
        (CANNY, {}, "generate for flux1-canny-dev, allowed control"),
        (DEPTH, {"control": photo()}, "a picture to take depth from and no model to do it, .* try control_ready"),
        (DEPTH, {"control": photo(), "control_model": "no/such.onnx"}, "'no/such.onnx', which does not exist"),
        (DEPTH, {"control": photo(), "control_model": "model.pt"}, "'model.pt', which is no .onnx file"),
        (DEPTH, {"control": photo(), "control_model": "a.onnx", "control_ready": True}, "control_model with"),
        (SPEC, {"control_ready": True}, "control_ready without control"),
        (SPEC, {"control_ready": 1}, "control_ready 1, allowed true or false"),
        (SPEC, {"control_model": "a.onnx"}, "control_model for pico"),
        (SPEC, {"positions": "index"}, "positions without several references"),
        (SPEC, {"positions": "uno", "references": (Reference(photo()),) * 2}, "positions 'uno', allowed index, offset"),
        (SPEC, {"references": (Reference(photo(), weight=0.5),)}, "context reference with weight 0.5, allowed 1"),
        (REDUX, {"references": (Reference(photo(), "image", 11),)}, "weight 11, allowed 0 to 10, try 10"),
        (REDUX, {"references": (Reference(photo(), "image", "2"),)}, "weight '2', allowed a number"),  # type: ignore[arg-type]
        (REDUX, {"references": (Reference(photo(), "image"), Reference(photo()))}, "pictures for edit and redux"),
        (FILL, {"init": photo(), "mask": marked(), "references": (Reference(photo()),)}, "pictures for edit and fill"),
        (FILL, {"init": photo()}, "generate for flux1-fill-dev, allowed fill, try init with mask"),
        (FILL, {"init": photo(), "mask": marked(), "width": 272, "height": 256}, "multiples of 32"),
        (DEV, {"references": (Reference(photo(), "image"),)}, "redux for flux1-dev, .* try flux1-redux-dev"),
        (SPEC, {"prompt_t5": "a cat"}, "prompt_t5 for pico, which has no T5"),
        (DEV, {"prompt_t5": 3}, "int as prompt_t5"),
        (DEV, {"prompt_t5": "x" * 2001}, "prompt_t5 of 2,001 characters"),
        (DEV, {"prompt": ""}, "an empty text as prompt"),
    ],
)  # fmt: skip
def test_refusals(spec: ModelSpec, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        resolve(Request(**{"prompt": "a cat", **fields}), spec)


def test_sizes_follow_the_first_picture_and_its_new_canvas() -> None:
    def size(spec: ModelSpec, **fields: Any) -> tuple[int, int]:
        got = resolve(Request(prompt="x", **fields), spec)
        return got.width, got.height

    assert size(FILL, init=photo(640, 384), mask=marked(640, 384)) == (640, 384)
    assert size(FILL, init=photo(650, 384), mask=marked(650, 384)) == (640, 384)
    assert size(FILL, init=photo(640, 384), expand=(64, 0, 0, 128)) == (704, 512)
    assert size(CANNY, control=photo(400, 800)) == (400, 800)
    assert size(SPEC, init=photo(), expand=(0, 0, 64, 0), references=(Reference(photo(48, 48)),)) == (48, 48)


def test_a_part_is_repainted_all_the_way_unless_a_strength_is_given() -> None:
    def strength(**fields: Any) -> float | None:
        return resolve(Request(prompt="x", init=photo(), steps=8, **fields), SPEC).strength

    assert strength() == 0.8
    assert strength(mask=marked()) is None
    assert strength(expand=(8, 0, 0, 0)) is None
    assert strength(mask=marked(), strength=0.5) == 0.5


def test_the_methods_are_those_that_are_allowed() -> None:
    assert tuple(conditions.POSITIONS) == request.POSITIONS


# ---------------------------------------------------------------------------------------------- where references stand


@pytest.mark.parametrize(
    ("sizes", "index", "offset"),
    [
        ([(4, 6)], [(1, 0, 0)], [(1, 0, 0)]),
        ([(4, 6), (4, 6)], [(1, 0, 0), (2, 0, 0)], [(1, 0, 0), (1, 4, 0)]),
        ([(6, 4), (6, 4)], [(1, 0, 0), (2, 0, 0)], [(1, 0, 0), (1, 0, 4)]),
        ([(4, 4), (4, 4), (4, 4)], [(1, 0, 0), (2, 0, 0), (3, 0, 0)], [(1, 0, 0), (1, 4, 0), (1, 0, 4)]),
    ],
)
def test_places(sizes: list[tuple[int, int]], index: list[Place], offset: list[Place]) -> None:
    assert by_index(sizes) == index
    assert by_offset(sizes) == offset


@pytest.mark.parametrize(("positions", "place"), [("index", (2, 0, 0)), ("offset", (1, 3, 0))])
def test_several_references(runtime: Runtime, positions: str, place: Place) -> None:
    pictures = [photo(seed=seed) for seed in (1, 2)]
    asked = Request(prompt="a cat", references=tuple(map(Reference, pictures)), positions=positions, true_cfg=1)
    (row,) = condition(resolve(asked, SPEC), SPEC, runtime.read, runtime.encode).rows
    assert row.context is not None
    assert torch.equal(row.context, torch.cat([shapes.pack(runtime.encode(one)) for one in pictures], dim=1))
    own = shapes.image_ids(6, 8)
    assert torch.equal(row.ids, torch.cat((own, shapes.image_ids(6, 8, index=1), own + torch.tensor(place))))


# ---------------------------------------------------------------------------------------------- canvas


def test_a_picture_on_its_new_canvas() -> None:
    laid = canvas.lay(photo(32, 32), None, (16, 0, 8, 32), 56, 64)
    assert laid.picture.shape == (1, 3, 64, 56)
    assert torch.equal(laid.picture[..., :32, 16:48], to_tensor(photo(32, 32)))
    expected = torch.ones(1, 1, 64, 56)
    expected[..., :32, 16:48] = 0
    assert torch.equal(laid.mask, expected)
    assert float(laid.masked()[..., 32:, :].abs().max()) == 0
    both = canvas.lay(photo(32, 32), marked(32, 32, (0, 0, 8, 8)), (16, 0, 8, 32), 56, 64)
    expected[..., :8, 16:24] = 1
    assert torch.equal(both.mask, expected)


def test_a_mask_is_resized_without_ringing_and_never_rounded() -> None:
    laid = canvas.lay(photo(), marked(), None, 96, 80)
    assert laid.mask.shape == (1, 1, 80, 96)
    assert (float(laid.mask.min()), float(laid.mask.max())) == (0, 1)
    between = (laid.mask > 0) & (laid.mask < 1)
    assert between.any()
    grey = canvas.lay(photo(), marked().point(lambda value: value // 2), None, 64, 48)
    assert set(grey.mask.unique().tolist()) == {0, float(torch.tensor(127) / 255)}


def test_a_colour_of_a_mask_is_its_brightness() -> None:
    mask = marked().convert("RGB")
    assert torch.equal(canvas.lay(photo(), mask, None, 64, 48).mask, canvas.lay(photo(), marked(), None, 64, 48).mask)


def test_mask_tokens_by_hand() -> None:
    values = torch.rand(1, 1, 32, 48)
    found = canvas.mask_tokens(values)
    assert found.shape == (1, 6, 256)
    for token, channel in ((0, 0), (4, 17), (5, 255), (2, 130)):
        pixel, cell = divmod(channel, 4)
        row = 16 * (token // 3) + 8 * (cell // 2) + pixel // 8
        column = 16 * (token % 3) + 8 * (cell % 2) + pixel % 8
        assert found[0, token, channel] == values[0, 0, row, column]


def test_a_cell_is_repainted_where_any_of_its_pixels_is() -> None:
    values = torch.zeros(1, 1, 16, 24)
    values[..., 15, 8] = 0.5
    assert canvas.mask_cells(values).tolist() == [[[[0, 0, 0], [0, 0.5, 0]]]]


# ---------------------------------------------------------------------------------------------- what is known


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("strength", [None, 0.5])
def test_what_stays_ends_as_it_was(pipeline: Pipeline, solver: str, strength: float | None) -> None:
    runtime = pipeline.runtime
    fields = {"init": photo(), "mask": marked(), "strength": strength, "steps": 4, "solver": solver, "seed": 3}
    asked = resolve(Request(prompt="a cat", **fields), SPEC)
    made = condition(asked, SPEC, runtime.read, runtime.encode)
    path: list[Tensor] = []
    known = made.known(0)
    run = trajectory(made.start(0), SOLVERS[solver].run, made.times, made.rows, asked.true_cfg, known)
    x = drive(run, runtime.velocity, lambda step: path.append(step.x))
    source, inside = runtime.encode(photo()), torch.zeros(1, 1, 6, 8, dtype=torch.bool)
    inside[..., 2:4, 2:5] = True
    end = shapes.unpack(x, 6, 8)
    stays = ~inside.expand_as(end)
    torch.testing.assert_close(end[stays], source[stays], atol=1e-5, rtol=1e-5)
    assert float((end - source)[~stays].abs().mean()) > 0.1
    if solver == "adaptive":  # which chooses its own times
        return
    on_the_way = shapes.unpack(path[1], 6, 8)[stays]
    noise = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(3))[stays]
    t = made.times[2]
    torch.testing.assert_close(on_the_way, (1 - t) * source[stays] + t * noise, atol=1e-5, rtol=1e-5)


def test_parts_are_repainted_in_batches_too(pipeline: Pipeline) -> None:
    asked = Request(prompt="a cat", init=photo(), mask=marked(), seed=3, n=2)
    alone = pipeline.run(asked)
    (together,) = pipeline.run_many([asked], batch=2)
    for one, other in zip(alone, together, strict=True):
        assert np.abs(np.asarray(one.image).astype(int) - np.asarray(other.image)).max() <= 1


def test_known_velocities_between() -> None:
    known = Known(torch.full((1, 2, 4), 3.0), torch.tensor([[[0.0], [0.25]]]).expand(1, 2, 4))
    found = known.to(CPU).hold(torch.full((3, 2, 4), -1.0))
    assert found[:, 0].unique().tolist() == [-1]
    assert found[:, 1].unique().tolist() == [0]


# ---------------------------------------------------------------------------------------------- receipts and replay


def again(pipeline: Pipeline, folder: Path, inputs: list[Any], **fields: Any) -> Result:
    """A picture that is drawn again, bit for bit, from its file and its inputs."""
    result: Result = pipeline.run(Request(**{"prompt": "a cat", "seed": 1, **fields}))[0]
    path = result.save(folder / "drawn.png")
    assert replay(pipeline, path, inputs).verdict == "bit-exact"
    return result


def test_replay_of_a_mask_on_any_model(pipeline: Pipeline, tmp_path: Path) -> None:
    marked().save(tmp_path / "mask.png")
    result = again(pipeline, tmp_path, [photo()], init=photo(), mask=tmp_path / "mask.png", solver="dpmpp_2m")
    roles = [(entry["role"], entry["file"], entry.get("weight")) for entry in result.receipt.data["inputs"]]
    assert roles == [("init", None, None), ("mask", "mask.png", None)]
    other = pipeline.run(
        Request(prompt="a cat", seed=1, init=photo(), mask=marked(box=(0, 0, 9, 9)), solver="dpmpp_2m")
    )
    assert other[0].receipt.pixels != result.receipt.pixels
    (tmp_path / "mask.png").unlink()
    with pytest.raises(ReceiptError, match=r"made from mask\.png .* not beside it"):
        replay(pipeline, tmp_path / "drawn.png", [photo()])


def test_replay_of_a_new_canvas(pipeline: Pipeline, tmp_path: Path) -> None:
    result = again(pipeline, tmp_path, [photo()], init=photo(), expand=(16, 0, 0, 16))
    assert result.receipt.data["request"]["expand"] == [16, 0, 0, 16]
    assert result.image.size == (80, 64)


def test_replay_of_fill(pipelines: Callable[[str], Pipeline], tmp_path: Path) -> None:
    own = {"init": photo(64, 64), "mask": marked(64, 64)}
    result = again(pipelines("flux1-fill-dev"), tmp_path, list(own.values()), prompt="", **own)
    assert result.receipt.data["request"]["task"] == "fill"


def test_replay_of_several_references(pipeline: Pipeline, tmp_path: Path) -> None:
    pictures = [photo(seed=seed) for seed in (1, 2)]
    references = tuple(map(Reference, pictures))
    result = again(pipeline, tmp_path, pictures[::-1], references=references, positions="offset")
    assert result.receipt.data["request"]["positions"] == "offset"
    swapped = pipeline.run(Request(prompt="a cat", seed=1, references=references[::-1], positions="offset"))[0]
    assert swapped.receipt.pixels != result.receipt.pixels


def test_replay_of_edges(pipelines: Callable[[str], Pipeline], tmp_path: Path) -> None:
    pipeline = pipelines("flux1-canny-dev")
    result = again(pipeline, tmp_path, [photo()], control=photo())
    as_it_is = again(pipeline, tmp_path, [photo()], control=photo(), control_ready=True)
    assert result.receipt.pixels != as_it_is.receipt.pixels


class Session:
    """A depth model that sees how red things are."""

    def __init__(self, path: str, providers: list[str]) -> None:
        if Path(path).read_bytes() != b"a model":
            raise RuntimeError("protobuf parsing failed")

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="pixels", shape=[1, 3, None, None])]

    def run(self, _: None, feed: dict[str, Any]) -> list[Any]:
        return [feed["pixels"][:, 0]]


def test_replay_of_depth(pipelines: Callable[[str], Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    (tmp_path / "models").mkdir()
    model = tmp_path / "models" / "depth.onnx"
    model.write_bytes(b"a model")
    pipeline = pipelines("flux1-depth-dev")
    result = again(pipeline, tmp_path, [photo(), model], control=photo(), control_model=model)
    assert result.receipt.data["request"]["control_model"]["file"] == "depth.onnx"
    assert str(tmp_path) not in str(result.receipt.data)
    with pytest.raises(ReceiptError, match=r"depth model depth\.onnx .* not beside it"):
        replay(pipeline, tmp_path / "drawn.png", [photo()])
    model.rename(tmp_path / "renamed.onnx")
    assert replay(pipeline, tmp_path / "drawn.png", [photo()]).verdict == "bit-exact"


def test_depth_that_cannot_be_had(
    pipelines: Callable[[str], Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    asked = Request(prompt="a cat", control=photo(), control_model=tmp_path / "broken.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # not installed
    with pytest.raises(Failure, match=r"without onnxruntime.*try pip install onnxruntime, or a depth map"):
        pipelines("flux1-depth-dev").run(asked)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    with pytest.raises(Failure, match=r"broken.onnx, which cannot estimate depth here \(protobuf"):
        pipelines("flux1-depth-dev").run(asked)
    monkeypatch.setattr(Session, "__init__", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(Session, "run", lambda self, _, feed: [feed["pixels"] * np.nan])
    with pytest.raises(Failure, match="allowed one finite map"):
        pipelines("flux1-depth-dev").run(asked)


def test_replay_of_pictures_among_words(pipelines: Callable[[str], Pipeline], tmp_path: Path) -> None:
    pipeline = pipelines("flux1-redux-dev")
    references = (Reference(photo(seed=1), "image", 0.5), Reference(photo(seed=2), "image"))
    with pytest.raises(WeightsError, match="a picture to read for flux1-redux-dev, loaded without Redux"):
        pipeline.run(Request(prompt="", references=references))
    redux = Redux(ReduxSpec(width=8, layers=1, heads=2, mlp=8, patch=14, side=28, out_dim=16))
    randomise(redux, 3)
    pipeline.runtime.redux = redux
    result = again(pipeline, tmp_path, [photo(seed=2), photo(seed=1)], prompt="", references=references)
    assert [entry["weight"] for entry in result.receipt.data["inputs"]] == [0.5, 1.0]
    made = condition(
        resolve(Request(prompt="", references=references), pipeline.runtime.spec),
        pipeline.runtime.spec,
        pipeline.runtime.read,
        pipeline.runtime.encode,
        pipeline.runtime.see,
    )
    tokens = made.rows[0].text.tokens
    assert tokens.shape == (1, 8 + 4 + 4, 16)
    assert torch.equal(tokens[:, 8:12], 0.5 * pipeline.runtime.see(photo(seed=1)))


class Translating(OwnTower):
    """A reader that reads Chinese in English, as a translator told it; each time it is asked it says something else."""

    def __init__(self, own: OwnTower) -> None:
        super().__init__(own.name, own.tower, own.tokenizer)
        self.told: dict[str, str] = {}
        self.asked = 0

    def translation(self, prompt: str) -> str | None:
        if prompt != "猫":
            return None
        if prompt not in self.told:
            self.asked += 1
            self.told[prompt] = f"a {'red cat' if self.asked == 1 else 'blue dog'}"
        return self.told[prompt]

    def recall(self, prompt: str, translation: str) -> None:
        self.told[prompt] = translation

    def read(self, prompt: str, **more: Any) -> TextStates:
        return super().read(self.translation(prompt) or prompt, **more)


def test_replay_reads_the_translation_of_then(runtime: Runtime, tmp_path: Path) -> None:
    assert isinstance(runtime.reader, OwnTower)
    reader = Translating(runtime.reader)
    pipeline = Pipeline(replace(runtime, reader=reader))
    result = again(pipeline, tmp_path, [], prompt="猫", negative="snow")
    assert result.receipt.data["translations"] == {"猫": "a red cat"}
    assert result.receipt.pixels == pipeline.run(Request(prompt="a red cat", negative="snow", seed=1))[0].receipt.pixels
    reader.told.clear()
    assert replay(pipeline, tmp_path / "drawn.png").verdict == "bit-exact"
    assert reader.asked == 1
    reader.told.clear()
    assert pipeline.run(Request(prompt="猫", negative="snow", seed=1))[0].receipt.pixels != result.receipt.pixels
    for wrong in ([], {"猫": 3}):
        forged = Result(result.image, Receipt({**result.receipt.data, "translations": wrong}))
        with pytest.raises(ReceiptError, match="translations are no texts"):
            replay(pipeline, forged.save(tmp_path / "forged.png"))


def test_receipts_from_before_these_fields(pipeline: Pipeline, tmp_path: Path) -> None:
    result: Result = pipeline.run(Request(prompt="a cat", seed=1, references=(Reference(photo()),)))[0]
    since = ("prompt_t5", "positions", "expand", "control_ready", "control_model")
    old = {name: value for name, value in result.receipt.data["request"].items() if name not in since}
    path = Result(result.image, Receipt({**result.receipt.data, "request": old})).save(tmp_path / "a.png")
    assert replay(pipeline, path, [photo()]).verdict == "bit-exact"
