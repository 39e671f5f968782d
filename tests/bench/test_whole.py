"""Whole pictures and whole loads, stage by stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fluxloom.bench import image, load
from fluxloom.bench.load import files_of, prepare, resident
from fluxloom.bench.subject import random_runtime, runtime
from fluxloom.core.specs import ModelSpec
from fluxloom.errors import BadInput, UnknownModel

CPU = torch.device("cpu")
STAGES = ("text_s", "first_step_s", "other_steps_s", "decode_s", "save_s")


def test_the_stages_of_a_picture_add_up(toy: ModelSpec) -> None:
    found = random_runtime(toy, CPU, torch.float32, words=True)
    told: list[str] = []
    cold, warm, decoder = image.run(found, (256, 256), references=1, steps=3, pictures=2, told=told.append)
    assert [cold["picture"], warm["picture"]] == ["cold", "warm"]
    for row in (cold, warm):
        assert row["total_s"] == pytest.approx(sum(row[stage] for stage in STAGES), abs=1e-3)
        assert all(row[stage] > 0 for stage in STAGES)
        assert row["steps"] == 3
        assert row["step_ms"] == pytest.approx(1e3 * row["other_steps_s"] / 2, abs=0.2)
    assert (decoder["picture"], len(told)) == ("decoder alone", 3)
    assert decoder["decode_s"] > 0


def test_loads_say_how_much_was_in_memory() -> None:
    (row,) = load.run("nano", CPU, torch.float32, cache="warm", repeats=1)
    assert row["ready_s"] > 0
    assert row["files_bytes"] > 20e6
    assert row["in_page_cache"] in (None, 1.0)
    assert all(path.is_file() for path in files_of("nano"))
    with pytest.raises(BadInput, match="there is nothing to load"):
        files_of("flux1-dev")
    with pytest.raises(UnknownModel):
        runtime("flux9-dev", CPU, torch.float32)


def test_the_page_cache_is_seen_and_set(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(1 << 20))
    prepare([path], "warm")
    share = resident([path])
    if share is None:
        pytest.skip("the system does not tell what is in its page cache")
    assert share == 1.0
    prepare([path], "cold")
    assert resident([path]) in (0.0, 1.0)  # a file system in memory keeps them
    assert resident([]) is None
    with pytest.raises(BadInput, match="got --cache 'hot', allowed as-is, warm, cold"):
        prepare([path], "hot")
