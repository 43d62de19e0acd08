"""Runs a selection of the tests with other versions of Python, torch and Lightning.

    python -m benchmarks.compat [--only py3.12-torch2.8] [--failed] [--folder FOLDER] [--keep]

For each environment: makes it, installs into it, runs the tests in one process, writes its row of
the table in ``docs/compatibility.md``, and removes it. One environment is there at a time, because
most builds of torch need about 7 GB on disk and a download of 3 GB; one takes about ten minutes of
the processor. An interpreter that is not installed is skipped. ``--failed`` runs only the files
whose tests failed the last time, and corrects the row. The exit code is 1 if a test fails. Run it
on an idle machine: it is no part of CI.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path

from benchmarks.lightning_tests import Outcome, outcomes_of
from benchmarks.results import FOLDER, Table

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "compatibility.md"
RECORD = FOLDER / "compat.json"
START, END = "<!-- table -->", "<!-- end of the table -->"

SELECTION = (
    "lit_stability",  # the examples in docstrings
    "tests/callbacks/test_battery.py",
    "tests/callbacks/test_nonfinite_locator.py",
    "tests/callbacks/test_precision_*.py",
    "tests/cli/test_fit.py",
    "tests/diagnosis",
    "tests/measurement",
    "tests/tensorboard/test_plugin.py",
    "tests/tensorboard/test_server.py",
    "tests/test_compat.py",
    "tests/test_exact_recovery.py",
    "tests/test_invariants.py",
    "tests/test_precision_ranks.py",
    "tests/test_ranks.py",
    "tests/test_written_by_0_1_0.py",
    "tests/trainer_internals",
    "tests/training_state",
)
"""What a version may change: each callback in a fit, exact recovery, ranks, private names.

Paths below the project, or globs of such paths.
"""

LISTS = Path(__file__).parent / "environments"
"""What is installed, and the versions for interpreters on which ``constraints.txt`` has none."""


@dataclass(frozen=True)
class Environment:
    """One combination of versions."""

    python: str
    """Minor version of the interpreter, such as "3.12"."""
    torch: str
    lightning: str = "2.6.6"

    @property
    def name(self) -> str:
        """Name on the command line and in the record.

        >>> Environment("3.12", "2.8.0").name
        'py3.12-torch2.8.0-lightning2.6.6'
        """
        return f"py{self.python}-torch{self.torch}-lightning{self.lightning}"


ENVIRONMENTS = (
    Environment("3.12", "2.8.0"),
    Environment("3.10", "2.9.1", lightning="2.6.0"),
    Environment("3.13", "2.9.1"),
    Environment("3.12", "2.11.0"),
    Environment("3.11", "2.13.0"),
    Environment("3.11", "2.14.1"),
    Environment("3.13", "2.15.0"),
)


@dataclass(frozen=True)
class Row:
    """Result of one environment."""

    python: str
    torch: str
    lightning: str
    passed: int
    failed: int
    skipped: int
    minutes: float
    """Duration of the tests, without the installation."""
    date: str
    failures: list[str] = field(default_factory=list)
    """Names of the tests that failed."""


def chosen(only: str | None) -> list[Environment]:
    """Returns the environments whose name starts with ``only``; all for None.

    Raises:
        ValueError: No name starts so.
    """
    found = [each for each in ENVIRONMENTS if each.name.startswith(only or "")]
    if not found:
        names = "\n  ".join(each.name for each in ENVIRONMENTS)
        raise ValueError(
            f"--only {only}: no environment has a name that starts so; there are\n  {names}"
        )
    return found


def interpreter(version: str) -> str | None:
    """Returns the path of an interpreter that runs, or None if there is none.

    Args:
        version: Minor version, such as "3.12".
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for path in (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))):
        if path is not None:
            asked = subprocess.run([path, "--version"], capture_output=True, text=True)
            if asked.returncode == 0 and asked.stdout.startswith(f"Python {version}."):
                return str(path)
    return None


