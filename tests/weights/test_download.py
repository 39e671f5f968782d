"""Files from a hub: a server on loopback speaks its API, and everything that can go wrong does."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer, Repo, git_id, sha256

from fluxloom.errors import BadInput, Failure, UnknownModel, WeightsError
from fluxloom.weights.download import Hub, RemoteFile, Unreachable

NAME = "someone/painter"
BIG = "model.safetensors"
CONTENT = bytes(range(256)) * 16_000  # 4 MB
FILES = {BIG: CONTENT, "config.json": b'{"a": 1}', "empty.txt": b""}

MakeHub = Callable[..., Hub]


@pytest.fixture
def server(server: HubServer) -> HubServer:
    server.repos[NAME] = Repo(dict(FILES))
    return server


@pytest.fixture
def make(server: HubServer, tmp_path: Path) -> MakeHub:
    def hub(**fields: object) -> Hub:
        shown = {"endpoint": server.url, "cache": tmp_path / "hub", "offline": False, "timeout": 5, "pause": 0.001}
        return Hub(**{**shown, **fields})  # type: ignore[arg-type]

    return hub


def fetched(hub: Hub, *names: str, revision: str = "main") -> dict[str, bytes]:
    snapshot = hub.listed(NAME, revision)
    return {name: path.read_bytes() for name, path in hub.fetch(snapshot, names or tuple(FILES)).items()}


# ------------------------------------------------------------------------------------------ what works


def test_files_arrive_whole_where_other_tools_look_for_them(make: MakeHub) -> None:
    hub = make()
    assert fetched(hub) == FILES
    for name, content in FILES.items():
        found = huggingface_hub.try_to_load_from_cache(NAME, name, cache_dir=hub.cache)
        assert isinstance(found, str)
        assert Path(found).read_bytes() == content
    blobs = {path.name for path in (hub.folder(NAME) / "blobs").iterdir()}
    assert blobs == {sha256(CONTENT), git_id(FILES["config.json"]), git_id(b"")}


def test_what_another_tool_fetched_is_not_fetched_again(make: MakeHub, server: HubServer) -> None:
    hub = make()
    huggingface_hub.hf_hub_download(NAME, "config.json", cache_dir=hub.cache, endpoint=server.url)
    server.seen.clear()
    assert fetched(hub, "config.json")["config.json"] == FILES["config.json"]
    assert server.paths(part="resolve") == []


def test_a_second_time_costs_one_request_and_a_pinned_commit_none(make: MakeHub, server: HubServer) -> None:
    hub = make()
    fetched(hub)
    server.seen.clear()
    fetched(hub)
    assert server.paths() == [f"/api/models/{NAME}/revision/main"]
    server.seen.clear()
    for revision in ("main", "a" * 40):
        snapshot = replace(hub, offline=True).cached(NAME, revision)
        assert snapshot is not None
        assert {name: path.read_bytes() for name, path in hub.fetch(snapshot, tuple(FILES)).items()} == FILES
    assert server.paths() == []


def test_a_revision_is_pinned(make: MakeHub, server: HubServer) -> None:
    repo = server.repos[NAME]
    repo.branches["v1"] = "b" * 40
    hub = make()
    fetched(hub, "config.json", revision="v1")
    assert (hub.folder(NAME) / "refs/v1").read_text() == "b" * 40
    assert all(f"/resolve/{'b' * 40}/" in path for path in server.paths(part="resolve"))
    repo.commit, repo.files["config.json"] = "c" * 40, b"new"
    assert fetched(hub, "config.json")["config.json"] == b"new"
    old = hub.cached(NAME, "v1")
    assert old is not None
    assert hub.path(old, "config.json").read_bytes() == FILES["config.json"]


def test_progress_announces_every_file_before_the_first_byte(make: MakeHub) -> None:
    told: list[tuple[str, int, int]] = []
    hub = make()
    hub.fetch(hub.listed(NAME, "main"), tuple(FILES), lambda *row: told.append(row))
    assert told[:3] == [(name, 0, len(content)) for name, content in FILES.items()]
    done = [row[1] for row in told[3:] if row[0] == BIG]
    assert done == sorted(done)
    assert len(done) > 2
    assert done[-1] == len(CONTENT)


def test_the_same_content_of_another_repository_is_shared(make: MakeHub, server: HubServer) -> None:
    hub = make()
    fetched(hub, BIG)
    server.repos["someone/else"] = Repo({"other/name.safetensors": CONTENT}, commit="d" * 40)
    path = hub.fetch(hub.listed("someone/else", "main"), ["other/name.safetensors"])["other/name.safetensors"]
    assert path.read_bytes() == CONTENT
    assert server.paths(part="someone/else/resolve") == []
    next((hub.folder(NAME) / "blobs").glob("*")).unlink()  # the other repository is cleared away
    assert path.read_bytes() == CONTENT


def test_a_mirror_whose_listing_tells_no_sizes_is_asked_file_by_file(make: MakeHub, server: HubServer) -> None:
    server.faults.bare_listing = True
    assert fetched(make()) == FILES
    assert len(server.paths("HEAD")) == len(FILES)


def test_two_at_once_transfer_a_file_once(make: MakeHub, server: HubServer) -> None:
    server.faults.stall[BIG] = 0.2
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(fetched, make(), BIG) for _ in range(2)]
        assert [job.result()[BIG] for job in jobs] == [CONTENT, CONTENT]
    assert len([one for one in server.seen if one.storage]) == 1


def test_a_disk_without_links_holds_copies(make: MakeHub, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    hub = make()
    assert fetched(hub) == FILES
    server.repos["someone/else"] = Repo({"name.safetensors": CONTENT}, commit="d" * 40)
    path = hub.fetch(hub.listed("someone/else", "main"), ["name.safetensors"])["name.safetensors"]
    assert path.read_bytes() == CONTENT
    assert not path.is_symlink()


# ------------------------------------------------------------------------------------------ access


def test_the_token_goes_to_the_hub_and_nowhere_else(make: MakeHub, server: HubServer) -> None:
    server.repos[NAME].private = True
    assert fetched(make(token=server.token), BIG)[BIG] == CONTENT
    assert {one.authorization for one in server.seen if not one.storage} == {f"Bearer {server.token}"}
    assert {one.authorization for one in server.seen if one.storage} == {None}
    assert server.token not in repr(make(token=server.token))


def test_the_token_is_taken_from_the_environment(
    make: MakeHub, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos[NAME].private = True
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert fetched(make(), "config.json")


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_gated_repository_says_which_page_to_accept(make: MakeHub, server: HubServer, token: str | None) -> None:
    name = "black-forest-labs/FLUX.1-Kontext-dev"
    server.repos[name] = Repo(dict(FILES), gated=True)
    hub = make(token=token)
    with pytest.raises(Failure, match=f"https://huggingface.co/{name}") as caught:
        hub.fetch(hub.listed(name, "main"), [BIG])
    assert ("HF_TOKEN" in str(caught.value)) is (token is None)
    hub = make(token=server.token)
    assert hub.fetch(hub.listed(name, "main"), [BIG])[BIG].read_bytes() == CONTENT


def test_an_unknown_repository_gets_a_suggestion(make: MakeHub) -> None:
    with pytest.raises(UnknownModel, match=r"try black-forest-labs/FLUX\.1-Krea-dev"):
        make().listed("black-forest-labs/FLUX.1-krea-dev", "main")
    with pytest.raises(UnknownModel, match="HF_TOKEN"):
        make().listed("someone/unknown", "main")


def test_an_unknown_revision_or_file_is_named(make: MakeHub, server: HubServer) -> None:
    hub = make()
    with pytest.raises(BadInput, match="revision 'v9' of someone/painter"):
        hub.listed(NAME, "v9")
    snapshot = hub.listed(NAME, "main")
    listed = replace(snapshot, files={**snapshot.files, "modle.safetensors": RemoteFile("modle.safetensors", 5, "x")})
    with pytest.raises(BadInput, match=r"try model\.safetensors|allowed model"):
        hub.fetch(listed, ["modle.safetensors"])
    with pytest.raises(BadInput, match="allowed owner/name"):
        hub.listed("some--one/painter", "main")


# ------------------------------------------------------------------------------------------ faults


def test_a_cut_connection_is_continued_by_range(make: MakeHub, server: HubServer) -> None:
    server.faults.cut[BIG] = [1_500_000, 1_000_000, 0]
    assert fetched(make(), BIG)[BIG] == CONTENT
    starts = [int(one.range[6:-1]) for one in server.seen if one.storage and one.range]
    assert len(starts) == 3
    assert starts[0] > 1_000_000
    assert starts == sorted(starts)


def test_an_interrupted_download_is_continued_by_the_next_process(make: MakeHub, server: HubServer) -> None:
    hub = make()

    def interrupt(name: str, done: int, total: int) -> None:
        if done > 2_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.fetch(hub.listed(NAME, "main"), [BIG], interrupt)
    (kept,) = (hub.folder(NAME) / "blobs").glob("*.incomplete")
    size = kept.stat().st_size
    assert size > 2_000_000
    assert hub.cached(NAME, "main") is None  # half a file is no file
    server.seen.clear()
    told: list[int] = []
    hub.fetch(hub.listed(NAME, "main"), [BIG], lambda name, done, total: told.append(done))
    assert [one.range for one in server.seen if one.storage] == [f"bytes={size}-"]
    assert told[0] == size
    assert fetched(hub, BIG)[BIG] == CONTENT


@pytest.mark.parametrize("left", [CONTENT[:1000], b"\0" * 1000, CONTENT + b"more"], ids=["good", "wrong", "longer"])
def test_a_server_without_ranges_sends_all_of_it(make: MakeHub, server: HubServer, left: bytes) -> None:
    server.faults.no_ranges = True
    hub = make()
    partial = hub.folder(NAME) / "blobs" / f"{sha256(CONTENT)}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(left)
    assert fetched(hub, BIG)[BIG] == CONTENT


def test_wrong_bytes_are_an_error_and_are_removed(make: MakeHub, server: HubServer) -> None:
    hub = make()
    for name, etag in ((BIG, sha256(CONTENT)), ("config.json", git_id(FILES["config.json"]))):
        server.faults.damage = {name}
        with pytest.raises(WeightsError, match=f"{name} of {NAME} with hash .* allowed {etag}.*removed"):
            fetched(hub, name)
        assert list((hub.folder(NAME) / "blobs").iterdir()) == []
    server.faults.damage = set()
    assert fetched(hub) == FILES


def test_a_damaged_beginning_is_found(make: MakeHub) -> None:
    hub = make()
    partial = hub.folder(NAME) / "blobs" / f"{sha256(CONTENT)}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"\0" * 1000)
    with pytest.raises(WeightsError, match="removed, try again"):
        fetched(hub, BIG)
    assert fetched(hub, BIG)[BIG] == CONTENT


def test_too_small_a_disk_is_said_before_the_first_byte(make: MakeHub, server: HubServer) -> None:
    hub = make(free=lambda path: 3_000_000)
    with pytest.raises(Failure, match=r"got 3\.0 MB of free disk .* at least 4\.1 MB .* HF_HOME"):
        fetched(hub)
    assert server.paths(part="resolve") == []
    assert fetched(hub, "config.json")
    partial = hub.folder(NAME) / "blobs" / f"{sha256(CONTENT)}.incomplete"
    partial.write_bytes(CONTENT[:2_000_000])
    assert fetched(hub, BIG)[BIG] == CONTENT  # what lies there already needs no room


def test_a_full_disk_on_the_way_is_a_clear_error(make: MakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match="HF_HOME"):
        fetched(make(cache=tmp_path / "file" / "hub"), BIG)


def test_passing_trouble_is_waited_out(make: MakeHub, server: HubServer) -> None:
    server.faults.status_once = [503, 429, 502]
    assert fetched(make(), "config.json")


def test_lasting_trouble_is_an_error_that_keeps_what_came(make: MakeHub, server: HubServer) -> None:
    server.faults.cut[BIG] = [1_000_000, 0, 0, 0, 0]
    with pytest.raises(Unreachable, match=r"1\.0 MB of 4\.1 MB are kept"):
        fetched(make(), BIG)
    server.faults.status = 503
    with pytest.raises(Unreachable, match="got 503"):
        make().listed(NAME, "main")
    server.faults.status = 418
    with pytest.raises(Failure, match="got 418"):
        make().listed(NAME, "main")


@pytest.mark.parametrize("how", ["closed", "silent"])
def test_a_dead_server_is_an_error_within_seconds(make: MakeHub, server: HubServer, how: str) -> None:
    start = time.perf_counter()
    if how == "closed":
        with pytest.raises(Unreachable, match=r"got no usable answer from http://127.*HF_ENDPOINT"):
            make(endpoint="http://127.0.0.1:9").listed(NAME, "main")
    else:
        server.faults.stall["config.json"] = 1.0
        with pytest.raises(Unreachable, match="Timeout"):
            fetched(make(timeout=0.2, tries=2), "config.json")
    assert time.perf_counter() - start < 4


def test_a_server_may_not_write_outside_its_folder(make: MakeHub, server: HubServer) -> None:
    for name in ("../../evil.json", "/etc/evil", "a\\..\\evil", "a//b"):
        server.repos[NAME].files = {name: b"x"}
        with pytest.raises(WeightsError, match="stay below"):
            make().listed(NAME, "main")


def test_an_offline_process_says_so(make: MakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Failure, match="while offline"):
        make().listed(NAME, "main")


# ------------------------------------------------------------------------------------------ environment

_SCRIPT = """
import sys
from fluxloom.errors import FluxloomError
from fluxloom.weights.hub import resolve
try:
    print(*resolve(sys.argv[1], companions=False).parts["transformer"].files)
except FluxloomError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def test_the_environment_says_where(server: HubServer, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as a user sets them."""
    name = "black-forest-labs/FLUX.1-Krea-dev"
    server.repos[name] = Repo({"flux1-krea-dev.safetensors": CONTENT}, private=True)

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        shown = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": server.token}
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", **shown, **more}
        command = [sys.executable, "-W", "error", "-c", _SCRIPT, "flux1-krea-dev"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    missing = run(HF_HUB_OFFLINE="1")
    assert "flux1-krea-dev.safetensors" in missing.stderr
    assert str(tmp_path / "home" / "hub") in missing.stderr
    assert "--offline" in missing.stderr
    assert server.seen == []
    first = run()
    assert (first.stderr, first.returncode) == ("", 0)
    path = Path(first.stdout.strip())
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "home" / "hub")
    server.seen.clear()
    assert run(HF_HUB_OFFLINE="1").stdout == first.stdout
    assert server.seen == []
