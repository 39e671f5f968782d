"""From files to modules and back: compact shards, their hashes, and strict loading without a second copy."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fluxloom.errors import OutputError, WeightsError
from fluxloom.weights.formats import LIMITS, dequantise, quantise

SCHEMA = 1
ASSETS = Path(__file__).parents[1] / "assets"  # nano/ and world/, which come with the package
CARD = "card.json"
VOCABULARY = "vocab.txt"
SHARDS = "model-*-of-*.safetensors"
SMALL = 1024  # elements; below, groups save nothing worth their error
SHARD_BYTES = 15 * 2**20  # repositories and mirrors ask for files under 16 MiB

Module = TypeVar("Module", bound=nn.Module)


def save_compact(
    state: Mapping[str, Tensor],
    folder: Path | str,
    default: str = "int6",
    overrides: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write a state as ``model-0000k-of-n.safetensors`` shards of at most ``shard_bytes`` (a larger single
    tensor has a shard to itself) and return their paths; shards of an earlier save are removed.

    Tensors are kept in ``default``, or as ``overrides`` says, a map of key prefixes to formats of which the longest
    that matches wins. Tensors of one axis or under 1,024 elements are float16 where integers are asked for.
    """
    folder = Path(folder)
    shards: list[tuple[dict[str, Tensor], dict[str, Any]]] = [({}, {})]
    used = 0
    for key in sorted(state):
        form = _format_of(key, state[key], default, overrides or {})
        try:
            made = quantise(state[key].detach().cpu(), form)
            stored = _on_disk(key, made, state)
        except WeightsError as error:
            raise WeightsError(f"{key}: {error}") from None
        size = sum(tensor.nbytes for tensor in stored.values())
        if used + size > shard_bytes and used:
            shards.append(({}, {}))
            used = 0
        tensors, table = shards[-1]
        tensors.update(stored)
        ladder = {"ladder": made["ladder"].tolist()} if "ladder" in made else {}
        table[key] = {"format": form, "shape": list(state[key].shape), **ladder}
        used += size
    return _write_shards(shards, folder)


