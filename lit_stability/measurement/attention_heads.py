"""Measures each head of every attention of a forward pass, and finds its projections.

Works on the calls of functions, above autograd, so that gradients show where queries come from; an
`AttentionMonitor` sees kernels, below it. Found are `scaled_dot_product_attention`,
`torch.nn.MultiheadAttention`, and a softmax over a recent product of queries and keys (``matmul``,
``bmm``, ``baddbmm`` or ``einsum``). May import torch.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lit_stability.measurement.attention_logits import head_logits, head_logits_of_scores
from lit_stability.measurement.attention_projections import (
    Linear,
    Projection,
    Untraceable,
    trace_projection,
    weight_view,
)
from lit_stability.measurement.running_modules import RunningModules

_RECENT_PRODUCTS, _RECENT_LINEARS = 4, 64
"""How many are remembered; keys of a cross-attention may be projected long before they are used."""
_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "baddbmm", "einsum"})

Place: TypeAlias = tuple[str, int]
"""Name of the innermost module that runs an attention, and its number among those there."""


@dataclass(frozen=True)
class HeadWeights:
    """The projections of an attention, and which heads share them."""

    query: Projection
    key: Projection
    query_groups: tuple[int, ...]
    """For each query head the number of its rows in ``query``."""
    key_groups: tuple[int, ...]
    """For each query head the number of its key's rows in ``key``."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of query heads and of key heads, as the attention gets them."""
        return len(self.query.rows), len(self.key.rows)


@dataclass
class _Attention:
    """Queries and keys of one call, with the graph; shapes ``(batch, heads, positions, width)``."""

    query: Tensor
    key: Tensor
    logits: Callable[[], Tensor]
    """Computes the largest absolute logit of each query head."""
    trace: Callable[[], HeadWeights]


