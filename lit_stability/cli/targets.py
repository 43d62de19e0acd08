"""Which classes a config may build.

A config is code: what a `_target_` names is imported and called. A typing error, or a config from
somewhere else, must not be able to call anything at all, such as `subprocess.run`. So a target is
accepted if one of these holds:

* it is a subclass of a class that the option is annotated with, such as `Callback`;
* it is a part of a training run: a subclass of one of `COMPONENTS`, a dataclass, an enum, or a
  class of this package, or of the package of the class that it is an option of;
* it matches `LISTED`, or the user has allowed it on the command line: `--allow package.function`.

A classmethod, such as `MyModel.load_from_checkpoint`, counts as its class. Functions are accepted
only if they are listed or allowed. What can be refused by its name, or by reading the source, is
refused before anything is imported.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import argparse
import ast
import enum
import fnmatch
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from lit_stability.lightning_choice import LIGHTNING_ROOTS

_OF_LIGHTNING = frozenset(
    {
        "lightning.fabric.accelerators.accelerator.Accelerator",
        "lightning.fabric.loggers.logger.Logger",
        "lightning.fabric.plugins.environments.cluster_environment.ClusterEnvironment",
        "lightning.fabric.plugins.io.checkpoint_io.CheckpointIO",
        "lightning.fabric.plugins.precision.precision.Precision",
        "lightning.fabric.strategies.strategy.Strategy",
        "lightning.pytorch.callbacks.callback.Callback",
        "lightning.pytorch.core.datamodule.LightningDataModule",
        "lightning.pytorch.core.module.LightningModule",
        "lightning.pytorch.plugins.layer_sync.LayerSync",
        "lightning.pytorch.profilers.profiler.Profiler",
        "lightning.pytorch.strategies.strategy.Strategy",
        "lightning.pytorch.trainer.trainer.Trainer",
    }
)
"""The package `pytorch_lightning` has the same classes, under other names."""

COMPONENTS = frozenset(
    {
        *_OF_LIGHTNING,
        *(
            name.replace("lightning.pytorch.", "pytorch_lightning.").replace(
                "lightning.fabric.", "lightning_fabric."
            )
            for name in _OF_LIGHTNING
        ),
        "torch.nn.modules.module.Module",
        "torch.optim.lr_scheduler.LRScheduler",
        "torch.optim.optimizer.Optimizer",
        "torch.utils.data.dataloader.DataLoader",
        "torch.utils.data.dataset.Dataset",
        "torch.utils.data.sampler.Sampler",
        "transformers.configuration_utils.PreTrainedConfig",
        "transformers.configuration_utils.PretrainedConfig",
        "transformers.tokenization_utils_base.PreTrainedTokenizerBase",
    }
)
"""Base classes of what a training run consists of, by name: this file imports none of them."""

LISTED = (
    *("datetime.timedelta", "pathlib.Path", "torch.device"),
    *("timm.create_model", "torchvision.models.*", "torchvision.transforms.*"),
    *("transformers.*.from_pretrained", "transformers.*.from_config"),
)
"""Patterns of other targets that a config may call; a ``*`` matches one name."""

_LIBRARIES = frozenset({"torch", "builtins", *LIGHTNING_ROOTS})
"""Packages that are too large for all their classes to be trusted because one of them is."""
_OPEN = ("abc", "builtins", "collections", "collections.abc", "typing")
"""Modules whose classes say nothing about what an object is, such as `Iterable`."""


@dataclass(frozen=True)
class Rules:
    """What applies to the options of one target.

    Args:
        allowed: patterns of targets that the user allows.
        package: top-level package of the class whose options they are.
    """

    allowed: tuple[str, ...] = ()
    package: str = ""

    def below(self, target: Any) -> Rules:
        """Returns the rules for the options of a target."""
        return Rules(self.allowed, package_of(target))

    def accepts(self, name: str, target: Any = None) -> bool:
        """Returns whether a target is accepted by its name, whatever it is.

        Args:
            name: in the config.
            target: what it is; None before it is imported. A listed name must not lead to a
                function of another package, which a module may have imported.

        >>> Rules().accepts("torchvision.models.resnet18"), Rules().accepts("os.system")
        (True, False)
        """
        if any(_matches(name, pattern) for pattern in self.allowed):
            return True
        listed = any(_matches(name, pattern) for pattern in LISTED)
        return listed and (target is None or package_of(target) == name.partition(".")[0])


def package_of(target: Any) -> str:
    """Returns the top-level package in which a class or function is defined."""
    return str(getattr(target, "__module__", "") or "").partition(".")[0]


def refusal(target: Any, name: str, kinds: Sequence[Any], rules: Rules) -> str | None:
    """Returns why a config may not build a target; None if it may.

    Args:
        target: the imported class, classmethod or function.
        name: its name in the config.
        kinds: the classes that the option is annotated with; other annotations accept anything.
        rules: what applies here.
    """
    if rules.accepts(name, target):
        return None
    owner = target if inspect.isclass(target) else getattr(target, "__self__", None)
    if not inspect.isclass(owner):
        return _FUNCTION.format(name=name)
    closed = [kind for kind in kinds if inspect.isclass(kind) and kind is not object]
    specific = [kind for kind in closed if kind.__module__ not in _OPEN]
    if any(_is_subclass(owner, kind) for kind in specific):
        return None
    if _is_component(owner) or package_of(owner) == "lit_stability":
        return None
    if package_of(owner) == rules.package and rules.package not in _LIBRARIES:
        return None
    return _OTHER.format(name=name)


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Adds the option with which a user allows targets.

    Args:
        parser: of a command that builds a config.
    """
    parser.add_argument(
        "--allow",
        metavar="TARGET",
        action="append",
        default=[],
        help="also build this class, or call this function, if the config names it; * matches one "
        "part of a dotted name",
    )


