"""Storage formats: each decoded by its definition, written out here in loops, or by the package that owns it."""

from __future__ import annotations

import json
import sys

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from fluxloom.errors import WeightsError
from fluxloom.weights import stored
from fluxloom.weights.checkpoint import Checkpoint
from fluxloom.weights.stored import GGUF_TYPES, KINDS, Raw

GENERATOR = torch.Generator().manual_seed(1)
W = torch.randn(12, 64, generator=GENERATOR)
F8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def text(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def one(state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> tuple[str, Tensor]:
    """Storage and numbers of l.weight; every helper must be gone."""
    checkpoint = Checkpoint.of(state, metadata)
    assert set(checkpoint) == {"l.weight"}
    entry = checkpoint["l.weight"]
    assert entry.nbytes == sum(tensor.nbytes for name, tensor in state.items() if not name.endswith("scaled_fp8"))
    return entry.storage, entry.read()


# ---------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("storage", F8)
def test_plain_fp8(storage: str) -> None:
    codes = W.to(F8[storage])
    assert one({"l.weight": codes})[0] == storage
    assert torch.equal(one({"l.weight": codes})[1], codes.float())


SCALES = {"one": torch.tensor(0.25), "one of one": torch.tensor([0.25]), "a row": torch.rand(12, 1) + 0.5}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", F8.values())
def test_scaled_fp8(dtype: torch.dtype, scale: str) -> None:
    codes, scales = W.to(dtype), SCALES[scale]
    expected = codes.float() * scales
    old = {"l.weight": codes, "l.scale_weight": scales, "l.scale_input": torch.ones(()), "scaled_fp8": codes[:0, 0]}
    new = {"l.weight": codes, "l.weight_scale": scales, "l.input_scale": torch.ones(())}
    quant = {"l.comfy_quant": text({"format": "float8_e4m3fn"})}
    facts = {"_quantization_metadata": json.dumps({"layers": {"l": {"format": "float8_e4m3fn"}}})}
    for state, metadata in ((old, None), (new, facts), (new | quant, None)):
        storage, read = one(state, metadata)
        assert storage == "fp8_scaled"
        assert torch.equal(read, expected)


def test_int8() -> None:
    codes = torch.randint(-127, 128, (12, 64), dtype=torch.int8, generator=GENERATOR)
    scale = torch.rand(12)
    assert torch.equal(one({"l.weight": codes, "l.weight_scale": scale[:1]})[1], codes.float() * scale[0])
    storage, read = one({"l.weight": codes, "l.SCB": scale, "l.weight_format": torch.tensor(0, dtype=torch.uint8)})
    assert storage == "bnb_int8"
    torch.testing.assert_close(read, codes.float() * scale[:, None] / 127)


@pytest.mark.parametrize(
    ("state", "metadata"),
    [
        ({"l.comfy_quant": text({"format": "mxfp8"})}, {}),
        ({"l.comfy_quant": text({"format": "int8_tensorwise", "convrot": True})}, {}),
        ({"l.comfy_quant": text([])}, {}),
        ({"l.comfy_quant": text({})[:1]}, {}),
        ({}, {"_quantization_metadata": json.dumps({"layers": {"l": {"format": "nvfp4"}}})}),
        ({}, {"_quantization_metadata": "{"}),
        ({"l.weight_scale": torch.ones(5)}, {}),
    ],
)
def test_what_comfyui_did_beyond_scales_is_refused(state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    whole = {"l.weight": W.to(torch.float8_e4m3fn), "l.weight_scale": torch.ones(())} | state
    with pytest.raises(WeightsError, match="try"):
        Checkpoint.of(whole, metadata)["l.weight"].read()


@pytest.mark.parametrize(
    ("name", "what"),
    [("l.wscales", "SVDQuant"), ("l.weight_scale_2", "NVFP4"), ("l.qzeros", "GPTQ"), ("l.weight._data", "quanto")],
)
def test_formats_that_are_recognised_and_refused(name: str, what: str) -> None:
    with pytest.raises(WeightsError, match=rf"{what}.*try the bf16, fp8 or GGUF file"):
        Checkpoint.of({"l.qweight": W.to(torch.int8), name: W})


def test_helpers_without_codes_stay_and_are_named_later() -> None:
    assert set(Checkpoint.of({"l.weight": W, "l.scale_weight": W[0, 0]})) == {"l.weight", "l.scale_weight"}


# ---------------------------------------------------------------------------------------------- bitsandbytes

NF4 = torch.tensor(
    [
        -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
        0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
    ]
)  # fmt: skip


def bnb(
    shape: tuple[int, ...], block: int = 64, nested: bool = False, kind: str = "nf4"
) -> tuple[dict[str, Tensor], Tensor]:
    """A state of random codes, and the weights it stands for."""
    count = int(np.prod(shape))
    codes = torch.randint(0, 256, ((count + 1) // 2, 1), dtype=torch.uint8, generator=GENERATOR)
    blocks = -(-count // block)
    facts: dict[str, object] = {"blocksize": block, "shape": list(shape), "dtype": "bfloat16", "quant_type": kind}
    state = {"l.weight": codes, "l.weight.quant_map": NF4}
    if nested:
        inner = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=GENERATOR)
        levels, outer = torch.rand(256, generator=GENERATOR), torch.rand(-(-blocks // 4), generator=GENERATOR)
        scales = torch.tensor([float(levels[int(c)]) * float(outer[i // 4]) + 0.5 for i, c in enumerate(inner)])
        state |= {"l.weight.absmax": inner, "l.weight.nested_absmax": outer, "l.weight.nested_quant_map": levels}
        facts |= {"nested_blocksize": 4, "nested_offset": 0.5, "nested_dtype": "float32"}
    else:
        scales = state["l.weight.absmax"] = torch.rand(blocks, generator=GENERATOR)
    state[f"l.weight.quant_state.bitsandbytes__{kind}"] = text(facts)
    flat = [int(code) for byte in codes.flatten() for code in (byte >> 4, byte & 15)][:count]
    weights = torch.stack([NF4[code] * scales[i // block] for i, code in enumerate(flat)])
    return state, weights.reshape(shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(12, 64), (3, 100), (5, 7)])
def test_bitsandbytes(shape: tuple[int, ...], nested: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "CHUNK", 128)  # several pieces
    state, weights = bnb(shape, nested=nested, kind=kind)
    storage, read = one(state)
    assert storage == kind
    torch.testing.assert_close(read, weights)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [12, 65]},
        {"shape": None},
        {"shape": [-12, -64]},
        {"shape": [1 << 62, 1 << 62]},
        {"blocksize": 0},
        {"blocksize": "64"},
        {"blocksize": 32},
        {"nested_blocksize": 0},
        {"nested_offset": None},
    ],
)
def test_bitsandbytes_states_that_lie(change: dict[str, object]) -> None:
    state, _ = bnb((12, 64), nested=True)
    name = "l.weight.quant_state.bitsandbytes__nf4"
    state[name] = text(json.loads(bytes(state[name].tolist())) | change)
    with pytest.raises(WeightsError, match=r"l\.weight"):
        Checkpoint.of(state)["l.weight"].read()


def test_bitsandbytes_tables_of_other_sizes() -> None:
    for name, count in (("quant_map", 8), ("nested_quant_map", 16), ("nested_absmax", 1)):
        state, _ = bnb((12, 64 * 9), nested=True)
        state[f"l.weight.{name}"] = state[f"l.weight.{name}"][:count]
        with pytest.raises(WeightsError, match=r"l\.weight"):
            Checkpoint.of(state)["l.weight"].read()


# ---------------------------------------------------------------------------------------------- GGUF

BLOCKS = [name for name in GGUF_TYPES.values() if KINDS[name].block > 1]


def test_the_table_of_types_is_that_of_the_package() -> None:
    for number, name in GGUF_TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (kind.value, gguf.GGML_QUANT_SIZES[kind]) == (number, (KINDS[name].block, KINDS[name].size))


@pytest.mark.parametrize("name", BLOCKS)
def test_gguf_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random bytes, decoded in pieces, against the package on the whole."""
    monkeypatch.setattr(stored, "CHUNK", 1024)
    raw = Raw(name, (7, 512), lambda: data)
    data = torch.randint(0, 256, (raw.nbytes,), dtype=torch.uint8, generator=GENERATOR)
    rows = data.reshape(7, -1).numpy()
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])
    read = raw.tensor()
    assert (read.dtype, tuple(read.shape)) == (torch.float32, (7, 512))
    np.testing.assert_array_equal(read.numpy(), expected)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WeightsError, match=r"Q8_0.*try pip install gguf"):
        Raw("Q8_0", (1, 32), lambda: torch.zeros(34, dtype=torch.uint8)).tensor()
    assert Raw("F32", (1,), lambda: torch.zeros(4, dtype=torch.uint8)).tensor().tolist() == [0]


def test_columns_that_are_no_whole_blocks() -> None:
    with pytest.raises(WeightsError, match="48 columns of Q8_0, allowed a multiple of 32"):
        KINDS["Q8_0"].nbytes((4, 48))


# ---------------------------------------------------------------------------------------------- our own


@pytest.mark.parametrize(
    "header",
    [
        "{",
        "[]",
        '{"schema": 2}',
        '{"schema": 1, "tensors": {"l.weight": 3}}',
        '{"schema": 1, "tensors": {"l.weight": {"format": "int8", "shape": [12, 64]}}}',
        '{"schema": 1, "tensors": {"l.weight": {"format": "float16", "shape": [-1]}}}',
    ],
)
def test_fluxloom_headers_that_lie(header: str) -> None:
    with pytest.raises(WeightsError, match="got a fluxloom header"):
        Checkpoint.of({"l.weight": W}, {"fluxloom": header})
