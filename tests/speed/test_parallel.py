"""Several processes compute what one computes; what fails in one of them is told by the first, and ends all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxloom.errors import BadInput, Failure
from fluxloom.speed import launch
from fluxloom.speed.exchange import heads_each, shares
from fluxloom.speed.team import team_of

HERE = Path(__file__).parent
CPU = torch.device("cpu")
LIMIT = 2e-6  # of the largest velocity; attention itself is to the bit
Found = tuple[int, list[dict[str, Any]]]


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Found]:
    """Run cases of ranks.py in several processes: the exit code, and what each rank found."""
    paths = [str(HERE.parent / name) for name in ("infer", "parity")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]))

    def run(count: int, *cases: str) -> Found:
        code = launch.start(count, ["-W", "error", str(HERE / "ranks.py"), str(tmp_path), *cases])
        return code, [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]

    return run


@pytest.mark.parametrize(
    ("tokens", "ranks", "want"), [(8, 2, (4, 4)), (11, 3, (4, 4, 3)), (1, 3, (1, 0, 0)), (0, 2, (0, 0))]
)
def test_tokens_are_cut_evenly(tokens: int, ranks: int, want: tuple[int, ...]) -> None:
    assert shares(tokens, ranks) == want


def test_heads_divide_or_are_refused() -> None:
    assert [heads_each(24, n) for n in (2, 3, 4, 6, 8)] == [12, 8, 6, 4, 3]
    with pytest.raises(BadInput, match="got 5 GPUs for 24 heads, allowed 1, 2, 3, 4, 6, 8, 12, 24, try"):
        heads_each(24, 5)


def test_two_processes_compute_what_one_does(ranks: Callable[..., Found], tmp_path: Path) -> None:
    code, found = ranks(
        2, "exchange", "rooms", "velocities", f"with_lora={tmp_path}/style.safetensors", "limits", "failure=1"
    )
    assert code == 3
    assert [one["exchange"] for one in found] == [0.0]
    assert found[0]["rooms"] == 0.0
    assert found[0]["velocities"] < LIMIT
    *errors, difference = found[0]["with_lora"]
    assert max(errors) < LIMIT
    assert difference > 1e-2
    tokens, heads = found[0]["limits"]
    assert tokens.startswith("BadInput: got 1 tokens of text and 35 of the picture for 2 GPUs, allowed")
    assert heads.startswith("BadInput: got 2 GPUs for 3 heads, allowed 1, 3, try")
    first, later = found[0]["failure"]
    assert first.startswith("Failure: got a failure on GPU 1 (ValueError: no more memory here), allowed")
    assert later.startswith("Failure: got a picture for GPUs of which one failed before")


def test_three_processes_with_uneven_shares(ranks: Callable[..., Found]) -> None:
    code, found = ranks(3, "exchange", "rooms", "velocities", "failure=0")
    assert code == 3
    assert found[0]["exchange"] == found[0]["rooms"] == 0.0
    assert found[0]["velocities"] < LIMIT
    assert found[0]["failure"][0] == "ValueError: no more memory here"  # its own, as it is


def test_ranks_that_do_not_see_each_others_memory_exchange_by_messages(ranks: Callable[..., Found]) -> None:
    code, found = ranks(2, "unseen")
    assert code == 0
    first, second = (one["unseen"] for one in found)
    assert first[0] == second[0] == 0.0
    assert first[1:] == [
        "got ranks that do not see each other's memory (no space left on the disk), "
        "what they exchange goes through gloo, which is slower"
    ]
    assert second[1:] == []


def test_a_failure_before_memory_is_shared_ends_all(ranks: Callable[..., Found]) -> None:
    code, found = ranks(2, "early_failure=1")
    assert code == 3
    assert found[0]["early_failure"][0].startswith("Failure: got a failure on GPU 1 (ValueError: no more memory here)")


def test_a_process_that_is_killed_ends_all(ranks: Callable[..., Found]) -> None:
    with pytest.raises(Failure, match="got the process of GPU 1 ended by SIGKILL, allowed all of them to go on, try"):
        ranks(2, "killed")


def test_several_gpus_ask_for_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launch.lends(1)
    with pytest.raises(launch.Elsewhere) as asked:
        launch.lends(2)
    assert asked.value.gpus == 2
    with pytest.raises(BadInput, match="got 0 GPUs, allowed 1 or more"):
        launch.lends(0)
    with pytest.raises(BadInput, match="got 2 GPUs in one process, allowed 1, try `torchrun"), team_of(2, CPU):
        pass
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert launch.lends(2)
    assert not launch.lends(1)  # processes that know nothing of each other
    with pytest.raises(BadInput, match="got 3 GPUs in a world of 2 processes, allowed as many, try --gpus 2"):
        launch.lends(3)
    monkeypatch.setenv("RANK", "0")
    assert not launch.lends(2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("form", ["float32", "bfloat16", "bfloat16=fa3-fp8"])
def test_two_gpus_compute_what_one_does(ranks: Callable[..., Found], form: str) -> None:
    if "fa3" in form:
        pytest.importorskip("fa3_fwd_interface")
    code, found = ranks(2, "on_gpus=" + form)
    assert code == 0
    assert found[0]["on_gpus"] < {"float32": 1e-5, "bfloat16": 3e-2}.get(form, 2e-1)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("how", ["direct", "nccl"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_gpu_that_fails_ends_captured_passes_on_both(ranks: Callable[..., Found], rank: int, how: str) -> None:
    began = time.monotonic()
    code, found = ranks(2, f"on_gpus_failure={rank}={how}")
    assert code != 0
    assert time.monotonic() - began < 90  # NCCL would wait for ten minutes
    assert "no more memory here" in found[0]["on_gpus_failure"][0]
