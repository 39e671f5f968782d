"""LoRA files of every dialect, written from one set of factors by the formats' definitions, without our tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxloom.core.specs import TransformerSpec

# One layer of each kind: (official name with {i}, diffusers names in the order of its rows).
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}


@dataclass(frozen=True)
class Layer:
    """An official linear layer: its parts are (diffusers name, rows)."""

    official: str
    parts: tuple[tuple[str, int], ...]
    columns: int

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.parts)


def layers(spec: TransformerSpec, *, ends: bool = True, single: bool = True, control: bool = False) -> list[Layer]:
    """Every linear layer, by the facts' table of shapes. ``control``: with the first layer twice as wide."""
    d, m = spec.hidden_size, spec.mlp_hidden
    out = []
    for i in range(spec.depth):
        for ours, theirs in DOUBLE.items():
            kind = ours.partition("_")[2]
            rows = {"mod.lin": 6 * d, "attn.qkv": 3 * d, "attn.proj": d, "mlp.0": m, "mlp.2": d}[kind]
            names = tuple((f"transformer_blocks.{i}.{name}", rows // len(theirs)) for name in theirs)
            out.append(Layer(f"double_blocks.{i}.{ours}", names, m if kind == "mlp.2" else d))
    for i in range(spec.depth_single_blocks if single else 0):
        for ours, theirs in SINGLE.items():
            cut = {"modulation.lin": (3 * d,), "linear1": (d, d, d, m), "linear2": (d,)}[ours]
            names = tuple((f"single_transformer_blocks.{i}.{name}", n) for name, n in zip(theirs, cut, strict=True))
            out.append(Layer(f"single_blocks.{i}.{ours}", names, d + m if ours == "linear2" else d))
    columns = {
        "img_in": spec.in_channels * (2 if control else 1),
        "txt_in": spec.context_in_dim,
        "time_in.in_layer": 256,
        "vector_in.in_layer": spec.vec_in_dim,
        "guidance_in.in_layer": 256,
    }
    rows = {"final_layer.linear": spec.out_channels, "final_layer.adaLN_modulation.1": 2 * d}
    for ours, theirs in ENDS.items() if ends else ():
        if spec.guidance_embed or not ours.startswith("guidance"):
            out.append(Layer(ours, ((theirs[0], rows.get(ours, d)),), columns.get(ours, d)))
    return out


@dataclass
class Made:
    """A file, and by definition what it adds to each official weight."""

    state: dict[str, Tensor]
    deltas: dict[str, Tensor]
    metadata: dict[str, str]


class Numbers:
    """Where factors come from: random ones, or none at all for tables of names and shapes at full size."""

    def __init__(self, seed: int | None) -> None:
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        if self.generator is None:
            return torch.ones(()).expand(shape)
        return 0.3 * torch.randn(shape, generator=self.generator)


def _swapped(delta: Tensor) -> Tensor:
    """diffusers' (scale, shift) as the official (shift, scale)."""
    half = delta.shape[0] // 2
    return torch.cat((delta[half:], delta[:half]))


def fused(
    of: list[Layer], write: Callable[[Layer, Tensor, Tensor, float], dict[str, Tensor]], numbers: Numbers, alpha: float
) -> Made:
    """A low-rank update of every official layer; alpha 0 stands for files that keep none."""
    made = Made({}, {}, {})
    for layer in of:
        a, b = numbers(4, layer.columns), numbers(layer.rows, 4)
        made.state |= write(layer, a, b, alpha)
        if numbers.generator:
            made.deltas[f"{layer.official}.weight"] = (alpha / 4 if alpha else 1.0) * b @ a
    return made


def split(
    of: list[Layer],
    write: Callable[[Layer, int, Tensor, Tensor, float], dict[str, Tensor]],
    numbers: Numbers,
    alphas: Callable[[int], float],
    *,
    swap: bool = True,
) -> Made:
    """An update of every part of every layer, each of its own rank and alpha."""
    made = Made({}, {}, {})
    for layer in of:
        deltas = []
        for i, (_, rows) in enumerate(layer.parts):
            rank, alpha = 2 + i, alphas(i)
            a, b = numbers(rank, layer.columns), numbers(rows, rank)
            made.state |= write(layer, i, a, b, alpha)
            if numbers.generator:
                deltas.append((alpha / rank if alpha else 1.0) * b @ a)
        if deltas:
            whole = torch.cat(deltas)
            last = swap and layer.official.startswith("final_layer.adaLN")
            made.deltas[f"{layer.official}.weight"] = _swapped(whole) if last else whole
    return made


def _kohya(name: str) -> Callable[[Tensor, Tensor, float], dict[str, Tensor]]:
    return lambda a, b, alpha: {
        f"{name}.lora_down.weight": a,
        f"{name}.lora_up.weight": b,
        f"{name}.alpha": torch.tensor(alpha),
    }


def _peft(name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def diffusers(spec: TransformerSpec, seed: int | None) -> Made:
    def write(layer: Layer, i: int, a: Tensor, b: Tensor, alpha: float) -> dict[str, Tensor]:
        return _peft(f"transformer.{layer.parts[i][0]}", a, b)

    return split(layers(spec), write, Numbers(seed), lambda i: 0)


def ai_toolkit(spec: TransformerSpec, seed: int | None) -> Made:
    def write(layer: Layer, i: int, a: Tensor, b: Tensor, alpha: float) -> dict[str, Tensor]:
        return _peft(f"transformer.{layer.parts[i][0]}", a.half(), b.half())

    made = split(layers(spec, ends=False), write, Numbers(seed), lambda i: 0)
    made.metadata = {"software": '{"name": "ai-toolkit", "version": "0.5"}', "format": "pt"}
    return made


def kohya(spec: TransformerSpec, seed: int | None) -> Made:
    def write(layer: Layer, a: Tensor, b: Tensor, alpha: float) -> dict[str, Tensor]:
        return _kohya("lora_unet_" + layer.official.replace(".", "_"))(a, b, alpha)

    made = fused(layers(spec), write, Numbers(seed), alpha=1.0)
    made.metadata = {"ss_network_dim": "4", "ss_base_model_version": "flux1"}
    return made


def official(spec: TransformerSpec, seed: int | None) -> Made:
    def write(layer: Layer, a: Tensor, b: Tensor, alpha: float) -> dict[str, Tensor]:
        return _peft(f"diffusion_model.{layer.official}", a, b)

    return fused(layers(spec), write, Numbers(seed), alpha=0)


def fal(spec: TransformerSpec, seed: int | None) -> Made:
    def write(layer: Layer, a: Tensor, b: Tensor, alpha: float) -> dict[str, Tensor]:
        return _peft(f"base_model.model.{layer.official}", a, b)

    of = [layer for layer in layers(spec) if layer.official.startswith(("double", "single", "final"))]
    return fused(of, write, Numbers(seed), alpha=0)


def onetrainer(spec: TransformerSpec, seed: int | None) -> Made:
    def write(layer: Layer, i: int, a: Tensor, b: Tensor, alpha: float) -> dict[str, Tensor]:
        return _kohya("lora_transformer_" + layer.parts[i][0].replace(".", "_"))(a, b, alpha)

    return split(layers(spec), write, Numbers(seed), lambda i: 1.0 + i)


def onetrainer_split(spec: TransformerSpec, seed: int | None) -> Made:
    def write(layer: Layer, i: int, a: Tensor, b: Tensor, alpha: float) -> dict[str, Tensor]:
        part = f".{i}" if len(layer.parts) > 1 else ""
        return _kohya(f"transformer.{layer.official}{part}")(a, b, alpha)

    return split(layers(spec), write, Numbers(seed), lambda i: 1.0 + i, swap=False)


def xlabs(spec: TransformerSpec, seed: int | None) -> Made:
    numbers, made = Numbers(seed), Made({}, {}, {})
    d = spec.hidden_size
    names = {
        "double_blocks": {
            "qkv_lora1": ("img_attn.qkv", 3 * d, d),
            "proj_lora1": ("img_attn.proj", d, d),
            "qkv_lora2": ("txt_attn.qkv", 3 * d, d),
            "proj_lora2": ("txt_attn.proj", d, d),
        },
        "single_blocks": {"qkv_lora": ("linear1", 3 * d, d), "proj_lora": ("linear2", d, d + spec.mlp_hidden)},
    }
    for blocks, count in (("double_blocks", spec.depth), ("single_blocks", spec.depth_single_blocks)):
        for i in range(count):
            for theirs, (ours, rows, columns) in names[blocks].items():
                a, b = numbers(4, columns), numbers(rows, 4)
                made.state[f"{blocks}.{i}.processor.{theirs}.down.weight"] = a
                made.state[f"{blocks}.{i}.processor.{theirs}.up.weight"] = b
                if numbers.generator:
                    rest = spec.mlp_hidden if ours == "linear1" else 0
                    made.deltas[f"{blocks}.{i}.{ours}.weight"] = torch.cat((b @ a, torch.zeros(rest, columns)))
    return made


def norms(spec: TransformerSpec) -> Iterator[str]:
    for i in range(spec.depth):
        for stream in ("img", "txt"):
            yield from (f"double_blocks.{i}.{stream}_attn.norm.{kind}_norm.scale" for kind in ("query", "key"))
    for i in range(spec.depth_single_blocks):
        yield from (f"single_blocks.{i}.norm.{kind}_norm.scale" for kind in ("query", "key"))


def control(spec: TransformerSpec, seed: int | None, rank: int = 128) -> Made:
    """The official control LoRA: every layer, biases, norm scales, and a first layer of twice the channels."""
    numbers, made = Numbers(seed), Made({}, {}, {})
    for layer in layers(spec, control=True):
        r = min(rank, layer.rows, layer.columns)
        a, b, bias = numbers(r, layer.columns), numbers(layer.rows, r), numbers(layer.rows)
        made.state |= _peft(layer.official, a, b) | {f"{layer.official}.lora_B.bias": bias}
        if numbers.generator:
            made.deltas |= {f"{layer.official}.weight": b @ a, f"{layer.official}.bias": bias}
    for name in norms(spec):
        made.state[name] = 1 + numbers(spec.head_dim) if numbers.generator else numbers(spec.head_dim)
    return made


def _factor(n: int) -> int:
    """The larger of two factors of n that are near its root, a power of two."""
    return next(f for f in (16, 8, 4, 2, 1) if n % f == 0)


def lycoris(spec: TransformerSpec, seed: int | None) -> Made:
    """LoKr of every part: one factor whole, the other a product of rank 2 with alpha 1."""
    numbers, made = Numbers(seed), Made({}, {}, {})
    for layer in layers(spec, ends=False):
        deltas = []
        for name, rows in layer.parts:
            path = "lycoris_" + name.replace(".", "_")
            o, i = _factor(rows), _factor(layer.columns)
            w1, a, b = numbers(o, i), numbers(rows // o, 2), numbers(2, layer.columns // i)
            made.state |= {f"{path}.lokr_w1": w1, f"{path}.lokr_w2_a": a, f"{path}.lokr_w2_b": b}
            made.state[f"{path}.alpha"] = torch.tensor(1.0)
            if numbers.generator:
                deltas.append(0.5 * torch.kron(w1, a @ b))
        if deltas:
            made.deltas[f"{layer.official}.weight"] = torch.cat(deltas)
    return made


MAKERS: dict[str, Callable[[TransformerSpec, int | None], Made]] = {
    "diffusers": diffusers,
    "kohya": kohya,
    "ai-toolkit": ai_toolkit,
    "official": official,
    "onetrainer": onetrainer,
    "onetrainer-split": onetrainer_split,
    "xlabs": xlabs,
    "control": control,
    "fal": fal,
    "lycoris": lycoris,
}


def _draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: 0.3 * torch.randn(shape, generator=generator)


def dora(spec: TransformerSpec, axis: str) -> dict[str, Tensor]:
    """Magnitudes by row or column, of whole layers and of the parts of fused ones."""
    new, state, d = _draw(3), {}, spec.hidden_size
    for path, rows in (
        ("transformer.transformer_blocks.0.attn.to_q", d),
        ("transformer.transformer_blocks.0.attn.to_v", d),
        ("transformer.single_transformer_blocks.1.proj_mlp", spec.mlp_hidden),
        ("transformer.norm_out.linear", 2 * d),
    ):
        state |= {f"{path}.lora_A.weight": new(4, d), f"{path}.lora_B.weight": new(rows, 4)}
        if axis == "rows":
            state[f"{path}.lora_magnitude_vector"] = 1 + new(rows)
        else:
            state[f"{path}.dora_scale"] = 1 + new(1, d)
    return state


def loha(spec: TransformerSpec) -> dict[str, Tensor]:
    new, path, d = _draw(4), "lycoris_single_transformer_blocks_0_proj_out", spec.hidden_size
    columns = d + spec.mlp_hidden
    sizes = {"hada_w1_a": (d, 3), "hada_w1_b": (3, columns), "hada_w2_a": (d, 3), "hada_w2_b": (3, columns)}
    return {f"{path}.{name}": new(*shape) for name, shape in sizes.items()} | {f"{path}.alpha": torch.tensor(6.0)}


def differences(spec: TransformerSpec) -> dict[str, Tensor]:
    """Full differences of weights, biases and norms, and a weight in the place of another."""
    new, d, m = _draw(5), spec.hidden_size, spec.mlp_hidden
    return {
        "diffusion_model.double_blocks.1.img_mlp.0.diff": new(m, d),
        "diffusion_model.double_blocks.1.img_mlp.0.diff_b": new(m),
        "diffusion_model.txt_in.diff_b": new(d),
        "diffusion_model.single_blocks.0.norm.query_norm.diff": new(spec.head_dim),
        "diffusion_model.single_blocks.1.norm.key_norm.w_norm": new(spec.head_dim),
        "diffusion_model.single_blocks.1.modulation.lin.set_weight": new(3 * d, d),
    }


def others(spec: TransformerSpec) -> dict[str, dict[str, Tensor]]:
    """What is no dialect of its own: it comes with all of them."""
    return {
        "dora rows": dora(spec, "rows"),
        "dora columns": dora(spec, "columns"),
        "loha": loha(spec),
        "diff": differences(spec),
    }
