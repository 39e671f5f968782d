"""pico, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pico import SPEC, save_model

from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.runtime import Runtime


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("pico"), SPEC)


@pytest.fixture(scope="session")
def runtime(folder: Path) -> Runtime:
    return Runtime.from_folder(folder, SPEC, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def pipeline(runtime: Runtime) -> Pipeline:
    return Pipeline(runtime)
