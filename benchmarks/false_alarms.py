"""Counts the false alarms of the detectors on healthy runs.

    python -m benchmarks.false_alarms [--steps 100000] [--seeds 3] [--synthetic] [--quick]

First on synthetic runs, one per family of noise and curves: loss, gradient norms of six layers,
updates and weight norms, each with its own noise. All start with a falling loss. Then on the
healthy runs of `benchmarks.instabilities`, measured by a real `GradientMonitor`. Prints a table of
anomalies by family and detector. Each detector runs independently: it is updated with every step
that it accepts or only warns about.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.instabilities.cases import CASES, Case
from benchmarks.results import Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability import GradientMonitor
from lit_stability.detectors import Detector, Spike, default_detectors
from lit_stability.measurement.step_stats import StepStats, WeightMoves

Array = np.ndarray
LAYERS = tuple(f"layers.{i}.weight" for i in range(6))
OWN_SHARES = np.array([0.5, 0.4, 0.4, 0.3, 0.3, 0.5])
SCAN = 10
"""Steps between scans of the weights."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Synthetic runs: curves and the noise of their logarithms.

    A curve is a function of the array of steps and their number. The loss curve is multiplied by a
    descent from three times its value.
    """

    noise: Callable[[np.random.Generator, tuple[int, ...]], Array]
    loss: Callable[[Array, int], Array] = lambda t, n: np.full(n, 2.0)
    norm: Callable[[Array, int], Array] = lambda t, n: np.ones(n)
    rate: Callable[[Array, int], Array] = lambda t, n: np.ones(n)


def gaussian(sigma: float) -> Callable[[np.random.Generator, tuple[int, ...]], Array]:
    return lambda rng, shape: sigma * rng.standard_normal(shape)


def student(scale: float) -> Callable[[np.random.Generator, tuple[int, ...]], Array]:
    return lambda rng, shape: scale * rng.standard_t(3, shape)


def correlated(sigma: float, rho: float = 0.9) -> Callable[..., Array]:
    """Autoregressive noise as a sum over the last 100 draws, accurate to 3e-5."""
    kernel = rho ** np.arange(100) * np.sqrt(1 - rho**2)

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        white = sigma * rng.standard_normal((shape[0] + 99, *shape[1:]))
        filtered = [np.convolve(c, kernel, "valid") for c in white.reshape(len(white), -1).T]
        return np.stack(filtered, axis=1).reshape(shape)

    return draw


def stairs(height: float) -> Callable[[Array, int], Array]:
    """Twenty equal stages of the run, each ``height`` times the previous one."""
    return lambda t, n: height ** (20 * t // n)


def blocks(height: float) -> Callable[[Array, int], Array]:
    """Two data sources that alternate every 25 steps."""
    return lambda t, n: height ** ((t // 25) % 2)


def cycles(height: float) -> Callable[[Array, int], Array]:
    """Falls by a factor of ``height`` in 400 steps and jumps up again, as after a warm restart."""
    return lambda t, n: height ** (1 - (t % 400) / 400)


def cosine(t: Array, n: int) -> Array:
    return (1 + np.cos(np.pi * t / n)) / 2


FAMILIES: dict[str, Family] = {
    "noise 0.1": Family(noise=gaussian(0.1)),
    "noise 0.5": Family(noise=gaussian(0.5)),
    "noise 1.0": Family(noise=gaussian(1.0)),
    "correlated 0.1": Family(noise=correlated(0.1)),
    "correlated 0.5": Family(noise=correlated(0.5)),
    "Student-t 0.3": Family(noise=student(0.3)),
    "loss drifts up x2": Family(noise=gaussian(0.2), loss=lambda t, n: 2 * 2 ** (t / n)),
    "warm-up": Family(noise=gaussian(0.2), rate=lambda t, n: np.minimum(1, (t + 1) / (n / 25))),
    "loss 1/t, norm x100": Family(
        noise=gaussian(0.2),
        loss=lambda t, n: 10 / (1 + 200 * t / n),
        norm=lambda t, n: 100 ** (t / n),
    ),
    "curriculum x1.1": Family(noise=gaussian(0.2), loss=stairs(1.1), norm=stairs(1.5)),
    "curriculum x1.4": Family(noise=gaussian(0.2), loss=stairs(1.4), norm=stairs(3.0)),
    "curriculum x3": Family(noise=gaussian(0.2), loss=stairs(3.0), norm=stairs(3.0)),
    "norm falls x100 in 100 steps": Family(
        noise=gaussian(0.5), norm=lambda t, n: 1 + 100 * np.exp(-t / 25)
    ),
    "blocks of 25 steps, norm x8": Family(noise=gaussian(0.3), loss=blocks(1.5), norm=blocks(8.0)),
    "cycles of 400 steps, norm x10": Family(
        noise=gaussian(0.2), loss=cycles(3.0), norm=cycles(10.0)
    ),
    "converged, cosine to 0": Family(
        noise=gaussian(0.02), norm=lambda t, n: 10.0 ** (-12 * t / n), rate=cosine
    ),
    "converged, constant rate": Family(
        noise=gaussian(0.02), norm=lambda t, n: 10.0 ** (-12 * t / n)
    ),
}


def synthetic(family: Family, steps: int, seed: int = 0) -> Iterator[StepStats]:
    """Yields the steps of one synthetic run."""
    rng, t = np.random.default_rng(seed), np.arange(steps)
    descent = 1 + 2 * np.exp(-t / (steps / 100))
    loss = (family.loss(t, steps) * descent * np.exp(family.noise(rng, (steps,)))).tolist()
    norms = family.norm(t, steps)[:, None] * OWN_SHARES * np.exp(family.noise(rng, (steps, 6)))
    totals, norms = np.sqrt((norms**2).sum(1)).tolist(), norms.tolist()
    rate = 1e-3 * family.rate(t, steps)
    moved = (rate * np.exp(family.noise(rng, (steps,)))).tolist()
    scans = weights(rate, rng)
    rates = [0.0, *rate.tolist()]
    for i in range(steps):
        norm, seen, moves = scans.get(i, (None, (), None))
        yield StepStats(
            step=i,
            loss=loss[i],
            grad_norm=totals[i],
            names=LAYERS,
            grad_norms=tuple(norms[i]),
            learning_rates=(rates[i + 1],),
            nominal_learning_rates=(rates[i + 1],),
            update_ratio=moved[i] if i else None,
            update_learning_rate=rates[i],
            weight_norm=norm,
            weight_norms=seen,
            weight_moves=moves,
        )


def weights(rate: Array, rng: np.random.Generator) -> dict[int, tuple[float, tuple, WeightMoves]]:
    """Returns weight scans by step; norms drift by 1 % and vary by 10 % of the updates."""
    path = 10 * rate.reshape(-1, SCAN).sum(1)[:, None] * np.ones(6)
    change = path * (0.01 + 0.1 * rng.standard_normal(path.shape))
    norms = (10 + np.cumsum(change, axis=0)).tolist()
    totals = np.linalg.norm(norms, axis=1).tolist()
    scans = {}
    for k in range(1, len(norms)):
        before, now, distances = norms[k - 1], norms[k], (0.3 * path[k]).tolist()
        moves = WeightMoves(
            since=SCAN * k - 1,
            norms=tuple(before),
            peaks=tuple((b / 50, n / 50) for b, n in zip(before, now, strict=True)),
            distances=tuple(distances),
            farthest=tuple((d / 40, d / 50) for d in distances),
        )
        scans[SCAN * k + SCAN - 1] = (totals[k], tuple(zip(LAYERS, now, strict=True)), moves)
    return scans


def every_detector() -> list[Detector]:
    """Returns the default detectors and the loss spike, which is not in the default set."""
    return [*default_detectors(), Spike("loss")]


def name_of(detector: Detector) -> str:
    name = type(detector).__name__
    return f"{name}({detector.signal!r})" if isinstance(detector, Spike) else name


def count(steps: Iterable[StepStats], detectors: list[Detector]) -> dict[str, int]:
    """Counts the anomalies of each detector."""
    counts = {name_of(d): 0 for d in detectors}
    for stats in steps:
        for detector in detectors:
            anomaly = detector.check(stats)
            if anomaly is not None:
                counts[name_of(detector)] += 1
            if anomaly is None or anomaly.warn_only:
                detector.update(stats)
    return counts


class Recorder(Callback):
    """Records the statistics of each step."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []

    def on_step_measured(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Records a step."""
        self.steps.append(stats)


def healthy_cases() -> list[Case]:
    return [c if c.cause is None else c.healthy() for c in CASES.values()]


def measure(case: Case, seed: int) -> list[StepStats]:
    """Returns the steps of a real run, measured without detectors."""
    seed_everything(seed, verbose=False)
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            max_steps=case.steps,
            default_root_dir=folder,
            callbacks=[GradientMonitor(detectors=[]), recorder],
        )
        trainer.fit(case.module(), case.data(seed))
    return recorder.steps


def print_row(name: str, steps: int, counts: dict[str, int]) -> None:
    cells = (f"{n or '.':>5}" for n in counts.values())
    print(f"{name:<34}{steps:>8}  {' '.join(cells)}", flush=True)


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--synthetic", action="store_true", help="skip the real runs")
    options = parser.parse_args()
    length = options.steps or (2_000 if options.quick else 100_000)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    names = [name_of(d) for d in every_detector()]
    for i, name in enumerate(names):
        print(f"{i + 1:>3} {name}")
    header = " ".join(f"{i + 1:>5}" for i in range(len(names)))
    print(f"\n{'':<34}{'steps':>8}  {header}")
    figures: dict[str, dict[str, int]] = {}
    for name, family in FAMILIES.items():
        figures[name] = count(synthetic(family, length), every_detector())
        print_row(name, length, figures[name])
    cases = [] if options.synthetic or options.quick else healthy_cases()
    for case, seed in ((case, seed) for case in cases for seed in range(options.seeds)):
        steps, name = measure(case, seed), f"{case.name}, seed {seed}"
        figures[name] = count(steps, every_detector())
        print_row(name, len(steps), figures[name])
    rows = [[name, *(str(n or ".") for n in counts.values())] for name, counts in figures.items()]
    table = Table(f"anomalies in {length} synthetic steps", ["run", *names], rows)
    save("false_alarms", folder_of(options), {"steps": length, "objections": figures}, [table])


if __name__ == "__main__":
    main()
