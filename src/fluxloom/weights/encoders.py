"""Storage formats as they are written: the other direction of ``stored``, one row a form.

    fp8      e4m3 with one scale a matrix, as ComfyUI names it                              1.0 bytes a weight
    int8     groups of 32 with float16 scales (formats)                                     1.06
    nf4      16 levels, blocks of 64 with float32 scales, as bitsandbytes names it          0.56
    q8_0     GGUF: groups of 32 with float16 scales, by the gguf package                    1.06
    q4_k     GGUF: blocks of 32 with six bit scales and offsets (kquants)                   0.56

Only matrices inside the blocks are quantised: the outer layers are few and carry the most error (as GGUF's tools do).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fluxloom.weights.formats import GROUP, quantise
from fluxloom.weights.kquants import q4_k
from fluxloom.weights.stored import CHUNK, KINDS, Raw, fold, gguf_quants

Shape = tuple[int, ...]
Array = tuple[str, str, Shape]  # name, kind (of stored.KINDS), shape

# Layers, by the beginnings of our names, that stay in 16 bits; embeddings of tokens and positions likewise.
_OUTER = ("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.", "redux_")
_TABLES = ("shared.weight", "embedding.weight", "attention_bias.weight", "token.weight", "position")
_E4M3_MOST = 448.0
# The 16 quantiles of a normal distribution, as printed in QLoRA (Dettmers et al. 2023, appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BLOCK = 64


@dataclass(frozen=True)
class Form:
    """How one tensor is written: ``arrays`` names what it becomes, ``encode`` makes those, as tensors of bytes or
    numbers in the same order. ``block``: its last axis must be a multiple of that."""

    arrays: Callable[[str, Shape], list[Array]]
    encode: Callable[[Tensor], list[Tensor]]
    block: int = 1


def is_quantised(name: str, shape: Shape, form: Form) -> bool:
    """Whether a tensor (by our name and shape) is one that is stored in few bits."""
    inner = len(shape) == 2 and not name.startswith(_OUTER) and not name.endswith(_TABLES)
    return inner and prod(shape) > 1024 and shape[1] % form.block == 0


def plain(kind: str) -> Form:
    """A form of one array of floats."""
    return Form(lambda name, shape: [(name, kind, shape)], lambda tensor: [tensor.to(DTYPES[kind])])


DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
KEPT: Mapping[str, str] = MappingProxyType({"float32": "F32", "float16": "F16", "bfloat16": "BF16"})


def _layer(name: str) -> str:
    return name.removesuffix("weight")


def _fp8_arrays(name: str, shape: Shape) -> list[Array]:
    return [(name, "F8_E4M3", shape), (f"{_layer(name)}scale_weight", "F32", ())]


def _fp8(tensor: Tensor) -> list[Tensor]:
    w = tensor.float()
    scale = w.abs().amax().clamp_(min=torch.finfo(torch.float32).tiny) / _E4M3_MOST
    return [(w / scale).clamp_(-_E4M3_MOST, _E4M3_MOST).to(torch.float8_e4m3fn), scale]


def _int8_arrays(name: str, shape: Shape) -> list[Array]:
    groups = -(-shape[1] // GROUP)
    return [(name, "I8", (shape[0], groups * GROUP)), (f"{name}.scale", "F16", (shape[0], groups))]


def _int8(tensor: Tensor) -> list[Tensor]:
    stored = quantise(tensor, "int8")
    return [stored["codes"], stored["scale"]]


def _nf4_state(shape: Shape) -> bytes:
    return json.dumps({"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": "bfloat16", "shape": list(shape)}).encode()


def _nf4_arrays(name: str, shape: Shape) -> list[Array]:
    count = prod(shape)
    return [
        (name, "U8", (count // 2, 1)),
        (f"{name}.absmax", "F32", (count // NF4_BLOCK,)),
        (f"{name}.quant_map", "F32", (16,)),
        (f"{name}.quant_state.bitsandbytes__nf4", "U8", (len(_nf4_state(shape)),)),
    ]


def _nf4(tensor: Tensor) -> list[Tensor]:
    levels = torch.tensor(NF4_LEVELS)
    between = (levels[1:] + levels[:-1]) / 2
    blocks = tensor.reshape(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(1).float()
    codes = torch.empty(tensor.numel() // 2, 1, dtype=torch.uint8)
    for start in range(0, len(blocks), step := CHUNK // NF4_BLOCK):
        part, scale = blocks[start : start + step].float(), absmax[start : start + step, None]
        found = torch.bucketize(part / torch.where(scale > 0, scale, 1.0), between).to(torch.uint8).flatten()
        first = start * NF4_BLOCK // 2
        codes[first : first + found.numel() // 2, 0] = found[::2] << 4 | found[1::2]
    state = torch.tensor(list(_nf4_state(tuple(tensor.shape))), dtype=torch.uint8)
    return [codes, absmax, levels, state]


def _gguf_arrays(kind: str, name: str, shape: Shape) -> list[Array]:
    return [(name, kind, shape)]


def _gguf(kind: str, tensor: Tensor) -> list[Tensor]:
    rows = max(1, CHUNK // tensor.shape[1])
    parts = [gguf_quants("quantize", part.float().numpy(), kind) for part in tensor.split(rows)]
    return [torch.cat([torch.from_numpy(part) for part in parts])]


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "fp8": Form(_fp8_arrays, _fp8),
        "int8": Form(_int8_arrays, _int8),
        "nf4": Form(_nf4_arrays, _nf4, NF4_BLOCK),
        "q4_k": Form(partial(_gguf_arrays, "Q4_K"), lambda tensor: [q4_k(tensor)], KINDS["Q4_K"].block),
        "q8_0": Form(partial(_gguf_arrays, "Q8_0"), partial(_gguf, "Q8_0"), KINDS["Q8_0"].block),
    }
)


def relative_error(tensor: Tensor, arrays: list[Array], encoded: list[Tensor], metadata: Mapping[str, str]) -> float:
    """RMS of what was lost over RMS of what was there, read back by the very reader of such files."""
    raws = {
        name: Raw(kind, shape, partial(_bytes, part)) for (name, kind, shape), part in zip(arrays, encoded, strict=True)
    }
    back = fold(raws, metadata)[arrays[0][0]].read()
    lost = torch.linalg.vector_norm(back.float() - tensor.float())
    there = torch.linalg.vector_norm(tensor.float())
    return float(lost / there) if there > 0 else float(lost)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8).clone()


def compact_header(rows: Mapping[str, tuple[str, Shape]]) -> str:
    """The header of fluxloom's own files: form and shape of each tensor."""
    table: dict[str, Any] = {name: {"format": form, "shape": list(shape)} for name, (form, shape) in rows.items()}
    return json.dumps({"schema": 1, "tensors": table}, sort_keys=True)
