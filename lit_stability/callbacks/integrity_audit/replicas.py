"""Compares the checksums of ranks that hold the same tensors. Imports neither torch nor Lightning.

All ranks get the same result, from the same reports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lit_stability.callbacks.integrity_audit.finding import Finding, RankReport

GRADIENT = "gradient of "
"""What the names of averaged gradients begin with."""


class ReplicaCheck:
    """Finds ranks whose tensors differ from those of the other replicas.

    A tensor is judged after it was equal on all replicas once: some layers differ between ranks on
    purpose.

    >>> check = ReplicaCheck()
    >>> reports = [RankReport("a", True, checksums={"w": 5}) for _ in range(3)]
    >>> check.findings(reports, step=3)
    {}
    >>> reports[2].checksums["w"] = 9
    >>> check.findings(reports, step=4)[2][0].text
    'w differs from that of ranks 0, 1'
    """

    def __init__(self) -> None:
        self._equal: set[tuple[str, str]] = set()
        self._apart: set[tuple[str, str]] = set()
        """Tensors that differed before they were ever equal."""

    def findings(self, reports: Sequence[RankReport], step: int) -> dict[int, list[Finding]]:
        """Returns what is wrong, by rank; where no majority decides, of all ranks of the group.

        Args:
            reports: of all ranks, in their order.
            step: that is audited.
        """
        groups: dict[str, list[int]] = {}
        for rank, report in enumerate(reports):
            groups.setdefault(report.group, []).append(rank)
        found: dict[int, list[Finding]] = {}
        for group, ranks in groups.items():
            for name in reports[ranks[0]].checksums if len(ranks) > 1 else ():
                sums = {r: reports[r].checksums.get(name) for r in ranks}
                for rank, text in self._judge((group, name), sums).items():
                    damaged = not name.startswith(GRADIENT)
                    since = max(0, step - 1) if damaged else step
                    found.setdefault(rank, []).append(Finding(name, text, since, state=damaged))
        return found

    def _judge(self, key: tuple[str, str], sums: Mapping[int, int | None]) -> Mapping[int, str]:
        name = key[1]
        if len(set(sums.values())) == 1:
            self._equal.add(key)
            return {}
        if key not in self._equal or key in self._apart:
            self._apart.add(key)
            return {}
        ((usual, count),) = Counter(sums.values()).most_common(1)
        if 2 * count <= len(sums):
            text = f"{name} differs between ranks {_list(sums)}, and no majority decides"
            return dict.fromkeys(sums, text)
        others = _list(rank for rank, total in sums.items() if total == usual)
        text = f"{name} differs from that of ranks {others}"
        return {rank: text for rank, total in sums.items() if total != usual}


def _list(ranks: Iterable[int]) -> str:
    shown = [str(rank) for rank in ranks]
    return ", ".join([*shown[:8], "..."] if len(shown) > 8 else shown)
