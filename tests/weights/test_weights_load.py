"""Compact shards, cards and strict loading; every kind of damage is named."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import fluxloom
from fluxloom.errors import OutputError, WeightsError
from fluxloom.weights import load
from fluxloom.weights.load import build, load_compact, load_folder, load_strict, part, save_card, save_compact, verified

NANO = Path(fluxloom.__file__).parent / "assets" / "nano"


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {
        "a.weight": torch.randn(96, 200),
        "a.bias": torch.randn(96),
        "b.weight": torch.randn(64, 16, 3, 3),
        "b.small": torch.randn(8, 8),
    }


@pytest.fixture
def folder(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    save_compact(state, tmp_path, shard_bytes=12_000)
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    save_card(tmp_path, "nano", {"recipe": "a test"})
    return tmp_path


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


# ---------------------------------------------------------------------------------------------- shards


def test_a_folder_is_all_its_shards(folder: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    assert len(list(folder.glob(load.SHARDS))) > 1
    assert load_folder(folder).keys() == state.keys()
    with pytest.raises(WeightsError, match="got no weights in"):
        load_folder(tmp_path / "empty")


def test_round_trip(tmp_path: Path, state: dict[str, Tensor]) -> None:
    files = save_compact(state, tmp_path)
    assert [path.name for path in files] == ["model-00001-of-00001.safetensors"]
    back = load_compact(files)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].shape == tensor.shape
        assert float((back[key] - tensor).norm() / tensor.norm()) < 0.03
    assert torch.equal(back["a.bias"], state["a.bias"].half().float())
    assert torch.equal(back["b.small"], state["b.small"].half().float())
    assert not torch.equal(back["a.weight"], state["a.weight"])  # it was really stored in 6 bits


def test_longest_prefix_decides_the_format(tmp_path: Path, state: dict[str, Tensor]) -> None:
    overrides = {"a.": "int8", "a.weight": "int6", "b.s": "float32"}
    files = save_compact(state, tmp_path, default="float16", overrides=overrides)
    with safe_open(files[0], framework="pt") as file:
        table = json.loads(file.metadata()["fluxloom"])["tensors"]
    assert {key: row["format"] for key, row in table.items()} == {
        "a.bias": "float16",  # one axis
        "a.weight": "int6",
        "b.small": "float32",
        "b.weight": "float16",
    }
    assert torch.equal(load_compact(files)["b.small"], state["b.small"])


def test_shards_keep_to_their_size_and_lose_nothing(tmp_path: Path, state: dict[str, Tensor]) -> None:
    whole = load_compact(save_compact(state, tmp_path / "whole"))
    files = save_compact(state, tmp_path / "cut", shard_bytes=12_000)
    assert len(files) == 3  # a.weight alone is larger than a shard
    cut = load_compact(files)
    assert all(torch.equal(cut[key], whole[key]) for key in state)
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {path.name for path in files}


def test_saving_again_gives_the_same_bytes_and_removes_old_shards(tmp_path: Path, state: dict[str, Tensor]) -> None:
    first = save_compact(state, tmp_path)[0].read_bytes()
    save_compact(state, tmp_path, shard_bytes=12_000)
    assert not (tmp_path / "model-00001-of-00001.safetensors").exists()
    shuffled = dict(reversed(state.items()))
    assert save_compact(shuffled, tmp_path)[0].read_bytes() == first
    assert len(list(tmp_path.iterdir())) == 1


def test_a_tensor_in_the_place_of_scales_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"a\.weight\.scale"):
        save_compact({**state, "a.weight.scale": torch.ones(3)}, tmp_path)


def test_what_cannot_be_stored_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["b.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"b\.weight: got weights that are not finite"):
        save_compact(state, tmp_path)


def test_shards_have_the_usual_rights(tmp_path: Path, state: dict[str, Tensor]) -> None:
    (tmp_path / "usual").write_bytes(b"")
    (shard,) = save_compact(state, tmp_path)
    assert shard.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_that_cannot_be_written(tmp_path: Path, state: dict[str, Tensor]) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="to write weights to"):
        save_compact(state, tmp_path / "file")


# ---------------------------------------------------------------------------------------------- damage


def test_cut_file(folder: Path) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(WeightsError, match=path.name):
        load_compact([path])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="unreadable weights"):
        load_compact([tmp_path / "none.safetensors"])


def test_foreign_safetensors(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError, match="without a fluxloom header"):
        load_compact([tmp_path / "foreign.safetensors"])


@pytest.mark.parametrize(
    "tensors",
    [
        {"w": {"format": "int8", "shape": [3]}},
        {"x": {"format": "float32", "shape": [3]}},
        {"w": {}},
        ["w"],
        {"w": "int8"},
    ],
    ids=["no scale", "no tensor", "no format", "no table", "no row"],
)
def test_header_that_does_not_fit_its_file(tmp_path: Path, tensors: object) -> None:
    header = json.dumps({"schema": load.SCHEMA, "tensors": tensors})
    save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors", metadata={"fluxloom": header})
    with pytest.raises(WeightsError, match=r"w\.safetensors"):
        load_compact([tmp_path / "w.safetensors"])


def test_the_same_tensor_twice(folder: Path) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    with pytest.raises(WeightsError, match="twice"):
        load_compact([path, path])


# ---------------------------------------------------------------------------------------------- modules


def test_build_takes_the_tensors_themselves() -> None:
    weights = make().state_dict()
    module = build(make, weights)
    assert not module.training
    for name, parameter in module.named_parameters():
        assert parameter.data_ptr() == weights[name].data_ptr()  # not a copy
        assert not parameter.requires_grad


def test_building_does_not_import_what_it_does_not_need() -> None:
    script = (
        "import sys, torch; from torch import nn; from fluxloom.weights.load import build;"
        "make = lambda: nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.GroupNorm(2, 4));"
        "build(make, make().state_dict()); print('sympy' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("False\n", "")


def test_everything_that_does_not_fit_is_named() -> None:
    weights = make().state_dict()
    del weights["0.bias"]
    weights["0.weight"] = torch.ones(4, 2)
    weights |= {f"extra{i}": torch.ones(1) for i in range(9)}
    with pytest.raises(WeightsError) as caught:
        load_strict(make(), weights)
    text = str(caught.value)
    assert "missing: 0.bias" in text
    assert "misshapen: 0.weight [4, 2] for [4, 3]" in text
    assert "extra7 and 1 more" in text
    assert "extra8" not in text


def test_part() -> None:
    assert part({"a.x": 1, "ab.x": 2, "a.y.z": 3}, "a") == {"x": 1, "y.z": 3}  # type: ignore[arg-type, dict-item]


# ---------------------------------------------------------------------------------------------- cards


def test_an_intact_folder_has_one_hash(folder: Path) -> None:
    first = verified(folder)
    assert first == verified(folder)
    assert first.startswith("sha256:")
    card = json.loads((folder / "card.json").read_text())
    assert card["recipe"] == "a test"
    assert set(card["files"]) == {path.name for path in folder.iterdir()} - {"card.json"}


def test_the_hash_covers_the_vocabulary(folder: Path) -> None:
    first = verified(folder)
    (folder / "vocab.txt").write_text("[CLS]\n")
    save_card(folder, "nano", {"recipe": "a test"})
    assert verified(folder) != first


def test_one_flipped_bit_is_found(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    good = load.digest(path)
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError) as caught:
        verified(folder)
    text = str(caught.value)
    assert path.name in text
    assert good in text
    assert load.digest(path) in text


def test_missing_listed_file(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    with pytest.raises(WeightsError, match=r"vocab\.txt, which the model card lists"):
        verified(folder)


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "vocab.txt"])
def test_unlisted_files(folder: Path, name: str) -> None:
    card = json.loads((folder / "card.json").read_text())
    del card["files"][name]
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(WeightsError, match=f"does not list: {name}"):
        verified(folder)


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"schema": 1, "model": "nano", "files": []}', '{"model": "nano", "files": {}}']
)
def test_cards_that_cannot_be_used(folder: Path, text: str | None) -> None:
    card = folder / "card.json"
    if text is None:
        card.unlink()
    else:
        card.write_text(text)
    with pytest.raises(WeightsError, match=r"model card .*card\.json"):
        verified(folder)


def test_nano_is_intact_and_loads_in_a_second() -> None:
    began = time.process_time()
    content = verified(NANO)
    state = load_compact(sorted(NANO.glob(load.SHARDS)))
    seconds = time.process_time() - began
    assert content.startswith("sha256:")
    assert {key.partition(".")[0] for key in state} == {"transformer", "autoencoder", "text"}
    assert seconds < 1
