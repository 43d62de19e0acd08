"""Fits in worker processes, of which Lightning tells the callbacks nothing when one fails."""

import os
import sys

import pytest

from lit_stability import read_incidents
from tests.programs import run_program

SCRIPT = """
import sys
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_stability import stability_callbacks
from lit_stability.faults import FaultInjector, NanLoss
from tests.conftest import Regression, make_trainer, regression_data


class Crash(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 3:
            raise ZeroDivisionError("of the user")


if __name__ == "__main__":
    root, strategy, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])
    keep = ModelCheckpoint(root + "/kept", save_top_k=1, every_n_epochs=1)
    faults = FaultInjector([NanLoss(step=18)])
    callbacks = [faults, *stability_callbacks(), Crash(), keep]
    options = {"max_epochs": 5, "max_steps": -1, "enable_checkpointing": True}
    trainer = make_trainer(
        root, callbacks, strategy=strategy, devices=devices, limit_train_batches=8, **options
    )
    trainer.fit(Regression(), regression_data(30))
"""


@pytest.mark.skipif(os.name == "nt", reason="forks")
@pytest.mark.parametrize(
    ("strategy", "devices"), [("ddp_fork", 2), pytest.param("ddp_spawn", 1, marks=pytest.mark.long)]
)
def test_exception_in_a_worker_leaves_no_hidden_file_and_closes_the_record(
    strategy, devices, tmp_path
):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, tmp_path / "run", strategy, devices]
    done = run_program(command, folder=tmp_path, timeout=300)
    assert "ZeroDivisionError: of the user" in done.stderr
    assert not list((tmp_path / "run").rglob(".*"))
    assert [i["outcome"] for i in read_incidents(tmp_path / "run")] == ["handled"]
