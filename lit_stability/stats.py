"""From tensors to floats: everything the detectors look at, measured once per optimizer step.

One foreach pass over the gradients, one gather of a fixed sample of weights and second moments,
one copy to the host. May import torch; knows neither Lightning nor detectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_BLOCKS, _BLOCK = 16, 32
"""The sample of a tensor: 16 blocks of 32 neighbours (two cache lines of fp32), evenly spread."""
_DETAIL_BLOCKS, _DETAIL_BLOCK = 32, 128
"""The larger sample from which a gradient's distribution is taken while a run is healthy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientDetail:
    """Distribution of one parameter's unclipped gradient.

    The norm is exact; while a run is healthy the rest is from a sample of 4096 elements.
    """

    name: str
    norm: float
    mean: float
    std: float
    minimum: float
    maximum: float
    zero_share: float
    """Share of elements that are exactly 0, in [0, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """What one optimizer step looks like before the update is applied.

    Gradients are measured accumulated, unscaled and unclipped. Norms are Euclidean.
    """

    step: int
    """Optimizer steps taken before this one (Lightning's ``global_step``)."""
    loss: float
    """Loss of the step, averaged over the accumulation window; NaN when none was seen."""
    grad_norm: float
    """Norm of all gradients together."""
    optimizer: int = 0
    """Index of the optimizer in ``trainer.optimizers``."""
    loss_scale: float | None = None
    """Factor of the loss scaler, None where none is at work."""
    has_loss: bool = True
    """False where no backward pass was observed, so that ``loss`` means nothing."""
    names: tuple[str, ...] = ()
    """Parameters that have a gradient, in the order of ``grad_norms``."""
    grad_norms: tuple[float, ...] = ()
    learning_rates: tuple[float, ...] = ()
    """Effective learning rate of each parameter group: nominal times every active factor."""
    nominal_learning_rates: tuple[float, ...] = ()
    update_ratio: float | None = None
    """Norm of the *previous* update over that of the weights, from the sample; None at first."""
    update_learning_rate: float = 0.0
    """Largest effective learning rate of that previous update."""
    moment_ratio: float | None = None
    """Smallest ratio over parameters of Adam's sampled second moment to what decay alone leaves."""
    moment_name: str = ""
    """The parameter that has ``moment_ratio``."""
    weight_norm: float | None = None
    """Norm of all weights; only on the steps that scan them, else None."""
    bad_weights: tuple[str, ...] = ()
    """Parameters found non-finite on a step that scans them."""
    details: tuple[GradientDetail, ...] = field(default=(), repr=False)
    """Per-parameter distributions; only on the steps that ask for them."""

    @property
    def finite_gradients(self) -> bool:
        """Whether every gradient is finite."""
        return math.isfinite(self.grad_norm)

    def worst_layers(self, count: int = 5) -> list[tuple[str, float]]:
        """Parameters with the largest gradient norms, non-finite ones first."""
        pairs = list(zip(self.names, self.grad_norms, strict=True))
        pairs.sort(key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf, reverse=True)
        return pairs[:count]


class StepMeter:
    """Measures one optimizer's parameters, step after step.

    Args:
        named_parameters: ``(name, parameter)`` pairs; those the optimizer lacks are left out.
        optimizer: the optimizer whose updates are measured.
        index: position of the optimizer in ``trainer.optimizers``.

    Raises:
        ValueError: if the optimizer holds none of the parameters.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Tensor]], optimizer: Optimizer, index: int = 0
    ) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        pairs = [(n, p) for n, p in named_parameters if id(p) in held]
        if not pairs:
            raise ValueError(
                f"optimizer {index} ({type(optimizer).__name__}) holds no parameter of "
                "the module; pass it `module.parameters()`"
            )
        self._held = len(held)
        self.names = tuple(n for n, _ in pairs)
        self.parameters = [p for _, p in pairs]
        self.optimizer = optimizer
        self.index = index
        self.count = 0
        """Steps measured."""
        self._samples = _Samples(self.parameters)
        self._moments: _Samples | None = None
        self._beta2: list[float] = []
        self.forget()

    @property
    def stale(self) -> bool:
        """Whether the optimizer was given other parameters since, as when a backbone unfreezes."""
        return sum(len(group["params"]) for group in self.optimizer.param_groups) != self._held

    def forget(self) -> None:
        """Drop what was remembered of the last step, after the weights were put back."""
        self._last_weights: Tensor | None = None
        self._last_moments: list[float] | None = None
        self._last_lr = 0.0

    def measure(
        self,
        step: int,
        loss: Tensor | None,
        *,
        loss_scale: Tensor | None = None,
        learning_rates: Sequence[float] = (),
        nominal_learning_rates: Sequence[float] = (),
        scan_weights: bool = False,
        details: bool = False,
    ) -> StepStats:
        """Measure the gradients as they are now, and the previous update by the weights.

        Args:
            step: optimizer steps taken so far.
            loss: the step's loss, a scalar on any device, or None.
            loss_scale: what the loss was multiplied by before it got here, a scalar.
            learning_rates: effective learning rate of each group.
            nominal_learning_rates: what the scheduler wrote.
            scan_weights: read every weight too, not only the sample.
            details: fill ``StepStats.details``.
        """
        named = [
            (n, p.grad)
            for n, p in zip(self.names, self.parameters, strict=True)
            if p.grad is not None
        ]
        grads = [_dense(g) for _, g in named]
        parts = {"loss": _scalar(loss), "scale": _scalar(loss_scale)}
        parts["grads"] = _norms(grads)
        parts["weights"] = _norms(self.parameters) if scan_weights else []
        parts["details"] = [_distribution(_detail_sample(g)) for g in grads] if details else []
        parts["updates"] = self._update_sums()
        parts["moments"] = self._moment_sums()
        host = _to_host(parts)
        grad_norms = tuple(host["grads"])
        ratio, moment, moment_name = self._ratios(host["updates"], host["moments"])
        scale = host["scale"][0] if host["scale"] else None
        stats = StepStats(
            step=step,
            loss=_unscaled(host["loss"], scale),
            has_loss=bool(host["loss"]),
            loss_scale=scale,
            grad_norm=_total(grad_norms),
            optimizer=self.index,
            names=tuple(n for n, _ in named),
            grad_norms=grad_norms,
            learning_rates=tuple(learning_rates),
            nominal_learning_rates=tuple(nominal_learning_rates),
            update_ratio=ratio,
            update_learning_rate=self._last_lr,
            moment_ratio=moment,
            moment_name=moment_name,
            weight_norm=_total(host["weights"]) if scan_weights else None,
            bad_weights=_non_finite(self.names, host["weights"]),
            details=_details([n for n, _ in named], grad_norms, host["details"]),
        )
        self.count += 1
        self.expect(learning_rates)
        return stats

    def expect(self, learning_rates: Sequence[float]) -> None:
        """Say which learning rates the coming update uses, where that has changed since."""
        self._last_lr = max(learning_rates, default=0.0)

    def audit(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of parameters with a non-finite weight, and with a non-finite optimizer moment.

        Reads everything and copies to the host: for an incident, not for every step.
        """
        weights = _to_host({"norms": _norms(self.parameters)})["norms"]
        owners, tensors = [], []
        for name, p in zip(self.names, self.parameters, strict=True):
            for value in (self.optimizer.state.get(p) or {}).values():
                if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                    owners.append(name)
                    tensors.append(value)
        moments = _to_host({"norms": _norms(tensors)})["norms"]
        return _non_finite(self.names, weights), _non_finite(owners, moments)

    def _update_sums(self) -> list[Tensor]:
        now = self._samples.gather(self.parameters)
        last, self._last_weights = self._last_weights, now
        if last is None:
            return []
        return [
            self._samples.weighted_square_sum(now - last).reshape(1),
            self._samples.weighted_square_sum(last).reshape(1),
        ]

    def _moment_sums(self) -> list[Tensor]:
        """Sampled sums of Adam's second moment, one per parameter that has one."""
        found = [
            (i, state["exp_avg_sq"])
            for i, p in enumerate(self.parameters)
            if (state := self.optimizer.state.get(p)) and "exp_avg_sq" in state
        ]
        if not found:
            return []
        tensors = [t for _, t in found]
        if self._moments is None or self._moments.count != len(tensors):
            self._moments = _Samples(tensors)
            self._moment_index = [i for i, _ in found]
            self._beta2 = _second_moment_decay(self.optimizer, self.parameters, self._moment_index)
        return [self._moments.sums(self._moments.gather(tensors))]

    def _ratios(
        self, updates: list[float], moments: list[float]
    ) -> tuple[float | None, float | None, str]:
        ratio = math.sqrt(updates[0] / updates[1]) if updates and updates[1] > 0 else None
        last, self._last_moments = self._last_moments, moments or None
        if not moments or last is None or len(last) != len(moments):
            return ratio, None, ""
        # v_t = b v_(t-1) + (1 - b) g^2 >= b v_(t-1) (Kingma & Ba 2015, Algorithm 1).
        kept = [
            (now / (b * before) if math.isfinite(now) else math.nan, i)
            for now, before, b, i in zip(
                moments, last, self._beta2, self._moment_index, strict=True
            )
            if before > 0 and b > 0
        ]
        if not kept:
            return ratio, None, ""
        value, i = min(kept, key=lambda pair: pair[0] if pair[0] == pair[0] else -1.0)
        return ratio, value, self.names[i]


def gradient_details(named_parameters: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Distribution of every gradient there is, a dict of plain values each; for an incident."""
    named = [(n, p.grad) for n, p in named_parameters if p.grad is not None]
    grads = [_dense(g) for _, g in named]
    host = _to_host({"norms": _norms(grads), "rows": [_distribution(g) for g in grads]})
    return [asdict(d) for d in _details([n for n, _ in named], host["norms"], host["rows"])]


class _Samples:
    """A fixed, evenly spread sample of a list of tensors, gathered into one flat fp32 tensor."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.count = len(tensors)
        tensors = [_real(t.detach()) for t in tensors]
        self.device = tensors[0].device
        large = [i for i, t in enumerate(tensors) if t.numel() > _BLOCKS * _BLOCK]
        small = [i for i, t in enumerate(tensors) if t.numel() <= _BLOCKS * _BLOCK]
        self._large, self._small = large, small
        order = [*large, *small]
        self._back = torch.tensor(order, device=self.device).argsort()
        counts = [min(tensors[i].numel(), _BLOCKS * _BLOCK) for i in order]
        self._lengths = torch.tensor(counts, device=self.device)
        scale = [tensors[i].numel() / max(n, 1) for i, n in zip(order, counts, strict=True)]
        self._weights = torch.tensor(scale, device=self.device).repeat_interleave(self._lengths)
        self._addresses: list[int] = []
        self._are_views = False
        self._views: tuple[list[Tensor], list[Tensor]] = ([], [])

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Shape ``(elements of the sample,)``, fp32, the large tensors first."""
        addresses = [t.data_ptr() for t in tensors]
        if addresses != self._addresses or not self._are_views:
            self._addresses = addresses
            tensors = [_real(t.detach()) for t in tensors]
            self._are_views = all(_is_dense(t) for t in tensors)
            self._views = (
                [_blocks(tensors[i]) for i in self._large],
                [_blocks(tensors[i], 1, tensors[i].numel())[0] for i in self._small],
            )
        parts = [self._join(views) for views in self._views if views]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).float()

    def _join(self, views: Sequence[Tensor]) -> Tensor:
        if any(v.device != self.device for v in views):
            views = [v.to(self.device) for v in views]
        return torch.cat(list(views)).reshape(-1)

    def weighted_square_sum(self, flat: Tensor) -> Tensor:
        """Estimate of the squared norm of all the tensors together, a scalar."""
        return torch.dot(flat * self._weights, flat)

    def sums(self, flat: Tensor) -> Tensor:
        """Sum of each tensor's sample, shape ``(tensors,)``, in the tensors' order."""
        # `unsafe` leaves out a check of the lengths, which would copy to the host twice.
        sums = torch.segment_reduce(flat, "sum", lengths=self._lengths, unsafe=True)
        return sums[self._back]


def _blocks(tensor: Tensor, blocks: int = _BLOCKS, block: int = _BLOCK) -> Tensor:
    """An evenly spread sample, shape ``(blocks, block)``; a view if the tensor is dense."""
    if not _is_dense(tensor):
        tensor = tensor.contiguous()
    return tensor.as_strided((blocks, block), (tensor.numel() // blocks, 1))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their stretch of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1 == tensor.numel()


def _real(tensor: Tensor) -> Tensor:
    """The tensor, or its real and imaginary parts side by side, which have the same norm."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _second_moment_decay(
    optimizer: Optimizer, parameters: Sequence[Tensor], index: Sequence[int]
) -> list[float]:
    beta2 = {
        id(p): float(group["betas"][1]) if "betas" in group else 0.0
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return [beta2[id(parameters[i])] for i in index]


def _scalar(value: Tensor | None) -> list[Tensor]:
    return [] if value is None else [value.detach().float().reshape(1)]


def _unscaled(loss: Sequence[float], scale: float | None) -> float:
    if not loss:
        return math.nan
    return loss[0] if not scale else loss[0] / scale


def _dense(grad: Tensor) -> Tensor:
    return _real(grad.coalesce().values() if grad.is_sparse else grad)


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms in fp32 whatever the tensors' own format, so that fp16 does not overflow."""
    if not tensors:
        return []
    tensors = [_real(t.detach()) for t in tensors]
    types = {t.dtype for t in tensors}
    wide = types <= {torch.float32, torch.float64}
    widest = torch.float64 if torch.float64 in types else torch.float32
    kwargs: dict[str, Any] = {} if wide else {"dtype": widest}
    norms = torch._foreach_norm(tensors, 2.0, **kwargs)
    device = norms[0].device
    return [torch.stack([n.to(device=device, dtype=torch.float32) for n in norms])]


def _distribution(grad: Tensor) -> Tensor:
    """Mean, standard deviation, minimum, maximum and share of zeros, shape ``(5,)``."""
    if grad.numel() == 0:
        return grad.new_zeros(5, dtype=torch.float32)
    g = grad.detach().float()
    low, high = torch.aminmax(g)
    std, mean = torch.std_mean(g, correction=0)
    zeros = 1.0 - torch.count_nonzero(g) / g.numel()
    return torch.stack([mean, std, low, high, zeros])


def _detail_sample(grad: Tensor) -> Tensor:
    if grad.numel() <= _DETAIL_BLOCKS * _DETAIL_BLOCK:
        return grad
    return _blocks(grad, _DETAIL_BLOCKS, _DETAIL_BLOCK)


def _details(
    names: Sequence[str], norms: Sequence[float], flat: Sequence[float]
) -> tuple[GradientDetail, ...]:
    if not flat:
        return ()
    rows = [flat[5 * i : 5 * i + 5] for i in range(len(names))]
    return tuple(
        GradientDetail(
            name=n, norm=norm, mean=r[0], std=r[1], minimum=r[2], maximum=r[3], zero_share=r[4]
        )
        for n, norm, r in zip(names, norms, rows, strict=True)
    )


def _to_host(parts: dict[str, list[Tensor]]) -> dict[str, list[float]]:
    """The one copy to the host of an optimizer step."""
    tensors = [t for group in parts.values() for t in group]
    if not tensors:
        return {key: [] for key in parts}
    device = tensors[0].device
    flat = torch.cat([t if t.device == device else t.to(device) for t in tensors]).tolist()
    out: dict[str, list[float]] = {}
    start = 0
    for key, group in parts.items():
        end = start + sum(t.numel() for t in group)
        out[key] = flat[start:end]
        start = end
    return out


def _non_finite(names: Sequence[str], norms: Sequence[float]) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(n for n, w in zip(names, norms, strict=False) if not math.isfinite(w))
    )


def _total(norms: Sequence[float]) -> float:
    """Norm of the whole from the norms of its parts; NaN if a part is NaN, Inf if one is Inf."""
    if any(n != n for n in norms):
        return math.nan
    return math.sqrt(math.fsum(n * n for n in norms))
