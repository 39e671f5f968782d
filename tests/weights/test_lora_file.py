"""LoRA files on the disk: read with all their metadata, written whole or not at all, merged into models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_makers import MAKERS
from safetensors.torch import save_file
from tiny import DEV, relative, transformer

from fluxloom.core.specs import MODELS
from fluxloom.errors import BadInput, OutputError, UnknownModel, WeightsError
from fluxloom.weights.load import load_folder, part, verified
from fluxloom.weights.lora import Weighted
from fluxloom.weights.lora_file import load_lora, merge_files, open_base, open_lora, save_lora
from fluxloom.weights.lora_read import read_lora

NANO = MODELS["nano"].transformer


@pytest.mark.parametrize("name", MAKERS)
def test_every_dialect_survives_the_disk(name: str, tmp_path: Path) -> None:
    made = MAKERS[name](DEV, 1)
    path = save_lora(made.state, tmp_path / "a" / "lora.safetensors", made.metadata)
    state, metadata = open_lora(path)
    assert metadata == made.metadata
    assert state.keys() == made.state.keys()
    assert all(torch.equal(state[key].float(), tensor.float()) for key, tensor in made.state.items())
    assert [path.name for path in path.parent.iterdir()] == ["lora.safetensors"]


def test_folders_of_peft_bring_their_configuration(tmp_path: Path) -> None:
    path = "transformer.transformer_blocks.0.attn.to_out.0"
    factors = {f"{path}.lora_A.weight": torch.ones(2, 64), f"{path}.lora_B.weight": torch.ones(64, 2)}
    with pytest.raises(BadInput, match="a folder without a LoRA"):
        open_lora(tmp_path)
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    lora = read_lora(*open_lora(tmp_path), DEV)
    update = lora.updates["double_blocks.0.img_attn.proj.weight"]
    assert float(update.delta(torch.zeros(64, 64))[0, 0]) == 6


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not there"):
        open_lora(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    (tmp_path / "lora.pt").write_bytes(b"PK\x03\x04")
    for name in ("cut.safetensors", "lora.pt"):
        with pytest.raises(WeightsError):
            open_lora(tmp_path / name)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"try lora\.safetensors"):
        save_lora({}, tmp_path / "lora.bin", {})
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="to write to"):
        save_lora({"a": torch.ones(1)}, tmp_path / "file" / "lora.safetensors", {})


def test_a_model_folder_with_a_lora_merged_into_it(tmp_path: Path) -> None:
    made = MAKERS["kohya"](NANO, 1)
    file = save_lora(made.state, tmp_path / "lora.safetensors", {})
    base = open_base("nano")
    lora = read_lora(*open_lora(file), base.spec)
    out = merge_files(base, [Weighted(lora, 0.5)], [file], tmp_path / "merged")
    content = verified(out)
    assert content != verified(Path(str(base.folder)))
    card = json.loads((out / "card.json").read_text())
    assert (card["model"], card["merged"][0]["weight"]) == ("nano", 0.5)
    got, was = part(load_folder(out), "transformer"), base.state
    for name, delta in made.deltas.items():
        assert relative(got[name], was[name] + 0.5 * delta) < 1e-3  # float16
    assert relative(got["final_layer.linear.bias"], was["final_layer.linear.bias"]) < 1e-3
    assert part(load_folder(out), "text").keys() == part(load_folder(Path(str(base.folder))), "text").keys()
    single = merge_files(base, [Weighted(lora)], [file], tmp_path / "merged.safetensors")
    assert open_base(str(single)).spec.hidden_size == NANO.hidden_size


def test_a_checkpoint_with_a_control_lora_merged_into_it(tmp_path: Path) -> None:
    model, made = transformer(DEV, 0), MAKERS["control"](DEV, 1)
    file = save_lora(made.state, tmp_path / "lora.safetensors", {})
    save_file({k: v.bfloat16() for k, v in model.state_dict().items()}, tmp_path / "base.safetensors")
    base = open_base(str(tmp_path / "base.safetensors"))
    lora = read_lora(made.state, {}, base.spec)
    out = merge_files(base, [Weighted(lora)], [file], tmp_path / "out.safetensors")
    found = open_base(str(out))
    assert found.spec.in_channels == 128
    name = "single_blocks.0.linear2.weight"
    assert found.state[name].dtype == torch.bfloat16
    assert relative(found.state[name].float(), model.state_dict()[name] + made.deltas[name]) < 1e-2
    control = [Weighted(read_lora(MAKERS["control"](NANO, 1).state, {}, NANO))]
    nano = open_base("nano")
    with pytest.raises(BadInput, match="whose card has no row for it"):
        merge_files(nano, control, [file], tmp_path / "folder")


def test_what_comes_ready_for_use(tmp_path: Path) -> None:
    made = MAKERS["kohya"](DEV, 1)
    file = save_lora(made.state, tmp_path / "lora.safetensors", {})
    one = load_lora(file, DEV, 0.5, {"double": 2.0})
    assert (one.strength("double_blocks.0.img_attn.qkv.weight"), one.strength("img_in.weight")) == (1.0, 0.5)
    zero = save_lora({k: torch.zeros_like(t) for k, t in made.state.items()}, tmp_path / "zero.safetensors", {})
    with pytest.raises(WeightsError, match="without effect"):
        load_lora(zero, DEV)


def test_unknown_bases(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="try nano"):
        open_base(str(tmp_path / "none"))
    file = save_lora(MAKERS["kohya"](DEV, 1).state, tmp_path / "lora.safetensors", {})
    with pytest.raises(WeightsError, match="without a transformer"):
        open_base(str(file))
