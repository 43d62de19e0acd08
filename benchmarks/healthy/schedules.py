"""Kinds of learning-rate schedules and of hand-written optimizers.

Imports Lightning and torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import lr_scheduler as rates

from benchmarks.healthy.kind import SCHEDULES, Kind
from benchmarks.healthy.networks import Net, adamw, regression, sgd

STEPS = 240


def factor(of_step: Callable[[int], float]) -> Callable[[Optimizer], Any]:
    """Returns a schedule by a factor on the learning rate."""
    return lambda optimizer: rates.LambdaLR(optimizer, of_step)


def warmup_stable_decay(step: int) -> float:
    """Rises for 30 steps, stays, and falls to zero in the last quarter."""
    return min(1.0, (step + 1) / 30, max(0.0, (STEPS - step) / 60))


def warmup_cosine(step: int) -> float:
    if step < 40:
        return step / 40
    return 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * (step - 40) / 200)).item()


class EachEpoch(Net):
    """Steps its schedule at the end of each epoch."""

    def configure_optimizers(self) -> Any:
        """Returns the optimizer and a schedule in epochs."""
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [self.schedule(optimizer)]


class Plateau(Net):
    """Lowers the learning rate where the validation loss does not fall."""

    def configure_optimizers(self) -> Any:
        """Returns the optimizer and a schedule by the validation loss."""
        optimizer = self.make_optimizer(self.parameters())
        schedule = rates.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, threshold=0.2)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"},
        }


class ByHand(Net):
    """Writes the learning rate into the optimizer's groups in ``on_train_batch_start``."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the learning rate: a ramp, then a tenth of it in every second block."""
        step = self.global_step
        for group in self.optimizers().param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (0.1 if step // 60 % 2 else 1.0)


class TwoSchedules(Net):
    """Two optimizers with schedules of their own, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Steps both optimizers and both schedules."""
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            schedule.step()

    def configure_optimizers(self) -> Any:
        """Returns an optimizer for the body and one for the head."""
        body, head = adamw(self.net[:4].parameters()), sgd(self.net[4].parameters())
        return [body, head], [rates.CosineAnnealingLR(body, 100), rates.StepLR(head, 80)]


class ScheduleFree(Optimizer):
    """Averages its iterates instead of lowering the rate (Defazio et al., 2024, equation 2).

    Args:
        parameters: To train; they hold the point at which gradients are taken.
        lr: Learning rate.
        beta: Share of the average in that point.
    """

    def __init__(self, parameters: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves the iterate, its average and the parameters."""
        loss = _evaluate(closure)
        for group, parameter, state in _entries(self):
            if not state:
                state |= {"z": parameter.clone(), "x": parameter.clone(), "step": 0}
            state["step"] += 1
            state["z"].sub_(parameter.grad, alpha=group["lr"])
            state["x"].lerp_(state["z"], 1 / state["step"])
            parameter.copy_(state["z"].lerp(state["x"], group["beta"]))
        return loss


class SignSGD(Optimizer):
    """Moves each weight by the learning rate, in the direction of the sign of its gradient.

    Args:
        parameters: To train.
        lr: Learning rate.
    """

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves the parameters."""
        loss = _evaluate(closure)
        for group, parameter, _ in _entries(self):
            parameter.sub_(parameter.grad.sign(), alpha=group["lr"])
        return loss


class Lion(Optimizer):
    """The sign of a momentum (Chen et al., 2023, algorithm 2).

    Args:
        parameters: To train.
        lr: Learning rate.
        betas: Decay of the momentum in the update, and from step to step.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        parameters: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves the parameters."""
        loss = _evaluate(closure)
        for group, parameter, state in _entries(self):
            momentum = state.setdefault("momentum", torch.zeros_like(parameter))
            direction = momentum.lerp(parameter.grad, 1 - group["betas"][0]).sign_()
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(direction, alpha=group["lr"])
            momentum.lerp_(parameter.grad, 1 - group["betas"][1])
        return loss


class Orthogonal(Optimizer):
    """Makes the momentum of each matrix orthogonal (Jordan et al., 2024); vectors get SGD.

    Args:
        parameters: To train.
        lr: Learning rate.
    """

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Moves the parameters."""
        loss = _evaluate(closure)
        for group, parameter, state in _entries(self):
            momentum = state.setdefault("momentum", torch.zeros_like(parameter))
            momentum.mul_(0.9).add_(parameter.grad)
            move = momentum
            if parameter.ndim == 2:
                u, _, v = torch.linalg.svd(momentum, full_matrices=False)
                move = u @ v
            parameter.sub_(move, alpha=group["lr"])
        return loss


def _evaluate(closure: Any) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _entries(optimizer: Optimizer) -> list[tuple[dict[str, Any], Tensor, dict[str, Any]]]:
    """Returns group, parameter and state of each parameter with a gradient."""
    return [
        (group, parameter, optimizer.state[parameter])
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]


def kind(name: str, practice: str, module: Any = Net, **options: Any) -> Kind:
    own = {k: options.pop(k) for k in ("steps", "held_out", "trainer") if k in options}
    own.setdefault("steps", STEPS)
    return Kind(
        name=name, group=SCHEDULES, practice=practice, module=partial(module, **options), **own
    )


KINDS = (
    kind(
        "warm restarts",
        "The learning rate falls along a cosine and jumps up again every 60 steps.",
        schedule=lambda o: rates.CosineAnnealingWarmRestarts(o, 60),
    ),
    kind(
        "warm restarts from zero, SGD",
        "The same with SGD; each cycle is twice as long as the one before and ends at 0.",
        optimizer=sgd,
        schedule=lambda o: rates.CosineAnnealingWarmRestarts(o, 30, T_mult=2, eta_min=0.0),
    ),
    kind(
        "one cycle",
        "OneCycle raises the learning rate by a factor of 25 and lowers it by 250,000.",
        schedule=lambda o: rates.OneCycleLR(o, 0.01, total_steps=STEPS + 1),
    ),
    kind(
        "one cycle, SGD with cycled momentum",
        "OneCycle changes learning rate and momentum of SGD.",
        optimizer=sgd,
        schedule=lambda o: rates.OneCycleLR(o, 0.05, total_steps=STEPS + 1, pct_start=0.4),
    ),
    kind(
        "cyclical",
        "The learning rate goes up and down by a factor of 100 every 40 steps.",
        optimizer=sgd,
        schedule=lambda o: rates.CyclicLR(o, 5e-4, 5e-2, step_size_up=20),
    ),
    kind(
        "linear decay to zero",
        "The learning rate falls linearly to exactly 0.",
        schedule=factor(lambda step: max(0.0, 1 - step / STEPS)),
    ),
    kind(
        "zero for the last 60 steps",
        "The learning rate reaches 0 and the run goes on, to collect statistics.",
        schedule=factor(lambda step: max(0.0, 1 - step / 180)),
    ),
    kind(
        "warm-up, stable, decay",
        "The rate rises, stays and falls to 0 in the last quarter.",
        schedule=factor(warmup_stable_decay),
    ),
    kind(
        "warm-up from zero, cosine",
        "The learning rate is exactly 0 in the first step.",
        optimizer=adamw,
        schedule=factor(warmup_cosine),
    ),
    kind(
        "exponential",
        "The learning rate falls by 3 % in each step.",
        schedule=lambda o: rates.ExponentialLR(o, 0.97),
    ),
    kind(
        "steps of a factor of ten each epoch",
        "The learning rate falls to a tenth each epoch.",
        EachEpoch,
        schedule=lambda o: rates.StepLR(o, 1, gamma=0.1),
    ),
    kind(
        "multiplied by ten after an epoch",
        "The learning rate is raised by a factor of ten after the first epoch.",
        EachEpoch,
        optimizer=lambda p: torch.optim.Adam(p, 3e-4),
        schedule=factor(lambda epoch: 10.0 if epoch else 1.0),
    ),
    kind(
        "plateau on the validation loss",
        "ReduceLROnPlateau lowers the learning rate each epoch without an improvement.",
        Plateau,
        held_out=regression,
        steps=400,
    ),
    kind(
        "written by hand in on_train_batch_start",
        "The learning rate is written into the optimizer's groups before each batch.",
        ByHand,
    ),
    kind(
        "two optimizers with two schedules, by hand",
        "Manual optimization steps two optimizers and two schedules.",
        TwoSchedules,
    ),
    kind(
        "schedule-free averaging by hand",
        "An optimizer averages its iterates; gradients are taken near the average.",
        optimizer=lambda p: ScheduleFree(p, 0.1),
    ),
    kind(
        "sign descent by hand",
        "Each weight moves by the learning rate, whatever the size of its gradient.",
        optimizer=lambda p: SignSGD(p, 1e-3),
    ),
    kind(
        "Lion by hand",
        "The sign of a momentum is the update, with decoupled weight decay.",
        optimizer=lambda p: Lion(p, 1e-3),
    ),
    kind(
        "orthogonal updates by hand",
        "The momentum of each matrix is made orthogonal, as in Muon.",
        optimizer=lambda p: Orthogonal(p, 0.01),
        steps=150,
    ),
    kind(
        "Adam with a large epsilon",
        "Adam's epsilon is 1, which makes it a momentum method.",
        optimizer=lambda p: torch.optim.Adam(p, 0.5, eps=1.0),
    ),
    kind(
        "Rprop, full batches",
        "Rprop adapts a step size for each weight, on the same batch in every step.",
        optimizer=lambda p: torch.optim.Rprop(p, 1e-3),
        trainer=lambda: {"overfit_batches": 1},
    ),
    kind(
        "AMSGrad, fused",
        "Adam with the fused kernel and AMSGrad.",
        optimizer=lambda p: torch.optim.Adam(p, 3e-3, amsgrad=True, fused=True),
        schedule=lambda o: rates.CosineAnnealingLR(o, STEPS),
    ),
    kind(
        "learning rate as a tensor",
        "The learning rate is a tensor, as capturable and compiled optimizers need it.",
        optimizer=lambda p: torch.optim.Adam(p, torch.tensor(3e-3), foreach=False),
        schedule=lambda o: rates.CosineAnnealingLR(o, STEPS),
    ),
    kind(
        "RMSprop, centered",
        "RMSprop with momentum and centered second moments.",
        optimizer=lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
    ),
    kind(
        "Adafactor",
        "Adafactor, whose second moments are factored and whose step is relative.",
        optimizer=lambda p: torch.optim.Adafactor(p, 0.02),
        schedule=None,
    ),
)
