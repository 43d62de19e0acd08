"""Fits on a GPU with deterministic kernels.

``LIT_STABILITY_GPU_TESTS=cpu`` runs the tests that need no kernel of a GPU on the CPU: a check of
the tests themselves.
"""

import os
from pathlib import Path

import pytest
import torch

# cuBLAS is deterministic with a workspace of fixed size, which it reads when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

ACCELERATOR = os.environ.get("LIT_STABILITY_GPU_TESTS", "cuda")
ON_GPU = ACCELERATOR == "cuda"
MISSING = ON_GPU and not torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if MISSING:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif not ON_GPU and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs kernels of a GPU"))


@pytest.fixture(autouse=True)
def deterministic_kernels():
    """The same bits each time; a kernel that cannot raises."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def options():
    """Options of a Trainer on the device under test."""
    return {"accelerator": ACCELERATOR, "devices": 1, "max_epochs": 3}
