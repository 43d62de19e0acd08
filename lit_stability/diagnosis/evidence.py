"""Evidence rules: functions of the diagnosis context that return a sentence, or None.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math

from lit_stability.diagnosis.cause import EvidenceRule
from lit_stability.diagnosis.context import EARLY, LARGE, STALE, STEEP, DiagnosisContext
from lit_stability.diagnosis.layer_types import is_norm_gain
from lit_stability.diagnosis.loss_pattern import loss_pattern


def kind(*kinds: str) -> EvidenceRule:
    """Returns a rule: the anomaly has one of these kinds."""

    def rule(context: DiagnosisContext) -> str | None:
        return context.anomaly.message if context.anomaly.kind in kinds else None

    return rule


def pattern(*names: str) -> EvidenceRule:
    """Returns a rule: the loss diverges in one of these patterns."""

    def rule(context: DiagnosisContext) -> str | None:
        found = context.pattern
        return f"{found.name}: {found.text}" if found and found.name in names else None

    return rule


def reading(quantity: str, above: float, words: str) -> EvidenceRule:
    """Returns a rule: the last reading of a probe is above a bound.

    Args:
        quantity: name of the reading.
        above: the bound.
        words: format string of the evidence, with ``{value}`` and ``{where}``.
    """

    def rule(context: DiagnosisContext) -> str | None:
        found = context.reading(quantity)
        if found is None or not found[1] > above:
            return None
        return words.format(where=found[0], value=found[1])

    return rule


def both(first: EvidenceRule, second: EvidenceRule) -> EvidenceRule:
    """Returns a rule: both rules have evidence."""

    def rule(context: DiagnosisContext) -> str | None:
        one = first(context)
        other = None if one is None else second(context)
        if other is None or other == one:
            return other
        return f"{one}, and {other}"

    return rule


def early(context: DiagnosisContext) -> str | None:
    """The step is one of the first."""
    step = context.anomaly.step
    return f"step {step} is before step {EARLY}" if step < EARLY else None


def no_warmup(context: DiagnosisContext) -> str | None:
    """The learning rate started at its largest value."""
    return None if context.rate_rose else "the learning rate has never risen: there was no warm-up"


def warming_up(context: DiagnosisContext) -> str | None:
    """The run is in its warm-up."""
    return "the learning rate is still rising" if context.phase == "warm-up" else None


def large_gradient(context: DiagnosisContext) -> str | None:
    """The gradient norm is far above its median."""
    ratio = context.gradient_ratio
    if ratio is None or not ratio > LARGE:
        return None
    return f"the gradient norm is {ratio:.3g} times its median"


def ordinary_gradient(context: DiagnosisContext) -> str | None:
    """The gradient norm is not far above its median."""
    ratio = context.gradient_ratio
    if ratio is None or not ratio <= LARGE:
        return None
    return f"the gradient norm is normal, {ratio:.2g} times its median"


def without_gradient(context: DiagnosisContext) -> str | None:
    """No parameter has a gradient, neither now nor in the recent steps; 16 bits round some to 0."""
    steps = [*context.history[-50:], *([] if context.stats is None else [context.stats])]
    if not steps or any(s.grad_norm != 0 for s in steps):
        return None
    if not any(s.names for s in steps):
        return "no parameter has a gradient"
    return None if context.mixed else "the gradient of every parameter is exactly 0"


def large_update(context: DiagnosisContext) -> str | None:
    """The last update was much larger than the median update."""
    excess = context.update_excess
    if excess is None or not 3 < excess < math.inf:
        return None
    return f"the last update was {excess:.3g} times the usual"


def stale_moments(context: DiagnosisContext) -> str | None:
    """Gradients were much larger than Adam's second moment in the steps before."""
    seen = [(s.moment_rms, s.step) for s in context.history[-20:] if s.moment_rms]
    highest, step = max(seen, default=(0.0, 0))
    if highest <= STALE:
        return None
    return f"at step {step} the gradients were {highest:.2g} times Adam's second moment"


def rate_changed(context: DiagnosisContext) -> str | None:
    """The scheduler recently changed the learning rate by a factor of three or more."""
    rates = [rate for rate in context.rates[-20:] if rate > 0]
    if len(rates) < 2 or max(rates) < 3 * min(rates):
        return None
    return f"the learning rate recently went from {rates[0]:.3g} to {rates[-1]:.3g}"


def transient(context: DiagnosisContext) -> str | None:
    """The anomaly did not recur when the steps were run again under the same conditions."""
    sentence = "it did not recur when the same steps were run again"
    same = context.verdict == "transient" and not context.rerun_lowered
    return sentence if same else None


def deterministic(context: DiagnosisContext) -> str | None:
    """The anomaly recurred when the steps were run again."""
    sentence = "it recurred when the same steps were run again"
    return sentence if context.verdict == "deterministic" else None


