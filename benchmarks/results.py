"""Saves the figures of a benchmark, with machine and versions, and its tables.

Every benchmark writes ``NAME.json`` and ``NAME.md`` into the folder given by ``--out``, so that
every quoted figure can be traced to a file. Imports torch for its number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "torchmetrics", "tensorboard", "transformers")


@dataclass(frozen=True)
class Table:
    """A table of a report; all cells are formatted text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{len(row)} cells for {len(self.columns)} columns: {row!r}")

    def markdown(self) -> str:
        """Formats the table as GitHub Markdown, without its title.

        >>> print(Table("Cost", ["suite", "ms"], [["bare", "1.0"]]).markdown())
        | suite | ms |
        |---|---|
        | bare | 1.0 |
        """
        head, *rows = (f"| {' | '.join(cells)} |" for cells in (self.columns, *self.rows))
        return "\n".join([head, "|" + "---|" * len(self.columns), *rows])


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Computes the spread of the values; of one value, that value three times.

        >>> Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0, count=5)

        Raises:
            ValueError: There are no values.
        """
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no measurement to take the median of: run more steps or rounds")
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0], 1)
        low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(middle, low, high, len(ordered))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options ``--out`` and ``--quick``; quick results have their own default folder."""
    parser.add_argument("--out", type=Path, help=f"folder for JSON and table; default: {FOLDER}")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")


def folder_of(args: argparse.Namespace) -> Path:
    """Returns the output folder that the options select."""
    chosen: Path | None = args.out
    return chosen or (FOLDER / "quick" if args.quick else FOLDER)


def save(name: str, folder: Path, figures: Mapping[str, Any], tables: Sequence[Table] = ()) -> Path:
    """Writes a benchmark's figures and tables, and prints the tables.

    Args:
        name: Name of the benchmark and of the files, without suffix.
        folder: Output folder, created if necessary.
        figures: Measured figures, of JSON types and dataclasses; NaN and Inf become text.
        tables: Tables of the figures.

    Returns:
        Path of the JSON file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured_on = provenance()
    path = folder / f"{name}.json"
    content = {"benchmark": name, **measured_on, "figures": _to_json(figures)}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf8")
    text = "\n\n".join(f"**{t.title}**\n\n{t.markdown()}" for t in tables)
    (folder / f"{name}.md").write_text(f"{text}\n\n{_footer(measured_on)}\n", encoding="utf8")
    print(f"{text}\n\nwritten to {path}")
    return path


def load(name: str, folder: Path) -> dict[str, Any]:
    """Loads the JSON file of a benchmark.

    Raises:
        FileNotFoundError: The file is missing; the message has the command that writes it.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        command = f"python -m benchmarks.{name.replace('-', ' --parts ')}"
        raise FileNotFoundError(f"{path} does not exist: run {command} first")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
    return content


def provenance() -> dict[str, Any]:
    """Returns machine, versions, date, command and commit of this process."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _command(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(_memory() / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "load": [round(x, 2) for x in os.getloadavg()],
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def _footer(measured_on: Mapping[str, Any]) -> str:
    machine, versions = measured_on["machine"], measured_on["versions"]
    names = ", ".join(f"{n} {versions[n]}" for n in ("torch", "lightning") if n in versions)
    return (
        f"`{measured_on['command']}`, {measured_on['date'][:10]}, {machine['processor']}, "
        f"{machine['cores']} cores, {machine['threads']} thread(s), {names}."
    )


def _command() -> str:
    spec = sys.modules["__main__"].__spec__
    module = "" if spec is None else f"-m {spec.name.removesuffix('.__main__')}"
    return " ".join(["python", module or sys.argv[0], *sys.argv[1:]])


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {package: installed[package] for package in PACKAGES if package in installed}


def _commit() -> str | None:
    git = ["git", "-C", str(FOLDER.parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _to_json(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return _to_json(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): _to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
