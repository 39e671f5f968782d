"""Names and layouts of weights: the official dialect and that of diffusers, as one invertible table.

Both directions are strict: a missing, unknown or misshapen tensor is an error that names it. Sources: the
official model code and the conversion scripts of diffusers; the parity tests hold the table against both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fluxloom.core.specs import AutoencoderSpec, TransformerSpec
from fluxloom.errors import WeightsError

State = Mapping[str, Tensor]
Spec = TransformerSpec | AutoencoderSpec

# Layers, official name: diffusers name. Several on the right are one fused official layer, cut by rows.
_EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
}
_GUIDANCE = {
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
_DOUBLE_BLOCK = {
    "img_mod.lin": "norm1.linear",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mod.lin": "norm1_context.linear",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_SINGLE_BLOCK = {
    "modulation.lin": "norm.linear",
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}
_LAST_LAYER = {"final_layer.linear": "proj_out"}
_LAST_MODULATION = {"final_layer.adaLN_modulation.1": "norm_out.linear"}

_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
_SHORTCUT = {"nin_shortcut": "conv_shortcut"}
_ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
_ATTENTION_NORM = {"norm": "group_norm"}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


Layout = Literal["same", "swapped", "pointwise"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One official tensor and the diffusers tensors that hold the same numbers: several if ``rows`` cuts it.

    "swapped": diffusers keeps (scale, shift) where the official code keeps (shift, scale). "pointwise": an
    official 1 x 1 convolution is a linear layer in diffusers.
    """

    official: str
    diffusers: tuple[str, ...]
    rows: tuple[int, ...] = ()
    layout: Layout = "same"

    def to_diffusers(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if self.rows:
            _need(tensor.shape[0] == sum(self.rows), self.official, tensor, f"{sum(self.rows)} rows")
            return torch.split(tensor, list(self.rows))
        if self.layout == "pointwise":
            _need(tensor.shape[2:] == (1, 1), self.official, tensor, "a 1 x 1 convolution")
            return (tensor[:, :, 0, 0],)
        return (_swap_halves(tensor) if self.layout == "swapped" else tensor,)

    def to_official(self, parts: list[Tensor]) -> Tensor:
        if self.rows:
            for name, part, rows in zip(self.diffusers, parts, self.rows, strict=True):
                _need(part.shape[0] == rows, name, part, f"{rows} rows")
            return torch.cat(parts)
        if self.layout == "pointwise":
            _need(parts[0].ndim == 2, self.diffusers[0], parts[0], "a matrix")
            return parts[0][:, :, None, None]
        return _swap_halves(parts[0]) if self.layout == "swapped" else parts[0]


def to_diffusers(state: State, spec: Spec) -> dict[str, Tensor]:
    """An official state in the names and layouts of diffusers."""
    rows = table(spec)
    _need_exactly({row.official for row in rows}, state)
    out: dict[str, Tensor] = {}
    for row in rows:
        out.update(zip(row.diffusers, row.to_diffusers(state[row.official]), strict=True))
    return out


def to_official(state: State, spec: Spec) -> dict[str, Tensor]:
    """A diffusers state in the official names and layouts."""
    rows = table(spec)
    _need_exactly({name for row in rows for name in row.diffusers}, state)
    return {row.official: row.to_official([state[name] for name in row.diffusers]) for row in rows}


def table(spec: Spec) -> list[Row]:
    """Every tensor of a model, once."""
    return list(_transformer(spec) if isinstance(spec, TransformerSpec) else _autoencoder(spec))


def _transformer(spec: TransformerSpec) -> Iterator[Row]:
    yield from _layers(_EMBEDDERS | (_GUIDANCE if spec.guidance_embed else {}) | _LAST_LAYER)
    yield from _layers(_LAST_MODULATION, layout="swapped")
    cut = (spec.hidden_size,) * 3 + (spec.mlp_hidden,)
    for i in range(spec.depth):
        for row in _layers(_DOUBLE_BLOCK, f"double_blocks.{i}.", f"transformer_blocks.{i}.", cut=cut):
            if spec.qkv_bias or not row.official.endswith("qkv.bias"):
                yield row
    for i in range(spec.depth_single_blocks):
        yield from _layers(_SINGLE_BLOCK, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", cut=cut)


def _autoencoder(spec: AutoencoderSpec) -> Iterator[Row]:
    last = len(spec.ch_mult) - 1
    for half in ("encoder.", "decoder."):
        yield from _layers(_ENDS, half, half)
        for i in range(2):
            yield from _layers(_RESNET, f"{half}mid.block_{i + 1}.", f"{half}mid_block.resnets.{i}.")
        middle = f"{half}mid.attn_1.", f"{half}mid_block.attentions.0."
        yield from _layers(_ATTENTION_NORM, *middle)
        yield from _layers(_ATTENTION, *middle, layout="pointwise")
    for i, mult in enumerate(spec.ch_mult):
        down = f"encoder.down.{i}.", f"encoder.down_blocks.{i}."
        up = f"decoder.up.{i}.", f"decoder.up_blocks.{last - i}."  # diffusers counts in the order they run
        yield from _resnets(*down, spec.num_res_blocks, shortcut=mult != (1, *spec.ch_mult)[i])
        yield from _resnets(*up, spec.num_res_blocks + 1, shortcut=mult != (*spec.ch_mult, mult)[i + 1])
        if i < last:
            yield from _layers({"downsample.conv": "downsamplers.0.conv"}, *down)
        if i > 0:
            yield from _layers({"upsample.conv": "upsamplers.0.conv"}, *up)


def _resnets(official: str, diffusers: str, count: int, *, shortcut: bool) -> Iterator[Row]:
    """The residual blocks of one level; the first has a shortcut where it changes the width."""
    for j in range(count):
        names = _RESNET | (_SHORTCUT if shortcut and j == 0 else {})
        yield from _layers(names, f"{official}block.{j}.", f"{diffusers}resnets.{j}.")


def _layers(
    names: Mapping[str, str],
    official: str = "",
    diffusers: str = "",
    cut: tuple[int, ...] = (),
    layout: Layout = "same",
) -> Iterator[Row]:
    """The tensors of some layers under two prefixes: weight and bias, or the scale of a query or key norm."""
    for ours, theirs in names.items():
        parts = theirs.split()
        scale = ours.endswith(("query_norm", "key_norm"))
        for kind, other in [("scale", "weight")] if scale else [("weight", "weight"), ("bias", "bias")]:
            yield Row(
                official=f"{official}{ours}.{kind}",
                diffusers=tuple(f"{diffusers}{part}.{other}" for part in parts),
                rows=cut[: len(parts)] if len(parts) > 1 else (),
                layout="same" if layout == "pointwise" and kind == "bias" else layout,
            )


def _swap_halves(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def _need(fits: bool, name: str, tensor: Tensor, want: str) -> None:
    if not fits:
        raise WeightsError(f"got {name} of shape {list(tensor.shape)}, allowed {want}, try another spec")


def _need_exactly(names: Set[str], state: State) -> None:
    for what, keys in (("missing", names - state.keys()), ("unknown", state.keys() - names)):
        if keys:
            some = ", ".join(sorted(keys)[:5]) + (", ..." if len(keys) > 5 else "")
            raise WeightsError(f"got {len(keys)} {what} tensors ({some}), allowed exactly {len(names)}, try another")
