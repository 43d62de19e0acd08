"""Which adapter stands for which class of strategy."""

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from lit_stability.lightning_choice import suite_logger
from lit_stability.lightning_package import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    Trainer,
)
from lit_stability.trainer_internals.strategies.adapter import Sharing, StrategyAdapter
from lit_stability.trainer_internals.strategies.ddp import DDPAdapter
from lit_stability.trainer_internals.strategies.deepspeed import DeepSpeedAdapter
from lit_stability.trainer_internals.strategies.fsdp1 import FSDP1Adapter
from lit_stability.trainer_internals.strategies.fsdp2 import FSDP2Adapter
from lit_stability.trainer_internals.strategies.unsupported import UnsupportedAdapter

log = suite_logger()

ENTRY_POINTS = "lit_stability.strategies"
"""Group of entry points: functions that call `register_strategy`, called when they may matter."""

_ADAPTERS: dict[str, type[StrategyAdapter]] = {
    "single_device": StrategyAdapter,
    "ddp": DDPAdapter,
    "deepspeed": DeepSpeedAdapter,
    "fsdp1": FSDP1Adapter,
    "fsdp2": FSDP2Adapter,
}

_LIKE: dict[type, str] = {
    SingleDeviceStrategy: "single_device",
    DDPStrategy: "ddp",
    DeepSpeedStrategy: "deepspeed",
    FSDPStrategy: "fsdp1",
    ModelParallelStrategy: "fsdp2",
}

_LIKE_BY_NAME = {
    ("ray", "RayDDPStrategy"): "ddp",
    ("ray", "RayDeepSpeedStrategy"): "deepspeed",
    ("ray", "RayFSDPStrategy"): "fsdp1",
}
"""By package and name, so that the package need not be installed."""


def register_strategy(cls: type[Strategy], *, like: str) -> None:
    """Has the suite treat a class of strategies like one that it knows.

    For a subclass that differs only in how processes start, find each other or choose devices. A
    subclass of it is not included.

    Args:
        cls: the class of the strategy.
        like: "ddp", "deepspeed", "fsdp1" (`FSDPStrategy`), "fsdp2" (`ModelParallelStrategy`) or
            "single_device".

    Raises:
        TypeError: if `cls` is not a class of strategies.
        ValueError: if `like` is none of these.

    >>> from lightning.pytorch.strategies import DDPStrategy
    >>> class OwnLauncher(DDPStrategy): ...
    >>> register_strategy(OwnLauncher, like="ddp")
    """
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise TypeError(f"cls must be a class of strategies, got {cls!r}")
    if like not in _ADAPTERS:
        raise ValueError(f"like must be one of {', '.join(_ADAPTERS)}, got {like!r}")
    _LIKE[cls] = like


def adapter_of(trainer: Trainer) -> StrategyAdapter:
    """Returns the adapter that answers for the strategy of a trainer."""
    like = _like(type(trainer.strategy))
    return UnsupportedAdapter(trainer) if like is None else _ADAPTERS[like](trainer)


def sharing(trainer: Trainer) -> Sharing:
    """Returns whether each rank holds all weights, or a shard of them."""
    return adapter_of(trainer).sharing


def _like(cls: type) -> str | None:
    if cls not in _LIKE:
        _load_entry_points()
    if cls in _LIKE:
        return _LIKE[cls]
    return _LIKE_BY_NAME.get((cls.__module__.split(".")[0], cls.__name__))


@cache
def _load_entry_points() -> None:
    """Calls what installed packages have entered, once in a process."""
    for point in entry_points(group=ENTRY_POINTS):
        _load(point)


def _load(point: EntryPoint) -> None:
    try:
        point.load()()
    except Exception as error:
        log.warning("the entry point %s = %s failed: %r", point.name, point.value, error)
