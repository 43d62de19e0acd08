"""Measures how clipping rules affect the final loss of a byte-level language model.

    python -m benchmarks.clipping [--seeds 0 1] [--steps 200] [--quick]

Runs each rule alone, with `GradientMonitor` and without a responder, so that gradients that the
rule does not clip are used unchanged. Compares a clean run, a run with gradients 1000 times too
large for five or twenty steps in its middle, or those of one tensor for five steps, and a run with
a gradient 10 times too large on one step in ten from its middle on, which no detector reports.
Losses are held-out losses divided by that of the clean run without clipping; below 1 the rule
improves a healthy run. "Clipped" is the share of clipped steps in the clean run. The time is that
of the rule alone, with a full window; for a rule that clips tensors, with 66 of them.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import random
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, held_out_loss, loader
from benchmarks.results import Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability import AdaptiveGradientClipping, GradientMonitor
from lit_stability.faults import FaultInjector, ScaleGradients
from lit_stability.policies.clip_rules import (
    ClipRule,
    ClipsTensors,
    FixedClip,
    MeanSigmaClip,
    PercentileClip,
    PerTensorClip,
    TieredClip,
    ZScoreClip,
)

SHAPE = ByteGPTConfig(width=128, layers=5, length=32)
BATCH = 8

RULES: dict[str, ClipRule | None] = {
    "none": None,
    "FixedClip()": FixedClip(),
    "TieredClip()": TieredClip(),
    "PercentileClip()": PercentileClip(),
    "MeanSigmaClip()": MeanSigmaClip(),
    "ZScoreClip()": ZScoreClip(),
    "PerTensorClip()": PerTensorClip(),
}
SCENARIOS = ("clean", "x1000, 5 steps", "x1000, 20 steps", "x1000, one tensor", "x10, 1 in 10")

_TENSOR = "model.blocks.2.up.weight"


@dataclass(frozen=True)
class Result:
    """Result of a run."""

    loss: float
    """Held-out loss in nats per byte; NaN if the weights are NaN."""
    clipped: float
    """Share of clipped steps."""


def run(rule: ClipRule | None, scenario: str, seed: int, steps: int) -> Result:
    """Trains with a rule in a scenario."""
    seed_everything(seed, verbose=False)
    module = ByteGPTModule(SHAPE)
    middle = steps // 2
    faults = {
        "clean": [],
        "x1000, 5 steps": [ScaleGradients(step=middle, steps=5)],
        "x1000, 20 steps": [ScaleGradients(step=middle, steps=20)],
        "x1000, one tensor": [ScaleGradients(step=middle, steps=5, parameter=_TENSOR)],
        "x10, 1 in 10": [ScaleGradients(step=s, factor=10.0) for s in range(middle, steps, 10)],
    }[scenario]
    clipping = AdaptiveGradientClipping(rule=rule)
    callbacks: list[Callback] = [FaultInjector(list(faults))] if faults else []
    callbacks += [GradientMonitor(), *([] if rule is None else [clipping])]
    with tempfile.TemporaryDirectory() as root:
        trainer = quiet_trainer(
            max_steps=steps,
            callbacks=callbacks,
            default_root_dir=root,
        )
        trainer.fit(module, loader(BATCH, SHAPE.length, seed))
    return Result(held_out_loss(module), clipping.clipped / max(1, clipping.taken))


def microseconds(rule: ClipRule | None, rounds: int = 5000) -> float:
    """Returns the time of one threshold and one update in microseconds, with a full window."""
    if rule is None:
        return 0.0
    rule, generator = copy.deepcopy(rule), random.Random(0)
    norms = [generator.lognormvariate(0.0, 0.3) for _ in range(rounds)]
    names = [f"blocks.{i}.weight" for i in range(66)]
    for norm in norms[:1000]:
        rule.update(norm)
    start = time.perf_counter()
    for norm in norms:
        rule.threshold(norm)
        rule.update(norm)
        if isinstance(rule, ClipsTensors):
            limits = rule.tensor_thresholds(names)
            rule.update_tensors(names, [min(norm, limit) for limit in limits])
    return 1e6 * (time.perf_counter() - start) / rounds


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    seeds = args.seeds or ([0] if args.quick else [0, 1])
    steps = args.steps or (40 if args.quick else 200)
    for name in ("lightning.pytorch", "lightning.pytorch.lit_stability"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    save("clipping", folder_of(args), *compare(seeds, steps))


def compare(seeds: list[int], steps: int) -> tuple[dict[str, Any], list[Table]]:
    """Runs every rule in every scenario; returns figures and a table."""
    bare = {seed: run(None, "clean", seed, steps) for seed in seeds}
    figures: dict[str, Any] = {"seeds": seeds, "steps": steps, "rules": {}}
    rows = []
    for name, rule in RULES.items():
        cells, clipped = [], []
        for scenario in SCENARIOS:
            known = bare if rule is None and scenario == "clean" else {}
            results = [known.get(s) or run(rule, scenario, s, steps) for s in seeds]
            ratios = [r.loss / bare[s].loss for r, s in zip(results, seeds, strict=True)]
            figures["rules"].setdefault(name, {})[scenario] = ratios
            cells.append(", ".join(f"{r:.3f}" if math.isfinite(r) else "NaN" for r in ratios))
            clipped += [f"{r.clipped:.1%}" for r in results] if scenario == "clean" else []
        figures["rules"][name]["clipped in clean"] = clipped
        rows.append([name, *cells, ", ".join(clipped), f"{microseconds(rule):.1f}"])
    columns = ["rule", *SCENARIOS, "clipped in clean", "us per step"]
    title = "held-out loss divided by that of the clean run without clipping"
    return figures, [Table(title, columns, rows)]


if __name__ == "__main__":
    main()
