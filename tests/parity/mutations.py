"""Mistakes on purpose: each is one plausible slip of an implementer, and every parity test must notice it.

A mutation gets the scene (our module, its inputs, ...) and a patch: it spoils weights or inputs in place, or the
code through the patch, which the test undoes. The tests assert that the spoilt result misses the oracle by more
than ``WIDE``, a hundred times the tolerance that the true result must meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fluxloom.core import attention, autoencoder, flow, shapes, transformer

TOLERANCE = 1e-5
WIDE = 1e-3
SLIGHT = 5e-5  # for slips whose whole effect is small, as the 5e-4 between the two forms of GELU

Mutation = Callable[[pytest.MonkeyPatch, Any], None]
TRANSFORMER: list[Mutation] = []
SUBTLE: list[Mutation] = []
AUTOENCODER: list[Mutation] = []
SCHEDULE: list[Mutation] = []
PACKING: list[Mutation] = []
JOURNEY: list[Mutation] = []


def _in(*groups: list[Mutation]) -> Callable[[Mutation], Mutation]:
    def register(mutation: Mutation) -> Mutation:
        for group in groups:
            group.append(mutation)
        return mutation

    return register


def each(group: list[Mutation]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mutation", group, ids=lambda mutation: mutation.__name__)


# --- transformer: a scene has ours (Transformer) and inputs (its arguments, with a reference) ------------------


@_in(TRANSFORMER)
def last_halves_swapped(patch: pytest.MonkeyPatch, scene: Any) -> None:
    for parameter in scene.ours.final_layer.adaLN_modulation[1].parameters():
        parameter.data = torch.cat(parameter.chunk(2)[::-1])


@_in(TRANSFORMER)
def qkv_rows_by_head(patch: pytest.MonkeyPatch, scene: Any) -> None:
    def split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
        return rearrange(qkv, "b l (n k d) -> k b n l d", k=3, n=heads).unbind(0)

    patch.setattr(transformer, "split_heads", split)


@_in(TRANSFORMER)
def qkv_heads_innermost(patch: pytest.MonkeyPatch, scene: Any) -> None:
    def split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
        return rearrange(qkv, "b l (k d n) -> k b n l d", k=3, n=heads).unbind(0)

    patch.setattr(transformer, "split_heads", split)


@_in(TRANSFORMER)
def query_and_key_norms_exchanged(patch: pytest.MonkeyPatch, scene: Any) -> None:
    for block in scene.ours.single_blocks:
        block.norm.query_norm, block.norm.key_norm = block.norm.key_norm, block.norm.query_norm


@_in(TRANSFORMER)
def stream_norms_exchanged(patch: pytest.MonkeyPatch, scene: Any) -> None:
    for block in scene.ours.double_blocks:
        block.img_attn.norm, block.txt_attn.norm = block.txt_attn.norm, block.img_attn.norm


@_in(TRANSFORMER)
def norm_scale_forgotten(patch: pytest.MonkeyPatch, scene: Any) -> None:
    for norm in (m for m in scene.ours.modules() if isinstance(m, attention.RMSNorm)):
        norm.scale.data = torch.ones_like(norm.scale)


@_in(TRANSFORMER)
def rotation_of_halves(patch: pytest.MonkeyPatch, scene: Any) -> None:
    def rotate(x: Tensor, rope: attention.Rope) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = rope
        return torch.cat((cos * first - sin * second, sin * first + cos * second), dim=-1)

    patch.setattr(attention, "rotate", rotate)


@_in(TRANSFORMER)
def rotation_backwards(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = attention.rope
    patch.setattr(transformer, "rope", lambda *args: (true(*args)[0], -true(*args)[1]))


@_in(TRANSFORMER)
def axes_evenly_split(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = attention.rope
    patch.setattr(transformer, "rope", lambda ids, axes, theta: true(ids, (12, 10, 10), theta))


@_in(TRANSFORMER)
def image_tokens_before_text(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = attention.rope

    def rope(ids: Tensor, *args: Any) -> attention.Rope:
        return true(ids.roll(-scene.inputs["txt"].shape[1], dims=1), *args)

    patch.setattr(transformer, "rope", rope)


@_in(TRANSFORMER)
def reference_at_index_0(patch: pytest.MonkeyPatch, scene: Any) -> None:
    scene.inputs["img_ids"] = scene.inputs["img_ids"] * torch.tensor([0.0, 1.0, 1.0])


@_in(TRANSFORMER)
def rows_and_columns_exchanged(patch: pytest.MonkeyPatch, scene: Any) -> None:
    scene.inputs["img_ids"] = scene.inputs["img_ids"][..., [0, 2, 1]]


@_in(TRANSFORMER)
def text_positions_counted(patch: pytest.MonkeyPatch, scene: Any) -> None:
    ids = scene.inputs["txt_ids"]
    scene.inputs["txt_ids"] = torch.arange(ids.shape[1])[None, :, None].expand_as(ids).float()


@_in(TRANSFORMER)
def sine_half_first(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = transformer.sinusoid
    patch.setattr(transformer, "sinusoid", lambda t: true(t).roll(128, dims=-1))


@_in(TRANSFORMER)
def time_not_in_thousandths(patch: pytest.MonkeyPatch, scene: Any) -> None:
    scene.inputs["t"] = scene.inputs["t"] / 1000


@_in(TRANSFORMER)
def times_of_the_batch_exchanged(patch: pytest.MonkeyPatch, scene: Any) -> None:
    scene.inputs["t"] = scene.inputs["t"].flip(0)


@_in(TRANSFORMER)
def guidance_of_the_batch_exchanged(patch: pytest.MonkeyPatch, scene: Any) -> None:
    scene.inputs["guidance"] = scene.inputs["guidance"].flip(0)


@_in(TRANSFORMER)
def guidance_left_out(patch: pytest.MonkeyPatch, scene: Any) -> None:
    for parameter in scene.ours.guidance_in.out_layer.parameters():
        parameter.data = torch.zeros_like(parameter)


@_in(TRANSFORMER)
def modulation_scale_first(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = transformer.modulate
    patch.setattr(transformer, "modulate", lambda x, shift, scale: true(x, scale, shift))


@_in(TRANSFORMER)
def modulation_gate_first(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = transformer.Modulation.forward

    def forward(self: transformer.Modulation, vec: Tensor) -> tuple[Tensor, ...]:
        parts = true(self, vec)
        return tuple(part for i in range(0, len(parts), 3) for part in (*parts[i + 1 : i + 3], parts[i]))

    patch.setattr(transformer.Modulation, "forward", forward)


@_in(TRANSFORMER)
def attention_and_mlp_modulation_exchanged(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = transformer.Modulation.forward

    def forward(self: transformer.Modulation, vec: Tensor) -> tuple[Tensor, ...]:
        parts = true(self, vec)
        return (*parts[3:], *parts[:3])

    patch.setattr(transformer.Modulation, "forward", forward)


@_in(TRANSFORMER)
def modulation_without_silu(patch: pytest.MonkeyPatch, scene: Any) -> None:
    def forward(self: transformer.Modulation, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(vec)[:, None].chunk(self.parts, dim=-1)

    patch.setattr(transformer.Modulation, "forward", forward)


@_in(TRANSFORMER)
def modulation_without_one_plus(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = transformer.modulate
    patch.setattr(transformer, "modulate", lambda x, shift, scale: true(x, shift, scale - 1))


@_in(TRANSFORMER)
def mlp_before_attention_in_linear2(patch: pytest.MonkeyPatch, scene: Any) -> None:
    width = scene.ours.spec.hidden_size
    for block in scene.ours.single_blocks:
        block.linear2.weight.data = block.linear2.weight.roll(-width, dims=1)


@_in(TRANSFORMER)
def relu_for_gelu(patch: pytest.MonkeyPatch, scene: Any) -> None:
    patch.setattr(F, "gelu", lambda x, approximate: F.relu(x))


@_in(SUBTLE)
def exact_gelu(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = F.gelu
    patch.setattr(F, "gelu", lambda x, approximate: true(x))


@_in(TRANSFORMER)
def streams_exchanged(patch: pytest.MonkeyPatch, scene: Any) -> None:
    for block in scene.ours.double_blocks:
        block.img_mlp, block.txt_mlp = block.txt_mlp, block.img_mlp


@_in(TRANSFORMER)
def blocks_in_reverse(patch: pytest.MonkeyPatch, scene: Any) -> None:
    scene.ours.single_blocks = scene.ours.single_blocks[::-1]


@_in(TRANSFORMER)
def qkv_bias_forgotten(patch: pytest.MonkeyPatch, scene: Any) -> None:
    for block in scene.ours.double_blocks:
        block.img_attn.qkv.bias.data = torch.zeros_like(block.img_attn.qkv.bias)


@_in(TRANSFORMER)
def attention_unscaled(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = F.scaled_dot_product_attention
    patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: true(q, k, v, scale=1.0))


# --- autoencoder: a scene has ours (Autoencoder), a picture x and a latent z -----------------------------------


@_in(AUTOENCODER)
def decoder_levels_exchanged(patch: pytest.MonkeyPatch, scene: Any) -> None:
    """Levels 2 and 3 have the same shapes in FLUX: a table that forgets the reversed order would load."""
    up = scene.ours.decoder.up
    up[2].block, up[3].block = up[3].block, up[2].block


@_in(AUTOENCODER)
def upsampling_exchanged(patch: pytest.MonkeyPatch, scene: Any) -> None:
    up = scene.ours.decoder.up
    up[2].upsample, up[3].upsample = up[3].upsample, up[2].upsample


@_in(AUTOENCODER)
def padded_on_all_sides(patch: pytest.MonkeyPatch, scene: Any) -> None:
    def forward(self: autoencoder.Downsample, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1)

    patch.setattr(autoencoder.Downsample, "forward", forward)


@_in(AUTOENCODER)
def upsampled_bilinearly(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = F.interpolate
    patch.setattr(F, "interpolate", lambda x, scale_factor, mode: true(x, None, scale_factor, "bilinear"))


@_in(AUTOENCODER)
def half_the_groups(patch: pytest.MonkeyPatch, scene: Any) -> None:
    for norm in (m for m in scene.ours.modules() if isinstance(m, torch.nn.GroupNorm)):
        norm.num_groups //= 2


@_in(AUTOENCODER)
def attention_queries_and_keys_exchanged(patch: pytest.MonkeyPatch, scene: Any) -> None:
    for half in (scene.ours.encoder, scene.ours.decoder):
        half.mid.attn_1.q, half.mid.attn_1.k = half.mid.attn_1.k, half.mid.attn_1.q


@_in(AUTOENCODER)
def latent_scaled_before_shift(patch: pytest.MonkeyPatch, scene: Any) -> None:
    def encode(x: Tensor) -> Tensor:
        return scene.ours.spec.scale_factor * scene.ours.moments(x)[0] - scene.ours.spec.shift_factor

    def decode(z: Tensor) -> Tensor:
        return scene.ours.decoder((z + scene.ours.spec.shift_factor) / scene.ours.spec.scale_factor)

    patch.setattr(scene.ours, "encode", encode)
    patch.setattr(scene.ours, "decode", decode)


@_in(AUTOENCODER)
def latent_not_normalised(patch: pytest.MonkeyPatch, scene: Any) -> None:
    patch.setattr(scene.ours, "encode", lambda x: scene.ours.moments(x)[0])
    patch.setattr(scene.ours, "decode", lambda z: scene.ours.decoder(z))


@_in(AUTOENCODER)
def shortcut_left_out(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = autoencoder.ResnetBlock.forward

    def forward(self: autoencoder.ResnetBlock, x: Tensor) -> Tensor:
        return true(self, x) - (0 if hasattr(self, "nin_shortcut") else x)

    patch.setattr(autoencoder.ResnetBlock, "forward", forward)


# --- schedule: patched code alone --------------------------------------------------------------------------------


@_in(SCHEDULE, JOURNEY)
def schedule_without_shift(patch: pytest.MonkeyPatch, scene: Any) -> None:
    patch.setattr(flow, "shift", lambda t, mu: t)


@_in(SCHEDULE, JOURNEY)
def schedule_shifted_the_other_way(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = flow.shift
    patch.setattr(flow, "shift", lambda t, mu: true(t, -mu))


@_in(SCHEDULE)
def shift_of_the_largest_picture_always(patch: pytest.MonkeyPatch, scene: Any) -> None:
    patch.setattr(flow, "shift_mu", lambda tokens: 1.15)


@_in(SCHEDULE)
def shift_by_latent_cells(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = flow.shift_mu
    patch.setattr(flow, "shift_mu", lambda tokens: true(4 * tokens))


@_in(SCHEDULE)
def shift_counts_a_reference(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = flow.shift_mu
    patch.setattr(flow, "shift_mu", lambda tokens: true(2 * tokens))


@_in(SCHEDULE)
def shift_without_exponential(patch: pytest.MonkeyPatch, scene: Any) -> None:
    patch.setattr(flow, "shift", lambda t, mu: mu * t / (1 + (mu - 1) * t))


# --- packing: patched code alone ---------------------------------------------------------------------------------


def _repack(patch: pytest.MonkeyPatch, tokens: str, token: str) -> None:
    """Another order of tokens or inside a token, in both directions."""
    cells, packed = "b c (h ph) (w pw)", f"b {tokens} {token}"

    def pack(z: Tensor) -> Tensor:
        return rearrange(z, f"{cells} -> {packed}", ph=2, pw=2)

    def unpack(x: Tensor, h: int, w: int) -> Tensor:
        return rearrange(x, f"{packed} -> {cells}", h=h // 2, w=w // 2, ph=2, pw=2)

    patch.setattr(shapes, "pack", pack)
    patch.setattr(shapes, "unpack", unpack)


@_in(PACKING)
def channels_innermost(patch: pytest.MonkeyPatch, scene: Any) -> None:
    _repack(patch, "(h w)", "(ph pw c)")


@_in(PACKING)
def columns_before_rows_in_a_token(patch: pytest.MonkeyPatch, scene: Any) -> None:
    _repack(patch, "(h w)", "(c pw ph)")


@_in(PACKING)
def tokens_by_column(patch: pytest.MonkeyPatch, scene: Any) -> None:
    _repack(patch, "(w h)", "(c ph pw)")


# --- journey: a scene has ours (Transformer) and trip (a Kontext journey) ------------------------------------------


@_in(JOURNEY)
def reference_token_index_0(patch: pytest.MonkeyPatch, scene: Any) -> None:
    patch.setattr(tiny, "image_ids", lambda h, w, index=0: shapes.image_ids(h, w))


@_in(JOURNEY)
def reference_left_out(patch: pytest.MonkeyPatch, scene: Any) -> None:
    scene.trip.reference = torch.zeros_like(scene.trip.reference)


@_in(JOURNEY)
def steps_backwards(patch: pytest.MonkeyPatch, scene: Any) -> None:
    true = transformer.LastLayer.forward
    patch.setattr(transformer.LastLayer, "forward", lambda *args: -true(*args))


@_in(JOURNEY)
def one_step_more(patch: pytest.MonkeyPatch, scene: Any) -> None:
    scene.trip.steps += 1


@_in(JOURNEY)
def guidance_of_one(patch: pytest.MonkeyPatch, scene: Any) -> None:
    scene.trip.guidance = 1.0
