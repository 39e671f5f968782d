"""How single tensors lie in the files of other tools, and how each becomes numbers again: two tables.

``KINDS`` are the arrays that a file holds as such; ``SCHEMES`` are codes with helper tensors beside them (scales,
tables, states), which :func:`fold` folds into one entry. GGUF's blocks are one array each and live in KINDS too.

Sources: the safetensors format; ComfyUI's scaled fp8 in both of its forms; bitsandbytes' 4 and 8 bit states; the
GGUF block types, decoded by the ``gguf`` package (150 to 350 million weights a second and core: a minute for 12 B).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fluxloom.errors import WeightsError
from fluxloom.weights.formats import LIMITS, dequantise

INTEGER = "integer"  # the storage of arrays that are no weights
CHUNK = 1 << 20  # weights decoded at a time, so that the temporaries of a decoder stay small


@dataclass(frozen=True)
class Entry:
    """One tensor as it lies in a file; nothing is read until asked for.

    shape    of the decoded tensor
    storage  how it is stored: "bfloat16", "fp8_scaled", "nf4", "Q4_K", ...
    nbytes   on disk, scales included
    read     the decoded tensor on the CPU, owned by the caller: 16-bit floats and integers in their own dtype,
             everything else float32; raises WeightsError for what cannot be read
    """

    shape: tuple[int, ...]
    storage: str
    nbytes: int
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Raw:
    """One array of a file: its kind (a key of KINDS), its shape in numbers, and its bytes as a uint8 tensor.

    ``stored`` where blocks do not lie along the last axis of ``shape``, but of another shape of as many numbers.
    """

    kind: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    stored: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return KINDS[self.kind].nbytes(self.stored or self.shape)

    def tensor(self) -> Tensor:
        """The numbers as stored, without scales."""
        return KINDS[self.kind].decode(self.load(), self.stored or self.shape).reshape(self.shape)


# ---------------------------------------------------------------------------------------------- arrays


@dataclass(frozen=True)
class Kind:
    """An array of ``block`` numbers in ``size`` bytes each time; blocks lie along the last axis."""

    storage: str
    block: int
    size: int
    decode: Callable[[Tensor, tuple[int, ...]], Tensor]

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of such an array. Raises WeightsError where the last axis is no whole number of blocks."""
        last = shape[-1] if shape else 1
        if last % self.block:
            raise WeightsError(f"got {last} columns of {self.storage}, allowed a multiple of {self.block}")
        return prod(shape) // self.block * self.size


def _plain(stored: torch.dtype, wanted: torch.dtype, data: Tensor, shape: tuple[int, ...]) -> Tensor:
    return data.view(stored).reshape(shape).to(wanted)


