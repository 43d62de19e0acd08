"""What the Stability tab costs: a training step that writes for it, and TensorBoard that serves it.

    python -m benchmarks.tab [--layers 100] [--steps 20000] [--served 300] [--quick]

One process, one thread. First an attempt log on a Trainer with a `TensorBoardLogger`, driven with
made-up measurements: from verdict to end of batch, on steps that are written, with update ratios on
every tenth, as by default, or on all of them, and on steps that are not written. "with its thread"
is the processor's time until the file is closed, over the attempts: what the event file's own
thread takes, of the same interpreter, is a part of it. "until it returns" is how long the step
waits, of the clock on the wall. The cases take turns, and the medians over the repetitions are
reported, with the quartiles. Then a run of that many attempts, all of them written, is read by
TensorBoard's own Python reader with the samples that the plugin asks for, and every route is asked
five times; the best is reported.
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
    """A made-up step; with a scan of the weights on request."""
    names = tuple(f"encoder.layers.{i}.weight" for i in range(layers))
    draw = random.Random(step)
    moves = WeightMoves(
        since=step - 10,
        norms=(1.0,) * layers,
        peaks=(),
        distances=tuple(draw.random() for _ in names),
        farthest=(),
    )
    return StepStats(
        step=step,
        loss=2.0,
        grad_norm=1.0 + step % 7,
        names=names,
        grad_norms=tuple(draw.lognormvariate(0, 1) for _ in names),
        learning_rates=(1e-3,),
        nominal_learning_rates=(1e-3,),
        weight_norms=tuple((name, 1.0) for name in names) if scan else (),
        weight_moves=moves if scan else None,
    )


def log_on(root: Path, layers: int) -> tuple[Trainer, StepHistoryWriter, torch.optim.Optimizer]:
    """A Trainer that is not run, its attempt log, and an optimizer with gradients."""
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
    """Milliseconds until each attempt returns, and the processor's own over the attempts."""
    scans = [scan_every > 0 and step % scan_every == 0 for step in range(attempts)]
    steps = [measurement(step, layers, scan=scan) for step, scan in enumerate(scans)]
    with tempfile.TemporaryDirectory() as folder:
        trainer, attempt_log, optimizer = log_on(Path(folder), layers)
        times = []
        start = time.process_time()
        for stats in steps:
            begin = time.perf_counter()
            if written:
                attempt_log.due()
            attempt_log.judged(stats, optimizer)
            attempt_log.batch_ended()
            times.append(1e3 * (time.perf_counter() - begin))
        trainer.loggers[0].finalize("success")
        return times, 1e3 * (time.process_time() - start) / attempts


def writing(layers: int, attempts: int, repetitions: int) -> dict[str, dict[str, Spread]]:
    """What each kind of attempt costs in milliseconds, measured by turns."""
    cases = {
        "written": (True, 0),
        "update ratios, 1 in 10": (True, 10),
        "update ratios, all": (True, 1),
        "not written": (False, 0),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, (written, every) in cases.items():
            times, all_in = attempt_costs(layers, attempts, written=written, scan_every=every)
            found[name].append((all_in, statistics.median(times[10:])))
    parts = ("with its thread", "until it returns")
    return {
        name: dict(zip(parts, map(Spread.of, zip(*pairs, strict=True)), strict=True))
        for name, pairs in found.items()
    }


def serving(layers: int, steps: int) -> dict[str, tuple[float, int]]:
    """Write a run and read it as TensorBoard does: milliseconds and bytes of each route."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, attempt_log, optimizer = log_on(Path(folder), layers)
        for step in range(steps):
            attempt_log.due()
            attempt_log.judged(measurement(step, layers, scan=step % 10 == 9), optimizer)
            attempt_log.batch_ended()
        trainer.loggers[0].finalize("success")
        begin = time.perf_counter()
        multiplexer = EventMultiplexer(tensor_size_guidance={"stability": SAMPLES})
        multiplexer.AddRunsFromDirectory(folder)
        multiplexer.Reload()
        found = {"reading": (1e3 * (time.perf_counter() - begin), 0)}
        provider = MultiplexerDataProvider(multiplexer, folder)
        plugin = StabilityPlugin(TBContext(data_provider=provider))
        quantities = [f"layers?run=run&quantity={q}" for q in ("grad_norm", "update_ratio")]
        routes = ("runs", "steps?run=run", "incidents?run=run", *quantities)
        return found | {route: ask(plugin, route) for route in routes}


def ask(plugin: StabilityPlugin, route: str) -> tuple[float, int]:
    """Milliseconds and bytes of the best of five answers, as a browser gets them, in gzip."""
    app = Client(plugin.get_plugin_apps()["/" + route.partition("?")[0]])
    headers = {"Accept-Encoding": "gzip"}

    def get() -> int:
        return len(app.get("/" + route, headers=headers).data)

    times = [timed(get) for _ in range(5)]
    seconds, size = min(times)
    return 1e3 * seconds, size


def timed(do: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what was returned."""
    begin = time.perf_counter()
    found = do()
    return time.perf_counter() - begin, found


def main() -> None:
    """Measure and print."""
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
    spent = writing(args.layers, args.attempts or attempts, args.repetitions)
    served = serving(args.served, args.steps or steps)
    save("tab", folder_of(args), {"writing": spent, "serving": served}, tables(spent, served))


def tables(
    spent: dict[str, dict[str, Spread]], served: dict[str, tuple[float, int]]
) -> list[Table]:
    """What a step writes, and what a route serves."""
    parts = ("with its thread", "until it returns")
    rows = [[name, *(f"{found[p]:.3f}" for p in parts)] for name, found in spent.items()]
    routes = [[r, f"{ms:.1f}", f"{size / 2**20:.2f}"] for r, (ms, size) in served.items()]
    return [
        Table("written, ms per attempt (quartiles)", ["attempt", *parts], rows),
        Table("served, best of five", ["route", "ms", "MiB, compressed"], routes),
    ]


if __name__ == "__main__":
    main()
