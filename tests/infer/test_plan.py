"""The planner: its bytes are those of the modules, its times follow the rates, and what it says can be relied on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meter import peak_bytes
from torch import Tensor, nn

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.clip import ClipText
from fluxloom.core.redux import Redux, ReduxSpec
from fluxloom.core.specs import MODELS
from fluxloom.core.t5 import T5Encoder
from fluxloom.core.text import TextTower
from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput
from fluxloom.infer import plan as planning
from fluxloom.infer.executor import Given, Plain
from fluxloom.infer.loras import ResolvedLora
from fluxloom.infer.plan import SPARE, Plan, fit, foresee, gigabytes, parse_bytes, spread, tiles
from fluxloom.infer.request import Reference, Request, resolve
from fluxloom.infer.weigh import picture_flops, weigh
from fluxloom.infer.work import MACHINES, Work, evaluations, step_flops
from fluxloom.speed import twins
from fluxloom.speed.fused import Fused
from fluxloom.speed.pictures import Walk
from fluxloom.weights.load import Uninitialised

DEV, KONTEXT, NANO = MODELS["flux1-dev"], MODELS["flux1-kontext-dev"], MODELS["nano"]
GB = 10**9
H200, CPU = MACHINES["h200"], MACHINES["cpu"]


def meta(make: Callable[[], nn.Module], dtype: torch.dtype = torch.bfloat16) -> Any:
    """A module with shapes and no numbers."""
    with Uninitialised(), torch.device("meta"):
        return make().to(dtype).requires_grad_(False)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


# ------------------------------------------------------------------------------------------------ weights


def test_weights_are_those_of_the_modules() -> None:
    found = weigh(DEV, "bfloat16", None)
    assert found.transformer == nbytes(meta(lambda: Transformer(DEV.transformer))) == 2 * 11_901_408_320
    pair = nbytes(meta(lambda: ClipText(DEV.pair.clip))) + nbytes(meta(lambda: T5Encoder(DEV.pair.t5)))
    assert found.towers + sum(found.layers) == pair
    pictures = meta(lambda: Autoencoder(DEV.autoencoder), torch.float32)
    assert found.autoencoder == nbytes(pictures)
    walks = [Walk(half) for half in (pictures.encoder, pictures.decoder)]
    assert weigh(DEV, "bfloat16", None, walked=True).autoencoder == sum(map(nbytes, walks))
    assert sum(found.modulations) == pytest.approx(6.5 * GB, rel=0.01)  # 27 % of 12 B
    assert len(found.blocks) == 57
    assert len(found.modulations) == 2 * 19 + 38 + 1
    assert len(found.layers) == 1 + 24
    assert found.outer + found.towers < GB  # everything large can wait or stream
    assert weigh(MODELS["flux1-redux-dev"], "bfloat16", None).redux == nbytes(meta(lambda: Redux(ReduxSpec())))
    assert weigh(NANO, "float32", None).towers == nbytes(meta(lambda: TextTower(NANO.text), torch.float32))  # type: ignore[arg-type]


def test_8_bits_are_a_byte_a_number_and_a_scale_a_row() -> None:
    from fluxloom.speed.linear8 import KEEP

    whole, low = weigh(DEV, "bfloat16", None), weigh(DEV, "bfloat16", "fp8")
    model = meta(lambda: Transformer(DEV.transformer))
    layers = [
        layer for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not KEEP & set(name.split("."))
    ]  # fmt: skip
    saved = sum(layer.weight.numel() - 4 * layer.out_features for layer in layers)
    assert whole.transformer - low.transformer == saved
    assert low.modulations == whole.modulations


# ------------------------------------------------------------------------------------------------ activations


def codes(*shape: int) -> tuple[Tensor, Tensor]:
    return empty(*shape, dtype=torch.float8_e4m3fn), empty(*shape[:-1], 1, dtype=torch.float32)


class Ideal:
    """Memory of the fused kernels: what they return is all that they make."""

    @staticmethod
    def modulated(x: Tensor, shift: Any = None, scale: Any = None, form: str | None = None) -> Any:
        return torch.empty_like(x) if form is None else codes(*x.shape)

    @classmethod
    def gated(cls, x: Tensor, y: Tensor, gate: Any, shift: Any = None, scale: Any = None, **more: Any) -> Any:
        total = torch.empty_like(x) if more.get("out") is None else more["out"]
        return total, None if shift is None else cls.modulated(x, form=more.get("form"))

    @staticmethod
    def placed(qkv: Tensor, q: Any, k: Any, cos: Any, sin: Any, heads: int, out: Any = None, at: int = 0) -> Any:
        return twins.split(qkv, heads) if out is None else out

    @classmethod
    def gelu(cls, x: Tensor, form: str | None = None) -> Any:
        return cls.modulated(x, form=form)

    @staticmethod
    def activated(x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return empty(*x.shape[:-1], len(weight))

    @staticmethod
    def beside(attended: Tensor, hidden: Tensor, form: str | None = None) -> Any:
        shape = (*attended.shape[:2], attended.shape[2] + hidden.shape[2])
        return empty(*shape) if form is None else codes(*shape)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return empty(*q.shape[:2], q.shape[2] * q.shape[3])


class Eight(nn.Module):
    """Memory of a linear layer in 8 bits: it takes codes, and gives its output and no more."""

    form = "fp8"

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return empty(*x[0].shape[:-1], self.columns)

    def part(self, start: int, stop: int) -> Eight:
        return Eight(stop - start)


def layers_of(model: Transformer) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The products of the blocks, without modulation."""
    blocks = (*model.double_blocks, *model.single_blocks)
    names = [(block, name, one) for block in blocks for name, one in block.named_modules() if type(one) is nn.Linear]
    return [(block, name, one) for block, name, one in names if "mod" not in name]


