"""Several processes on GPUs: gloo on one of them, NCCL where there are two."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from tests.gpu.conftest import ACCELERATOR

SCRIPT = textwrap.dedent(
    """
    import json, os, sys
    import torch
    from lightning.pytorch import seed_everything
    from lightning.pytorch.strategies import DDPStrategy
    from lit_stability import stability_callbacks
    from tests.conftest import make_trainer, flat
    from tests.exact import Batches, loader
    from tests.exact_net import Net

    backend, accelerator, suite, root = sys.argv[1:]
    seed_everything(3, verbose=False)
    nan = [9] if suite == "nan" else []
    callbacks = [] if suite == "bare" else stability_callbacks()
    nodes = int(os.environ["WORLD_SIZE"]) if backend == "gloo" else 1
    devices = 1 if backend == "gloo" else 2
    trainer = make_trainer(root, callbacks, accelerator=accelerator, devices=devices,
                           num_nodes=nodes, strategy=DDPStrategy(process_group_backend=backend),
                           max_epochs=2, max_steps=-1)
    trainer.fit(Net(), loader(Batches(nan=nan)))
    if trainer.is_global_zero:
        incidents = [] if not callbacks else callbacks[0].incidents
        print("RESULT", json.dumps({"weights": flat(trainer.lightning_module).tolist(),
              "device": str(trainer.strategy.root_device), "steps": trainer.global_step,
              "responses": [r for i in incidents for r in i.responses]}))
    """
)


def results(backend, suite, root, port):
    """What rank 0 prints of a fit on two ranks."""
    ranks = range(2) if backend == "gloo" else range(1)
    processes = []
    for rank in ranks:
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if backend == "gloo":  # each process is a node of one device, and takes the first GPU
            env |= {"NODE_RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        command = [sys.executable, "-c", SCRIPT, backend, ACCELERATOR, suite, str(root)]
        processes.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    done = [process.communicate(timeout=180) for process in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), done
    (line,) = [ln for out, _ in done for ln in out.splitlines() if ln.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


@pytest.fixture
def port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


BACKENDS = [
    "gloo",
    pytest.param(
        "nccl",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
        ],
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_healthy_run_on_two_ranks_is_bit_identical(backend, tmp_path, port):
    bare = results(backend, "bare", tmp_path / "a", port)
    suite = results(backend, "suite", tmp_path / "b", port)
    assert suite == bare
    assert ACCELERATOR in bare["device"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_on_two_ranks_is_left_out(backend, tmp_path, port):
    found = results(backend, "nan", tmp_path, port)
    assert "step skipped" in found["responses"]
    assert torch.tensor(found["weights"]).isfinite().all()
