"""The command `lit-stability experiments`: list the experiments, or run them and judge each.

May import the configuration; torch and Lightning are imported only in the processes it starts.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from lit_stability.cli.experiments.catalogue import catalogue, choose, listing
from lit_stability.cli.experiments.judgement import summary
from lit_stability.cli.experiments.running import Experiment, Result, plan, run
from lit_stability.cli.experiments.table import as_dict, as_markdown, as_text
from lit_stability.errors import ConfigError
from lit_stability.training_state.atomic_write import write_and_keep

_EXIT_CODES = """\
exit codes:
  0  every experiment is as expected, or the experiments were listed
  1  some are not as expected, could not be run, or were interrupted; the table shows which
  2  the command line or a config is wrong; nothing was started
"""


def add_experiments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to a parser.

    Args:
        commands: the sub-commands of the parser.
    """
    experiments = commands.add_parser(
        "experiments",
        help="list the experiments of ./configs, or run them and compare with their expectations",
        description="Without a name: list the configs of ./configs with their descriptions. "
        "With names or patterns: run them one after another, each in its own process, compare "
        "each outcome with its `expect`, and print a table, which is also written to "
        "experiments.md and experiments.json. If one fails, the others still run.",
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
        help="experiments by name or pattern, and overrides for each of them, as for fit",
    )
    experiments.add_argument("--all", action="store_true", help="run all that have an `expect`")
    experiments.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("runs"),
        help="folder for the table and for one folder per run (default: runs)",
    )
    experiments.set_defaults(command=run_experiments)


def run_experiments(args: argparse.Namespace) -> int:
    """Lists the experiments, or runs them and writes the table; returns the exit code.

    Raises:
        ConfigError: if a name matches nothing or a config cannot be composed; nothing was run.
    """
    wanted = [word for word in args.overrides if "=" not in word]
    overrides = [word for word in args.overrides if "=" in word]
    configs = catalogue()
    if not wanted and not args.all:
        if overrides:
            raise ConfigError(
                f"{' '.join(overrides)}: no experiment to override; name one, or use --all"
            )
        print(listing(configs))
        return 0
    chosen = choose(configs, wanted, everything=args.all)
    experiments = [plan(name, args.out, overrides) for name in chosen]
    results: list[Result] = []
    try:
        results.extend(_reported(run_all(experiments)))
    except KeyboardInterrupt:
        print(f"interrupted after {len(results)} of {len(experiments)}")
    _write(results, args.out)
    return 0 if len(results) == len(experiments) and all(each.met for each in results) else 1


def run_all(experiments: Iterable[Experiment]) -> Iterator[Result]:
    """Runs experiments one after another, and prints the name and description of each."""
    for experiment in experiments:
        print(f"{experiment.name}: {experiment.about}", flush=True)
        yield run(experiment)


def _reported(results: Iterable[Result]) -> Iterator[Result]:
    for result in results:
        print(f"  {summary(result.verdicts)} ({result.seconds:.0f} s)", flush=True)
        yield result


def _write(results: list[Result], folder: Path) -> None:
    """Prints the table and writes it as markdown and JSON; existing tables are renamed."""
    print(f"\n{as_text(results, shutil.get_terminal_size((110, 24)).columns)}")
    write_and_keep(folder / "experiments.md", as_markdown(results))
    rows = json.dumps(as_dict(results), indent=1, ensure_ascii=False) + "\n"
    write_and_keep(folder / "experiments.json", rows)
    print(f"wrote {folder / 'experiments.md'} and {folder / 'experiments.json'}")
