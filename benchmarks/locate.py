"""Compares tools that locate the origin of a NaN: this suite, anomaly mode, module hooks.

    python -m benchmarks.locate [--rounds 20] [--quick]

Reports eight causes and five benign steps in detail, and counts over all 52 bad steps of
`tests.diagnosis.nonfinite_cases` and 15 benign steps. The module, operation and line of each case
are known. `locate_nonfinite` was developed with these cases, so they show what a tool can locate
rather than how often it succeeds. Each tool is judged on the parts that its documentation promises:

* `locate_nonfinite`: module, operation and line; runs on one bad step.
* ``torch.autograd.set_detect_anomaly``: the backward function that returned the first NaN, and the
  traceback of its forward call; active on every step. It reports no modules.
* ``DebugUnderflowOverflow`` of transformers: the first module with a NaN or Inf in its weights,
  inputs or outputs; active on every step. It reports no operations, lines or backward passes.

A false alarm is any report on a benign step. The cost is relative to forward and backward pass of
a Transformer with 9.9 M parameters (8 x 64 tokens, one torch thread, all measured in turns): the
cost of a healthy step with the tool active, and of the searches of `locate_nonfinite`.
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
from benchmarks.finders import FINDERS, Location
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
"""Common causes: of each kind of operation, of data and weights, in both passes."""
BENIGN = {
    "causal_mask_of_infinities": "causal mask of -inf",
    "bad_values_that_only_a_log_shows": "NaN in a metric only",
    "memory_left_blank_in_part": "NaN in memory that is not read",
    "logits_that_a_module_masks": "-inf that a module returns as a mask",
    "slope_that_a_hook_mends": "slope of sqrt(0) that a hook makes 0",
}
PARTS = ("module", "op", "line")
REPORTED_PARTS = {"detect_anomaly": ("op", "line"), "DebugUnderflowOverflow": ("module",)}
"""Parts that a tool reports, where these are not all."""


def logits_that_a_module_masks() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A masked class gets probability 0; loss and gradients are finite."""
    masked = torch.tensor([True, False, False, False])

    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(masked, -torch.inf)

    model = nn.Sequential(Masked(4, 4))
    return model, lambda: nn.functional.cross_entropy(
        model(torch.ones(3, 4)), torch.tensor([1] * 3)
    )


def slope_that_a_hook_mends() -> tuple[nn.Module, Callable[[], Tensor]]:
    """The usual fix of a norm at zero: no parameter gets a NaN gradient."""
    model = nn.Linear(4, 4)

    def step() -> Tensor:
        y = model(torch.ones(3, 4)) * 0.0
        y.register_hook(torch.nan_to_num)
        return y.square().sum(-1).sqrt().sum()

    return model, step


def all_steps() -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the bad steps with their expected locations, and the benign steps, by name."""
    bad = {build.__name__: (build, expected) for build, expected in BAD}
    benign = [*HEALTHY, logits_that_a_module_masks, slope_that_a_hook_mends]
    return bad, {build.__name__: build for build in benign}


def locations(build: Callable[[], Any]) -> dict[str, Location | None]:
    """Runs every finder on a step; None where it reports nothing."""
    found = {}
    for name, finder in FINDERS.items():
        torch.manual_seed(0)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            model, step = build()
            with torch.compiler.set_stance("force_eager"):
                found[name] = finder(model, step)
    return found


def grade(location: Location | None, expected: dict[str, Any]) -> dict[str, str]:
    """Grades module, operation and line as ``right``, ``wrong``, or ``-`` if not reported."""
    if location is None:
        return dict.fromkeys(PARTS, "-")
    reported = {"module": location.module, "op": location.op, "line": location.line}
    right = {
        "module": location.module == expected["module"],
        "op": location.has_op(expected["op"]),
        "line": location.line == expected["line"],
    }
    return {p: "-" if reported[p] is None else "right" if right[p] else "wrong" for p in PARTS}


def grades(names: Iterable[str]) -> dict[str, dict[str, dict[str, str]]]:
    """Grades the finders on bad steps; returns grades by step, finder and part."""
    bad, _ = all_steps()
    return {
        name: {f: grade(found, bad[name][1]) for f, found in locations(bad[name][0]).items()}
        for name in names
    }


def false_alarms(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns, for each finder, the benign steps on which it reports something."""
    _, benign = all_steps()
    alarms: dict[str, list[str]] = {finder: [] for finder in FINDERS}
    for name in names:
        for finder, location in locations(benign[name]).items():
            alarms[finder] += [name] if location is not None else []
    return alarms


