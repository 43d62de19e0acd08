"""Measurements on a GPU: one wait a step, kernels of attention, the origin of a NaN, its errors."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_stability import AttentionProbe, GradientMonitor, stability_callbacks
from tests.conftest import make_trainer
from tests.device_rules import PACKAGE
from tests.exact import Batches, loader


class Quiet(LightningModule):
    """A net whose own step never waits for the device."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x).squeeze(-1), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3, fused=True)


class Waits(Callback):
    """Counts the warnings of torch about waits, by the package's file, from step 5 on."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 5:
            torch.cuda.set_sync_debug_mode("warn")
            self._caught = warnings.catch_warnings(record=True)
            self._log = self._caught.__enter__()
            warnings.simplefilter("always")

    def on_train_end(self, trainer, *_):
        torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(None, None, None)
        self.found = [w.filename for w in self._log if "synchron" in str(w.message)]


@pytest.mark.cuda
def test_healthy_step_waits_for_one_copy_to_the_host(tmp_path):
    data = [[part.cuda() for part in Batches()[i % 24]] for i in range(60)]
    waits = Waits()
    trainer = make_trainer(
        tmp_path, [*stability_callbacks(), waits], accelerator="gpu", devices=1, max_steps=60
    )
    trainer.fit(Quiet(), loader(data))
    ours = [name for name in waits.found if name.startswith(PACKAGE)]
    steps = 55
    assert sum(name.endswith("norms.py") for name in ours) == steps
    # Snapshots 1, 2, 4, ... compare a sample of the weights; a good checkpoint is copied once.
    assert len(ours) - steps <= 4


class Attends(LightningModule):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.qkv, self.head = nn.Linear(8, 96), nn.Linear(32, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(1, 2, 0, 3).unsqueeze(1)
        with sdpa_kernel(self.backend):
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        mixed = mixed.transpose(1, 2).reshape(len(x), 32)
        return nn.functional.mse_loss(self.head(mixed).squeeze(-1), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@pytest.mark.cuda
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_logits_are_measured_whatever_the_kernel(backend, tmp_path):
    torch.use_deterministic_algorithms(False)  # the efficient kernel has no such backward pass
    seen = []

    class Read(Callback):
        def on_step_measured(self, trainer, pl_module, stats):
            seen.extend(stats.readings)

    trainer = make_trainer(
        tmp_path,
        [GradientMonitor(), AttentionProbe(every=5), Read()],
        accelerator="gpu",
        devices=1,
        max_steps=20,
        precision="bf16-mixed",
    )
    trainer.fit(Attends(BACKENDS[backend]), loader(Batches()))
    assert seen


BAD = Batches()[7][1]


class Logarithm(Quiet):
    """Takes the logarithm of a negative number in one batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        bad = torch.equal(batch[1].cpu(), BAD)
        return loss + torch.log(-loss) if bad else loss


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("matmul", ["highest", "high"])
def test_origin_of_a_nan_is_found_on_a_gpu(matmul, precision, options, tmp_path):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    suite = stability_callbacks()
    try:
        trainer = make_trainer(
            tmp_path, suite, **{**options, "max_epochs": 1, "precision": precision, "max_steps": -1}
        )
        trainer.fit(Logarithm(), loader(Batches()))
    finally:
        torch.set_float32_matmul_precision(before)
    (incident,) = suite[0].incidents
    assert "log" in str(incident.origin)
    assert "test_signals_on_gpu.py" in str(incident.origin)
    assert incident.cause == "operation outside its domain"


@pytest.mark.cuda
def test_assertion_of_a_kernel_ends_the_fit_with_its_own_error(tmp_path):
    """It leaves CUDA unusable: another process, and no retry."""
    script = textwrap.dedent(
        f"""
        import torch
        from torch import nn
        from tests.exact import Batches, loader
        from tests.gpu.test_signals_on_gpu import Quiet
        from tests.conftest import make_trainer
        from lit_stability import stability_callbacks

        class OutOfRange(Quiet):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(4, 1)

            def training_step(self, batch, batch_idx):
                index = torch.full((8,), 99 if batch_idx == 7 else 1, device=self.device)
                return super().training_step(batch, batch_idx) + self.table(index).sum()

        trainer = make_trainer({str(tmp_path)!r}, stability_callbacks(), accelerator="gpu",
                               devices=1, max_steps=30)
        trainer.fit(OutOfRange(), loader(Batches()))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
