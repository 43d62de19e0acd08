"""Checks the detectors, the Trainer and the optimizers that a `GradientMonitor` is given.

May import Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.nn.parameter import is_lazy

from lit_stability.detectors import Detector, LayerBounds, default_detectors
from lit_stability.lightning_choice import mixed_packages
from lit_stability.lightning_package import Callback, LightningModule, Trainer
from lit_stability.trainer_internals import adapter_of


def asked_detectors(
    detectors: Sequence[Detector] | None,
    bounds: Mapping[str, float | tuple[float, float]] | None,
) -> list[Detector]:
    """Returns the detectors to ask, in order.

    Args:
        detectors: as the user gave them, None for the default set.
        bounds: of `LayerBounds`, which come last; None or empty for none.

    Raises:
        ValueError: if one is no detector object, but a name or a class.
    """
    asked = default_detectors() if detectors is None else list(detectors)
    for each in asked:
        if isinstance(each, type) or not isinstance(each, Detector):
            raise ValueError(
                f"detectors must be objects with check, update, state_dict and load_state_dict, "
                f"got {each!r}; write detectors=[*default_detectors(), LayerBounds({{...}})], all "
                "of lit_stability.detectors"
            )
    return [*asked, LayerBounds(bounds)] if bounds else asked


def require_package(trainer: Trainer, callback: Callback) -> None:
    """Refuses a Trainer of the package of Lightning that this process does not use.

    Args:
        trainer: as it calls ``setup``.
        callback: that was given to it.

    Raises:
        ValueError: with the variable to set.
    """
    if reason := mixed_packages(type(trainer)):
        raise ValueError(f"{type(callback).__name__} was given to a Trainer of {reason}")


def why_unwatchable(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Returns why a fit that Lightning can run cannot be monitored, and what to do; None if it can.

    Args:
        trainer: at the start of its fit.
        pl_module: the module in training.
    """
    # Without an optimizer Lightning uses a mock, which has no parameter groups.
    if all(not optimizer.param_groups for optimizer in trainer.optimizers):
        return f"configure_optimizers of {type(pl_module).__name__} returned no optimizer"
    for name, parameter in pl_module.named_parameters():
        if is_lazy(parameter):
            return (
                f"{name} has no shape yet; run a batch through the lazy modules before the fit, or "
                "let the sanity check of the validation do it"
            )
    own = {id(parameter) for _, parameter in adapter_of(trainer).named_parameters(pl_module)}
    for index, optimizer in enumerate(trainer.optimizers):
        if own.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
            return (
                f"optimizer {index} ({type(optimizer).__name__}) holds no parameter of "
                f"{type(pl_module).__name__}; register what it trains as parameters of the module"
            )
    return None


def require_bounded_layers(
    trainer: Trainer, pl_module: LightningModule, detectors: Sequence[Detector]
) -> None:
    """Refuses bounds on layers that do not exist.

    Args:
        trainer: at the start of its fit.
        pl_module: the module in training.
        detectors: those that are asked.

    Raises:
        ValueError: naming the layers that there are.
    """
    names = [name for name, _ in adapter_of(trainer).named_parameters(pl_module)]
    for each in detectors:
        if isinstance(each, LayerBounds):
            each.require_fit(names)
