"""What the suite saves: one fault at step 150 of 300, against the clean twin's final loss.

    python -m benchmarks.rescue [--seeds 0 1] [--scenarios ...]

A byte-level Transformer of 1.1M parameters on the standard library, one torch thread. The final
loss is that of 20 held-out batches; a cell is its ratio to the clean twin of the same seed.
Recovered means at most 1.05.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.nn import functional as F

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, loader
from lit_stability import Incident, TrainingStopped, stability_callbacks
from lit_stability.faults import (
    BadBatch,
    CorruptMoment,
    CorruptWeight,
    Fault,
    FaultInjector,
    NanLoss,
    ScaleGradients,
    ScaleLoss,
)

STEP, STEPS = 150, 300
SHAPE = ByteGPTConfig(width=128, layers=5, length=32)
BATCH = 8

FAULTS: dict[str, Callable[[], Fault | None]] = {
    "NaN batch": lambda: NanLoss(step=STEP),
    "loss x1e4": lambda: ScaleLoss(step=STEP, factor=1e4),
    "LR x300 by the scheduler": lambda: None,
    "NaN weight": lambda: CorruptWeight(step=STEP, parameter="model.blocks.1.up.weight"),
    "Adam v zeroed": lambda: CorruptMoment(step=STEP),
    "gradients x1e3, 5 steps": lambda: ScaleGradients(step=STEP, steps=5),
}
HEALTHY: dict[str, Callable[[], Fault | None]] = {
    "clean": lambda: None,
    "hard batch": lambda: BadBatch(step=STEP),
    "five hard batches": lambda: BadBatch(step=STEP, steps=5),
}


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    loss: float
    """Held-out loss in nats per byte; NaN where the weights are."""
    incidents: tuple[Incident, ...]
    batches: int
    """Batches taken from the loader."""


class Incidents(Callback):
    """Collects the incidents of a run."""

    def __init__(self) -> None:
        self.found: list[Incident] = []

    def on_incident(self, trainer: object, pl_module: object, incident: Incident) -> None:
        """Keep each incident once."""
        if incident not in self.found:
            self.found.append(incident)


def run(scenario: str, seed: int, *, protected: bool) -> Result:
    """Train from a seed through a scenario."""
    seed_everything(seed, verbose=False)
    jump = scenario == "LR x300 by the scheduler"
    module = ByteGPTModule(SHAPE, schedule=lambda s: 300.0 if jump and s >= STEP else 1.0)
    fault = (FAULTS | HEALTHY)[scenario]()
    incidents = Incidents()
    callbacks: list[Callback] = [FaultInjector([fault])] if fault is not None else []
    callbacks += [*stability_callbacks(), incidents] if protected else []
    with tempfile.TemporaryDirectory() as root:
        trainer = Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=root,
        )
        try:
            trainer.fit(module, loader(BATCH, SHAPE.length, seed))
        except TrainingStopped as stop:
            print(stop)
    return Result(held_out_loss(module), tuple(incidents.found), len(module.losses))


@torch.no_grad()
def held_out_loss(module: ByteGPTModule) -> float:
    """Mean loss over 20 batches that are the same for every run."""
    batches = iter(loader(64, SHAPE.length, seed=12345))
    losses = []
    for _ in range(20):
        batch = next(batches)
        logits_BTV = module.model(batch[:, :-1])
        losses.append(float(F.cross_entropy(logits_BTV.flatten(0, 1), batch[:, 1:].flatten())))
    return sum(losses) / len(losses)


def main() -> None:
    """Run the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--scenarios", nargs="+", default=[*FAULTS, *HEALTHY])
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| scenario | seed | unprotected | protected | incidents | batches |")
    print("|---|---|---|---|---|---|")
    for seed in args.seeds:
        clean = run("clean", seed, protected=False).loss
        for scenario in args.scenarios:
            bare, kept = (run(scenario, seed, protected=p) for p in (False, True))
            cells = [
                f"{r.loss / clean:.3f}" if math.isfinite(r.loss) else "NaN" for r in (bare, kept)
            ]
            kinds = ", ".join(f"{i.first.kind}: {i.done}" for i in kept.incidents) or "none"
            print(f"| {scenario} | {seed} | {cells[0]} | {cells[1]} | {kinds} | {kept.batches} |")


if __name__ == "__main__":
    main()
