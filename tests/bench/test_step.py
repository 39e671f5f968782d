"""Steps by recipe: each computes the velocity, or says why it does not."""

from __future__ import annotations

import math

import pytest
import torch

from fluxloom.bench.meter import metered, read
from fluxloom.bench.step import judged, run, said
from fluxloom.bench.subject import Step
from fluxloom.bench.timing import Timing, measure, peak, seconds
from fluxloom.bench.trace import kernels, kind_of
from fluxloom.bench.ways import USUAL, recipe, way, ways
from fluxloom.errors import BadInput
from fluxloom.infer.runtime import Runtime
from fluxloom.speed.recipe import Recipe

CPU = torch.device("cpu")


def test_words_are_parts_of_a_way() -> None:
    assert way("captured+fp8+fa3-fp8").lossy
    assert recipe(way("captured+fp8+fa3-fp8")) == Recipe("captured", "fp8", "fa3-fp8")
    assert recipe(way("plain+bfloat16")) == Recipe("plain")
    assert not way("fused+cudnn").lossy
    for words in USUAL.values():
        assert [one.name for one in ways((), CPU)] or words
        assert [way(word).name for word in words] == list(words)


@pytest.mark.parametrize(
    "text", ["", "fast", "fused+captured", "plain+fused", "compiled+fp8", "plain+cudnn", "onnx+math"]
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"got recipe .*, allowed .*, try fused"):
        way(text)


def test_every_recipe_gives_the_velocity_or_a_reason(
    found: Runtime, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluxloom.bench.ways.find_spec", lambda name: None)
    names = ["plain", "fused+bfloat16", "fused+int8", "captured", "fused+cudnn", "openvino+bfloat16"]
    told: list[str] = []
    noise, *rows = run(found, step, [way(name) for name in names], warm=0, repeats=2, profiled=True, told=told.append)
    by_name = {row["recipe"]: row for row in rows}
    assert list(by_name) == told[1:] == names
    assert 1e-3 < noise["error"] < 3e-2
    assert by_name["plain"]["error"] < 1e-6
    assert by_name["fused+bfloat16"]["times_noise"] < 1.25
    assert not by_name["fused+bfloat16"]["lossy"]
    assert by_name["fused+int8"]["lossy"]
    assert by_name["fused+int8"]["times_noise"] > 1.25
    for name in ("plain", "fused+bfloat16", "fused+int8"):
        row = by_name[name]
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert (row["runs"], row["cold_s"] > 0) == (2, True)
        assert row["kernels"]["attention"][0]["ms"] > 0
    assert by_name["captured"]["skipped"] == "CUDA graphs need a GPU"
    assert by_name["fused+cudnn"]["skipped"] == "attention cudnn needs a GPU"
    assert "not installed: openvino" in by_name["openvino+bfloat16"]["skipped"]


def test_by_turns_every_way_runs_as_often(found: Runtime, step: Step) -> None:
    names = ["plain", "captured", "fused"]
    rows = list(run(found, step, [way(name) for name in names], warm=1, repeats=3, turns=True))
    assert [row["recipe"] for row in rows] == ["noise", "captured", "plain", "fused"]  # the timed ones at the end
    assert [row.get("runs") for row in rows] == [None, None, 3, 3]
    assert rows[2]["error"] < 1e-6


def test_one_failure_ends_no_other(found: Runtime, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxloom.speed.fused import Fused

    def broken(*_: object) -> None:
        raise RuntimeError("no such thing\nmore of it")

    monkeypatch.setattr(Fused, "__call__", broken)
    _, fused, plain = run(found, step, [way("fused"), way("plain")], warm=0, repeats=1)
    assert fused == {"recipe": "fused", "skipped": "RuntimeError: no such thing"}
    assert "ms" in plain


def test_what_errs_beyond_the_noise_is_lossy() -> None:
    truth = torch.ones(1, 4, 2)
    assert judged(truth * 1.01, truth, 0.01) == {"error": pytest.approx(0.01), "times_noise": 1.0, "lossy": False}
    assert judged(truth * 1.02, truth, 0.01)["lossy"]
    assert judged(truth, truth, 0.01, lossy=True)["lossy"]
    assert judged(truth * math.nan, truth, 0.01)["lossy"]
    assert said(ValueError("")) == "ValueError: no message"


def test_medians_of_what_was_asked() -> None:
    ran: list[int] = []
    taken = measure(lambda: ran.append(1), CPU, warm=3, repeats=5)
    assert (len(ran), taken.runs) == (8, 5)
    assert Timing.of([3.0, 1.0, 8.0]).facts() == {"ms": 3.0, "ms_low": 1.0, "ms_high": 8.0, "runs": 3}
    assert seconds(lambda: torch.zeros(10), CPU) > 0


def test_clock_and_power_are_of_the_later_samples() -> None:
    told = "1980, 300.5, 700.00\n1500, 690.1, 700.00\n1520, 692.2, 700.00\n[N/A], 1, 2\n1510, 69"
    assert read(told) == {"sm_mhz": 1510, "watts": 691, "watts_limit": 700}
    assert read("No devices were found\n") == {}
    with metered(CPU) as load:
        pass
    assert load == {}


def test_the_peak_is_of_what_is_inside() -> None:
    with peak(CPU) as small:
        torch.zeros(1)
    with peak(CPU) as large:
        torch.ones(64 << 20)
    if small.bytes is None or large.bytes is None:
        pytest.skip("the system tells no peak of memory")
    assert large.bytes - small.bytes > 128 << 20


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<", "attention"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", "products"),
        (
            "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::Gemm",
            "products",
        ),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_poi_fused_gelu_0", "rest"),
        ("triton_red_fused__fused_rms_norm__scaled_dot_product_cudnn_attention__to_copy_add_mul_neg", "rest"),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_the_largest_kernels_are_named() -> None:
    x = torch.randn(256, 256)
    found = kernels(lambda: (x @ x) @ x, CPU, top=1)
    assert found["largest"][0]["kernel"] == "aten::mm"
    assert found["largest"][0]["calls"] == 2
    assert found["attention"] == []
    assert max(found["ms_by_kind"], key=found["ms_by_kind"].get) == "products"
