"""Translating prompts: an OpenAI-compatible endpoint on loopback, and everything that can go wrong with one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from chat_server import Endpoint, answer, serving

from fluxloom.errors import BadInput, Failure
from fluxloom.infer import chat
from fluxloom.infer.translate import ChatTranslator, from_environment


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    with serving(monkeypatch) as made:
        yield made


def translator(endpoint: Endpoint, **fields: Any) -> ChatTranslator:
    return ChatTranslator(**{"url": endpoint.url, "model": "small", "timeout": 5.0, **fields})


def test_a_translation(endpoint: Endpoint) -> None:
    assert translator(endpoint, key="secret").translate("一只红猫") == "a red cat"
    [(path, headers, body)] = endpoint.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("small", 0)
    assert [(m["role"], m["content"]) for m in body["messages"]][1] == ("user", "一只红猫")
    assert "Translate" in body["messages"][0]["content"]


def test_thinking_aloud_is_not_the_answer(endpoint: Endpoint) -> None:
    endpoint.body = answer("<think>\na cat?\n</think>\n\na red cat")
    assert translator(endpoint).translate("猫") == "a red cat"


def test_no_key_sends_none_and_a_slash_does_no_harm(endpoint: Endpoint) -> None:
    translator(endpoint, url=endpoint.url + "/").translate("猫")
    path, headers, _ = endpoint.asked[0]
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"not json", "another form"),
        (b"{}", "another form"),
        (b'{"choices": []}', "another form"),
        (b'{"choices": [{"message": {"content": null}}]}', "another form"),
        (answer("  "), "empty answer"),
        (answer("<think>a cat?</think>"), "empty answer"),
        (answer("a red c", finish_reason="length"), "cut off"),
        (answer(None, refusal="not this"), "a refusal: not this"),
        (answer("a r", finish_reason="content_filter"), "a refusal: its filter"),
        (b"\xff\xfe", "another form"),
        (b" " * (chat.MAX_ANSWER + 1), "over 1,048,576 bytes"),
    ],
)
def test_answers_that_are_none(endpoint: Endpoint, body: bytes, message: str) -> None:
    endpoint.body = body
    with pytest.raises(Failure, match=rf"no translation from {endpoint.url} \(.*{message}.*try an English prompt"):
        translator(endpoint).translate("猫")


def test_refusals_say_what_the_endpoint_said(endpoint: Endpoint) -> None:
    endpoint.status, endpoint.body = 401, b'{"error": "no such key"}'
    with pytest.raises(Failure, match=r"status 401: .*no such key"):
        translator(endpoint, key="secret").translate("猫")


def test_redirects_are_not_followed(endpoint: Endpoint) -> None:
    """The key would go to wherever they lead."""
    endpoint.status, endpoint.headers = 302, {"Location": "/elsewhere"}
    with pytest.raises(Failure, match="status 302"):
        translator(endpoint, key="secret").translate("猫")
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("headers", [{"Content-Length": "5000"}, {"Transfer-Encoding": "chunked"}])
def test_an_answer_that_breaks_off(endpoint: Endpoint, headers: dict[str, str]) -> None:
    endpoint.headers, endpoint.body = {**headers, "Connection": "close"}, b'{"choices": ['
    with pytest.raises(Failure, match="no translation from"):
        translator(endpoint, timeout=0.5).translate("猫")


def test_a_url_with_a_broken_port() -> None:
    with pytest.raises(Failure, match="no translation from"):
        ChatTranslator(url="http://localhost:what/v1", model="small").translate("猫")


def test_silence(endpoint: Endpoint) -> None:
    endpoint.delay = 1.0
    began = time.perf_counter()
    with pytest.raises(Failure, match="timed out"):
        translator(endpoint, timeout=0.2).translate("猫")
    assert time.perf_counter() - began < 0.9


def test_nobody_there() -> None:
    with pytest.raises(Failure, match=r"no translation from http://127\.0\.0\.1:9/v1"):
        ChatTranslator(url="http://127.0.0.1:9/v1", model="small", timeout=2).translate("猫")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:11434", "", "ftp://host/v1", "http://"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(BadInput, match="translator url"):
        ChatTranslator(url=url, model="small")


def test_the_environment() -> None:
    assert from_environment({}) is None
    assert from_environment({"FLUXLOOM_TRANSLATOR_MODEL": "small"}) is None
    url = {"FLUXLOOM_TRANSLATOR_URL": "http://host/v1"}
    with pytest.raises(BadInput, match="try FLUXLOOM_TRANSLATOR_MODEL"):
        from_environment(url)
    made = from_environment({**url, "FLUXLOOM_TRANSLATOR_MODEL": "small", "FLUXLOOM_TRANSLATOR_KEY": "secret"})
    assert made == ChatTranslator(url="http://host/v1", model="small", key="secret")
    assert "secret" not in repr(made)
