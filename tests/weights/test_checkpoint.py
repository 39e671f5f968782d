"""Containers: what opens, byte for byte, and what is refused: always with a clear error, never with anything else."""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from fluxloom.errors import WeightsError
from fluxloom.weights.checkpoint import Checkpoint, open_checkpoint
from fluxloom.weights.load import ASSETS, load_folder, save_compact

State = dict[str, Tensor]
NUMBERS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
STATE: State = {
    "a.weight": NUMBERS,
    "a.bias": NUMBERS[0].bfloat16(),
    "b.weight": NUMBERS.half(),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(2.5),
    "double": NUMBERS.double(),
    "ids": torch.arange(5),
}


def same(checkpoint: Checkpoint, state: State) -> None:
    assert checkpoint.keys() == state.keys()
    for name, tensor in state.items():
        wide = tensor.dtype in (torch.float32, torch.float64)
        read = checkpoint[name].read()
        assert checkpoint[name].shape == tuple(tensor.shape) == tuple(read.shape)
        assert read.dtype == (torch.float32 if wide else tensor.dtype)
        assert torch.equal(read.double(), tensor.double() if not wide else tensor.float().double())


def write_gguf(path: Path, state: dict[str, np.ndarray], kinds: dict[str, str] | None = None, **facts: str) -> Path:
    """A file as the gguf package writes it."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, value in facts.items():
        writer.add_string(name.replace("__", "."), value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""])
    writer.add_array("comfy.gguf.orig_shape.folded", [4, 4, 4, 4])
    for name, array in state.items():
        kind = gguf.GGMLQuantizationType[(kinds or {}).get(name, "F32")]
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["safetensors", "sft"])
def test_safetensors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m.{suffix}"
    save_file(STATE, path, metadata={"format": "pt"})
    checkpoint = open_checkpoint(path)
    same(checkpoint, STATE)
    assert (checkpoint.files, checkpoint.metadata["format"]) == ((path,), "pt")
    assert checkpoint["a.bias"].storage == "bfloat16"
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in STATE.values())
    same(Checkpoint.of(STATE), STATE)


@pytest.mark.parametrize("length", [640, 0x0480])  # in the file: 80 02, and 80 04, as a pickle begins
def test_a_header_length_is_not_taken_for_a_pickle(tmp_path: Path, length: int) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(length)
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", length) + header.encode() + bytes(4))
    assert open_checkpoint(tmp_path / "m.safetensors")["w"].read().tolist() == [0]


def test_gguf(tmp_path: Path) -> None:
    state = {"img_in.weight": NUMBERS.numpy(), "big.weight": np.random.default_rng(0).random((4, 64), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", state | {"folded": np.ones((1, 256), np.float32)}, general__name="dev")
    checkpoint = open_checkpoint(path)
    assert checkpoint.metadata["general.architecture"] == "flux"
    assert checkpoint.metadata["general.name"] == "dev"
    assert torch.equal(checkpoint["img_in.weight"].read(), NUMBERS)
    assert checkpoint["folded"].shape == (4, 4, 4, 4) == tuple(checkpoint["folded"].read().shape)


# ---------------------------------------------------------------------------------------------- folders


def sharded(folder: Path, state: State, index: dict[str, str] | None = None) -> Path:
    names = sorted(state)
    halves = {"one.safetensors": names[: len(names) // 2], "two.safetensors": names[len(names) // 2 :]}
    folder.mkdir(exist_ok=True)
    for file, keys in halves.items():
        save_file({key: state[key] for key in keys}, folder / file)
    table = index or {key: file for file, keys in halves.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def test_shards(tmp_path: Path) -> None:
    same(open_checkpoint(sharded(tmp_path, STATE)), STATE)


def test_scales_may_lie_in_another_shard(tmp_path: Path) -> None:
    codes = torch.randn(4, 4).to(torch.float8_e4m3fn)
    state = {"a.weight": codes, "z.bias": torch.ones(4), "a.scale_weight": torch.tensor(0.5), "b": torch.ones(1)}
    folder = sharded(tmp_path, state)
    assert torch.equal(open_checkpoint(folder)["a.weight"].read(), codes.float() / 2)


def test_a_whole_model(tmp_path: Path) -> None:
    for name in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({"w": torch.zeros(3)}, tmp_path / "text_encoder" / "model.safetensors")
    (tmp_path / "vae" / "config.json").write_text('{"scaling_factor": 0.5}')
    (tmp_path / "model_index.json").write_text("{}")
    sharded(tmp_path / "transformer", STATE)
    checkpoint = open_checkpoint(tmp_path)
    assert {name.partition("/")[0] for name in checkpoint} == {"transformer", "vae", "text_encoder"}
    assert checkpoint["text_encoder/w"].shape == (3,)
    assert checkpoint.metadata["vae/config.json"] == '{"scaling_factor": 0.5}'
    assert checkpoint.metadata["model_index.json"] == "{}"


def test_single_files_side_by_side(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "ae.safetensors")
    save_file({"w": torch.zeros(3)}, tmp_path / "flux1-dev.safetensors")
    assert open_checkpoint(tmp_path)["ae/w"].shape == (2,)


def test_our_own_shards(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(64, 64), "b.weight": torch.randn(40, 40), "a.bias": torch.randn(64)}
    save_compact(state, tmp_path, overrides={"b": "int8"}, shard_bytes=3000)
    checkpoint = open_checkpoint(tmp_path)
    assert {name: entry.storage for name, entry in checkpoint.items()} == {
        "a.weight": "int6", "b.weight": "int8", "a.bias": "float16",
    }  # fmt: skip
    for name, tensor in load_folder(tmp_path).items():
        assert torch.equal(checkpoint[name].read().float(), tensor)
    nano = open_checkpoint(ASSETS / "nano")
    assert {name.partition(".")[0] for name in nano} == {"transformer", "autoencoder", "text"}


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "sub/one.safetensors", "..", "C:\\one.safetensors", "/etc/passwd"]
)
def test_index_files_name_nothing_elsewhere(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / "one.safetensors")
    with pytest.raises(WeightsError, match="allowed plain"):
        open_checkpoint(sharded(tmp_path / "folder", STATE, {"a.bias": name}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_index_files_that_are_none(tmp_path: Path, text: str) -> None:
    save_file(STATE, tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json"):
        open_checkpoint(tmp_path)


def test_shards_and_tensors_that_are_not_there(tmp_path: Path) -> None:
    folder = sharded(tmp_path, STATE, {"a.bias": "three.safetensors"})
    with pytest.raises(WeightsError, match=r"without its file three\.safetensors"):
        open_checkpoint(folder)
    sharded(tmp_path, STATE, {"a.bias": "one.safetensors", "more": "one.safetensors"})
    with pytest.raises(WeightsError, match="1 tensors that no shard has \\(more"):
        open_checkpoint(folder)
    for file in ("one.safetensors", "two.safetensors"):
        save_file(STATE, tmp_path / file)
    sharded_index = {"a.bias": "one.safetensors", "a.weight": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": sharded_index}))
    with pytest.raises(WeightsError, match="twice"):
        open_checkpoint(folder)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="a folder without weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightsError, match="a pickle"):
        open_checkpoint(tmp_path)


# ---------------------------------------------------------------------------------------------- damage


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "safetensors"])
def test_pickles_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"m.{suffix}").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    torch.save({"w": torch.ones(1)}, tmp_path / f"zip.{suffix}")
    for name in (f"m.{suffix}", f"zip.{suffix}"):
        with pytest.raises(WeightsError, match=r"a pickle.*safetensors.*weights_only=True"):
            open_checkpoint(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n", b"GGUF"]
)
def test_files_that_are_no_weights(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"m\.safetensors"):
        open_checkpoint(tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match="cannot be read"):
        open_checkpoint(tmp_path / "none.safetensors")


ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "{",
        "[" * 100_000,
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}',
        {"a": 3},
        {"a": {}},
        {"a": ROW | {"dtype": "F13"}},
        {"a": ROW | {"dtype": []}},
        {"a": ROW | {"shape": [-2]}},
        {"a": ROW | {"shape": [2.0]}},
        {"a": ROW | {"shape": [1 << 40, 1 << 40]}},
        {"a": ROW | {"shape": None}},
        {"a": ROW | {"data_offsets": [8, 0]}},
        {"a": ROW | {"data_offsets": [-8, 0]}},
        {"a": ROW | {"data_offsets": [0, 1 << 70]}},
        {"a": ROW | {"data_offsets": [0, True]}},
        {"a": ROW, "b": ROW},
        {"a": ROW, "b": ROW | {"data_offsets": [4, 12]}},
        {"a": ROW | {"data_offsets": [4, 12]}},
        {"a": ROW, "__metadata__": {"x": 1}},
        {"a": ROW, "__metadata__": []},
    ],
    ids=lambda header: json.dumps(header)[:40],
)
def test_headers_that_lie(tmp_path: Path, header: object) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with pytest.raises(WeightsError, match=r"m\.safetensors"):
        open_checkpoint(tmp_path / "m.safetensors")


def gguf_bytes(folder: Path) -> bytes:
    path = write_gguf(folder / "source.gguf", {"w": np.ones((2, 64), np.float32), "v": np.ones(3, np.float32)})
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_fuzz(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    """Any few bytes changed, any length cut: tensors or a WeightsError, quickly, and nothing else."""
    folder = tmp_path_factory.mktemp("fuzz")
    whole = save(STATE) if kind == "safetensors" else gguf_bytes(folder)
    path = folder / f"m.{kind}"
    edits = st.lists(st.tuples(st.integers(0, min(len(whole), 700) - 1), st.integers(0, 255)), max_size=4)

    @settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
    @given(edits, st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
    def check(edits: list[tuple[int, int]], length: int) -> None:
        data = bytearray(whole)
        for place, value in edits:
            data[place] = value
        path.write_bytes(data[:length])
        with contextlib.suppress(WeightsError):
            for entry in open_checkpoint(path).values():
                assert tuple(entry.read().shape) == entry.shape

    check()


def test_huge_claims_are_refused_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    for kind, tail in ((9, struct.pack("<IQ", 8, 1 << 60)), (9, struct.pack("<IQ", 4, 1 << 60)), (8, b"\xff" * 8)):
        start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
        (tmp_path / "b.safetensors").write_bytes(start + struct.pack("<I", kind) + tail)
        with pytest.raises(WeightsError, match=r"b\.safetensors"):
            open_checkpoint(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0))
    for name in "ab":
        with pytest.raises(WeightsError, match=rf"{name}\.safetensors"):
            open_checkpoint(tmp_path / f"{name}.safetensors")
    assert time.monotonic() - began < 2


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(STATE, path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(WeightsError, match="cut short while it was read"):
        [entry.read() for entry in checkpoint.values()]
    path.unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        checkpoint["a.weight"].read()
