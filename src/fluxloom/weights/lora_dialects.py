"""How LoRA files name their tensors, as tables: prefixes, paths, suffixes; and which dialect a file speaks.

A key is prefix + path + suffix. The path names a layer, officially or as diffusers does, with dots or underscores;
the suffix says which tensor of the update it is. All combinations are read, whoever wrote them: the dialect is what
the file as a whole is called, and no reading depends on it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from fluxloom.core.specs import TransformerSpec
from fluxloom.weights.dialects import table


@dataclass(frozen=True)
class Place:
    """A layer or norm of the transformer, or some rows of one. ``swapped``: its halves are exchanged in the file."""

    module: str
    rows: tuple[int, int] | None = None
    swapped: bool = False


@dataclass(frozen=True)
class Key:
    """One key of a file, taken apart."""

    whole: str
    prefix: str
    style: str
    place: Place
    path: str
    role: str


# Prefixes, longest first where one begins with another.
PREFIXES = (
    "base_model.model.transformer.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "lora_transformer_",
    "transformer.",
    "lora_unet_",
    "lycoris_",
    "",
)

# Prefixes of what belongs to a text encoder: tool by tool, "te2" or "te3" is T5.
TEXT = (
    "lora_te",
    "lora_clip",
    "lora_t5",
    "text_encoder",  # also text_encoder_2. and text_encoders.clip_l.transformer.
    "base_model.model.text_model.",
    "lycoris_text_model_",
    "clip_l.",
    "t5xxl.",
    "t5.",
    "bundle_emb.",
)

_ADAPTER = r"(?:\.[\w-]+)?"  # PEFT keeps the name of an adapter there, often "default"
ROLES: Mapping[str, str] = MappingProxyType(
    {
        "down": rf"lora_A{_ADAPTER}\.weight|lora_A|lora_down\.weight|lora\.down\.weight|down\.weight",
        "up": rf"lora_B{_ADAPTER}\.weight|lora_B|lora_up\.weight|lora\.up\.weight|up\.weight",
        "up_bias": rf"lora_B{_ADAPTER}\.bias|lora_up\.bias",
        "alpha": r"(?:lora_)?alpha",
        "magnitude": rf"dora_scale|lora_magnitude_vector{_ADAPTER}(?:\.weight)?",
        "w1": r"lokr_w1",
        "w1_a": r"lokr_w1_a",
        "w1_b": r"lokr_w1_b",
        "w2": r"lokr_w2",
        "w2_a": r"lokr_w2_a",
        "w2_b": r"lokr_w2_b",
        "a1": r"hada_w1_a",
        "b1": r"hada_w1_b",
        "a2": r"hada_w2_a",
        "b2": r"hada_w2_b",
        "diff": r"diff|w_norm",
        "diff_b": r"diff_b|b_norm",
        "set": r"set_weight",
        "shape": r"reshape_weight",
        "value": r"scale|weight",  # of a norm, as it stands in a checkpoint
    }
)
_ROLE = {role: re.compile(pattern) for role, pattern in ROLES.items()}

# What some tools write that has no meaning for linear layers, or that nobody here has met in a file for FLUX.1.
UNSUPPORTED = {
    r"lora_mid\.weight|lokr_t2|hada_t[12]": "a Tucker core, which is for convolutions",
    r"oft_(?:blocks|diag)|oft_R(?:\.\w+)*": "OFT",
    r"[ab][12]\.weight": "GLoRA",
    r"vera_lambda_[bd].*": "VeRA",
    r"(?:on_input|on_output|ia3_l.*)": "IA3",
}


@dataclass(frozen=True)
class Dialect:
    """A row of the table: what a file is called whose keys mostly have these prefixes and styles of path.

    ``mark`` must be found in some key, or in the metadata as ``name=value``.
    """

    name: str
    title: str
    styles: tuple[str, ...]
    prefixes: tuple[str, ...] = PREFIXES
    mark: str = ""


# The first row that fits. Sources: the trainers' own code, and how diffusers, ComfyUI and InvokeAI tell them apart.
DIALECTS = (
    Dialect("xlabs", "XLabs", ("xlabs",)),
    Dialect("control", "official control LoRA", ("official",), mark=r"^[^=]*norm\.key_norm\.scale$"),
    Dialect("onetrainer-split", "OneTrainer, layers in parts", ("split", "official"), mark=r"\.(?:qkv|linear1)\.0\."),
    Dialect("kohya", "kohya sd-scripts", ("official_", "diffusers_"), ("lora_unet_",)),
    Dialect("onetrainer", "OneTrainer", ("official_", "diffusers_"), ("lora_transformer_",)),
    Dialect("lycoris", "LyCORIS, SimpleTuner", ("official_", "diffusers_"), ("lycoris_",)),
    Dialect("fal", "fal Kontext trainer", ("official", "split"), PREFIXES[:2]),
    Dialect("official", "PEFT with official names (ComfyUI)", ("official", "official_", "split")),
    Dialect("ai-toolkit", "ai-toolkit", ("diffusers",), ("transformer.",), mark=r"ai-toolkit|\.lokr_w"),
    Dialect("diffusers", "diffusers / PEFT", ("diffusers", "diffusers_")),
)  # fmt: skip

# Families that are not FLUX.1, by a key that only they have; the order matters.
FOREIGN = {
    r"lora_unet_(?:down|up|input|output|mid)_|^unet\.": "Stable Diffusion 1, 2 or XL",
    r"joint_blocks|context_block": "Stable Diffusion 3",
    r"distilled_guidance_layer|nerf_blocks": "Chroma",
    r"double_stream_modulation|(?:img|txt)_mlp\.(?:gate|up)|single_transformer_blocks\.\d+\.attn\.to_qkv_mlp": "FLUX.2",
    r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp|mod)": "Qwen-Image",
    r"(?:^|\.|_)blocks[._]\d+[._](?:self_attn|cross_attn)": "Wan",
    r"double_blocks.*(?:img_attn_q|img_attn_qkv)\b.*single_blocks.*linear1|refiner_blocks": "HunyuanVideo",
    r"caption_projection|layers\.\d+\.attention\.": "another transformer",
}

_XLABS = {
    "double_blocks": {"qkv_lora1": "img_attn.qkv", "proj_lora1": "img_attn.proj",
                      "qkv_lora2": "txt_attn.qkv", "proj_lora2": "txt_attn.proj"},
    "single_blocks": {"qkv_lora": "linear1", "proj_lora": "linear2"},
}  # fmt: skip


@lru_cache(maxsize=8)
def paths(spec: TransformerSpec) -> Mapping[str, tuple[str, Place]]:
    """Path: (style, place) for every layer and norm of a transformer, in every way of writing it."""
    styles: dict[str, dict[str, Place]] = {
        style: {} for style in ("official", "split", "diffusers", "official_", "diffusers_", "xlabs")
    }
    for row in table(spec):
        module, _, kind = row.official.rpartition(".")
        if kind == "bias":
            continue
        styles["official"][module] = Place(module)
        start = 0
        for i, (part, rows) in enumerate(zip(row.diffusers, row.rows or (0,), strict=True)):
            place = Place(module, (start, start + rows)) if row.rows else Place(module, swapped=row.layout == "swapped")
            styles["diffusers"][part.rpartition(".")[0]] = place
            if row.rows:
                styles["split"][f"{module}.{i}"] = place
            start += rows
    for style in ("official", "diffusers"):
        styles[f"{style}_"] = {path.replace(".", "_"): place for path, place in styles[style].items()}
    styles["xlabs"] = _xlabs(spec)
    out: dict[str, tuple[str, Place]] = {}
    for style, found in styles.items():
        for path, place in found.items():
            out.setdefault(path, (style, place))
    return MappingProxyType(out)


def _xlabs(spec: TransformerSpec) -> dict[str, Place]:
    """In single blocks their qkv is the first three of the four parts of linear1."""
    counts = {"double_blocks": spec.depth, "single_blocks": spec.depth_single_blocks}
    return {
        f"{blocks}.{i}.processor.{theirs}": Place(
            f"{blocks}.{i}.{ours}", (0, 3 * spec.hidden_size) if ours == "linear1" else None
        )
        for blocks, names in _XLABS.items()
        for i in range(counts[blocks])
        for theirs, ours in names.items()
    }


def take_apart(key: str, spec: TransformerSpec) -> Key | None:
    """Prefix, path and suffix of a key, or None where a part is unknown."""
    known = paths(spec)
    for prefix in PREFIXES:
        if not key.startswith(prefix):
            continue
        dots = [i for i, letter in enumerate(key) if letter == "." and i > len(prefix)]
        for dot in dots:
            path, suffix = key[len(prefix) : dot], key[dot + 1 :]
            role = role_of(suffix)
            if path in known and role:
                style, place = known[path]
                return Key(key, prefix, style, place, path, role)
    return None


def role_of(suffix: str) -> str | None:
    """Which tensor of an update a suffix names."""
    return next((role for role, pattern in _ROLE.items() if pattern.fullmatch(suffix)), None)


def is_text(key: str) -> bool:
    """Whether a key is about a text encoder."""
    return key.startswith(TEXT)


def dialect_of(keys: Iterable[Key], names: Iterable[str], metadata: Mapping[str, str]) -> Dialect | None:
    """The dialect of a file: by what most of its keys look like, and by marks. None: no key is known."""
    counts = Counter((key.prefix, key.style) for key in keys)
    if not counts:
        return None
    (prefix, style), _ = counts.most_common(1)[0]
    marks = [*names, *(f"{name}={value}" for name, value in metadata.items())]
    return next(
        (
            row
            for row in DIALECTS
            if style in row.styles and prefix in row.prefixes and any(re.search(row.mark, mark) for mark in marks)
        ),
        None,
    )


def why_unknown(key: str, spec: TransformerSpec) -> str:
    """What can be said about a key that :func:`take_apart` does not know."""
    for pattern, what in UNSUPPORTED.items():
        if re.search(rf"\.(?:{pattern})$", key):
            return f"{what}: not supported"
    block = re.search(r"(double|single|transformer|single_transformer)_blocks[._](\d+)[._]", key)
    if block:
        count = spec.depth_single_blocks if block[1].startswith("single") else spec.depth
        if int(block[2]) >= count:
            return f"there are only {count} such blocks"
    return "no such layer or suffix"


def family_of(names: Iterable[str]) -> str | None:
    """Another family than FLUX.1 that a file of these keys is for."""
    joined = "\n".join(names)
    return next((family for pattern, family in FOREIGN.items() if re.search(pattern, joined, re.MULTILINE)), None)
