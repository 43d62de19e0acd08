"""Runs Lightning's own tests bare and with the suite in every Trainer, and compares them.

    python -m benchmarks.lightning_tests PATH [--tests tests/tests_pytorch/callbacks] [--out FOLDER]

PATH is a checkout of Lightning's repository at the tag of the installed version, or its folder
``tests``. Nothing is downloaded. The tests run twice with pytest, with ``LIT_STABILITY_AUTO=0`` and
``=1``. A test that passes bare and fails with the suite is "expected" if it counts or lists what a
suite adds: calls of a mock, callbacks, hooks, files, keys, metrics. Every other one is "real": an
exception or another value. The exit code is 1 if there are real ones.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import lit_stability
from benchmarks.results import FOLDER, Table, save
from lit_stability.registration import VARIABLE

GROUP, ENTRY_POINT = "lightning.pytorch.callbacks_factory", "lit_stability.registration:callbacks"
PASSED, SKIPPED = "passed", "skipped"

IDS = (
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<![\w/])(?:/[\w.+-]+){2,}/?"), "PATH"),
    (re.compile(r"0x[0-9a-f]+|(?<=id=')\d+"), "ID"),
    (re.compile(r"(?<![\w.])-?\d+(?:\.\d*)?(?:e[+-]?\d+)?(?!\w)"), "N"),
)
"""What differs between two runs of the same failure, and what replaces it."""

COUNTS = re.compile(
    r"AssertionError: (Expected '.*' to (not )?(have been|be) |expected call not found|"
    r"Calls not found)|"
    r"\.(call_count|mock_calls|method_calls|call_args_list)\b|\bcall\(|"
    r"where \d+ = len\(|len\(.*\) ==|<lit_stability\.",
    re.DOTALL,
)
"""A count of calls of a mock or of the items of a list, or a callback of the suite in a list."""

LISTS = re.compile(
    r"(?:contains (?:one|\d+) more items?(?:, first extra item)?:|"
    r"Extra items in the (?:left|right) set:|At index \d+ diff:)\s*(.*)"
)
"""A list, set or dict that has more or other items; the group is the first of these."""

NUMBER = re.compile(r"[\s(\[]*(tensor\(|-?\d|-?inf|nan)")


@dataclass(frozen=True)
class Outcome:
    """Outcome of a test in one run."""

    status: str
    """"passed", "skipped", "failed" or "error"."""
    message: str = ""
    """The lines that pytest marks with E, or the reason of a skip."""


@dataclass(frozen=True)
class NewFailure:
    """Tests that pass bare and fail with the suite, with the same message."""

    message: str
    """Without numbers, ids and paths."""
    expected: bool
    """Whether the tests count or list what a suite adds."""
    tests: list[str]
    example: str
    """Message of the first test."""


def normalized(message: str) -> str:
    """Replaces numbers, ids and paths of a message.

    >>> normalized("ValueError: 3 keys in /tmp/run-7/last.ckpt of <Mock id='140'>")
    "ValueError: N keys in PATH of <Mock id='ID'>"
    """
    for pattern, replacement in IDS:
        message = pattern.sub(replacement, message)
    return message.strip()


def is_expected(message: str) -> bool:
    """Returns whether a failed assertion counts or lists what a suite adds.

    >>> is_expected("assert 7 == 2 +  where 7 = len([1, 2, 3])")
    True
    >>> is_expected("assert [0.1] == [0.2] At index 0 diff: 0.1 != 0.2")
    False
    """
    first_line = message.strip().split("\n")[0]
    if not first_line.startswith(("assert ", "AssertionError")):
        return False
    if COUNTS.search(message):
        return True
    listed = LISTS.search(message)
    return listed is not None and not NUMBER.match(listed[1])


def new_failures(
    bare: Mapping[str, Outcome], with_suite: Mapping[str, Outcome]
) -> list[NewFailure]:
    """Groups the tests that pass only bare by their message, the most frequent first."""
    groups: dict[str, dict[str, str]] = {}
    for test, outcome in bare.items():
        now = with_suite.get(test, Outcome("missing", "no result: the run ended before this test"))
        if outcome.status == PASSED != now.status:
            message = now.message or now.status
            groups.setdefault(normalized(message), {})[test] = message
    found = []
    for message, tests in groups.items():
        example = next(iter(tests.values()))
        found.append(NewFailure(message, is_expected(example), list(tests), example))
    return sorted(found, key=lambda failure: (-len(failure.tests), failure.message))


def outcomes_of(report: Path) -> dict[str, Outcome]:
    """Loads the outcomes by test from a report of ``--junitxml``."""
    found: dict[str, Outcome] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome = _outcome_of(case)
        # A test that fails and whose teardown fails too has two entries.
        if name not in found or found[name].status in (PASSED, SKIPPED):
            found[name] = outcome
    return found


def _outcome_of(case: ElementTree.Element) -> Outcome:
    for status, tag in (("failed", "failure"), ("error", "error"), (SKIPPED, "skipped")):
        if (element := case.find(tag)) is not None:
            return Outcome(status, _message_of(element))
    return Outcome(PASSED)


def _message_of(element: ElementTree.Element) -> str:
    """Returns the last block of lines that pytest marks with E: of the last exception."""
    blocks: list[list[str]] = [[]]
    for line in (element.text or "").split("\n"):
        if line.startswith("E "):
            blocks[-1].append(line[1:].strip())
        elif blocks[-1]:
            blocks.append([])
    marked = [block for block in blocks if block]
    return "\n".join(marked[-1]) if marked else element.get("message", "")


def folder_of_tests(path: Path) -> Path:
    """Returns the folder ``tests_pytorch`` of a checkout, or of its folder ``tests``.

    Raises:
        ValueError: There is none.
    """
    for folder in (path / "tests" / "tests_pytorch", path / "tests_pytorch"):
        if folder.is_dir():
            return folder.resolve()
    raise ValueError(
        f"{path} has neither tests/tests_pytorch nor tests_pytorch: give the path of a checkout of "
        "https://github.com/Lightning-AI/pytorch-lightning at the tag of the installed version"
    )


def selected_tests(folder: Path, names: Sequence[str]) -> list[str]:
    """Returns the paths that pytest runs: all tests, or those that ``--tests`` names.

    Args:
        folder: The folder ``tests_pytorch``.
        names: Files, folders or tests (``FILE::TEST``), relative to the checkout, to ``tests`` or
            to ``tests_pytorch``.

    Raises:
        ValueError: One of them does not exist.
    """
    return [_existing(folder, name) for name in names] or [str(folder)]


def _existing(folder: Path, name: str) -> str:
    file, colons, test = name.partition("::")
    for root in (folder.parents[1], folder.parent, folder):
        if (root / file).exists():
            return f"{root / file}{colons}{test}"
    raise ValueError(f"--tests {name} does not exist in {folder}: name a file or folder of it")


def require_installed() -> None:
    """Checks that Lightning finds the suite of the environment variable.

    Raises:
        ValueError: The package is not installed.
    """
    if ENTRY_POINT not in [point.value for point in metadata.entry_points(group=GROUP)]:
        raise ValueError(
            f"lit-stability is not installed in {sys.prefix}, so {VARIABLE}=1 adds nothing to a "
            "Trainer: run pip install -e . first"
        )


def run_tests(folder: Path, tests: Sequence[str], value: str) -> dict[str, Outcome]:
    """Runs the tests in a process of their own.

    Args:
        folder: The folder ``tests_pytorch``, in which pytest runs.
        tests: Paths for pytest.
        value: Value of ``LIT_STABILITY_AUTO``.

    Raises:
        ValueError: pytest wrote no report, or found no test.
    """
    package = str(Path(lit_stability.__file__).parents[1])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", f"--basetemp={temporary}/tests"]
        # An error in Lightning's configuration, and a newer torch gives one in each fit.
        command += ["-W", "default::FutureWarning"]
        finished = subprocess.run(
            [*command, f"--junitxml={report}", *tests],
            cwd=folder,
            env={**os.environ, VARIABLE: value, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
        found = outcomes_of(report) if report.exists() else {}
    if finished.returncode not in (0, 1) or not found:
        raise ValueError(_cannot_run(folder, tests, finished))
    return found


def _cannot_run(
    folder: Path, tests: Sequence[str], finished: subprocess.CompletedProcess[str]
) -> str:
    last = "\n".join((finished.stdout + finished.stderr).strip().split("\n")[-20:])
    return (
        f"pytest cannot run {' '.join(tests)} (exit code {finished.returncode}): run "
        f"`cd {folder} && {sys.executable} -m pytest --collect-only` and install what it names. "
        f"Its last lines:\n{last}"
    )


def require_passed(bare: dict[str, Outcome], folder: Path) -> dict[str, Outcome]:
    """Returns the outcomes without the suite if a test passes.

    Raises:
        ValueError: None passes; a comparison with the suite would be empty.
    """
    if not any(outcome.status == PASSED for outcome in bare.values()):
        test, outcome = next(iter(bare.items()))
        raise ValueError(
            f"none of {len(bare)} tests of {folder} passes without the suite: run them with pytest "
            f"until they do. The first, {test}: {outcome.message}"
        )
    return bare


def tables_of(
    bare: Mapping[str, Outcome], with_suite: Mapping[str, Outcome], found: Sequence[NewFailure]
) -> list[Table]:
    """Creates the table of the numbers, and those of the real and of the expected failures."""
    rows = [
        ["bare", *_counts(bare), "", ""],
        ["with the suite", *_counts(with_suite), *(str(_tests(found, e)) for e in (False, True))],
    ]
    columns = ["run", "passed", "failed", "skipped", "new failures, real", "expected"]
    failures = [
        Table(
            title, ["tests", "message", "first test"], [_row(f) for f in found if f.expected == e]
        )
        for e, title in (
            (False, "real: exceptions and other values"),
            (True, "expected: counts and lists of what a suite adds"),
        )
    ]
    return [Table("Lightning's tests", columns, rows), *failures]


def _counts(outcomes: Mapping[str, Outcome]) -> list[str]:
    statuses = [outcome.status for outcome in outcomes.values()]
    failed = statuses.count("failed") + statuses.count("error")
    return [str(n) for n in (statuses.count(PASSED), failed, statuses.count(SKIPPED))]


def _tests(found: Iterable[NewFailure], expected: bool) -> int:
    return sum(len(failure.tests) for failure in found if failure.expected == expected)


def _row(failure: NewFailure) -> list[str]:
    message = failure.message if len(failure.message) <= 160 else f"{failure.message[:160]}..."
    cells = [str(len(failure.tests)), message, failure.tests[0]]
    return [cell.replace("|", "\\|") for cell in cells]


def options() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path, help="checkout of Lightning, or its folder tests")
    parser.add_argument("--tests", nargs="+", default=[], help="default: all of tests_pytorch")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for JSON and table")
    return parser


def main() -> None:
    """Runs the tests twice and writes the files."""
    parser = options()
    args = parser.parse_args()
    try:
        require_installed()
        folder = folder_of_tests(args.path)
        tests = selected_tests(folder, args.tests)
        bare = require_passed(run_tests(folder, tests, "0"), folder)
        with_suite = run_tests(folder, tests, "1")
    except ValueError as error:
        parser.error(str(error))
    found = new_failures(bare, with_suite)
    figures = {"bare": bare, "with_suite": with_suite, "new_failures": found}
    save("lightning_tests", args.out, figures, tables_of(bare, with_suite, found))
    if real := _tests(found, expected=False):
        sys.exit(f"{real} tests pass bare and fail with the suite, not because they count or list")


if __name__ == "__main__":
    main()
