"""The scale of token embeddings against that of the positions added to them.

Which tensors are added is known to the model alone: it declares them in a `PositionProbe`, or names
its position table so that it can be told (``pos``, ``wpe``) beside another embedding of the same
width in the same module. May import torch; knows no Lightning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lit_stability.checks.finding import Finding
from lit_stability.checks.preflight.report import NotApplicableError

LOW, HIGH = 0.2, 5.0
"""Within a factor of five both can be read from the sum. Embeddings drawn with 1/sqrt(width) and
left unscaled beside sines (rms 0.71) are at sqrt(2 / width), beyond it from a width of 50 on; the
usual pairs (both drawn with 0.02; both of rms 1) are at 1 to 2."""
_POSITION = re.compile(r"(^|_)(pos|posemb|positions?|positional|wpe)(_|$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class PositionProbe:
    """What is added at the bottom of a model.

    Args:
        name: such as "source embedding".
        tokens: gives the embedded tokens as they are added, scaled; shape (..., width).
        positions: gives what is added to them.
    """

    name: str
    tokens: Callable[[nn.Module], Tensor]
    positions: Callable[[nn.Module], Tensor]


def check_positions(model: nn.Module, probes: Sequence[PositionProbe] = ()) -> list[Finding]:
    """Compare the rms of embedded tokens with that of their positions.

    Args:
        model: read only.
        probes: declared by the model; without any, tables told by their names are compared.

    Raises:
        NotApplicableError: neither a probe is declared nor a table of positions found.
    """
    pairs = [(p.name, p.tokens(model), p.positions(model)) for p in probes] or list(_by_name(model))
    if not pairs:
        raise NotApplicableError("no PositionProbe is declared, and no table is named as positions")
    findings = []
    for name, tokens, positions in pairs:
        a, b = _rms(tokens), _rms(positions)
        if b == 0.0 or LOW <= a / b <= HIGH:  # a learnt table may begin at 0
            continue
        drowned, by = ("tokens", "positions") if a < b else ("positions", "tokens")
        findings.append(
            Finding(
                check="positions",
                severity="warning",
                what=f"embedded tokens have an rms of {a:.3g}, their positions {b:.3g}: the "
                f"{drowned} are drowned by a factor of {max(a, b) / max(min(a, b), 1e-30):.3g}",
                where=(name,),
                why=f"after the first norm the {drowned} are noise beside the {by}",
                remedy="scale the embeddings by sqrt(width) where they are drawn with "
                "1/sqrt(width), "
                "and not where they are drawn with 1; see that the factor is applied once",
            )
        )
    return findings


def _by_name(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
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
