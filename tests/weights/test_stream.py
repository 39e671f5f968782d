"""Streamed, strict loading: the right numbers at the right place, everything wrong named, memory held once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import DEV, VAE, autoencoder, inputs, relative, shrink, transformer
from torch import Tensor, nn

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.clip import ClipText
from fluxloom.core.specs import MODELS, AutoencoderSpec, ClipSpec, T5Spec, TransformerSpec
from fluxloom.core.t5 import T5Encoder
from fluxloom.core.transformer import Transformer
from fluxloom.errors import WeightsError
from fluxloom.weights.checkpoint import Checkpoint, open_checkpoint
from fluxloom.weights.dialects import to_diffusers
from fluxloom.weights.identify import Component, identify
from fluxloom.weights.load import ASSETS, load_folder
from fluxloom.weights.stream import _read_ahead, load_component, load_into, state_of
from fluxloom.weights.text_dialects import TEXT_DIALECTS, TextDialect

State = dict[str, Tensor]
Spec = TransformerSpec | AutoencoderSpec


def on_meta(spec: Spec) -> nn.Module:
    with torch.device("meta"):
        return Transformer(spec) if isinstance(spec, TransformerSpec) else Autoencoder(spec)


def loaded(state: State, spec: Spec, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module of ``spec`` with a checkpoint's weights; toy axes and factors are not in shapes, so they are given."""
    module = on_meta(spec)
    checkpoint = Checkpoint.of(state)
    load_into(module, checkpoint, identify(checkpoint)[0], dtype=dtype)
    return module


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


DIALECTS: dict[str, Callable[[State, Spec], State]] = {
    "official": lambda state, spec: state,
    "diffusers": to_diffusers,
    "all in one": lambda state, spec: prefixed(state, "model.diffusion_model."),
    "folder": lambda state, spec: prefixed(to_diffusers(state, spec), "transformer/"),
}


def scaled_fp8(state: State, spec: Spec) -> State:
    matrices = {name: tensor for name, tensor in state.items() if tensor.ndim == 2}
    codes = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in matrices.items()}
    scales = {name.replace("weight", "scale_weight"): torch.tensor(0.5) for name in matrices}
    return {**state, **codes, **scales}


LOSSLESS = tuple(DIALECTS)
DIALECTS["fp8"] = scaled_fp8
VARIANTS = {
    name: shrink(row.transformer) for name, row in MODELS.items() if name.startswith("flux1") and row.base is None
}


