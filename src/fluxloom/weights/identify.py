"""What a checkpoint is: its components, how each names its tensors, its shape, and which members have that shape.

Everything is read from names and shapes alone; a folder's config.json adds what shapes cannot tell. dev, Krea and
Kontext are of one shape, as are Canny and Depth: there the sha256, the metadata or the file name decides, in this
order, or the user. Sources: the official state dicts, the conversion scripts of diffusers, ComfyUI's prefixes, the
tensor names of GGUF.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fluxloom.core.specs import MODELS, ModelSpec, TransformerSpec
from fluxloom.errors import BadInput, WeightsError
from fluxloom.weights.checkpoint import CONFIG, Checkpoint
from fluxloom.weights.dialects import Row
from fluxloom.weights.kinds import IGNORED, KINDS, LORA, AnySpec, Kind, Shapes


@dataclass(frozen=True, kw_only=True)
class Component:
    """One module's worth of tensors in a checkpoint.

    kind        transformer, autoencoder, clip, t5, text (nano's tower), redux, siglip (what Redux reads with) or lora
    dialect     whose names these are: official, diffusers, or a text encoder's (text_dialects)
    prefix      before every one of them
    names       name in our module -> names in the checkpoint; several are rows of one fused tensor
    rows        how diffusers' tensors make ours, in its dialect
    spec        read from the shapes; None for redux, siglip and LoRAs
    candidates  rows of MODELS that it may be
    basis       what the candidates rest on: shape, sha256, metadata or file name
    unknown     tensors that have no place in such a module; loading refuses them
    """

    kind: str
    dialect: str
    prefix: str
    names: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, Row] = field(default_factory=dict)
    spec: AnySpec | None = None
    candidates: tuple[str, ...] = ()
    basis: str = "shape"
    unknown: tuple[str, ...] = ()


def identify(checkpoint: Checkpoint, sha256: str | None = None) -> list[Component]:
    """The components of a checkpoint; ``sha256`` of its file, where it is known, tells members of one shape apart.

    Raises WeightsError for what is no part of a FLUX.1 model, saying what it seems to be.
    """
    shapes = {name: entry.shape for name, entry in checkpoint.items()}
    found: list[Component] = []
    rest: list[str] = []
    for prefix, group in _groups(shapes).items():
        kind = next((kind for kind in KINDS if kind.fits(group)), None)
        if kind is None:
            rest += [prefix + name for name in group if not IGNORED.search(name)]
            continue
        config = _config(checkpoint.metadata, prefix)
        found.append(_component(kind, prefix, group, config))
    if rest and (foreign := _foreign(rest)):
        raise WeightsError(f"got {foreign} ({rest[0]}, ...), allowed FLUX.1 models and their parts, try another file")
    if not found:
        some = ", ".join([*shapes][:3]) or "no tensors at all"
        raise WeightsError(f"got a checkpoint of an unknown kind ({some}), allowed FLUX.1 models and their parts")
    found[0] = replace(found[0], unknown=(*found[0].unknown, *rest))
    return [_narrowed(part, checkpoint, sha256) for part in found]


def choose(component: Component, variant: str | None = None) -> ModelSpec:
    """The member that a component belongs to. Raises BadInput where it is not the one named, or several would do."""
    allowed = component.candidates
    if variant is not None:
        row = MODELS.get(variant)
        spec = component.spec
        if row is not None and (variant in allowed or (not allowed and _pruned(spec, row.transformer))):
            return replace(row, transformer=spec) if isinstance(spec, TransformerSpec) else row
        raise BadInput(
            f"got variant {variant!r}, allowed {_listed(allowed)} by the weights' {component.basis}, try one"
        )
    if len(allowed) != 1:
        fits = _listed(allowed) if allowed else "no known member (pruned?)"
        first = allowed[-1] if allowed else "flux1-dev"
        raise BadInput(f"got weights whose {component.basis} fits {fits}, allowed one, try --variant {first}")
    return MODELS[allowed[0]]


def _pruned(spec: AnySpec | None, row: TransformerSpec) -> bool:
    """Whether a transformer of another size takes and gives what a row's does: pruned, distilled, or a toy."""
    return isinstance(spec, TransformerSpec) and (
        (spec.in_channels, spec.out_channels, spec.guidance_embed)
        == (row.in_channels, row.out_channels, row.guidance_embed)
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


# ---------------------------------------------------------------------------------------------- prefixes

# All-in-one files put every component under a prefix; text encoders are wrapped once more. nano's shards likewise.
PREFIXES = (
    "model.diffusion_model.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.t5xxl.transformer.",
    "text_encoders.clip_l.",
    "text_encoders.t5xxl.",
    "first_stage_model.",
    "vae.",
    "diffusion_model.",
    "transformer.",
    "autoencoder.",
    "text_encoder_2.",
    "text_encoder.",
    "text.",
)


def _groups(shapes: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Tensors by prefix: that of a folder (up to the last "/"), then one of PREFIXES. A LoRA is one group."""
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    is_lora = any(LORA.search(name) for name in shapes)
    for name, shape in shapes.items():
        folder = name[: name.rfind("/") + 1]
        inner = name[len(folder) :]
        prefix = "" if is_lora else next((prefix for prefix in PREFIXES if inner.startswith(prefix)), "")
        groups.setdefault(folder + prefix, {})[inner[len(prefix) :]] = shape
    return groups


def _config(metadata: Mapping[str, str], prefix: str) -> Mapping[str, Any]:
    """A folder's config.json, {} where there is none that can be read."""
    try:
        config = json.loads(metadata.get(prefix[: prefix.rfind("/") + 1] + CONFIG, "{}"))
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _component(kind: Kind, prefix: str, group: Shapes, config: Mapping[str, Any]) -> Component:
    try:
        found = kind.read(group, config)
    except (KeyError, IndexError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise WeightsError(
            f"got {kind.dialect} {kind.kind} weights whose shape cannot be told ({error}), try fetching them anew"
        ) from error
    used = {name for names in found.names.values() for name in names}
    rest = [name for name in group if name not in used and not IGNORED.search(name)]
    return Component(
        kind=kind.kind,
        dialect=kind.dialect,
        prefix=prefix,
        names={ours: tuple(prefix + name for name in theirs) for ours, theirs in found.names.items()},
        rows=found.rows,
        spec=found.spec,
        unknown=tuple(prefix + name for name in rest if not name.startswith(found.ignored)),
    )


# ---------------------------------------------------------------------------------------------- others

# A part of a tensor's name, and whose it is.
_FOREIGN = (
    ("distilled_guidance_layer.", "a Chroma checkpoint"),
    ("double_stream_modulation_img", "a FLUX.2 checkpoint"),
    ("controlnet_", "a ControlNet"),
    ("input_hint_block", "a ControlNet"),
    ("joint_blocks.0.", "a Stable Diffusion 3 checkpoint"),
    ("conditioner.embedders.", "an SDXL checkpoint"),
    ("label_emb.0.", "an SDXL checkpoint"),
    ("cond_stage_model.", "a Stable Diffusion 1 or 2 checkpoint"),
    ("input_blocks.0.0.", "the UNet of a Stable Diffusion checkpoint"),
    ("down_blocks.0.resnets.0.", "the UNet of a Stable Diffusion checkpoint"),
    ("transformer_blocks.0.img_mod.1.", "a Qwen-Image checkpoint"),
    ("txt_in.individual_token_refiner", "a HunyuanVideo checkpoint"),
    ("cap_embedder.", "a Lumina or Z-Image checkpoint"),
    ("caption_projection.", "a PixArt or SANA checkpoint"),
    ("pos_embed.proj.", "a Stable Diffusion 3 checkpoint"),
    ("blocks.0.self_attn.", "a Wan or Cosmos checkpoint"),
    ("vision_model.", "a vision tower"),
    ("image_proj", "an IP-Adapter"),
    ("model.layers.0.self_attn.", "a language model"),
    ("layers.0.weight", "a tiny autoencoder (TAEF1, for --preview-decoder)"),
)


def _foreign(names: Iterable[str]) -> str | None:
    names = list(names)
    return next((what for mark, what in _FOREIGN if any(mark in name for name in names)), None)


# ---------------------------------------------------------------------------------------------- members

# Where tools write a model's name.
MEMBER = "fluxloom.member"  # as our own conversions note it
_TITLES = ("general.name", "general.basename", "modelspec.title", "modelspec.architecture", "title", "name")


def _narrowed(part: Component, checkpoint: Checkpoint, sha256: str | None) -> Component:
    """A component with the members of its shape, fewer where something else tells them apart."""
    rows = tuple(row for row in MODELS.values() if _may_be(row, part, checkpoint))
    for row in rows:
        if sha256 and row.source and row.source.sha256 == sha256:
            return replace(part, candidates=(row.name,), basis="sha256")
    names = tuple(row.name for row in rows)
    noted = checkpoint.metadata.get(MEMBER)
    if noted in names:
        return replace(part, candidates=(noted,), basis="metadata")
    if len(rows) > 1:
        for basis, text, plain in _hints(part, checkpoint):
            told = _told(text, names, plain)
            if told is not None:
                return replace(part, candidates=(told,), basis=basis)
    return replace(part, candidates=names)


def _may_be(row: ModelSpec, part: Component, checkpoint: Checkpoint) -> bool:
    if part.kind == "transformer":
        return row.base is None and row.transformer == part.spec
    if part.kind == "redux":
        return row.base is not None and row.lora is None
    control = checkpoint.get(f"{part.prefix}img_in.lora_A.weight") if part.kind == "lora" else None
    return control is not None and row.lora is not None and control.shape[-1] == row.transformer.in_channels


def _hints(part: Component, checkpoint: Checkpoint) -> Iterable[tuple[str, str, bool]]:
    """(basis, text, whether a plain "dev" in it means dev), the surest first."""
    facts = checkpoint.metadata
    yield "metadata", " ".join(facts[name] for name in _TITLES if name in facts), False
    for name in ("model_index.json", part.prefix[: part.prefix.rfind("/") + 1] + CONFIG):
        config = _config({CONFIG: facts.get(name, "{}")}, "")
        yield "metadata", f"{config.get('_class_name', '')} {config.get('_name_or_path', '')}", False
    sources = {name for names in part.names.values() for name in names}
    if checkpoint.files and sources:
        path = checkpoint.files[0]
        yield "file name", path.stem, True
        for folder in path.parents[:4]:  # of a hub's cache: models--owner--NAME/snapshots/revision/transformer
            yield "file name", folder.name, True


def _told(text: str, names: tuple[str, ...], plain: bool) -> str | None:
    """The one candidate that a text names, by the words that only it has, or, if ``plain``, by the words of all."""
    words = set(re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower()))
    own = {name: set(name.split("-")[1:]) for name in names}
    shared = set.intersection(*own.values())
    told = [name for name in names if own[name] - shared and own[name] - shared <= words]
    if not told and plain and shared <= words:
        told = [name for name in names if own[name] == shared]
    return told[0] if len(told) == 1 else None
