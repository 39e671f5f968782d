"""The least time of a step: counted operations over the rates that this machine reaches at the model's own shapes.

Multiply-adds count as two operations. Norms, rotations and other work between the products are left out: they bound
nothing that fusing cannot hide. So is modulation, which an executor may compute before the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fluxloom.bench.results import Row
from fluxloom.bench.subject import SEED
from fluxloom.bench.timing import measure
from fluxloom.core.specs import TransformerSpec
from fluxloom.speed.attention import BACKENDS

_SINUSOID = 256  # numbers that a time or a guidance value is embedded from
HEAT = 0.5  # seconds of the same work, after which a rate is one that a GPU holds
_COPY = {"cuda": 1 << 32, "cpu": 1 << 28}  # bytes; many times what any cache holds
_FP8 = (8, 9)  # the least compute capability with matrix products in 8-bit floats
_ROTATE = 8  # sets of operands that are used in turns: the same ones over and over would be found in the cache


# --------------------------------------------------------------------------------------------------------- counting


@dataclass(frozen=True)
class Product:
    """A linear layer as it occurs: [rows, inputs] times [inputs, outputs], ``count`` times a step."""

    name: str
    rows: int
    inputs: int
    outputs: int
    count: int

    @property
    def flop(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs * self.count


def products(spec: TransformerSpec, text: int, image: int, batch: int = 1) -> list[Product]:
    """The linear layers of the blocks, of ``text`` and ``image`` tokens (references among them)."""
    d, m = spec.hidden_size, spec.mlp_hidden
    found = []
    for side, length in (("image", image), ("text", text)):
        rows, n = batch * length, spec.depth
        found += [
            Product(f"double {side} qkv", rows, d, 3 * d, n),
            Product(f"double {side} proj", rows, d, d, n),
            Product(f"double {side} mlp up", rows, d, m, n),
            Product(f"double {side} mlp down", rows, m, d, n),
        ]
    rows, n = batch * (text + image), spec.depth_single_blocks
    found += [
        Product("single linear1", rows, d, 3 * d + m, n),
        Product("single linear2", rows, d + m, d, n),
    ]
    return [one for one in found if one.count]


@dataclass(frozen=True)
class Count:
    """Floating-point operations of one step, by what they are."""

    double_image: int
    double_text: int
    single: int
    attention: int
    modulation: int
    ends: int  # layers into and out of the width: image, text, time, guidance, pooled text, last

    @property
    def linears(self) -> int:
        """Of the blocks: what 8 bits may speed up."""
        return self.double_image + self.double_text + self.single

    @property
    def total(self) -> int:
        return self.linears + self.attention + self.modulation + self.ends

    def facts(self) -> dict[str, float]:
        """In TFLOP."""
        names = ("double_image", "double_text", "single", "attention", "modulation", "ends", "total")
        return {name: round(getattr(self, name) / 1e12, 6) for name in names}


def count(spec: TransformerSpec, text: int, image: int, batch: int = 1) -> Count:
    """Operations of one forward pass of the whole network for ``batch`` pictures."""
    d, blocks = spec.hidden_size, spec.depth + spec.depth_single_blocks
    layers = products(spec, text, image, batch)
    parts = {kind: sum(p.flop for p in layers if p.name.startswith(kind)) for kind in ("double im", "double te", "sin")}
    vectors = 2 * batch * d * d
    embedders = (1 + spec.guidance_embed) * (_SINUSOID + d) + spec.vec_in_dim + d
    return Count(
        double_image=parts["double im"],
        double_text=parts["double te"],
        single=parts["sin"],
        attention=4 * batch * (text + image) ** 2 * d * blocks,  # queries with keys, weights with values
        modulation=vectors * (12 * spec.depth + 3 * spec.depth_single_blocks),
        ends=2 * batch * d * (image * (spec.in_channels + spec.out_channels) + text * spec.context_in_dim + embedders)
        + 2 * vectors,  # the last layer's shift and scale
    )


# --------------------------------------------------------------------------------------------------------- ceilings


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches. Products and attention in TFLOP/s by form and backend; ``layers`` says how long each
    product takes in each form, in milliseconds; copies in GB/s, bytes read and bytes written."""

    products: dict[str, float]
    attention: dict[str, float]
    copies: float
    layers: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        return {
            "products_tflops": {name: float(f"{rate:.5g}") for name, rate in self.products.items()},
            "attention_tflops": {name: float(f"{rate:.5g}") for name, rate in self.attention.items()},
            "copies_gb_s": float(f"{self.copies:.5g}"),
            "layers": self.layers,
            "missing": self.missing,
        }


