"""The command `lit-stability incidents`: lists the incidents of a run, and shows one of them.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_stability.checks.text_table import align
from lit_stability.errors import ConfigError
from lit_stability.incidents.log import read_incidents, to_json
from lit_stability.incidents.report import responses_in_words
from lit_stability.printing import printable

_RECORD = "incidents.jsonl"
_HEAD = ("id", "step", "kind", "cause", "count", "response", "outcome")
_WIDEST = 60
"""Longest response in the table, in characters."""
_EXIT_CODES = """\
exit codes:
  0  the incidents were printed, or the run has none
  2  the command line or a record is wrong
"""


def add_incidents(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to a parser.

    Args:
        commands: sub-commands of the parser.
    """
    incidents = commands.add_parser(
        "incidents",
        help="list the incidents of a run, or show one of them",
        description="Without an ID: list the incidents that the suite recorded in a run, and in "
        "the runs below its folder. With one: print its report, with the likely causes, what was "
        "ruled out, and what to try.",
        epilog="examples:\n  lit-stability incidents runs/NAME\n"
        "  lit-stability incidents runs/NAME 2\n"
        "  lit-stability incidents runs/NAME --json | jq '.[].cause'\n\n" + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    incidents.add_argument(
        "run", metavar="RUN", type=Path, help=f"folder of a run, or its {_RECORD}"
    )
    incidents.add_argument("id", metavar="ID", type=int, nargs="?", help="number of an incident")
    incidents.add_argument(
        "--json", action="store_true", help="print the records as JSON, with all fields"
    )
    incidents.set_defaults(command=run_incidents)


def run_incidents(args: argparse.Namespace) -> int:
    """Prints the incidents of a run; returns the exit code.

    Raises:
        ConfigError: if there is no such folder or incident, or a record cannot be read.
    """
    records = {file: _read(file) for file in _files(args.run)}
    if args.id is not None:
        records = _only(records, args.id, args.run)
    if args.json:
        print(to_json([each for found in records.values() for each in found]))
    elif not any(records.values()):
        print(printable(f"no incident is recorded in {args.run}"))
    else:
        print("\n\n".join(_text(file, found, args) for file, found in records.items()))
    return 0


def _text(file: Path, found: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    if args.id is not None:
        return "\n\n".join(_report(file, each) for each in found)
    several = [] if file.parent == args.run else [printable(str(file.parent))]
    rows = [_row(each) for each in found]
    return "\n".join([*several, *align([_HEAD, *rows], left=len(_HEAD))])


def _row(incident: Mapping[str, Any]) -> tuple[str, ...]:
    response = responses_in_words(incident.get("responses", []))
    return (
        *(str(incident["id"]), str(incident["step"]), incident["kind"]),
        incident.get("cause") or "unknown",
        str(incident.get("strikes", 1)),
        textwrap.shorten(response, _WIDEST, placeholder=" ...") or "-",
        incident["outcome"],
    )


def _report(file: Path, incident: Mapping[str, Any]) -> str:
    """Returns the report that was written beside the checkpoint, or else all that is recorded."""
    folder = Path(incident.get("path") or "none").name
    try:
        # Not the recorded path: the run may have been moved.
        report = (file.parent / "incidents" / folder / "report.md").read_text(encoding="utf8")
    except OSError:
        fields = ((key, value) for key, value in incident.items() if value not in (None, "", []))
        report = "\n".join(f"{key}: {value}" for key, value in fields)
    return printable(report, keep="\n").rstrip()


def _only(
    records: Mapping[Path, list[dict[str, Any]]], number: int, run: Path
) -> dict[Path, list[dict[str, Any]]]:
    """Returns the incidents of one number.

    Raises:
        ConfigError: if there are none.
    """
    chosen = {file: [i for i in found if i["id"] == number] for file, found in records.items()}
    if not any(chosen.values()):
        known = sorted({each["id"] for found in records.values() for each in found})
        raise ConfigError(
            f"{run}: has no incident {number}; it has "
            + (", ".join(map(str, known)) if known else "none")
        )
    return {file: found for file, found in chosen.items() if found}


def _files(run: Path) -> list[Path]:
    """Returns the records in a folder and below it.

    Raises:
        ConfigError: if there is no such file or folder.
    """
    if not run.exists():
        raise ConfigError(f"{run}: does not exist; give the folder of a run, such as runs/NAME")
    return [run] if run.is_file() else sorted(run.rglob(_RECORD))


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        return read_incidents(file)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
