"""A hub's files on the local disk, in the cache that other tools share.

The layout of the cache (``models--owner--name/{blobs,refs,snapshots}``), tokens, headers and errors are those of
huggingface_hub, so a model that another program fetched is not fetched again. The transfer is our own: that package
(2.4) starts over after the process was interrupted, which hurts at 24 GB, and compares no checksum.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fluxloom.core.specs import MODELS
from fluxloom.errors import BadInput, Failure, FluxloomError, UnknownModel, WeightsError
from fluxloom.weights.blobs import CHUNK, COMMIT, SHA256, Partial, RemoteFile, link, on_disk, shared, size_text, whole

Progress = Callable[[str, int, int], None]  # (file, bytes done, bytes in all)

_PLAIN_BYTES = 10 * 10**6  # the hub keeps larger files in LFS, whose hash is not that of the listing's git object
_PASSING = frozenset({408, 429, 500, 502, 503, 504})  # statuses that are worth another try


class Unreachable(Failure):
    """The hub did not answer, or not usefully."""


@dataclass(frozen=True)
class Snapshot:
    """What a repository holds at one commit; ``cached``: only what of it lies on the disk."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]
    cached: bool = False


def _constant(name: str) -> Any:
    from huggingface_hub import constants

    return getattr(constants, name)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A hub, or a mirror of it, and the cache of what came from there.

    endpoint, cache, offline  HF_ENDPOINT, HF_HOME (HF_HUB_CACHE), HF_HUB_OFFLINE unless given
    token    HF_TOKEN, or the one that was saved by ``hf auth login``, unless given
    timeout  seconds to wait for a connection and for each answer; HF_HUB_DOWNLOAD_TIMEOUT, or 10, unless given
    tries    attempts in a row that may bring nothing before a download is given up, the first pause after ``pause`` s
    free     bytes that are free in a folder
    """

    endpoint: str = field(default_factory=lambda: str(_constant("ENDPOINT")))
    cache: Path = field(default_factory=lambda: Path(_constant("HF_HUB_CACHE")))
    token: str | None = field(default=None, repr=False)
    offline: bool = field(default_factory=lambda: bool(_constant("HF_HUB_OFFLINE")))
    timeout: float = field(default_factory=lambda: float(_constant("HF_HUB_DOWNLOAD_TIMEOUT")))
    tries: int = 4
    pause: float = 0.5
    free: Callable[[Path], int] = _free

    # ------------------------------------------------------------------------------------------ listings

    def listed(self, repo: str, revision: str) -> Snapshot:
        """What the hub says is there: one request. Raises Unreachable, UnknownModel, BadInput, Failure."""
        from huggingface_hub import HfApi

        with self._errors(repo, revision):
            info = HfApi(endpoint=self.endpoint, token=self._token()).model_info(
                repo, revision=revision, files_metadata=True, timeout=self.timeout
            )
        if not info.sha or not COMMIT.fullmatch(info.sha):
            raise Unreachable(f"got no commit of {repo} from {self.endpoint}, try another HF_ENDPOINT")
        files = {}
        for one in info.siblings or ():
            _safe(one.rfilename, repo)
            size = -1 if one.size is None else one.size
            plain = one.blob_id if one.blob_id and 0 <= size <= _PLAIN_BYTES else ""
            files[one.rfilename] = RemoteFile(one.rfilename, size, one.lfs.sha256 if one.lfs else plain)
        self._remember(repo, revision, info.sha)
        return Snapshot(repo, info.sha, files)

    def cached(self, repo: str, revision: str) -> Snapshot | None:
        """What of a revision lies in the cache; no request."""
        folder = self.folder(repo)
        commit = revision
        if not COMMIT.fullmatch(revision):
            try:
                commit = (folder / "refs" / revision).read_text("utf-8").strip()
            except OSError:
                return None
        root = folder / "snapshots" / commit
        paths = (path for path in root.rglob("*") if path.is_file())
        files = {path.relative_to(root).as_posix(): path for path in sorted(paths)}
        if not files:
            return None
        return Snapshot(
            repo, commit, {name: RemoteFile(name, path.stat().st_size) for name, path in files.items()}, cached=True
        )

    def _remember(self, repo: str, revision: str, commit: str) -> None:
        """Note the commit of a branch or tag, so that it is found offline."""
        if revision == commit:
            return
        _safe(revision, repo)
        path = self.folder(repo) / "refs" / revision
        with self._writing(path):
            if path.is_file() and path.read_text("utf-8") == commit:  # a cache may be there to read only
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            draft.write_text(commit, "utf-8")
            draft.replace(path)

    # ------------------------------------------------------------------------------------------ files

    def folder(self, repo: str) -> Path:
        """Where the cache keeps a repository."""
        return self.cache / "--".join(["models", *repo.split("/")])

    def path(self, snapshot: Snapshot, name: str) -> Path:
        """Where a file lies, or will lie."""
        return self.folder(snapshot.repo) / "snapshots" / snapshot.commit / name

    def lacking(self, snapshot: Snapshot, names: Sequence[str]) -> list[str]:
        """Those of the files that are not in the cache, or not whole."""
        files = [snapshot.files[name] for name in names]
        return [f.name for f in files if not snapshot.cached and not whole(self.path(snapshot, f.name), f.size)]

    def fetch(self, snapshot: Snapshot, names: Sequence[str], progress: Progress | None = None) -> dict[str, Path]:
        """Bring files into the cache and return their paths. Every file that is fetched is announced, with its size,
        before the first byte of any. What an earlier, interrupted download left is continued.

        Raises Failure where the disk is too small, WeightsError where a checksum is wrong, Unreachable where the hub
        stops answering.
        """
        tell = progress or (lambda *_: None)
        files = [self._described(snapshot, snapshot.files[name]) for name in self.lacking(snapshot, names)]
        files = [file for file in files if not self._adopt(snapshot, file)]
        starts = {file.name: on_disk(self._partial(snapshot, file)) for file in files}
        self._check_room(snapshot, sum(max(file.size - starts[file.name], 0) for file in files))
        for file in files:
            tell(file.name, min(starts[file.name], file.size), file.size)
        for file in files:
            self._bring(snapshot, file, tell)
        return {name: self.path(snapshot, name) for name in names}

    def _described(self, snapshot: Snapshot, file: RemoteFile) -> RemoteFile:
        """A file with size and hash; asked for one by one where a mirror's listing leaves them out."""
        if file.size >= 0 and file.etag:
            return file
        from huggingface_hub import get_hf_file_metadata

        with self._errors(snapshot.repo, snapshot.commit, file.name, tuple(snapshot.files)):
            found = get_hf_file_metadata(
                self._url(snapshot, file.name), token=self._token(), timeout=self.timeout, endpoint=self.endpoint
            )
        if found.size is None or not re.fullmatch(r"[\w-]+", found.etag or ""):
            raise Unreachable(f"got no size or no hash of {file.name} from {self.endpoint}, try another HF_ENDPOINT")
        return replace(file, size=found.size, etag=found.etag or "")

    def _adopt(self, snapshot: Snapshot, file: RemoteFile) -> bool:
        """Use the same content where the cache has it already: members of the family share their encoders and
        autoencoder, some 10 GB."""
        blobs = [self._blob(snapshot, file)]
        if SHA256.fullmatch(file.etag):
            blobs += sorted(self.cache.glob(f"models--*/blobs/{file.etag}"))
        for blob in blobs:
            if whole(blob, file.size):
                with self._writing(blob):
                    link(shared(blob, blobs[0]), self.path(snapshot, file.name))
                return True
        return False

    def _check_room(self, snapshot: Snapshot, need: int) -> None:
        if not need:
            return
        with self._writing(self.cache):
            self.cache.mkdir(parents=True, exist_ok=True)
            have = self.free(self.cache)
        if have < need:
            raise Failure(
                f"got {size_text(have)} of free disk at {self.cache}, allowed at least {size_text(need)} for what is "
                f"to be fetched of {snapshot.repo}, try making room, or set HF_HOME to a folder on a larger disk"
            )

    def _bring(self, snapshot: Snapshot, file: RemoteFile, tell: Progress) -> None:
        """One file, under the lock that other programs take, too."""
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # documented, but not in __all__

        blob, partial = self._blob(snapshot, file), self._partial(snapshot, file)
        lock = self.cache / ".locks" / self.folder(snapshot.repo).name / f"{file.etag}.lock"
        with self._writing(blob):
            blob.parent.mkdir(parents=True, exist_ok=True)
            lock.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):
                if not whole(blob, file.size):
                    self._transfer(snapshot, file, Partial(partial, file), tell)
                    partial.replace(blob)
            link(blob, self.path(snapshot, file.name))
        tell(file.name, file.size, file.size)

    def _transfer(self, snapshot: Snapshot, file: RemoteFile, partial: Partial, tell: Progress) -> None:
        """Append what is missing, over as many connections as it takes; then compare the hash."""
        failures = 0
        while partial.done < file.size:
            before = told = partial.done
            try:
                for _ in self._stream(snapshot, file, partial):
                    if abs(partial.done - told) >= CHUNK:
                        told = partial.done
                        tell(file.name, told, file.size)
                if partial.done < file.size:
                    raise Unreachable(f"got {partial.done} of {file.size} bytes of {file.name} from {self.endpoint}")
            except Unreachable as error:
                failures = 1 if partial.done > before else failures + 1
                if failures >= self.tries:
                    raise Unreachable(
                        f"{error}; {size_text(partial.done)} of {size_text(file.size)} are kept, try again to go on"
                    ) from error
                time.sleep(self.pause * 2 ** (failures - 1))
        if not partial.matches():
            partial.remove()
            raise WeightsError(
                f"got {file.name} of {snapshot.repo} with hash {partial.hexdigest()}, allowed {file.etag}; "
                "the damaged file was removed, try again, or another HF_ENDPOINT"
            )

    def _stream(self, snapshot: Snapshot, file: RemoteFile, partial: Partial) -> Iterator[None]:
        """Write what one connection brings, from where the partial file ends."""
        with self._answer(snapshot, file.name, f"bytes={partial.done}-" if partial.done else "") as response:
            start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if response.status_code == 416:  # what lies here is no beginning of that file
                partial.restart()
                return
            if partial.done and (response.status_code != 206 or not start or int(start[1]) != partial.done):
                partial.restart()  # a server that knows no ranges sends all of it
            for chunk in response.iter_bytes():  # as it comes: what waits for a full buffer is lost in a cut
                partial.append(chunk)
                yield

    def beginning(self, snapshot: Snapshot, name: str, count: int) -> bytes:
        """The first bytes of a file, to see what it is before all of it is fetched."""
        found = b""
        with self._answer(snapshot, name, f"bytes=0-{count - 1}") as response:
            for chunk in response.iter_bytes():
                found += chunk
                if len(found) >= count:
                    break
        return found[:count]

    @contextmanager
    def _answer(self, snapshot: Snapshot, name: str, span: str) -> Iterator[Any]:
        """The response to a request for a file; 416 passes, other refusals are errors."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # not in __all__

        headers = {**self._headers(), **({"Range": span} if span else {})}
        url = self._url(snapshot, name)
        with (
            self._errors(snapshot.repo, snapshot.commit, name, tuple(snapshot.files)),
            get_session().stream("GET", url, headers=headers, timeout=self.timeout, follow_redirects=True) as response,
        ):
            if response.status_code >= 400 and response.status_code != 416:
                response.read()
                hf_raise_for_status(response)
            yield response

    # ------------------------------------------------------------------------------------------ addresses

    def _blob(self, snapshot: Snapshot, file: RemoteFile) -> Path:
        return self.folder(snapshot.repo) / "blobs" / file.etag

    def _partial(self, snapshot: Snapshot, file: RemoteFile) -> Path:
        # huggingface_hub's own are <etag>.<random>.incomplete, and none of them is ever continued.
        return self.folder(snapshot.repo) / "blobs" / f"{file.etag}.incomplete"

    def _url(self, snapshot: Snapshot, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(snapshot.repo, name, revision=snapshot.commit, endpoint=self.endpoint)

    def _token(self) -> str | bool:
        from huggingface_hub import get_token

        return self.token or get_token() or False

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, but not in __all__

        # Identity: ranges and sizes are of the file as it is, not of a compressed transfer.
        return {**build_hf_headers(token=self._token()), "Accept-Encoding": "identity"}

    # ------------------------------------------------------------------------------------------ errors

    @contextmanager
    def _errors(self, repo: str, revision: str, name: str = "", names: Sequence[str] = ()) -> Iterator[None]:
        """What the transport raises, as errors that say what to do."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        what = f"{repo}/{name}" if name else repo
        try:
            yield
        except OfflineModeIsEnabled as error:
            raise Failure(f"got {what}, which needs the network, allowed cached files while offline") from error
        except HFValidationError as error:
            raise BadInput(f"got {repo!r} ({error}), allowed owner/name") from error
        except HfHubHTTPError as error:
            raise self._refusal(error, repo, revision, name, names) from error
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise Unreachable(
                f"got no usable answer from {self.endpoint} for {what} ({type(error).__name__}: {error}), "
                "try again later, another HF_ENDPOINT, or --offline where it is cached"
            ) from error

    def _refusal(self, error: Any, repo: str, revision: str, name: str, names: Sequence[str]) -> FluxloomError:
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        status = error.response.status_code
        token = bool(self._token())
        if isinstance(error, GatedRepoError):
            return Failure(gated(repo, token=token))
        if isinstance(error, RepositoryNotFoundError):
            known = sorted({spec.source.repo for spec in MODELS.values() if spec.source})
            hint = next(iter(get_close_matches(repo, known, n=1, cutoff=0.5)), None)
            return UnknownModel(
                f"got {repo}, which {self.endpoint} does not know or does not show "
                f"{'to your token' if token else 'without a token (HF_TOKEN)'}"
                + (f", try {hint}" if hint else ", try the name as its page shows it")
            )
        if isinstance(error, RevisionNotFoundError):
            return BadInput(f"got revision {revision!r} of {repo}, allowed its branches, tags and commits, try main")
        if isinstance(error, EntryNotFoundError):
            return no_such_file(repo, name, names)
        if status in (401, 403):
            return Failure(f"got {status} for {repo} from {self.endpoint}, try a token (HF_TOKEN) that may read it")
        if status in _PASSING:
            return Unreachable(f"got {status} for {repo} from {self.endpoint}, try again later")
        return Failure(f"got {status} for {repo} from {self.endpoint}, try another HF_ENDPOINT")

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Errors of the disk, named; those of the transport pass."""
        try:
            yield
        except OSError as error:
            raise Failure(f"got {error.strerror or error} at {error.filename or path}, try another HF_HOME") from error


def gated(repo: str, *, token: bool) -> str:
    """What to do about a repository whose terms must be accepted first."""
    pages = {spec.source.repo: spec.source.page for spec in MODELS.values() if spec.source}
    page = pages.get(repo, f"https://huggingface.co/{repo}")
    then = (
        "with the account of your token"
        if token
        else "then make a token that may read (hf auth login, or HF_TOKEN), which is needed as well"
    )
    return f"got {repo}, whose terms you have not accepted yet, try {page}: accept them there, {then}"


def no_such_file(repo: str, name: str, names: Sequence[str]) -> BadInput:
    hint = next(iter(get_close_matches(name, names, n=1, cutoff=0.4)), None)
    weights = sorted(n for n in names if n.endswith((".safetensors", ".sft", ".gguf")))
    return BadInput(
        f"got {name!r}, which is not in {repo}"
        + (f", allowed {', '.join(weights[:8])}{' …' if len(weights) > 8 else ''}" if weights else "")
        + (f", try {hint}" if hint else "")
    )


def _safe(name: str, repo: str) -> None:
    """A name from a server becomes a path here: it must stay below its folder."""
    parts = name.split("/")
    if "\\" in name or ":" in name or any(part in ("", ".", "..") for part in parts):
        raise WeightsError(f"got {name!r} in {repo}, allowed names that stay below its folder, try another repository")
