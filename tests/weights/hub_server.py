"""A small hub on loopback: the API of files as huggingface.co speaks it, with faults on demand.

Large files (those in LFS) are redirected to a second server, as the real hub redirects to its storage.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".gguf", ".sft", ".model")


def git_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    commit: str = "a" * 40
    branches: dict[str, str] = field(default_factory=dict)

    def revision(self, name: str) -> str | None:
        named = {"main": self.commit, **self.branches}
        return name if name in named.values() else named.get(name)


@dataclass
class Faults:
    """What goes wrong. Cuts happen once each."""

    cut: dict[str, list[int]] = field(default_factory=dict)  # bytes of the body after which the connection ends
    stall: dict[str, float] = field(default_factory=dict)  # seconds before a body
    damage: set[str] = field(default_factory=set)  # the content is another one
    no_ranges: bool = False
    bare_listing: bool = False  # no sizes and hashes
    status: int = 0  # every answer
    status_once: list[int] = field(default_factory=list)  # the next transfers


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    authorization: str | None
    range: str | None
    storage: bool  # asked of the second server


@dataclass
class HubServer:
    repos: dict[str, Repo] = field(default_factory=dict)
    token: str = "hf_right"
    faults: Faults = field(default_factory=Faults)
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    storage: str = ""

    def paths(self, method: str = "", *, part: str = "") -> list[str]:
        return [one.path for one in self.seen if method in one.method and part in one.path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    is_storage = False

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request(body=True)

    def do_HEAD(self) -> None:
        self.handle_request(body=False)

    def handle_request(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append(
            Seen(self.command, path, self.headers.get("Authorization"), self.headers.get("Range"), self.is_storage)
        )
        if self.hub.faults.status:
            return self.answer(self.hub.faults.status)
        if api := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.listing(api[1], api[2] or "main")
        if file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(file[1], file[2], file[3], body=body)
        return self.answer(404)

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def allowed(self, repo: Repo | None) -> bool:
        if repo and (not repo.private or self.authorised()):
            return True
        self.answer(404 if self.authorised() else 401, X_Error_Code="RepoNotFound")
        return False

    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def listing(self, name: str, revision: str) -> None:
        repo = self.hub.repos.get(name)
        if not self.allowed(repo) or repo is None:
            return
        commit = repo.revision(revision)
        if commit is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        rows = [self.row(path, content) for path, content in repo.files.items()]
        self.answer(200, json.dumps({"id": name, "sha": commit, "siblings": rows}).encode())

    def row(self, path: str, content: bytes) -> dict[str, object]:
        if self.hub.faults.bare_listing:
            return {"rfilename": path}
        row: dict[str, object] = {"rfilename": path, "size": len(content), "blobId": git_id(content)}
        if path.endswith(LFS):
            row |= {"blobId": git_id(b"pointer"), "lfs": {"size": len(content), "sha256": sha256(content)}}
            row["lfs"] |= {"pointerSize": 134}  # type: ignore[operator]
        return row

    def file(self, name: str, revision: str, path: str, *, body: bool) -> None:
        repo = self.hub.repos.get(name)
        if not self.is_storage and (not self.allowed(repo) or repo is None):
            return
        assert repo is not None
        commit = repo.revision(revision)
        if commit is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if path not in repo.files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        if repo.gated and not self.is_storage and not self.authorised():
            return self.answer(403 if self.headers.get("Authorization") else 401, X_Error_Code="GatedRepo")
        content = repo.files[path]
        if path.endswith(LFS) and not self.is_storage:
            headers = {"X_Linked_Etag": f'"{sha256(content)}"', "X_Linked_Size": str(len(content))}
            return self.answer(302, X_Repo_Commit=commit, Location=f"{self.hub.storage}{self.path}", **headers)
        etag = sha256(content) if path.endswith(LFS) else git_id(content)
        self.transfer(path, content, {"ETag": f'"{etag}"', "X_Repo_Commit": commit}, body=body)

    def transfer(self, path: str, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        faults = self.hub.faults
        if body and faults.status_once:
            return self.answer(faults.status_once.pop(0))
        if path in faults.damage:
            content = bytes(255 - byte for byte in content)
        start, status = 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and not faults.no_ranges:
            start, status = int(asked[1]), 206
            if start >= len(content):
                return self.answer(416, Content_Range=f"bytes */{len(content)}")
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        rest = content[start:]
        cut = faults.cut.get(path)
        if body and path in faults.stall:
            threading.Event().wait(faults.stall[path])
        if body and cut:
            self.close_connection = True
            rest = rest[: cut.pop(0)]
        self.answer(status, rest, Content_Length=str(len(content) - start), **headers)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests; anything else is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def serve() -> Iterator[HubServer]:
    """A running hub; its repositories and faults may be changed at any time."""
    hub = HubServer()
    servers = []
    for storage in (False, True):
        handler = type("Handler", (_Handler,), {"hub": hub, "is_storage": storage})
        servers.append(_Server(("127.0.0.1", 0), handler))
    hub.url, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
