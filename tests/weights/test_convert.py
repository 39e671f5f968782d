"""Conversion: every target read back by its owner's software and by ours, what it costs, and nothing half-written.

With CHECKPOINT_TABLE=FILE the matrix of dialects, formats and members is written there as a table.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from oracles import AutoencoderKL, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import VAE, autoencoder, inputs, relative, shrink, transformer
from torch import Tensor

from fluxloom.core.specs import MODELS, AutoencoderSpec, TransformerSpec
from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput, OutputError, WeightsError
from fluxloom.weights.checkpoint import Checkpoint, open_checkpoint
from fluxloom.weights.convert import TARGETS, Report, convert
from fluxloom.weights.dialects import to_diffusers, to_official
from fluxloom.weights.encoders import NF4_LEVELS
from fluxloom.weights.identify import choose, identify
from fluxloom.weights.load import load_compact
from fluxloom.weights.stream import load_component, load_into

State = dict[str, Tensor]
VARIANTS = {n: shrink(row.transformer) for n, row in MODELS.items() if n.startswith("flux1") and row.base is None}
DEV = VARIANTS["flux1-dev"]
SUFFIX = {to: ".gguf" if target.container == "gguf" else ".safetensors" for to, target in TARGETS.items()}


def written(state: State, to: str, folder: Path, member: str | None = None) -> Report:
    checkpoint = Checkpoint.of(state)
    return convert(checkpoint, identify(checkpoint)[0], folder / f"m{SUFFIX[to]}", to, member)


# ---------------------------------------------------------------------------------------------- oracles


def plain_state(path: Path, spec: TransformerSpec) -> State:
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    return to_official(state, spec) if "x_embedder.weight" in state else state


def scaled_state(path: Path, spec: TransformerSpec) -> State:
    state = load_file(path)
    assert state["scaled_fp8"].dtype == torch.float8_e4m3fn
    scales = {n.removesuffix("scale_weight") + "weight": t for n, t in state.items() if n.endswith("scale_weight")}
    weights = {n: t for n, t in state.items() if not n.endswith(("scale_weight", "scaled_fp8"))}
    assert all((t.dtype == torch.float8_e4m3fn) == (n in scales) for n, t in weights.items())
    return {name: tensor.float() * scales.get(name, 1) for name, tensor in weights.items()}


def nf4_state(path: Path, spec: TransformerSpec) -> State:
    state = load_file(path)
    out = {}
    for name, tensor in state.items():
        if f"{name}.absmax" in state:
            facts = json.loads(bytes(state[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
            codes = np.stack([tensor.numpy() >> 4, tensor.numpy() & 15], axis=-1).reshape(-1, facts["blocksize"])
            values = state[f"{name}.quant_map"].numpy()[codes] * state[f"{name}.absmax"].numpy()[:, None]
            out[name] = torch.from_numpy(values).reshape(facts["shape"])
        elif ".weight." not in name:
            out[name] = tensor.float()
    return out


def gguf_state(path: Path, spec: TransformerSpec) -> State:
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "flux"
    tensors = {t.name: (gguf.quants.dequantize(t.data, t.tensor_type), t.shape.tolist()) for t in reader.tensors}
    return {n: torch.from_numpy(values.copy()).reshape(shape[::-1]).float() for n, (values, shape) in tensors.items()}


ORACLES: dict[str, Callable[[Path, TransformerSpec], State]] = {
    "official": plain_state,
    "diffusers": plain_state,
    "bf16": plain_state,
    "fp8": scaled_state,
    "int8": lambda path, spec: load_compact([path]),
    "nf4": nf4_state,
    "gguf-q8_0": gguf_state,
    "gguf-q4_k": gguf_state,
}
# The most that the velocity of a toy may change: RMS, relative; and what the matrices lose on Gaussian weights.
COSTS = {
    "official": 0,
    "diffusers": 0,
    "bf16": 0.02,
    "fp8": 0.1,
    "int8": 0.02,
    "nf4": 0.3,
    "gguf-q8_0": 0.02,
    "gguf-q4_k": 0.3,
}
LOSSES = {"fp8": 0.0265, "int8": 0.0049, "nf4": 0.0955, "gguf-q8_0": 0.0056, "gguf-q4_k": 0.075}


def velocity(spec: TransformerSpec, state: State) -> Tensor:
    module = Transformer(spec)
    module.load_state_dict(state)
    with torch.no_grad():
        out: Tensor = module.eval()(**inputs(spec, 0))
    return out


@pytest.fixture(scope="module")
def rows() -> Iterator[list[tuple[str, ...]]]:
    """Rows of the table that CHECKPOINT_TABLE asks for."""
    found: list[tuple[str, ...]] = []
    yield found
    if path := os.environ.get("CHECKPOINT_TABLE"):
        head = ("member", "read from", "written as", "parity error", "change of the velocity")
        lines = [" | ".join(row) for row in (head, ("---",) * len(head), *sorted(found))]
        Path(path).write_text("".join(f"| {line} |\n" for line in lines), "utf-8")


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("dialect", ["official", "diffusers"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matrix(variant: str, dialect: str, to: str, tmp_path: Path, rows: list[tuple[str, ...]]) -> None:
    """From every dialect to every format: what we load is what the format's owner reads, and costs what it must."""
    spec = VARIANTS[variant]
    ours = transformer(spec, 5).state_dict()
    report = written(to_diffusers(ours, spec) if dialect == "diffusers" else ours, to, tmp_path, variant)
    path = Path(report.path)
    checkpoint = open_checkpoint(path)
    (part,) = identify(checkpoint)
    assert (part.dialect, part.unknown) == ("diffusers" if to == "diffusers" else "official", ())
    with torch.device("meta"):
        module = Transformer(spec)
    load_into(module, checkpoint, part, dtype=torch.float32)
    with torch.no_grad():
        got = module(**inputs(spec, 0))
    parity = relative(got, velocity(spec, ORACLES[to](path, spec)))
    original = velocity(spec, ours)
    cost = float((got - original).norm() / original.norm())
    assert parity < 1e-5
    assert cost <= COSTS[to]
    assert (cost == 0) == (COSTS[to] == 0)
    rows.append((variant, dialect, to, f"{parity:.1e}", f"{cost:.1%}"))


