"""A chat endpoint on loopback that answers what it is told to, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


def answer(text: Any, **more: Any) -> bytes:
    """The body of an answer; ``more`` are further fields of the message, but for ``finish_reason``."""
    reason = more.pop("finish_reason", "stop")
    return json.dumps({"choices": [{"message": {"content": text, **more}, "finish_reason": reason}]}).encode()


@dataclass
class Endpoint:
    """What the server answers, and what it was asked."""

    url: str
    status: int = 200
    body: bytes = b'{"choices": [{"message": {"role": "assistant", "content": " a red cat\\n"}}]}'
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            made.asked.append((self.path, dict(self.headers), json.loads(content)))
            time.sleep(made.delay)
            self.send_response(made.status)
            for name, value in {"Content-Length": str(len(made.body)), **made.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # the client may have gone, as it should
                self.wfile.write(made.body)

        def do_GET(self) -> None:
            made.asked.append((self.path, dict(self.headers), None))
            self.send_error(404)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()
