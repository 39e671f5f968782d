"""One question to a language model, through any endpoint that speaks OpenAI's chat protocol.

What asks (a translator, an enhancer of prompts) is a subclass that names itself, its product and its way out: the
messages of all that can go wrong on the way are made here.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

from fluxloom.errors import BadInput, Failure

MAX_ANSWER = 1 << 20  # bytes; a prompt has 2,000 characters
# Open reasoning models, DeepSeek R1 the first of them, think aloud before they answer.
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A model behind an OpenAI-compatible endpoint.

    url      base, as in http://localhost:11434/v1; "/chat/completions" is added
    model    its name there
    key      sent as a bearer token where given
    timeout  seconds to connect, and of silence
    """

    WHO: ClassVar[str]  # is asked
    WHAT: ClassVar[str]  # is asked for
    PREFIX: ClassVar[str]  # of the environment's variables: _URL, _MODEL, _KEY
    INSTEAD: ClassVar[str]  # of asking

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise BadInput(f"got {self.WHO} url {self.url!r}, allowed http or https, try http://localhost:11434/v1")
        if not self.model.strip():
            raise BadInput(
                f"got no model for the {self.WHO} at {self.url}, allowed a name it knows, try {self.PREFIX}_MODEL"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self | None:
        """What PREFIX_URL, _MODEL and _KEY describe; None where no URL is set.

        Raises BadInput where one is set without a model, or is none.
        """
        url, model, key = (environment.get(f"{cls.PREFIX}_{name}", "") for name in ("URL", "MODEL", "KEY"))
        return cls(url=url, model=model, key=key or None) if url else None

    def ask(self, instruction: str, text: str, **more: Any) -> str:
        """The answer to a text under an instruction; ``more`` are further fields of the call. Raises Failure where the
        endpoint does not answer, refuses to, breaks off, or answers something else."""
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": text}]
        answer = self._post({"model": self.model, "messages": messages, "temperature": 0, **more})
        try:
            choice = json.loads(answer)["choices"][0]
            message, end = choice["message"], choice.get("finish_reason")
            refusal, said = message.get("refusal"), message.get("content")
            found = "" if refusal or end == "content_filter" else _THOUGHT.sub("", said, count=1).strip()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self.failure(f"an answer of another form ({type(error).__name__})") from error
        if refusal or end == "content_filter":
            raise self.failure(f"a refusal: {refusal or 'its filter held the answer back'}")
        if end == "length":
            raise self.failure("an answer that was cut off")
        if not found:
            raise self.failure("an empty answer")
        return str(found)

    def failure(self, what: str) -> Failure:
        """What the user is told."""
        return Failure(
            f"got no {self.WHAT} from {self.url} ({what}), allowed an endpoint that answers chat completions, "
            f"try {self.INSTEAD}"
        )

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        opener = urllib.request.build_opener(_NoRedirect)
        try:
            with opener.open(request, timeout=self.timeout) as answer:
                content: bytes = answer.read(MAX_ANSWER + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(300).decode("utf-8", "replace").strip()
            raise self.failure(f"status {error.code}{f': {said}' if said else ''}") from error
        except (OSError, ValueError, HTTPException) as error:  # nobody there, silence, broken connections and answers
            raise self.failure(str(getattr(error, "reason", error)) or type(error).__name__) from error
        if len(content) > MAX_ANSWER:
            raise self.failure(f"an answer of over {MAX_ANSWER:,} bytes")
        return content
