"""Fixtures for all tests: where the shared models and texts lie (tests that need them skip, saying so), and a small real model."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # models of a test are so small that a second thread only waits
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and texts beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared folder with models and texts beside the repository")
    return SHARED
