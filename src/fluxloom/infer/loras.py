"""LoRAs as a part of a request: named by their files, read once, at work while they are asked for.

A request names them (:class:`Lora`); resolved they are facts without tensors (:class:`ResolvedLora`), which a receipt
records and a row of conditioning carries. The tensors are with the :class:`Rack` of a runtime, which hangs them beside
the transformer's weights when a pass asks for them, and takes them off when one asks for others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fluxloom.core.specs import MODELS, ModelSpec
from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput, WeightsError
from fluxloom.infer.adapters import Attached, attach, exchanges_norms
from fluxloom.infer.checks import number
from fluxloom.weights.load import digest
from fluxloom.weights.lora import Blocks, Weighted, tensor_shapes
from fluxloom.weights.lora import Lora as Read
from fluxloom.weights.lora_file import CONFIG, NAMES, held, load_lora

MAX_LORAS = 16
MAX_LORA_WEIGHT = 100.0  # useful ones are under 2
_MAX_PATTERN = 200  # characters; names of tensors are under 60


@dataclass(frozen=True)
class Lora:
    """A LoRA to draw with.

    file    a .safetensors file in any trainer's dialect, or a folder as PEFT saves it
    weight  how strongly it counts, -100 to 100. At 0 it does nothing: the picture is, to the bit, that without it
    blocks  factors of the weight for some places. A key is the number of a block, double blocks first, or a regular
            expression that is searched for in official tensor names; of several that match, the last one counts
    """

    file: str | os.PathLike[str]
    weight: float = 1.0
    blocks: Blocks | None = None


@dataclass(frozen=True)
class ResolvedLora:
    """A LoRA that was found and checked. ``config`` is the hash of PEFT's configuration beside the file, which tells
    the scale; wherever they lie, the same files at the same weights are the same LoRA."""

    path: Path = field(compare=False)
    sha256: str
    config: str | None
    weight: float
    blocks: tuple[tuple[str | int, float], ...]

    @property
    def content(self) -> tuple[str, str | None]:
        """What its tensors depend on."""
        return self.sha256, self.config

    def to_dict(self) -> dict[str, Any]:
        """As a receipt records it: no path, and blocks as pairs, since their order counts."""
        found = {"file": self.path.name, "sha256": self.sha256, "weight": self.weight}
        config = {} if self.config is None else {"config": self.config}
        return {**found, **config, "blocks": [list(pair) for pair in self.blocks]}


Set = tuple[ResolvedLora, ...]


def resolve_loras(given: object, spec: ModelSpec) -> Set:
    """Find and check the LoRAs of a request. What is inside the files is checked by :meth:`Rack.read`.

    Raises BadInput.
    """
    if not isinstance(given, (tuple, list)):
        raise BadInput(f"got {type(given).__name__} as loras, allowed a list of LoRAs, try [{str(given)[:80]!r}]")
    if len(given) > MAX_LORAS:
        raise BadInput(f"got {len(given)} LoRAs, allowed {MAX_LORAS}, try merging some with `fluxloom lora merge`")
    found: list[ResolvedLora] = []
    for one in given:
        lora = _resolved(one, spec)
        if any((other.content, other.blocks) == (lora.content, lora.blocks) for other in found):
            raise BadInput(f"got LoRA {lora.path.name} twice, allowed once, try it once with the sum of both weights")
        found.append(lora)
    return tuple(found)


def content_of(path: Path) -> tuple[str, str | None]:
    """Hashes of what :func:`lora_file.open_lora` reads: of the file, and of PEFT's configuration where that counts.

    Raises BadInput where there is no file, or none that can be read.
    """
    file = held(path) if path.is_dir() else path
    if file is None or not file.is_file():
        what = "a folder without a LoRA" if file is None else "which is not there"
        raise BadInput(
            f"got LoRA {str(path)!r}, {what}, allowed a .safetensors file or a folder of PEFT, try another path"
        )
    config = file.parent / CONFIG
    try:
        return _digest(file), _digest(config) if file.name == NAMES[0] and config.is_file() else None
    except OSError as error:
        raise BadInput(
            f"got LoRA {str(path)!r}, which cannot be read ({error}), allowed one that can, try a copy"
        ) from error


def lora_weight(value: object) -> float:
    """A weight within limits. Raises BadInput."""
    return number("LoRA weight", value, -MAX_LORA_WEIGHT, MAX_LORA_WEIGHT)


def is_lora_folder(path: Path) -> bool:
    """Whether a path is a folder as PEFT and diffusers save a LoRA."""
    return path.is_dir() and held(path) is not None


def _resolved(one: object, spec: ModelSpec) -> ResolvedLora:
    lora = Lora(one) if isinstance(one, (str, os.PathLike)) else one
    if not isinstance(lora, Lora) or not isinstance(lora.file, (str, os.PathLike)):
        raise BadInput(f"got {type(one).__name__} as a LoRA, allowed a path or a Lora, try Lora(path, weight)")
    weight = lora_weight(lora.weight)
    path = Path(lora.file)
    sha256, config = content_of(path)
    return ResolvedLora(path, sha256, config, weight, _blocks(lora.blocks, spec))


def _blocks(given: object, spec: ModelSpec) -> tuple[tuple[str | int, float], ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        raise BadInput(f"got {type(given).__name__} as blocks of a LoRA, allowed a mapping, try {{'single': 0.5}}")
    last = spec.transformer.depth + spec.transformer.depth_single_blocks - 1
    for key in given:
        if isinstance(key, int) and not isinstance(key, bool) and 0 <= key <= last:
            continue
        if not isinstance(key, str) or not _matches(key, spec):
            raise BadInput(
                f"got block {str(key)[:80]!r} of a LoRA, allowed numbers 0 to {last} and regular expressions that "
                "match a tensor of the model, try 'double' or 'single'"
            )
    return tuple((key, lora_weight(value)) for key, value in given.items())


def _matches(pattern: str, spec: ModelSpec) -> bool:
    if len(pattern) > _MAX_PATTERN:
        return False
    try:
        return any(re.search(pattern, name) for name in tensor_shapes(spec.transformer))
    except re.error:
        return False


def _digest(file: Path) -> str:
    """The hash of a file, taken again only when it has become another."""
    found = file.stat()
    return _hashed(file, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@lru_cache(maxsize=64)
def _hashed(file: Path, state: tuple[int, ...]) -> str:
    """``state`` is a part of the key alone: files can weigh gigabytes, and are asked for with every picture."""
    return digest(file)


# ---------------------------------------------------------------------------------------------- at work


class Rack:
    """The LoRAs of a transformer: those that were read lately, and those that hang on it.

    What hangs stays until a pass asks for others, so that pictures of one style cost one attaching.
    """

    def __init__(self, transformer: Transformer, spec: ModelSpec) -> None:
        self.transformer, self.spec = transformer, spec
        self._read: dict[tuple[str, str | None], Read] = {}  # the last asked for comes last
        self._hanging: Set = ()
        self._attached: Attached | None = None

    def read(self, one: ResolvedLora) -> Read:
        """The tensors of a LoRA, from its file or as they were read before. Raises what :func:`lora_file.load_lora`
        raises, and BadInput for a control LoRA and for a file that is no longer what was resolved."""
        found = self._read.pop(one.content, None) or self._load(one)
        self._read[one.content] = found
        while len(self._read) > MAX_LORAS:
            del self._read[next(iter(self._read))]
        return found

    def notes(self, loras: Set) -> list[str]:
        """What of LoRAs does not reach the model, in sentences for the user."""
        out = []
        for one in loras:
            found = self.read(one)
            if found.text:
                out.append(
                    f"{len(found.text)} of {found.keys} tensors of LoRA {one.path.name} are for text encoders, "
                    "to which LoRAs are not applied"
                )
            out += [f"LoRA {one.path.name}: {note}" for note in found.notes]
        return out

    def parties(self, sets: Sequence[Set]) -> list[tuple[list[int], Set]]:
        """Which of several requests can share passes: (their numbers, all their LoRAs). Norms are what a batch has in
        common: whoever exchanges them keeps to those who want the very same LoRAs."""
        groups: dict[Set | None, list[int]] = {}
        for k, loras in enumerate(sets):
            alone = any(exchanges_norms(self.read(one)) for one in loras)
            groups.setdefault(loras if alone else None, []).append(k)
        return [
            (numbers, _union([sets[k] for k in numbers]) if loras is None else loras)
            for loras, numbers in groups.items()
        ]

    @torch.inference_mode(False)  # what hangs outlives the pass that asked for it
    def hang(self, sets: Sequence[Set], together: Set | None = None) -> None:
        """From the next pass on, give each member of the batch its LoRAs. ``together``: all that the passes to come
        will ask for, so that nothing is taken off and put on again between them."""
        wanted = _union(sets) if together is None else together
        if wanted != self._hanging:
            self.clear()
            if wanted:
                loras = [Weighted(self.read(one), one.weight, MappingProxyType(dict(one.blocks))) for one in wanted]
                self._attached, self._hanging = attach(self.transformer, loras), wanted
        if self._attached is not None:
            shares = [[float(one in loras) for one in wanted] for loras in sets]
            mixed = any(len(loras) < len(wanted) for loras in sets)
            # Without shares the numbers are those of a request drawn alone, to the bit.
            device = next(self.transformer.parameters()).device
            self._attached.share(torch.tensor(shares, device=device) if mixed else None)

    @property
    def hanging(self) -> Set:
        """What acts on the transformer from here on."""
        return self._hanging

    def clear(self) -> None:
        """Take everything off the transformer."""
        if self._attached is not None:
            self._attached.detach()
        self._attached, self._hanging = None, ()

    def _load(self, one: ResolvedLora) -> Read:
        name, channels = one.path.name, self.spec.transformer.in_channels
        try:
            found = load_lora(one.path, self.spec.transformer).lora
        except WeightsError as error:  # of several LoRAs, say which
            raise WeightsError(f"got LoRA {name}: {str(error).removeprefix('got ')}") from error
        if content_of(one.path) != one.content:
            raise BadInput(f"got LoRA {name}, which changed while it was read, allowed a whole file, try again")
        if found.in_channels is not None and found.in_channels > channels:
            members = [row.name for row in MODELS.values() if row.lora is not None]
            raise BadInput(
                f"got LoRA {name}, which takes {found.in_channels} input channels (a control LoRA), allowed for "
                f"{self.spec.name} at most {channels}, try {' or '.join(members)} as the model"
            )
        return found


def _union(sets: Sequence[Set]) -> Set:
    """All LoRAs of several requests, each once, in the order of their first mention."""
    return tuple(dict.fromkeys(chain.from_iterable(sets)))
