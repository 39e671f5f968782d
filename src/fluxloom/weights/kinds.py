"""The kinds of components: which tensors only they have, in each dialect, and how their shape is read from names and
shapes.

Sources: the official state dicts and the conversion scripts of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fluxloom.core.specs import MODELS, AutoencoderSpec, ClipSpec, T5Spec, TextSpec, TransformerSpec
from fluxloom.errors import WeightsError
from fluxloom.weights.dialects import Row, table
from fluxloom.weights.text_dialects import TEXT_DIALECTS, UNUSED, text_names

AnySpec = TransformerSpec | AutoencoderSpec | ClipSpec | T5Spec | TextSpec
Shapes = Mapping[str, tuple[int, ...]]

# Beside the encoders in files of other tools; FLUX.1 uses none of them.
IGNORED = re.compile(
    r"(^|\.)(logit_scale|text_projection(\.weight)?|text_model\.embeddings\.position_ids|spiece_model"
    r"|encoder\.embed_tokens\.weight)$"
)
LORA = re.compile(
    r"\.(lora_[AB]|lora_(down|up)|lora\.(down|up)|lokr_w[12](_[ab])?|hada_w[12]_[ab]|dora_scale|diff(_b)?)(\.|$)"
    r"|\.processor\.\w+_lora\d?\."
)


@dataclass(frozen=True)
class Found:
    """What a kind makes of a group of tensors.

    names    of all tensors that such a module has, ours and theirs
    rows     where theirs are cut or laid out otherwise
    ignored  how names begin that belong to other halves of a published model, which FLUX.1 does not use
    """

    spec: AnySpec | None
    names: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, Row] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


Reader = Callable[[Shapes, Mapping[str, Any]], Found]  # of a group and its folder's config


@dataclass(frozen=True)
class Kind:
    """A kind of component in one dialect: tensors that only it has, all of them, and how to read it."""

    kind: str
    dialect: str
    marks: tuple[str, ...]
    read: Reader
    pattern: re.Pattern[str] | None = None

    def fits(self, group: Shapes) -> bool:
        if self.pattern is not None:
            return any(self.pattern.search(name) for name in group)
        return all(name in group for name in self.marks)


def _count(group: Shapes, pattern: str) -> int:
    """How many blocks there are, by the numbers in their names; a gap is left for strict loading to name."""
    numbers = {int(match[1]) for name in group if (match := re.match(pattern, name))}
    return max(numbers, default=-1) + 1


def _tabled(spec: TransformerSpec | AutoencoderSpec, dialect: int) -> Found:
    """All tensors of a spec in the official dialect (0) or that of diffusers (1)."""
    rows = table(spec)
    if dialect == 0:
        return Found(spec, {row.official: (row.official,) for row in rows})
    return Found(spec, {row.official: row.diffusers for row in rows}, {row.official: row for row in rows})


# Where to read a transformer's shape: (official, diffusers).
_PROBES = {
    "img": ("img_in.weight", "x_embedder.weight"),
    "txt": ("txt_in.weight", "context_embedder.weight"),
    "vec": ("vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight"),
    "out": ("final_layer.linear.weight", "proj_out.weight"),
    "guidance": ("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight"),
    "double": (r"double_blocks\.(\d{1,3})\.", r"transformer_blocks\.(\d{1,3})\."),
    "single": (r"single_blocks\.(\d{1,3})\.", r"single_transformer_blocks\.(\d{1,3})\."),
    "double norm": ("double_blocks.0.img_attn.norm.key_norm.scale", "transformer_blocks.0.attn.norm_k.weight"),
    "single norm": ("single_blocks.0.norm.key_norm.scale", "single_transformer_blocks.0.attn.norm_k.weight"),
    "mlp": ("double_blocks.0.img_mlp.0.weight", "transformer_blocks.0.ff.net.0.proj.weight"),
    "single out": ("single_blocks.0.linear2.weight", "single_transformer_blocks.0.proj_out.weight"),
    "bias": ("double_blocks.0.img_attn.qkv.bias", "transformer_blocks.0.attn.to_q.bias"),
}


def _transformer(dialect: int, group: Shapes, config: Mapping[str, Any]) -> Found:
    probe = {name: both[dialect] for name, both in _PROBES.items()}
    width, channels = group[probe["img"]]
    norm = probe["double norm" if probe["double norm"] in group else "single norm"]
    head = group[norm][0]
    mlp = group[probe["mlp"]][0] if probe["mlp"] in group else group[probe["single out"]][1] - width
    axes = config.get("axes_dims_rope")
    spec = TransformerSpec(
        in_channels=channels,
        out_channels=group[probe["out"]][0],
        vec_in_dim=group[probe["vec"]][1],
        context_in_dim=group[probe["txt"]][1],
        hidden_size=width,
        mlp_ratio=mlp / width,
        num_heads=width // head,
        depth=_count(group, probe["double"]),
        depth_single_blocks=_count(group, probe["single"]),
        axes_dim=tuple(axes) if isinstance(axes, list) else _axes(head),
        qkv_bias=probe["bias"] in group or probe["mlp"] not in group,
        guidance_embed=probe["guidance"] in group,
    )
    return _tabled(spec, dialect)


def _axes(head: int) -> tuple[int, int, int]:
    """Rotary axes of a head, in the proportions of all known members: an eighth, and the rest in halves."""
    index = head // 16 * 2
    index += (head - index) // 2 % 2 * 2  # all of them even
    return index, (head - index) // 2, (head - index) // 2


_VAE_CONFIG = {"scaling_factor": "scale_factor", "shift_factor": "shift_factor", "norm_num_groups": "norm_groups"}
# Levels and residual blocks: (official, diffusers).
_VAE_PROBES = {
    "level": ("encoder.down.{}.block.0.conv1.weight", "encoder.down_blocks.{}.resnets.0.conv1.weight"),
    "levels": (r"encoder\.down\.(\d{1,3})\.", r"encoder\.down_blocks\.(\d{1,3})\."),
    "blocks": (r"encoder\.down\.0\.block\.(\d{1,3})\.", r"encoder\.down_blocks\.0\.resnets\.(\d{1,3})\."),
}
_FOREIGN_LATENTS = {4: "the autoencoder of Stable Diffusion 1, 2 or XL", 32: "the autoencoder of FLUX.2"}


def _autoencoder(dialect: int, group: Shapes, config: Mapping[str, Any]) -> Found:
    probe = {name: both[dialect] for name, both in _VAE_PROBES.items()}
    ch, channels = group["encoder.conv_in.weight"][:2]
    levels = _count(group, probe["levels"])
    spec = AutoencoderSpec(
        in_channels=channels,
        out_channels=group["decoder.conv_out.weight"][0],
        ch=ch,
        ch_mult=tuple(group[probe["level"].format(i)][0] // ch for i in range(levels)),
        num_res_blocks=_count(group, probe["blocks"]),
        z_channels=group["encoder.conv_out.weight"][0] // 2,
    )
    if spec.z_channels in _FOREIGN_LATENTS:
        raise WeightsError(f"got {_FOREIGN_LATENTS[spec.z_channels]}, allowed 16 latent channels, try FLUX.1's ae")
    # What shapes cannot tell is a member's, where one has this shape, or the folder's own.
    untold = {"scale_factor", "shift_factor", "norm_groups", "rgb_map"}
    for row in MODELS.values():
        if all(getattr(row.autoencoder, f) == getattr(spec, f) for f in vars(spec) if f not in untold):
            spec = row.autoencoder
            break
    told = {ours: config[theirs] for theirs, ours in _VAE_CONFIG.items() if isinstance(config.get(theirs), int | float)}
    spec = replace(spec, **told)
    return _tabled(spec, dialect)


def _same(group: Shapes) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in group if not IGNORED.search(name)}


def _text(encoder: str, read: Callable[[Shapes, Mapping[str, Any]], AnySpec]) -> Reader:
    """A text encoder in any of its dialects: the shape is read under our names."""

    def reader(group: Shapes, config: Mapping[str, Any]) -> Found:
        names = text_names(encoder, group)
        spec = read({name: group[theirs] for name, theirs in names.items()}, config)
        return Found(spec, {name: (theirs,) for name, theirs in names.items()}, ignored=UNUSED[encoder])

    return reader


def _clip(group: Shapes, config: Mapping[str, Any]) -> ClipSpec:
    vocabulary, width = group["text_model.embeddings.token_embedding.weight"]
    heads = config.get("num_attention_heads")
    return ClipSpec(
        vocab_size=vocabulary,
        width=width,
        layers=_count(group, r"text_model\.encoder\.layers\.(\d{1,3})\."),
        heads=heads if isinstance(heads, int) else max(1, width // 64),  # 64 a head in every published tower
        mlp=group["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        max_length=group["text_model.embeddings.position_embedding.weight"][0],
    )


def _t5(group: Shapes, config: Mapping[str, Any]) -> T5Spec:
    layer = "encoder.block.0.layer."
    vocabulary, width = group["shared.weight"]
    buckets, heads = group[f"{layer}0.SelfAttention.relative_attention_bias.weight"]
    distance = config.get("relative_attention_max_distance")
    return T5Spec(
        vocab_size=vocabulary,
        width=width,
        layers=_count(group, r"encoder\.block\.(\d{1,3})\."),
        heads=heads,
        head_dim=group[f"{layer}0.SelfAttention.q.weight"][0] // heads,
        mlp=group[f"{layer}1.DenseReluDense.wi_0.weight"][0],
        buckets=buckets,
        max_distance=distance if isinstance(distance, int) else 128,
    )


def _tower(group: Shapes, config: Mapping[str, Any]) -> Found:
    """nano's own; its heads are 64 wide."""
    vocabulary, width = group["token.weight"]
    spec = TextSpec(
        vocab_size=vocabulary,
        width=width,
        layers=_count(group, r"blocks\.(\d{1,3})\."),
        heads=max(1, width // 64),
        max_length=group["position"][0],
    )
    return Found(spec, {name: (name,) for name in group})


_SIGLIP_REST = ("vision_model.head.", "text_model.", "logit_")


def _siglip(group: Shapes, config: Mapping[str, Any]) -> Found:
    """The tower that Redux reads with, without its pooling head."""
    names = {n: (n,) for n in group if n.startswith("vision_model.") and not n.startswith(_SIGLIP_REST)}
    return Found(None, names, ignored=_SIGLIP_REST)


def _as_is(group: Shapes, config: Mapping[str, Any]) -> Found:
    return Found(None, _same(group))


_TEXT = {"clip": _text("clip", _clip), "t5": _text("t5", _t5)}
KINDS = (
    Kind("lora", "", (), _as_is, LORA),
    Kind(
        "transformer",
        "official",
        tuple(_PROBES[name][0] for name in ("img", "txt", "vec", "out")),
        lambda group, config: _transformer(0, group, config),
    ),
    Kind(
        "transformer",
        "diffusers",
        tuple(_PROBES[name][1] for name in ("img", "txt", "vec", "out")),
        lambda group, config: _transformer(1, group, config),
    ),
    Kind(
        "autoencoder",
        "official",
        ("encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.mid.block_1.conv1.weight"),
        lambda group, config: _autoencoder(0, group, config),
    ),
    Kind(
        "autoencoder",
        "diffusers",
        ("encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.mid_block.resnets.0.conv1.weight"),
        lambda group, config: _autoencoder(1, group, config),
    ),
    Kind("siglip", "huggingface", ("vision_model.head.probe", "vision_model.post_layernorm.weight"), _siglip),
    *(Kind(row.encoder, row.name, (row.mark,), _TEXT[row.encoder]) for row in TEXT_DIALECTS),
    Kind("redux", "official", ("redux_up.weight", "redux_down.weight"), _as_is),
    Kind("text", "official", ("token.weight", "position", "blocks.0.qkv.weight"), _tower),
)