@pytest.mark.parametrize("to", LOSSES)
def test_the_report_tells_what_each_layer_lost(to: str, tmp_path: Path) -> None:
    state = transformer(DEV, 5).state_dict()
    report = written(state, to, tmp_path)
    back = ORACLES[to](Path(report.path), DEV)
    assert "img_in.weight" not in report.errors
    assert "double_blocks.0.img_mlp.2.weight" in report.errors
    for name, tensor in state.items():
        lost = float((back[name] - tensor).norm() / tensor.norm())
        assert report.errors.get(name, 0) == pytest.approx(lost, rel=1e-3, abs=1e-6), name
    assert report.to_dict()["mean"] == pytest.approx(LOSSES[to], rel=0.1)
    worst = report.worst(3)
    assert list(worst.values()) == sorted(report.errors.values(), reverse=True)[:3]
    assert report.nbytes == Path(report.path).stat().st_size


def test_nf4_takes_the_nearest_level(tmp_path: Path) -> None:
    state = transformer(DEV, 5).state_dict()
    name = "single_blocks.0.linear1.weight"
    back = nf4_state(Path(written(state, "nf4", tmp_path).path), DEV)[name].reshape(-1, 64)
    blocks = state[name].reshape(-1, 64)
    levels = torch.tensor(NF4_LEVELS)[None, None] * blocks.abs().amax(1)[:, None, None]
    assert torch.allclose((back - blocks).abs(), (levels - blocks[..., None]).abs().amin(-1), atol=1e-6)


def test_matrices_of_zeros(tmp_path: Path) -> None:
    state = transformer(DEV, 5).state_dict() | {"double_blocks.0.img_mlp.2.weight": torch.zeros(64, 256)}
    for to in LOSSES:
        report = written(state, to, tmp_path)
        assert report.errors["double_blocks.0.img_mlp.2.weight"] == 0


# ---------------------------------------------------------------------------------------------- other software


def test_diffusers_loads_the_folder(tmp_path: Path) -> None:
    spec = TransformerSpec(
        hidden_size=64,
        num_heads=2,
        axes_dim=(4, 14, 14),
        depth=1,
        depth_single_blocks=1,
        context_in_dim=8,
        vec_in_dim=8,
    )
    checkpoint = Checkpoint.of(transformer(spec, 5).state_dict())
    convert(checkpoint, identify(checkpoint)[0], tmp_path / "transformer", "diffusers")
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    expected = to_diffusers({name: entry.read() for name, entry in checkpoint.items()}, spec)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())
    assert tuple(theirs.config.axes_dims_rope) == spec.axes_dim
    vae_spec = AutoencoderSpec(ch=64, ch_mult=(1, 2), num_res_blocks=1)
    checkpoint = Checkpoint.of(autoencoder(vae_spec, 5).state_dict())
    convert(checkpoint, identify(checkpoint)[0], tmp_path / "vae", "diffusers")
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    expected = to_diffusers({name: entry.read() for name, entry in checkpoint.items()}, vae_spec)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in vae.state_dict().items())
    again = {part.kind: part for part in identify(open_checkpoint(tmp_path))}
    assert (again["transformer"].spec, again["autoencoder"].spec) == (spec, vae_spec)


