"""What a reference means before anything of it is fetched, and ``fluxloom info`` on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer, Repo
from lora_makers import MAKERS
from safetensors.torch import save
from test_hub import BFL, KREA, repository, unhashed
from tiny import DEV
from torch import Tensor

from fluxloom.cli.main import main
from fluxloom.errors import BadInput, Failure, UnknownModel
from fluxloom.weights.download import Hub
from fluxloom.weights.hub import resolve
from fluxloom.weights.survey import survey

REDUX = f"{BFL}/FLUX.1-Redux-dev"


def weights_asked_for(server: HubServer) -> list[str | None]:
    """Ranges of what was asked of the storage: None would be a whole file."""
    return [one.range for one in server.seen if one.storage]


def test_a_member_says_what_would_be_fetched(hub: Hub, server: HubServer) -> None:
    server.repos[KREA] = repository("flux1-krea-dev.safetensors")
    told = survey("flux1-krea-dev", hub=hub)
    parts = {part["part"]: part for part in told["parts"]}
    assert list(parts) == ["transformer", "autoencoder", "clip", "t5", "tokenizer", "tokenizer_2"]
    assert parts["transformer"]["from"] == f"{KREA}@{'a' * 40}:flux1-krea-dev.safetensors"
    assert parts["transformer"]["bytes to fetch"] == len("flux1-krea-dev.safetensors")
    assert told["bytes to fetch"] == sum(part["bytes to fetch"] for part in parts.values()) > 0
    assert (told["member"], told["runs"], told["lacks"]) == (
        "flux1-krea-dev",
        "as flux1-krea-dev, once it is fetched",
        None,
    )
    assert server.paths(part="resolve") == []
    assert hub.cached(KREA, "main") is None
    resolve("flux1-krea-dev", hub=hub)
    found = resolve("flux1-krea-dev", hub=hub, fetch=False)
    assert {part.lacks for part in found.parts.values()} == {0}
    assert found.parts == resolve("flux1-krea-dev", hub=hub).parts


def test_a_repository_lists_its_files_and_reads_one_header(
    hub: Hub, server: HubServer, states: Mapping[str, dict[str, Tensor]]
) -> None:
    server.repos["someone/tune"] = Repo({"tune.safetensors": save(states["transformer"]), "a.txt": b"x" * 2_000_000})
    told = survey("someone/tune", hub=hub)
    assert told["files"]["a.txt"] == "2.0 MB"
    assert told["commit"] == "a" * 40
    (part,) = told["components"]
    assert part["parameters"] == sum(tensor.numel() for tensor in states["transformer"].values())
    assert part["formats"] == {"float32": "100.0%"}
    assert told["runs"].startswith("give it --variant")
    assert "hf download" in told["lacks"]  # the encoders are nowhere
    assert told["bytes to fetch"] == len(server.repos["someone/tune"].files["tune.safetensors"])
    assert set(weights_asked_for(server)) == {"bytes=0-262143"}
    assert hub.cached("someone/tune", "main") is None
    server.repos[KREA] = repository("flux1-krea-dev.safetensors")
    resolve("flux1-krea-dev", hub=hub)
    whole = survey("someone/tune:tune.safetensors", hub=hub)
    assert whole["lacks"] is None
    assert {part["part"]: part["bytes to fetch"] > 0 for part in whole["parts"]}["t5"] is False


def test_of_a_file_that_headers_do_not_tell_only_the_listing_is_read(hub: Hub, server: HubServer) -> None:
    server.repos["city/flux-gguf"] = Repo({"flux1-dev-Q4_0.gguf": b"4" * 10, "flux1-dev-Q8_0.gguf": b"8" * 20})
    told = survey("city/flux-gguf", hub=hub)
    assert list(told["files"]) == ["flux1-dev-Q4_0.gguf", "flux1-dev-Q8_0.gguf"]
    assert "name one" in told["lacks"]
    told = survey("city/flux-gguf:flux1-dev-Q8_0.gguf", hub=hub)
    assert (told["runs"], told["bytes to fetch"]) == ("what it is shows once it is fetched", 20)
    assert weights_asked_for(server) == []
    with pytest.raises(BadInput, match=r"which is not in city/flux-gguf.*try flux1-dev-Q8_0\.gguf"):
        survey("city/flux-gguf:flux1-dev-Q8_1.gguf", hub=hub)


def test_a_control_lora_of_a_repository_is_told_by_its_header(hub: Hub, server: HubServer) -> None:
    state = {name: tensor.contiguous() for name, tensor in MAKERS["control"](DEV, 1).state.items()}
    server.repos["someone/edges"] = Repo({"flux1-canny-dev-lora.safetensors": save(state)})
    told = survey("someone/edges", hub=hub)
    assert told["components"][0]["member"] == "flux1-canny-dev-lora"
    assert told["runs"] == (
        "control, as flux1-canny-dev-lora; with its base flux1-dev, which loading it fetches or --base names"
    )
    assert "FLUX.1-dev" in told["lacks"]
    server.repos[f"{BFL}/FLUX.1-dev"] = replace(repository("flux1-dev.safetensors"), commit="b" * 40)
    with pytest.MonkeyPatch.context() as patch:
        unhashed(patch)
        told = survey("someone/edges", hub=hub)
    assert (told["runs"], told["lacks"]) == ("control, as flux1-canny-dev-lora", None)
    assert {part["part"] for part in told["parts"]} >= {"adapter", "transformer", "t5"}
    assert set(weights_asked_for(server)) == {"bytes=0-262143"}


def test_offline_says_what_is_missing(hub: Hub, server: HubServer, states: Mapping[str, dict[str, Tensor]]) -> None:
    server.repos[KREA] = repository("flux1-krea-dev.safetensors")
    server.repos[KREA].files["flux1-krea-dev.safetensors"] = save(states["transformer"])
    assert "flux1-krea-dev.safetensors, ae.safetensors" in survey("flux1-krea-dev", offline=True, hub=hub)["lacks"]
    with pytest.raises(Failure, match="try once without --offline"):
        survey("someone/x", offline=True, hub=hub)
    resolve(KREA, companions=False, hub=hub)
    server.seen.clear()
    told = survey(KREA, offline=True, hub=hub)
    assert (list(told["files"]), told["listing"]) == (["flux1-krea-dev.safetensors"], "what is in the cache")
    assert told["components"][0]["kind"] == "transformer"
    assert "ae.safetensors, text_encoder/*" in told["lacks"]
    assert server.seen == []


def test_without_the_hub_what_is_cached_is_told(
    hub: Hub, server: HubServer, states: Mapping[str, dict[str, Tensor]]
) -> None:
    server.repos["someone/tune"] = Repo({"tune.safetensors": save(states["transformer"])})
    resolve("someone/tune", companions=False, hub=hub)
    server.faults.status = 503
    told = survey("someone/tune", hub=hub)
    assert told["listing"] == "what is in the cache"
    assert told["components"][0]["kind"] == "transformer"
    assert "used what is cached" in told["notes"][0]
    with pytest.raises(Failure, match="try again later"):
        survey("someone/other", hub=hub)
    server.faults.status = 0
    with pytest.raises(UnknownModel, match="does not know"):
        survey("someone/other", hub=hub)


Info = Callable[..., dict[str, Any]]


@pytest.fixture
def info(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Info:
    """``fluxloom info`` beside the hub on loopback."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))

    def run(*words: str) -> dict[str, Any]:
        code = main(["info", *words, "--json"])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        told: dict[str, Any] = json.loads(out)
        return told

    return run


