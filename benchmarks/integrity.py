"""Measures what `IntegrityAudit` finds, how often it is wrong, and what it costs.

    python -m benchmarks.integrity [--parts recall clean noisy cost] [--quick] [--out FOLDER]

``recall``: single bits are flipped in audited steps of small nets, each bit position in turn: in a
weight or a moment while the step runs, in a gradient between backward pass and update, and in the
output of a matrix product in the forward pass. ``clean``: runs of `benchmarks.healthy` with every
step audited. ``noisy``: the same for a net that does not repeat itself. ``cost``: processor time of
audited and other steps of a byte GPT. One thread.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, loader
from benchmarks.healthy.run import run
from benchmarks.healthy.table import KINDS
from benchmarks.results import Spread, Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability import GradientMonitor, IntegrityAudit
from lit_stability.faults import CorruptOutput, Fault, FaultInjector
from lit_stability.measurement.bit_patterns import words

PLACES = ("weight", "moment", "gradient", "output of a matrix product")
GROUPS = (("mantissa, bits 0 to 11", 0, 12), ("mantissa, bits 12 to 22", 12, 23))
GROUPS += (("exponent, bits 23 to 30", 23, 31), ("sign, bit 31", 31, 32))
NOISE = 1e-6
NOISY = "fp32, kernels with noise of 1e-6"
SETTINGS = (("fp32", PLACES, 32), ("bf16-mixed", PLACES[3:], 16), (NOISY, PLACES[3:], 32))


class Net(LightningModule):
    """A classifier with attention, norms, dropout and a batch norm, in a few thousand weights.

    Args:
        noise: relative noise of the first layer, different each time, as of nondeterministic
            kernels.
    """

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise, self.generator = noise, [torch.Generator()]
        self.generator[0].seed()
        self.embed = nn.Linear(8, 24)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.norm = nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)
        self.head = nn.Sequential(nn.BatchNorm1d(24), nn.Dropout(0.1), nn.Linear(24, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Returns the cross-entropy."""
        x = self.embed(batch[0])
        if self.noise:
            x = x * (1 + self.noise * torch.randn(x.shape, generator=self.generator[0]))
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = x + self.down(F.gelu(self.up(x)))
        return F.cross_entropy(self.head(x.mean(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns AdamW."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


def data(seed: int) -> DataLoader[Any]:
    """Returns batches of 16 sequences of 6 vectors, with labels."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(256, 6, 8, generator=g), torch.randint(10, (256,), generator=g)
    return DataLoader(TensorDataset(x, y), 16)


class Flip(Fault):
    """Flips one bit of a random element of a random weight, moment or gradient, in its memory."""

    def __init__(self, place: str, bit: int, seed: int, **options: Any) -> None:
        super().__init__(**options)
        self.place, self.bit, self.random = place, bit, random.Random(seed)

    def on_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Flips a weight or a moment, after the audit has recorded the start of the step."""
        if self.place in ("weight", "moment"):
            p = self._choose(list(pl_module.parameters()))
            moments = trainer.optimizers[0].state[p]
            self._flip(p if self.place == "weight" else moments["exp_avg"])

    def on_gradients(self, pl_module: LightningModule) -> None:
        """Flips a gradient."""
        if self.place == "gradient":
            self._flip(self._choose([p.grad for p in pl_module.parameters()]))

    def _choose(self, tensors: list[Any]) -> Tensor:
        chosen: Tensor = self.random.choice([t for t in tensors if t is not None])
        return chosen

    def _flip(self, tensor: Tensor) -> None:
        flat = words(tensor.data).view(-1)
        index = self.random.randrange(len(flat))
        flat[index] ^= (1 << self.bit) - ((1 << 32) if self.bit == 31 else 0)


def fault(place: str, bit: int, seed: int) -> Fault:
    """Returns the fault of a run, at its step 5."""
    if place != PLACES[3]:
        return Flip(place, bit, seed, step=5)
    chosen = random.Random(seed)
    module = chosen.choice(["embed", "up", "down", "head.2"])
    return CorruptOutput(step=5, module=module, bit=bit, element=chosen.randrange(10**6))


@cache
def bare(setting: str, seed: int) -> Tensor:
    """Returns the weights of a run without a fault, as integers."""
    return weights(setting, seed, [])


def weights(setting: str, seed: int, callbacks: list[Callback]) -> Tensor:
    """Trains and returns the weights."""
    seed_everything(seed, verbose=False)
    module = Net(noise=NOISE if setting == NOISY else 0.0)
    precision: Any = setting if setting == "bf16-mixed" else "32-true"
    quiet_trainer(max_steps=8, callbacks=callbacks, precision=precision).fit(module, data(seed))
    return torch.cat([words(p).flatten() for p in module.parameters()])


def found(setting: str, place: str, bit: int, repeat: int) -> tuple[bool, bool]:
    """Returns whether a flip was found, and whether it changed the weights after the fit."""
    monitor, audit = GradientMonitor(), IntegrityAudit(every=5)
    injected = fault(place, bit, 100 * bit + repeat)
    end = weights(setting, repeat, [monitor, audit, FaultInjector([injected])])
    seen = any(i.first.kind == "silent data corruption" for i in monitor.incidents)
    return seen, not torch.equal(end, bare(setting, repeat))


def recall(quick: bool) -> tuple[list[Table], dict[str, Any]]:
    """Flips every bit at every place."""
    repeats = 1 if quick else 3
    rows: list[dict[str, Any]] = []
    for setting, places, width in SETTINGS:
        for place in places:
            for bit in range(width):
                runs = [found(setting, place, bit, r) for r in range(repeats)]
                counts = {"flips": len(runs), "found": sum(seen for seen, _ in runs)}
                if setting != NOISY:  # there, every run ends with other weights
                    counts["changed the run"] = sum(changed for _, changed in runs)
                    counts["found of these"] = sum(seen and changed for seen, changed in runs)
                rows.append({"setting": setting, "place": place, "bit": bit, **counts})
            own = [r for r in rows if (r["setting"], r["place"]) == (setting, place)]
            print(setting, place, sum(r["found"] for r in own), flush=True)
    cells = []
    for setting, places, width in SETTINGS:
        for place in places:
            for name, low, high in GROUPS if width == 32 else (("bits 0 to 15", 0, 16),):
                own = [r for r in rows if (r["setting"], r["place"]) == (setting, place)]
                own = [r for r in own if low <= r["bit"] < high]
                sums = [str(sum(r[k] for r in own)) if k in own[0] else "-" for k in _COUNTS]
                cells.append([setting, place, name, *sums])
    columns = ["setting", "place", "bits", *_COUNTS]
    return [Table("Single bit flips in an audited step", columns, cells)], {"recall": rows}


_COUNTS = ("flips", "found", "changed the run", "found of these")


def clean(quick: bool) -> tuple[list[Table], dict[str, Any]]:
    """Trains healthy kinds with every step audited, until 20,000 audits are done."""
    wanted, audits, rows = (500 if quick else 20_000), 0, []
    names = list(KINDS)
    random.Random(0).shuffle(names)
    for name in names:
        audit = IntegrityAudit(every=1)
        result = run(KINDS[name], 0, True, [audit])
        kinds = [i.first.kind for i in result.incidents]
        lines = [w for w in result.warnings if "IntegrityAudit" in w]
        rerun = not any("runs no step again" in w for w in lines)
        rows.append(
            {
                **{"kind": name, "audits": audit.audits, "steps are run again": rerun},
                "alarms": kinds.count("silent data corruption"),
                "ledger": audit.suspects(),
                "exact": rerun and not any("repeat itself" in w for w in lines),
                "warnings": lines,
            }
        )
        print(rows[-1], flush=True)
        audits += audit.audits if rerun else 0
        if audits >= wanted:
            break
    total = [len(rows), sum(r["audits"] for r in rows), audits, sum(r["alarms"] for r in rows)]
    total += [sum(r["exact"] for r in rows)]
    columns = ["kinds", "audits", "with reruns", "alarms", "kinds compared to the bit"]
    bound = f"{3 / audits:.1e}"
    cells = [[*map(str, total), bound]]
    table = Table("Healthy runs, every step audited", [*columns, "upper bound (95 %)"], cells)
    return [table], {"clean": rows, "bound": 3 / audits}


def noisy(quick: bool) -> tuple[list[Table], dict[str, Any]]:
    """Trains the net with noise, every step audited: no difference may look like a fault."""
    rows = []
    for seed in range(2 if quick else 12):
        seed_everything(seed, verbose=False)
        monitor, audit = GradientMonitor(), IntegrityAudit(every=1)
        trainer = quiet_trainer(max_steps=200, callbacks=[monitor, audit])
        trainer.fit(Net(noise=10.0 ** -(4 + seed % 4)), data(seed))
        found = sum(i.first.kind == "silent data corruption" for i in monitor.incidents)
        rows.append({"noise": f"1e-{4 + seed % 4}", "audits": audit.audits, "alarms": found})
        rows[-1]["ledger"] = audit.suspects()
        print(rows[-1], flush=True)
    cells = []
    for noise in sorted({r["noise"] for r in rows}):
        own = [r for r in rows if r["noise"] == noise]
        counts = (sum(r[key] for r in own) for key in ("audits", "alarms"))
        cells.append([noise, *map(str, counts)])
    table = Table(
        "Healthy runs with noise, every step audited", ["noise", "audits", "alarms"], cells
    )
    return [table], {"noisy": rows}


class Clock(Callback):
    """Processor time of each step, from the start of its first batch to that of the next step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start: float | None = None

    def on_train_batch_start(self, *args: Any) -> None:
        """Reads the clock."""
        now = time.process_time()
        if self._start is not None:
            self.seconds.append(now - self._start)
        self._start = now


def timed(callbacks: Callable[[Clock], list[Callback]], steps: int) -> list[float]:
    """Returns the seconds of each step of a byte GPT with 9.1 M parameters, 8 x 64 bytes."""
    clock = Clock()
    seed_everything(0, verbose=False)
    module = ByteGPTModule(ByteGPTConfig(width=384, layers=5, heads=6))
    quiet_trainer(max_steps=steps, callbacks=callbacks(clock)).fit(module, loader(8))
    return clock.seconds


def cost(quick: bool) -> tuple[list[Table], dict[str, Any]]:
    """Times audited steps and their neighbours in one run, and a run without the callback."""
    steps = 24 if quick else 40
    with_audit = timed(lambda clock: [clock, GradientMonitor(), IntegrityAudit(every=4)], steps)
    without = timed(lambda clock: [clock, GradientMonitor()], steps)
    # The step after an audited one has its report.
    audited, after, other = (
        [s for i, s in enumerate(with_audit) if i >= 8 and i % 4 in own]
        for own in ((0,), (1,), (2, 3))
    )
    figures = {
        name: Spread.of(1000 * s for s in values)
        for name, values in (
            *(("audited", audited), ("after an audited one", after), ("other", other)),
            ("without the callback", without[8:]),
        )
    }
    base = statistics.median(other)
    ratio = statistics.median(audited) / base
    rest = (statistics.median(after) - base) / base
    rows = [
        [name, f"{spread:.1f}", f"{spread.median / 1000 / base:.3f}"]
        for name, spread in figures.items()
    ]
    amortised = (ratio - 1 + rest) / 1000
    rows.append(["amortised, every=1000", "", f"{1 + amortised:.4f}"])
    table = Table("Cost, byte GPT", ["step", "ms (quartiles)", "ratio"], rows)
    return [table], {"cost": figures, "ratio": ratio, "amortised": amortised}


PARTS = {"recall": recall, "clean": clean, "noisy": noisy, "cost": cost}


def main() -> None:
    """Runs the parts and writes their files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.lit_stability").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name in args.parts:
        tables, figures = PARTS[name](args.quick)
        save(f"integrity-{name}", folder_of(args), figures, tables)


if __name__ == "__main__":
    main()
