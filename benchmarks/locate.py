"""Where a NaN was born: what is told by this suite, by anomaly mode and by hooks on the modules.

    python -m benchmarks.locate [--rounds 20] [--quick]

Eight causes and five benign steps, and in sum all 52 of `tests.diagnosis.nonfinite_cases` and 15
benign ones. A case knows its module, operation and line; they are the cases that `locate_nonfinite`
was built with, and so they show what there is to be told rather than how often it is. Three finders
are asked, each for what its documentation says that it tells:

* `locate_nonfinite`: module, operation and line; asked for one bad step.
* ``torch.autograd.set_detect_anomaly``: the backward function that gave the first NaN, and the
  traceback of the forward call behind it; on for every step. It knows no modules.
* ``DebugUnderflowOverflow`` of transformers: the first module with a NaN or Inf in its weights,
  inputs or outputs; on for every step. It knows no operations and no lines, and no backward pass.

A false alarm is anything said of a benign step. The cost is a ratio to forward and backward of a
Transformer of 9.9 M parameters, 8 x 64 tokens, one torch thread, all by turns: of a healthy step
with the finder on, and for `locate_nonfinite` of its searches.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.byte_gpt import ByteGPT, ByteGPTConfig
from benchmarks.finders import FINDERS, Told
from benchmarks.results import Spread, Table, add_options, folder_of, save
from lit_stability import locate_nonfinite
from tests.diagnosis.nonfinite_cases import BAD, HEALTHY

CAUSES = {
    "log_of_zero_in_a_loss": "log(0) in the loss",
    "softmax_of_a_fully_masked_row": "attention row that is masked out",
    "layer_norm_without_variance_or_epsilon": "LayerNorm without variance",
    "linear_that_overflows_under_autocast": "fp16 overflow of a Linear",
    "infinite_weight": "Inf in a weight",
    "nan_in_the_batch": "NaN in the batch",
    "epsilon_outside_of_the_root": "slope of sqrt(0), backward",
    "log_that_where_drops": "log(0) behind a where, backward",
}
"""The usual ones: of each sort of operation, of data and weights, and both passes."""
BENIGN = {
    "causal_mask_of_infinities": "causal mask of -inf",
    "bad_values_that_only_a_log_shows": "NaN in a metric only",
    "memory_left_blank_in_part": "NaN in memory that is not read",
    "logits_that_a_module_masks": "-inf that a module returns as a mask",
    "slope_that_a_hook_mends": "slope of sqrt(0) that a hook makes 0",
}
PARTS = ("module", "op", "line")
TELLS = {"detect_anomaly": ("op", "line"), "DebugUnderflowOverflow": ("module",)}
"""Of what the others speak at all."""


def logits_that_a_module_masks() -> tuple[nn.Module, Callable[[], Tensor]]:
    """What is forbidden gets no probability: loss and gradients are finite."""
    forbidden = torch.tensor([True, False, False, False])

    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(forbidden, -torch.inf)

    model = nn.Sequential(Masked(4, 4))
    return model, lambda: nn.functional.cross_entropy(
        model(torch.ones(3, 4)), torch.tensor([1] * 3)
    )


def slope_that_a_hook_mends() -> tuple[nn.Module, Callable[[], Tensor]]:
    """The usual mend of a norm at zero: no parameter is given a NaN."""
    model = nn.Linear(4, 4)

    def step() -> Tensor:
        y = model(torch.ones(3, 4)) * 0.0
        y.register_hook(torch.nan_to_num)
        return y.square().sum(-1).sqrt().sum()

    return model, step


def asked() -> tuple[dict[str, Any], dict[str, Any]]:
    """The bad steps with what is to be told of each, and the healthy ones, by name."""
    bad = {build.__name__: (build, expected) for build, expected in BAD}
    healthy = [*HEALTHY, logits_that_a_module_masks, slope_that_a_hook_mends]
    return bad, {build.__name__: build for build in healthy}


def answers(build: Callable[[], Any]) -> dict[str, Told | None]:
    """What each finder tells of a step; None where it says nothing."""
    found = {}
    for name, finder in FINDERS.items():
        torch.manual_seed(0)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            model, step = build()
            with torch.compiler.set_stance("force_eager"):
                found[name] = finder(model, step)
    return found


def marks(told: Told | None, expected: dict[str, Any]) -> dict[str, str]:
    """Of module, operation and line: ``right``, ``wrong``, or ``-`` where nothing is told of it."""
    if told is None:
        return dict.fromkeys(PARTS, "-")
    names = {"module": told.module, "op": told.op, "line": told.line}
    right = {
        "module": told.module == expected["module"],
        "op": told.names(expected["op"]),
        "line": told.line == expected["line"],
    }
    return {p: "-" if names[p] is None else "right" if right[p] else "wrong" for p in PARTS}


def judged(names: Iterable[str]) -> dict[str, dict[str, dict[str, str]]]:
    """Marks by bad step and finder."""
    bad, _ = asked()
    return {
        name: {f: marks(told, bad[name][1]) for f, told in answers(bad[name][0]).items()}
        for name in names
    }


def alarms(names: Iterable[str]) -> dict[str, list[str]]:
    """Healthy steps of which each finder says something."""
    _, healthy = asked()
    found: dict[str, list[str]] = {finder: [] for finder in FINDERS}
    for name in names:
        for finder, told in answers(healthy[name]).items():
            found[finder] += [name] if told is not None else []
    return found


def counts(table: dict[str, dict[str, dict[str, str]]]) -> dict[str, dict[str, int | None]]:
    """Steps that each finder says anything of, and has right; None where it cannot have."""
    found = {}
    for finder in FINDERS:
        rows = [row[finder] for row in table.values()]
        told = TELLS.get(finder, PARTS)
        right = {p: sum(r[p] == "right" for r in rows) if p in told else None for p in PARTS}
        found[finder] = {"noticed": sum({*r.values()} != {"-"} for r in rows), **right}
    return found


def costs(rounds: int, config: ByteGPTConfig) -> dict[str, Spread]:
    """Ratios to the plain pass of the same round; the first round warms up."""
    torch.manual_seed(0)
    model = ByteGPT(config)
    tokens = torch.randint(256, (8, 64))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    search = partial(locate_nonfinite, model)
    work: dict[str, Callable[[], Any]] = {
        "plain": lambda: loss().backward(),
        **{f"{name}, healthy step": partial(f, model, loss) for name, f in FINDERS.items()},
        "locate_nonfinite, NaN in the loss": lambda: search(
            lambda: loss() + torch.log(model.head.bias.sum() * 0.0)
        ),
        "locate_nonfinite, NaN in the gradients": lambda: search(
            lambda: loss() + (model.head.weight * 0.0).sqrt().sum()
        ),
    }
    times = [{name: seconds(do) for name, do in work.items()} for _ in range(rounds + 1)][1:]
    return {name: Spread.of(t[name] / t["plain"] for t in times) for name in work}


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def tables(figures: dict[str, Any]) -> list[Table]:
    """Step by step, in sum, and what it costs."""
    finders = [*FINDERS]
    rows = [
        [CAUSES[name], *(" / ".join(row[f].values()) for f in finders)]
        for name, row in figures["causes"].items()
    ]
    said = figures["false alarms"]
    rows += [
        [what, *("alarm" if n in said[f] else "-" for f in finders)] for n, what in BENIGN.items()
    ]
    alarms_of, steps, benign = figures["all false alarms"], *map(len, asked())
    sums = [
        [f, f"{figures['all'][f]['noticed']} of {steps}"]
        + [_cell(figures["all"][f][p]) for p in PARTS]
        + [f"{len(alarms_of[f])} of {benign}"]
        for f in finders
    ]
    spent = [[name, f"x{spread:.2f}"] for name, spread in figures["cost"].items()]
    return [
        Table("module / operation / line", ["step", *finders], rows),
        Table("all steps", ["finder", "noticed", *PARTS, "false alarms"], sums),
        Table("cost, to a plain forward and backward", ["finder", "ratio (quartiles)"], spent),
    ]


def _cell(number: int | None) -> str:
    return "-" if number is None else str(number)


def main() -> None:
    """Ask, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bad, healthy = asked()
    table = judged(bad)
    said = alarms(healthy)
    rounds = args.rounds or (3 if args.quick else 20)
    small, full = ByteGPTConfig(width=128, layers=4), ByteGPTConfig(width=400, layers=5)
    figures = {
        "causes": {name: table[name] for name in CAUSES},
        "false alarms": {f: [n for n in names if n in BENIGN] for f, names in said.items()},
        "all": counts(table),
        "all false alarms": said,
        "every step": table,
        "cost": costs(rounds, small if args.quick else full),
    }
    save("locate", folder_of(args), figures, tables(figures))


if __name__ == "__main__":
    main()
