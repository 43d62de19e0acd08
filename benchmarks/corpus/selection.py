"""Selects the runs of a corpus and writes the file that defines it.

    python -m benchmarks.corpus.selection --out FILE

For the maintainers, once for each version. Selected are

* of `benchmarks.rescue` all scenarios on its small networks (CNN, GRU, GAN), the two runs of
  `benchmarks.instabilities` that a remedy exists for, the first scenario on the byte GPT of each
  family of faults, and the twins of all these,
* of each diverging family of `benchmarks.prediction` with a small net, and of two with a GPT, the
  run with the first seed of which the unprotected loss diverges, and its twin; the seeds are 12 to
  16 (those below 12 were used to fit `CrashPrediction`), and a family without such a seed is left
  out,
* each calm family with a small net, with seed 12,
* every twelfth kind of `benchmarks.healthy` that has one fit and no validation.

All others take longer: a protection should be measured in minutes on one core.
The batch at which an unprotected run is lost is measured here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.corpus.entries import PATH, Entry, id_of, write
from benchmarks.corpus.records import Store, measure
from benchmarks.corpus.sources import DIVERGES, TWIN, scenario_of
from benchmarks.healthy.table import KINDS
from benchmarks.prediction.families import CALM, DIVERGING
from benchmarks.rescue.judge import BARE
from benchmarks.rescue.table import QUICK as QUICK_SCENARIOS
from benchmarks.rescue.table import SCENARIOS
from benchmarks.rescue.workers import limit_threads_and_output

SEEDS = range(12, 17)
SMALL = ("CNN", "GRU", "GAN")
GPTS = ("GPT, exponential ramp", "GPT, rate x300")
EVERY = 12
"""Of so many kinds of healthy practice one is selected."""
BY_ITSELF = ("by itself", DIVERGES)
"""Families of failing runs without an injected fault."""
QUICK_FAMILIES = ("SGD, linear ramp", "least squares past the edge", "SGD, rate x30")
QUICK_TWINS = (
    "learning rate diverges, twin",
    "CNN, fp16 with a loss scale",
)


def entry_of(source: str, name: str, seed: int, *, quick: bool = False) -> Entry:
    """Creates an entry; without the batch at which the run is lost."""
    scenario = scenario_of(source, name, seed)
    if source == "rescue":
        twin = id_of(source, scenario.undisturbed().name, seed)
    else:
        twin = id_of(source, name + TWIN, seed)
    injected = not scenario.healthy and scenario.family not in BY_ITSELF
    return Entry(
        id=id_of(source, name, seed),
        source=source,
        name=name,
        seed=seed,
        family=scenario.family,
        steps=scenario.task.steps,
        twin="" if scenario.healthy else twin,
        cause=scenario.causes[0] if scenario.causes else "",
        fault=scenario.step if injected else None,
        quick=quick,
    )


def selected(store: Store) -> Iterator[Entry]:
    """Yields the entries, with the batch at which the failing ones are lost."""
    for name in _of_rescue():
        entry = entry_of("rescue", name, 0, quick=name in (*QUICK_SCENARIOS, *QUICK_TWINS))
        yield entry if entry.healthy else _with_loss(entry, store)
    for family in (f for f in DIVERGING if _is_small(f) or f in GPTS):
        quick = family in QUICK_FAMILIES
        runs = (entry_of("prediction", family, seed, quick=quick) for seed in SEEDS)
        lost = next((e for e in (_with_loss(r, store) for r in runs) if e.lost is not None), None)
        if lost is None:
            print(f"{family}: no seed diverges", file=sys.stderr)
            continue
        yield from (lost, entry_of("prediction", family + TWIN, lost.seed, quick=quick))
    for family in filter(_is_small, CALM):
        yield entry_of("prediction", family, SEEDS[0], quick=family in ("SGD", "batches of 2"))
    kinds = [k.name for k in KINDS.values() if k.fits == 1 and k.held_out is None]
    for number, name in enumerate(kinds[::EVERY]):
        yield entry_of("healthy", name, 0, quick=number % 6 == 0)


def _of_rescue() -> list[str]:
    """Returns the names of the selected scenarios, in the order of their table."""
    savable = [s for s in SCENARIOS.values() if not s.beyond_remedy]
    families = {s.family: s for s in reversed(savable) if s.task.name == "byte GPT"}
    chosen = [
        *(s for s in savable if s.task.name.split(",")[0] in SMALL or s.family == "by itself"),
        *families.values(),
    ]
    names = {s.name for s in chosen} | {s.undisturbed().name for s in chosen}
    return [name for name in SCENARIOS if name in names]


def _is_small(family: str) -> bool:
    return not family.startswith("GPT")


def _with_loss(entry: Entry, store: Store) -> Entry:
    record = store.load(entry, BARE) or measure(entry, BARE)
    store.save(entry, BARE, record)
    return replace(entry, lost=record.lost)


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PATH)
    parser.add_argument("--folder", type=Path, default=Path("runs/corpus"))
    options = parser.parse_args()
    limit_threads_and_output()
    write(list(selected(Store(options.folder))), options.out)


if __name__ == "__main__":
    main()
