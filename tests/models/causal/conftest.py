"""A tiny Qwen2 with its tokenizer on disk, trained like the embedded backbone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.causal.backbone import BackboneConfig
from models.causal.batches import Batch
from models.causal.datamodule import CausalDataModule
from models.causal.module import CausalModule
from models.causal.pretraining import Recipe, pretrain

TINY = Recipe(
    vocabulary_size=320,
    width=16,
    n_layers=1,
    d_feedforward=24,
    n_sentences=100,
    n_steps=2,
    batch_size=4,
)


@pytest.fixture(scope="session")
def trunk(tmp_path_factory) -> BackboneConfig:
    """A backbone with weights in a folder, like a user's."""
    folder: Path = tmp_path_factory.mktemp("qwen")
    pretrain(TINY, folder)
    return BackboneConfig(source="pretrained", path=str(folder))


@pytest.fixture
def data_of(trunk) -> Callable[..., CausalDataModule]:
    """A maker of small datamodules."""

    def make_data(**options: object) -> CausalDataModule:
        sizes = {"batch_size": 8, "n_train": 64, "n_val": 24, "n_test": 24}
        return CausalDataModule(backbone=trunk, **{**sizes, **options})

    return make_data


@pytest.fixture
def module_of(trunk) -> Callable[..., CausalModule]:
    """A maker of modules with a built network, the same one for the same options."""

    def make_module(**options: object) -> CausalModule:
        torch.manual_seed(0)
        module = CausalModule(backbone=trunk, **options)
        module.build()
        return module

    return make_module


@pytest.fixture
def batch(data_of) -> Batch:
    """Eight sentences."""
    data = data_of()
    data.setup()
    return next(iter(data.val_dataloader()))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
