"""Running the module beside training: afterwards all is as if it had not been."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer

from lit_stability.rng import capture_rng, restore_rng
from lit_stability.snapshots import BufferGuard
from lit_stability.trainer_state.metrics import LoggedMetrics


@contextmanager
def aside(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Put generators, buffers and metrics back afterwards, and log nothing meanwhile.

    What a ``training_step`` does to attributes of the module's own is not undone.
    """
    rng, guard, metrics = capture_rng(), BufferGuard(pl_module), LoggedMetrics(pl_module)
    guard.capture()
    metrics.capture(trainer)
    silenced = {name: vars(pl_module).get(name) for name in ("log", "log_dict")}
    try:
        vars(pl_module).update(dict.fromkeys(silenced, lambda *args, **kwargs: None))
        yield
    finally:
        for name, before in silenced.items():
            vars(pl_module).pop(name)
            if before is not None:
                vars(pl_module)[name] = before
        guard.restore()
        metrics.restore(trainer)
        restore_rng(rng)
