"""Which kernels really ran, and where the time went: one call under torch.profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# By the names that libraries give their kernels, and torch its operators on a processor; the first that fits counts.
_KINDS = (
    ("attention", re.compile(r"flash|fmha|sdpa|scaled_dot_product|attention|_attn", re.IGNORECASE)),
    ("products", re.compile(r"gemm|nvjet|cutlass|cublas|xmma|scaled_mm|int_mm|::(add)?mm|::linear|mkldnn", re.I)),
    ("copies", re.compile(r"memcpy|memset|aten::copy_|aten::cat|CatArray", re.IGNORECASE)),
)
# What torch.compile writes around products and attention, named after whatever it fuses: pointwise, reductions.
_FUSED = ("triton_poi_", "triton_red_", "triton_per_")
_MARKS = ("##", "Torch-Compiled Region", "ProfilerStep")  # ranges that compiled code marks on the device's timeline
_LONG = 160  # letters of a kernel's name that are kept: templates go on for pages


def kind_of(kernel: str) -> str:
    """attention, products, copies, or the rest: elementwise work, norms, reductions."""
    if kernel.startswith(_FUSED):
        return "rest"
    return next((kind for kind, words in _KINDS if words.search(kernel)), "rest")


def kernels(call: Callable[[], object], device: torch.device, top: int = 3) -> dict[str, Any]:
    """Of one warm call: the largest ``top`` kernels by their time, those of attention, and the time by kind.

    On a GPU these are kernels of the device, as CUPTI saw them (in replayed graphs too); elsewhere operators without
    those that they call. Times in milliseconds under the profiler, which slows a processor down: read them as shares.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    times: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for event in found.key_averages():
        on_device = str(event.device_type).endswith("CUDA")
        if on_gpu and (not on_device or event.key.startswith(_MARKS) or getattr(event, "is_user_annotation", False)):
            continue  # an operator or a range: the kernels within are listed beside it
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[event.key] = times[event.key][0] + spent / 1e3, times[event.key][1] + event.count
    ranked = sorted(((name, *rest) for name, rest in times.items() if rest[0] > 0), key=lambda row: -row[1])
    by_kind: dict[str, float] = defaultdict(float)
    for name, ms, _ in ranked:
        by_kind[kind_of(name)] += ms
    rows = [{"kernel": name[:_LONG], "kind": kind_of(name), "ms": round(ms, 3), "calls": n} for name, ms, n in ranked]
    return {
        "largest": rows[:top],
        "attention": [row for row in rows if row["kind"] == "attention"][:2],
        "ms_by_kind": {kind: round(ms, 3) for kind, ms in sorted(by_kind.items())},
    }
