"""``fluxloom plan``: what a request takes, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import Run
from safetensors.torch import save_file

from fluxloom.core.specs import MODELS
from fluxloom.infer.plan import fit

KONTEXT = ("plan", "flux1-kontext-dev", "--vram", "12GB", "--size", "1024x1024", "--references", "1")


def test_a_table_of_stages_and_the_plan_in_sentences(run: Run) -> None:
    ended = run(*KONTEXT)
    assert (ended.code, ended.err) == (0, "")
    table, words = ended.out.split("\n\n")
    rows = [line.split("\t") for line in table.splitlines()]
    assert rows[0] == ["stage", "weights", "activations", "peak", "seconds"]
    assert [row[0] for row in rows[1:]] == ["read", "encode", "sample", "decode", "all"]
    wanted = fit(MODELS["flux1-kontext-dev"], 12 * 10**9)
    assert rows[-1][3:] == [f"{wanted.peak / 1e9:.1f} GB", f"{wanted.seconds:.2f}"]
    assert words.splitlines() == [f"- {word}" for word in wanted.words]


def test_the_same_for_machines(run: Run, here: Path) -> None:
    save_file({"lora_A": torch.zeros(4, 64), "lora_B": torch.zeros(64, 4)}, here / "style.safetensors")
    bare = json.loads(run(*KONTEXT, "--json").out)
    assert bare["peak"] <= 12 * 10**9
    assert bare["peak"] == max(stage["peak"] for stage in bare["stages"])
    assert bare["request"]["references"] == [[1024, 1024]]
    more = json.loads(
        run(*KONTEXT, "--json", "--lora", "style.safetensors", "--steps", "10", "-n", "2", "--true-cfg").out
    )
    assert more["request"] | {"loras": 1024, "evaluations": 10, "pictures": 2, "rows": 2} == more["request"]
    low = json.loads(run(*KONTEXT, "--json", "--linears", "fp8").out)
    assert low["linears"] == "fp8"
    assert low["approximate"] == ["fp8 products"]
    assert low["seconds"] < bare["seconds"]
    slow = json.loads(run(*KONTEXT, "--json", "--rate", "upload=5").out)
    assert slow["seconds"] > bare["seconds"]


def test_any_model_is_planned(run: Run, here: Path) -> None:
    for name in MODELS:
        ended = run("plan", name, "--json")
        assert (ended.code, ended.err) == (0, ""), name
        assert json.loads(ended.out)["host"] == 0
    from fluxloom.weights.load import ASSETS

    by_card = json.loads(run("plan", str(ASSETS / "nano"), "--machine", "cpu", "--json").out)
    assert by_card["model"] == "nano"
    assert by_card["machine"] == "two cores of a processor"


def test_a_file_is_planned_with_its_own_shape(run: Run, here: Path) -> None:
    from tiny import DEV, transformer

    save_file(transformer(DEV, 1).state_dict(), here / "flux.safetensors")
    found = json.loads(run("plan", "flux.safetensors", "--variant", "flux1-dev", "--json").out)
    whole = json.loads(run("plan", "flux1-dev", "--json").out)
    assert found["model"] == "flux1-dev"
    assert found["peak"] < whole["peak"] - 23 * 10**9


BAD = {
    "too small a cap": (
        [*KONTEXT[:3], "2GB"],
        "got 2.0 GB of memory for flux1-kontext-dev at 1024x1024, allowed 3.0 GB and more",
    ),
    "no cap": ([*KONTEXT[:3], "lots"], "got memory 'lots', allowed a number and a unit, try 12GB"),
    "unknown model": (["plan", "flux1-kontext"], "try flux1-kontext-dev"),
    "unknown form": (["plan", "flux1-dev", "--linears", "nf4"], "allowed fp8, int8"),
    "unknown machine": (["plan", "flux1-dev", "--machine", "abacus"], "allowed h200, cpu"),
    "unknown rate": (["plan", "flux1-dev", "--rate", "speed=3"], "got rate speed=3"),
    "no rate": (["plan", "flux1-dev", "--rate", "upload"], "got --rate 'upload', allowed NAME=VALUE"),
    "unknown solver": (["plan", "flux1-dev", "--solver", "eular"], "got solver 'eular'"),
    "a size that is none": (["plan", "flux1-dev", "--size", "1000x1001"], "got size 1000x1001"),
    "references for who sees none": (["plan", "flux1-dev", "--references", "2"], "allowed for models that edit"),
    "a missing LoRA": (["plan", "flux1-dev", "--lora", "style.safetensors"], "which is not there"),
    "8 bits on a processor": (["plan", "nano", "--machine", "cpu", "--linears", "fp8"], "try leaving it out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, run: Run) -> None:
    words, said = BAD[name]
    ended = run(*words)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("fluxloom: error: got ")
    assert said in ended.err
    assert ended.err.count("\n") == 1