@pytest.mark.parametrize("dialect", LOSSLESS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers(variant: str, dialect: str) -> None:
    spec = VARIANTS[variant]
    ours = transformer(spec, 3)
    module = loaded(DIALECTS[dialect](ours.state_dict(), spec), spec)
    assert not module.training
    for (name, got), (_, expected) in zip(module.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(got, expected), name
        assert not got.requires_grad
    batch = inputs(spec, 0)
    assert relative(module(**batch), ours(**batch)) == 0


@pytest.mark.parametrize("dialect", ["official", "diffusers"])
def test_autoencoders(dialect: str) -> None:
    ours = autoencoder(VAE, 3)
    module = loaded(DIALECTS[dialect](ours.state_dict(), VAE), VAE)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types(dtype: torch.dtype) -> None:
    state = transformer(DEV, 3).state_dict()
    mixed = {name: tensor.bfloat16() if i % 2 else tensor for i, (name, tensor) in enumerate(state.items())}
    module = loaded(mixed, DEV, dtype)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, mixed[name].to(dtype))


def test_what_is_stored_as_wanted_is_not_copied() -> None:
    seen: State = {}
    checkpoint = Checkpoint.of({n: t.bfloat16() for n, t in transformer(DEV, 3).state_dict().items()})

    def remembered(name: str, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def read_once() -> Tensor:
            assert name not in seen
            seen[name] = read()
            return seen[name]

        return read_once

    entries = {name: replace(entry, read=remembered(name, entry.read)) for name, entry in checkpoint.items()}
    module = on_meta(DEV)
    watched = Checkpoint(entries, (), {})
    load_into(module, watched, identify(watched)[0])
    assert all(parameter.data_ptr() == seen[name].data_ptr() for name, parameter in module.named_parameters())


@pytest.mark.parametrize("pinned", [False, True])
def test_only_what_goes_to_a_gpu_is_read_into_pinned_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    asked, plain = [], torch.empty

    def empty(*shape: int, pin_memory: bool = False, **more: object) -> Tensor:
        asked.append(pin_memory)
        return plain(*shape, **more)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # which a machine without a GPU does not have
    sources = [(name, [checkpoint[name]]) for name in checkpoint]
    read = {name: next(parts) for name, parts in _read_ahead(sources, 1 << 20, pinned)}
    assert asked == [pinned, pinned]
    assert torch.equal(read["a"], torch.arange(6.0).view(2, 3))
    assert checkpoint["b"].read().tolist() == [1.0] * 4
    assert asked[2:] == [False]


@pytest.mark.gpu
def test_a_gpu_gets_what_is_in_the_file(tmp_path: Path) -> None:
    model = transformer(DEV, 0)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    (component,) = identify(checkpoint)
    found = load_component(checkpoint, component, "cuda", torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name].cpu(), tensor)


def test_progress_counts_every_tensor() -> None:
    checkpoint = Checkpoint.of(transformer(DEV, 3).state_dict())
    told: list[tuple[int, int]] = []
    load_into(
        on_meta(DEV), checkpoint, identify(checkpoint)[0], progress=lambda done, total: told.append((done, total))
    )
    assert told == [(i, len(checkpoint)) for i in range(1, len(checkpoint) + 1)]


CLIP = ClipSpec(vocab_size=50, width=64, layers=2, heads=1, mlp=96, max_length=11)
T5 = T5Spec(vocab_size=50, width=48, layers=2, heads=3, head_dim=8, mlp=80, buckets=8)


@pytest.mark.parametrize("dialect", TEXT_DIALECTS, ids=lambda row: f"{row.encoder} {row.name}")
@pytest.mark.parametrize("prefix", ["", "text_encoder/", "text_encoders.t5xxl.transformer."])
def test_text_encoders(dialect: TextDialect, prefix: str) -> None:
    spec, ours = (CLIP, ClipText(CLIP)) if dialect.encoder == "clip" else (T5, T5Encoder(T5))
    state = {name: torch.randn_like(tensor) for name, tensor in ours.state_dict().items()}
    checkpoint = Checkpoint.of(prefixed({dialect.theirs(name): tensor for name, tensor in state.items()}, prefix))
    (part,) = identify(checkpoint)
    assert (part.kind, part.dialect, part.spec) == (dialect.encoder, dialect.name, spec)
    module = load_component(checkpoint, part, dtype=torch.float32)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_nano_loads_as_it_always_did() -> None:
    checkpoint = open_checkpoint(ASSETS / "nano")
    state = load_folder(ASSETS / "nano")
    for part in identify(checkpoint):
        module = load_component(checkpoint, part, dtype=torch.float32)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[part.prefix + name])


def test_state_of() -> None:
    state = transformer(DEV, 3).state_dict()
    checkpoint = Checkpoint.of(to_diffusers(state, DEV))
    read = state_of(checkpoint, identify(checkpoint)[0])
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert {t.dtype for t in state_of(checkpoint, identify(checkpoint)[0], torch.float16).values()} == {torch.float16}


# ---------------------------------------------------------------------------------------------- strictness


@pytest.mark.parametrize("dialect", LOSSLESS)
def test_everything_wrong_is_named(dialect: str) -> None:
    state = DIALECTS[dialect](transformer(DEV, 3).state_dict(), DEV)
    names = sorted(name for name in state if "blocks.1." in name and name.endswith("weight"))
    missing, misshapen, integers = names[0], names[1], names[2]
    broken = {name: tensor for name, tensor in state.items() if name != missing}
    broken[misshapen] = torch.cat((state[misshapen], state[misshapen]))
    broken[integers] = state[integers].to(torch.int32)
    extra = names[3].replace("weight", "more")
    broken[extra] = torch.ones(1)
    with pytest.raises(WeightsError) as caught:
        loaded(broken, DEV)
    text = str(caught.value)
    assert f"1 missing ({missing})" in text
    assert f"1 unknown ({extra})" in text
    assert "1 misshapen (" in text
    assert misshapen in text
    assert f"1 of integers ({integers})" in text


