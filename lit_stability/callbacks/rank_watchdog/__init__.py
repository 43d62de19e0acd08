"""`RankWatchdog`: ends a fit on all ranks when one of them keeps the others waiting."""

from lit_stability.callbacks.rank_watchdog.callback import RankWatchdog

__all__ = ["RankWatchdog"]
