"""The command line, `lit-stability`.

May import the configuration at module level, Lightning and torch only inside a command: help
and a misspelt flag answer at once.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from lit_stability.cli.config import compose, resolve
from lit_stability.cli.doctor import add_doctor
from lit_stability.cli.experiments.command import add_experiments
from lit_stability.cli.ranges import add_ranges
from lit_stability.errors import ConfigError
from lit_stability.incidents import TrainingStopped
from lit_stability.training_state.good_checkpoints import RunEnd, find_last_good, step_of

_EXIT_CODES = """\
exit codes:
  0  the command did what it was asked
  1  the run failed; the traceback says where
  2  the command line or the config is wrong; nothing was started
  3  the suite stopped the run, with weights at the last confirmed snapshot, or before its first
     step; the message says why
"""
_SMALLEST = """\
a config, such as mine.yaml beside my_module.py:
  model: {_target_: my_module.MyModel}
  data: {_target_: my_module.MyData}
  trainer: {max_steps: 1000}
  callbacks:
    monitor: {_target_: lit_stability.GradientMonitor}
    rollback: {_target_: lit_stability.AutoRollback}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; what fails inside a run is raised.

    Args:
        argv: The arguments; by default those of the process.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "overrides"):
        # argparse takes the positionals of a sub-command from one place; these follow a flag.
        args.overrides += [each for each in rest if not each.startswith("-")]
        rest = [each for each in rest if each.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # Targets such as `models.…` lie in the folder the user works in, not in an installed package,
    # and a console script, unlike `python -m`, does not look there.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return int(args.command(args))
    except ConfigError as error:
        print(f"lit-stability: {error}", file=sys.stderr)
        return 2
    except _stops() as error:
        print(f"lit-stability: {error}", file=sys.stderr)
        return 3


def _stops() -> tuple[type[Exception], ...]:
    """What the suite stops a run with; of what was not imported nothing was raised."""
    preflight = sys.modules.get("lit_stability.checks.preflight")
    return (TrainingStopped, *((preflight.PreflightError,) if preflight else ()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-stability",
        description="Train with PyTorch Lightning, and keep the run alive.",
        epilog=f"{_EXIT_CODES}\nOf check, doctor, experiments and ranges: see COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_fit(commands)
    _add_resume(commands)
    add_ranges(commands)
    _add_check(commands)
    add_doctor(commands)
    add_experiments(commands)
    for command in commands.choices.values():
        command.description = textwrap.fill(str(command.description), 79)
    return parser


def _add_fit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    fit = commands.add_parser(
        "fit",
        help="run the experiment that a config describes",
        description="Compose config files, check every option, train, evaluate; where the config "
        "states an `expect`, the last line says whether it was met.",
        epilog=f"{_SMALLEST}\nexample:\n  lit-stability fit -c mine trainer.max_steps=100\n\n"
        f"{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fit.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        action="append",
        required=True,
        help="a YAML file, looked up here and in configs/; a later one is laid over an earlier one",
    )
    fit.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="laid over the files; the value is YAML",
    )
    fit.add_argument(
        "--print-config",
        action="store_true",
        help="print the composed config with interpolations resolved, unchecked, and exit",
    )
    fit.add_argument(
        "--resume",
        metavar="CKPT|last|good",
        help="go on from a checkpoint, or from the newest, or the last known good one, in run_dir",
    )
    fit.set_defaults(command=_fit)


def _fit(args: argparse.Namespace) -> int:
    config = compose(args.config, args.overrides)
    if args.print_config:
        print(OmegaConf.to_yaml(resolve(config)), end="")
        return 0
    from lit_stability.cli.fit import fit

    fit(config, resume=args.resume)
    return 0


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    # As `check` is not `fit`: what it finds is its answer.
    codes = """\
exit codes:
  0  no error was found; warnings and notes do not count
  1  errors were found, and are printed; a traceback, if there is one, says what failed before
  2  the command line or the config is wrong; nothing was checked
"""
    check = commands.add_parser(
        "check",
        help="check model, first batch and optimizer, and train nothing",
        description="Build what fit would, take its first batch, run the checks of "
        "lit_stability.Preflight and print what they find. Nothing is written but --out.",
        epilog=f"example:\n  lit-stability check -c mine --out report.json\n\n"
        f"What a config is: lit-stability fit --help\n\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    check.add_argument(
        *("-c", "--config"), metavar="FILE", action="append", required=True, help="as for fit"
    )
    check.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="laid over the files"
    )
    check.add_argument("--out", metavar="FILE.json", type=Path, help="write the report there too")
    check.set_defaults(command=_check)


def _check(args: argparse.Namespace) -> int:
    config = compose(args.config, args.overrides)
    from lit_stability.cli.check import check

    return check(config, out=args.out)


def _add_resume(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    resume = commands.add_parser(
        "resume",
        help="go on with a run from its last known good checkpoint",
        description="Take the config and the last known good checkpoint of a run, and go on.",
        epilog=f"example:\n  lit-stability resume runs/NAME\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    resume.add_argument("run", metavar="RUN", help="folder of the run, with its config.yaml")
    resume.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="laid over the config of the run",
    )
    resume.set_defaults(command=_resume)


def _resume(args: argparse.Namespace) -> int:
    run = Path(args.run)
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run}: no config.yaml there; give the run_dir of a run, such as runs/NAME"
        )
    config = compose([run / "config.yaml"], [f"run_dir={run}", *args.overrides])
    checkpoint = find_last_good(run)
    if checkpoint is None:
        raise ConfigError(
            f"{run}: no good checkpoint there; `lit_stability.LastKnownGood` among the callbacks "
            "writes one after some healthy steps. To go on from any other: "
            f"lit-stability fit -c {run / 'config.yaml'} --resume last"
        )
    end = RunEnd.read(checkpoint.parent)
    behind = "" if end is None else f"; the run {end.in_words()}"
    print(f"step {step_of(checkpoint)} is the last known good{behind}")
    from lit_stability.cli.fit import fit

    fit(config, resume=checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