def test_the_member_is_known_again(tmp_path: Path) -> None:
    state = {n: t.half() for n, t in transformer(MODELS["nano"].transformer, 5).state_dict().items()}
    for to in ("fp8", "gguf-q8_0"):
        report = written(state, to, tmp_path, "nano")
        (part,) = identify(open_checkpoint(report.path))
        assert (part.candidates, part.basis, choose(part).name) == (("nano",), "metadata", "nano")


def test_floats_keep_their_width(tmp_path: Path) -> None:
    state = {n: t.half() if "single" in n else t for n, t in transformer(DEV, 5).state_dict().items()}
    for to in ("official", "fp8"):
        with safe_open(written(state, to, tmp_path).path, "pt") as file:
            assert file.get_tensor("single_blocks.0.linear1.bias").dtype == torch.float16
            assert file.get_tensor("img_in.weight").dtype == torch.float32
            assert file.metadata()["format"] == "pt"


def test_other_components(tmp_path: Path) -> None:
    checkpoint = Checkpoint.of(autoencoder(VAE, 5).state_dict())
    report = convert(checkpoint, identify(checkpoint)[0], tmp_path / "ae.safetensors", "fp8")
    assert not report.errors  # convolutions stay
    opened = open_checkpoint(report.path)
    module = load_component(opened, identify(opened)[0], dtype=torch.float32)
    assert all(torch.equal(tensor, checkpoint[name].read()) for name, tensor in module.state_dict().items())


# ---------------------------------------------------------------------------------------------- refusals


def test_what_is_refused(tmp_path: Path) -> None:
    state = transformer(DEV, 5).state_dict()
    for to, name, what in [
        ("int3", "m.safetensors", "allowed official, diffusers"),
        ("fp8", "m.gguf", r"try .*m\.safetensors"),
        ("gguf-q8_0", "m.safetensors", r"try .*m\.gguf"),
        ("fp8", "m", r"allowed a \.safetensors file"),
    ]:
        checkpoint = Checkpoint.of(state)
        with pytest.raises(BadInput, match=what):
            convert(checkpoint, identify(checkpoint)[0], tmp_path / name, to)
    clip = Checkpoint.of({"redux_up.weight": torch.ones(2, 2), "redux_down.weight": torch.ones(2, 2)})
    with pytest.raises(BadInput, match="got a redux to convert"):
        convert(clip, identify(clip)[0], tmp_path / "m.safetensors", "fp8")
    vae = Checkpoint.of(autoencoder(VAE, 5).state_dict())
    with pytest.raises(BadInput, match="allowed for transformers"):
        convert(vae, identify(vae)[0], tmp_path / "m.gguf", "gguf-q8_0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["fp8", "gguf-q8_0"])
def test_nothing_is_left_behind(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {n: t.clone() for n, t in transformer(DEV, 5).state_dict().items()}
    state["final_layer.linear.bias"][3] = float("nan")
    (tmp_path / f"m{SUFFIX[to]}").write_text("precious")
    with pytest.raises(WeightsError, match=r"final_layer\.linear\.bias with values that are not finite"):
        written(state, to, tmp_path)
    with pytest.raises(WeightsError, match=r"1 missing \(img_in\.bias"):
        written({n: t for n, t in state.items() if n != "img_in.bias"}, to, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OutputError, match="of room for"):
        written(state, to, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="to write to"):
        written(transformer(DEV, 5).state_dict(), "fp8", tmp_path / "file")


def test_shards_of_ours_and_others(tmp_path: Path) -> None:
    """Sources may be folders: nano's, and shards with an index."""
    state = {n: t.contiguous() for n, t in to_diffusers(transformer(DEV, 5).state_dict(), DEV).items()}
    save_file(state, tmp_path / "one.safetensors")
    index = {"weight_map": dict.fromkeys(state, "one.safetensors")}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    report = convert(checkpoint, identify(checkpoint)[0], tmp_path / "out" / "m.safetensors", "official")
    back = load_file(report.path)
    assert all(torch.equal(back[n], t) for n, t in transformer(DEV, 5).state_dict().items())
