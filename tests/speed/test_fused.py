"""The fused sequence gives the velocity of core's own forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lora_makers import MAKERS, others
from tiny import DEV, inputs, relative, transformer
from torch import Tensor

from fluxloom.core.specs import MODELS, TransformerSpec
from fluxloom.core.transformer import Transformer
from fluxloom.infer.adapters import attach
from fluxloom.infer.executor import Given, Plain
from fluxloom.speed import attention, fused, twins
from fluxloom.speed.fused import Fused
from fluxloom.speed.linear8 import quantise
from fluxloom.weights.lora import Weighted
from fluxloom.weights.lora_read import read_lora

LIMIT = 1e-5
MEMBERS = {
    "dev": DEV,
    "schnell": replace(DEV, guidance_embed=False),
    "fill": replace(DEV, in_channels=384),
    "one single block": replace(DEV, depth_single_blocks=1),
    "nano": replace(MODELS["nano"].transformer, depth_single_blocks=2),
}


def arguments(
    spec: TransformerSpec, reference: bool = False, batch: int = 2, **more: Any
) -> tuple[Tensor, tuple[float, ...], Given]:
    """img, t and given, of random numbers."""
    drawn = inputs(spec, 0, reference=reference, batch=batch)
    guidance = tuple(drawn["guidance"].tolist()) if "guidance" in drawn else None
    given = Given(
        txt=drawn["txt"], txt_ids=drawn["txt_ids"], img_ids=drawn["img_ids"], pooled=drawn["pooled"],
        guidance=guidance, targets=15, **more,
    )  # fmt: skip
    return drawn["img"], tuple(drawn["t"].tolist()), given


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize(("reference", "batch"), [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_it_is_the_velocity_of_core(name: str, reference: bool, batch: int) -> None:
    model = transformer(MEMBERS[name], 0)
    img, t, given = arguments(model.spec, reference, batch)
    before = img.clone()
    want = Plain(model)(img, t, given)[:, : given.targets]
    got = Fused(model)(img, t, given)
    assert got.shape == want.shape
    assert relative(got, want) < LIMIT
    assert torch.equal(img, before)


def test_a_wrong_operation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer(DEV, 0)
    img, t, given = arguments(DEV)
    want = Plain(model)(img, t, given)
    plain_gated, plain_placed = twins.gated, twins.placed

    def weaker(x: Tensor, y: Tensor, gate: Tensor, *rest: Any, **more: Any) -> Any:
        return plain_gated(x, y, 0.98 * gate, *rest, **more)

    def misplaced(qkv: Tensor, q_norm: Tensor, k_norm: Tensor, *rest: Any, **more: Any) -> Any:
        return plain_placed(qkv, k_norm, q_norm, *rest, **more)

    for name, wrong in (("gated", weaker), ("placed", misplaced)):
        with monkeypatch.context() as patch:
            patch.setattr(twins, name, wrong)
            assert relative(Fused(model)(img, t, given), want) > 100 * LIMIT


def test_all_modulations_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer(DEV, 0)
    times = (1.0, 0.871, 0.5, 0.125)
    img, _, given = arguments(DEV, times=times)
    rows: list[int] = []
    model.double_blocks[0].img_mod.lin.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    run = Fused(model)
    for time in times:
        img_t = run(img, (time, time), given)
        assert relative(img_t, Plain(model)(img, (time, time), given)) < LIMIT
    assert rows[0] == 2 * len(times)
    assert rows[1:] == [2] * len(times)  # those of the plain executor
    run(img, (0.3, 0.5), given)  # one that was not foreseen, beside one that was
    assert rows[-1] == 2
    assert relative(run(img, (0.3, 0.5), given), Plain(model)(img, (0.3, 0.5), given)) < LIMIT
    del given
    assert len(run._stills) == 0  # nothing outlives its request


def test_many_times_do_not_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer(DEV, 0)
    monkeypatch.setattr(fused, "_TOGETHER", 6)
    img, _, given = arguments(DEV, times=tuple(i / 10 for i in range(1, 11)))
    rows: list[int] = []
    model.final_layer.adaLN_modulation[1].register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    Fused(model)(img, (0.5, 0.5), given)
    assert rows == [6, 6, 6, 2]


@pytest.mark.parametrize("name", ["kohya", "dora columns", "onetrainer"])
def test_under_loras(name: str) -> None:
    model = transformer(DEV, 0)
    made = MAKERS[name](DEV, 1) if name in MAKERS else None
    read = read_lora(made.state, made.metadata, DEV) if made else read_lora(others(DEV)[name], {}, DEV)
    lora = Weighted(read, 0.6)
    img, t, given = arguments(DEV, reference=True, times=(0.871, 0.5))
    without = Fused(model)(img, t, given)
    img, t, given = arguments(DEV, reference=True, times=(0.871, 0.5), adapted=True)
    with attach(model, [lora]) as attached:
        want = Plain(model)(img, t, given)[:, : given.targets]
        assert relative(Fused(model)(img, t, given), want) < LIMIT
        assert relative(without, want) > 1e-3
        if not attached._originals:
            attached.share(torch.tensor([[1.0], [0.0]]))
            mixed = Fused(model)(img, t, given)
            assert relative(mixed[:1], want[:1]) < LIMIT
            assert relative(mixed[1:], without[1:]) < LIMIT


def test_in_half_precision_it_is_no_further_from_the_truth() -> None:
    exact = transformer(DEV, 0)
    img, t, given = arguments(DEV)
    want = Plain(exact)(img, t, given)
    model: Transformer = transformer(DEV, 0).bfloat16()
    half = replace(given, txt=given.txt.bfloat16(), pooled=given.pooled.bfloat16())
    errors = [relative(run(img.bfloat16(), t, half).float(), want) for run in (Fused(model), Plain(model))]
    assert 1e-3 < errors[0] < 1.1 * errors[1] < 0.05


def test_queries_and_keys_in_the_dtype_that_attention_takes() -> None:
    """Of e4m3: what comes out differs by their rounding, and by no more."""
    dtypes = set()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtypes.add((q.dtype, k.dtype, v.dtype))
        return attention.backend_for(v, 32)(q.to(v.dtype), k.to(v.dtype), v)

    model = transformer(DEV, 0)
    img, t, given = arguments(DEV)
    low = attention.Backend("low", attend, lambda like, head: None, lossy=True, takes=twins.CODES)
    got, wanted = (Fused(model, by)(img, t, given) for by in (low, None))
    assert dtypes == {(twins.CODES, twins.CODES, torch.float32)}
    assert 1e-4 < relative(got, wanted) < 0.05


@pytest.mark.parametrize("form", [None, "fp8", "int8"])
def test_what_attention_exchanges_goes_beside_the_mlp(form: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in three moves: of a single block the MLP comes between the first two; and the velocity is the same."""
    model = transformer(DEV, 0)
    done: list[str] = []
    if form is not None:
        quantise(model, form)
    img, t, given = arguments(DEV)
    wanted = Fused(model)(img, t, given)

    class Moves:
        def begin(self, *qkv: Tensor) -> Any:
            done.append("begin")

            def middle() -> Any:
                done.append("attend")
                attended = attention.backend_for(qkv[0], 32)(*qkv)
                return lambda: (done.append("end"), attended)[1]

            return middle

        def __call__(self, *qkv: Tensor) -> Tensor:
            found: Tensor = self.begin(*qkv)()()
            return found

    whole, columns = twins.activated, fused.part

    def activated(*given: Any) -> Tensor:
        done.append("mlp")
        return whole(*given)

    def part(module: Any, start: int, stop: int, h: Any) -> Tensor:
        done.extend(["mlp"] if start else [])
        return columns(module, start, stop, h)

    monkeypatch.setattr(twins, "activated", activated)
    monkeypatch.setattr(fused, "part", part)
    assert relative(Fused(model, Moves())(img, t, given), wanted) < LIMIT
    single = ["begin", "mlp", "attend", "end"]
    assert done[-len(single) * DEV.depth_single_blocks :] == single * DEV.depth_single_blocks


def test_attention_backends_say_why_not() -> None:
    like = torch.empty(0)
    assert attention.backend_for(like, 64).name == "torch"
    refused = {b.name: b.refuses(like, 64) for b in attention.BACKENDS}
    assert {name for name, why in refused.items() if why is None} == {"torch", "math"}
    q = torch.randn(2, 5, 3, 8)
    k, v = torch.randn(2, 2, 9, 3, 8)
    outs = [attention.backend_for(like, 8, name)(q, k, v) for name in ("torch", "math")]
    assert outs[0].shape == (2, 5, 24)
    assert relative(*outs) < LIMIT
    with pytest.raises(attention.BadInput, match="got attention 'flesh', allowed auto, fa3"):
        attention.backend_for(like, 64, "flesh")
    with pytest.raises(attention.BadInput, match="got attention 'cudnn', which needs a GPU, try auto"):
        attention.backend_for(like, 64, "cudnn")
