"""Ray's strategies, on two workers of a real cluster on this machine, where Ray is installed."""

import os
from pathlib import Path

import pytest
import torch

from lit_stability import stability_callbacks
from lit_stability.faults import FaultInjector, NanLoss
from lit_stability.trainer_internals import sharing

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[1]


def train(config):
    """Trains on one worker, and saves what it has seen."""
    from lightning.pytorch import Trainer
    from ray.train import get_context
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer

    from tests.rank_cases import Net, batches, whole

    rank, suite = get_context().get_world_rank(), stability_callbacks() if config["suite"] else []
    faults = [FaultInjector([NanLoss(step=30, rank=1)])] if config["fault"] else []
    torch.manual_seed(0)
    net = Net("ddp")
    trainer = Trainer(
        max_steps=50,
        accelerator="cpu",
        devices="auto",
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        callbacks=[*faults, *suite],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=config["root"],
    )
    torch.manual_seed(rank)
    prepare_trainer(trainer).fit(net, batches(rank, 2))
    found = [(i.first.kind, i.outcome) for i in (suite[0].incidents if suite else [])]
    seen = {"sharing": sharing(trainer), "incidents": found, "weights": whole(net.parameters())}
    torch.save(seen, f"{config['root']}/{rank}.pt")


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment)
    yield
    ray.shutdown()


def fit(root, *, suite, fault):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    root.mkdir()
    TorchTrainer(
        train,
        train_loop_config={"root": str(root), "suite": suite, "fault": fault},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(storage_path=str(root)),
    ).fit()
    return [torch.load(root / f"{rank}.pt") for rank in range(2)]


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_workers_of_ray_recover_exactly_together(tmp_path):
    bare = fit(tmp_path / "bare", suite=False, fault=False)
    clean = fit(tmp_path / "clean", suite=True, fault=False)
    faulty = fit(tmp_path / "faulty", suite=True, fault=True)

    for rank in range(2):
        assert clean[rank]["sharing"] == "replicas"
        assert clean[rank]["incidents"] == []
        assert torch.equal(clean[rank]["weights"], bare[rank]["weights"])
        assert faulty[rank]["incidents"] == [("non-finite loss", "recovered")]
        assert torch.equal(faulty[rank]["weights"], bare[rank]["weights"])
