"""Containers: a safetensors or GGUF file, a folder of shards, the folder of a whole model, as one mapping of names.

Opening reads headers only. Tensors are read when asked for, by plain reads into memory of their own rather than
through a memory map: pages of a map count as memory of the process (twice the model while it loads), and a file that
is cut short under a map ends the process. Headers are checked here, before anything is allocated from them; no file
can make us run code. Sources: the safetensors format, the GGUF format version 3, the index files of sharded models.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from fluxloom.errors import WeightsError
from fluxloom.weights.load import SHARDS
from fluxloom.weights.stored import GGUF_TYPES, KINDS, Entry, Raw, fold

__all__ = ["Checkpoint", "Entry", "open_checkpoint"]

HEADER_BYTES = 100_000_000  # as in the safetensors library
TENSORS = 100_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX = "*.safetensors.index.json"
# Folders of a whole model in the diffusers layout; names of their tensors begin with "<folder>/".
FOLDERS = ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder", "image_embedder")
CONFIG = "config.json"
_NOTES = (CONFIG, "model_index.json")  # small JSON files that say what shapes cannot; kept in the metadata
_NOTE_BYTES = 1 << 20
_ANEW = "try fetching it anew"
# Whether files are read into pinned memory, from where a GPU copies by itself, and which torch uses again. A thread
# reads 9 GB/s from the page cache into such; into pages of its own, and from there to such, 1.4.
PINNED: ContextVar[bool] = ContextVar("pinned", default=False)


class Checkpoint(Mapping[str, Entry]):
    """Tensors by their names in the file, helper tensors such as scales folded into their entry.

    files     what was opened
    metadata  of the files; a folder's config.json under its name (``vae/config.json`` in a whole model)
    """

    def __init__(self, entries: Mapping[str, Entry], files: tuple[Path, ...], metadata: Mapping[str, str]) -> None:
        self._entries = dict(entries)
        self.files = files
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata))

    @classmethod
    def of(cls, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Checkpoint:
        """A checkpoint of tensors at hand, read as if they lay in a safetensors file."""
        kinds = {_DTYPES[name]: name for name in _DTYPES}
        raws = {}
        for name, tensor in state.items():
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            raws[name] = Raw(kinds[tensor.dtype], tuple(tensor.shape), flat.clone)
        return cls(fold(raws, metadata or {}), (), metadata or {})

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.values())


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a .safetensors, .sft or .gguf file, a folder of shards, or the folder of a component or a whole model.

    Raises WeightsError for whatever is not such a file or folder, or is damaged, within seconds.
    """
    path = Path(path)
    try:
        return _folder(path) if path.is_dir() else _file(path)
    except OSError as error:
        raise WeightsError(f"got {path}, which cannot be read ({error.strerror}), try another path") from error


def _file(path: Path) -> Checkpoint:
    return _folded({path: _read(path)})


Contents = tuple[dict[str, Raw], dict[str, str]]  # arrays by name, metadata


def _folded(files: Mapping[Path, Contents]) -> Checkpoint:
    """Files as one: helper tensors may lie in another shard than their codes."""
    raws: dict[str, Raw] = {}
    metadata: dict[str, str] = {}
    for path, (more, facts) in files.items():
        if twice := more.keys() & raws.keys():
            raise WeightsError(f"got tensor {min(twice)} twice, the second time in {path}")
        raws |= more
        metadata |= facts
    try:
        return Checkpoint(fold(raws, metadata), tuple(files), metadata)
    except WeightsError as error:
        raise WeightsError(f"{', '.join(map(str, files))}: {error}") from error


def _read(path: Path) -> Contents:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")  # of a safetensors header; 80 02 is a length, too
        pickled = start.startswith((b"PK\x03\x04", b"\x80")) and length > min(HEADER_BYTES, size)
        if path.suffix.lower() in PICKLES or pickled:
            _refuse_pickle(path)
        if size == 0:
            raise WeightsError(f"got {path}, an empty file, {_ANEW}")
        if start.startswith(b"version https://git-lfs"[:8]):
            raise WeightsError(f"got {path}, a git LFS pointer instead of the file, try `git lfs pull`")
        file.seek(0)
        parse = _gguf if start.startswith(b"GGUF") else _safetensors
        try:
            return parse(file, path, size)
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from error


