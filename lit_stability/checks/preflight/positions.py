"""Compares the scale of token embeddings with that of the position embeddings added to them.

A model declares the tensors in a `PositionProbe`. Without a probe, position tables are recognised
by name (``pos``, ``wpe``) next to another embedding of the same width in the same module. May
import torch; does not import Lightning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.report import NotApplicableError

LOW, HIGH = 0.2, 5.0
"""Accepted ratio of the two rms: within a factor of five the sum represents both. Embeddings with
standard deviation 1/sqrt(width), not scaled, next to sines (rms 0.71) have a ratio of
sqrt(2 / width), outside of it from a width of 50 on; usual pairs (both 0.02; both rms 1) have 1 to
2."""
_POSITION = re.compile(r"(^|_)(pos|posemb|positions?|positional|wpe)(_|$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class PositionProbe:
    """Declares the token embeddings of a model, and the position embeddings added to them.

    Args:
        name: Name for the report, such as "source embedding".
        tokens: Returns the token embeddings as they are added, after scaling; shape (..., width).
        positions: Returns the position embeddings that are added.
    """

    name: str
    tokens: Callable[[nn.Module], Tensor]
    positions: Callable[[nn.Module], Tensor]


def check_positions(model: nn.Module, probes: Sequence[PositionProbe] = ()) -> list[Finding]:
    """Compares the rms of token embeddings with that of their position embeddings.

    Args:
        model: The model; it is not changed.
        probes: Declared by the model; without probes, tables recognised by name are compared.

    Raises:
        NotApplicableError: If there is no probe and no table is recognised.
    """
    pairs = [(p.name, p.tokens(model), p.positions(model)) for p in probes] or list(_by_name(model))
    if not pairs:
        raise NotApplicableError("no PositionProbe is declared, and no position table is found")
    findings = []
    for name, tokens, positions in pairs:
        a, b = _rms(tokens), _rms(positions)
        if b == 0.0 or LOW <= a / b <= HIGH:  # a learnt table may start at 0
            continue
        weak, strong = ("tokens", "positions") if a < b else ("positions", "tokens")
        findings.append(
            Finding(
                check="positions",
                severity="warning",
                what=f"embedded tokens have an rms of {a:.3g}, their positions {b:.3g}: the "
                f"{weak} are drowned by a factor of {max(a, b) / max(min(a, b), 1e-30):.3g}",
                where=(name,),
                why=f"after the first norm the {weak} are noise compared to the {strong}",
                remedy="scale embeddings with standard deviation 1/sqrt(width) by sqrt(width), but "
                "not those with standard deviation 1; apply the factor only once",
            )
        )
    return findings


def _by_name(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields name, token table and position table of each module that has both."""
    for name, parent in model.named_modules():
        tables = {n: m.weight for n, m in parent.named_children() if isinstance(m, nn.Embedding)}
        positions = {n: w for n, w in tables.items() if _POSITION.search(n)}
        own = [*parent.named_parameters(recurse=False), *parent.named_buffers(recurse=False)]
        positions |= {n: w for n, w in own if _POSITION.search(n) and w.is_floating_point()}
        tokens = [n for n in tables if n not in positions]
        for n, table in positions.items():
            if tokens and table.ndim >= 2 and table.shape[-1] == tables[tokens[0]].shape[-1]:
                yield ".".join(filter(None, (name, n))), tables[tokens[0]], table


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().float().square().mean().sqrt())