def other_batches(context: DiagnosisContext) -> str | None:
    """Five or more consecutive batches cause an anomaly: they cannot all be bad."""
    # Each batch is tried twice, except in a burst of gradients that are clipped.
    batches = max(context.clipped, (context.occurrences + 1) // 2)
    return f"it recurred with {batches} consecutive batches" if batches >= 5 else None


def despite_clipping(context: DiagnosisContext) -> str | None:
    """Clipping the gradients of several steps has not brought the loss down."""
    if context.clipped < 5 or context.loss_is_ordinary is not False:
        return None
    return f"the loss stays high after {context.clipped} clipped steps"


def ordinary_loss(context: DiagnosisContext) -> str | None:
    """Only the gradient is large; the loss is one of the usual, and so are the updates."""
    if context.anomaly.kind != "gradient spike":
        return None
    if not context.loss_is_ordinary or large_update(context) is not None:
        return None
    assert context.stats is not None
    return f"the loss is ordinary, {context.stats.loss:.4g}"


def calm_before(context: DiagnosisContext) -> str | None:
    """The losses before the step were ordinary: nothing was diverging."""
    finite = [s.loss for s in context.history if s.has_loss]
    if len(finite) < _CALM_STEPS or loss_pattern(finite) is not None:
        return None
    return f"the {len(finite)} losses before were ordinary, the last {finite[-1]:.4g}"


def sudden_nan(context: DiagnosisContext) -> str | None:
    """The loss or gradient became non-finite after ordinary losses."""
    broken = context.anomaly.kind in ("non-finite loss", "non-finite gradient")
    return calm_before(context) if broken else None


def bad_input(context: DiagnosisContext) -> str | None:
    """The batch itself contains bad values; ignored for anomalies that build up over many steps."""
    if context.anomaly.warn_only:
        return None
    if context.batch:
        return f"in the batch, {'; '.join(context.batch)}"
    origin = context.origin
    if not origin or origin.cause != "input" or sound_batch(context) is not None:
        return None
    return str(origin.describe().splitlines()[0])


def unusual_batch(context: DiagnosisContext) -> str | None:
    """The batch differs from recent ones in what can be counted."""
    if context.anomaly.warn_only or not context.unusual:
        return None
    return f"unlike the batches before, {'; '.join(context.unusual)}"


def sound_batch(context: DiagnosisContext) -> str | None:
    """The batch was examined and is as the first one was."""
    if not context.batch_examined or context.batch or context.unusual:
        return None
    return "the batch is finite, and of the scale of the first one"


def finite_batch(context: DiagnosisContext) -> str | None:
    """The values became non-finite in the step, from a batch with nothing unusual in it."""
    broken = BROKEN(context) is not None
    return sound_batch(context) if broken else None


def ordinary_batch(context: DiagnosisContext) -> str | None:
    """Nothing is unusual in the batch, nor in its loss: only its gradient is large."""
    sound = sound_batch(context)
    loss = ordinary_loss(context)
    return f"{sound}, and {loss}" if sound is not None and loss is not None else None


def unscaled(context: DiagnosisContext) -> str | None:
    """The data are not normalised, from the first batch on."""
    return f"in every batch, {'; '.join(context.unscaled)}" if context.unscaled else None


def bad_state(context: DiagnosisContext) -> str | None:
    """A weight or buffer was non-finite before the step."""
    origin = context.origin
    if not origin or origin.cause not in ("parameter", "buffer") or constant(context):
        return None
    return f"{origin.tensor} was non-finite before the step"


def constant(context: DiagnosisContext) -> str | None:
    """A number of the program is non-finite: a plain number, or a tensor that is no data."""
    origin = context.origin
    if not origin:
        return None
    if origin.cause == "operation" and origin.kind == "non-finite constant":
        return str(origin.describe().splitlines()[0])
    if origin.cause == "buffer" and origin.tensor in context.bad_from_start:
        return f"{origin.tensor} was non-finite when the fit began"
    if origin.cause == "constant":
        return f"{origin.tensor}, an attribute of the module, is non-finite"
    if origin.cause == "input" and origin.kind == "non-finite input" and sound_batch(context):
        return f"{origin.tensor} is non-finite, and the batch is finite"
    return None


def lasting_constant(context: DiagnosisContext) -> str | None:
    """The module holds a non-finite number, so it is there in every step."""
    found = constant(context)
    lasting = context.origin is not None and context.origin.cause in ("constant", "buffer")
    return "the module holds it, so it is there in every step" if found and lasting else None


def overflow(context: DiagnosisContext) -> str | None:
    """An operation overflows in its format and is finite in float32."""
    origin = context.origin
    return origin.describe().splitlines()[0] if origin and origin.overflow else None


def operation(context: DiagnosisContext) -> str | None:
    """An operation made a NaN or Inf from finite values, and does so in float32 as well."""
    origin = context.origin
    if not origin or origin.cause != "operation" or origin.overflow or constant(context):
        return None
    if origin.kind == "overflow" and not any(part in origin.op for part in _AMPLIFYING):
        return None  # see `large_value`
    return str(origin.describe().splitlines()[0])


def large_value(context: DiagnosisContext) -> str | None:
    """A sum or product overflows in float32: what made its operands so large is the cause."""
    origin = context.origin
    overflows = origin and origin.cause == "operation" and origin.kind == "overflow"
    if not overflows or origin.overflow or operation(context) is not None:
        return None
    return str(origin.describe().splitlines()[0])


def mixed_precision(context: DiagnosisContext) -> str | None:
    """Forward and backward pass compute in 16 bits."""
    return f"it computes in {context.precision}" if context.mixed else None


def accumulates(context: DiagnosisContext) -> str | None:
    """Gradients are accumulated, by the Trainer or possibly by the module itself."""
    if context.manual:
        return "the module steps its optimizers itself (manual optimization)"
    more = context.accumulation > 1
    return f"gradients of {context.accumulation} batches are accumulated" if more else None


def high_momentum(context: DiagnosisContext) -> str | None:
    """The momentum is unusually high."""
    high = context.momentum is not None and context.momentum > 0.95
    return f"the momentum is {context.momentum:g}" if high else None


def unclipped(context: DiagnosisContext) -> str | None:
    """The Trainer does not clip gradients."""
    return None if context.clips else "gradients are not clipped"


def needs_no_warmup(context: DiagnosisContext) -> str | None:
    """The model has no layers whose training is known to need a warm-up."""
    types = context.layer_types
    if not types or any(part in name for part in _WARMED_UP for name in types):
        return None
    return "the model has neither norms nor attention"


def stalled_after_warmup(context: DiagnosisContext) -> str | None:
    """The layers of a model that needs a warm-up have stalled although it had one."""
    stalled = context.anomaly.kind == "stalled layers" and context.rate_rose
    if not stalled or not context.layer_types or needs_no_warmup(context):
        return None
    return f"{context.anomaly.message}, after a warm-up"


def no_norms(context: DiagnosisContext) -> str | None:
    """The model has no norm layers."""
    types = context.layer_types
    return None if not types or any("norm" in t for t in types) else "the model has no norms"


def no_moments(context: DiagnosisContext) -> str | None:
    """The optimizer keeps no moments."""
    plain = context.optimizer_type == "sgd" and not context.momentum
    return "plain SGD keeps no state" if plain else None


def line_search_on_noise(context: DiagnosisContext) -> str | None:
    """LBFGS minimises another function in each step."""
    batches = context.batches_per_epoch
    if context.optimizer_type != "lbfgs" or batches is None or not batches > context.accumulation:
        return None
    return f"LBFGS builds its curvature from {batches:g} different batches"


def recurrent(context: DiagnosisContext) -> str | None:
    """The model has recurrent layers."""
    found = [t for t in sorted(context.layer_types) if t in _RECURRENT]
    return f"the model is recurrent ({found[0]})" if found else None


def steep_recurrence(context: DiagnosisContext) -> str | None:
    """Recurrent weights amplify: the loss was very sensitive to the weights in the first step."""
    layer, found = recurrent(context), context.sensitivity_at_start
    if layer is None or found is None or not found > STEEP or early(context) is None:
        return None
    return (
        f"{layer}, and in the first step a change of {1 / found:.2g} of the weights changed the "
        "loss by as much as itself"
    )


def no_step_yet(context: DiagnosisContext) -> str | None:
    """The weights are those that the fit began with."""
    return None if context.anomaly.step > 0 else "no step has been taken yet"


def zero_gain(context: DiagnosisContext) -> str | None:
    """The gain of a norm layer is exactly 0, so that it never receives a gradient."""
    zero = context.anomaly.layers[:1] if context.anomaly.signal == "weight_norm" else ()
    return next((f"{name} is exactly 0" for name, _ in zero if is_norm_gain(name)), None)


_WARMED_UP = ("norm", "attention", "attn", "transformer")
"""Parts of the class names of layers that are trained with a warm-up."""
_RECURRENT = ("rnn", "rnncell", "gru", "grucell", "lstm", "lstmcell")
_AMPLIFYING = ("exp", "cosh", "sinh", "poisson", "prod")
"""Parts of the names of operations that make a value too large of ordinary ones."""
_CALM_STEPS = 5
"""Losses that show whether training went well before a NaN."""
GROWS = pattern("exponential growth")
SWINGS = pattern("oscillating divergence")
JUMPS = pattern("sudden jump")
BROKEN = kind("non-finite loss", "non-finite gradient", "non-finite weight")
DAMAGE = kind("non-finite weight", "weight corruption")
DIVERGES = kind("divergence")
SPIKES = kind("gradient spike", "loss spike")
TROUBLE = kind(
    *("non-finite loss", "non-finite gradient", "gradient spike", "loss spike", "divergence"),
    "update spike",
)
