"""Strategies under which the suite must not act."""

from __future__ import annotations

from lit_stability.trainer_internals.strategies.adapter import Sharing, StrategyAdapter


class UnsupportedAdapter(StrategyAdapter):
    """Answers for a strategy that no other adapter stands for."""

    @property
    def sharing(self) -> Sharing:
        """Untried."""
        return "untried"

    @property
    def trains_own_tensors(self) -> bool:
        """Not known."""
        return False

    @property
    def why_unsupported(self) -> str:
        """The reason, by the name of the strategy."""
        if "XLA" in type(self._strategy).__name__:
            return "XLA records operations lazily, and reading values on every step prevents that"
        return "this strategy was never tested with the suite"
