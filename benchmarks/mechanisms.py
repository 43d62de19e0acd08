"""Tries three signals of a mechanism against what the suite reports already.

    python -m benchmarks.mechanisms [--seeds 0 1 2 3] [--quick]

Candidates, each measured every 20 steps of a byte GPT:

* the spectral entropy of each head's query-key product ``W_q^T W_k``, and of its update since the
  last measurement (energy in few directions precedes the collapse of attention: Qi et al. 2025,
  "Taming Transformer Without Using Learning Rate Warmup");
* the mean of ``log Z`` of the output softmax (its drift is what the z-loss of PaLM holds back:
  Chowdhery et al. 2022; Wortsman et al. 2023);
* with a mixture of experts (top 1 of 4, Fedus et al. 2021), the largest share of tokens that one
  expert has, the entropy of the router's mean probabilities, and its largest logit.

Each failing run has healthy runs beside it. A signal warns when it leaves the range that all
healthy runs but those of the same seed have spanned up to the same step, widened by half: so the
healthy runs of that seed tell the false alarms. A run has failed when the mean loss of ten steps
ends 10 % above that of its healthy twin; it is lost from the first ten steps on after which it
stays above. "suite" is the first incident of `GradientMonitor` and `AttentionProbe(every=20)`.
One thread.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.byte_gpt import ByteGPTConfig, ByteGPTModule, loader
from benchmarks.results import Table, add_options, folder_of, save
from benchmarks.trainers import quiet_trainer
from lit_stability import AttentionProbe, GradientMonitor

EVERY = 20
STEPS = 400
EXPERTS = 4
SHAPE = ByteGPTConfig(width=64, layers=3, length=32)
POST_NORM = ByteGPTConfig(width=64, layers=3, length=32, post_norm=True)


class Experts(nn.Module):
    """An MLP of experts, of which each token uses the one with the largest router probability."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, EXPERTS)
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(EXPERTS))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(EXPERTS))
        self.logits_NE = torch.empty(0)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Applies one expert to each token of ``(B, T, D)``."""
        x_ND = x_BTD.flatten(0, 1)
        self.logits_NE = self.router(x_ND)
        weight_N, expert_N = self.logits_NE.softmax(-1).max(-1)
        out_ND = torch.zeros_like(x_ND)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            own = expert_N == e
            out_ND[own] = weight_N[own, None] * down(F.gelu(up(x_ND[own])))
        return out_ND.view_as(x_BTD)

    def balance(self) -> Tensor:
        """Returns the balance loss of Fedus et al. (2021), 1 for equal shares."""
        probabilities_NE = self.logits_NE.softmax(-1)
        shares_E = F.one_hot(probabilities_NE.argmax(-1), EXPERTS).float().mean(0)
        return EXPERTS * (shares_E * probabilities_NE.mean(0)).sum()


class Mixture(ByteGPTModule):
    """The byte GPT with `Experts` as MLPs."""

    def __init__(self, balance: float, **options: Any) -> None:
        super().__init__(SHAPE, **options)
        self.balance = balance
        for block in self.model.blocks:
            experts = Experts(SHAPE.width)
            block.experts = experts
            block._mlp = experts.forward
            del block.up, block.down

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Adds the balance loss."""
        loss = super().training_step(batch, batch_idx)
        return loss + self.balance * sum(block.experts.balance() for block in self.model.blocks)


def gpt(**options: Any) -> Callable[[], ByteGPTModule]:
    """Returns a function that creates the byte GPT."""
    shape = SHAPE if not options.pop("post_norm", False) else POST_NORM
    return lambda: ByteGPTModule(shape, **options)


def _ramp(step: int) -> float:
    return math.exp(0.03 * max(0, step - 50))


