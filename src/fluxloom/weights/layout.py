"""Which files of a folder or repository are which component.

Everything works on a listing, a map of relative names to bytes, so that a folder on the disk, a cached repository and
one that is still on a hub are read by the same rules. Names are those that the official repositories, diffusers and
ComfyUI give their files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from fluxloom.core.specs import ModelSpec

Listing = Mapping[str, int]  # relative name: bytes, -1 where unknown

SUFFIXES = (".safetensors", ".sft", ".gguf")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OFFICIAL, DIFFUSERS = "official", "diffusers"

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.safetensors)")
# Of several precisions in one folder the plain name is the reference; ``model.fp16.safetensors`` is its copy.
_PLAIN = ("diffusion_pytorch_model", "model")
_CONFIG = ("config.json", "preprocessor_config.json")
_WORDS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "spiece.model",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of component.

    files     patterns of a single file, lower case, best first
    folders   names of a folder in the diffusers layout
    places    subfolders in which collections of models keep such files
    needed    of a folder without weights: files that it needs, in alternatives
    optional  taken where it lies, never missed: the package has its own copy
    """

    name: str
    title: str
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    needed: tuple[tuple[str, ...], ...] = ()
    optional: bool = False


TRANSFORMER, ADAPTER, IMAGES = "transformer", "adapter", "image_encoder"
KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name=TRANSFORMER,
            title="the transformer",
            folders=("transformer",),
            places=("diffusion_models", "unet", "checkpoints"),
        ),
        Kind(
            name="autoencoder",
            title="the autoencoder",
            files=("ae.safetensors", "ae.sft", "ae[._-]*.safetensors", "flux*vae*.safetensors", "flux*ae.safetensors"),
            folders=("vae",),
            places=("vae",),
        ),
        Kind(
            name="clip",
            title="the CLIP text encoder",
            files=("clip_l.safetensors", "clip_l*.safetensors", "clip-l*.safetensors", "clip_l*.gguf", "clip-l*.gguf"),
            folders=("text_encoder",),
            places=("text_encoders", "clip"),
        ),
        Kind(
            name="t5",
            title="the T5 text encoder",
            files=("t5xxl_fp16.safetensors", "t5xxl*.safetensors", "*t5*xxl*.safetensors", "*t5*xxl*.gguf"),
            folders=("text_encoder_2",),
            places=("text_encoders", "clip"),
        ),
        Kind(
            name="tokenizer",
            title="CLIP's tokenizer",
            folders=("tokenizer",),
            needed=(("tokenizer.json",), ("vocab.json", "merges.txt")),
            optional=True,
        ),
        Kind(
            name="tokenizer_2",
            title="T5's tokenizer",
            folders=("tokenizer_2",),
            needed=(("tokenizer.json",), ("spiece.model",)),
            optional=True,
        ),
        Kind(
            name=IMAGES,
            title="the image encoder",
            files=("sigclip_vision*384*.safetensors", "*siglip*so400m*384*.safetensors"),
            folders=("image_encoder",),
            places=("clip_vision",),
        ),
        # The folder is that of Redux, the one adapter that diffusers saves as a component.
        Kind(name=ADAPTER, title="the adapter", folders=("image_embedder",), places=("loras", "style_models")),
    )
}
MODEL = (TRANSFORMER, "autoencoder", "clip", "t5", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class Pick:
    """The files of one component, relative; ``path`` is the file, or the folder where they are several."""

    kind: str
    path: str
    names: tuple[str, ...]

    def bytes(self, listing: Listing) -> int:
        return sum(max(listing.get(name, 0), 0) for name in self.names)


def own_kinds(spec: ModelSpec) -> tuple[str, ...]:
    """The kinds that a member's own repository holds; those of its base, if it is an adapter, lie elsewhere."""
    if spec.base is None:
        return MODEL
    return (ADAPTER, IMAGES) if "redux" in spec.tasks else (ADAPTER,)


def options(listing: Listing, name: str, layouts: Sequence[str]) -> list[Pick]:
    """What of a listing is the component ``name``, which is not the transformer, the preferred layout first."""
    kind = KINDS[name]
    found = {
        OFFICIAL: list(_files(listing, kind)),
        DIFFUSERS: [pick for at in kind.folders if (pick := _folder(listing, at, kind))],
    }
    return [pick for layout in layouts for pick in found[layout]]


def published(listing: Listing, spec: ModelSpec) -> list[Pick]:
    """The official file of a member, wherever in a listing it lies: the transformer, or the adapter, which of Redux may
    also be a folder."""
    kind = ADAPTER if spec.base else TRANSFORMER
    files = [Pick(kind, name, (name,)) for name in sorted(listing) if spec.source and _base(name) == spec.source.file]
    folders = options(listing, ADAPTER, (DIFFUSERS,)) if IMAGES in own_kinds(spec) else []
    return [*files, *folders]


def transformers(listing: Listing, spec: ModelSpec | None, layouts: Sequence[str]) -> list[Pick]:
    """Every complete transformer of a member's own folder or repository, the preferred one first; of an unknown
    member every file of weights at the top that is no companion."""
    folder = _folder(listing, "transformer", KINDS[TRANSFORMER])
    found = {OFFICIAL: published(listing, spec) if spec else [], DIFFUSERS: [folder] if folder else []}
    picks = [pick for layout in layouts for pick in found[layout]]
    if picks or spec:
        return picks
    return [Pick(TRANSFORMER, name, (name,)) for name in sorted(listing) if "/" not in name and _is_main(name)]


def component_folder(listing: Listing) -> Pick | None:
    """The weights of a folder that is itself one component, as diffusers saves it; ``path`` is empty for shards."""
    pick = _folder(listing, "", KINDS[TRANSFORMER]) if "config.json" in listing else None
    return pick if pick and any(_stem(name) in _PLAIN for name in pick.names) else None


def with_shards(listing: Listing, name: str) -> tuple[str, ...]:
    """A file and, of one shard, all others and their index; empty where some of them are missing."""
    folder, slash, base = name.rpartition("/")
    if not (base.endswith(".safetensors.index.json") or _SHARD.fullmatch(base)):
        return (name,)
    stem = base.removesuffix(".safetensors.index.json") if base.endswith(".json") else _stem(base)
    inside = sorted(n.rpartition("/")[2] for n in listing if n.rpartition("/")[0] == folder)
    whole = [one for one in _sets(inside) if _stem(one[0]) == stem and len(one) > 1]
    return tuple(f"{folder}{slash}{n}" for n in [*(c for c in inside if c in _CONFIG), *whole[0]]) if whole else ()


def companion_kind(name: str) -> str | None:
    """Which companion a file's name says that it is."""
    base = _base(name).lower()
    return next((k.name for k in KINDS.values() if any(fnmatchcase(base, pattern) for pattern in k.files)), None)


def _is_main(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and companion_kind(name) is None and not _SHARD.fullmatch(name)


def _base(name: str) -> str:
    return PurePosixPath(name).name


def _files(listing: Listing, kind: Kind) -> Iterator[Pick]:
    """Single files of a kind: at the top or in one of its places, by pattern, then by name."""
    for pattern in kind.files:
        for name in sorted(listing):
            folder, _, base = name.rpartition("/")
            if folder in ("", *kind.places) and fnmatchcase(base.lower(), pattern):
                yield Pick(kind.name, name, (name,))


def _folder(listing: Listing, folder: str, kind: Kind) -> Pick | None:
    """A component's folder, if it is complete: a single file of weights, or every shard and their index."""
    prefix = f"{folder}/" if folder else ""
    names = sorted(n[len(prefix) :] for n in listing if n.startswith(prefix) and "/" not in n[len(prefix) :])
    if kind.needed:
        if not any(set(one) <= set(names) for one in kind.needed):
            return None
        return Pick(kind.name, folder, tuple(prefix + name for name in names if name in _WORDS))
    config = [name for name in names if name in _CONFIG]
    for weights in _sets(names):
        path = folder if len(weights) > 1 else prefix + weights[0]
        return Pick(kind.name, path, tuple(prefix + name for name in [*config, *weights]))
    return None


def _sets(names: Sequence[str]) -> list[list[str]]:
    """Complete sets of weights in one folder: plain names first, then other precisions."""
    single = [[n] for n in names if n.endswith(SUFFIXES) and not _SHARD.fullmatch(n)]
    shards: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            shards.setdefault((match["stem"], match["suffix"], match["count"]), []).append(name)
    whole = [
        [*part, f"{stem}{suffix}.index.json"]
        for (stem, suffix, count), part in shards.items()
        if len(part) == int(count) and f"{stem}{suffix}.index.json" in names
    ]
    return sorted([*single, *whole], key=lambda one: _stem(one[0]) not in _PLAIN)


def _stem(name: str) -> str:
    match = _SHARD.fullmatch(name)
    return match["stem"] if match else PurePosixPath(name).stem