def _blocks(name: str, data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """GGUF blocks as float32, some rows at a time."""
    kind = KINDS[name]
    rows = data.reshape(-1, shape[-1] // kind.block * kind.size)
    out = torch.empty(rows.shape[0], shape[-1])
    step = max(1, CHUNK // shape[-1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step].numpy()
        out[start : start + step] = torch.from_numpy(gguf_quants("dequantize", part, name))
    return out.reshape(shape)


def gguf_quants(task: str, array: Any, name: str) -> Any:
    """``gguf.quants.dequantize`` or ``.quantize``, of numpy arrays. Raises WeightsError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise WeightsError(f"got GGUF type {name}, allowed with the package gguf, try pip install gguf") from error
    import numpy as np

    with np.errstate(all="ignore"):  # nonsense in, nonsense out: what is not finite is refused by name later
        return getattr(gguf.quants, task)(array, gguf.GGMLQuantizationType[name])


def _kinds() -> Iterator[tuple[str, Kind]]:
    floats = {"F64": torch.float64, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    halves = {"F16": torch.float16, "BF16": torch.bfloat16}
    integers = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    storage = {"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}
    for name, dtype in {**floats, **halves, **integers, "BOOL": torch.bool}.items():
        wanted = torch.float32 if name in floats else dtype
        title = INTEGER if name in integers or name == "BOOL" else str(dtype).removeprefix("torch.")
        yield name, Kind(storage.get(name, title), 1, dtype.itemsize, partial(_plain, dtype, wanted))
    for name, block, size in (
        ("Q8_0", 32, 34),
        ("Q5_1", 32, 24),
        ("Q5_0", 32, 22),
        ("Q4_1", 32, 20),
        ("Q4_0", 32, 18),
        ("IQ4_NL", 32, 18),
        ("Q2_K", 256, 84),
        ("Q3_K", 256, 110),
        ("Q4_K", 256, 144),
        ("Q5_K", 256, 176),
        ("Q6_K", 256, 210),
        ("IQ4_XS", 256, 136),
    ):
        yield name, Kind(name, block, size, partial(_blocks, name))


KINDS: Mapping[str, Kind] = MappingProxyType(dict(_kinds()))
GGUF_TYPES: Mapping[int, str] = MappingProxyType(
    {
        0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
        13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
        30: "BF16",
    }
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- codes and helpers


Parts = Mapping[str, Raw]


@dataclass(frozen=True)
class Scheme:
    """Codes in ``<layer>.weight`` and what belongs to them under ``<layer>.``: ``needs`` must be there, ``may`` can.

    ``shape`` tells the decoded shape from the parts, ``decode`` the numbers; "" is the part with the codes.
    """

    storage: str
    kinds: tuple[str, ...]
    needs: tuple[str, ...]
    may: tuple[str, ...]
    decode: Callable[[Parts, tuple[int, ...]], Tensor]
    shape: Callable[[Parts], tuple[int, ...]] = field(default=lambda parts: parts[""].shape)


def _scaled(scale: str, factor: float, parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """codes x scale x factor: one scale for all, or one a row."""
    scales = parts[scale].tensor().float()
    if scales.numel() not in (1, shape[0]):
        raise WeightsError(f"got {scale} of shape {list(scales.shape)} for {list(shape)}, allowed one, or one a row")
    column = (-1, *(1,) * (len(shape) - 1)) if scales.numel() > 1 else ()
    return parts[""].tensor().float().mul_(scales.reshape(column) * factor)


_STATE = "weight.quant_state.bitsandbytes__"


def _bnb_state(name: str, parts: Parts) -> dict[str, Any]:
    state = _json(bytes(parts[f"{_STATE}{name}"].tensor().tolist()), "a bitsandbytes state")
    shape, block = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or not _is_shape(shape) or not isinstance(block, int) or block < 2 or block % 2:
        raise WeightsError(f"got a bitsandbytes state with shape {shape} and blocks of {block}")
    codes, blocks = prod(parts[""].shape), prod(parts["weight.absmax"].shape)
    if (prod(shape) + 1) // 2 != codes or -(-prod(shape) // block) != blocks:
        raise WeightsError(f"got {codes} bytes of codes and {blocks} scales for shape {shape} in blocks of {block}")
    return state


def _bnb_shape(name: str, parts: Parts) -> tuple[int, ...]:
    return tuple(_bnb_state(name, parts)["shape"])


def _bnb(name: str, parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """Two codes a byte, the first in the high nibble; a table of 16 levels times the scale of the block."""
    state = _bnb_state(name, parts)
    levels = parts["weight.quant_map"].tensor().flatten()
    if levels.numel() != 16:
        raise WeightsError(f"got a table of {levels.numel()} levels, allowed 16")
    pairs = torch.cartesian_prod(levels, levels)  # [256, 2]: what each byte stands for
    scales = _bnb_scales(parts, state)
    block = state["blocksize"] // 2
    codes = parts[""].tensor().flatten()
    out = torch.empty(codes.numel(), 2)
    for start in range(0, codes.numel(), step := max(1, CHUNK // 4 // block) * block):
        part = pairs.index_select(0, codes[start : start + step].int())
        first = start // block
        out[start : start + step] = part.mul_(
            scales[first : first + -(-len(part) // block)].repeat_interleave(block)[: len(part), None]
        )
    return out.flatten()[: prod(shape)].reshape(shape)


def _bnb_scales(parts: Parts, state: Mapping[str, Any]) -> Tensor:
    """The scales of the blocks; nested ones are codes themselves: a table of 256 levels, scales a block, an offset."""
    absmax = parts["weight.absmax"].tensor().flatten()
    if "weight.nested_absmax" not in parts:
        return absmax.float()
    table = parts["weight.nested_quant_map"].tensor().flatten()
    outer = parts["weight.nested_absmax"].tensor().flatten()
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if table.numel() != 256 or not isinstance(block, int) or block < 1 or not isinstance(offset, int | float):
        raise WeightsError("got nested scales without a table of 256 levels, a block size and an offset")
    if outer.numel() != -(-absmax.numel() // block) or absmax.dtype != torch.uint8:
        raise WeightsError(f"got {outer.numel()} nested scales for {absmax.numel()} blocks in groups of {block}")
    return table[absmax.long()] * outer.repeat_interleave(block)[: absmax.numel()] + offset


_FP8 = ("F8_E4M3", "F8_E5M2")
_COMFY = ("input_scale", "comfy_quant")
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
SCHEMES = (
    Scheme("fp8_scaled", _FP8, ("scale_weight",), ("scale_input",), partial(_scaled, "scale_weight", 1)),
    Scheme("fp8_scaled", _FP8, ("weight_scale",), _COMFY, partial(_scaled, "weight_scale", 1)),
    Scheme("int8_scaled", ("I8",), ("weight_scale",), _COMFY, partial(_scaled, "weight_scale", 1)),
    Scheme("bnb_int8", ("I8",), ("SCB",), ("weight_format",), partial(_scaled, "SCB", 1 / 127)),
    *(
        Scheme(
            name,
            ("U8",),
            ("weight.absmax", "weight.quant_map", f"{_STATE}{name}"),
            _NESTED,
            partial(_bnb, name),
            partial(_bnb_shape, name),
        )
        for name in ("nf4", "fp4")
    ),
)
MARKER = "scaled_fp8"  # an otherwise empty tensor that tells ComfyUI the fp8 type
_COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")

# What we know by its helper tensors and cannot turn back into numbers: last part of a name, what it is, what to do.
REFUSED = (
    ("wscales", "a nunchaku SVDQuant checkpoint, whose rounded weights exist only in its own kernels' layout"),
    ("weight_scale_2", "an NVFP4 checkpoint, whose scales lie in the order of one kind of GPU"),
    ("qzeros", "a GPTQ or AWQ checkpoint"),
    ("weight._data", "a checkpoint of optimum-quanto"),
)
_INSTEAD = "allowed bf16, fp8, NF4 and GGUF ones, try the bf16, fp8 or GGUF file of the same model"


# ---------------------------------------------------------------------------------------------- folding


def fold(raws: Mapping[str, Raw], metadata: Mapping[str, str]) -> dict[str, Entry]:
    """The tensors of one file, in its order, with their helper tensors folded in.

    Helpers that belong to no tensor stay entries, so that strict loading names them. Raises WeightsError for the
    formats in REFUSED and for helpers that contradict each other.
    """
    for suffix, what in REFUSED:
        if name := next((name for name in raws if name.endswith(f".{suffix}")), None):
            raise WeightsError(f"got {name}: this is {what}; {_INSTEAD}")
    compact = _compact(raws, metadata)
    if compact is not None:
        return compact
    formats = _comfy_layers(metadata)
    entries: dict[str, Entry] = {}
    used = {name for name in raws if name.rpartition(".")[2] == MARKER}
    for name, raw in raws.items():
        found = _coded(name, raws, formats) if name.endswith(".weight") else None
        if found is None:
            entries[name] = Entry(raw.shape, KINDS[raw.kind].storage, raw.nbytes, raw.tensor)
        else:
            entries[name], helpers = found
            used |= helpers
    return {name: entry for name, entry in entries.items() if name not in used}


def _coded(name: str, raws: Mapping[str, Raw], formats: Mapping[str, Any]) -> tuple[Entry, set[str]] | None:
    """The entry of codes and the names of their helpers; None for a tensor that has none."""
    layer = name.removesuffix("weight")
    for scheme in SCHEMES:
        if raws[name].kind in scheme.kinds and all(f"{layer}{part}" in raws for part in scheme.needs):
            there = [part for part in (*scheme.needs, *scheme.may) if f"{layer}{part}" in raws]
            parts = {"": raws[name], **{part: raws[f"{layer}{part}"] for part in there}}
            _check_comfy(layer.removesuffix("."), parts, formats)
            try:
                shape = scheme.shape(parts)
            except WeightsError as error:
                raise WeightsError(f"{name}: {error}") from error
            size = sum(part.nbytes for part in parts.values())
            read = partial(_decoded, name, scheme, parts, shape)
            return Entry(shape, scheme.storage, size, read), {f"{layer}{part}" for part in there}
    return None


def _decoded(name: str, scheme: Scheme, parts: Parts, shape: tuple[int, ...]) -> Tensor:
    try:
        return scheme.decode(parts, shape)
    except WeightsError as error:
        raise WeightsError(f"{name}: {error}, try fetching the file anew") from error


def _compact(raws: Mapping[str, Raw], metadata: Mapping[str, str]) -> dict[str, Entry] | None:
    """Our own compact shards: the header names format and shape, scales lie beside their codes."""
    if "fluxloom" not in metadata:
        return None
    header = _json(metadata["fluxloom"], "a fluxloom header")
    rows = header.get("tensors")
    if header.get("schema") != 1 or not isinstance(rows, dict):
        raise WeightsError("got a fluxloom header of another kind, allowed schema 1, try a newer fluxloom")
    entries, used = {}, set()
    for name, row in rows.items():
        row = row if isinstance(row, dict) else {}
        form, shape, ladder = (row.get(fact) for fact in ("format", "shape", "ladder"))
        names = [name, f"{name}.scale"][: 1 + (form in LIMITS)]
        sound = isinstance(form, str) and _is_shape(shape) and all(part in raws for part in names)
        if not sound or not isinstance(shape, list):
            raise WeightsError(f"got a fluxloom header that does not fit its file at {name}, try fetching it anew")
        parts = {key: raws[part] for key, part in zip(("codes", "scale"), names, strict=False)}
        size = sum(part.nbytes for part in parts.values())
        entries[name] = Entry(tuple(shape), str(form), size, partial(_read_compact, parts, tuple(shape), ladder))
        used |= set(names)
    rest = {name: raw for name, raw in raws.items() if name not in used}
    return entries | {n: Entry(raw.shape, KINDS[raw.kind].storage, raw.nbytes, raw.tensor) for n, raw in rest.items()}


def _read_compact(parts: Parts, shape: tuple[int, ...], ladder: Sequence[float] | None) -> Tensor:
    stored = {name: part.tensor() for name, part in parts.items()}
    stored |= {} if ladder is None else {"ladder": torch.tensor(ladder)}
    codes = stored["codes"]
    return dequantise(stored, shape, codes.dtype if codes.is_floating_point() else torch.float32)


def _comfy_layers(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """Layer -> facts, where ComfyUI wrote them into the metadata of the file."""
    if "_quantization_metadata" not in metadata:
        return {}
    layers = _json(metadata["_quantization_metadata"], "ComfyUI's quantisation metadata").get("layers")
    return layers if isinstance(layers, dict) else {}


def _check_comfy(layer: str, parts: Parts, formats: Mapping[str, Any]) -> None:
    """Refuse what ComfyUI says it did beyond a scale: other formats, and rotated weights."""
    facts = formats.get(layer, {})
    if "comfy_quant" in parts:
        facts = _json(bytes(parts["comfy_quant"].tensor().tolist()), f"{layer}.comfy_quant")
    if facts and (facts.get("format") not in _COMFY_FORMATS or facts.get("convrot")):
        raise WeightsError(f"got {layer} quantised as {facts}, {_INSTEAD}")


def _json(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"got {what} that is no JSON ({error}), try fetching the file anew") from error
    if not isinstance(value, dict):
        raise WeightsError(f"got {what} that is no JSON object, try fetching the file anew")
    return value


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 60 for n in value)