def ceilings(
    spec: TransformerSpec,
    text: int,
    image: int,
    batch: int,
    device: torch.device,
    told: Callable[[str], object] = lambda _: None,
    repeats: int = 10,
    heat: float = 0.0,
) -> Ceilings:
    """Measure the rates at one model's shapes, with random numbers; what cannot run here is named with its reason.

    ``heat``: seconds of the same work before each, after which a GPU at its power limit has lowered its clock; without,
    the rates are those of short runs, which no whole step holds.
    """
    forms, missing = _forms(device)
    layers, best = [], dict.fromkeys(forms, 0.0)
    for one in products(spec, text, image, batch):
        row: dict[str, Any] = {"name": one.name, "shape": [one.rows, one.inputs, one.outputs], "count": one.count}
        for form, make in forms.items():
            ms = measure(make(one, device), device, 2, repeats, heat).median
            rate = one.flop / one.count / ms / 1e9
            row |= {f"{form}_ms": round(ms, 4), f"{form}_tflops": round(rate, 1)}
            best[form] = max(best[form], rate)
        layers.append(row)
        told(f"{one.name} {row}")
    attention, lacks = _attention(spec, text + image, batch, device, repeats, heat)
    told(f"attention {attention}")
    return Ceilings(best, attention, _copies(device, repeats), layers, missing | lacks)


def _forms(device: torch.device) -> tuple[dict[str, Callable[..., Callable[[], object]]], dict[str, str]]:
    """How to multiply in each form, and why not in the others."""
    forms: dict[str, Callable[..., Callable[[], object]]] = {"bfloat16": partial(_product, dtype=torch.bfloat16)}
    if device.type != "cuda":
        return {"float32": partial(_product, dtype=torch.float32), **forms}, {"fp8": "needs a GPU"}
    if torch.cuda.get_device_capability(device) >= _FP8:
        return {**forms, "fp8": _product8}, {}
    return forms, {"fp8": "needs a GPU of compute capability 8.9 or more"}


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(SEED)
    return torch.randn(shape, device=device, dtype=dtype, generator=generator)