def _refuse_pickle(path: Path) -> NoReturn:
    raise WeightsError(
        f"got {path}, a pickle, which can run code when opened; allowed .safetensors and .gguf, try a safetensors "
        "file of the same model, or convert this one where you trust it: "
        "`python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('IN', weights_only=True), 'OUT')\"`"
    )


def _bytes(path: Path, offset: int, count: int) -> Tensor:
    """``count`` bytes of a file as a fresh uint8 tensor."""
    out = torch.empty(count, dtype=torch.uint8, pin_memory=PINNED.get())
    view: memoryview = memoryview(out.numpy())  # type: ignore[arg-type]
    done = 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while done < count:
                got = file.readinto(view[done:])
                if not got:
                    raise WeightsError(f"got {path} cut short while it was read, {_ANEW}")
                done += got
    except OSError as error:
        raise WeightsError(f"got {path}, which cannot be read ({error.strerror}), {_ANEW}") from error
    return out


# ---------------------------------------------------------------------------------------------- safetensors

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
        "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    }
)  # fmt: skip


def _safetensors(file: BinaryIO, path: Path, size: int) -> Contents:
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > min(HEADER_BYTES, size - 8):
        raise WeightsError(f"got a header of {length} bytes in a file of {size}, allowed safetensors or GGUF, {_ANEW}")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"got a header that is no JSON ({error}), allowed safetensors or GGUF, {_ANEW}") from error
    if not isinstance(header, dict) or len(header) > TENSORS:
        raise WeightsError(f"got a header that is no table of up to {TENSORS} tensors, {_ANEW}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"got metadata that is no table of texts, {_ANEW}")
    begin = 8 + length
    raws, spans = {}, []
    for name, row in sorted(header.items(), key=_offset):
        kind, shape, first, last = _row(name, row)
        if last > size - begin or last - first != KINDS[kind].nbytes(shape):
            raise WeightsError(
                f"got {name} of {kind} {list(shape)} at bytes {first} to {last} of {size - begin}: "
                f"the file is cut short or damaged, {_ANEW}"
            )
        spans.append((first, last))
        raws[name] = Raw(kind, shape, partial(_bytes, path, begin + first, last - first))
    _check_spans(spans, size - begin, gaps=False)
    return raws, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("the same name twice")
    return out


def _offset(item: tuple[str, Any]) -> tuple[int, int]:
    """Where a tensor lies; what is no such thing comes first, to be refused."""
    try:
        first, last = item[1]["data_offsets"]
        return int(first), int(last)
    except (KeyError, TypeError, ValueError, OverflowError):
        return -1, -1


def _row(name: str, row: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Kind, shape and place of one tensor of a header."""
    try:
        kind, shape, (first, last) = row["dtype"], row["shape"], row["data_offsets"]
        numbers = [first, last, *shape]
        sound = all(type(number) is int and 0 <= number < 1 << 60 for number in numbers) and first <= last
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"got no dtype, shape and data_offsets for {name}, {_ANEW}") from error
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise WeightsError(f"got {name} of dtype {kind}, allowed {', '.join(_DTYPES)}, try another file of the model")
    if not sound:
        raise WeightsError(f"got {name} with shape {shape} at {[first, last]}, allowed whole numbers, {_ANEW}")
    return kind, tuple(shape), first, last


def _check_spans(spans: list[tuple[int, int]], size: int, *, gaps: bool) -> None:
    """Tensors may not share bytes, nor (in safetensors) leave any out."""
    spans = [(0, 0), *sorted(spans)]
    for (_, end), (begin, _) in pairwise(spans):
        if begin < end or (begin > end and not gaps):
            fault = "overlap" if begin < end else "leave a gap"
            raise WeightsError(f"got tensors that {fault} at byte {begin}, {_ANEW}")
    if not gaps and spans[-1][1] != size:
        raise WeightsError(f"got {size} bytes of tensors where the header names {spans[-1][1]}, {_ANEW}")


# ---------------------------------------------------------------------------------------------- GGUF

_SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
)
_STRING, _ARRAY = 8, 9


class _Stream:
    """A GGUF header, read forwards, never past the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at = file, size, 0

    def take(self, count: int) -> bytes:
        if count > min(self.size - self.at, HEADER_BYTES):
            raise WeightsError(f"got a GGUF header that asks for {count} bytes at {self.at} of {self.size}, {_ANEW}")
        self.at += count
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """One value; arrays are skipped (None), but for short ones of numbers."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise WeightsError(f"got a GGUF value of unknown type {kind}, {_ANEW}")
            return self.number(_SCALARS[kind])
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            data = self.take(count * struct.calcsize(_SCALARS[inner]))
            return list(struct.unpack(f"<{count}{_SCALARS[inner][1]}", data)) if count <= 16 else None
        if inner != _STRING or count > (self.size - self.at) // 8:
            raise WeightsError(f"got a GGUF array of {count} values of type {inner}, {_ANEW}")
        for _ in range(count):
            self.take(self.number("<Q"))
        return None


def _gguf(file: BinaryIO, path: Path, size: int) -> Contents:
    stream = _Stream(file, size)
    stream.take(4)
    version, tensors, values = stream.number("<I"), stream.number("<Q"), stream.number("<Q")
    if version not in (2, 3) or max(tensors, values) > TENSORS:
        raise WeightsError(f"got GGUF version {version} with {tensors} tensors, allowed 2 and 3, up to {TENSORS}")
    facts = {}
    for _ in range(values):
        name = stream.text()
        facts[name] = stream.value(stream.number("<I"))
    rows = [_gguf_row(stream, facts) for _ in range(tensors)]
    align = facts.get("general.alignment", 32)
    if type(align) is not int or not 1 <= align <= 1 << 20 or align & (align - 1):
        raise WeightsError(f"got a GGUF alignment of {align}, allowed a power of two, {_ANEW}")
    begin = -(-stream.at // align) * align
    raws: dict[str, Raw] = {}
    spans = []
    for name, kind, shape, stored, offset in rows:
        count = KINDS[kind].nbytes(stored)
        if name in raws or offset + count > size - begin:
            what = "twice" if name in raws else "beyond the end: the file is cut short or damaged"
            raise WeightsError(f"got {name} of {kind} {list(shape)} {what}, {_ANEW}")
        spans.append((offset, offset + count))
        raws[name] = Raw(kind, shape, partial(_bytes, path, begin + offset, count), stored)
    _check_spans(spans, size - begin, gaps=True)
    return raws, {name: str(value) for name, value in facts.items() if value is not None}


def _gguf_row(stream: _Stream, facts: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...], tuple[int, ...], int]:
    """Name, kind, shape, shape as stored and place of one tensor. Shapes are stored last axis first; tools that
    flatten a tensor into whole blocks keep its shape in a value of its own."""
    name, axes = stream.text(), stream.number("<I")
    if axes > 8:
        raise WeightsError(f"got {name} with {axes} axes, {_ANEW}")
    stored = tuple(reversed([stream.number("<Q") for _ in range(axes)]))
    number, offset = stream.number("<I"), stream.number("<Q")
    if number not in GGUF_TYPES:
        raise WeightsError(f"got {name} of GGUF type {number}, allowed {', '.join(GGUF_TYPES.values())}")
    original = facts.get(f"comfy.gguf.orig_shape.{name}")
    shape = tuple(original) if isinstance(original, list) and all(type(n) is int for n in original) else stored
    if prod(shape) != prod(stored) or max(stored, default=0) >= 1 << 60:
        raise WeightsError(f"got {name} of shape {list(shape)} stored as {list(stored)}, {_ANEW}")
    return name, GGUF_TYPES[number], shape, stored, offset


# ---------------------------------------------------------------------------------------------- folders


def _folder(path: Path) -> Checkpoint:
    """A folder: shards with an index, the component folders of a whole model, or the weights files in it."""
    parts: dict[str, Callable[[], Checkpoint]] = {}
    inner = [path / name for name in FOLDERS if (path / name).is_dir() and _has_weights(path / name)]
    parts |= {f"{folder.name}/": partial(_component, folder) for folder in inner}
    if not inner:
        return _component(path)
    if path / "transformer" not in inner and _has_weights(path):  # single files beside the encoders' folders
        parts[""] = partial(_component, path)
    return _joined({prefix: make() for prefix, make in parts.items()}, _notes(path))


def _has_weights(folder: Path) -> bool:
    return any(folder.glob(INDEX)) or bool(_weights(folder)) or any(p.suffix in PICKLES for p in folder.iterdir())


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".safetensors", ".sft", ".gguf"))


def _component(folder: Path) -> Checkpoint:
    index = sorted(folder.glob(INDEX))
    files = _weights(folder)
    if len(index) > 1:
        raise WeightsError(f"got {folder} with {len(index)} index files, allowed one, try a single file of it")
    if index:
        found = _sharded(folder, index[0])
    elif not files:
        if pickle := next((p for p in sorted(folder.iterdir()) if p.suffix.lower() in PICKLES), None):
            _refuse_pickle(pickle)
        raise WeightsError(f"got {folder}, a folder without weights, allowed .safetensors or .gguf in it, try another")
    elif len(files) == 1 or all(path.match(SHARDS) for path in files):
        found = _joined({"": [_file(path) for path in files]}, {})
    else:
        found = _joined({f"{path.stem}/": _file(path) for path in files}, {})
    return Checkpoint(found, found.files, {**found.metadata, **_notes(folder)})


def _sharded(folder: Path, index: Path) -> Checkpoint:
    """The shards that an index names; each a plain name beside it."""
    if index.stat().st_size > HEADER_BYTES:
        raise WeightsError(f"got {index} of {index.stat().st_size} bytes, allowed {HEADER_BYTES}, {_ANEW}")
    try:
        table = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(table.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"got {index} without a weight_map from tensors to files, {_ANEW}") from error
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name and "\0" not in name
        if not plain or not name.endswith(".safetensors"):
            raise WeightsError(f"got {index} naming the file {name!r}, allowed plain .safetensors names beside it")
        if not (folder / name).is_file():
            raise WeightsError(f"got {index} without its file {name}, try fetching the rest of the model")
    files = {folder / name: _read(folder / name) for name in names}
    missing = [name for name, file in table.items() if name not in files[folder / file][0]]
    if missing:
        raise WeightsError(f"got {index} naming {len(missing)} tensors that no shard has ({missing[0]}, ...), {_ANEW}")
    return _folded(files)


def _joined(parts: Mapping[str, Checkpoint | list[Checkpoint]], notes: Mapping[str, str]) -> Checkpoint:
    """Several checkpoints as one, each under its prefix."""
    entries: dict[str, Entry] = {}
    files: tuple[Path, ...] = ()
    metadata: dict[str, str] = {}
    for prefix, group in parts.items():
        for part in group if isinstance(group, list) else [group]:
            for name, entry in part.items():
                if f"{prefix}{name}" in entries:
                    raise WeightsError(f"got tensor {prefix}{name} twice, the second time in {part.files[0]}")
                entries[f"{prefix}{name}"] = entry
            files += part.files
            metadata |= {f"{prefix}{name}": value for name, value in part.metadata.items()}
    return Checkpoint(entries, files, {**metadata, **notes})


def _notes(folder: Path) -> dict[str, str]:
    paths = [folder / name for name in _NOTES]
    return {p.name: p.read_text("utf-8", "replace") for p in paths if p.is_file() and p.stat().st_size <= _NOTE_BYTES}