def load_compact(files: Iterable[Path | str], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state that :func:`save_compact` wrote, whole, in ``dtype``."""
    state: dict[str, Tensor] = {}
    for path in map(Path, files):
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("fluxloom", "null"))
                if not isinstance(header, dict) or header.get("schema") != SCHEMA:
                    raise WeightsError(
                        f"got {path} without a fluxloom header, allowed compact shards of schema {SCHEMA}"
                    )
                for key, row in header["tensors"].items():
                    if key in state:
                        raise WeightsError(f"got tensor {key} twice, the second time in {path}")
                    stored = {"codes": file.get_tensor(key)}
                    if row["format"] in LIMITS:
                        stored["scale"] = file.get_tensor(f"{key}.scale")
                    if "ladder" in row:
                        stored["ladder"] = torch.tensor(row["ladder"])
                    state[key] = dequantise(stored, row["shape"], dtype)
        except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"got unreadable weights {path} ({error}), try fetching the file anew") from error
    return state


def load_folder(folder: Path | str) -> dict[str, Tensor]:
    """:func:`load_compact` of all shards in a folder. Raises WeightsError where there are none."""
    files = sorted(Path(folder).glob(SHARDS))
    if not files:
        raise WeightsError(f"got no weights in {folder}, allowed a folder with {SHARDS}, try another")
    return load_compact(files)


def load_strict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module (built on the meta device) the tensors of a state themselves, without copying.

    Raises WeightsError naming every missing, unknown or misshapen key (the first eight of each).
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    unknown = [key for key in state if key not in wanted]
    misshapen = [
        f"{key} {list(state[key].shape)} for {list(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    found = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    faults = [f"{name}: {first(keys)}" for name, keys in found.items() if keys]
    if faults:
        name = type(module).__name__
        raise WeightsError(f"got weights that do not fit {name}: {'; '.join(faults)}, allowed its own, try others")
    module.load_state_dict(state, assign=True)


class Uninitialised(TorchFunctionMode):
    """Skips ``torch.nn.init``: there is nothing to initialise on the meta device, and its normal_ there would import
    torch's symbolic half, which takes longer (1.2 s) than everything else about loading nano."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build(make: Callable[[], Module], state: Mapping[str, Tensor]) -> Module:
    """A module for inference with given weights: made on the meta device, so that memory holds them once."""
    with Uninitialised(), torch.device("meta"):
        module = make()
    load_strict(module, state)
    return module.eval().requires_grad_(False)


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under ``prefix.``, without it."""
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")}


def digest(path: Path | str) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(files: Iterable[Path | str]) -> dict[str, str]:
    """File name -> sha256: the entry ``files`` of a model card."""
    return {Path(path).name: digest(path) for path in files}


def content_hash(files: Mapping[str, str]) -> str:
    """One hash, ``sha256:...``, of a whole model: over the names and hashes of its files in order."""
    lines = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def save_card(folder: Path | str, model: str, facts: Mapping[str, Any]) -> Path:
    """Write the card of a model folder: which row of MODELS it is, the sha256 of its files, and given facts."""
    folder = Path(folder)
    files = sorted((*folder.glob(SHARDS), *folder.glob(VOCABULARY)))
    card = {"schema": SCHEMA, "model": model, **facts, "files": digests(files)}
    path = folder / CARD
    path.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return path


def read_card(folder: Path | str) -> dict[str, Any]:
    """The card of a model folder, with the two entries that everything rests on: ``model`` and ``files``."""
    path = Path(folder) / CARD
    try:
        card = json.loads(path.read_text("utf-8"))
        known = isinstance(card["model"], str) and isinstance(card["files"], dict)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"got no usable model card {path} ({type(error).__name__}: {error}), try fetching it anew"
        ) from error
    if not known or card.get("schema") != SCHEMA:
        raise WeightsError(
            f"got a model card {path} of another kind, allowed schema {SCHEMA} with a model and its files, try another"
        )
    return dict(card)


def verified(folder: Path | str) -> str:
    """Check every file of a model folder against its card and return the content hash of the whole."""
    folder = Path(folder)
    listed: dict[str, str] = read_card(folder)["files"]
    for name, expected in listed.items():
        try:
            actual = digest(folder / name)
        except OSError as error:
            raise WeightsError(
                f"got no readable file {folder / name}, which the model card lists ({error}), try fetching it anew"
            ) from error
        if actual != expected:
            raise WeightsError(
                f"got a damaged file {folder / name} with sha256 {actual}, allowed {expected}, try fetching it anew"
            )
    unlisted = sorted({path.name for kind in (SHARDS, VOCABULARY) for path in folder.glob(kind)} - listed.keys())
    if unlisted:
        raise WeightsError(f"got files in {folder} that its card does not list: {first(unlisted)}, try without them")
    return content_hash(listed)


def _format_of(key: str, tensor: Tensor, default: str, overrides: Mapping[str, str]) -> str:
    prefix = max((prefix for prefix in overrides if key.startswith(prefix)), key=len, default=None)
    form = default if prefix is None else overrides[prefix]
    small = tensor.ndim < 2 or tensor.numel() < SMALL
    return "float16" if small and form in LIMITS else form


def _on_disk(key: str, stored: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Codes under the key itself, scales beside it."""
    out = {key: stored["codes"]}
    if "scale" in stored:
        if f"{key}.scale" in state:
            raise WeightsError(f"got a tensor named {key}.scale, which is where the scales of {key} go")
        out[f"{key}.scale"] = stored["scale"]
    return out


def _write_shards(shards: list[tuple[dict[str, Tensor], dict[str, Any]]], folder: Path) -> list[Path]:
    paths = [folder / f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, (tensors, table) in zip(paths, shards, strict=True):
            header = json.dumps({"schema": SCHEMA, "tensors": table}, sort_keys=True)
            half = path.with_suffix(".part")
            try:
                half.write_bytes(save(tensors, metadata={"fluxloom": header}))  # its save_file makes files private
                os.replace(half, path)
            finally:
                half.unlink(missing_ok=True)
        for stale in set(folder.glob(SHARDS)) - set(paths):
            stale.unlink()
    except (OSError, SafetensorError) as error:
        raise OutputError(f"got folder {folder} to write weights to ({error}), try another place") from error
    return paths


def first(keys: list[str], count: int = 8) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more