def _product(one: Product, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    x = _random(one.rows, one.inputs, device=device, dtype=dtype)
    weights = [_random(one.outputs, one.inputs, device=device, dtype=dtype) for _ in range(_sets(device))]
    return _in_turns([partial(torch.nn.functional.linear, x, weight) for weight in weights])


def _product8(one: Product, device: torch.device) -> Callable[[], object]:
    """Row by row scaled e4m3, as :mod:`fluxloom.speed.linear8` multiplies."""
    x, *weights = (
        _random(rows, one.inputs, device=device, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
        for rows in (one.rows, *[one.outputs] * _sets(device))
    )
    scales = torch.ones(one.rows, 1, device=device), torch.ones(1, one.outputs, device=device)
    calls = [
        partial(torch._scaled_mm, x, weight.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16,
                use_fast_accum=True)
        for weight in weights
    ]  # fmt: skip
    return _in_turns(calls)


def _sets(device: torch.device) -> int:
    return _ROTATE if device.type == "cuda" else 1


def _in_turns(calls: list[Any]) -> Callable[[], object]:
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        return calls[turn]()

    return call


def _attention(
    spec: TransformerSpec, length: int, batch: int, device: torch.device, repeats: int, heat: float
) -> tuple[dict[str, float], dict[str, str]]:
    """The rates of every backend at [batch, length, heads, head], and why others have none."""
    rates, missing = {}, {}
    flop = 4 * batch * length**2 * spec.hidden_size
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        shape = (batch, length, spec.num_heads, spec.head_dim)
        q, k, v = (_random(*shape, device=device, dtype=dtype) for _ in range(3))
        for backend in BACKENDS:
            name = backend.name if len(dtypes) == 1 else f"{backend.name} {str(dtype).removeprefix('torch.')}"
            why = backend.refuses(q, spec.head_dim) or _too_slow(backend.name, length)
            if why is None:
                try:
                    ms = measure(partial(backend, q, k, v), device, 2, repeats, heat).median
                    rates[name] = flop / ms / 1e9
                except Exception as fault:  # a library that is there and does not run is no reason to stop
                    why = f"{type(fault).__name__}: {fault}".splitlines()[0]
            if why is not None:
                missing[f"attention {name}"] = why
    return rates, missing


def _too_slow(name: str, length: int) -> str | None:
    return "holds all weights at once: left out over 2048 tokens" if name == "math" and length > 2048 else None


def _copies(device: torch.device, repeats: int) -> float:
    a = torch.empty(_COPY[device.type] // 4, device=device, dtype=torch.float32).normal_()
    b = torch.empty_like(a)
    return 2 * a.nbytes / measure(lambda: b.copy_(a), device, 2, repeats).median / 1e6


# -------------------------------------------------------------------------------------------------------- the floor


def floors(counted: Count, found: Ceilings) -> dict[str, float]:
    """Milliseconds of a step by the form of its linears: what is counted over the best rates.

    Attention that rounds its inputs ("+fa3-fp8") has a floor of its own.
    """
    exact = {name: rate for name, rate in found.attention.items() if not _rounds(name)}
    out = {}
    for form, rate in found.products.items():
        fits = _of_form(exact, form) or exact
        rest = counted.attention / max(fits.values())
        ends = counted.ends / found.products.get("bfloat16" if form == "fp8" else form, rate)
        out[form] = (counted.linears / rate + rest + ends) / 1e9
        for name in set(found.attention) - set(exact):
            if form == "fp8":
                out[f"fp8+{name}"] = out[form] + (counted.attention / found.attention[name] - rest) / 1e9
    return {name: round(ms, 3) for name, ms in out.items()}


def reached(counted: Count, measured: Callable[..., Ceilings], device: torch.device) -> Row:
    """What is counted, with the ceilings and floors of short runs and of those that are held for longer: ``measured``
    without a heat, and with :data:`HEAT`; on a processor both are the same."""
    short = measured()
    held = measured(heat=HEAT) if device.type == "cuda" else short
    return {
        "tflop": counted.facts(),
        "ceilings": short.facts(),
        "floor_ms": floors(counted, short),
        "held": held.facts(),
        "held_floor_ms": floors(counted, held),
    }


def _rounds(name: str) -> bool:
    return any(backend.lossy for backend in BACKENDS if backend.name == name)


def _of_form(rates: dict[str, float], form: str) -> dict[str, float]:
    return {name: rate for name, rate in rates.items() if name.endswith(f" {form}")}


def layers_ms(found: Ceilings, form: str) -> float:
    """How long the linears of a step take one by one, at their own shapes rather than at the best rate."""
    return float(sum(row[f"{form}_ms"] * row["count"] for row in found.layers))


def floor_of(way: Iterable[str], floor: dict[str, float], dtype: str) -> float | None:
    """The floor that a way is to be compared with, of its words."""
    words = set(way)
    if "fa3-fp8" in words and "fp8+fa3-fp8" in floor:
        return floor["fp8+fa3-fp8"]
    return floor.get("fp8" if "fp8" in words else dtype)


def beside(row: Row, least: float | None) -> Row:
    """A row of a step with its floor, and how many times that it took."""
    if least and "ms" in row:
        row |= {"floor_ms": least, "times_floor": round(row["ms"] / least, 4)}
    return row
