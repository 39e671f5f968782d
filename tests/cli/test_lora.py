"""``fluxloom lora``: inspect, convert, merge, extract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_makers import MAKERS
from runs import QUICK, Run

from fluxloom.cli.lora import weighted
from fluxloom.core.specs import MODELS
from fluxloom.weights.lora_file import save_lora

NANO = MODELS["nano"].transformer


@pytest.fixture
def file(here: Path) -> Path:
    made = MAKERS["kohya"](NANO, 1)
    state = {key: tensor * 0.2 if "up" in key else tensor for key, tensor in made.state.items()}
    return save_lora(state, here / "style.safetensors", made.metadata)


def test_inspect(run: Run, file: Path) -> None:
    ended = run("lora", "inspect", "style.safetensors", "--base", "nano", "--json")
    assert (ended.code, ended.err) == (0, "")
    facts = json.loads(ended.out)
    assert (facts["dialect"], facts["bases"], facts["ranks"]) == ("kohya", ["nano"], {"4": 47})
    assert facts["matched"] == facts["keys"]
    assert 0.01 < facts["change"] < 100
    ended = run("lora", "inspect", "style.safetensors")
    assert (ended.code, ended.err) == (0, "")
    assert "kohya sd-scripts" in ended.out
    assert "rank 4" in ended.out
    assert "change" not in ended.out


@pytest.mark.parametrize("to", ["diffusers", "official"])
def test_convert_there_and_back(run: Run, file: Path, here: Path, to: str) -> None:
    assert run("lora", "convert", "style.safetensors", "there.safetensors", "--to", to).code == 0
    ended = run("lora", "convert", "there.safetensors", "back.safetensors", "--to", "kohya", "--json")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out)["from"] == to
    changes = [
        json.loads(run("lora", "inspect", name, "--base", "nano", "--json").out)["change"]
        for name in ("style.safetensors", "there.safetensors", "back.safetensors")
    ]
    assert changes[1:] == pytest.approx([changes[0]] * 2, rel=1e-4)


def test_merge_and_extract(run: Run, file: Path, here: Path) -> None:
    ended = run("lora", "merge", "nano", "style.safetensors:0.5", "merged", "--json")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out)["merged"] == [{"file": "style.safetensors", "weight": 0.5}]
    ended = run("generate", "a cat", "--model", "./merged", "--seed", "5", *QUICK)
    assert (ended.code, ended.err) == (0, "")
    ended = run("lora", "extract", "nano", "merged", "found.safetensors", "--rank", "8")
    assert (ended.code, ended.err) == (0, "")
    half = json.loads(run("lora", "inspect", "found.safetensors", "--base", "nano", "--json").out)
    assert set(half["ranks"]) == {"8"}
    assert half["bases"] == ["nano"]


# ---------------------------------------------------------------------------------------------- drawing with them


def receipt_of(run: Run, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("info", name, "--json").out)["receipt"]
    return found


def test_generate_and_edit_and_replay(run: Run, file: Path, here: Path) -> None:
    file.with_name("other.safetensors").write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    words = ("--seed", "5", "--json", *QUICK)
    assert run("generate", "a cat", "--out", "plain.png", *words).code == 0
    ended = run("generate", "a cat", "--lora", "style.safetensors:0.1", "--out", "styled.png", *words)
    assert (ended.code, ended.err) == (0, "")
    loras = ("--lora", "style.safetensors:0.1", "--lora", "other.safetensors:-0.05")
    ended = run("edit", "styled.png", "make it blue", *loras, "--out", "edit.png", *words)
    assert (ended.code, ended.err) == (0, "")
    plain, styled, edit = (receipt_of(run, name) for name in ("plain.png", "styled.png", "edit.png"))
    assert plain["pixels"] != styled["pixels"]
    assert plain["request"]["loras"] == []
    (entry,) = styled["request"]["loras"]
    assert (entry["file"], entry["weight"], entry["blocks"]) == ("style.safetensors", 0.1, [])
    told = [(one["file"], one["weight"]) for one in edit["request"]["loras"]]
    assert told == [("style.safetensors", 0.1), ("other.safetensors", -0.05)]
    assert run("info", "edit.png").code == 0
    for name in ("styled.png", "edit.png"):
        assert json.loads(run("replay", name, "--json").out)["verdict"] == "bit-exact"
    away = here.parent / "away.safetensors"
    file.rename(away)
    ended = run("replay", "styled.png")
    assert ended.code == 1
    assert "the LoRA style.safetensors" in ended.err
    assert run("replay", "styled.png", "--input", str(away)).code == 0


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [
        ("none.safetensors", 2, "got LoRA 'none.safetensors', which is not there, allowed a .safetensors file"),
        ("style.safetensors:101", 2, "got LoRA weight 101.0, allowed -100 to 100, try 100"),
        ("style.safetensors:nan", 2, "got LoRA weight nan"),
        ("style.safetensors:x", 2, "got LoRA 'style.safetensors:x', which is not there"),
        ("foreign.safetensors", 1, "got LoRA foreign.safetensors: "),
    ],
)
def test_refused_before_drawing(run: Run, file: Path, here: Path, word: str, code: int, said: str) -> None:
    save_lora({"lora_unet_down_blocks_0.alpha": torch.ones(1)}, here / "foreign.safetensors", {})
    before = sorted(here.iterdir())
    ended = run("generate", "a cat", "--lora", word, *QUICK)
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert sorted(here.iterdir()) == before


def test_help_tells_of_them(run: Run) -> None:
    for command in ("generate", "edit"):
        assert "A LoRA: FILE or FILE:WEIGHT; may be given several times." in run(command, "--help").out


BAD = {
    "no file": (["inspect", "none.safetensors"], 2, "which is not there"),
    "no subcommand": ([], 2, "try `fluxloom lora inspect`"),
    "nothing to merge": (["merge", "nano", "merged"], 2, "got 2 words, allowed BASE LORA[:WEIGHT]... DST"),
    "weight": (
        ["merge", "nano", "style.safetensors:1000", "merged"],
        2,
        "got LoRA weight 1000.0, allowed -100 to 100, try 100",
    ),
    "unknown base": (["inspect", "style.safetensors", "--base", "nono"], 2, "got 'nono', allowed nano"),
    "unknown dialect": (
        ["convert", "style.safetensors", "x.safetensors", "--to", "comfy"],
        2,
        "allowed diffusers, kohya",
    ),
    "pickle": (["convert", "style.safetensors", "x.bin", "--to", "kohya"], 2, "try x.safetensors"),
    "zero": (["inspect", "zero.safetensors"], 1, "without effect"),
    "foreign": (["inspect", "foreign.safetensors"], 1, "Stable Diffusion"),
    "unknown keys": (["convert", "extra.safetensors", "x.safetensors", "--to", "kohya"], 1, "1 tensors that are not"),
    "equal": (["extract", "nano", "nano", "x.safetensors"], 1, "equal"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line(run: Run, file: Path, here: Path, name: str) -> None:
    made = MAKERS["kohya"](NANO, 1)
    save_lora({k: torch.zeros_like(t) for k, t in made.state.items()}, here / "zero.safetensors", {})
    save_lora({"lora_unet_down_blocks_0.alpha": torch.ones(1)}, here / "foreign.safetensors", {})
    save_lora({**made.state, "extra": torch.ones(1)}, here / "extra.safetensors", {})
    before = sorted(here.iterdir())
    words, code, said = BAD[name]
    ended = run("lora", *words)
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith("fluxloom: error: got ")
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert sorted(here.iterdir()) == before


def test_weights_behind_a_colon(here: Path) -> None:
    assert weighted("a/b.safetensors") == (Path("a/b.safetensors"), 1.0)
    assert weighted("a/b.safetensors:0.8") == (Path("a/b.safetensors"), 0.8)
    assert weighted("C:b.safetensors") == (Path("C:b.safetensors"), 1.0)
    (here / "odd:2").write_text("")
    assert weighted("odd:2") == (Path("odd:2"), 1.0)
