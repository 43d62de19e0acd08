"""Measures how near `QKClip` brings a run whose attention collapses to its healthy twin.

    python -m benchmarks.qk_clip [--seeds 0 1 2] [--quick]

The case "attention logits grow" of `benchmarks.instabilities`: a byte GPT at a learning rate of
0.1; its twin has 1e-3. All runs have the default suite with `AttentionProbe(every=20)`. A loss is
the mean of the last 20 steps. One thread.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback

from benchmarks.instabilities.__main__ import Result, train
from benchmarks.instabilities.cases import CASES
from benchmarks.results import Table, add_options, folder_of, save
from lit_stability import AttentionProbe, QKClip, stability_callbacks

CLIPS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "QKClip()": {},
    "QKClip(every=5)": {"every": 5},
    "QKClip(every=20)": {"every": 20},
    "QKClip(30)": {"threshold": 30.0},
}


def run(rate: str, clip: QKClip | None, seed: int) -> Result:
    """Trains at a learning rate, with or without a clip."""
    case = CASES["attention logits grow"]
    monitor, *others = stability_callbacks()
    callbacks: list[Callback] = [monitor, AttentionProbe(every=20), *others]
    callbacks += [] if clip is None else [clip]
    return train(case if rate == "0.1" else case.healthy(), seed, callbacks)


def figure(rate: str, name: str, seed: int) -> dict[str, Any]:
    """Returns what became of a run, and prints it."""
    options = CLIPS[name]
    clip = None if options is None else QKClip(**options)
    result = run(rate, clip, seed)
    found = {
        **{"rate": rate, "clip": name, "seed": seed, "loss": result.loss, "steps": result.steps},
        "steps with a rescaling": 0 if clip is None else clip.steps,
        "heads": {} if clip is None else clip.rescaled,
        "incidents": [i.first.kind for i in result.incidents],
    }
    print(found, flush=True)
    return found


def main() -> None:
    """Runs the benchmark and writes its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+")
    args = parser.parse_args()
    for name in ("lightning", "lightning.pytorch.lit_stability", "lightning.pytorch.utilities"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    names = {"0.1": list(CLIPS), "1e-3": ["none", "QKClip()"]}
    figures = [figure(rate, n, seed) for rate, own in names.items() for n in own for seed in seeds]
    rows = [
        [
            *(each["rate"], each["clip"], str(each["seed"]), f"{each['loss']:.3f}"),
            *(str(each["steps"]), str(each["steps with a rescaling"])),
            *(str(sum(each["heads"].values())), ", ".join(each["incidents"]) or "-"),
        ]
        for each in figures
    ]
    columns = ["learning rate", "clip", "seed", "loss", "steps"]
    columns += ["steps with a rescaling", "heads rescaled", "incidents"]
    table = Table("QK-clip on a byte GPT", columns, rows)
    save("qk_clip", folder_of(args), {"rows": figures}, [table])


if __name__ == "__main__":
    main()