HEALTHY: dict[str, Callable[[], ByteGPTModule]] = {
    "rate 1e-3": gpt(lr=1e-3),
    "rate 3e-3": gpt(lr=3e-3),
    "rate 1e-2, warm-up of 100": gpt(lr=1e-2, warmup=100),
    "post-norm, warm-up": gpt(lr=1e-3, post_norm=True, warmup=100),
}
FAILING: dict[str, tuple[str, Callable[[], ByteGPTModule]]] = {
    "rate 0.1": ("rate 1e-3", gpt(lr=0.1)),
    "rate 0.3": ("rate 1e-3", gpt(lr=0.3)),
    "exponential ramp": ("rate 1e-3", gpt(lr=1e-3, schedule=_ramp)),
    "rate x100 at 150": ("rate 1e-3", gpt(schedule=lambda step: 100.0 if step >= 150 else 1.0)),
    "post-norm, no warm-up": (
        "post-norm, warm-up",
        gpt(lr=1e-2, post_norm=True, warmup=1),
    ),
}
HEALTHY_MIXTURE: dict[str, Callable[[], ByteGPTModule]] = {
    "experts, balanced": lambda: Mixture(0.01),
    "experts, balanced, rate 3e-3": lambda: Mixture(0.01, lr=3e-3),
}
FAILING_MIXTURE: dict[str, tuple[str, Callable[[], ByteGPTModule]]] = {
    "experts, no balance": ("experts, balanced", lambda: Mixture(0.0)),
    "experts, no balance, rate 0.03": ("experts, balanced", lambda: Mixture(0.0, lr=0.03)),
    "experts, no balance, rate 0.1": ("experts, balanced", lambda: Mixture(0.0, lr=0.1)),
}


def spectral_entropy(values: Tensor) -> float:
    """Returns the entropy of the energy of singular values, divided by that of equal ones.

    >>> spectral_entropy(torch.ones(4)), spectral_entropy(torch.tensor([1.0, 0.0]))
    (1.0, 0.0)
    """
    energy = values.double().square()
    share = energy / energy.sum().clamp_min(1e-300)
    return max(0.0, float(-torch.xlogy(share, share).sum() / math.log(len(values))))


class Measure(Callback):
    """Records the candidates every `EVERY` steps."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self._before: list[Tensor] = []

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Measures after a step."""
        if trainer.global_step % EVERY:
            return
        products = [p for block in pl_module.model.blocks for p in query_key(block)]
        ranks = SHAPE.width // SHAPE.heads
        own = [spectral_entropy(torch.linalg.svdvals(p)[:ranks]) for p in products]
        self._add("entropy of W_q W_k, lowest head", min(own))
        if self._before:
            updates = [p - b for p, b in zip(products, self._before, strict=True)]
            new = [spectral_entropy(torch.linalg.svdvals(u)[: 2 * ranks]) for u in updates]
            self._add("entropy of its update, lowest head", min(new))
            self._add("entropy of its update, mean", statistics.fmean(new))
        self._before = products
        log_z = pl_module.model(batch[:, :-1]).logsumexp(-1)
        self._add("log Z", float(log_z.mean()))
        experts = [b.experts for b in pl_module.model.blocks if hasattr(b, "experts")]
        if experts:
            means = [e.logits_NE.softmax(-1).mean(0) for e in experts]
            shares = [
                F.one_hot(e.logits_NE.argmax(-1), EXPERTS).float().mean(0).max() for e in experts
            ]
            self._add("largest share of an expert", float(max(shares)))
            entropies = [float(-torch.xlogy(m, m).sum()) / math.log(EXPERTS) for m in means]
            self._add("entropy of the router", min(entropies))
            self._add("largest router logit", max(float(e.logits_NE.abs().max()) for e in experts))

    def _add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)


def query_key(block: nn.Module) -> list[Tensor]:
    """Returns ``W_q^T W_k`` of each head of a block, shape ``(D, D)``."""
    q, k, _ = block.qkv.weight.detach().chunk(3)
    heads = zip(q.chunk(block.heads), k.chunk(block.heads), strict=True)
    return [q_head.T @ k_head for q_head, k_head in heads]


@dataclass
class Result:
    """What a run gave."""

    losses: list[float]
    signals: dict[str, list[float]] = field(default_factory=dict)
    incidents: list[tuple[str, int]] = field(default_factory=list)


