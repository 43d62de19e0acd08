"""Small networks and batches for the tests of the translation model."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.translation.batches import Batch
from models.translation.config import TransformerConfig
from models.translation.corpus import FOLDER
from models.translation.transformer import Transformer

V = 40


def make_model(**options: object) -> Transformer:
    """Build a small network in eval mode, the same one for the same options."""
    torch.manual_seed(0)
    shape = {"vocabulary_size": V, "d_model": 32, "n_heads": 4, "d_feedforward": 48, "dropout": 0.0}
    return Transformer(TransformerConfig(**{**shape, "max_length": 24, **options})).eval()


def make_batch(n_rows: int = 5, n_source: int = 9, n_target: int = 11) -> Batch:
    """Draw random sentences between bos and eos, each row with more padding than the last."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(4, V, (n_rows, n_source), generator=generator)
    target = torch.randint(4, V, (n_rows, n_target), generator=generator)
    target[:, 0] = 1
    for row in range(n_rows):
        source[row, n_source - row - 1] = 2
        source[row, n_source - row :] = 0
        target[row, n_target - row - 1] = 2
        target[row, n_target - row :] = 0
    return Batch(source, target)


@pytest.fixture
def model_of() -> Callable[..., Transformer]:
    """A maker of small networks."""
    return make_model


@pytest.fixture
def batch() -> Batch:
    """Five padded rows."""
    return make_batch()


@pytest.fixture
def corpus_on_disk() -> str:
    """Root of the real corpus; the test is skipped where there is none."""
    beside_project = Path(__file__).parents[4] / "shared/data/Classical-Modern"
    root = Path(os.environ.get("CLASSICAL_MODERN_ROOT", beside_project))
    if not (root / FOLDER).is_dir():
        pytest.skip("set CLASSICAL_MODERN_ROOT to the folder that contains 双语数据")
    return str(root)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