def pins(python: str) -> list[str]:
    """Returns the lines of ``constraints.txt`` for an interpreter, without torch and Lightning.

    Args:
        python: Minor version. ``environments/python3.10.txt`` has versions that replace others.
    """
    replaced = LISTS / f"python{python}.txt"
    own = _versions(replaced) if replaced.exists() else {}
    every = {**_versions(ROOT / "constraints.txt"), **own}
    for name in ("torch", "lightning", "pytorch-lightning"):
        del every[name]
    return [f"{name}=={version}" for name, version in every.items()]


def _versions(path: Path) -> dict[str, str]:
    """Returns the versions in a file of constraints, by lower-case name."""
    lines = path.read_text(encoding="utf8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower(): version for name, version in pairs}


def install(environment: Environment, python: str, folder: Path) -> None:
    """Makes a virtual environment in a folder; one that is complete is kept as it is.

    Raises:
        subprocess.CalledProcessError: pip failed; its output says why.
    """
    if (folder / "complete").exists():
        return
    subprocess.run([python, "-m", "venv", "--clear", "--upgrade-deps", folder], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins(environment.python)) + "\n", encoding="utf8")
    command = [folder / "bin" / "pip", "install", "-q", "--only-binary", ":all:", "-c", constraints]
    command += ["-r", LISTS / "requirements.txt", f"torch=={environment.torch}"]
    subprocess.run([*command, f"lightning=={environment.lightning}"], check=True)
    (folder / "complete").touch()


def selected() -> list[str]:
    """Returns the paths of the selected tests.

    Raises:
        ValueError: A path of the selection does not exist.
    """
    paths = []
    for pattern in SELECTION:
        found = sorted(str(path) for path in ROOT.glob(pattern))
        if not found:
            raise ValueError(f"no test has the path {pattern}: correct SELECTION")
        paths += found
    return paths


def run_tests(python: Path, tests: Sequence[str], report: Path) -> dict[str, Outcome]:
    """Runs the tests in a process of their own and returns their outcomes.

    Raises:
        ValueError: pytest wrote no report.
    """
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-m", ""]  # the long ones too
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # The launcher of this environment comes first for tests that start it.
    variables["PATH"] = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
    subprocess.run([*command, *tests], cwd=ROOT, env={**os.environ, **variables})
    if not report.exists():
        raise ValueError(f"{python} -m pytest wrote no report: its output says why")
    return outcomes_of(report)


def row_of(environment: Environment, outcomes: dict[str, Outcome], seconds: float) -> Row:
    """Counts the outcomes of an environment.

    >>> row_of(Environment("3.12", "2.8.0"), {"a": Outcome("passed")}, 90.0).minutes
    1.5
    """
    statuses = [outcome.status for outcome in outcomes.values()]
    failures = [t for t, each in outcomes.items() if each.status in ("failed", "error")]
    return Row(
        environment.python,
        environment.torch,
        environment.lightning,
        passed=statuses.count("passed"),
        failed=len(failures),
        skipped=statuses.count("skipped"),
        minutes=round(seconds / 60, 1),
        date=date.today().isoformat(),
        failures=failures,
    )


def files_of(failures: Iterable[str]) -> list[str]:
    """Returns the files of failed tests, relative to the project.

    >>> files_of(["tests.test_ranks::test_a", "tests.test_ranks::test_b"])
    ['tests/test_ranks.py']
    """
    modules = {name.partition("::")[0] for name in failures}
    return sorted(f"{module.replace('.', '/')}.py" for module in modules)


def corrected(row: Row, outcomes: dict[str, Outcome]) -> Row:
    """Returns a row in which the tests that failed have their new outcomes."""
    still = [name for name in row.failures if outcomes[name].status in ("failed", "error")]
    passed = [name for name in row.failures if outcomes[name].status == "passed"]
    return replace(
        row,
        passed=row.passed + len(passed),
        failed=len(still),
        skipped=row.skipped + len(row.failures) - len(still) - len(passed),
        date=date.today().isoformat(),
        failures=still,
    )


