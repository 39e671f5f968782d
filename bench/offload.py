"""12 B on small GPUs: one picture at caps of 24, 16, 12 and 8 GB, ours by plan and diffusers by each of its ways.

    python bench/full_size.py make --folder /tmp/full
    python bench/offload.py all --folder /tmp/full --out results.json

Every run is a process of its own. PyTorch may take no more than the cap less what the CUDA context takes; what the
process takes in all is read from the driver (NVML) by the parent, which holds no context itself, and is told beside the
plan's prediction. Two pictures are drawn, and the second is timed: text, encoding, steps and decoding, with all copies.
With ``--toy`` the same at toy size, on the CPU too: for trying the script, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from full_size import PROMPT, SIDE, Row, device_of, machine, since, tell, wait, warm

KONTEXT = "flux1-kontext-dev"
CAPS = {False: (24.0, 16.0, 12.0, 8.0), True: (1.0,)}
STEPS = {False: 28, True: 2}
GB = 1e9


# ---------------------------------------------------------------------------------------------------- the driver


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Driver:
    """Bytes of a GPU that are in use, as the driver counts them, and their peak since ``__enter__``."""

    def __init__(self) -> None:
        self.found: Any = None
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            handle = ctypes.c_void_p()
            if library.nvmlInit_v2() == 0 and library.nvmlDeviceGetHandleByIndex_v2(_gpu(), ctypes.byref(handle)) == 0:
                self.found = library, handle
        except OSError:
            pass
        self.before = self.peak = 0

    def used(self) -> int:
        if self.found is None:
            return 0
        memory = _Memory()
        library, handle = self.found
        library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        return int(memory.used)

    def __enter__(self) -> Driver:
        self.before = self.peak = self.used()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.002):
            self.peak = max(self.peak, self.used())

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def row(self) -> Row:
        return {"driver_peak_bytes": self.peak - self.before if self.found else None}


def _gpu() -> int:
    """The number by which the driver knows the GPU that is seen first."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    return int(first) if first.isdigit() else 0


def capped(cap: float, toy: bool) -> Row:
    """Let PyTorch take no more than the cap, less what the driver counts beside it; what the context takes at first."""
    from fluxloom.infer.plan import CONTEXT

    if device_of(toy) != "cuda":
        return {"context_bytes": 0}
    free, total = torch.cuda.mem_get_info()
    torch.ones(64, 64, device="cuda").bfloat16() @ torch.ones(64, 64, device="cuda").bfloat16()  # cuBLAS, too
    torch.cuda.synchronize()
    context = total - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((cap * GB - CONTEXT) / total)
    return {"context_bytes": context, "others_hold_bytes": total - free}


