"""What the probes cost, and what they foretell.

    python -m benchmarks.probes cost [--steps 60] [--quick]
    python -m benchmarks.probes cases [--seeds 3]

``cost``: one process, one torch thread, the model of `benchmarks.overhead`. A bare Trainer and one
per probe take turns, step by step, each probe measuring on every step; reported is the median ratio
of a probed step to the bare one beside it, with its quartiles, and what that makes per step at the
probe's own interval. ``cases``: the instabilities that the probes are for and their healthy twins;
for each seed what was told, when, and when the loss first rose to three times the median of the 50
steps before.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import seed_everything

from benchmarks.byte_gpt import ByteGPTConfig
from benchmarks.instabilities.cases import CASES, Case
from benchmarks.overhead.suites import Suite
from benchmarks.overhead.turns import Setting, take_turns
from benchmarks.results import Spread, Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability import AttentionProbe, CurvatureProbe, GradientMonitor
from lit_stability.measurement.second_moment_ratio import SecondMomentRatio

PROBES: dict[str, Any] = {
    "AttentionProbe": lambda: [GradientMonitor(), AttentionProbe(every=1)],
    "CurvatureProbe": lambda: [GradientMonitor(), CurvatureProbe(every=1)],
}
INTERVALS = {"AttentionProbe": AttentionProbe().every, "CurvatureProbe": CurvatureProbe().every}
FORETOLD: dict[str, Any] = {
    "attention logits grow": lambda: [AttentionProbe()],
    "Adam's beta2 makes spikes": lambda: [CurvatureProbe(every=1)],
    "edge of stability": lambda: [CurvatureProbe(every=1)],
}


def cost(steps: int, config: ByteGPTConfig) -> tuple[dict[str, Any], list[Table]]:
    """Cost of each probe, and of the second moment's staleness, as figures and as a table."""
    suites = {"monitor": Suite(lambda: [GradientMonitor()])}
    suites |= {name: Suite(make) for name, make in PROBES.items()}
    found = take_turns(suites, Setting(config, steps=steps), suites)
    times = {name: each.steps for name, each in found.items()}
    bare = times["monitor"][5:]
    figures: dict[str, Any] = {"step_ms": 1e3 * statistics.median(bare), "steps": len(bare)}
    rows = []
    for name in PROBES:
        extra = [t - b for t, b in zip(times[name][5:], bare, strict=False)]
        shares = Spread.of(e / b for e, b in zip(extra, bare, strict=False))
        every, ms = INTERVALS[name], 1e3 * statistics.median(extra)
        figures[name] = {"ms": ms, "share": shares, "every": every}
        rows.append([name, f"{ms:.1f}", f"{shares:.2%}", f"{shares.median / every:.3%}"])
    figures["moment_rms_ms"] = 1e3 * staleness()
    rows.append(["moment_rms", f"{figures['moment_rms_ms']:.4f}", "-", "-"])
    columns = ["probe", "ms per probed step", "of a step (quartiles)", "at its interval"]
    return figures, [Table(f"probes, step {figures['step_ms']:.1f} ms", columns, rows)]


def staleness(tensors: int = 66, steps: int = 2000) -> float:
    """Median seconds per step of `SecondMomentRatio`, which is all that ``moment_rms`` costs."""
    kept, seconds = SecondMomentRatio(), []
    decays = {f"blocks.{i}.weight": 0.95 for i in range(tensors)}
    for step in range(steps):
        norms = {name: 1.0 + (step * i) % 7 for i, name in enumerate(decays)}
        start = time.perf_counter()
        kept.measure(norms, decays, taken=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run_case(case: Case, seed: int, probes: list[Any]) -> tuple[list[tuple[str, int]], list[float]]:
    """What was told, with its step, and the losses."""
    seed_everything(seed, verbose=False)
    module = case.module()
    monitor = GradientMonitor()
    trainer = quiet_trainer(
        max_steps=case.steps,
        callbacks=[monitor, *probes],
        default_root_dir=tempfile.mkdtemp(),
    )
    trainer.fit(module, case.data(seed))
    losses: list[float] = module.losses  # type: ignore[assignment]
    return [(i.first.kind, i.first.step) for i in monitor.incidents], losses


def first_spike(losses: list[float], window: int = 50, factor: float = 3.0) -> int | None:
    """First step whose loss is `factor` times the median of the `window` before it."""
    for step in range(window + 10, len(losses)):
        if losses[step] > factor * statistics.median(losses[step - window : step]):
            return step
    return None


def cases(seeds: int) -> tuple[dict[str, Any], list[Table]]:
    """Each case and its twin, once with its probes and once with the monitor."""
    rows = []
    for name, probes in FORETOLD.items():
        both = [CASES[name], CASES[name].healthy()] if CASES[name].twin else [CASES[name]]
        for case in both:
            for seed in range(seeds):
                told, losses = run_case(case, seed, probes())
                alone, _ = run_case(case, seed, [])
                loss = f"{losses[0]:.3g} to {losses[-1]:.3g}"
                said = (str(first_spike(losses)), str(told), str(alone))
                rows.append([case.name, str(seed), loss, *said])
                print(rows[-1], flush=True)
    columns = ["case", "seed", "loss", "spike", "told", "by GradientMonitor alone"]
    return {"rows": rows}, [Table("what probes foretell", columns, rows)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("what", choices=["cost", "cases"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.pytorch.lit_stability"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = ByteGPTConfig(width=128, layers=4) if args.quick else ByteGPTConfig(width=400, layers=5)
    found = cases(args.seeds) if args.what == "cases" else cost(args.steps, model)
    save(f"probes_{args.what}", folder_of(args), *found)


if __name__ == "__main__":
    main()