def test_info_on_the_command_line(
    info: Info, server: HubServer, states: Mapping[str, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    server.repos["someone/tune"] = Repo(
        {"tune.safetensors": save(states["transformer"]), "x/old.safetensors": save({"img_in.weight": torch.zeros(2)})},
        branches={"v1": "c" * 40},
    )
    for reference in ("someone/tune", "someone/tune@v1:tune.safetensors", f"{server.url}/someone/tune"):
        told = info(reference)
        assert told["components"][0]["kind"] == "transformer"
        assert set(told["files"]) == {"tune.safetensors", "x/old.safetensors"}
    assert info("someone/tune@v1")["commit"] == "c" * 40
    assert main(["info", "someone/tune"]) == 0
    assert "tune.safetensors" in capsys.readouterr().out
    assert main(["info", "someone/tune", "--offline"]) == 1
    assert "try once without --offline" in capsys.readouterr().err


def test_info_on_a_member_that_the_hub_refuses_still_tells_its_row(info: Info, server: HubServer) -> None:
    told = info("flux1-redux-dev")
    assert told["base"] == "flux1-dev"
    assert "does not know" in told["lacks"]
    server.repos[REDUX] = Repo({"flux1-redux-dev.safetensors": b"R"}, private=True)
    assert "token" in info("flux1-redux-dev")["lacks"]
    assert "not in the cache" in info("flux1-redux-dev", "--offline")["lacks"]


def test_info_on_a_file_here_asks_no_hub(info: Info, server: HubServer, tmp_path: Path) -> None:
    state = {"img_in.lora_A.weight": torch.ones(2, 128), "img_in.lora_B.weight": torch.ones(3072, 2)}
    path = tmp_path / "flux1-depth-dev-lora.safetensors"
    path.write_bytes(save(state))
    told = info(str(path))
    assert told["components"][0]["member"] == "flux1-depth-dev-lora"
    assert told["runs"].startswith("control, as flux1-depth-dev-lora; with its base flux1-dev")
    assert told["lora"]["dialect"]
    assert server.seen == []
