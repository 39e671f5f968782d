"""Each fused kernel by itself at the shapes of 12 B: microseconds, bytes a second, its twin beside it; and several ways
to do the activation of a single block.

    python bench/kernels.py --out bench/results/DATE-kernels.json        # on a GPU; --toy: on a processor, twins only
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxloom.bench.timing import measure
from fluxloom.speed import twins
from fluxloom.speed.ops import ops_for

WIDTH, HEADS, MLP, TEXT = 3072, 24, 12288, 512
Row = dict[str, Any]


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, launches left out: twenty in a CUDA graph."""
    if device.type != "cuda":
        return measure(call, device, repeats=3).median / 1e3
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            call()
    return measure(graph.replay, device, repeats=9).median / 20e3


def bytes_of(*tensors: Any) -> int:
    return sum(t.nbytes if isinstance(t, Tensor) else bytes_of(*t) for t in tensors if t is not None)


def cases(
    tokens: int, device: torch.device, dtype: torch.dtype, scale: int
) -> Iterator[tuple[str, Callable[[Any], Any], int]]:
    """(name, what to call with kernels or twins, bytes that it must move)."""
    width, mlp = WIDTH // scale, MLP // scale
    heads = HEADS // scale

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, y = draw(1, tokens, width), draw(1, tokens, width)
    shift, factor, gate = draw(3, 1, width)
    wide = draw(1, tokens, 3 * width + mlp)
    qkv, hidden = wide.split((3 * width, mlp), dim=-1)
    norms = draw(2, width // heads)
    angle = torch.rand(1, tokens, width // heads // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    joint = tuple(draw(1, tokens, heads, width // heads) for _ in range(3))
    for form in (None, "fp8", "int8"):
        low = 1 if form else x.element_size()
        told = f" to {form}" if form else ""
        yield (
            f"modulated{told}",
            lambda ops, form=form: ops.modulated(x, shift, factor, form),
            x.nbytes + x.numel() * low,
        )
        yield (
            f"gated and modulated{told}",
            lambda ops, form=form: ops.gated(x, y, gate, shift, factor, form, out=x),
            3 * x.nbytes + x.numel() * low,
        )
        yield f"gelu{told}", lambda ops, form=form: ops.gelu(hidden, form), bytes_of(hidden) + hidden.numel() * low
        yield (
            f"beside{told}",
            lambda ops, form=form: ops.beside(x, hidden, form),
            bytes_of(x, hidden) + (x.numel() + hidden.numel()) * low,
        )
        if form:
            yield f"quantised{told}", lambda ops, form=form: ops.quantised(x, form), x.nbytes + x.numel() * low
    yield "placed in place", lambda ops: ops.placed(qkv, *norms, cos, sin, heads), qkv.numel() * 2 * 2 * 2 // 3
    yield (
        "placed in the joint buffer",
        lambda ops: ops.placed(qkv, *norms, cos, sin, heads, out=joint),
        2 * qkv.numel() * qkv.element_size(),
    )


def activations(
    tokens: int, device: torch.device, dtype: torch.dtype, scale: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What a single block does between its normed input and its output, but for attention, in several ways."""
    width, mlp = WIDTH // scale, MLP // scale
    ops = ops_for(device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype) * shape[-1] ** -0.5

    x, attended = draw(1, tokens, width), draw(1, tokens, width)
    one, first = draw(3 * width + mlp, width), draw(3 * width + mlp)
    two, second = draw(width, width + mlp), draw(width)
    split = 3 * width

    def whole() -> Tensor:
        hidden = F.linear(x, one, first)[..., split:]
        return F.linear(ops.beside(attended, hidden), two, second)

    def epilogue_then_two_products() -> Tensor:
        F.linear(x, one[:split], first[:split])
        active = torch._addmm_activation(first[split:], x[0], one[split:].t(), use_gelu=True)
        out = torch.addmm(second, attended[0], two[:, :width].t())
        return out.addmm_(active, two[:, width:].t())

    def epilogue_then_joined() -> Tensor:
        F.linear(x, one[:split], first[:split])
        active = torch._addmm_activation(first[split:], x[0], one[split:].t(), use_gelu=True)
        return F.linear(torch.cat((attended[0], active), dim=-1), two, second)

    def products_alone() -> Tensor:
        return F.linear(draw_mixed, two, second) + F.linear(x, one, first)[0, 0, 0]

    draw_mixed = draw(1, tokens, width + mlp)
    yield "one product each, gelu and copy fused between", whole
    yield "gelu in the first product's epilogue, two products into the output", epilogue_then_two_products
    yield "gelu in the first product's epilogue, joined by a copy", epilogue_then_joined
    yield "the products alone", products_alone


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    device = torch.device("cpu" if given.toy else "cuda")
    dtype, scale = (torch.float32, 12) if given.toy else (torch.bfloat16, 1)
    torch.manual_seed(0)
    rows: list[Row] = []

    def tell(row: Row) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    for tokens in (96,) if given.toy else (4608, 8704):
        for name, call, moved in cases(tokens, device, dtype, scale):
            row: Row = {"what": name, "tokens": tokens, "MB": moved / 1e6}
            for by, ops in (("kernel", ops_for(device)), ("twin", twins)):
                try:
                    seconds = timed(lambda call=call, ops=ops: call(ops), device)
                except Exception as error:
                    row[by] = f"{type(error).__name__}: {error}"[:200]
                    continue
                row |= {f"{by}_us": 1e6 * seconds, f"{by}_TB_s": moved / seconds / 1e12}
            tell(row)
        for name, call in activations(tokens, device, dtype, scale):
            try:
                tell({"what": f"single block, no attention: {name}", "tokens": tokens, "us": 1e6 * timed(call, device)})
            except Exception as error:
                tell({"what": name, "tokens": tokens, "error": f"{type(error).__name__}: {error}"[:200]})
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "processor" if given.toy else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": rows,
    }
    given.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
