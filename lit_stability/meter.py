"""From tensors to floats: everything the detectors look at, measured once per optimizer step.

One foreach pass over the gradients, one gather of a fixed sample of weights and second moments,
one copy to the host. May import torch; knows neither Lightning nor detectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_stability.moments import Moments
from lit_stability.sampling import Samples, blocks_of, real
from lit_stability.stats import GradientDetail, StepStats

_DETAIL_BLOCKS, _DETAIL_BLOCK = 32, 128
"""The larger sample from which a gradient's distribution is taken while a run is healthy."""


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
        self._samples = Samples(self.parameters)
        self._moments = Moments(self.names, self.parameters, optimizer)
        self.forget()

    @property
    def stale(self) -> bool:
        """Whether the optimizer was given other parameters since, as when a backbone unfreezes."""
        return sum(len(group["params"]) for group in self.optimizer.param_groups) != self._held

    def forget(self) -> None:
        """Drop what was remembered of the last step, after the weights were put back."""
        self._last_weights: Tensor | None = None
        self._moments.forget()
        self._last_lr = 0.0

    @torch.no_grad()
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
        parts["moments"] = self._moments.sums()
        host = _to_host(parts)
        grad_norms = tuple(host["grads"])
        moments = self._moments.judge(host["moments"])
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
            update_ratio=_ratio(host["updates"]),
            update_learning_rate=self._last_lr,
            moment_ratio=moments.ratio,
            moment_name=moments.name,
            bad_momentum=moments.bad_momentum,
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

    @torch.no_grad()
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
        now = self._samples.gather()
        last, self._last_weights = self._last_weights, now
        if last is None:
            return []
        return [
            self._samples.weighted_square_sum(now - last).reshape(1),
            self._samples.weighted_square_sum(last).reshape(1),
        ]


@torch.no_grad()
def gradient_details(named_parameters: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Distribution of every gradient there is, a dict of plain values each; for an incident."""
    named = [(n, p.grad) for n, p in named_parameters if p.grad is not None]
    grads = [_dense(g) for _, g in named]
    host = _to_host({"norms": _norms(grads), "rows": [_distribution(g) for g in grads]})
    return [asdict(d) for d in _details([n for n, _ in named], host["norms"], host["rows"])]


def _ratio(squares: Sequence[float]) -> float | None:
    return math.sqrt(squares[0] / squares[1]) if squares and squares[1] > 0 else None


def _scalar(value: Tensor | None) -> list[Tensor]:
    return [] if value is None else [value.detach().float().reshape(1)]


def _unscaled(loss: Sequence[float], scale: float | None) -> float:
    if not loss:
        return math.nan
    return loss[0] if not scale else loss[0] / scale


def _dense(grad: Tensor) -> Tensor:
    return real(grad.coalesce().values() if grad.is_sparse else grad)


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms in fp32 whatever the tensors' own format, so that fp16 does not overflow."""
    if not tensors:
        return []
    types = {t.dtype for t in tensors}
    if types == {torch.float32} and len({t.device for t in tensors}) == 1:
        return [torch.stack(torch._foreach_norm(list(tensors), 2.0))]
    tensors = [real(t) for t in tensors]
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
    return blocks_of(grad, _DETAIL_BLOCKS, _DETAIL_BLOCK)


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
