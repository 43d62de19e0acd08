"""What a search for the origin of a NaN costs, as a ratio to the forward and backward pass.

    python -m benchmarks.locate [--rounds 20]

One torch thread, a Transformer of 9.9 M parameters, 8 x 64 tokens. A plain pass and searches take
turns; reported are the median ratio to the plain pass beside it, and its quartiles. Searched are a
healthy step, which is run to its end, a NaN in the forward pass and one in the backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.byte_gpt import ByteGPT, ByteGPTConfig
from lit_stability import locate_nonfinite


def steps_of(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """The step, healthy and spoiled."""
    tokens = torch.randint(256, (8, 64))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    return {
        "healthy step": loss,
        "NaN in the loss": lambda: loss() + torch.log(model.head.bias.sum() * 0.0),
        "NaN in the gradients": lambda: loss() + (model.head.weight * 0.0).sqrt().sum(),
    }


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ByteGPT(ByteGPTConfig(width=400, layers=5))
    steps = steps_of(model)
    plain: list[float] = []
    searches: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        plain.append(seconds(lambda: steps["healthy step"]().backward()))
        for name, step in steps.items():
            searches[name].append(seconds(lambda s=step: locate_nonfinite(model, s)))
    print(f"forward and backward: {1e3 * statistics.median(plain[1:]):.0f} ms")
    for name, times in searches.items():
        ratios = [t / p for t, p in zip(times[1:], plain[1:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:24s} x{middle:.2f}  (quartiles {low:.2f} .. {high:.2f})")


if __name__ == "__main__":
    main()
