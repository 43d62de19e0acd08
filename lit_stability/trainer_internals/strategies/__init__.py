"""What differs between ways of training: one adapter for each, and the rest of the package asks it.

An adapter stands for classes of strategies that are compared exactly: those of DeepSpeed and XLA
are subclasses of `DDPStrategy` that behave differently. `register_strategy` adds a class.
"""

from lit_stability.trainer_internals.strategies.adapter import StrategyAdapter
from lit_stability.trainer_internals.strategies.registry import (
    adapter_of,
    register_strategy,
    sharing,
)

__all__ = ["StrategyAdapter", "adapter_of", "register_strategy", "sharing"]
