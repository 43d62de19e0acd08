"""Small fits with one NaN batch for `tests/test_console.py`, which renders what they print.

Run as a program: arguments are a folder and ``BAR:COLUMNS`` of each fit. Every fit is preceded by a
record separator. A handler as a user may install writes what is logged to ``FOLDER/log.txt``.
"""

import fcntl
import logging
import os
import struct
import sys
import termios
from pathlib import Path

from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lit_stability import stability_callbacks
from lit_stability.faults import FaultInjector, NanLoss
from tests.conftest import Regression, fit, regression_data

BARS = {"rich": RichProgressBar, "tqdm": TQDMProgressBar}
SEPARATOR = "\x1e"


class WithMetrics(Regression):
    """Shows metrics, for which the bar of rich takes several rows: it moves the cursor up them."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for name in ("first", "second", "third"):
            self.log(f"a_metric_with_a_long_name/{name}", loss, prog_bar=True)
        return loss


def set_columns(columns):
    """Sets the width of the terminal that is the standard output, if it is one."""
    if os.isatty(1):
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))


def run(folder, bar, columns):
    """Trains 30 steps, of which one is bad."""
    set_columns(columns)
    sys.stdout.write(SEPARATOR)
    sys.stdout.flush()
    bars = [BARS[bar]()] if bar in BARS else []
    callbacks = [FaultInjector([NanLoss(step=12)]), *stability_callbacks(), *bars]
    options = {"max_steps": 30, "enable_progress_bar": bool(bars)}
    fit(folder / f"{bar}{columns}", callbacks, WithMetrics, regression_data(15), **options)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    logging.getLogger("lightning.pytorch.lit_stability").setLevel(logging.INFO)
    handler = logging.FileHandler(folder / "log.txt")
    handler.setFormatter(logging.Formatter("%(message)s\x1f"))
    logging.getLogger("lightning.pytorch").addHandler(handler)
    for each in sys.argv[2:]:
        name, width = each.split(":")
        handler.stream.write(SEPARATOR)
        run(folder, name, int(width))
