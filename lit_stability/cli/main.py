"""The command line, `lit-stability`.

Imports only the configuration at module level. Lightning and torch are imported inside a command,
so that help and wrong options are answered immediately.
"""

import argparse
import contextlib
import difflib
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from omegaconf import OmegaConf

from lit_stability import __version__
from lit_stability.cli.completion import add_completion
from lit_stability.cli.config import as_written, compose
from lit_stability.cli.doctor import add_doctor
from lit_stability.cli.ending import INTERRUPTED, run_to_end
from lit_stability.cli.experiments.command import add_experiments
from lit_stability.cli.incidents import add_incidents
from lit_stability.cli.ranges import add_ranges
from lit_stability.cli.run_folders import choose_run_dir, is_first_process, is_run, newest_run
from lit_stability.cli.signature import is_signed
from lit_stability.cli.sweep import is_sweep, run_sweep
from lit_stability.cli.targets import add_allow
from lit_stability.errors import ConfigError
from lit_stability.incidents import TrainingStopped
from lit_stability.printing import printable
from lit_stability.redaction import redacted
from lit_stability.training_state.good_checkpoints import RunEnd, good_checkpoint_of, step_of
from lit_stability.training_state.preemption_checkpoints import FOLDER as PREEMPTED
from lit_stability.training_state.preemption_checkpoints import find_resume_checkpoint