def refusals(plain: Any, allowed: Sequence[str] = ()) -> list[str]:
    """Returns one line for each target of a config that is refused before anything is imported.

    Args:
        plain: a resolved config.
        allowed: patterns of targets that the user allows.
    """
    rules = Rules(tuple(allowed))
    return [
        f"{path}: {problem}"
        for path, name in _targets(plain, "")
        if not rules.accepts(name) and (problem := _early_refusal(name))
    ]


_FUNCTION = "is a function; a config builds classes. If it is yours, use --allow {name}"
_OTHER = (
    "is no part of a training run, and its option is not annotated with it; annotate the option, "
    "or use --allow {name}"
)
_STANDARD = "is of Python's standard library, of which a config builds nothing"


def _targets(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yields place and name of every target."""
    if isinstance(value, dict):
        if "_target_" in value:
            dot = f"{path}." if path else ""
            yield f"{dot}_target_={value['_target_']}", str(value["_target_"])
        for key, each in value.items():
            yield from _targets(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from _targets(each, f"{path}[{i}]")


def _early_refusal(name: str) -> str | None:
    parts = name.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return None  # an error of its own, when the name is looked up
    if parts[0] in sys.stdlib_module_names:
        return _STANDARD
    return _FUNCTION.format(name=name) if _is_function(parts) else None


def _is_function(parts: Sequence[str]) -> bool:
    """Returns whether the source defines a plain function of this name, without importing it."""
    source, rest = _source_of(parts)
    if source is None or len(rest) != 1:
        return False
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [n for n in tree.body if isinstance(n, kinds) and n.name == rest[0]]
    # A decorator may return anything, also a class.
    return bool(found) and not isinstance(found[-1], ast.ClassDef) and not found[-1].decorator_list


def _source_of(parts: Sequence[str]) -> tuple[Path | None, Sequence[str]]:
    """Returns the file of the module that a dotted name starts with, and the rest of the name."""
    places: Any = None
    source: Path | None = None
    for i in range(len(parts)):
        try:
            spec = PathFinder.find_spec(".".join(parts[: i + 1]), places)
        except (ImportError, ValueError, OSError):
            spec = None
        if spec is None:
            return source, parts[i:]
        origin = spec.origin or ""
        source = Path(origin) if origin.endswith(".py") else None
        places = spec.submodule_search_locations
        if places is None:
            return source, parts[i + 1 :]
    return source, ()


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    if len(parts) != len(wanted):
        return False
    return all(fnmatch.fnmatchcase(*pair) for pair in zip(parts, wanted, strict=True))


def _is_subclass(owner: Any, kind: Any) -> bool:
    try:
        return issubclass(owner, kind)
    except TypeError:  # a protocol with attributes
        return False


def _is_component(owner: type) -> bool:
    if is_dataclass(owner) or issubclass(owner, enum.Enum):
        return True
    return any(f"{base.__module__}.{base.__qualname__}" in COMPONENTS for base in owner.__mro__)