def test_parts_that_add_up_but_are_cut_elsewhere() -> None:
    state = to_diffusers(transformer(DEV, 3).state_dict(), DEV)
    q, k = (f"transformer_blocks.0.attn.to_{name}.weight" for name in "qk")
    state[q], state[k] = torch.cat((state[q], state[k][:1])), state[k][1:]
    with pytest.raises(WeightsError, match="1 misshapen"):
        loaded(state, DEV)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dialect", ["official", "diffusers"])
def test_values_that_are_not_finite(dialect: str, value: float) -> None:
    state = {n: t.clone() for n, t in transformer(DEV, 3).state_dict().items()}
    state["single_blocks.1.linear1.weight"][5, 7] = value
    with pytest.raises(WeightsError, match=r"1 tensors with values that are not finite \(single_blocks\.1\.linear1"):
        loaded(DIALECTS[dialect](state, DEV), DEV)


def test_values_too_large_for_float16() -> None:
    state = {n: t.clone() for n, t in transformer(DEV, 3).state_dict().items()}
    state["img_in.bias"][0] = 1e6
    loaded(state, DEV, torch.bfloat16)
    with pytest.raises(WeightsError, match=r"img_in\.bias\), try bfloat16"):
        loaded(state, DEV, torch.float16)


def test_another_member() -> None:
    checkpoint = Checkpoint.of(transformer(VARIANTS["flux1-schnell"], 3).state_dict())
    with pytest.raises(WeightsError, match=r"4 missing \(guidance_in"):
        load_into(on_meta(DEV), checkpoint, identify(checkpoint)[0])


def test_buffers_that_nobody_fills() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        module.register_buffer("table", torch.ones(1), persistent=False)
    checkpoint = Checkpoint.of({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    names = {name: (name,) for name in checkpoint}
    with pytest.raises(WeightsError, match="buffers table"):
        load_into(module, checkpoint, Component(kind="test", dialect="official", prefix="", names=names))


# ---------------------------------------------------------------------------------------------- memory

_MEASURE = """
import re, resource, sys, torch
from fluxloom.core.specs import TransformerSpec
from fluxloom.core.transformer import Transformer
from fluxloom.weights.checkpoint import open_checkpoint
from fluxloom.weights.identify import identify
from fluxloom.weights.stream import load_into
def memory(what):
    return int(re.search(rf"{what}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
checkpoint = open_checkpoint(sys.argv[1])
part, = identify(checkpoint)
with torch.device("meta"):
    module = Transformer(part.spec)
x = torch.ones(4, 4).bfloat16(); torch.aminmax(x)
before = memory("VmRSS")
load_into(module, checkpoint, part)
stays = sum(p.nbytes for p in module.parameters())
print(stays, memory("VmHWM") - before, memory("VmRSS") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dialect", ["official", "diffusers", "fp8"])
def test_memory_peaks_at_most_a_tenth_above_what_stays(tmp_path: Path, dialect: str) -> None:
    """2 GB in bfloat16: a twelfth of dev, at a head of 128 so that the shapes tell all."""
    spec = TransformerSpec(hidden_size=1024, num_heads=8, depth=17, depth_single_blocks=22)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(spec).state_dict().items()}
    state = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    state = {name: tensor.contiguous() for name, tensor in DIALECTS[dialect](state, spec).items()}
    save_file(state, tmp_path / "m.safetensors")
    assert dialect != "fp8" or len(state) > len(shapes)
    del state
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, tmp_path / "m.safetensors"], capture_output=True, text=True, check=True
    )
    stays, peak, _ = map(int, run.stdout.split())
    assert stays > 1e9
    assert peak <= 1.1 * stays, (stays, peak)
