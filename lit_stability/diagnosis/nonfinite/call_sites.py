"""The place in the program where a kernel runs: torch function, module and source line.

In the forward pass it is read from the Python stack. The backward pass has no Python stack, so each
node of the autograd graph is labelled with its call when it is created. May import torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_stability.diagnosis.nonfinite.origin import Phase
from lit_stability.measurement.tensor_tree import tensors_in

_LIBRARIES = tuple(
    f"{folder}/" for folder in (Path(torch.__file__).parent, Path(__file__).parents[2])
)
_PASSIVE = frozenset({"__get__", "__set__", "__delete__", "backward", "grad", "_set_grad_enabled"})
"""Functions that compute nothing themselves."""
_COMPOSITE = frozenset({"multi_head_attention_forward"})
"""Functions of many kernels: the name of the kernel says more."""
_OPERATORS = {"truediv": "div", "getitem": "index", "setitem": "index_put"}


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the program."""

    op: str = ""
    """Torch function; "" if only the kernel is known."""
    module: str = ""
    file: str = ""
    line: int = 0
    phase: Phase = "forward"


class CallSites(TorchFunctionMode):
    """Tracks the current call, and the call that created each autograd node, while it is entered.

    Args:
        model: provides the paths of modules; a module outside of it counts as its caller's code.
        on_leaf: called with each leaf tensor in which gradients would accumulate.
    """

    def __init__(self, model: nn.Module, on_leaf: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._named = list(model.named_modules())
        self._paths = {id(m): path for path, m in self._named}
        self._on_leaf = on_leaf
        self._modules: list[str] = []
        self._function: str | None = None
        self._handles: list[Any] = []
        self._floor: FrameType | None = None
        self._key = object()

    def __enter__(self) -> CallSites:
        """Starts tracking calls of functions and modules."""
        self._floor = sys._getframe(1)
        for path, module in self._named:
            if not isinstance(module, torch.jit.ScriptModule):
                enter = partial(self._enter_module, path)
                self._handles += [
                    module.register_forward_pre_hook(enter, prepend=True),
                    module.register_forward_hook(self._leave_module, always_call=True),
                ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stops tracking."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._floor = None

    def _enter_module(self, path: str, module: nn.Module, args: Any) -> None:
        self._modules.append(path)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._label_unknown(_nodes(_tensors(_leaves(output))))
        self._modules.pop()

    @property
    def _module(self) -> str:
        return self._modules[-1] if self._modules else ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a torch function and labels the autograd nodes that it creates."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _PASSIVE:
            return func(*args, **kwargs)
        given = _tensors([*args, *kwargs.values()])
        self._label_unknown(_nodes(given))
        outer, self._function = self._function, _function_name(name)
        try:
            out = func(*args, **kwargs)
            for tensor in given:
                if tensor.is_leaf and tensor.requires_grad:
                    self._on_leaf(tensor)
            # An in-place operation gives its tensor a new node.
            self._label(_nodes([*_tensors([out]), *given]), self._site(self._function))
        finally:
            self._function = outer
        return out

    def _label_unknown(self, nodes: Iterable[Any]) -> None:
        """Labels nodes that no watched function made: custom Functions, or autograd itself."""
        for node in nodes:
            if self._key not in node.metadata:
                node.metadata[self._key] = self._site("")

    def _label(self, nodes: Iterable[Any], site: Site) -> None:
        todo = list(nodes)
        while todo:
            node = todo.pop()
            # Nodes of leaves outlive the step.
            if node is None or hasattr(node, "variable"):
                continue
            if self._key not in node.metadata:
                node.metadata[self._key] = site
                todo.extend(parent for parent, _ in node.next_functions)

    def here(self) -> Site:
        """Returns the place in the program of the kernel that is running."""
        node = torch._C._current_autograd_node()
        label: Site | None = _metadata(node).get(self._key) if node is not None else None
        if self._function is None and label is not None and not _is_custom(node):
            return replace(label, op=label.op or _node_name(node), phase="backward")
        site = self._site(self._function or "")
        if node is not None:  # in a custom backward, the kernels say more than its name
            op = site.op or ("" if _is_custom(node) else _node_name(node))
            site = replace(site, phase="backward", op=op)
        if label is None:
            return site
        module = site.module if self._modules else label.module
        line = (site.file, site.line) if site.file else (label.file, label.line)
        return replace(site, module=module, file=line[0], line=line[1])

    def _site(self, op: str) -> Site:
        frame = next(self.frames(), None)
        if frame is None:
            return Site(op, self._module)
        # A method that is called directly runs in its module too, but no hook is called.
        owner = self._paths.get(id(frame.f_locals.get("self")), "")
        is_below = owner.startswith(f"{self._module}." if self._module else "")
        module = owner if owner and is_below else self._module
        return Site(op, module, frame.f_code.co_filename, frame.f_lineno)

    def frames(self) -> Iterator[FrameType]:
        """Yields the frames outside of torch and this package, the innermost first."""
        return (f for f in self._all_frames() if not _is_library(f.f_code.co_filename))

    def _all_frames(self) -> Iterator[FrameType]:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._floor:
            yield frame
            frame = frame.f_back


@lru_cache(maxsize=4096)
def _is_library(file: str) -> bool:
    return file.startswith((*_LIBRARIES, "<frozen", "<eval_with_key"))


def _metadata(node: Any) -> dict[Any, Any]:
    data: dict[Any, Any] = node.metadata
    return data


def _is_custom(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _leaves(output: Any) -> list[Any]:
    if isinstance(output, dict):
        return list(output.values())
    if isinstance(output, (Tensor, list, tuple)):
        return [output]
    return list(tensors_in(output))


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Returns the tensors among values, and one level down in lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


def _nodes(tensors: Iterable[Tensor]) -> list[Any]:
    return [node for t in tensors if (node := t.grad_fn) is not None]


@lru_cache(maxsize=1024)
def _function_name(name: str) -> str:
    """Returns torch's name of a function, in-place or reflected operator; "" for a composite."""
    plain = name.strip("_")
    if name.startswith("__"):
        # __rtruediv__ and __itruediv__ are divisions.
        plain = re.sub("^[ri](?=truediv|div|pow|sub|add|mul|matmul)", "", plain)
    return "" if plain in _COMPOSITE else _OPERATORS.get(plain, plain)


def _node_name(node: Any) -> str:
    """Returns the operation of an autograd node: ``SqrtBackward0`` is ``sqrt``."""
    name = re.sub(r"Backward\d*$", "", node.name().rsplit("::")[-1])
    return kernel_name(re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower())


@lru_cache(maxsize=1024)
def kernel_name(name: str) -> str:
    """Returns what a kernel computes, such as ``softmax`` for ``_softmax_backward_data``."""
    name = re.sub("^(native|fused|safe|to)_", "", name.strip("_")).removesuffix("_forward")
    if name.startswith("scaled_dot_product"):
        return "scaled_dot_product_attention"
    return re.sub("_backward(_data)?$", "", name)
