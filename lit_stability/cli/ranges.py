"""The command `lit-stability ranges`: judges whether fp16 or bf16 can represent a model.

May import the configuration at module level; imports Lightning, torch and matplotlib only when it
runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lit_stability.cli.config import compose, resolve
from lit_stability.cli.targets import add_allow
from lit_stability.errors import ConfigError

if TYPE_CHECKING:
    from lit_stability.checks.precision_ranges.report import RangeReport

_MEASURING: dict[str, Any] = {
    "precision": "32-true",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "plugins": None,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "detect_anomaly": False,
    "min_epochs": None,
    "min_steps": None,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "logger": False,
    "profiler": None,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Options that replace those of the config's trainer: one device, float32, no output."""

_EXIT_CODES = """\
exit codes:
  0  the report was written
  1  the model failed; see the traceback
  2  the command line, the config or the checkpoint is invalid; nothing was measured
"""


def add_ranges(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to a parser.

    Args:
        commands: Sub-commands of the parser.
    """
    ranges = commands.add_parser(
        "ranges",
        help="measure the magnitudes in a model: can fp16 or bf16 represent them?",
        description="Run some training batches in float32 without an update, and measure the "
        "magnitudes of weights, activations and gradients. Writes ranges.json and ranges.png.",
        epilog="example:\n  lit-stability ranges -c NAME --checkpoint last\n\n" + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    ranges.add_argument(
        *("-c", "--config"), metavar="FILE", action="append", required=True, help="as for fit"
    )
    ranges.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="replace values of the files"
    )
    add_allow(ranges)
    ranges.add_argument(
        "--checkpoint",
        metavar="CKPT|last|good",
        help="weights to measure: a file, or the newest or last known good checkpoint in run_dir; "
        "by default the initial weights of the config",
    )
    ranges.add_argument(
        "--batches", metavar="N", type=int, default=4, help="training batches (default: 4)"
    )
    ranges.add_argument("--out", metavar="DIR", type=Path, help="default: run_dir/ranges")
    ranges.add_argument("--all", action="store_true", help="print every row of the table")
    ranges.set_defaults(command=run_ranges)


def run_ranges(args: argparse.Namespace) -> int:
    """Measures the model of a config, prints and writes the report; returns the exit code.

    Raises:
        ConfigError: If the config, the checkpoint or an option is invalid.
    """
    if args.batches < 1:
        raise ConfigError(f"--batches {args.batches}: must be at least 1")
    config = compose(args.config, args.overrides)
    report, title, run_dir = _measure(config, args.batches, args.checkpoint, args.allow)
    from lit_stability.checks.precision_ranges.table import format_report

    print(f"{title}\n\n{format_report(report, limit=None if args.all else 15)}")
    _write(report, title, run_dir / "ranges" if args.out is None else args.out)
    return 0


def _measure(
    config: DictConfig, batches: int, checkpoint: str | None, allow: Sequence[str]
) -> tuple[RangeReport, str, Path]:
    """Returns the report, its title, and the `run_dir` of the config."""
    from lit_stability.cli.checkpoint_weights import CheckpointWeights
    from lit_stability.cli.fit import check_options, make_model_and_data, make_trainer
    from lit_stability.cli.range_meter import RangeMeter
    from lit_stability.cli.resume import find_checkpoint

    options = check_options(resolve(config), allow)
    run_dir: Path = options["run_dir"]
    found = find_checkpoint(checkpoint, run_dir, option="checkpoint")
    model, data = make_model_and_data(options)
    meter = RangeMeter(batches)
    callbacks = [meter, *([CheckpointWeights(found)] if found else [])]
    bare = options | {"callbacks": None, "logger": None}
    trainer = make_trainer(bare, callbacks=callbacks, **_MEASURING)
    trainer.fit(model, datamodule=data)
    if meter.report is None:
        raise ConfigError("trainer: takes no training step; set trainer.max_steps=1 or more")
    return meter.report, f"{options['experiment']}, {found or 'untrained'}", run_dir


def _write(report: RangeReport, title: str, folder: Path) -> None:
    """Writes the report and its figure; existing files are renamed and kept."""
    from lit_stability.checks.precision_ranges.plot import draw_ranges
    from lit_stability.checks.precision_ranges.verdict import judge
    from lit_stability.figures import MatplotlibMissing, to_png
    from lit_stability.measurement.float_formats import BFLOAT16, FLOAT16
    from lit_stability.training_state.atomic_write import write_and_keep

    verdicts = [judge(report, judged).as_dict() for judged in (FLOAT16, BFLOAT16)]
    content = {"title": title} | report.as_dict() | {"verdicts": verdicts}
    write_and_keep(folder / "ranges.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(f"wrote {folder / 'ranges.json'}")
    try:
        picture = to_png(draw_ranges(report, title=title))
    except MatplotlibMissing as error:
        print(f"ranges.png was not written: {error}", file=sys.stderr)
        return
    write_and_keep(folder / "ranges.png", picture)
    print(f"wrote {folder / 'ranges.png'}")
