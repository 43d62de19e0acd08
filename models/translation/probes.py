"""What the translation network may and must see, for the checks before the first step.

Ids cannot be changed where the masks are made from them; what is embedded there can. Each probe
changes the embedding of some positions and says at which target positions the logits may not, or
must, follow. May import `lit_stability.checks.preflight`; no Lightning.

Letters of the shape suffixes: B batch, S source, T target read, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_stability.checks.preflight import MaskProbe, PositionProbe, nudged
from models.translation.batches import Batch
from models.translation.transformer import Transformer

Pick = Callable[[nn.Module], Transformer]
"""Finds the network in the module that is checked."""


def translation_probes(batch: Batch, pad_id: int, pick: Pick) -> list[MaskProbe | PositionProbe]:
    """Declare the probes of a batch.

    Source padding and the future of the target are hidden from every logit; each logit follows
    the source; a token that is read is seen by its own logit and by all later ones. Padding of the
    target is behind every logit that counts, so the future covers it.

    Args:
        batch: Padded ids.
        pad_id: Token id of padding.
        pick: Finds the network.
    """
    source_BS, target_BT = batch.source_BS, batch.target_BT[:, :-1]
    counts_BT = target_BT != pad_id
    middle = max(1, target_BT.shape[1] // 2)
    late_BT = torch.arange(target_BT.shape[1], device=target_BT.device).expand_as(target_BT)
    run = _Run(pick, source_BS, target_BT)
    padding_BS = source_BS == pad_id
    probes: list[MaskProbe | PositionProbe] = [
        run.probe("the source", "source", ~padding_BS, seen=counts_BT, where="source mask"),
        run.probe(
            f"target token {middle}",
            "target",
            (late_BT == middle) & counts_BT,
            hidden=counts_BT & (late_BT < middle),
            seen=counts_BT & (late_BT >= middle),
            where="target mask",
        ),
        _positions("source embedding", pick, "source", source_BS),
        _positions("target embedding", pick, "target", target_BT),
    ]
    if bool(padding_BS.any()):
        probes.append(
            run.probe(
                "padding of the source", "source", padding_BS, hidden=counts_BT, where="source mask"
            )
        )
    return probes


class _Run:
    """Runs the network on a batch, with some embedded positions changed or as it is."""

    def __init__(self, pick: Pick, source_BS: Tensor, target_BT: Tensor) -> None:
        self._pick, self._source_BS, self._target_BT = pick, source_BS, target_BT

    def probe(
        self,
        name: str,
        side: str,
        positions: Tensor,
        *,
        hidden: Tensor | None = None,
        seen: Tensor | None = None,
        where: str,
    ) -> MaskProbe:
        """Build the probe that changes the embedding of one side at some positions."""

        def plain(model: nn.Module) -> Tensor:
            return self._logits(model, contextlib.nullcontext())

        def changed(model: nn.Module) -> Tensor:
            embedding = self._pick(model).get_submodule(f"{side}_embedding")
            return self._logits(model, nudged(embedding, positions))

        return MaskProbe(
            name=name, plain=plain, changed=changed, hidden=hidden, seen=seen, where=where
        )

    def _logits(self, model: nn.Module, context: contextlib.AbstractContextManager[None]) -> Tensor:
        with context:
            logits_BTV: Tensor = self._pick(model)(self._source_BS, self._target_BT)
        return logits_BTV


def _positions(name: str, pick: Pick, side: str, ids_BL: Tensor) -> PositionProbe:
    def tokens(model: nn.Module) -> Tensor:
        network = pick(model)
        embedded_BLD: Tensor = network.get_submodule(f"{side}_embedding")(ids_BL)
        factor = math.sqrt(network.config.d_model) if network.config.scale_embedding else 1.0
        return embedded_BLD * factor

    return PositionProbe(
        name=name,
        tokens=tokens,
        positions=lambda model: pick(model).positions_LD[: ids_BL.shape[1]],
    )
