"""Questions to put to a translation model that trains and does not translate.

Each takes a model and a batch, changes neither, and answers in plain numbers: is the model the
same in train and in eval mode; does it write by itself what it knows under teacher forcing; does
the decoder see the future or the padding; in which layer do activations die or explode.

Letters of the shape suffixes: B batch, S source, T target, D model width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.translation.decoding import greedy_decode
from models.translation.transformer import Transformer


class Recall(NamedTuple):
    """Shares of sentences, from 0 to 1, that come out without an error."""

    forced: float
    """Each next token guessed from the right beginning (teacher forcing)."""
    free: float
    """The whole sentence written from the model's own beginning (greedy decoding)."""


@torch.no_grad()
def mode_gap(model: Transformer, source_BS: Tensor, target_BT: Tensor) -> float:
    """Measure the largest difference of logits between train and eval mode; 0 without dropout."""
    with _mode(model, training=True):
        trained = model(source_BS, target_BT)
    with _mode(model, training=False):
        return float((trained - model(source_BS, target_BT)).abs().max())


@torch.no_grad()
def recall(model: Transformer, source_BS: Tensor, target_BT: Tensor) -> Recall:
    """Compare teacher forcing with free decoding on targets that begin with bos and end in eos.

    A model that is right when forced and wrong when free has learnt to continue, not to
    translate: look at the mask of the source, and at the loss of the first token.
    """
    pad_id = model.config.pad_id
    expected_BT = target_BT[:, 1:]
    counts_BT = expected_BT != pad_id
    with _mode(model, training=False):
        guess_BT = model(source_BS, target_BT[:, :-1]).argmax(dim=-1)
        written_BT = greedy_decode(model, source_BS, max_length=expected_BT.shape[1]).tokens_BT
    forced_B = ((guess_BT == expected_BT) | ~counts_BT).all(dim=-1)
    padded_BT = torch.full_like(expected_BT, pad_id)
    padded_BT[:, : written_BT.shape[1]] = written_BT
    free_B = (padded_BT == expected_BT).all(dim=-1)
    return Recall(float(forced_B.float().mean()), float(free_B.float().mean()))


@torch.no_grad()
def check_masking(
    model: Transformer, source_BS: Tensor, target_BT: Tensor, *, tolerance: float = 1e-4
) -> None:
    """Prove that neither the future nor padding reaches a logit.

    Raises:
        ValueError: A later target token, or padding added to the source, changes an earlier
            logit; the message says which and by how much.
    """
    pad_id = model.config.pad_id
    other_BT = target_BT.clone()
    other_BT[:, -1] = torch.where(target_BT[:, -1] == pad_id + 1, pad_id + 2, pad_id + 1)
    padded_BS = torch.cat((source_BS, torch.full_like(source_BS[:, :1], pad_id)), dim=1)
    with _mode(model, training=False):
        logits_BTV = model(source_BS, target_BT)
        leaks = {
            "the last target token": (logits_BTV - model(source_BS, other_BT))[:, :-1],
            "padding of the source": logits_BTV - model(padded_BS, target_BT),
        }
    for cause, change in leaks.items():
        if change.numel() and not float(change.abs().max()) <= tolerance:
            raise ValueError(
                f"{cause} changes earlier logits by {float(change.abs().max()):.3g}, which no mask "
                f"of this package allows: True must mean 'may attend' throughout (see masks.py)"
            )


@torch.no_grad()
def activation_norms(model: Transformer, source_BS: Tensor, target_BT: Tensor) -> dict[str, float]:
    """Measure the mean L2 norm of a position's activation, by encoder and decoder layer.

    The names are those of `named_modules`. Norms that grow from layer to layer foretell an
    explosion, norms that stay equal to the last digit a stack that is bypassed.
    """
    norms: dict[str, float] = {}

    def record(name: str) -> None:
        def hook(_module: nn.Module, _inputs: object, out_BLD: Tensor) -> None:
            norms[name] = float(out_BLD.norm(dim=-1).mean())

        handles.append(model.get_submodule(name).register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for stack in ("encoder", "decoder"):
        for i in range(len(model.get_submodule(f"{stack}.layers")._modules)):
            record(f"{stack}.layers.{i}")
        record(f"{stack}.norm")
    try:
        with _mode(model, training=False):
            model(source_BS, target_BT)
    finally:
        for handle in handles:
            handle.remove()
    return norms


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Set the mode of every module, and give each its own back."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training
