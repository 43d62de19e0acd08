"""The hooks that this package adds to Lightning's: their base class, and how they are called.

May import Lightning.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from lit_stability.lightning_choice import LIGHTNING_ROOTS, suite_logger
from lit_stability.lightning_package import Callback, LightningModule, Trainer
from lit_stability.trainer_internals import callbacks_of

if TYPE_CHECKING:
    from lit_stability.detectors import Anomaly
    from lit_stability.incidents import Incident
    from lit_stability.measurement.norms import DeviceReadings
    from lit_stability.measurement.step_stats import ProbeReading, StepStats

log = suite_logger()


class StabilityCallback(Callback):
    """Base class with every hook of this package as a method that does nothing.

    Derive from it to act on incidents, to measure something once per step, or to add state that a
    rollback restores. The hooks are called by `GradientMonitor`, `AutoRollback` and the other
    callbacks of the suite, in the order of ``trainer.callbacks``, and last on the LightningModule.
    A callback of another base class, or a LightningModule, that defines one of these methods is
    called as well; a method whose name is close to a hook, such as ``on_incidents``, is reported
    when the fit starts.

    Hooks that run "on every rank" run on all ranks for the same step, so they may use collectives.
    A hook must not raise for something that should not end the run.

    >>> class Pager(StabilityCallback):
    ...     '''Prints a line for every incident, and changes nothing.'''
    ...
    ...     def on_incident_closed(self, trainer, pl_module, incident):
    ...         print(f"{incident.first.kind}: {incident.outcome}")
    >>> implements(Pager(), "on_incident_closed"), implements(Pager(), "on_incident")
    (True, False)
    """

    def __getstate__(self) -> dict[str, Any]:
        """Returns the attributes for a pickle or a copy, without what belongs to a fit.

        A module may keep its callbacks among its hyperparameters, which every checkpoint holds.
        """
        own = {**vars(self), **self._outside_a_fit()}
        # Lightning adds methods of the module to every callback, and would save the module twice.
        left_out = ("log", "log_dict", *_hidden_in(self))
        return {key: value for key, value in own.items() if key not in left_out}

    def _outside_a_fit(self) -> dict[str, Any]:
        """Returns the attributes that hold the fit in progress, with their values outside of it."""
        return {}

    ignores_skipped_steps: bool = False
    """Whether the state of `rewindable_state` never changes in a step that is then skipped. If
    False, a skipped step is undone by restoring a snapshot, which costs more."""

    @property
    def needs_recorded_step(self) -> bool:
        """Returns whether ``incident.recorded_step`` is wanted, to run the step again in isolation.

        The batches of each step are kept until the step ends if any callback needs them.
        """
        return False

    @property
    def changes_precision(self) -> bool:
        """Returns whether this callback decides the precision; others then do not change it."""
        return False

    @property
    def can_roll_back(self) -> bool | None:
        """Returns whether there is a good state to go back to; None if none is ever kept."""
        return None

    def startup_text(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Returns in a few words what this callback does in the fit; empty for nothing to say.

        Called on rank 0 only, before the first batch; the texts of all callbacks are logged in one
        line. It must not use collectives.
        """
        return ""

    def on_step_measured(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Called once per optimizer step, after it was measured and before detectors see it.

        Called on every rank, for healthy and for bad steps. It must not change gradients or
        weights; remembering numbers, or preparing a clip, is what it is for.

        Args:
            trainer: the Trainer.
            pl_module: the module in training.
            stats: the measurement; the same numbers on every rank.
        """

    def probe_readings(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> list[ProbeReading] | DeviceReadings | None:
        """Called before each step is measured: returns what this callback measured itself.

        Called on every rank, and must return None on all of them or on none.

        Returns:
            The readings, or numbers on the device that are copied to the host together with the
            other statistics of the step (`lit_stability.measurement.norms.DeviceReadings`); None if
            there are none for this step.
        """
        return None

    def on_healthy_step(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Called for a step that no detector objects to, before its update.

        Called on every rank. Under DDP another rank may still object; then `on_incident` follows
        for the same step. It may clip the gradients.
        """

    def on_incident(self, trainer: Trainer, pl_module: LightningModule, incident: Incident) -> None:
        """Called when a detector objects to a step, before its update.

        Called on every rank, again each time that the trouble recurs. It may set all gradients of
        the optimizer to None, which skips the update bit for bit, and resolve the incident by
        ``incident.resolve(response)``; callbacks after it see ``incident.resolved``.

        Hooks that come after a skipped step, clipping among them, see gradients of 0, and a
        gradient norm that is logged there is 0; the optimizer sees none.
        """

    def on_local_anomaly(
        self, trainer: Trainer, pl_module: LightningModule, anomaly: Anomaly
    ) -> None:
        """Called when this rank alone objects to a step, before its update (DDP).

        Whether the other ranks object is known at the end of the batch; `on_incident` follows then.
        It may set gradients to None. It must not use collectives: other ranks may not call it.
        """

    def on_incident_closed(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident
    ) -> None:
        """Called when an incident is over and ``incident.outcome`` is known; on every rank."""

    def on_outcome_changed(
        self, trainer: Trainer, pl_module: LightningModule, incident: Incident
    ) -> None:
        """Called when the outcome of a closed incident turns out to be another; on every rank.

        An incident that has recovered may recur; after one that was contained the run may learn.
        """

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called right after a snapshot was restored, between two batches; on every rank."""

    def on_regime_change(
        self, trainer: Trainer, pl_module: LightningModule, stats: StepStats
    ) -> None:
        """Called when values that were rejected for long are accepted as the new normal.

        Called on every rank, before the first accepted step. A callback restores here what it
        lowered for the rejected steps, and clears windows of older values.
        """

    def on_precision_changed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called between two steps after the precision changed; on every rank.

        Weights and optimizer state may be other tensors than before.
        """

    def on_restart(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called at ``setup`` of each fit that `fit_with_recovery` starts after a crash.

        Only on callbacks of this base class. The remedy for that crash is already chosen: a
        callback that is careful after a crash on its own leaves it to the remedy.
        """

    def lower_learning_rate(self, factor: float) -> bool:
        """Asks this callback to multiply learning rate and clip by a factor, for a while.

        Called in the ``on_train_start`` of another callback, before or after that of this one,
        after a run that failed; only on callbacks of this base class.

        Args:
            factor: in (0, 1].

        Returns:
            Whether it does, and restores them later by itself.
        """
        return False

    def rescale_batch_counts(self, state: dict[str, Any], micro_batches: int) -> None:
        """Called on a loaded state when each batch is now split into micro-batches.

        A callback whose ``state_dict`` counts batches multiplies those counts in place.

        Args:
            state: what ``state_dict`` returned before each batch was split.
            micro_batches: how many there are for each former batch.
        """

    def rank_flag(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Returns a whole number that all ranks learn in `on_rank_flags` of the same step.

        It travels with the statistics of the step, so it costs no collective. Under DDP these are
        sent before the backward pass of the step's last batch: a flag that is set later is read for
        the next step. Called on every rank, for each step that is measured; it must be quick.
        """
        return 0.0

    def on_rank_flags(
        self, trainer: Trainer, pl_module: LightningModule, flags: Sequence[float]
    ) -> None:
        """Called for each measured step, before `on_step_measured`, if `rank_flag` is overridden.

        Args:
            trainer: the Trainer.
            pl_module: the module in training.
            flags: what `rank_flag` of each rank returned, in their order, the same on all of them.
                Under a strategy that is not supported, only that of this rank.
        """

    def rewindable_state(self) -> Mapping[str, Any]:
        """Returns the state that a rollback restores; copied, not aliased. Empty by default."""
        return {}

    def load_rewindable_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `rewindable_state` returned."""

    def consensus_state(self) -> Mapping[str, Any] | None:
        """Returns what all ranks must agree on, picklable; None for nothing (DDP).

        Called on every rank when one rank objected to a step that another accepted.
        """
        return None

    def load_consensus_state(self, state: Mapping[str, Any]) -> None:
        """Takes over the `consensus_state` of rank 0."""


_PER_BATCH = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
"""Hooks that Lightning calls for every batch."""

_ALWAYS_CALLED = ("on_exception", "on_save_checkpoint", "on_load_checkpoint")
_IN_A_FIT = tuple(
    name for name in vars(Callback) if name.startswith("on_") and name not in _ALWAYS_CALLED
)
"""Hooks that Lightning calls only where they are callable, as long as no exception ends the fit."""


def hide_empty_hooks(trainer: Trainer) -> None:
    """Spares Lightning the calls of hooks that do nothing, for as long as a fit lasts.

    It calls every hook of every callback in every step, between two calls of its profiler, unless
    the hook is not callable. So a callback of this package has None where it defines no hook.

    Args:
        trainer: whose callbacks to look at; those of other base classes stay as they are.
    """
    for each in callbacks_of(trainer):
        for name in _PER_BATCH if isinstance(each, StabilityCallback) else ():
            if getattr(type(each), name) is getattr(Callback, name):
                vars(each).setdefault(name, None)


def show_empty_hooks(trainer: Trainer) -> None:
    """Gives the callbacks all their hooks back, at the end of a fit."""
    for each in callbacks_of(trainer):
        if isinstance(each, StabilityCallback):
            show_hooks(each)


def hide_hooks(callback: StabilityCallback) -> None:
    """Spares Lightning the calls of all hooks of one callback that has nothing to do in a fit."""
    vars(callback).update(dict.fromkeys(_PER_BATCH))


def stand_aside(trainer: Trainer, pl_module: LightningModule) -> None:
    """Ends the work of the callbacks of this package for one fit, which goes on without them.

    Called before the first batch, when only their ``setup`` has run. Their hooks come back by
    `show_empty_hooks`. Callbacks of the user keep theirs.

    Args:
        trainer: at the start of its fit.
        pl_module: the module in training.
    """
    own = [
        each
        for each in callbacks_of(trainer)
        if isinstance(each, StabilityCallback) and _is_of_this_package(each)
    ]
    for each in own:
        each.teardown(trainer, pl_module, "fit")
    for each in own:
        vars(each).update(dict.fromkeys(_IN_A_FIT))


def _is_of_this_package(callback: StabilityCallback) -> bool:
    """Returns whether a class of the package, or one derived from it, is this callback's."""
    kinds = (kind for kind in type(callback).__mro__ if kind is not StabilityCallback)
    return any(kind.__module__.startswith("lit_stability.") for kind in kinds)


def show_hooks(callback: StabilityCallback) -> None:
    """Gives a callback the hooks back that it has nothing in the place of."""
    for name in _hidden_in(callback):
        del vars(callback)[name]


def _hidden_in(callback: Any) -> list[str]:
    return [name for name in _IN_A_FIT if vars(callback).get(name, callback) is None]


HOOKS: tuple[str, ...] = tuple(n for n in vars(StabilityCallback) if not n.startswith("_"))
"""Names of the hooks and flags."""

_DISTINCTIVE = [n for n in HOOKS if n not in ("lower_learning_rate", "changes_precision")]
"""Hooks with distinctive names; a name close to one of them is taken for a misspelling."""

_OF_0_1 = {
    "on_suspicion": "on_local_anomaly",
    "on_new_regime": "on_regime_change",
    "books": "consensus_state",
    "load_books": "load_consensus_state",
    "can_restore": "can_roll_back",
    "takes_steps_again": "needs_recorded_step",
    "ignores_vetoed_steps": "ignores_skipped_steps",
    "count_in_parts": "rescale_batch_counts",
}
"""Hooks of version 0.1.0 that have another name now."""

_CLOSE = 0.85
"""Similarity of two names from which on one is taken for a misspelling of the other."""


def call_hook(name: str, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
    """Calls ``name(trainer, pl_module, *args)`` on each callback, and the module, that has it."""
    for owner in [*callbacks_of(trainer), pl_module]:
        if implements(owner, name):
            hook = getattr(owner, name)
            if callable(hook):
                hook(trainer, pl_module, *args)


def implements(owner: Any, name: str) -> bool:
    """Returns whether an object defines a hook, other than by the base class's empty one."""
    known = _class_implements(type(owner), name)  # type: ignore[arg-type]
    return hasattr(owner, name) if known is None else known or name in vars(owner)


@lru_cache(maxsize=1024)
def _class_implements(kind: type, name: str) -> bool | None:
    """Whether a class defines a hook; None if its objects may find attributes elsewhere.

    Cached, as it is asked of each callback in each step.
    """
    found = getattr(kind, name, None)
    if found is None:
        elsewhere = getattr(kind, "__getattr__", None)
        return False if elsewhere in (None, Module.__getattr__) else None
    return found is not getattr(StabilityCallback, name)


def can_lower_learning_rate(trainer: Trainer) -> list[StabilityCallback]:
    """Returns the callbacks that lower a learning rate when asked to.

    Only callbacks of the base class: in another the name is an ordinary one, of anything.
    """
    own = [each for each in callbacks_of(trainer) if isinstance(each, StabilityCallback)]
    return [each for each in own if implements(each, "lower_learning_rate")]


def lower_learning_rate(trainer: Trainer, factor: float) -> bool:
    """Asks each callback to lower the learning rate; returns whether any of them does."""
    lowered = [each.lower_learning_rate(factor) for each in can_lower_learning_rate(trainer)]
    return any(lowered)


def misspelt_hooks(owner: Any) -> dict[str, str]:
    """Finds methods whose names are close to a hook of this package, but are none.

    Args:
        owner: a callback or a LightningModule.

    Returns:
        Name of the method or flag -> name of the hook that was probably meant.

    >>> class Pager(Callback):
    ...     __module__ = "user"
    ...
    ...     def on_incidents(self, trainer, pl_module, incident): ...
    ...     def on_exception(self, trainer, pl_module, exception): ...
    >>> misspelt_hooks(Pager())
    {'on_incidents': 'on_incident'}
    """
    if type(owner).__module__.split(".")[0] in (*LIGHTNING_ROOTS, "lit_stability"):
        return {}
    known = {*HOOKS, *dir(Callback), *dir(LightningModule)}
    meant: dict[str, str] = {}
    for name in _own_names(type(owner)):
        if name in known or name.startswith("_"):
            continue
        close = difflib.get_close_matches(name, _DISTINCTIVE, n=1, cutoff=_CLOSE)
        found = _OF_0_1.get(name) or next(iter(close), None)
        # In a module such a name may be an ordinary one, unless it has the prefix of a hook.
        if found is not None and (isinstance(owner, Callback) or name.startswith("on_")):
            meant[name] = found
    return meant


_NOT_THE_USERS = (*LIGHTNING_ROOTS, "torch", "builtins", "lit_stability")


def _own_names(kind: type) -> Iterable[str]:
    """Names of the methods and flags that a class and its bases outside of Lightning define."""
    for base in kind.__mro__:
        if base.__module__.split(".")[0] in _NOT_THE_USERS:
            continue
        for name, value in vars(base).items():
            if inspect.isroutine(value) or isinstance(value, (bool, property)):
                yield name


def report_misspelt_hooks(trainer: Trainer, pl_module: LightningModule) -> None:
    """Warns of methods that look like a hook of this package and are never called."""
    if not trainer.is_global_zero:
        return
    for owner in [*callbacks_of(trainer), pl_module]:
        for name, hook in misspelt_hooks(owner).items():
            log.warning(
                "%s.%s is never called: no hook has this name; %s was probably meant "
                "(see lit_stability.StabilityCallback)",
                type(owner).__name__,
                name,
                hook,
            )
