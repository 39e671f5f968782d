"""Names, kinds and shapes of published files, written down from their documentation and not from our own tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fluxloom.weights.checkpoint import Checkpoint
from fluxloom.weights.stored import Raw, fold

Shape = tuple[int, ...]
Table = dict[str, tuple[str, Shape]]  # name: (kind, shape)
W, MLP = 3072, 12_288


def _linear(name: str, rows: int, columns: int) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def official(channels: int = 64, guidance: bool = True) -> dict[str, Shape]:
    out = _linear("img_in", W, channels) | _linear("txt_in", W, 4096)
    for name, columns in {"time_in": 256, "vector_in": 768, **({"guidance_in": 256} if guidance else {})}.items():
        out |= _linear(f"{name}.in_layer", W, columns) | _linear(f"{name}.out_layer", W, W)
    for i in range(19):
        for stream in ("img", "txt"):
            at = f"double_blocks.{i}.{stream}"
            out |= _linear(f"{at}_mod.lin", 18_432, W) | _linear(f"{at}_attn.qkv", 9216, W)
            out |= {f"{at}_attn.norm.{kind}_norm.scale": (128,) for kind in ("query", "key")}
            out |= _linear(f"{at}_attn.proj", W, W) | _linear(f"{at}_mlp.0", MLP, W) | _linear(f"{at}_mlp.2", W, MLP)
    for i in range(38):
        at = f"single_blocks.{i}"
        out |= _linear(f"{at}.linear1", 21_504, W) | _linear(f"{at}.linear2", W, 15_360)
        out |= {f"{at}.norm.{kind}_norm.scale": (128,) for kind in ("query", "key")}
        out |= _linear(f"{at}.modulation.lin", 9216, W)
    return out | _linear("final_layer.linear", 64, W) | _linear("final_layer.adaLN_modulation.1", 6144, W)


def diffusers(channels: int = 64, guidance: bool = True) -> dict[str, Shape]:
    out = _linear("x_embedder", W, channels) | _linear("context_embedder", W, 4096)
    embedders = {"timestep": 256, "text": 768, **({"guidance": 256} if guidance else {})}
    for name, columns in embedders.items():
        at = f"time_text_embed.{name}_embedder.linear"
        out |= _linear(f"{at}_1", W, columns) | _linear(f"{at}_2", W, W)
    for i in range(19):
        at = f"transformer_blocks.{i}"
        out |= _linear(f"{at}.norm1.linear", 18_432, W) | _linear(f"{at}.norm1_context.linear", 18_432, W)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
            out |= _linear(f"{at}.attn.{name}", W, W)
        out |= {f"{at}.attn.norm_{name}.weight": (128,) for name in ("q", "k", "added_q", "added_k")}
        for name in ("ff", "ff_context"):
            out |= _linear(f"{at}.{name}.net.0.proj", MLP, W) | _linear(f"{at}.{name}.net.2", W, MLP)
    for i in range(38):
        at = f"single_transformer_blocks.{i}"
        out |= _linear(f"{at}.norm.linear", 9216, W) | _linear(f"{at}.proj_mlp", MLP, W)
        for name in ("to_q", "to_k", "to_v"):
            out |= _linear(f"{at}.attn.{name}", W, W)
        out |= {f"{at}.attn.norm_{name}.weight": (128,) for name in ("q", "k")}
        out |= _linear(f"{at}.proj_out", W, 15_360)
    return out | _linear("proj_out", 64, W) | _linear("norm_out.linear", 6144, W)


def _conv(name: str, rows: int, columns: int, side: int = 3) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns, side, side), f"{name}.bias": (rows,)}


def _resnet(name: str, before: int, after: int) -> dict[str, Shape]:
    out = {f"{name}.norm1.{kind}": (before,) for kind in ("weight", "bias")}
    out |= {f"{name}.norm2.{kind}": (after,) for kind in ("weight", "bias")}
    out |= _conv(f"{name}.conv1", after, before) | _conv(f"{name}.conv2", after, after)
    return out | (_conv(f"{name}.nin_shortcut", after, before, 1) if before != after else {})


def autoencoder() -> dict[str, Shape]:
    """ae.safetensors."""
    out: dict[str, Shape] = {}
    widths = (128, 256, 512, 512)
    for half in ("encoder", "decoder"):
        for name in ("block_1", "block_2"):
            out |= _resnet(f"{half}.mid.{name}", 512, 512)
        out |= {f"{half}.mid.attn_1.norm.{kind}": (512,) for kind in ("weight", "bias")}
        for name in ("q", "k", "v", "proj_out"):
            out |= _conv(f"{half}.mid.attn_1.{name}", 512, 512, 1)
        out |= {f"{half}.norm_out.{k}": (512 if half == "encoder" else 128,) for k in ("weight", "bias")}
    for i, (before, after) in enumerate(zip((128, 128, 256, 512), widths, strict=True)):
        for j in range(2):
            out |= _resnet(f"encoder.down.{i}.block.{j}", before if j == 0 else after, after)
        out |= _conv(f"encoder.down.{i}.downsample.conv", after, after) if i < 3 else {}
    for i, (before, after) in enumerate(zip((256, 512, 512, 512), widths, strict=True)):
        for j in range(3):
            out |= _resnet(f"decoder.up.{i}.block.{j}", before if j == 0 else after, after)
        out |= _conv(f"decoder.up.{i}.upsample.conv", after, after) if i > 0 else {}
    out |= _conv("encoder.conv_in", 128, 3) | _conv("encoder.conv_out", 32, 512)
    return out | _conv("decoder.conv_in", 512, 16) | _conv("decoder.conv_out", 3, 128)


def clip() -> dict[str, Shape]:
    out: dict[str, Shape] = {
        "text_model.embeddings.token_embedding.weight": (49_408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
        "text_model.final_layer_norm.weight": (768,),
        "text_model.final_layer_norm.bias": (768,),
    }
    for i in range(12):
        at = f"text_model.encoder.layers.{i}"
        for name in ("q", "k", "v", "out"):
            out |= _linear(f"{at}.self_attn.{name}_proj", 768, 768)
        out |= {f"{at}.layer_norm{n}.{kind}": (768,) for n in (1, 2) for kind in ("weight", "bias")}
        out |= _linear(f"{at}.mlp.fc1", 3072, 768) | _linear(f"{at}.mlp.fc2", 768, 3072)
    return out


def t5() -> dict[str, Shape]:
    out: dict[str, Shape] = {"shared.weight": (32_128, 4096), "encoder.final_layer_norm.weight": (4096,)}
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    out[first] = (32, 64)
    for i in range(24):
        at = f"encoder.block.{i}.layer"
        out |= {f"{at}.0.SelfAttention.{name}.weight": (4096, 4096) for name in "qkvo"}
        out |= {f"{at}.{n}.layer_norm.weight": (4096,) for n in (0, 1)}
        out |= {f"{at}.1.DenseReluDense.wi_{n}.weight": (10_240, 4096) for n in (0, 1)}
        out[f"{at}.1.DenseReluDense.wo.weight"] = (4096, 10_240)
    return out


def t5_llama() -> dict[str, Shape]:
    """The same encoder in a GGUF file."""
    out: dict[str, Shape] = {"token_embd.weight": (32_128, 4096), "enc.output_norm.weight": (4096,)}
    out["enc.blk.0.attn_rel_b.weight"] = (32, 64)
    for i in range(24):
        at = f"enc.blk.{i}"
        out |= {f"{at}.attn_{name}.weight": (4096, 4096) for name in "qkvo"}
        out |= {f"{at}.{name}_norm.weight": (4096,) for name in ("attn", "ffn")}
        out |= {f"{at}.ffn_{name}.weight": (10_240, 4096) for name in ("gate", "up")}
        out[f"{at}.ffn_down.weight"] = (4096, 10_240)
    return out


def redux() -> dict[str, Shape]:
    return _linear("redux_up", 12_288, 1152) | _linear("redux_down", 4096, 12_288)


# ---------------------------------------------------------------------------------------------- containers

FULL_PRECISION = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer", "enc.blk.0.attn_rel_b")


def _quantisable(name: str, shape: Shape) -> bool:
    return len(shape) == 2 and not name.removeprefix(ALL_IN_ONE).startswith(FULL_PRECISION)


def stored(shapes: Mapping[str, Shape], kind: str = "BF16") -> Table:
    return {name: (kind, shape) for name, shape in shapes.items()}


ALL_IN_ONE = "model.diffusion_model."


def all_in_one() -> Table:
    """As ComfyUI saves a checkpoint: fp8 transformer and T5 beside the rest."""
    parts: dict[str, tuple[dict[str, Shape], str]] = {
        ALL_IN_ONE: (official(), "F8_E4M3"),
        "text_encoders.clip_l.transformer.": (clip() | {"text_projection.weight": (768, 768)}, "F16"),
        "text_encoders.t5xxl.transformer.": (t5() | {"encoder.embed_tokens.weight": (32_128, 4096)}, "F8_E4M3"),
        "vae.": (autoencoder(), "F32"),
    }
    out = {f"{prefix}{name}": (kind, shape) for prefix, (t, kind) in parts.items() for name, shape in t.items()}
    return out | {"text_encoders.clip_l.logit_scale": ("F32", ()), "text_encoders.t5xxl.logit_scale": ("F32", ())}


def scaled_fp8(shapes: Mapping[str, Shape], prefix: str = "") -> Table:
    out: Table = {f"{prefix}scaled_fp8": ("F8_E4M3", (0,))}
    for name, shape in shapes.items():
        layer, weight = name.removesuffix(".weight"), len(shape) == 2 and name.endswith(".weight")
        out[prefix + name] = ("F8_E4M3" if weight else "BF16", shape)
        out |= {f"{prefix}{layer}.{k}": ("F32", ()) for k in ("scale_weight", "scale_input")} if weight else {}
    return out


def gguf_mix(shapes: Mapping[str, Shape], kind: str = "Q4_K", better: str = "Q5_K") -> Table:
    """A *_K_M mix: fused qkv one type higher, small and outer tensors in float32."""
    return {
        name: (("F32" if not _quantisable(name, s) else better if ".qkv." in name else kind), s)
        for name, s in shapes.items()
    }


_STATES: dict[str, bytes] = {}


def nf4(shapes: Mapping[str, Shape], prefix: str = "") -> Table:
    """bitsandbytes' double quantisation of every matrix."""
    out: Table = {}
    for name, shape in shapes.items():
        if len(shape) != 2:
            out[prefix + name] = ("BF16", shape)
            continue
        at, blocks = prefix + name, prod(shape) // 64
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
        _STATES[f"{at}.quant_state.bitsandbytes__nf4"] = text = json.dumps(state).encode()
        out |= {
            at: ("U8", (prod(shape) // 2, 1)),
            f"{at}.absmax": ("U8", (blocks,)),
            f"{at}.quant_map": ("F32", (16,)),
            f"{at}.nested_absmax": ("F32", (-(-blocks // 256),)),
            f"{at}.nested_quant_map": ("F32", (256,)),
            f"{at}.quant_state.bitsandbytes__nf4": ("U8", (len(text),)),
        }
    return out


def checkpoint(table: Table, metadata: Mapping[str, str] | None = None, file: str | None = None) -> Checkpoint:
    """A checkpoint of such a table; its tensors cannot be read, but for the small ones that say what is stored."""

    def raw(name: str, kind: str, shape: Shape) -> Raw:
        def load() -> Tensor:
            return torch.tensor(list(_STATES[name]), dtype=torch.uint8)

        return Raw(kind, shape, load)

    raws = {name: raw(name, kind, shape) for name, (kind, shape) in table.items()}
    return Checkpoint(fold(raws, metadata or {}), (Path(file),) if file else (), metadata or {})
