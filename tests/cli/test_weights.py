"""``fluxloom info`` and ``fluxloom convert`` on checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from runs import Run
from safetensors.torch import save_file
from tiny import DEV, transformer

from fluxloom.core.specs import MODELS
from fluxloom.weights.load import ASSETS, digest

NANO = str(ASSETS / "nano")


def facts(run: Run, *words: str) -> dict[str, object]:
    ended = run("info", *words, "--json")
    assert (ended.code, ended.err) == (0, "")
    told: dict[str, object] = json.loads(ended.out)
    return told


def test_info_on_a_folder(run: Run) -> None:
    told = facts(run, NANO)
    kinds = {part["kind"]: part for part in told["components"]}  # type: ignore[attr-defined]
    assert kinds.keys() == {"transformer", "autoencoder", "text"}
    assert kinds["transformer"]["member"] == "nano"
    assert kinds["transformer"]["formats"]["int6"].endswith("%")
    assert told["runs"] == "generate and edit, as nano"
    assert "int6     99.8%" in run("info", NANO).out


def test_info_on_a_file(run: Run, here: Path) -> None:
    save_file(transformer(DEV, 1).state_dict(), here / "flux1-kontext-dev.safetensors")
    told = facts(run, "flux1-kontext-dev.safetensors")
    (part,) = told["components"]  # type: ignore[misc]
    assert (part["candidates"], part["parameters"]) == ([], sum(p.numel() for p in transformer(DEV, 1).parameters()))
    assert told["sha256"] == digest(here / "flux1-kontext-dev.safetensors")
    assert str(told["runs"]).startswith("give it --variant")
    assert "T5" in str(told["runs"])


def test_info_on_a_member(run: Run) -> None:
    told = facts(run, "flux1-dev")
    source = MODELS["flux1-dev"].source
    assert source is not None
    assert (told["repository"], told["sha256"]) == (source.repo, source.sha256)
    assert "huggingface.co" in str(told["gated"])


def test_info_on_a_lora(run: Run, here: Path) -> None:
    at = "transformer.transformer_blocks.0.attn.to_q"
    rows = {f"{at}.lora_A.weight": torch.randn(4, 3072), f"{at}.lora_B.weight": torch.randn(3072, 4)}
    save_file(rows, here / "lora.safetensors")
    told = facts(run, "lora.safetensors")
    assert told["lora"]["ranks"] == {"4": 1}  # type: ignore[index]


@pytest.mark.parametrize("name", ["m.safetensors", "m.gguf", "m.bin", "m.ckpt"])
def test_info_on_what_is_none(run: Run, here: Path, name: str) -> None:
    ended = run("info", name)
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
    (here / name).write_bytes(b"nonsense, and more of it")
    ended = run("info", name)
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert "try" in ended.err


def test_convert(run: Run, here: Path) -> None:
    ended = run("convert", NANO, "nano.safetensors", "--to", "int8", "--json")
    assert (ended.code, ended.err) == (0, "")
    report = json.loads(ended.out)
    assert report["member"] == "nano"
    assert 0 < report["mean"] < 0.01
    assert list(report["worst"]) == sorted(report["errors"], key=report["errors"].get, reverse=True)[:8]
    (part,) = facts(run, "nano.safetensors")["components"]  # type: ignore[misc]
    assert (part["member"], part["told by"]) == ("nano", "metadata")
    ended = run("convert", "nano.safetensors", "again.safetensors", "--to", "fp8")
    assert (ended.code, ended.err) == (0, "")
    assert "relative RMS error" in ended.out


def test_convert_a_part(run: Run, here: Path) -> None:
    ended = run("convert", NANO, "vae", "--to", "diffusers", "--component", "autoencoder")
    assert (ended.code, ended.err) == (0, "")
    assert sorted(path.name for path in (here / "vae").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["out.safetensors", "--to", "int3"], "got --to 'int3'"),
        (["there.safetensors", "--to", "fp8"], "which exists"),
        (["out.safetensors", "--to", "fp8", "--component", "t5"], "got --component t5, allowed"),
        (["out.safetensors", "--to", "fp8", "--variant", "flux1-dev"], "got variant 'flux1-dev', allowed nano"),
        (["out.gguf", "--to", "fp8"], r"allowed a .safetensors file"),
        ([NANO, "--to", "fp8", "--force"], "got .* for both"),
    ],
)
def test_convert_refuses(run: Run, here: Path, words: list[str], what: str) -> None:
    (here / "there.safetensors").write_text("precious")
    ended = run("convert", NANO, *words)
    assert (ended.code, ended.out) == (2, "")
    assert re.search(what, ended.err)
    assert [path.name for path in here.iterdir()] == ["there.safetensors"]
