"""Every Triton kernel against its plain twin: on a GPU, and without one in Triton's interpreter.

The interpreter is chosen before Triton is imported, for a whole process: the checks run in one of their own, this file
as a script. It cuts bf16 off where GPUs round, and it rounds e4m3 wrongly, so that fp8 is checked on GPUs only.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fluxloom.speed import twins

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")

# B, L, N, D_head, M: nano's single blocks, widths that are no power of two nor a multiple of 16 bytes, and FLUX.1's
SIZES = {"nano": (2, 3, 6, 64, 1536), "odd": (2, 5, 5, 20, 72), "full": (1, 2, 24, 128, 12288)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Size = tuple[int, int, int, int, int]


class Case:
    """Random inputs on a device; rows are views of wider ones."""

    def __init__(self, device: str, dtype: torch.dtype, size: Size) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.batch, self.length, self.heads, self.head, self.hidden = size
        self.width = self.heads * self.head

    def rows(self, width: int) -> Tensor:
        wide = torch.randn(self.batch, self.length + 2, width + 16) * 2
        return wide.to(self.device, self.dtype)[:, 1:-1, :width]

    def vectors(self, count: int) -> tuple[Tensor, ...]:
        many = torch.randn(self.batch, (count + 1) * self.width).to(self.device, self.dtype)
        return many.unflatten(-1, (-1, self.width)).unbind(1)[1:]

    def room(self, length: int, form: twins.Form) -> twins.Three:
        shape = (self.batch, length, self.heads, self.head)
        q, k, v = (torch.full(shape, 7.0, device=self.device, dtype=self.dtype) for _ in range(3))
        return (q, k, v) if form is None else (q.to(twins.CODES), k.to(twins.CODES), v)

    def grouped(self, form: twins.Form) -> twins.Three:
        """Rooms whose heads lie in groups, far from one another."""
        groups = next(n for n in range(2, self.heads + 1) if self.heads % n == 0)
        q, k, v = self.room(groups * self.length, form)
        shape = (groups, self.length, self.batch, self.heads // groups, self.head)
        places = (x.flatten()[: math.prod(shape)].view(shape).permute(2, 1, 0, 3, 4) for x in (q, k, v))
        return cast(twins.Three, tuple(places))

    def same(self, got: Any, wanted: Any) -> None:
        """Equal up to float32 arithmetic, which may tip a rounding: then the last bit differs, or the code by one."""
        if isinstance(wanted, tuple):
            self.same_codes(got, wanted)
            return
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        last = {torch.bfloat16: 2**-7, twins.CODES: 2**-3}.get(wanted.dtype, 2e-6)
        least = 2**-9 if wanted.dtype == twins.CODES else 4e-6
        assert bool(((got.float() - wanted.float()).abs() <= last * wanted.float().abs() + least).all())

    def same_codes(self, got: twins.Low, wanted: twins.Low) -> None:
        assert [one.dtype for one in got] == [one.dtype for one in wanted]
        torch.testing.assert_close(got[1], wanted[1], rtol=2e-6, atol=0)
        a, b = got[0].float(), wanted[0].float()
        step = torch.ones_like(b) if wanted[0].dtype == torch.int8 else (b.abs() / 8).clamp(min=2**-9)
        assert bool(((a - b).abs() <= step).all())
        assert int((a != b).sum()) <= max(3, 2e-3 * a.numel())


def modulated(ops: Any, case: Case, form: twins.Form) -> None:
    x, (shift, scale) = case.rows(case.width) + 3, case.vectors(2)
    case.same(ops.modulated(x, shift, scale, form), twins.modulated(x, shift, scale, form))


def gated(ops: Any, case: Case, form: twins.Form) -> None:
    x, y, (gate, shift, scale) = case.rows(case.width), case.rows(case.width), case.vectors(3)
    total, low = twins.gated(x, y, gate, shift, scale, form)
    joint = torch.full((case.batch, case.length + 3, case.width), 7.0, device=case.device, dtype=case.dtype)
    for out in (None, joint[:, 1:-2], x.clone()):
        got = ops.gated(x, y, gate, shift, scale, form, out)
        assert out is None or got[0].data_ptr() == out.data_ptr()
        case.same(got[0], total)
        case.same(got[1], low)
    assert bool((joint[:, :1] == 7).all() and (joint[:, -2:] == 7).all())
    alone, nothing = ops.gated(x, y, gate)
    case.same(alone, total)
    assert nothing is None
    got, _ = ops.gated(x, y, gate, shift, scale, form, x)
    assert got is x
    case.same(x, total)


def placed(ops: Any, case: Case, form: twins.Form) -> None:
    qkv = case.rows(3 * case.width)
    q_norm, k_norm = torch.randn(2, case.head).to(case.device, case.dtype)
    for shared in (False, True):
        angle = torch.randn(1 if shared else case.batch, case.length + 2, case.head // 2, device=case.device)[:, 1:-1]
        given = (q_norm, k_norm, angle.cos(), angle.sin(), case.heads)
        rooms = case.room(case.length + 3, form), case.room(case.length + 3, form)
        got = ops.placed(qkv, *given, rooms[0], 2)
        twins.placed(qkv, *given, rooms[1], 2)
        for a, b, c in zip(*rooms, got, strict=True):
            case.same(a, b)
            assert a is c
        q, k, _ = case.room(case.length, form)
        *turned, values = ops.placed(qkv, *given, (q, k, None))
        assert torch.equal(values, twins.split(qkv, case.heads)[2])
        for a, whole in zip(turned, rooms[1], strict=False):
            case.same(a, whole[:, 2:-1])
        groups = case.grouped(form), case.grouped(form)
        ops.placed(qkv, *given, groups[0])
        twins.placed(qkv, *given, groups[1])
        for a, b in zip(*groups, strict=True):
            case.same(a, b)
        wide = torch.cat((qkv, qkv), dim=-1)
        mine, theirs = wide[..., : 3 * case.width], qkv.clone()
        for a, b in zip(ops.placed(mine, *given), twins.placed(theirs, *given), strict=True):
            case.same(a, b)
        assert torch.equal(wide[..., 3 * case.width :], qkv)
        case.same(mine, theirs)


def by_head(ops: Any, case: Case, form: twins.Form) -> None:
    x = twins.split(case.rows(3 * case.width), case.heads)[2].clone()
    x *= torch.arange(case.heads, device=case.device)[:, None].to(x.dtype)  # of the first head nothing is left
    for one in (x, x[:, :1]):
        case.same(ops.by_head(one), twins.by_head(one))
    x[-1, -1, 1, 0] = torch.nan
    assert ops.by_head(x)[1].isnan().nonzero().tolist() == [[case.batch - 1, 1]]


def gelu(ops: Any, case: Case, form: twins.Form) -> None:
    for width in (case.hidden, 2 * case.head):
        x = 4 * case.rows(width)
        case.same(ops.gelu(x, form), twins.gelu(x, form))


def activated(ops: Any, case: Case, form: twins.Form) -> None:
    x, weight = case.rows(case.width), torch.randn(case.hidden, case.width).to(case.device, case.dtype)
    weight *= case.width**-0.5
    for bias in (None, torch.randn(case.hidden).to(case.device, case.dtype)):
        got, wanted = ops.activated(x, weight, bias), twins.activated(x, weight, bias)
        assert got.shape == wanted.shape
        assert float((got.float() - wanted.float()).norm() / wanted.float().norm()) < (
            1e-5 if case.dtype == torch.float32 else 4e-3
        )


def beside(ops: Any, case: Case, form: twins.Form) -> None:
    attended, hidden = case.rows(case.width), case.rows(case.hidden)
    for factor in (0.1, 10):
        x = factor * attended
        case.same(ops.beside(x, hidden, form), twins.beside(x, hidden, form))


def quantised(ops: Any, case: Case, form: twins.Form) -> None:
    assert form is not None
    x = case.rows(case.width + case.hidden).clone()
    x[0, 0] = 0
    case.same(ops.quantised(x, form), twins.quantised(x, form))
    x[0, -1, 7] = torch.nan
    codes, scale = ops.quantised(x, form)
    assert bool((codes[0, 0].float() == 0).all() and scale[0, 0] > 0)
    assert torch.isfinite(scale).logical_not().nonzero().tolist() == [[0, case.length - 1, 0]]


def rescaled(ops: Any, case: Case, form: twins.Form) -> None:
    sums = torch.randint(-(10**6), 10**6, (case.length, case.width + 1), device=case.device, dtype=torch.int32)[:, :-1]
    rows, columns = torch.rand(case.length, 1, device=case.device), torch.rand(case.width, device=case.device)
    for bias in (None, case.vectors(1)[0][0]):
        given = (sums, rows, columns, bias, case.dtype)
        case.same(ops.rescaled(*given), twins.rescaled(*given))


def refused(ops: Any, case: Case, form: twins.Form) -> None:
    """What would read past its end, or between the numbers."""
    x, (gate, shift, scale) = case.rows(case.width), case.vectors(3)
    gaps = torch.cat((scale, scale), dim=-1)[:, ::2]
    for one in (scale[:, :4], scale[:1].expand(3, -1), gaps):
        with pytest.raises(ValueError, match="try contiguous"):
            ops.modulated(x, shift, one)
    angle = torch.ones(1, case.length, case.head // 2, device=case.device)
    wide = torch.cat((angle, angle), dim=-1)[..., : case.head // 2]
    for call in (
        lambda: ops.gated(x, x[:, :-1], gate),
        lambda: ops.gated(x, x, gate, out=x[..., :-1]),
        lambda: ops.beside(x, x[:, :-1]),
        lambda: ops.placed(torch.cat((x, x, x), -1), *[gate[0, : case.head]] * 2, angle, wide, case.heads),
        lambda: ops.placed(torch.cat((x, x, x), -1), *[gate[0, :-1]] * 2, angle, angle, case.heads),
        lambda: ops.rescaled(x[0].int()[:, ::2], x[0, :, :1], gate[0, ::2], None, case.dtype),
    ):
        with pytest.raises(ValueError, match="try contiguous"):
            call()
    with pytest.raises(ValueError, match="try giving both"):
        ops.gated(x, x, gate, shift)


CHECKS: dict[str, tuple[Callable[[Any, Case, twins.Form], None], tuple[twins.Form, ...]]] = {
    "modulated": (modulated, (None, *twins.FORMS)),
    "gated": (gated, (None, *twins.FORMS)),
    "placed": (placed, (None, "fp8")),
    "by_head": (by_head, ("fp8",)),
    "gelu": (gelu, (None, *twins.FORMS)),
    "activated": (activated, (None,)),
    "beside": (beside, (None, *twins.FORMS)),
    "quantised": (quantised, tuple(twins.FORMS)),
    "rescaled": (rescaled, (None,)),
    "refused": (refused, (None,)),
}


def named() -> Iterator[tuple[str, str, str, twins.Form]]:
    for check, (_, forms) in CHECKS.items():
        for size in SIZES:
            for dtype in DTYPES:
                for form in forms:
                    yield check, size, dtype, form


def run(device: str, check: str, size: str, dtype: str, form: twins.Form) -> None:
    from fluxloom.speed import kernels

    CHECKS[check][0](kernels, Case(device, DTYPES[dtype], SIZES[size]), form)


INTERPRETED = [key for key in named() if key[3] != "fp8" and key[0] != "activated"]  # which is cuBLAS


@cache
def interpreted() -> dict[str, str]:
    """What the interpreter found, by check: a traceback's end, or nothing."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "error", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("key", INTERPRETED, ids=str)
