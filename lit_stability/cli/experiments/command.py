"""The command `lit-stability experiments`: list the experiments, or run them and judge each.

May import the configuration; torch and Lightning come in only with the processes it starts.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from lit_stability.cli.experiments.catalogue import catalogue, choose, listing
from lit_stability.cli.experiments.judgement import summary
from lit_stability.cli.experiments.running import Result, Trial, plan, run
from lit_stability.cli.experiments.table import as_dict, as_markdown, as_text
from lit_stability.errors import ConfigError
from lit_stability.training_state.atomic_write import write_and_keep

_EXIT_CODES = """\
exit codes:
  0  every experiment that was run is as expected, or they were listed
  1  some are not, or could not be run, or Ctrl-C came before the last; the table says which
  2  the command line or a config is wrong; nothing was started
"""


def add_experiments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser.

    Args:
        commands: where sub-commands go.
    """
    experiments = commands.add_parser(
        "experiments",
        help="list the experiments of ./configs, or run them and see whether each shows its point",
        description="Without a name: list the configs of ./configs, each with what it is about. "
        "With names or patterns: run them one after another, each in its own process, hold what "
        "each leaves against its `expect`, and print a table, also written as experiments.md and "
        "experiments.json. One that fails does not keep the others from running.",
        epilog="example:\n  lit-stability experiments 'translation_*' --out runs trainer."
        f"max_steps=100\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    experiments.add_argument(
        "overrides",
        metavar="NAME|KEY=VALUE",
        nargs="*",
        default=[],
        help="experiments, by name or pattern; and what is laid over each of them, as for fit",
    )
    experiments.add_argument("--all", action="store_true", help="run all that state an `expect`")
    experiments.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("runs"),
        help="for the table, and for each run a folder of its name (default: runs)",
    )
    experiments.set_defaults(command=run_experiments)


def run_experiments(args: argparse.Namespace) -> int:
    """List, or run, print and write; returns the exit code.

    Raises:
        ConfigError: a name fits nothing or a config cannot be composed; nothing was run.
    """
    wanted = [each for each in args.overrides if "=" not in each]
    overrides = [each for each in args.overrides if "=" in each]
    configs = catalogue()
    if not wanted and not args.all:
        if overrides:
            raise ConfigError(f"{' '.join(overrides)}: of which experiment? Name it, or give --all")
        print(listing(configs))
        return 0
    chosen = choose(configs, wanted, everything=args.all)
    trials = [plan(name, args.out, overrides) for name in chosen]
    results: list[Result] = []
    try:
        results.extend(_told(run_all(trials)))
    except KeyboardInterrupt:
        print(f"interrupted after {len(results)} of {len(trials)}")
    _write(results, args.out)
    return 0 if len(results) == len(trials) and all(each.met for each in results) else 1


def run_all(trials: Iterable[Trial]) -> Iterator[Result]:
    """Run trials one after another, announcing each."""
    for trial in trials:
        print(f"{trial.name}: {trial.about}", flush=True)
        yield run(trial)


def _told(results: Iterable[Result]) -> Iterator[Result]:
    for each in results:
        print(f"  {summary(each.verdicts)} ({each.seconds:.0f} s)", flush=True)
        yield each


def _write(results: list[Result], folder: Path) -> None:
    """Print the table and write it twice; tables of earlier runs are kept, renamed."""
    print(f"\n{as_text(results, shutil.get_terminal_size((110, 24)).columns)}")
    write_and_keep(folder / "experiments.md", as_markdown(results))
    rows = json.dumps(as_dict(results), indent=1, ensure_ascii=False) + "\n"
    write_and_keep(folder / "experiments.json", rows)
    print(f"wrote {folder / 'experiments.md'} and {folder / 'experiments.json'}")
