"""Kinds with a codebook: vector quantisation, whose codes are moved and restarted on purpose.

Imports Lightning and torch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.healthy.kind import WRITES, Kind
from benchmarks.healthy.networks import WriteCallback, Writing, clusters, mlp

CODES, DEPTH = 16, 4


class Quantiser(Writing):
    """An autoencoder with a vector-quantised bottleneck; the codebook has gradients.

    Args:
        straight_through: Passes gradients around the quantisation; always on in practice.
        **options: See `Writing`.
    """

    def __init__(self, **options: Any) -> None:
        nets = nn.ModuleDict({"encoder": mlp(8, DEPTH), "decoder": mlp(DEPTH, 8)})
        super().__init__(net=nets, **options)
        self.codes = nn.Parameter(torch.randn(CODES, DEPTH))
        self.register_buffer("used", torch.zeros(CODES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the errors of reconstruction, of the codes and of the commitment."""
        self._write_if_due("training_step", self.global_step)
        x = batch[0]
        z = self.net["encoder"](x)
        q = self.quantise(z)
        reconstruction = F.mse_loss(self.net["decoder"](z + (q - z).detach()), x)
        loss = reconstruction + 0.25 * F.mse_loss(z, q.detach()) + self.code_loss(q, z)
        return self.track(loss, reconstruction)

    def quantise(self, z: Tensor) -> Tensor:
        """Returns the nearest code of each vector, and counts the codes that are used."""
        nearest = torch.cdist(z.detach(), self.codes.detach()).argmin(1)
        self.latest = z.detach()
        with torch.no_grad():
            self.used.mul_(0.9).add_(torch.bincount(nearest, minlength=CODES), alpha=0.1)
        return self.codes[nearest]

    def code_loss(self, q: Tensor, z: Tensor) -> Tensor:
        """Pulls the codes to the vectors."""
        return F.mse_loss(q, z.detach())


def restart(module: Quantiser, count: int = CODES) -> None:
    """Replaces dead codes, at most so many, by vectors of the latest batch."""
    dead = (module.used < 0.1).nonzero()[:count, 0]
    chosen = module.latest[torch.randint(len(module.latest), (len(dead),))]
    with torch.no_grad():
        module.codes[dead] = chosen
    module.used[dead] = 1.0


def restart_through_data(module: Quantiser) -> None:
    """Does the same through ``parameter.data``, with noise."""
    dead = module.used < 0.1
    chosen = module.latest[torch.randint(len(module.latest), (CODES,))]
    noisy = chosen + 0.01 * torch.randn_like(chosen)
    module.codes.data = torch.where(dead[:, None], noisy, module.codes.data)
    module.used[dead] = 1.0


class AveragedQuantiser(Quantiser):
    """Moves its codes by running means of the vectors, in ``training_step``; no gradients.

    Args:
        as_buffer: Keeps the codes in a buffer instead of a frozen parameter.
        first_batch: Sets the codes to vectors of the first batch.
        **options: See `Writing`.
    """

    def __init__(self, as_buffer: bool, first_batch: bool = False, **options: Any) -> None:
        super().__init__(**options)
        codes = self.codes.detach().clone()
        if as_buffer:
            del self.codes
            self.register_buffer("codes", codes)
        else:
            self.codes.requires_grad_(False)
        self.register_buffer("sums", codes.clone())
        self.register_buffer("counts", torch.ones(CODES))
        self.first_batch = first_batch

    def quantise(self, z: Tensor) -> Tensor:
        """Moves the codes, then returns the nearest ones."""
        if self.first_batch and self.global_step == 0:
            self.codes.data.copy_(z.detach()[:CODES])
            self.sums.copy_(self.codes)
        self._move(z.detach())
        return super().quantise(z)

    @torch.no_grad()
    def _move(self, z: Tensor) -> None:
        chosen = F.one_hot(torch.cdist(z, self.codes).argmin(1), CODES).float()
        self.counts.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
        self.sums.mul_(0.9).add_(chosen.t() @ z, alpha=0.1)
        self.codes.data.copy_(self.sums / (self.counts + 1e-3)[:, None])

    def code_loss(self, q: Tensor, z: Tensor) -> Tensor:
        """Returns zero: the codes follow their means."""
        return q.new_zeros(())


def restart_means(module: AveragedQuantiser) -> None:
    """Restarts dead codes with their running means."""
    restart(module)
    module.sums.copy_(module.codes)
    module.counts.fill_(1.0)


def kind(name: str, practice: str, module: Any, **options: Any) -> Kind:
    return Kind(name=name, group=WRITES, practice=practice, module=module, data=clusters, **options)


KINDS = (
    kind(
        "VQ dead codes restarted every 25 steps, module hook",
        "Codes that no vector uses are replaced by vectors of the batch in `on_train_batch_end`.",
        partial(Quantiser, write=restart, every=25),
    ),
    kind(
        "VQ dead codes restarted every 10 steps, training_step",
        "Up to four unused codes are replaced in `training_step` every 10 steps.",
        partial(Quantiser, write=partial(restart, count=4), hook="training_step", every=10),
    ),
    kind(
        "VQ dead codes restarted each epoch, callback, .data",
        "A callback replaces unused codes through `.data` at the end of each epoch.",
        Quantiser,
        callbacks=lambda: [WriteCallback(restart_through_data, each_epoch=True)],
    ),
    kind(
        "VQ codes as running means in a buffer",
        "The codebook is a buffer that follows running means in `training_step`.",
        partial(AveragedQuantiser, as_buffer=True),
    ),
    kind(
        "VQ codes as running means in a frozen parameter",
        "The codebook is a parameter without gradient, moved by running means in `training_step`.",
        partial(AveragedQuantiser, as_buffer=False),
    ),
    kind(
        "VQ running means, first batch and restarts every 40 steps",
        "The codebook begins with vectors of the first batch, follows running means and restarts "
        "dead codes.",
        partial(
            AveragedQuantiser, as_buffer=False, first_batch=True, write=restart_means, every=40
        ),
    ),
)