def twice(draw: Callable[[int], Any], toy: bool) -> Row:
    """Seconds of a first picture, which compiles and warms what there is, and of a second."""
    seconds = []
    for seed in (1, 2):
        wait(device_of(toy))
        began = time.perf_counter()
        picture = draw(seed)
        wait(device_of(toy))
        seconds.append(since(began))
    gpu = device_of(toy) == "cuda"
    return {
        "first_s": seconds[0], "picture_s": seconds[1], "size": list(picture.size),
        "torch_peak_bytes": torch.cuda.max_memory_reserved() if gpu else None,
        "torch_live_peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- ours


def ours(folder: Path, toy: bool, cap: float, references: int, linears: str | None, rates: dict[str, float]) -> Row:
    from dataclasses import replace

    from fluxloom.infer.assemble import assemble
    from fluxloom.infer.plan import fit
    from fluxloom.infer.work import MACHINES, Work
    from fluxloom.speed import offload, pictures
    from fluxloom.speed.linear8 import quantise
    from fluxloom.weights.hub import resolve

    device, side = torch.device(device_of(toy)), SIDE[toy]
    row = capped(cap, toy)
    began = time.perf_counter()
    host = torch.device("cpu")
    runtime = assemble(resolve(folder, variant=KONTEXT), host, torch.bfloat16, KONTEXT)
    runtime.spec = replace(runtime.spec, preferred_sizes=((side, side),), min_side=side)
    size = (side, side)
    work = Work.typical(runtime.spec, width=side, height=side, references=(size,) * references, evaluations=STEPS[toy])
    if linears is not None:
        quantise(runtime.transformer, linears)
    if device.type == "cuda":
        pictures.apply(runtime.autoencoder.to(device))  # whose kernels are chosen by where it lies
    found = fit(runtime.spec, int(cap * GB), work, machine=MACHINES["h200"].measured(rates), linears=linears)
    if found.linears is not None and linears is None:
        quantise(runtime.transformer, found.linears)
    if toy:  # which fits any cap
        found = replace(found, stays=frozenset(), streamed=tuple(range(5)), modulation=True, layers=True)
    done = offload.apply(runtime, found, device, executor(runtime, device))
    gc.collect()
    row |= {"load_s": since(began), "planned_peak_bytes": found.peak, "planned_s": found.seconds}
    row |= {"plan": {**{key: value for key, value in asdict(found).items() if key != "stays"}, "stays": [*found.stays]}}
    return (
        row
        | twice(lambda seed: drawn(runtime, seed, side, references, STEPS[toy]), toy)
        | {"slot_copies": done.ring.copies if done.ring else 0}
    )


def executor(runtime: Any, device: torch.device) -> Callable[[Any], Any]:
    from fluxloom.speed.attention import backend_for
    from fluxloom.speed.fused import Fused
    from fluxloom.speed.ops import ops_for

    attend = backend_for(torch.empty(0, device=device, dtype=runtime.dtype), runtime.transformer.spec.head_dim)
    return lambda blocks: Fused(runtime.transformer, attend, ops_for(device), blocks)


def drawn(runtime: Any, seed: int, side: int, references: int, steps: int) -> Any:
    from PIL import Image

    from fluxloom.infer.pipeline import Pipeline
    from fluxloom.infer.request import Reference, Request

    vars(runtime.reader)["_states"].clear()  # each picture reads its prompt
    seen = tuple(Reference(Image.new("RGB", (side, side), "red")) for _ in range(references))
    request = Request(prompt=PROMPT, references=seen, width=side, height=side, steps=steps, seed=seed)
    (result,) = Pipeline(runtime).run(request)
    return result.image


# ---------------------------------------------------------------------------------------------------- diffusers


class Words:
    """Our vocabulary where diffusers expects a tokenizer of transformers."""

    def __init__(self, kind: str, length: int) -> None:
        from fluxloom.weights.vocabularies import bundled

        self.vocabulary, self.model_max_length = bundled(kind), length

    def __call__(self, prompt: Any, **_: Any) -> Any:
        texts = [prompt] if isinstance(prompt, str) else prompt
        ids = torch.tensor([self.vocabulary.encode(text, self.model_max_length) for text in texts])
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    def tokenize(self, prompt: str) -> list[str]:
        """Asked for words that stand for learned embeddings: none do."""
        return []

    def batch_decode(self, ids: Any) -> list[str]:
        """Asked for what was cut off, to warn of it."""
        return []


# By name: how the weights are to leave the GPU. Group offload as its documentation has it: streams, pinned memory.
WAYS: dict[str, Callable[[Any, str], None]] = {
    "model": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "group, blocks": lambda pipe, device: pipe.enable_group_offload(
        onload_device=torch.device(device), offload_type="block_level", num_blocks_per_group=1, use_stream=True,
        record_stream=True,
    ),
    "group, leaves": lambda pipe, device: pipe.enable_group_offload(
        onload_device=torch.device(device), offload_type="leaf_level", use_stream=True, record_stream=True
    ),
    "sequential": lambda pipe, device: pipe.enable_sequential_cpu_offload(device=device),
}  # fmt: skip


def theirs(folder: Path, toy: bool, cap: float, references: int, way: str) -> Row:
    from diffusers import FluxKontextPipeline, FluxPipeline
    from PIL import Image

    device, side = device_of(toy), SIDE[toy]
    row = capped(cap, toy)
    began = time.perf_counter()
    given = {"torch_dtype": torch.bfloat16, "tokenizer": None, "tokenizer_2": None}
    pipe: Any = FluxPipeline.from_pretrained(folder, **given)
    if references:
        pipe = FluxKontextPipeline(**{**pipe.components, "tokenizer": None, "tokenizer_2": None})
    pipe.tokenizer, pipe.tokenizer_2 = Words("clip", 77), Words("t5", 512)
    pipe.set_progress_bar_config(disable=True)
    if device == "cuda":
        WAYS[way](pipe, device)
    seen: Row = (
        {"image": Image.new("RGB", (side, side), "red"), "_auto_resize": False, "max_area": side * side}
        if references
        else {}
    )
    row["load_s"] = since(began)

    def draw(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        asked = {"height": side, "width": side, "num_inference_steps": STEPS[toy], "generator": generator}
        with torch.inference_mode():
            return pipe(prompt=PROMPT, max_sequence_length=512, **asked, **seen).images[0]

    return row | twice(draw, toy)


# ---------------------------------------------------------------------------------------------------- all of them


def run(words: list[str], seconds: float) -> Row:
    """The row of a run in a process of its own, watched from here."""
    began = time.perf_counter()
    with Driver() as driver:
        try:
            ended = subprocess.run(
                [sys.executable, __file__, "one", *words], capture_output=True, text=True, timeout=seconds
            )
            rows = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
            row = rows[-1] if rows else {"error": ended.stderr.strip().splitlines()[-4:]}
        except subprocess.TimeoutExpired:
            row = {"error": [f"no time after {seconds:.0f} s"]}
    return row | driver.row() | {"process_s": since(began)}


def judged(row: Row) -> Row:
    """What the plan said beside what came."""
    peak = row.get("driver_peak_bytes")
    if not peak or "planned_peak_bytes" not in row:
        return row
    return row | {
        "peak_to_planned": round(peak / row["planned_peak_bytes"], 3), "under_cap": peak <= row["cap_GB"] * GB,
        "seconds_to_planned": round(row["picture_s"] / row["planned_s"], 3),
    }  # fmt: skip


def everything(given: argparse.Namespace) -> None:
    end = time.perf_counter() + given.seconds
    results: Row = {**machine(given.toy), "cache": warm(given.folder), "rows": []}
    tell({key: value for key, value in results.items() if key != "rows"})
    for cap in given.caps or CAPS[given.toy]:
        for who in given.who or ["ours", *WAYS]:
            left = end - time.perf_counter()
            words = ["--folder", str(given.folder), "--cap", str(cap), "--by", who]
            words += ["--references", str(given.references), "--rates", json.dumps(given.rates)]
            words += ["--toy"] * given.toy + (["--linears", given.linears] if given.linears else [])
            row = run(words, min(left, given.each)) if left > 10 else {"error": ["skipped: no time left"]}
            row = judged({"cap_GB": cap, "by": who, "references": given.references, **row})
            tell(row)
            results["rows"].append(row)
            given.out.write_text(json.dumps(results, indent=1) + "\n")


def one(given: argparse.Namespace) -> None:
    try:
        if given.by == "ours":
            row = ours(given.folder, given.toy, given.cap, given.references, given.linears, given.rates)
        else:
            row = theirs(given.folder, given.toy, given.cap, given.references, given.by)
    except Exception:  # out of memory, mostly: that, too, is a result
        row = {"error": traceback.format_exc().strip().splitlines()[-4:]}
    tell(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all", "one"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--references", type=int, default=0, choices=(0, 1))
    parser.add_argument("--linears", choices=("fp8", "int8"), help="ours in 8 bits")
    parser.add_argument("--rates", type=json.loads, default={}, help='measured rates of the machine: {"upload": 52}')
    parser.add_argument("--caps", type=float, nargs="*", help="GB; default: 24 16 12 8")
    parser.add_argument("--who", nargs="*", choices=["ours", *WAYS], help="default: all")
    parser.add_argument("--cap", type=float, default=24.0, help="of one")
    parser.add_argument("--by", choices=["ours", *WAYS], default="ours", help="of one")
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    parser.add_argument("--seconds", type=float, default=580, help="runs beyond are ended or skipped")
    parser.add_argument("--each", type=float, default=150, help="seconds that one run may take")
    given = parser.parse_args()
    (everything if given.what == "all" else one)(given)


if __name__ == "__main__":
    main()
