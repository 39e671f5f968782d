"""Others beside ours: the same velocity from the same numbers, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from fluxloom.bench import peers, rivals
from fluxloom.bench.peers import Comparison
from fluxloom.bench.rivals import RIVALS, Rival
from fluxloom.bench.subject import Step, error, wide
from fluxloom.bench.worker import GROUND, MARK, Scene, Task, heard, rows
from fluxloom.errors import BadInput
from fluxloom.infer.runtime import Runtime

CPU = torch.device("cpu")
T2I = Scene("t2i", (64, 64))
TASK = Task("", "nano", "cpu", "float32", (T2I, Scene("kontext", (64, 64), ((64, 64),))), "", repeats=2)


@pytest.mark.parametrize("name", ["official eager", "diffusers eager"])
@pytest.mark.filterwarnings("ignore")  # of theirs, about themselves
def test_rivals_compute_the_same_from_the_same_memory(name: str, found: Runtime, step: Step) -> None:
    rival = next(one for one in RIVALS if one.name == name)
    assert rivals.refusal(rival, CPU) is None
    inputs = step.to(torch.float32)
    with torch.inference_mode():
        made = rivals.make(rival, found.transformer)
        assert error(made(inputs), wide(found.transformer, inputs)) < 1e-5
        other = Step(inputs.img, (0.25, 0.25), inputs.given)
        assert error(made(other), wide(found.transformer, inputs)) > 1e-3
    ours = {p.untyped_storage().data_ptr() for p in found.transformer.parameters()}
    theirs = list(made.module.parameters())
    shared = sum(p.nbytes for p in theirs if p.untyped_storage().data_ptr() in ours)
    assert shared / sum(p.nbytes for p in theirs) > 0.95  # all but the swapped halves of the last layer


@pytest.mark.slow  # a compiler of C++ works for most of it
@pytest.mark.filterwarnings("ignore")
def test_a_searched_rival_is_the_same_and_compiled_once_a_kind_of_block(found: Runtime, step: Step) -> None:
    inputs = step.to(torch.float32)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    with torch.no_grad():
        made = rivals.make(Rival("any", "diffusers", compiled=True, search="lists"), found.transformer)
        assert error(made(inputs), wide(found.transformer, inputs)) < 1e-5
    # of five blocks: the double kind, the single kind after a double one, and after its own, where strides differ
    assert graphs["unique_graphs"] - before == 3


def test_searches_are_torchs_own_options_and_need_no_mode() -> None:
    known = set(torch._inductor.list_options())
    for one in RIVALS:
        assert not (one.mode and one.search), f"{one.name}: torch.compile takes a mode or options"
        assert one.search is None or (one.compiled and known >= set(rivals._SEARCHES[one.search]))
    assert {one.search for one in RIVALS if one.fp8 and not one.extra} == {"lists"}  # what peers are measured with


@pytest.mark.parametrize(
    ("rival", "why"),
    [
        (Rival("a", "diffusers", attention="cudnn"), "needs a GPU for cuDNN attention"),
        (Rival("b", "official", attention="cudnn-held", compiled=True), "needs a GPU for cuDNN attention"),
        (Rival("c", "diffusers", attention="fa3"), "not installed: fa3_fwd_interface"),
        (Rival("d", "official"), None),
    ],
)
def test_what_cannot_run_says_why(rival: Rival, why: str | None) -> None:
    assert rivals.refusal(rival, CPU) == why


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    reasons = {one.name: rivals.refusal(one, CPU) for one in RIVALS}
    assert reasons["official eager"] == "not installed: fluxbfl"
    assert reasons["diffusers fp8 compiled cudnn"] == "not installed: diffusers, torchao"
    assert reasons["cache-dit compiled cudnn"] == "not installed: diffusers, cache_dit"


@pytest.mark.slow
def test_a_run_has_the_machine_then_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.WAYS, "cpu", ("plain+float32", "fused+bfloat16"))
    told: list[str] = []
    found = list(Comparison(TASK, ["ours", "diffusers compiled cudnn-held"], told=told.append).run())
    assert told[:3] == [GROUND, "ours plain+float32", "ours fused+bfloat16"]
    by = {(row["peer"], row.get("scene")): row for row in found}
    for scene in ("t2i", "kontext"):
        ground, plain, low = (by[name, scene] for name in told[:3])
        assert ground["floor_ms"]["float32"] > 0
        assert plain["error"] < 1e-6
        assert plain["times_floor"] == pytest.approx(plain["ms"] / ground["floor_ms"]["float32"], rel=1e-3)
        assert low["floor_ms"] == ground["floor_ms"]["bfloat16"]
        assert low["times_noise"] < 1.25
        assert (plain["ours"], plain["lossy"], plain["runs"]) == (True, False, 2)
        assert plain["kernels"]["largest"][0]["kind"] == "products"
        assert min(plain["ms"], low["ms"]) > 0
    skipped = {row["peer"]: row["skipped"] for row in found if "skipped" in row}
    assert skipped["diffusers compiled cudnn-held"] == "needs a GPU for cuDNN attention"


def test_time_over_is_told() -> None:
    (ground, plain) = Comparison(TASK, ["ours plain+float32"], seconds=1).run()
    assert ground["skipped"] == plain["skipped"] == "no time left of 1 s"


def test_a_worker_that_hangs_or_crashes_takes_no_other_with_it() -> None:
    hang = [sys.executable, "-u", "-c", f"import time; print('{MARK}{{\"a\": 1}}'); time.sleep(60)"]
    began = time.monotonic()
    found = list(_of(hang, seconds=3))
    assert found == [{"a": 1}, {"skipped": "ended: no time left"}]
    lines = f'import time; print(\'{MARK}{{"at": "its first step"}}\'); time.sleep(60)'
    assert list(_of([sys.executable, "-u", "-c", lines], seconds=3)) == [
        {"skipped": "ended: no time left, at its first step"}
    ]
    assert time.monotonic() - began < 30
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert list(_of([sys.executable, "-c", child], seconds=60)) == []  # its child holds the pipe
    assert time.monotonic() - began < 40
    crash = [sys.executable, "-c", "print('some library speaks'); raise SystemExit(7)"]
    assert list(_of(crash, seconds=60)) == [{"skipped": "ended with code 7", "said": ["some library speaks"]}]


def _of(command: list[str], seconds: float) -> list[dict[str, object]]:
    worker = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        return list(peers._rows(worker, time.monotonic() + seconds))
    finally:
        peers._end(worker)


def test_a_task_travels_as_text_and_rows_come_back() -> None:
    task = replace(TASK, who="official eager", folder="somewhere")
    assert Task.from_json(task.to_json()) == task
    assert heard(f'{MARK}{{"ms": 2.5}}\n') == {"ms": 2.5}
    assert heard(f'50%|#####  {MARK}{{"ms": 2.5}}\n') == {"ms": 2.5}
    assert heard("a warning") is None


def test_faults_of_others_are_rows(tmp_path: object) -> None:
    (row,) = rows(replace(TASK, who="ours captured", folder=str(tmp_path)))
    assert row == {"skipped": "RuntimeError: CUDA graphs need a GPU"}
    assert "cuDNN" in next(iter(rows(replace(TASK, who="official compiled cudnn-held"))))["skipped"]


def test_who_takes_part() -> None:
    everyone = Comparison(TASK).names()
    assert everyone[0] == "ours plain+float32"
    assert "diffusers compiled cudnn" in everyone
    assert "diffusers tuned cudnn" not in everyone  # an extra
    assert Comparison(TASK, ["tuned"]).names() == ["diffusers tuned cudnn"]
    with pytest.raises(BadInput, match="got --only nobody, allowed parts of ours plain"):
        Comparison(TASK, ["nobody"]).names()