def test_a_kernel_is_its_twin_in_the_interpreter(key: tuple[str, str, str, twins.Form]) -> None:
    assert interpreted()[str(key)] == ""


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("key", list(named()), ids=str)
def test_a_kernel_is_its_twin_on_a_gpu(key: tuple[str, str, str, twins.Form]) -> None:
    if key[3] == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no e4m3")
    run("cuda", *key)


@needs_triton
@pytest.mark.gpu
def test_offsets_past_two_billion() -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    x = torch.randn(1, 180_000, 12_288, device="cuda", dtype=torch.bfloat16)  # 2.2e9 numbers
    from fluxloom.speed import kernels

    got, wanted = kernels.gelu(x), twins.gelu(x[:, -3:])
    assert isinstance(got, Tensor)
    Case("cuda", torch.bfloat16, SIZES["full"]).same(got[:, -3:], wanted)


@needs_triton
@pytest.mark.gpu
def test_kernels_can_be_captured() -> None:
    from fluxloom.speed import kernels

    case = Case("cuda", torch.bfloat16, SIZES["full"])
    x, y, (gate, shift, scale) = case.rows(case.width), case.rows(case.width), case.vectors(3)
    work = partial(kernels.gated, x, y, gate, shift, scale, "int8")
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, low = work()
    x.copy_(case.rows(case.width))
    graph.replay()
    wanted = twins.gated(x, y, gate, shift, scale, "int8")
    case.same(total, wanted[0])
    case.same(low, wanted[1])


def main() -> None:
    """All checks in the interpreter; it says 'invalid value' of a cast of NaN to an integer, as numpy does."""
    import traceback

    import numpy as np

    found = {}
    for key in INTERPRETED:
        try:
            with np.errstate(all="ignore"):
                run("cpu", *key)
            found[str(key)] = ""
        except Exception:
            found[str(key)] = traceback.format_exc()[-2000:]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
