"""Mask and position probes of the translation network for `lit_stability.Preflight`.

The masks are computed from the token ids, so a probe does not change ids: it changes the embedding
of some positions and states at which target positions the logits must stay equal or must change.
Imports `lit_stability.checks.preflight`, not Lightning.

Shape suffixes: B batch, S source length, T length of the decoder input, L either length,
D model dimension, V vocabulary size.
"""

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_stability.checks.preflight import MaskProbe, PositionProbe, nudged
from models.translation.batches import Batch
from models.translation.transformer import Transformer

GetNetwork = Callable[[nn.Module], Transformer]
"""Returns the network inside the module that is checked."""


def translation_probes(
    batch: Batch, pad_id: int, get_network: GetNetwork
) -> list[MaskProbe | PositionProbe]:
    """Creates the probes of a batch.

    No logit may depend on source padding or on later target tokens. Each logit must depend on the
    source and on its own and earlier input tokens. Target padding comes after every counted
    position, so the probe of later tokens covers it.

    Args:
        batch: Padded ids.
        pad_id: Token id of padding.
        get_network: Returns the network inside the checked module.
    """
    source_BS, target_BT = batch.source_BS, batch.target_BT[:, :-1]
    counted_BT = target_BT != pad_id
    middle = max(1, target_BT.shape[1] // 2)
    position_BT = torch.arange(target_BT.shape[1], device=target_BT.device).expand_as(target_BT)
    factory = _MaskProbeFactory(get_network, source_BS, target_BT)
    padding_BS = source_BS == pad_id
    probes: list[MaskProbe | PositionProbe] = [
        factory.probe("the source", "source", ~padding_BS, seen=counted_BT, where="source mask"),
        factory.probe(
            f"target token {middle}",
            "target",
            (position_BT == middle) & counted_BT,
            hidden=counted_BT & (position_BT < middle),
            seen=counted_BT & (position_BT >= middle),
            where="target mask",
        ),
        _position_probe("source embedding", get_network, "source", source_BS),
        _position_probe("target embedding", get_network, "target", target_BT),
    ]
    if bool(padding_BS.any()):
        probes.append(
            factory.probe(
                "padding of the source",
                "source",
                padding_BS,
                hidden=counted_BT,
                where="source mask",
            )
        )
    return probes


class _MaskProbeFactory:
    """Creates probes that run the network on one batch, with and without changed embeddings."""

    def __init__(self, get_network: GetNetwork, source_BS: Tensor, target_BT: Tensor) -> None:
        self._get_network, self._source_BS, self._target_BT = get_network, source_BS, target_BT

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
        """Creates a probe that changes the source or target embedding at some positions."""

        def plain(model: nn.Module) -> Tensor:
            return self._logits(model, contextlib.nullcontext())

        def changed(model: nn.Module) -> Tensor:
            embedding = self._get_network(model).get_submodule(f"{side}_embedding")
            return self._logits(model, nudged(embedding, positions))

        return MaskProbe(
            name=name, plain=plain, changed=changed, hidden=hidden, seen=seen, where=where
        )

    def _logits(self, model: nn.Module, context: contextlib.AbstractContextManager[None]) -> Tensor:
        with context:
            logits_BTV: Tensor = self._get_network(model)(self._source_BS, self._target_BT)
        return logits_BTV


def _position_probe(name: str, get_network: GetNetwork, side: str, ids_BL: Tensor) -> PositionProbe:
    def tokens(model: nn.Module) -> Tensor:
        network = get_network(model)
        embedded_BLD: Tensor = network.get_submodule(f"{side}_embedding")(ids_BL)
        factor = math.sqrt(network.config.d_model) if network.config.scale_embedding else 1.0
        return embedded_BLD * factor

    return PositionProbe(
        name=name,
        tokens=tokens,
        positions=lambda model: get_network(model).positions_LD[: ids_BL.shape[1]],
    )