def counts(table: dict[str, dict[str, dict[str, str]]]) -> dict[str, dict[str, int | None]]:
    """Counts noticed steps and right parts of each finder; None for parts it does not report."""
    found = {}
    for finder in FINDERS:
        rows = [row[finder] for row in table.values()]
        parts = REPORTED_PARTS.get(finder, PARTS)
        right = {p: sum(r[p] == "right" for r in rows) if p in parts else None for p in PARTS}
        found[finder] = {"noticed": sum({*r.values()} != {"-"} for r in rows), **right}
    return found


def costs(rounds: int, config: ByteGPTConfig) -> dict[str, Spread]:
    """Returns time ratios to the plain pass of the same round; the first round is a warm-up."""
    torch.manual_seed(0)
    model = ByteGPT(config)
    tokens = torch.randint(256, (8, 64))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    search = partial(locate_nonfinite, model)
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: loss().backward(),
        **{f"{name}, healthy step": partial(f, model, loss) for name, f in FINDERS.items()},
        "locate_nonfinite, NaN in the loss": lambda: search(
            lambda: loss() + torch.log(model.head.bias.sum() * 0.0)
        ),
        "locate_nonfinite, NaN in the gradients": lambda: search(
            lambda: loss() + (model.head.weight * 0.0).sqrt().sum()
        ),
    }
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds + 1)][1:]
    return {name: Spread.of(t[name] / t["plain"] for t in times) for name in calls}


def seconds(call: Callable[[], object]) -> float:
    """Returns the wall-clock time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def tables(figures: dict[str, Any]) -> list[Table]:
    """Creates the tables of single steps, of all steps, and of the costs."""
    finders = [*FINDERS]
    rows = [
        [CAUSES[name], *(" / ".join(row[f].values()) for f in finders)]
        for name, row in figures["causes"].items()
    ]
    alarms = figures["false alarms"]
    rows += [
        [title, *("alarm" if n in alarms[f] else "-" for f in finders)]
        for n, title in BENIGN.items()
    ]
    all_alarms, n_bad, n_benign = figures["all false alarms"], *map(len, all_steps())
    totals = [
        [f, f"{figures['all'][f]['noticed']} of {n_bad}"]
        + [_cell(figures["all"][f][p]) for p in PARTS]
        + [f"{len(all_alarms[f])} of {n_benign}"]
        for f in finders
    ]
    cost = [[name, f"x{spread:.2f}"] for name, spread in figures["cost"].items()]
    return [
        Table("module / operation / line", ["step", *finders], rows),
        Table("all steps", ["finder", "noticed", *PARTS, "false alarms"], totals),
        Table("cost relative to a plain pass", ["finder", "ratio (quartiles)"], cost),
    ]


def _cell(number: int | None) -> str:
    return "-" if number is None else str(number)


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bad, benign = all_steps()
    table = grades(bad)
    alarms = false_alarms(benign)
    rounds = args.rounds or (3 if args.quick else 20)
    small, full = ByteGPTConfig(width=128, layers=4), ByteGPTConfig(width=400, layers=5)
    figures = {
        "causes": {name: table[name] for name in CAUSES},
        "false alarms": {f: [n for n in names if n in BENIGN] for f, names in alarms.items()},
        "all": counts(table),
        "all false alarms": alarms,
        "every step": table,
        "cost": costs(rounds, small if args.quick else full),
    }
    save("locate", folder_of(args), figures, tables(figures))


if __name__ == "__main__":
    main()
