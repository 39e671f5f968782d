"""Names of the text encoders' tensors: each dialect as an invertible table onto Hugging Face's names, which are ours.

Prefixes are not part of a dialect: all-in-one files and those of ComfyUI keep Hugging Face's names under
``text_encoders.clip_l.transformer.`` and ``text_encoders.t5xxl.transformer.``, single files under none. Sources: the
published files of openai/clip-vit-large-patch14 and google/t5-v1_1-xxl; transformers, which since its version 5 saves
CLIP's text tower without ``text_model.``; llama.cpp's table of tensor names for T5 encoders in GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fluxloom.errors import WeightsError

# llama.cpp's T5: tensors of a block, and of the ends.
_LLAMA_BLOCK = {
    "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "layer.1.layer_norm": "ffn_norm",
}
_LLAMA_ENDS = {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}


@dataclass(frozen=True, kw_only=True)
class TextDialect:
    """How a kind of file names the tensors of an encoder.

    encoder  clip or t5
    name     of the dialect
    mark     the name in such a file of a tensor that tells the dialect
    cut      a beginning of our names that its names lack
    block    (ours, theirs): how the names of a block's tensors begin, with {} for its number
    parts    our names of a block's tensors, without ".weight": theirs; empty where they are the same
    ends     our names of the other tensors: theirs
    """

    encoder: str
    name: str
    mark: str
    cut: str = ""
    block: tuple[str, str] = ("", "")
    parts: Mapping[str, str] = field(default_factory=dict)
    ends: Mapping[str, str] = field(default_factory=dict)

    def theirs(self, name: str) -> str:
        """The name in such a file of our tensor."""
        return _renamed(name.removeprefix(self.cut), self.block, self.parts, self.ends)

    def ours(self, name: str) -> str:
        """Our name of a tensor in such a file; one that the dialect does not know stays as it is."""
        back = _renamed(name, self.block[::-1], _inverse(self.parts), _inverse(self.ends))
        return self.cut + back if self.cut and back.startswith(_BARE_CLIP) else back


# How the names of CLIP's text tower begin without text_model.
_BARE_CLIP = ("embeddings.", "encoder.layers.", "final_layer_norm.")

TEXT_DIALECTS: tuple[TextDialect, ...] = (
    TextDialect(encoder="clip", name="huggingface", mark="text_model.embeddings.token_embedding.weight"),
    TextDialect(encoder="clip", name="transformers 5", mark="embeddings.token_embedding.weight", cut="text_model."),
    TextDialect(encoder="t5", name="huggingface", mark="encoder.block.0.layer.0.SelfAttention.q.weight"),
    TextDialect(
        encoder="t5",
        name="llama.cpp",
        mark="enc.blk.0.attn_q.weight",
        block=("encoder.block.{}.", "enc.blk.{}."),
        parts=_LLAMA_BLOCK,
        ends=_LLAMA_ENDS,
    ),
)

# What published files of the encoders hold besides, and FLUX.1 does not use. The table of T5's tokens is tied: files
# have it as shared, as encoder.embed_tokens, or twice; CLIP's projections serve the comparison with pictures.
UNUSED: Mapping[str, tuple[str, ...]] = {
    "clip": (
        "text_model.embeddings.position_ids",
        "text_projection",
        "logit_scale",
        "vision_model.",
        "visual_projection.",
    ),
    "t5": ("decoder.", "dec.", "lm_head.", "logit_scale", "spiece_model"),
}
TIED = ("shared.weight", "encoder.embed_tokens.weight")


def dialect_of(encoder: str, names: Iterable[str]) -> TextDialect:
    """The dialect of an encoder's file. Raises WeightsError where it is none of ours."""
    held = set(names)
    found = next((row for row in TEXT_DIALECTS if row.encoder == encoder and row.mark in held), None)
    if found is None:
        some = ", ".join(sorted(held)[:3]) or "no tensors"
        marks = " or ".join(row.mark for row in TEXT_DIALECTS if row.encoder == encoder)
        raise WeightsError(f"got {some} for {encoder}, allowed files with {marks}, try another")
    return found


def text_names(encoder: str, names: Iterable[str]) -> dict[str, str]:
    """Our name of every tensor that the encoder uses -> its name in the file (both without a prefix).

    Names that are neither the encoder's nor known as unused are kept, so that strict loading refuses them.
    """
    names = list(names)
    dialect = dialect_of(encoder, names)
    found = {dialect.ours(name): name for name in names if not name.startswith(UNUSED[encoder])}
    first, second = TIED
    if second in found:
        tied = found.pop(second)
        found.setdefault(first, tied)
    return found


def _renamed(name: str, block: tuple[str, str], parts: Mapping[str, str], ends: Mapping[str, str]) -> str:
    """A name on the other side of a table."""
    if name in ends:
        return ends[name]
    if parts:
        here, there = block
        match = re.fullmatch(re.escape(here).replace(r"\{\}", r"(\d+)") + r"(.+)\.weight", name)
        if match and match[2] in parts:
            return f"{there.format(match[1])}{parts[match[2]]}.weight"
    return name


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}