class AttentionHeads(TorchFunctionMode):
    """Context manager that measures each head and changes no result.

    An attention that cannot be measured or traced is skipped, and `failed` has the reason.

    Args:
        model: gives the module names; it must not be compiled.
        modules: names of the modules whose attentions count, see `attention_monitor.fitting`.
        known: the attentions whose projections are known already; those found are added.
        trace: whether to look for projections; it keeps the outputs of linear layers meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: frozenset[str],
        known: dict[Place, HeadWeights],
        *,
        trace: bool,
    ) -> None:
        super().__init__()
        self._running, self._fitting = RunningModules(model), modules
        self._known, self._tracing = known, trace
        self.logits: dict[Place, Tensor] = {}
        """Largest absolute logit of each query head, on its device."""
        self.failed: dict[Place, Untraceable] = {}
        """Why the projections of an attention are not known."""
        self._linears: deque[Linear] = deque(maxlen=_RECENT_LINEARS)
        self._products: deque[tuple[tuple[int, int], Tensor, Tensor]] = deque(
            maxlen=_RECENT_PRODUCTS
        )
        self._counts: dict[str, int] = {}

    def __enter__(self) -> AttentionHeads:
        """Registers the module hooks and enters the mode."""
        self._running.follow()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Ends the measurement."""
        self.stop()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Ends the measurement before the exit; the mode stays entered but is inert."""
        self._running.stop()
        self._linears.clear()
        self._products.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function and, if it belongs to an attention, measures that."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self._running.followed:
            return func(*args, **kwargs)
        if name == "softmax":
            self._guarded(lambda: self._softmax(args, kwargs))
        elif name == "scaled_dot_product_attention":
            self._guarded(lambda: self._fused(*args, **kwargs))
        elif name == "multi_head_attention_forward":
            self._guarded(lambda: self._multi_head(args, kwargs))
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            if name in _PRODUCTS:
                self._guarded(lambda: self._product(name, args, kwargs, out))
            if self._tracing:
                self._linear(name, args, kwargs, out)
        return out

    def _guarded(self, look: Callable[[], None]) -> None:
        """Looks at a call; what fails must never end a run."""
        if self._running.innermost not in self._fitting:
            return
        try:
            look()
        except Exception as error:
            place = self._running.innermost, self._counts.get(self._running.innermost, 0)
            self.failed[place] = Untraceable(f"it cannot be measured ({error!r})")

    def _linear(self, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
        if name == "linear":
            weight, bias = _argument(args, kwargs, 1, "weight"), _argument(args, kwargs, 2, "bias")
            self._linears.append(Linear(out, weight, bias, 0))
        elif name == "addmm" and not kwargs and len(args) == 3 and args[0].dim() == 1:
            self._linears.append(Linear(out, args[2], args[0], 1))
        elif name in ("matmul", "__matmul__", "mm") and len(args) == 2 and args[1].dim() == 2:
            self._linears.append(Linear(out, args[1], None, 1))

    def _product(self, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
        if name == "einsum":
            pair = _einsum_operands(*args)
        else:
            pair = tuple(args[-2:] if name == "baddbmm" else args[:2])
            if len(pair) < 2 or min(pair[0].dim(), pair[1].dim()) < 3:
                return
            pair = pair[0], pair[1].transpose(-2, -1)
        if pair is not None:
            self._products.append(((out.numel(), out.shape[-1]), *pair))

    def _softmax(self, args: Any, kwargs: Any) -> None:
        scores, dim = args[0] if args else kwargs["input"], _argument(args, kwargs, 1, "dim")
        if dim not in (-1, scores.dim() - 1) or scores.dim() < 3:
            return
        shape = scores.numel(), scores.shape[-1]
        pair = next((pair for known, *pair in reversed(self._products) if known == shape), None)
        if pair is not None:
            query, key = map(_with_batch, pair)
            logits, trace = partial(head_logits_of_scores, scores), partial(self._trace, query, key)
            self._attention(_Attention(query, key, logits, trace))

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> None:
        logits = partial(
            head_logits, query, key, attn_mask, is_causal=is_causal, scale=more.get("scale")
        )
        q, k, v = map(_with_batch, (query, key, value))
        self._attention(_Attention(q, k, logits, partial(self._trace, q, k, v)))

    def _multi_head(self, args: Any, kwargs: Any) -> None:
        given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
        call = _MultiHead(given)
        with torch.no_grad():
            q, k = call.heads()
        logits = partial(head_logits, q, k, call.open_positions(q, k))
        self._attention(_Attention(q, k, logits, call.trace))

    def _attention(self, found: _Attention) -> None:
        path = self._running.innermost
        place = path, self._counts.get(path, 0)
        self._counts[path] = place[1] + 1
        if min(found.query.numel(), found.key.numel()) == 0 or _is_captured(found.query):
            return
        known = self._known.get(place)
        heads = found.query.shape[1], found.key.shape[1]
        if known is not None and known.shape != heads:
            self._known.pop(place)
        if place not in self._known:
            if not self._tracing:
                self.failed[place] = Untraceable("it did not run before", for_now=True)
                return
            try:
                self._known[place] = found.trace()
            except Untraceable as reason:
                self.failed[place] = reason
                return
        with torch.no_grad(), torch.autocast(found.query.device.type, enabled=False):
            self.logits[place] = found.logits()

    def _trace(self, query: Tensor, key: Tensor, value: Tensor | None = None) -> HeadWeights:
        linears = list(self._linears)
        queries = trace_projection(query, linears, "queries")
        keys = trace_projection(key, linears, "keys")
        if value is not None and value.requires_grad:
            _check_apart(keys, trace_values(value, linears), "values")
        _check_apart(queries, keys, "keys")
        return head_weights(queries, keys)


def head_weights(queries: Projection, keys: Projection) -> HeadWeights:
    """Returns the weights of an attention whose key heads may serve several query heads each.

    Raises:
        Untraceable: if heads share some rows and not all.
    """
    by_query, by_key = queries.groups(), keys.groups()
    each = len(by_query) // len(by_key)
    return HeadWeights(queries, keys, by_query, tuple(g for g in by_key for _ in range(each)))


def trace_values(value: Tensor, linears: list[Linear]) -> Projection | None:
    """Returns the projection of the values; None if there is none, as where they are normalised."""
    try:
        return trace_projection(value, linears, "values")
    except Untraceable:
        return None


def _check_apart(one: Projection, other: Projection | None, what: str) -> None:
    """Checks that two projections share no row, as what scales one would scale the other too."""
    if other is None or one.weights[0].key != other.weights[0].key:
        return
    if bool((one.rows.any(0) & other.rows.any(0)).any()):
        raise Untraceable(f"its {what} come from the same rows as other parts of it")


class _MultiHead:
    """What `torch.nn.functional.multi_head_attention_forward` projects, from its arguments."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self._heads: int = given["num_heads"]
        self._width: int = given["query"].shape[-1]
        self._separate = bool(given.get("use_separate_proj_weight"))

    def heads(self) -> tuple[Tensor, Tensor]:
        """Computes queries and keys in float32, shape ``(batch, heads, positions, width)``."""
        given, bias, d = self._given, self._given["in_proj_bias"], self._width
        packed = given["in_proj_weight"]
        weights = (
            (given["q_proj_weight"], given["k_proj_weight"])
            if self._separate
            else (packed[:d], packed[d : 2 * d])
        )
        biases = (None, None) if bias is None else (bias[:d], bias[d : 2 * d])
        made = []
        with torch.autocast(given["query"].device.type, enabled=False):
            for x, w, b in zip((given["query"], given["key"]), weights, biases, strict=True):
                y = F.linear(x.float(), w.float(), None if b is None else b.float())
                y = y[:, None] if y.dim() == 2 else y
                made.append(y.view(*y.shape[:2], self._heads, -1).permute(1, 2, 0, 3))
        return made[0], made[1]

    def open_positions(self, query: Tensor, key: Tensor) -> Tensor | None:
        """Returns True where a query may attend, shape ``(batch, heads, queries, keys)``."""
        shape = (*query.shape[:-1], key.shape[-2])
        mask, padding = self._given.get("attn_mask"), self._given.get("key_padding_mask")
        found = []
        if mask is not None:
            mask = ~mask if mask.dtype == torch.bool else mask > -1e3
            found.append(mask.reshape(shape) if mask.dim() == 3 else mask.expand(shape))
        if padding is not None:
            padding = ~padding if padding.dtype == torch.bool else padding > -1e3
            found.append(padding.reshape(-1, 1, 1, shape[-1]).expand(shape))
        return torch.stack(found).all(0) if found else None

    def trace(self) -> HeadWeights:
        """Returns the rows of each head, which the function's documentation lays down."""
        given, d = self._given, self._width
        rows = torch.eye(self._heads, dtype=torch.bool).repeat_interleave(d // self._heads, 1)
        bias = given["in_proj_bias"]
        parts = []
        for i, name in enumerate(("q_proj_weight", "k_proj_weight")):
            weight = given[name] if self._separate else given["in_proj_weight"][i * d : (i + 1) * d]
            views = [weight_view(weight, 0)]
            if bias is not None:
                views.append(weight_view(bias[i * d : (i + 1) * d], 0))
            parts.append(Projection(tuple(views), rows))
        return head_weights(*parts)


def _einsum_operands(equation: Any, *tensors: Any) -> tuple[Tensor, Tensor] | None:
    """Returns queries and keys of a product of heads, in the usual order of dimensions."""
    tensors = tensors[0] if len(tensors) == 1 else tensors
    if not isinstance(equation, str) or "." in equation or len(tensors) != 2:
        return None
    terms, _, out = equation.replace(" ", "").partition("->")
    left, right = terms.split(",")
    summed = [x for x in left if x in right and x not in out]
    if len(out) < 3 or len(summed) != 1:
        return None
    lead, q, k = out[:-2], out[-2], out[-1]
    wanted = [f"{lead}{q}{summed[0]}", f"{lead}{k}{summed[0]}"]
    if sorted(left) != sorted(wanted[0]) or sorted(right) != sorted(wanted[1]):
        return None
    ordered = [
        tensor.permute([term.index(x) for x in order])
        for tensor, term, order in zip(tensors, (left, right), wanted, strict=True)
    ]
    return ordered[0], ordered[1]


def _argument(args: Any, kwargs: Any, place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _with_batch(tensor: Tensor) -> Tensor:
    return tensor[None] if tensor.dim() == 3 else tensor.flatten(0, -4)


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
