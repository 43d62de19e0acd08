"""Debugging checks for a translation model whose loss falls but which does not translate.

Each check takes a model and a batch and changes neither: the difference between train and eval
mode, teacher forcing against free decoding, leaks of the future or of padding through the masks,
and the activation norm of each layer.

Shape suffixes: B batch, S source length, T target length, V vocabulary size, L sequence length,
D model dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.translation.decoding import greedy_decode
from models.translation.transformer import Transformer


class SentenceAccuracy(NamedTuple):
    """Shares of sentences without an error, from 0 to 1."""

    teacher_forced: float
    """Each token is predicted from the reference prefix."""
    free_running: float
    """Each token is predicted from the model's own prefix (greedy decoding)."""


@torch.no_grad()
def train_eval_gap(model: Transformer, source_BS: Tensor, target_BT: Tensor) -> float:
    """Returns the largest difference of logits between train and eval mode; 0 without dropout."""
    with _mode(model, training=True):
        train_logits_BTV = model(source_BS, target_BT)
    with _mode(model, training=False):
        return float((train_logits_BTV - model(source_BS, target_BT)).abs().max())


@torch.no_grad()
def sentence_accuracy(model: Transformer, source_BS: Tensor, target_BT: Tensor) -> SentenceAccuracy:
    """Compares teacher forcing with free decoding on targets from bos to eos.

    A model that is right under teacher forcing and wrong in free decoding has learnt to continue
    the target, not to translate: check the source mask and the loss of the first token.
    """
    pad_id = model.config.pad_id
    expected_BT = target_BT[:, 1:]
    counted_BT = expected_BT != pad_id
    with _mode(model, training=False):
        predicted_BT = model(source_BS, target_BT[:, :-1]).argmax(dim=-1)
        decoded_BT = greedy_decode(model, source_BS, max_length=expected_BT.shape[1]).tokens_BT
    forced_B = ((predicted_BT == expected_BT) | ~counted_BT).all(dim=-1)
    padded_BT = torch.full_like(expected_BT, pad_id)
    padded_BT[:, : decoded_BT.shape[1]] = decoded_BT
    free_B = (padded_BT == expected_BT).all(dim=-1)
    return SentenceAccuracy(float(forced_B.float().mean()), float(free_B.float().mean()))


@torch.no_grad()
def check_masking(
    model: Transformer, source_BS: Tensor, target_BT: Tensor, *, tolerance: float = 1e-4
) -> None:
    """Checks that neither future target tokens nor padding change a logit.

    Raises:
        ValueError: A later target token, or padding added to the source, changes an earlier
            logit; the message names it and the size of the change.
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
                f"{cause} changes earlier logits by {float(change.abs().max()):.3g}, so a mask is "
                f"wrong: True must mean 'may attend' everywhere (see masks.py)"
            )


@torch.no_grad()
def activation_norms(model: Transformer, source_BS: Tensor, target_BT: Tensor) -> dict[str, float]:
    """Returns the mean L2 norm of the activations at a position, for each layer by module name.

    Norms that grow from layer to layer are an early sign of exploding activations; norms that are
    equal to the last digit mean that the layers add nothing.
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
    """Sets the mode of every module and restores the previous modes on exit."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training
