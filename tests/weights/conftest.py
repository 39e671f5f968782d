"""A hub on loopback, and tiny models with real names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from torch import Tensor, nn

if TYPE_CHECKING:
    from hub_server import HubServer

    from fluxloom.weights.download import Hub


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    """Real names at toy sizes, so that files are recognised by what they hold."""
    from tiny import DEV, VAE

    from fluxloom.core.autoencoder import Autoencoder
    from fluxloom.core.clip import ClipText
    from fluxloom.core.specs import ClipSpec, T5Spec
    from fluxloom.core.t5 import T5Encoder
    from fluxloom.core.transformer import Transformer

    return {
        "transformer": state(Transformer(DEV)),
        "autoencoder": state(Autoencoder(VAE)),
        "clip": state(ClipText(ClipSpec(vocab_size=100, width=64, layers=2, heads=1, mlp=64))),
        "t5": state(T5Encoder(T5Spec(vocab_size=100, width=64, layers=2, heads=1, head_dim=64, mlp=64))),
    }


@pytest.fixture(scope="module")
def running() -> Iterator[HubServer]:
    import huggingface_hub
    from hub_server import serve

    with serve() as server:
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def server(running: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A hub without repositories, faults or memory."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    running.__init__(url=running.url, storage=running.storage)  # type: ignore[misc]
    return running


@pytest.fixture
def hub(server: HubServer, tmp_path: Path) -> Hub:
    from fluxloom.weights.download import Hub

    return Hub(endpoint=server.url, cache=tmp_path / "hub", offline=False, timeout=5, pause=0.001)