def train(make: Callable[[], ByteGPTModule], seed: int, steps: int) -> Result:
    """Trains a model under observation."""
    seed_everything(seed, verbose=False)
    module, measure, monitor = make(), Measure(), GradientMonitor()
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            max_steps=steps,
            callbacks=[monitor, AttentionProbe(every=EVERY), measure],
            default_root_dir=folder,
        )
        trainer.fit(module, loader(8, SHAPE.length, seed=seed))
    incidents = [(i.first.kind, i.first.step) for i in monitor.incidents]
    return Result(module.losses, measure.values, incidents)


def lost_at(losses: list[float], twin: list[float]) -> int | None:
    """Returns the step from which a run stays 10 % above its twin, or None."""
    ends = range(10, len(losses) + 1, 10)
    worse = [not means_below(losses, twin, end) for end in ends]
    if not worse[-1]:
        return None
    first = next((i + 1 for i in reversed(range(len(worse))) if not worse[i]), 0)
    return ends[first]


def means_below(losses: list[float], twin: list[float], end: int) -> bool:
    """Whether the mean of the ten losses before a step is at most 1.1 times that of the twin."""
    own, other = (statistics.fmean(each[end - 10 : end]) for each in (losses, twin))
    return own <= 1.1 * other


def warned_at(name: str, run: Result, healthy: list[Result]) -> int | None:
    """Returns the first step at which a signal is out of the range of the healthy runs."""
    offset = EVERY * (2 if "update" in name else 1)
    low, high = math.inf, -math.inf
    for i, value in enumerate(run.signals.get(name, ())):
        seen = [each.signals[name][i] for each in healthy]
        low, high = min(low, *seen), max(high, *seen)
        margin = 0.5 * (high - low)
        if i >= 2 and not low - margin <= value <= high + margin:
            return offset + EVERY * i
    return None


def compare(
    healthy: dict[tuple[str, int], Result],
    failing: dict[tuple[str, int], Result],
    twins: dict[str, str],
) -> tuple[dict[str, Any], list[list[str]]]:
    """Returns figures and rows: recall, lead and false alarms by signal, and of the suite."""
    names = [*dict.fromkeys(name for each in healthy.values() for name in each.signals)]
    lost = {
        key: lost_at(run.losses, healthy[twins[key[0]], key[1]].losses)
        for key, run in failing.items()
    }
    kept = [key for key, step in lost.items() if step is not None]
    figures: dict[str, Any] = {"lost": {f"{k[0]}, seed {k[1]}": v for k, v in lost.items()}}
    rows = []
    for name in ("suite", *names):

        def first(run: Result, seed: int, name: str = name) -> int | None:
            if name == "suite":
                return min((step for _, step in run.incidents), default=None)
            return warned_at(name, run, [r for k, r in healthy.items() if k[1] != seed])

        warned = {key: first(failing[key], key[1]) for key in kept}
        false = sum(first(run, key[1]) is not None for key, run in healthy.items())
        leads = [(lost[k] or 0) - w for k, w in warned.items() if w is not None]
        early = sum(lead > 0 for lead in leads)
        figures[name] = {
            "warned": {f"{k[0]}, seed {k[1]}": v for k, v in warned.items()},
            "false": false,
            "healthy": len(healthy),
        }
        middle = f"{statistics.median(leads):.0f}" if leads else "-"
        counts = f"{len(leads)} of {len(kept)}"
        rows.append([name, counts, str(early), middle, f"{false} of {len(healthy)}"])
    return figures, rows


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+")
    args = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.pytorch.lit_stability"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seeds = args.seeds or ([0, 1] if args.quick else [0, 1, 2, 3])
    steps = 120 if args.quick else STEPS
    figures, tables = {}, []
    columns = ["signal", "warned", "before the loss", "median lead, steps", "false alarms"]
    for title, well, ill in (
        ("attention and output", HEALTHY, FAILING),
        ("mixture of experts", HEALTHY_MIXTURE, FAILING_MIXTURE),
    ):
        healthy = {(n, s): train(m, s, steps) for n, m in well.items() for s in seeds}
        failing = {(n, s): train(m, s, steps) for n, (_, m) in ill.items() for s in seeds}
        twins = {n: twin for n, (twin, _) in ill.items()}
        figures[title], rows = compare(healthy, failing, twins)
        tables.append(Table(title, columns, rows))
    save("mechanisms", folder_of(args), figures, tables)


if __name__ == "__main__":
    main()