def measure(environment: Environment, python: str, folder: Path, earlier: Row | None) -> Row:
    """Installs an environment, runs tests in it, and returns its row.

    Args:
        environment: The versions.
        python: Path of the interpreter.
        folder: Folder of the environment.
        earlier: A row whose failed tests alone are run again; None for the whole selection.
    """
    install(environment, python, folder)
    tests = selected() if earlier is None else files_of(earlier.failures)
    with tempfile.TemporaryDirectory() as temporary:
        started = time.monotonic()
        outcomes = run_tests(folder / "bin" / "python", tests, Path(temporary) / "report.xml")
        seconds = time.monotonic() - started
    if earlier is None:
        return row_of(environment, outcomes, seconds)
    return corrected(earlier, outcomes)


def recorded(path: Path) -> dict[str, Row]:
    """Loads the rows of earlier runs, by name of the environment; none without the file."""
    if not path.exists():
        return {}
    return {name: Row(**row) for name, row in json.loads(path.read_text(encoding="utf8")).items()}


def record(path: Path, name: str, row: Row) -> dict[str, Row]:
    """Adds a row to the file, in place of an earlier one of its environment, and returns all."""
    rows = {**recorded(path), name: row}
    content = {each: asdict(rows[each]) for each in sorted(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")
    return rows


def table(rows: Iterable[Row]) -> str:
    """Returns the rows as a table in Markdown, the oldest torch first."""
    columns = ["Python", "torch", "lightning", "passed", "failed", "skipped", "minutes", "date"]
    ordered = sorted(rows, key=lambda row: (_numbers(row.torch), _numbers(row.python)))
    cells = [
        [
            r.python,
            r.torch,
            r.lightning,
            *map(str, (r.passed, r.failed, r.skipped, r.minutes)),
            r.date,
        ]
        for r in ordered
    ]
    return Table("", columns, cells).markdown()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def write_document(path: Path, rows: Iterable[Row]) -> None:
    """Replaces the table of a document, between its two marks.

    Raises:
        ValueError: The document lacks a mark.
    """
    before, start, rest = path.read_text(encoding="utf8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{path} has no {START} followed by {END}: restore both lines")
    path.write_text(f"{before}{START}\n{table(rows)}\n{END}{after}", encoding="utf8")


def run(environment: Environment, parent: Path, keep: bool, failed: bool) -> Row | None:
    """Measures one environment and writes its row; returns None if there is nothing to run."""
    earlier = recorded(RECORD).get(environment.name) if failed else None
    if failed and (earlier is None or not earlier.failures):
        print(f"{environment.name}: skipped, no failed test is recorded", flush=True)
        return None
    python = interpreter(environment.python)
    if python is None:
        print(f"{environment.name}: skipped, there is no python{environment.python}", flush=True)
        return None
    folder = parent / environment.name
    try:
        row = measure(environment, python, folder, earlier)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    write_document(DOCUMENT, record(RECORD, environment.name, row).values())
    counts = f"{row.passed} passed, {row.failed} failed, {row.skipped} skipped"
    print(f"{environment.name}: {counts} in {row.minutes} minutes", flush=True)
    return row


def options() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--only", help="start of a name: " + ", ".join(e.name for e in ENVIRONMENTS)
    )
    parser.add_argument(
        "--folder", type=Path, help="where environments are made; default: temporary"
    )
    parser.add_argument("--keep", action="store_true", help="do not remove them: 7 GB each")
    parser.add_argument("--failed", action="store_true", help="only what failed the last time")
    return parser


def main() -> None:
    """Runs the chosen environments one after the other."""
    parser = options()
    args = parser.parse_args()
    try:
        environments = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="compat-") as temporary:
        parent = args.folder or Path(temporary)
        rows = [run(each, parent, args.keep, args.failed) for each in environments]
    failures = [name for row in rows if row is not None for name in row.failures]
    if failures:
        sys.exit("failed:\n  " + "\n  ".join(failures))


if __name__ == "__main__":
    main()
