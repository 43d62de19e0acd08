"""Measures the cost of the probes, and how early they warn.

    python -m benchmarks.probes cost [--steps 60] [--quick]
    python -m benchmarks.probes cases [--seeds 3]

``cost``: one process, one torch thread, the model of `benchmarks.overhead`. A Trainer with only a
monitor and one Trainer per probe alternate step by step; each probe measures on every step.
Reports the median additional time of a probed step relative to the step without probe, with its
quartiles, and the cost per step at the probe's default interval. ``cases``: the instabilities that
the probes detect and their healthy twins; reports for each seed the incidents and the step at
which the loss first rose to three times the median of the previous 50 steps.
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
from lit_stability import AttentionProbe, CurvatureProbe, GradientMonitor, QKClip
from lit_stability.measurement.second_moment_ratio import SecondMomentRatio

PROBES: dict[str, Any] = {
    "AttentionProbe": lambda: [GradientMonitor(), AttentionProbe(every=1)],
    "CurvatureProbe": lambda: [GradientMonitor(), CurvatureProbe(every=1)],
    "QKClip": lambda: [GradientMonitor(), QKClip(every=1)],
}
INTERVALS = {
    "AttentionProbe": AttentionProbe().every,
    "CurvatureProbe": CurvatureProbe().every,
    "QKClip": QKClip().every,
}
PROBES_OF_CASE: dict[str, Any] = {
    "attention logits grow": lambda: [AttentionProbe()],
    "Adam's beta2 makes spikes": lambda: [CurvatureProbe(every=1)],
    "edge of stability": lambda: [CurvatureProbe(every=1)],
}


def cost(steps: int, config: ByteGPTConfig) -> tuple[dict[str, Any], list[Table]]:
    """Measures the cost of each probe and of `SecondMomentRatio`; returns figures and a table."""
    suites = {"monitor": Suite(lambda: [GradientMonitor()])}
    suites |= {name: Suite(make) for name, make in PROBES.items()}
    measured = take_turns(suites, Setting(config, steps=steps), suites)
    times = {name: result.steps for name, result in measured.items()}
    bare = times["monitor"][5:]
    figures: dict[str, Any] = {"step_ms": 1e3 * statistics.median(bare), "steps": len(bare)}
    rows = []
    for name in PROBES:
        extra = [t - b for t, b in zip(times[name][5:], bare, strict=False)]
        shares = Spread.of(e / b for e, b in zip(extra, bare, strict=False))
        every, ms = INTERVALS[name], 1e3 * statistics.median(extra)
        figures[name] = {"ms": ms, "share": shares, "every": every}
        rows.append([name, f"{ms:.1f}", f"{shares:.2%}", f"{shares.median / every:.3%}"])
    figures["moment_rms_ms"] = 1e3 * ratio_seconds()
    rows.append(["moment_rms", f"{figures['moment_rms_ms']:.4f}", "-", "-"])
    columns = ["probe", "ms per probed step", "of a step (quartiles)", "at its interval"]
    return figures, [Table(f"probes, step {figures['step_ms']:.1f} ms", columns, rows)]


def ratio_seconds(tensors: int = 66, steps: int = 2000) -> float:
    """Returns the median seconds per step of `SecondMomentRatio`, all that ``moment_rms`` costs."""
    meter, seconds = SecondMomentRatio(), []
    decays = {f"blocks.{i}.weight": 0.95 for i in range(tensors)}
    for step in range(steps):
        norms = {name: 1.0 + (step * i) % 7 for i, name in enumerate(decays)}
        start = time.perf_counter()
        meter.measure(norms, decays, taken=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run_case(case: Case, seed: int, probes: list[Any]) -> tuple[list[tuple[str, int]], list[float]]:
    """Trains a case; returns kind and step of its incidents, and its losses."""
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
    """Returns the first step with a loss above `factor` times the median of the `window` before."""
    for step in range(window + 10, len(losses)):
        if losses[step] > factor * statistics.median(losses[step - window : step]):
            return step
    return None


def cases(seeds: int) -> tuple[dict[str, Any], list[Table]]:
    """Runs each case and its twin with and without probes."""
    rows = []
    for name, probes in PROBES_OF_CASE.items():
        both = [CASES[name], CASES[name].healthy()] if CASES[name].twin else [CASES[name]]
        for case in both:
            for seed in range(seeds):
                with_probes, losses = run_case(case, seed, probes())
                without_probes, _ = run_case(case, seed, [])
                loss = f"{losses[0]:.3g} to {losses[-1]:.3g}"
                cells = (str(first_spike(losses)), str(with_probes), str(without_probes))
                rows.append([case.name, str(seed), loss, *cells])
                print(rows[-1], flush=True)
    columns = ["case", "seed", "loss", "spike", "incidents", "incidents without probes"]
    return {"rows": rows}, [Table("warnings of the probes", columns, rows)]


def main() -> None:
    """Runs the benchmark and writes its files."""
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
    results = cases(args.seeds) if args.what == "cases" else cost(args.steps, model)
    save(f"probes_{args.what}", folder_of(args), *results)


if __name__ == "__main__":
    main()
