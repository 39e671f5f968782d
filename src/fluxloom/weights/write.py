"""Writing checkpoints tensor by tensor: the header is planned beforehand, so that nothing is held but one tensor.

A file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from torch import Tensor

from fluxloom.errors import OutputError
from fluxloom.weights.encoders import Array
from fluxloom.weights.stored import GGUF_TYPES, KINDS

_ALIGN = 32  # GGUF's default
_TYPE_NUMBERS: Mapping[str, int] = MappingProxyType({name: number for number, name in GGUF_TYPES.items()})
_ARCHITECTURE = "flux"
_SPARE = 1 << 20  # bytes of a disk that are left free


def write_safetensors(path: Path, plan: list[Array], tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> None:
    """Write arrays in the order of their plan. Raises OutputError where there is no room or no right to write."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, kind, shape in plan:
        size = KINDS[kind].nbytes(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _file(path, 8 + len(text) + at) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in _written(file, plan, tensors):
            pass


def write_gguf(path: Path, plan: list[Array], tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> None:
    """The same for GGUF version 3; the metadata become texts."""
    facts = {"general.architecture": _ARCHITECTURE, **metadata}
    start = b"GGUF" + struct.pack("<IQQ", 3, len(plan), len(facts) + 1)
    for name, text in facts.items():
        start += _text(name) + struct.pack("<I", 8) + _text(text)
    start += _text("general.quantization_version") + struct.pack("<II", 4, 2)
    at = 0
    for name, kind, shape in plan:
        axes = shape[::-1] or (1,)
        start += _text(name) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
        start += struct.pack("<IQ", _TYPE_NUMBERS[kind], at)
        at += _aligned(KINDS[kind].nbytes(shape))
    start += bytes(_aligned(len(start)) - len(start))
    with _file(path, len(start) + at) as file:
        file.write(start)
        for size in _written(file, plan, tensors):
            file.write(bytes(_aligned(size) - size))


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _written(file: BinaryIO, plan: list[Array], tensors: Iterable[Tensor]) -> Iterator[int]:
    """Write each tensor's bytes, and tell how many they were."""
    for (name, kind, shape), tensor in zip(plan, tensors, strict=True):
        data = tensor.contiguous().flatten().view(torch.uint8)
        assert data.numel() == KINDS[kind].nbytes(shape), (name, kind, shape, data.numel())
        file.write(data.numpy().data)
        yield data.numel()


@contextmanager
def _file(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file that takes its name when all is written, and leaves nothing behind when that fails."""
    half = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < size + _SPARE:
            raise OutputError(f"got {free / 1e9:.1f} GB of room for {path}, allowed {size / 1e9:.1f} GB, try elsewhere")
        with open(half, "wb") as file:
            yield file
        os.replace(half, path)
    except OSError as error:
        raise OutputError(
            f"got {path} to write to ({error.strerror}), allowed a place to write, try another"
        ) from error
    finally:
        with suppress(OSError):
            half.unlink()
