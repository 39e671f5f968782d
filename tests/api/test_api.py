"""What users hold, with the embedded model itself at the smallest size it draws."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import photo
from PIL import Image

import fluxloom as fl
from fluxloom.core.specs import MODELS
from fluxloom.errors import BadInput, FluxloomError, OutputError, UnknownModel, WeightsError
from fluxloom.infer.finish import boxed
from fluxloom.infer.loras import Lora
from fluxloom.infer.request import PromptWarning
from fluxloom.weights.lora_file import save_lora

NANO = Path(fl.__file__).parent / "assets" / "nano"
SMALL = {"width": 64, "height": 64, "steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def pipe() -> fl.Loom:
    return fl.load("nano")


@pytest.fixture(scope="module")
def picture(pipe: fl.Loom) -> fl.Result:
    return pipe.generate("a red cat", **SMALL)


def test_draw_edit_and_replay(pipe: fl.Loom, picture: fl.Result, tmp_path: Path) -> None:
    assert pipe.spec is MODELS["nano"]
    assert picture.image.size == (64, 64)
    assert picture.seed == 7
    first = picture.save(tmp_path / "1.png")
    steps = {"steps": 2, "seed": 8}
    edits = [pipe.edit(source, "make it blue", **steps) for source in (picture, first, str(first), picture.image)]
    assert len({edit.receipt.pixels for edit in edits}) == 1
    assert edits[0].receipt.pixels != picture.receipt.pixels
    again = pipe.replay(edits[1].save(tmp_path / "2.jpg"))
    assert again.verdict == "bit-exact"


def test_an_edit_keeps_the_size_and_the_bytes_of_its_picture(pipe: fl.Loom, tmp_path: Path) -> None:
    large = photo(160, 128)
    small = {"width": 80, "height": 64, "steps": 2, "seed": 1}
    plain = pipe.edit(large, "make it blue", lock="off", **small)
    assert plain.image.size == (80, 64)
    assert "finish" not in plain.receipt.data
    assert pipe.edit(large, "make it blue", **small).image.size == (160, 128)
    box = (32, 32, 96, 96)
    mask = boxed((160, 128), box)
    mask.save(tmp_path / "mask.png")
    ways: list[dict[str, Any]] = [{"box": box}, {"mask": mask}, {"lock": tmp_path / "mask.png"}]
    for way in ways:
        edit = pipe.edit(large, "make it blue", **way, **small)
        apart = np.abs(np.asarray(edit.image).astype(int) - np.asarray(large)).max(axis=-1)
        left, top, right, bottom = Image.fromarray(apart > 0).getbbox() or (0, 0, 0, 0)
        assert 32 <= left < right <= 96
        assert 32 <= top < bottom <= 96
        assert edit.receipt.data["finish"][0]["report"]["identical"] == 1
        held = {one["role"] for one in edit.receipt.data["inputs"]}
        assert ("init" in held) == ("lock" not in way)
    with pytest.raises(BadInput, match="got mask and box"):
        pipe.edit(large, "make it blue", box=box, mask=mask)


def test_another_process_worth_of_state_draws_the_same(picture: fl.Result) -> None:
    again = fl.load(NANO).generate("a red cat", **SMALL)
    assert again.receipt.pixels == picture.receipt.pixels
    assert again.receipt.data["model"] == picture.receipt.data["model"]


def test_several_pictures_come_as_a_list(pipe: fl.Loom, picture: fl.Result) -> None:
    several = pipe.generate("a red cat", n=2, **SMALL)
    assert [result.seed for result in several] == [7, 8]
    assert several[0].receipt.pixels == picture.receipt.pixels
    assert len(pipe.generate("a red cat", n=1, **SMALL)) == 1


def test_run_and_stream_take_requests(pipe: fl.Loom, picture: fl.Result) -> None:
    request = fl.Request(prompt="a red cat", **SMALL)
    seen: list[int] = []
    (result,) = pipe.run(request, lambda preview: seen.append(preview.step.index))
    assert seen == [0, 1]
    *previews, last = pipe.stream(request)
    assert [preview.image.size for preview in previews] == [(64, 64)] * 2
    assert isinstance(last, fl.Result)
    assert last.receipt.pixels == result.receipt.pixels == picture.receipt.pixels


def test_what_does_not_reach_the_model_is_told(pipe: fl.Loom) -> None:
    with pytest.warns(PromptWarning, match="too long for nano") as caught:
        result = pipe.generate("a cat and " * 40, **SMALL)
    assert caught[0].filename == __file__
    assert len(result.warnings) == 1


def test_loras_are_a_field(pipe: fl.Loom, picture: fl.Result, tmp_path: Path) -> None:
    layer = "diffusion_model.txt_in.lora_"
    width, text = pipe.spec.transformer.hidden_size, pipe.spec.transformer.context_in_dim
    state = {f"{layer}A.weight": torch.randn(1, text), f"{layer}B.weight": torch.randn(width, 1)}
    path = save_lora(
        {**state, "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)}, tmp_path / "a.safetensors", {}
    )
    with pytest.warns(PromptWarning, match=r"1 of 3 tensors of LoRA a.safetensors are for text encoders"):
        drawn = pipe.generate("a red cat", loras=[path], **SMALL)
    with pytest.warns(PromptWarning):
        edited = pipe.edit(picture, "make it blue", loras=[Lora(path, 0.5)], steps=2, seed=8)
    assert edited.receipt.data["request"]["loras"][0]["weight"] == 0.5
    assert drawn.receipt.pixels != picture.receipt.pixels
    assert pipe.generate("a red cat", **SMALL).receipt.pixels == picture.receipt.pixels


def test_unknown_fields_are_refused(pipe: fl.Loom) -> None:
    with pytest.raises(BadInput, match=r"got cfg, hight, allowed prompt, .*negative, .* try "):
        pipe.generate("a cat", hight=64, cfg=3)


def test_bad_input_is_also_a_value_error(pipe: fl.Loom) -> None:
    with pytest.raises(ValueError, match=r"size 250x250, allowed for nano: .* try 256x256"):
        pipe.generate("a cat", width=250, height=250)


def test_unwritable_output_leaves_nothing(picture: fl.Result, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="to write to"):
        picture.save(tmp_path / "file" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nanno", "model 'nanno', allowed nano, .* try nano"),
        ("flux1-dev", "got flux1-dev, of which flux1-dev.safetensors, .* not in the cache"),
        ("flux1-kontex-dev", "try flux1-kontext-dev"),
        ("", "an empty model reference"),
        ("/no/such/folder", "got /no/such/folder, which does not exist"),
        ("../nano", "got ../nano, which does not exist"),
    ],
)
def test_models_that_cannot_be_loaded(
    reference: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FluxloomError, match=message):
        fl.load(reference, offline=True)


def test_a_folder_in_the_way_does_not_take_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "card.json").write_text('{"schema": 1, "model": "micro", "files": {}}')
    monkeypatch.chdir(tmp_path)
    assert fl.load("nano").spec is MODELS["nano"]
    for reference in ("./nano", Path("nano")):
        with pytest.raises(UnknownModel, match="model 'micro'"):
            fl.load(reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device 'gpu', allowed cpu, cuda or auto"),
        ({"device": "meta"}, "device 'meta'"),
        ({"device": "cuda:99"}, "device 'cuda:99', allowed one of"),
        ({"dtype": "float16"}, "dtype 'float16', allowed float32, bfloat16"),
        ({"base": "flux1-dev"}, "base flux1-dev for nano, allowed for adapters"),
        ({"preview_decoder": "taef1.safetensors"}, "previews of nano, allowed for members with the latents of FLUX.1"),
        ({"dtype": "fast"}, "dtype 'fast'"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        fl.load("nano", **options)


def test_nano_stays_on_the_processor_in_float32_unless_told() -> None:
    runtime = fl.load(device="auto").pipeline.runtime
    assert (runtime.device.type, runtime.dtype) == ("cpu", torch.float32)
    assert fl.load(dtype="bfloat16").pipeline.runtime.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("reference", "options", "name"),
    [
        ("nano", {}, "cpu"),
        ("nano", {"device": "cuda"}, "cuda"),
        ("nano", {"gpus": 2}, "auto"),
        ("nano", {"vram": "12GB"}, "auto"),
        ("flux1-dev", {}, "auto"),
        ("flux1-dev", {"device": "cpu"}, "cpu"),
    ],
)
def test_a_gpu_is_taken_where_it_is_of_use(
    monkeypatch: pytest.MonkeyPatch, reference: str, options: dict[str, Any], name: str
) -> None:
    def asked(name: str) -> torch.device:
        raise BadInput(name)

    monkeypatch.setattr("fluxloom.api.device_named", asked)
    with pytest.raises(BadInput, match=f"^{name}$"):
        fl.load(reference, **options)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(NANO, tmp_path / "nano"))
    shard = sorted(folder.glob("*.safetensors"))[-1]
    with open(shard, "r+b") as file:
        file.seek(-1000, 2)
        file.write(b"damage")
    with pytest.raises(WeightsError, match=shard.name):
        fl.load(folder)


def test_a_card_without_a_known_model(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text('{"schema": 1, "model": "micro", "files": {}}')
    with pytest.raises(UnknownModel, match="model 'micro'"):
        fl.load(tmp_path)


def test_broken_pictures_in(pipe: fl.Loom, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="allowed 16 or more"):
        pipe.edit(Image.new("RGB", (8, 8)), "make it blue")
    with pytest.raises(BadInput, match="does not exist"):
        pipe.edit(tmp_path / "none.png", "make it blue")
    assert photo().size == (64, 48)
