"""Model references to files and folders of the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from fluxloom.errors import BadInput, UnknownModel, WeightsError
from fluxloom.weights.download import Hub
from fluxloom.weights.hub import Located, resolve

MODEL_KINDS = ["transformer", "autoencoder", "clip", "t5"]


def local(reference: Path | str, hub: Hub, **more: object) -> Located:
    return resolve(reference, hub=replace(hub, offline=True), **more)  # type: ignore[arg-type]


def write(folder: Path, **files: Mapping[str, Tensor]) -> Path:
    """Files named by path, with __ for a slash."""
    for name, tensors in files.items():
        path = folder / f"{name.replace('__', '/')}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), path)
    return folder


def test_a_file_finds_its_companions_beside_it(
    hub: Hub, tmp_path: Path, states: Mapping[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "at", flux1_dev=states["transformer"])
    path = tmp_path / "at" / "flux1_dev.safetensors"
    with pytest.raises(WeightsError, match="without the autoencoder, the CLIP text encoder, the T5 text encoder"):
        local(path, hub)
    write(tmp_path / "at", ae=states["autoencoder"], clip_l=states["clip"], t5xxl_fp8=states["t5"])
    for reference in (path, path.parent):
        located = local(reference, hub)
        assert list(located.parts) == MODEL_KINDS
        assert located.parts["t5"].path.name == "t5xxl_fp8.safetensors"
        assert located.parts["t5"].commit is None
    monkeypatch.chdir(path.parent)
    assert list(local("flux1_dev.safetensors", hub).parts) == MODEL_KINDS
    write(tmp_path / "at", t5xxl_fp16=states["t5"])
    assert local(path, hub).parts["t5"].path.name == "t5xxl_fp16.safetensors"
    write(tmp_path / "at", another=states["transformer"])
    with pytest.raises(BadInput, match=r"several files: another\.safetensors"):
        local(path.parent, hub)


def test_companions_of_a_collection_are_found(
    hub: Hub, tmp_path: Path, states: Mapping[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    write(
        models,
        diffusion_models__krea=states["transformer"],
        vae__ae=states["autoencoder"],
        vae__diffusion_pytorch_model=states["clip"],  # somebody else's
        text_encoders__clip_l=states["clip"],
        text_encoders__t5xxl_fp16=states["t5"],
    )
    path = models / "diffusion_models" / "krea.safetensors"
    assert list(local(path, hub).parts) == MODEL_KINDS
    elsewhere = path.rename(tmp_path / "krea.safetensors")
    with pytest.raises(WeightsError, match="FLUXLOOM_MODELS"):
        local(elsewhere, hub)
    monkeypatch.setenv("FLUXLOOM_MODELS", str(models))
    located = local(elsewhere, hub)
    assert located.parts["autoencoder"].path == models / "vae" / "ae.safetensors"


def pipeline(folder: Path, states: Mapping[str, dict[str, Tensor]], class_name: str = "FluxPipeline") -> Path:
    write(
        folder,
        transformer__diffusion_pytorch_model=states["transformer"],
        vae__diffusion_pytorch_model=states["autoencoder"],
        text_encoder__model=states["clip"],
        text_encoder_2__model=states["t5"],
    )
    (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


def test_a_folder_as_diffusers_saves_it(
    hub: Hub, tmp_path: Path, states: Mapping[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pipeline(tmp_path / "flux", states)
    for reference in (folder, folder / "transformer", folder / "transformer" / "diffusion_pytorch_model.safetensors"):
        assert list(local(reference, hub).parts) == [*MODEL_KINDS, "tokenizer"]
    assert local(folder, hub).parts["transformer"].path == folder / "transformer"
    write(folder, **{"transformer__diffusion_pytorch_model.fp16": states["transformer"]})
    part = local(folder, hub).parts["transformer"]
    assert part.path.name == "diffusion_pytorch_model.safetensors"
    write(tmp_path / "lone", tune=states["transformer"])
    monkeypatch.setenv("FLUXLOOM_MODELS", str(tmp_path))  # its subfolders are looked into
    assert local(tmp_path / "lone", hub).parts["clip"].path == folder / "text_encoder" / "model.safetensors"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(WeightsError, match="without the autoencoder"):
        local(tmp_path / "lone", hub)


def test_shards_are_complete_or_refused(hub: Hub, tmp_path: Path, states: Mapping[str, dict[str, Tensor]]) -> None:
    folder = pipeline(tmp_path / "flux", states) / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    keys = sorted(states["transformer"])
    table = {}
    for k, part in ((1, keys[::2]), (2, keys[1::2])):
        name = f"diffusion_pytorch_model-0000{k}-of-00002.safetensors"
        save_file({key: states["transformer"][key] for key in part}, folder / name)
        table |= dict.fromkeys(part, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    shard = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    for reference in (folder.parent, folder, shard, index):
        assert local(reference, hub).parts["transformer"].path == folder
    shard.unlink()
    with pytest.raises(WeightsError, match="without all of its shards"):
        local(index, hub)
    with pytest.raises(WeightsError, match="without a transformer"):
        local(folder.parent, hub)


def test_all_in_one_needs_nothing_else(hub: Hub, tmp_path: Path, states: Mapping[str, dict[str, Tensor]]) -> None:
    prefixes = {
        "transformer": "model.diffusion_model.",
        "autoencoder": "vae.",
        "clip": "text_encoders.clip_l.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
    }
    whole = {prefixes[kind] + name: tensor.clone() for kind, part in states.items() for name, tensor in part.items()}
    write(tmp_path, whole=whole)
    located = local(tmp_path / "whole.safetensors", hub)
    assert sorted(located.parts) == sorted(MODEL_KINDS)
    assert {part.path for part in located.parts.values()} == {tmp_path / "whole.safetensors"}
    half = {name: tensor for name, tensor in whole.items() if not name.startswith("text_encoders.t5")}
    write(tmp_path / "other", half=half, t5xxl_fp16=states["t5"])
    assert local(tmp_path / "other" / "half.safetensors", hub).parts["t5"].path.name == "t5xxl_fp16.safetensors"


def test_what_cannot_be_a_model_is_refused(hub: Hub, tmp_path: Path, states: Mapping[str, dict[str, Tensor]]) -> None:
    write(tmp_path, lone=states["autoencoder"])
    with pytest.raises(BadInput, match="which holds the autoencoder, allowed a transformer"):
        local(tmp_path / "lone.safetensors", hub)
    assert list(local(tmp_path / "lone.safetensors", hub, companions=False).parts) == ["autoencoder"]
    for name, kind, says in (
        ("model.ckpt", WeightsError, "pickle"),
        ("notes.txt", BadInput, "allowed .safetensors"),
        ("broken.safetensors", WeightsError, "broken"),
    ):
        (tmp_path / name).write_text("x")
        with pytest.raises(kind, match=says):
            local(tmp_path / name, hub)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="without a transformer"):
        local(tmp_path / "empty", hub)
    with pytest.raises(UnknownModel, match=r"try .*lone\.safetensors"):
        local(tmp_path / "loan.safetensors", hub)