def planned(
    spec: Any, work: Work, stage: str, machine: Any = H200, tiled: bool = False, linears: str | None = None
) -> int:
    found: int = planning._activations(spec, work, machine, linears, tiled, 2)[stage]
    return found


@pytest.mark.parametrize("how", ["fused", "low", "hung"])
@pytest.mark.parametrize(("rows", "references"), [(1, 0), (1, 1), (2, 1)])
def test_a_pass_holds_what_is_planned(rows: int, references: int, how: str) -> None:
    """A few blocks of each kind stand for all: they follow one another, and only one of them is at work. In 16 bits, in
    8, and with LoRAs of rank 16 on every layer."""
    spec = replace(KONTEXT, transformer=replace(KONTEXT.transformer, depth=2, depth_single_blocks=4))
    work = Work(width=1024, height=1024, references=((1024, 1024),) * references, rows=rows, evaluations=28, text=512)
    model, tokens, width = meta(lambda: Transformer(spec.transformer)), work.tokens, spec.transformer.vec_in_dim
    asked = Given(
        txt=empty(rows, 512, 4096), txt_ids=empty(rows, 512, 3, dtype=torch.float32),
        img_ids=empty(rows, tokens, 3, dtype=torch.float32), pooled=empty(rows, width), guidance=(3.5,) * rows,
        targets=4096, times=tuple(i / 28 for i in range(28)),
    )  # fmt: skip
    img = empty(rows, tokens, 64)
    plain = peak_bytes(lambda: Plain(model)(img, [0.5] * rows, asked))
    assert planned(spec, work, "sample", CPU) == pytest.approx(plain, rel=0.03)
    for block, name, layer in layers_of(model):
        if how == "low":
            parent, _, own = name.rpartition(".")
            setattr(block.get_submodule(parent), own, Eight(layer.out_features))
        if how == "hung":
            b = empty(16, layer.out_features)

            def add(layer: Any, x: Any, out: Tensor, b: Tensor = b) -> Tensor:
                return torch.addmm(out.flatten(0, -2), empty(out.numel() // out.shape[-1], 16), b).view_as(out)

            layer.register_forward_hook(add)
    fused = Fused(model, attend=attend, ops=Ideal)
    taken = peak_bytes(lambda: fused(img, [0.5] * rows, asked))
    work = replace(work, loras=1 if how == "hung" else 0)
    found = planned(spec, work, "sample", linears="fp8" if how == "low" else None)
    assert found == pytest.approx(taken, rel=0.03 if how == "fused" else 0.08)
    assert found > 0.995 * taken  # where it errs, it is not too little
    assert plain > 1.2 * taken


def test_the_other_stages_hold_what_is_planned() -> None:
    spec, work = MODELS["flux1-redux-dev"], Work.typical(MODELS["flux1-redux-dev"], encoded=((512, 768),))
    taken = {
        "read": (lambda: T5Encoder(replace(spec.pair.t5, layers=2)), torch.bfloat16, empty(1, 512, dtype=torch.long)),
        "see": (lambda: Redux(ReduxSpec(layers=2)), torch.bfloat16, empty(1, 3, 384, 384)),
    }
    for stage, (make, dtype, given_) in taken.items():
        model = meta(make, dtype)
        held = peak_bytes(lambda model=model, x=given_: model(x))  # type: ignore[misc]
        assert planned(spec, work, stage) == pytest.approx(held, rel=0.05), stage
    pictures = meta(lambda: Autoencoder(spec.autoencoder), torch.float32)
    z, x = empty(1, 16, 128, 128, dtype=torch.float32), empty(1, 3, 768, 512, dtype=torch.float32)
    assert planned(spec, work, "decode", CPU) == pytest.approx(peak_bytes(lambda: pictures.decode(z)), rel=0.01)
    assert planned(spec, work, "encode", CPU) == pytest.approx(peak_bytes(lambda: pictures.encode(x)), rel=0.01)
    encoder, decoder = (Walk(half, swished=_swished) for half in (pictures.encoder, pictures.decoder))
    assert planned(spec, work, "decode") == pytest.approx(peak_bytes(lambda: decoder(z)), rel=0.01)
    assert planned(spec, work, "encode") == pytest.approx(peak_bytes(lambda: encoder(x)), rel=0.02)
    tower = meta(lambda: TextTower(NANO.text), torch.float32)  # type: ignore[arg-type]
    read = peak_bytes(lambda: tower(empty(1, 48, dtype=torch.long)))
    assert planned(NANO, Work.typical(NANO), "read") == pytest.approx(read, rel=0.01)


def _swished(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    return torch.empty_like(x)


# ------------------------------------------------------------------------------------------------ times


def test_operations_are_those_of_the_shapes() -> None:
    dev, kontext = Work.typical(DEV), Work.typical(KONTEXT)
    # Counted by torch's FlopCounterMode on meta tensors: 74.385 and 165.458 TFLOP with modulation and outer layers.
    assert sum(step_flops(DEV.transformer, dev)) / 1e12 == pytest.approx(74.385, rel=0.001)
    assert step_flops(DEV.transformer, dev)[1] / 1e12 == pytest.approx(14.872, rel=0.001)
    assert sum(step_flops(KONTEXT.transformer, kontext)) / 1e12 == pytest.approx(165.458, rel=0.001)
    assert picture_flops(DEV.autoencoder, "decode", 1024, 1024) / 1e12 == pytest.approx(10.47, rel=0.001)
    assert picture_flops(DEV.autoencoder, "encode", 1024, 1024) / 1e12 == pytest.approx(4.88, rel=0.001)
    walked = picture_flops(DEV.autoencoder, "decode", 1024, 1024, walked=True)
    assert walked / picture_flops(DEV.autoencoder, "decode", 1024, 1024) == pytest.approx(0.85, abs=0.01)


def test_seconds_follow_the_rates_of_the_machine() -> None:
    slow = H200.measured({"bfloat16": 74.6, "attention": 69, "overhead": 1.0, "upload": 5.5})
    work = Work.typical(DEV)
    quick, late = (fit(DEV, None, work, machine=one) for one in (H200.measured({"overhead": 1.0}), slow))
    assert stage(late, "sample").seconds == pytest.approx(10 * stage(quick, "sample").seconds)
    assert stage(late, "decode").seconds == stage(quick, "decode").seconds
    floor = sum(a / b for a, b in zip(step_flops(DEV.transformer, work), (74.6e12, 69e12), strict=True))
    assert stage(late, "sample").seconds == pytest.approx(28 * floor)
    # A bus of 5.5 GB/s bounds what streams: 12 GB a step.
    streamed = fit(DEV, 12 * GB, work, machine=slow)
    moved = sum(weigh(DEV, "bfloat16", None).blocks[i] for i in streamed.streamed)
    assert stage(streamed, "sample").seconds >= 28 * moved / 5.5e9
    with pytest.raises(BadInput, match=r"got rate int4=3, .*allowed positive bfloat16"):
        H200.measured({"int4": 3})
    with pytest.raises(BadInput, match="got rate upload=-1"):
        H200.measured({"upload": -1})


def stage(plan: Plan, name: str) -> Any:
    return next(one for one in plan.stages if one.name == name)


def test_passes_are_those_of_the_solver() -> None:
    assert [evaluations(name, 10) for name in ("euler", "dpmpp_2m", "adaptive")] == [10, 10, 10]
    assert evaluations("rk4", 10) > evaluations("heun", 10) > 10


# ------------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize("cap", [24, 16, 12, 8])
def test_kontext_with_a_reference_fits_small_gpus_exactly(cap: int) -> None:
    found = fit(KONTEXT, cap * GB, Work.typical(KONTEXT))
    assert found.peak <= SPARE * cap * GB
    assert found.peak > 0.85 * cap * GB  # what there is, is used
    assert (found.linears, found.tile, found.approximate) == (None, None, ())
    assert {one.name for one in found.stages} == {"read", "encode", "sample", "decode"}
    assert found.peak == max(one.peak for one in found.stages)
    assert all(one.peak > one.weights + one.activations for one in found.stages)
    assert f"{cap}.0 GB" in found.words[0]
    assert len(found.words) > 1


def test_what_no_plan_fits_is_refused_with_what_would_do() -> None:
    with pytest.raises(BadInput) as told:
        fit(KONTEXT, 2 * GB)
    found = str(told.value)
    assert found.startswith("got 2.0 GB of memory for flux1-kontext-dev at 1024x1024, allowed ")
    assert found.endswith(" GB and more, try a smaller size")
    least = float(found.split("allowed ")[1].split(" GB")[0])
    assert 2.0 < least < 3.2
    assert fit(KONTEXT, round(least * GB)).peak <= least * GB
    with pytest.raises(BadInput):
        fit(KONTEXT, round((least - 0.15) * GB))


def test_approximations_are_the_last_resort_and_said() -> None:
    tiled = fit(KONTEXT, round(3.3 * GB))
    assert tiled.approximate == ("a tiled autoencoder",)
    assert any("approximate" in word for word in tiled.words)
    low = fit(KONTEXT, round(3.05 * GB))
    assert low.approximate == (f"{low.linears} products", "a tiled autoencoder")
    assert any("since nothing exact fits" in word for word in low.words)
    asked = fit(KONTEXT, 12 * GB, linears="int8")
    assert asked.linears == "int8"
    assert any("as asked" in word for word in asked.words)
    assert asked.seconds < fit(KONTEXT, 12 * GB).seconds


def test_with_room_everything_stays() -> None:
    for spec, cap in ((KONTEXT, 141 * GB), (KONTEXT, None), (NANO, 4 * GB)):
        found = fit(spec, cap)
        assert found.resident
        assert found.host == 0
        assert found.words[1:] == ("everything stays on the device",)
    assert not fit(KONTEXT, 16 * GB).resident


@given(
    name=st.sampled_from(["flux1-dev", "flux1-kontext-dev", "flux1-redux-dev", "flux1-fill-dev", "tiny-1b", "nano"]),
    caps=st.tuples(st.integers(2000, 45_000), st.integers(2000, 45_000)),
    sides=st.tuples(st.integers(16, 96), st.integers(16, 96)),
    rows=st.integers(1, 2),
)
@settings(max_examples=30)
def test_more_memory_is_never_slower_and_a_larger_picture_never_smaller(
    name: str, caps: tuple[int, int], sides: tuple[int, int], rows: int
) -> None:
    spec = MODELS[name]

    def planned_at(cap: int, side: int) -> tuple[int, float, int] | None:
        size = {"width": 16 * side, "height": 1024}
        try:
            found = fit(spec, cap * 10**6, Work.typical(spec, rows=rows, **size))
        except BadInput:
            return None
        assert found.peak <= cap * 10**6
        return len(found.approximate), found.seconds, found.peak

    tight, wide = (planned_at(cap, sides[0]) for cap in sorted(caps))
    if tight is not None:
        assert wide is not None
        assert wide[:2] <= tight[:2]  # exact before fast, then fast
    smaller, larger = (fit(spec, None, Work.typical(spec, rows=rows, width=16 * side)) for side in sorted(sides))
    assert smaller.peak <= larger.peak
    small, large = (planned_at(min(caps), side) for side in sorted(sides))
    assert small is not None or large is None
    if large is not None and small is not None:
        assert small[:2] <= large[:2]


def test_a_processor_has_one_memory() -> None:
    found = fit(NANO, None, machine=CPU, dtype="float32")
    assert found.resident
    assert found.peak < GB
    assert 1 < found.seconds < 20  # a few seconds a picture, as the README says
    with pytest.raises(BadInput, match="try bfloat16"):
        fit(DEV, 32 * GB, machine=CPU, dtype="float32")
    with pytest.raises(BadInput, match="got linears 'fp8', which two cores of a processor has no products for"):
        fit(NANO, None, machine=CPU, linears="fp8", dtype="float32")
    with pytest.raises(BadInput, match="got linears 'nf4', allowed fp8, int8"):
        fit(KONTEXT, 12 * GB, linears="nf4")


def test_a_plan_tells_what_else_it_allows() -> None:
    made = fit(KONTEXT, 12 * GB)
    assert foresee(made, KONTEXT, Work.typical(KONTEXT)).stages == made.stages
    small = foresee(made, KONTEXT, Work.typical(KONTEXT, width=512, height=512))
    assert small.peak < made.peak
    assert small.streamed == made.streamed
    with pytest.raises(BadInput, match=r"got 2048x2048 with 1 references, allowed what fits 12\.0 GB .*a smaller size"):
        foresee(made, KONTEXT, Work.typical(KONTEXT, width=2048, height=2048))


def test_loras_take_room() -> None:
    bare, styled = (fit(DEV, None, Work.typical(DEV, loras=size)) for size in (0, GB))
    assert styled.peak > bare.peak + GB  # and what their updates hold


def test_a_request_is_planned_as_it_is(tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.new("RGB", (320, 200))
    request = Request(
        prompt="blue", references=(Reference(picture), Reference(picture)), width=512, height=512, steps=8, n=3,
        true_cfg=2.0, solver="heun",
    )  # fmt: skip
    found, folder = resolve(request, KONTEXT), tmp_path / "peft"
    folder.mkdir()
    for file in (tmp_path / "one.safetensors", folder / "adapter_model.safetensors"):
        file.write_bytes(bytes(7))
    hung = [ResolvedLora(path, "", None, 1.0, ()) for path in (tmp_path / "one.safetensors", folder)]
    work = Work.of(replace(found, loras=tuple(hung)), KONTEXT)
    assert (work.width, work.rows, work.pictures, work.loras) == (512, 2, 3, 14)
    assert work.references == ((512, 512),) * 2
    assert work.evaluations == evaluations("heun", 8)
    assert work.tokens == 3 * 32 * 32
    started = Work.of(resolve(Request(prompt="blue", init=picture, strength=0.5, steps=8), DEV), DEV)
    assert len(started.encoded) == 1
    assert started.evaluations == 4


# ------------------------------------------------------------------------------------------------ small parts


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GB", 12 * GB), ("12 gb", 12 * GB), ("8GiB", 8 << 30), ("1.5G", 3 * GB // 2), ("900MB", 9 * 10**8)],
)
def test_sizes_in_words(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0GB", "1e9", "12GBit"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match="allowed a number and a unit, try 12GB"):
        parse_bytes(text)


def test_sizes_for_people() -> None:
    assert [gigabytes(size) for size in (12 * GB, 150_000_000, 2_000_000)] == ["12.0 GB", "0.1 GB", "2 MB"]


@given(cells=st.integers(1, 400))
def test_tiles_cover_a_row_and_overlap(cells: int) -> None:
    count, side = tiles(cells)
    assert side <= planning.TILE
    assert count * side - (count - 1) * planning.OVERLAP >= cells or count == 1
    assert count == 1 or side > planning.OVERLAP


@given(count=st.integers(0, 57))
def test_what_streams_lies_evenly_between_what_stays(count: int) -> None:
    found = spread(count, 57)
    assert len(set(found)) == count
    gaps = [b - a for a, b in zip(found, [*found[1:], 57 + found[0]], strict=True)] if count else [0]
    assert max(gaps) - min(gaps) <= 1