_EXIT_CODES = """\
exit codes:
  0  success
  1  the run failed; the traceback shows where
  2  the command line or the config is wrong; nothing was started
  3  the suite stopped the run: before its first step, or with the weights restored to the last
     confirmed snapshot; the message shows the reason
  4  with --strict: the run is not as the config expects; 0 if it is, also if it was stopped
130  Ctrl-C; the last line has the command that goes on. 143: SIGTERM
"""
_SMALLEST = """\
example config, mine.yaml in the folder of my_module.py:
  model: {_target_: my_module.MyModel}
  data: {_target_: my_module.MyData}
  trainer: {max_steps: 1000}
  callbacks:
    monitor: {_target_: lit_stability.GradientMonitor}
    rollback: {_target_: lit_stability.AutoRollback}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; an exception inside a run is raised.

    Args:
        argv: The arguments; by default those of the process.
    """
    parser = _parser()
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        parser.print_help()
        return 2
    args, rest = parser.parse_known_args(words)
    if hasattr(args, "overrides"):
        # argparse reads positionals of a sub-command only once; these come after an option.
        args.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # Targets such as `models.…` are in the current folder, not in an installed package. Unlike
    # `python -m`, a console script does not search the current folder.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return int(args.command(args))
    except ConfigError as error:
        print(_line_of(error), file=sys.stderr)
        return 2
    except _stops() as error:
        print(_line_of(error), file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("lit-stability: interrupted", file=sys.stderr)
        return INTERRUPTED


def _line_of(error: Exception) -> str:
    """Returns a message for the terminal; it may repeat names from a file of any origin."""
    return printable(redacted(f"lit-stability: {error}"), keep="\n")


def _stops() -> tuple[type[Exception], ...]:
    """Returns the exceptions with which the suite stops a run.

    `PreflightError` cannot have been raised if its module was not imported.
    """
    preflight = sys.modules.get("lit_stability.checks.preflight")
    return (TrainingStopped, *((preflight.PreflightError,) if preflight else ()))


class _Version(argparse.Action):
    """Prints versions, which are looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"lit-stability {__version__}")
        for name in ("torch", "lightning", "pytorch-lightning"):
            with contextlib.suppress(PackageNotFoundError):
                print(f"{name} {version(name)}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Suggests the command, or the option, that was probably meant."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong:
            commands = re.findall(r"\w+", wrong[2])
            close = difflib.get_close_matches(wrong[1], commands, n=1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            message = f"{wrong[1]!r} is no command; {meant}commands: {', '.join(commands)}"
        if message.endswith("required: -c/--config"):
            message = "which config? write -c NAME, such as -c translation_rescue"
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="lit-stability",
        description="Train with PyTorch Lightning and recover from instabilities.",
        epilog=f"{_EXIT_CODES}\nFor the other commands: see COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action=_Version, help="print the versions of the package, torch and lightning"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_fit(commands)
    _add_resume(commands)
    add_ranges(commands)
    _add_check(commands)
    add_doctor(commands)
    add_incidents(commands)
    add_experiments(commands)
    add_completion(commands, parser)
    for command in commands.choices.values():
        command.description = textwrap.fill(str(command.description), 79)
    return parser


def _add_fit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    fit = commands.add_parser(
        "fit",
        help="run the experiment that a config describes",
        description="Compose config files, check every option, train and evaluate. If the config "
        "has an `expect`, the last line shows whether it was met.",
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
        help="a YAML file in the current folder or configs/; a later one overrides an earlier one",
    )
    fit.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="overrides an option of the files; the value is YAML. With several values, as in "
        "model.lr=1e-3,1e-2, every combination is run in a process of its own, and a table "
        "compares them; quote a text that has a comma: 'about=\"a, b\"'",
    )
    fit.add_argument(
        "--print-config",
        action="store_true",
        help="print the composed config with resolved interpolations, except those of the "
        "environment, without checks, and exit",
    )
    fit.add_argument(
        "--resume",
        metavar="CKPT|last|good",
        help="resume from a checkpoint; or continue the newest run, or that of --name or run_dir, "
        "from its newest or its last good one",
    )
    fit.add_argument(
        "--name",
        metavar="NAME",
        help="write to runs/EXPERIMENT/NAME; by default to runs/EXPERIMENT/<time>",
    )
    fit.add_argument(
        "--overwrite",
        action="store_true",
        help="delete an earlier run in the folder of --name or run_dir",
    )
    _add_strict(fit)
    add_allow(fit)
    fit.set_defaults(command=_fit)


def _add_strict(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--strict",
        action="store_true",
        help="let the exit code say whether the run was as the `expect` of its config says",
    )


def _fit(args: argparse.Namespace) -> int:
    if is_sweep(args.overrides):
        return run_sweep(args)
    config = compose(args.config, args.overrides)
    if args.print_config:
        print(OmegaConf.to_yaml(as_written(config)[0]), end="")
        return 0
    choose_run_dir(config, name=args.name, resume=args.resume, overwrite=args.overwrite)
    from lit_stability.cli.fit import fit

    return run_to_end(
        config,
        lambda: fit(config, resume=args.resume, allow=args.allow, overwrite=args.overwrite),
        strict=args.strict,
    )


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    # Other codes than those of `fit`: errors found by the checks are the result of `check`.
    codes = """\
exit codes:
  0  no error was found; warnings and notes do not count
  1  errors were found and printed; a traceback, if any, shows what failed before the checks
  2  the command line or the config is wrong; nothing was checked
"""
    check = commands.add_parser(
        "check",
        help="check model, first batch and optimizer without training",
        description="Build the same objects as fit, fetch the first batch, run the checks of "
        "lit_stability.Preflight and print the findings. Only --out is written.",
        epilog=f"example:\n  lit-stability check -c mine --out report.json\n\n"
        f"An example config: lit-stability fit --help\n\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    check.add_argument(
        *("-c", "--config"), metavar="FILE", action="append", required=True, help="as for fit"
    )
    check.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="as for fit")
    check.add_argument(
        "--out", metavar="FILE.json", type=Path, help="also write the report to a file"
    )
    add_allow(check)
    check.set_defaults(command=_check)


def _check(args: argparse.Namespace) -> int:
    config = compose(args.config, args.overrides)
    from lit_stability.cli.check import check

    return check(config, out=args.out, allow=args.allow)


def _add_resume(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    resume = commands.add_parser(
        "resume",
        help="resume a run from its last good checkpoint",
        description="Resume a run with its config and its last good checkpoint.",
        epilog=f"example:\n  lit-stability resume runs/NAME\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    resume.add_argument(
        "run", metavar="RUN", help="folder of the run, or of several: the newest is resumed"
    )
    resume.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="overrides an option of the run's config",
    )
    resume.add_argument(
        "--trust",
        action="store_true",
        help="use the config of the run although no fit of this user has written it",
    )
    _add_strict(resume)
    add_allow(resume)
    resume.set_defaults(command=_resume)


def _resume(args: argparse.Namespace) -> int:
    run = newest_run(Path(args.run))
    if not is_run(run):
        raise ConfigError(
            f"{run}: has no config.yaml; give the folder of a run, or of several, such as runs/NAME"
        )
    if not (args.trust or is_signed(run / "config.yaml")):
        raise ConfigError(
            f"{run / 'config.yaml'}: was not written by a fit of this user, or was changed since; "
            "a config is code: it decides which classes are imported and built. Read it, then "
            "add --trust"
        )
    config = compose([run / "config.yaml"], [f"run_dir={run}", *args.overrides])
    from lit_stability.restart.torchrun import from_rank_0

    # Each rank would read the whole checkpoint, to verify it.
    found = from_rank_0(lambda: str(find_resume_checkpoint(run) or ""))
    checkpoint = Path(found)
    if not found:
        raise ConfigError(
            f"{run}: has no good checkpoint; add `lit_stability.LastKnownGood` to the callbacks, "
            "which writes one after some healthy steps. To resume from any other checkpoint: "
            f"lit-stability fit -c {run / 'config.yaml'} --resume last"
        )
    good = good_checkpoint_of(checkpoint)
    end = None if good is None else RunEnd.read(good.parent)
    ending = "" if end is None else f"; the run {end.in_words()}"
    kind = "preemption" if PREEMPTED in checkpoint.parts[-3:] else "good"
    line = f"resuming from the {kind} checkpoint of step {step_of(checkpoint)}{ending}"
    if is_first_process():
        print(printable(line))
    from lit_stability.cli.fit import fit

    return run_to_end(
        config,
        lambda: fit(config, resume=checkpoint, allow=args.allow),
        strict=args.strict,
    )


if __name__ == "__main__":
    sys.exit(main())
