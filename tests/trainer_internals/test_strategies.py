"""What is asked of a strategy."""

from datetime import timedelta

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from lit_stability import register_strategy
from lit_stability.trainer_internals import adapter_of
from lit_stability.trainer_internals.strategies import registry


@pytest.mark.parametrize(
    ("strategy", "seconds"),
    [
        ("auto", 0.0),
        (DDPStrategy(), 0.0),
        (DDPStrategy(timeout=timedelta(minutes=5)), 0.0),
        (DDPStrategy(timeout=timedelta(hours=2)), 7200.0),
        (ModelParallelStrategy(1, 1, timeout=timedelta(hours=2)), 7200.0),
    ],
    ids=["one device", "default", "shorter", "longer", "longer, sharded"],
)
def test_longest_wait_is_what_the_user_allows_beyond_the_default(strategy, seconds, tmp_path):
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, strategy=strategy, logger=False
    )

    assert adapter_of(trainer).longest_wait == seconds


class OwnLauncher(DDPStrategy):
    """A subclass that is the same for the suite."""


class OwnAveraging(DDPStrategy):
    """A subclass that is not."""


class RayDDPStrategy(DDPStrategy):
    """Ray's, by name."""


class RayFSDPStrategy(FSDPStrategy):
    """Ray's, by name."""


for each in (RayDDPStrategy, RayFSDPStrategy):
    each.__module__ = "ray.train.lightning._lightning_utils"


def adapter_for(strategy, tmp_path):
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=2, strategy="ddp", logger=False
    )
    strategy.cluster_environment = LightningEnvironment()
    strategy.cluster_environment.set_world_size(2)
    trainer._accelerator_connector.strategy = strategy
    return adapter_of(trainer)


@pytest.mark.parametrize(
    ("strategy", "sharing"),
    [(RayDDPStrategy, "replicas"), (RayFSDPStrategy, "shards"), (OwnAveraging, "untried")],
)
def test_strategy_of_ray_is_known_by_name_and_no_other_subclass_is(strategy, sharing, tmp_path):
    assert adapter_for(strategy(), tmp_path).sharing == sharing


def test_registered_strategy_is_treated_like_the_one_it_equals(tmp_path):
    assert adapter_for(OwnLauncher(), tmp_path).sharing == "untried"

    register_strategy(OwnLauncher, like="ddp")

    assert adapter_for(OwnLauncher(), tmp_path).sharing == "replicas"


@pytest.mark.parametrize(
    ("cls", "like", "message"),
    [
        (OwnLauncher, "dpp", "like must be one of .*ddp.*, got 'dpp'"),
        (Trainer, "ddp", "cls must be a class of strategies, got .*Trainer"),
        ("OwnLauncher", "ddp", "cls must be a class of strategies, got 'OwnLauncher'"),
    ],
)
def test_strategy_that_cannot_be_registered_gets_an_error_that_repeats_it(cls, like, message):
    with pytest.raises((TypeError, ValueError), match=message):
        register_strategy(cls, like=like)


def test_entry_point_of_an_installed_package_registers_its_strategy(tmp_path, monkeypatch):
    package = tmp_path / "cluster"
    (package / "cluster_lightning.dist-info").mkdir(parents=True)
    (package / "cluster_lightning.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: cluster-lightning\nVersion: 1\n"
    )
    (package / "cluster_lightning.dist-info" / "entry_points.txt").write_text(
        "[lit_stability.strategies]\ncluster = cluster_lightning:register\n"
    )
    (package / "cluster_lightning.py").write_text(
        "from lightning.pytorch.strategies import DDPStrategy\n"
        "from lit_stability import register_strategy\n"
        "class ClusterStrategy(DDPStrategy): ...\n"
        "def register(): register_strategy(ClusterStrategy, like='ddp')\n"
    )
    monkeypatch.syspath_prepend(str(package))
    registry._load_entry_points.cache_clear()
    import cluster_lightning

    assert adapter_for(cluster_lightning.ClusterStrategy(), tmp_path).sharing == "replicas"
