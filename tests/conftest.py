"""What every test shares: one thread per process, fixed seeds, no network, markers that mean something."""

from __future__ import annotations

import os

# Before torch is imported, and inherited by the commands that tests start: the test processes already share
# the cores, and one thread keeps sums in one order.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
# Tests use what is in the repository; a test that reaches for a hub is wrong, not slow.
os.environ["HF_HUB_OFFLINE"] = "1"
# Plain text from Rich and Typer, whatever terminal the tests run in.
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "120"

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

# Settings of whoever runs the tests are not part of what is tested.
for name in [name for name in os.environ if name.startswith("FLUXLOOM_")]:
    del os.environ[name]

torch.set_num_threads(1)
settings.register_profile("fluxloom", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fluxloom")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(no_gpu)
