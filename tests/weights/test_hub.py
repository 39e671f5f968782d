"""Model references: what each kind means, and which files it brings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, Repo
from safetensors.torch import save
from torch import Tensor

from fluxloom.core.specs import MODELS, ModelSpec
from fluxloom.errors import BadInput, Failure, FluxloomError, UnknownModel, WeightsError
from fluxloom.weights.download import Hub
from fluxloom.weights.hub import Located, resolve
from fluxloom.weights.references import Repository, parse

BFL = "black-forest-labs"
KREA = f"{BFL}/FLUX.1-Krea-dev"


def repository(file: str) -> Repo:
    """An official repository: the file of its own, and everything as diffusers saves it."""
    shards = [f"-0000{k}-of-00002.safetensors" for k in (1, 2)]
    index = ".safetensors.index.json"
    pipeline = (
        "README.md",
        "ae.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/config.json",
        *(f"text_encoder_2/model{end}" for end in (*shards, index)),
        "transformer/config.json",
        *(f"transformer/diffusion_pytorch_model{end}" for end in (*shards, index)),
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer_2/tokenizer.json",
        "scheduler/scheduler_config.json",
    )
    return Repo({name: name.encode() for name in (file, *pipeline)})


def names(located: Located, kind: str) -> list[str]:
    return [path.name for path in located.parts[kind].files]


# ------------------------------------------------------------------------------------------ references


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("nano", MODELS["nano"]),
        ("flux1-kontext-dev", MODELS["flux1-kontext-dev"]),
        ("a/b", Repository("a/b")),
        ("a/b@v1", Repository("a/b", "v1")),
        ("a/b@refs/pr/1", Repository("a/b", "refs/pr/1")),
        ("a/b:x/y.gguf", Repository("a/b", None, "x/y.gguf")),
        ("a/b-c.d@v1:y.safetensors", Repository("a/b-c.d", "v1", "y.safetensors")),
        ("https://huggingface.co/a/b", Repository("a/b")),
        ("https://hf.co/a/b/tree/v1", Repository("a/b", "v1")),
        ("https://huggingface.co/a/b/blob/main/x/y.safetensors", Repository("a/b", "main", "x/y.safetensors")),
        ("https://huggingface.co/a/b/resolve/refs%2Fpr%2F1/y.sft?download=1", Repository("a/b", "refs/pr/1", "y.sft")),
        ("https://mirror.example/hub/a/b/blob/v1/y.gguf", Repository("a/b", "v1", "y.gguf")),
    ],
)  # fmt: skip
def test_references_are_told_apart(text: str, meant: ModelSpec | Repository) -> None:
    assert parse(text, "https://mirror.example/hub") == meant


def test_paths_that_exist_come_before_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "nano").mkdir()
    for text in ("a/b", "./nano", str(tmp_path)):
        assert parse(text, "https://hub") == Path(text)
    assert parse("nano", "https://hub") == MODELS["nano"]
    assert parse(Path("nano"), "https://hub") == Path("nano")


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("flux1-contekst-dev", UnknownModel, "try flux1-kontext-dev"),
        ("FLUX.1-Kontext-dev", UnknownModel, "try flux1-kontext-dev"),
        ("folder/model.safetensors", UnknownModel, "does not exist"),
        ("./nowhere", UnknownModel, "does not exist"),
        ("a/b/c", UnknownModel, "owner/name"),
        ("https://example.com/a/b", BadInput, "HF_ENDPOINT"),
        ("https://huggingface.co/a", BadInput, "try owner/name"),
        ("a/b@../../x", BadInput, "plain names"),
        ("a/b:../x.safetensors", BadInput, "plain names"),
        ("https://huggingface.co/a/b/blob/main/..%2F..%2Fx.gguf", BadInput, "plain names"),
        ("a/b:model.ckpt", WeightsError, "pickle"),
    ],
)
def test_a_wrong_reference_says_what_to_try(text: str, kind: type[FluxloomError], says: str) -> None:
    with pytest.raises(kind, match=says):
        parse(text, "https://huggingface.co")


def test_what_does_not_apply_is_refused(hub: Hub, tmp_path: Path) -> None:
    for reference in ("nano", tmp_path):
        with pytest.raises(BadInput, match="repositories only"):
            resolve(reference, revision="v1", hub=hub)
    with pytest.raises(BadInput, match="try flux1-krea-dev"):
        resolve("nano", variant="krea-dev", hub=hub)
    with pytest.raises(BadInput, match="weights of your own"):
        resolve("tiny-1b", hub=hub)


def test_nano_needs_no_network(hub: Hub, server: HubServer) -> None:
    located = resolve("nano", hub=replace(hub, offline=True))
    assert located.candidates == ("nano",)
    assert (located.parts["compact"].path / "card.json").is_file()
    assert resolve(located.parts["compact"].path, hub=hub).parts == located.parts
    assert server.seen == []


# ------------------------------------------------------------------------------------------ members


def test_a_member_is_fetched_once_in_one_layout(hub: Hub, server: HubServer) -> None:
    server.repos[KREA] = repository("flux1-krea-dev.safetensors")
    told: dict[str, int] = {}
    located = resolve("flux1-krea-dev", hub=hub, progress=lambda name, done, size: told.update({name: size}))
    assert located.candidates == ("flux1-krea-dev",)
    assert {kind: names(located, kind) for kind in located.parts} == {
        "transformer": ["flux1-krea-dev.safetensors"],
        "autoencoder": ["ae.safetensors"],
        "clip": ["config.json", "model.safetensors"],
        "t5": ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
               "model.safetensors.index.json"],
        "tokenizer": ["merges.txt", "vocab.json"],
        "tokenizer_2": ["tokenizer.json"],
    }  # fmt: skip
    assert located.parts["clip"].path.name == "text_encoder"  # its configuration is read as well
    assert located.parts["clip"].sha256 is not None
    assert located.parts["t5"].path.name == "text_encoder_2"
    part = located.parts["transformer"]
    assert part.origin == f"{KREA}@{'a' * 40}:flux1-krea-dev.safetensors"
    assert part.commit == "a" * 40
    assert part.sha256 is not None
    assert located.parts["t5"].sha256 is None
    start = f"/{KREA}/resolve/{'a' * 40}/"
    assert sorted(told) == sorted({path.removeprefix(start) for path in server.paths(part=start)})
    for reference in (KREA, f"{KREA}@{'a' * 40}", f"{server.url}/{KREA}/blob/main/flux1-krea-dev.safetensors"):
        assert resolve(reference, hub=hub).parts == located.parts
    server.seen.clear()
    assert resolve("flux1-krea-dev", offline=True, hub=hub).parts == located.parts
    assert resolve(KREA, revision="a" * 40, hub=hub).parts == located.parts
    assert server.seen == []


def test_the_caller_says_which_layout_it_can_use_and_the_cache_comes_first(hub: Hub, server: HubServer) -> None:
    server.repos[KREA] = repository("flux1-krea-dev.safetensors")
    located = resolve("flux1-krea-dev", hub=hub, layouts=("diffusers",))
    assert located.parts["transformer"].path.name == "transformer"
    assert names(located, "autoencoder") == ["config.json", "diffusion_pytorch_model.safetensors"]
    server.seen.clear()
    assert resolve("flux1-krea-dev", hub=hub).parts == located.parts
    assert server.paths(part="resolve") == []


def test_another_hash_than_the_publishers_is_refused_before_the_download(hub: Hub, server: HubServer) -> None:
    name = f"{BFL}/FLUX.1-schnell"
    server.repos[name] = repository("flux1-schnell.safetensors")
    for reference in ("flux1-schnell", name):
        with pytest.raises(WeightsError, match="publisher printed"):
            resolve(reference, hub=hub)
    assert server.paths(part="resolve") == []
    assert resolve(f"{name}@main", hub=hub).candidates == ("flux1-schnell",)


def unhashed(patch: pytest.MonkeyPatch) -> None:
    """Members without the hashes that their publisher printed, which made-up files do not have."""
    plain = {name: replace(row, source=row.source and replace(row.source, sha256=None)) for name, row in MODELS.items()}
    patch.setattr("fluxloom.weights.hub.MODELS", plain)
    patch.setattr("fluxloom.weights.references.MODELS", plain)


def test_an_adapter_comes_with_its_base(hub: Hub, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    unhashed(monkeypatch)
    source = MODELS["flux1-dev"].source
    assert source is not None
    server.repos[source.repo] = repository(source.file)
    server.repos[f"{BFL}/FLUX.1-Canny-dev-lora"] = Repo({"flux1-canny-dev-lora.safetensors": b"LORA"})
    encoder = {"image_encoder/config.json": b"{}", "image_encoder/model.safetensors": b"SIGLIP"}
    server.repos[f"{BFL}/FLUX.1-Redux-dev"] = Repo({"flux1-redux-dev.safetensors": b"REDUX", **encoder})
    lora = resolve("flux1-canny-dev-lora", hub=hub)
    assert names(lora, "adapter") == ["flux1-canny-dev-lora.safetensors"]
    assert names(lora, "transformer") == ["flux1-dev.safetensors"]
    redux = resolve("flux1-redux-dev", variant="flux1-redux-dev", hub=hub)
    assert {"adapter", "image_encoder", "t5"} <= set(redux.parts)
    assert redux.candidates == ("flux1-redux-dev",)
    assert set(resolve("flux1-redux-dev", companions=False, hub=hub).parts) == {"adapter"}
    diffusers = {"image_embedder/config.json": b"{}", "image_embedder/diffusion_pytorch_model.safetensors": b"REDUX"}
    server.repos[f"{BFL}/FLUX.1-Redux-dev"] = Repo({**diffusers, **encoder}, commit="d" * 40)
    assert resolve("flux1-redux-dev", hub=hub).parts["adapter"].path.name == "image_embedder"


def test_an_adapter_s_file_fetches_its_base_unless_another_is_named(
    hub: Hub, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unhashed(monkeypatch)
    state = {"img_in.lora_A.weight": torch.ones(2, 128), "img_in.lora_B.weight": torch.ones(64, 2)}
    path = tmp_path / "flux1-canny-dev-lora.safetensors"
    path.write_bytes(save(state))
    server.repos[f"{BFL}/FLUX.1-dev"] = repository("flux1-dev.safetensors")
    server.repos[KREA] = repository("flux1-krea-dev.safetensors")
    server.repos["someone/edges"] = Repo({path.name: path.read_bytes()})
    for base in (KREA, "flux1-krea-dev"):
        located = resolve(path, base=base, hub=hub)
        assert located.parts["transformer"].origin.startswith(KREA)
        assert located.parts["adapter"].path == path
        assert located.candidates == ("flux1-canny-dev-lora",)
    assert not server.paths(part=f"{BFL}/FLUX.1-dev")
    for reference in (path, "someone/edges"):
        assert names(resolve(reference, hub=hub), "transformer") == ["flux1-dev.safetensors"]
    server.repos["someone/style"] = Repo({"style.safetensors": save(state)})
    for base in ("someone/style", "flux1-redux-dev"):
        with pytest.raises(BadInput, match=f"got base {base}, which is an adapter itself"):
            resolve(path, base=base, hub=hub)
    with pytest.raises(BadInput, match="which is no adapter"):
        resolve(KREA, base="flux1-dev", hub=hub)


def test_offline_names_the_file_that_is_not_cached(hub: Hub, server: HubServer) -> None:
    server.repos[KREA] = repository("flux1-krea-dev.safetensors")
    with pytest.raises(Failure, match=r"flux1-krea-dev\.safetensors, ae\.safetensors.*not in the cache.*--offline"):
        resolve("flux1-krea-dev", offline=True, hub=hub)
    resolve(KREA, companions=False, hub=hub)
    with pytest.raises(Failure, match=r"of which ae\.safetensors, text_encoder/\*") as caught:
        resolve("flux1-krea-dev", offline=True, hub=hub)
    assert "flux1-krea-dev.safetensors" not in str(caught.value)
    with pytest.raises(Failure, match=r"someone/x@v1:y\.gguf, which is not in the cache"):
        resolve("someone/x@v1:y.gguf", offline=True, hub=hub)


def test_without_the_hub_the_cache_is_used_and_says_so(hub: Hub, server: HubServer) -> None:
    server.repos[KREA] = repository("flux1-krea-dev.safetensors")
    first = resolve("flux1-krea-dev", hub=hub)
    server.faults.status = 503
    again = resolve("flux1-krea-dev", hub=hub)
    assert again.parts == first.parts
    assert "used what is cached" in again.notes[0]


def test_an_official_repository_that_lacks_a_part_says_which(hub: Hub, server: HubServer) -> None:
    server.repos[KREA] = Repo({"flux1-krea-dev.safetensors": b"T", "ae.safetensors": b"A"})
    with pytest.raises(WeightsError, match=r"without the CLIP text encoder, the T5 text encoder.*text_encoder_2/\*"):
        resolve("flux1-krea-dev", hub=hub)
    assert server.paths(part="resolve") == []


def test_the_users_own_folder_comes_before_a_download(
    hub: Hub, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos[KREA] = repository("flux1-krea-dev.safetensors")
    mine = tmp_path / "models" / "diffusion_models"
    mine.mkdir(parents=True)
    (tmp_path / "models" / "transformer").mkdir()  # of another member
    (tmp_path / "models" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"OTHER")
    monkeypatch.setenv("FLUXLOOM_MODELS", f"{tmp_path / 'models'}")
    assert resolve("flux1-krea-dev", hub=hub).parts["transformer"].commit == "a" * 40
    (mine / "flux1-krea-dev.safetensors").write_bytes(b"MINE")
    located = resolve("flux1-krea-dev", hub=hub)
    assert located.parts["transformer"].path == mine / "flux1-krea-dev.safetensors"
    assert located.parts["t5"].commit == "a" * 40
    assert resolve(KREA, hub=hub).parts["transformer"].commit == "a" * 40
    monkeypatch.setenv("FLUXLOOM_MODELS", str(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match="FLUXLOOM_MODELS"):
        resolve("flux1-krea-dev", hub=hub)


# ------------------------------------------------------------------------------------------ other repositories


def test_a_repository_of_several_files_asks_which(hub: Hub, server: HubServer) -> None:
    server.repos["city/flux-gguf"] = Repo({"flux1-dev-Q4_0.gguf": b"4" * 10, "flux1-dev-Q8_0.gguf": b"8", "a.txt": b""})
    with pytest.raises(BadInput, match=r"Q4_0.*Q8_0.*try city/flux-gguf:flux1-dev-Q4_0\.gguf"):
        resolve("city/flux-gguf", hub=hub)
    with pytest.raises(BadInput, match=r"allowed flux1-dev-Q4_0\.gguf.*try flux1-dev-Q8_0\.gguf"):
        resolve("city/flux-gguf:flux1-dev-Q8_1.gguf", hub=hub)
    server.repos["a/words"] = Repo({"a.txt": b""})
    with pytest.raises(WeightsError, match="holds no transformer"):
        resolve("a/words", hub=hub)


def test_a_file_of_a_repository_takes_the_family_s_encoders_from_the_cache(
    hub: Hub, server: HubServer, states: Mapping[str, dict[str, Tensor]]
) -> None:
    server.repos["someone/tune"] = Repo({"tune.safetensors": save(states["transformer"])}, commit="e" * 40)
    with pytest.raises(WeightsError, match=r"hf download black-forest-labs/FLUX\.1-schnell --include 'ae.safetensors'"):
        resolve("someone/tune", hub=hub)
    assert [one.range for one in server.seen if one.storage] == ["bytes=0-262143"]  # its header told enough
    assert hub.cached("someone/tune", "main") is None
    server.repos[KREA] = repository("flux1-krea-dev.safetensors")
    resolve("flux1-krea-dev", hub=hub)
    for reference in ("someone/tune", "someone/tune:tune.safetensors"):
        located = resolve(reference, hub=hub)
        assert located.parts["transformer"].commit == "e" * 40
        assert located.parts["t5"].origin.startswith(KREA)
    assert resolve("someone/tune", variant="flux1-krea-dev", hub=hub).candidates == ("flux1-krea-dev",)
    only = resolve("someone/tune", companions=False, hub=hub)
    assert list(only.parts) == ["transformer"]


def test_a_repository_that_is_one_component(
    hub: Hub, server: HubServer, states: Mapping[str, dict[str, Tensor]]
) -> None:
    keys = sorted(states["transformer"])
    stem = "diffusion_pytorch_model"
    names = [f"{stem}-0000{k}-of-00002.safetensors" for k in (1, 2)]
    table = {key: names[i % 2] for i, key in enumerate(keys)}
    shards = {n: save({key: states["transformer"][key] for key in keys if table[key] == n}) for n in names}
    index = {f"{stem}.safetensors.index.json": json.dumps({"weight_map": table}).encode()}
    server.repos["someone/tune"] = Repo({"config.json": b"{}", **shards, **index, f"{stem}.fp16.safetensors": b"H"})
    located = resolve("someone/tune", companions=False, hub=hub)
    assert names == [name for name in (path.name for path in located.parts["transformer"].files) if "-of-" in name]
    assert not server.paths(part="fp16")


def test_a_foreign_file_is_refused_by_its_header(
    hub: Hub, server: HubServer, states: Mapping[str, dict[str, Tensor]]
) -> None:
    wide = {f"model.diffusion_model.input_blocks.{k}.weight": torch.zeros(2000) for k in range(3)}
    server.repos["someone/other"] = Repo({"other.safetensors": save(wide)})
    server.repos["someone/decoder"] = Repo({"decoder.safetensors": save(states["autoencoder"])})
    with pytest.raises(WeightsError, match="allowed FLUX"):
        resolve("someone/other", hub=hub)
    with pytest.raises(BadInput, match="holds the autoencoder"):
        resolve("someone/decoder", hub=hub)
    assert hub.cached("someone/other", "main") is None
    for content in (b"", b"\xff" * 100, (20).to_bytes(8, "little") + b"{" * 20):
        server.repos["someone/other"].files["other.safetensors"] = content
        with pytest.raises(WeightsError, match=r"other\.safetensors"):
            resolve("someone/other", hub=hub)


def test_the_header_of_a_large_file_may_be_large(
    hub: Hub, server: HubServer, states: Mapping[str, dict[str, Tensor]]
) -> None:
    content = save(states["transformer"], {"note": "x" * 300_000})
    server.repos["someone/tune"] = Repo({"tune.safetensors": content})
    with pytest.raises(WeightsError, match="without the autoencoder"):
        resolve("someone/tune", hub=hub)
    assert len([one for one in server.seen if one.storage]) == 2
    assert hub.cached("someone/tune", "main") is None


def test_a_header_of_eight_bits_tells_enough_and_packed_codes_do_not(
    hub: Hub, server: HubServer, states: Mapping[str, dict[str, Tensor]]
) -> None:
    scaled: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in states["transformer"].items():
        scaled[name] = tensor.to(torch.float8_e4m3fn if name.endswith(".weight") else torch.bfloat16)
        if name.endswith(".weight"):
            scaled[f"{name.removesuffix('weight')}scale_weight"] = torch.ones(())
    packed = {"img_in.weight": torch.zeros(8, 1, dtype=torch.uint8)}
    server.repos["someone/tune"] = Repo({"fp8.safetensors": save(scaled), "nf4.safetensors": save(packed)})
    with pytest.raises(WeightsError, match="without the autoencoder"):
        resolve("someone/tune:fp8.safetensors", hub=hub)
    assert hub.cached("someone/tune", "main") is None
    with pytest.raises(WeightsError):
        resolve("someone/tune:nf4.safetensors", hub=hub)
    assert hub.cached("someone/tune", "main") is not None


def test_a_lora_of_a_repository_stands_alone(hub: Hub, server: HubServer) -> None:
    pair = {f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    server.repos["someone/style"] = Repo({"style.safetensors": save(pair)})
    assert list(resolve("someone/style", hub=hub).parts) == ["adapter"]


def test_a_variant_that_does_not_fit_is_refused(hub: Hub, server: HubServer) -> None:
    server.repos[KREA] = repository("flux1-krea-dev.safetensors")
    with pytest.raises(BadInput, match="allowed flux1-krea-dev"):
        resolve(KREA, variant="flux1-dev", hub=hub)
