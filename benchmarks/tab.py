"""Measures the cost of the Stability tab: writing in a training step, and serving in TensorBoard.

    python -m benchmarks.tab [--layers 100] [--steps 20000] [--served 300] [--quick]

One process, one thread. First drives a `StepHistoryWriter` on a Trainer with a `TensorBoardLogger`
with synthetic measurements, from verdict to end of batch: on steps that are written, without update
ratios, with update ratios on every tenth step (the default) or on every step, and on steps that are
not written. "with its thread" is the processor time per attempt until the file is closed, including
the thread of the event file. "until it returns" is the wall-clock time that the step waits. The
cases alternate; reports medians over the repetitions and quartiles. Then TensorBoard's Python
reader reads a run of `--steps` attempts, all written, with the samples that the plugin requests,
and every route is requested five times; reports the best.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.test import Client

from benchmarks.results import Spread, Table, add_options, folder_of, save
from lit_stability.callbacks.gradient_monitor.step_history_writer import StepHistoryWriter
from lit_stability.incidents.step_history import StepHistory
from lit_stability.measurement.step_stats import StepStats, WeightMoves
from lit_stability.tensorboard.plugin import StabilityPlugin
from lit_stability.tensorboard.tags import SAMPLES


def measurement(step: int, layers: int, *, scan: bool) -> StepStats:
    """Creates a synthetic step, optionally with a scan of the weights."""
    names = tuple(f"encoder.layers.{i}.weight" for i in range(layers))
    rng = random.Random(step)
    moves = WeightMoves(
        since=step - 10,
        norms=(1.0,) * layers,
        peaks=(),
        distances=tuple(rng.random() for _ in names),
        farthest=(),
    )
    return StepStats(
        step=step,
        loss=2.0,
        grad_norm=1.0 + step % 7,
        names=names,
        grad_norms=tuple(rng.lognormvariate(0, 1) for _ in names),
        learning_rates=(1e-3,),
        nominal_learning_rates=(1e-3,),
        weight_norms=tuple((name, 1.0) for name in names) if scan else (),
        weight_moves=moves if scan else None,
    )


def make_writer(
    root: Path, layers: int
) -> tuple[Trainer, StepHistoryWriter, torch.optim.Optimizer]:
    """Returns a Trainer that is not run, its writer, and an optimizer with gradients."""
    logger = TensorBoardLogger(root, "run", "")
    options = {"enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", logger=logger, default_root_dir=root, **options)
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(layers)]
    for weight in weights:
        weight.grad = torch.zeros(1)
    return trainer, StepHistoryWriter(trainer, StepHistory()), torch.optim.SGD(weights, 1.0)


def attempt_costs(
    layers: int, attempts: int, *, written: bool, scan_every: int
) -> tuple[list[float], float]:
    """Returns the wall-clock time of each attempt and the mean processor time, in milliseconds."""
    scans = [scan_every > 0 and step % scan_every == 0 for step in range(attempts)]
    steps = [measurement(step, layers, scan=scan) for step, scan in enumerate(scans)]
    with tempfile.TemporaryDirectory() as folder:
        trainer, writer, optimizer = make_writer(Path(folder), layers)
        times = []
        start = time.process_time()
        for stats in steps:
            begin = time.perf_counter()
            if written:
                writer.write_current()
            writer.judged(stats, optimizer)
            writer.batch_ended()
            times.append(1e3 * (time.perf_counter() - begin))
        trainer.loggers[0].finalize("success")
        return times, 1e3 * (time.process_time() - start) / attempts


def writing(layers: int, attempts: int, repetitions: int) -> dict[str, dict[str, Spread]]:
    """Measures the cost of each kind of attempt in milliseconds; the kinds alternate."""
    cases = {
        "written": (True, 0),
        "update ratios, 1 in 10": (True, 10),
        "update ratios, all": (True, 1),
        "not written": (False, 0),
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, (written, every) in cases.items():
            times, total = attempt_costs(layers, attempts, written=written, scan_every=every)
            measured[name].append((total, statistics.median(times[10:])))
    parts = ("with its thread", "until it returns")
    return {
        name: dict(zip(parts, map(Spread.of, zip(*pairs, strict=True)), strict=True))
        for name, pairs in measured.items()
    }


def serving(layers: int, steps: int) -> dict[str, tuple[float, int]]:
    """Writes a run and reads it like TensorBoard; returns milliseconds and bytes of each route."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, writer, optimizer = make_writer(Path(folder), layers)
        for step in range(steps):
            writer.write_current()
            writer.judged(measurement(step, layers, scan=step % 10 == 9), optimizer)
            writer.batch_ended()
        trainer.loggers[0].finalize("success")
        begin = time.perf_counter()
        multiplexer = EventMultiplexer(tensor_size_guidance={"stability": SAMPLES})
        multiplexer.AddRunsFromDirectory(folder)
        multiplexer.Reload()
        reading = {"reading": (1e3 * (time.perf_counter() - begin), 0)}
        provider = MultiplexerDataProvider(multiplexer, folder)
        plugin = StabilityPlugin(TBContext(data_provider=provider))
        quantities = [f"layers?run=run&quantity={q}" for q in ("grad_norm", "update_ratio")]
        routes = ("runs", "steps?run=run", "incidents?run=run", "verdict?run=run", *quantities)
        return reading | {route: request(plugin, route) for route in routes}


def request(plugin: StabilityPlugin, route: str) -> tuple[float, int]:
    """Returns milliseconds and bytes of the fastest of five gzip responses."""
    app = Client(plugin.get_plugin_apps()["/" + route.partition("?")[0]])
    headers = {"Accept-Encoding": "gzip"}

    def get() -> int:
        return len(app.get("/" + route, headers=headers).data)

    times = [timed(get) for _ in range(5)]
    seconds, size = min(times)
    return 1e3 * seconds, size


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds of a call and its result."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--attempts", type=int)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--served", type=int, default=300)
    args = parser.parse_args()
    attempts, steps = (300, 500) if args.quick else (3000, 20_000)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    written = writing(args.layers, args.attempts or attempts, args.repetitions)
    served = serving(args.served, args.steps or steps)
    save("tab", folder_of(args), {"writing": written, "serving": served}, tables(written, served))


def tables(
    written: dict[str, dict[str, Spread]], served: dict[str, tuple[float, int]]
) -> list[Table]:
    """Creates the tables of the cost of writing and of serving."""
    parts = ("with its thread", "until it returns")
    rows = [[name, *(f"{cost[p]:.3f}" for p in parts)] for name, cost in written.items()]
    routes = [[r, f"{ms:.1f}", f"{size / 2**20:.2f}"] for r, (ms, size) in served.items()]
    return [
        Table("written, ms per attempt (quartiles)", ["attempt", *parts], rows),
        Table("served, best of five", ["route", "ms", "MiB, compressed"], routes),
    ]


if __name__ == "__main__":
    main()
