"""The configuration of a run, composed from YAML files.

A later file overrides an earlier one, and `KEY=VALUE` overrides come last:

* mappings merge key by key, and keep the order in which a key first appeared;
* a mapping with another `_target_` than the mapping it overrides replaces it completely, because
  options of one class have no meaning for another; `_replace_: true` does the same;
* everything else replaces, including lists and null;
* `about` and `expect` describe the file's own experiment, and are not inherited by a file that
  composes it.

May import OmegaConf, but neither torch nor lightning.
"""

import contextlib
import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from lit_stability.cli.instantiate import suggest
from lit_stability.errors import ConfigError
from lit_stability.lightning_choice import choose_lightning, trainer_module

RUN_DIR = "runs/${experiment}"
"""Default of `run_dir`; the command `fit` adds a folder for each run."""
_OWN = ("about", "expect")
_TOO_DEEP = "nested too deeply; lists and mappings may be nested about 100 times"
_KEY = re.compile(r"[^\s=.\[\]]+(\.[^\s=.\[\]]+)*")


def compose(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> DictConfig:
    """Merges config files in order, then `KEY=VALUE` overrides, over the defaults of a run.

    Args:
        files: Paths, with or without `.yaml`, relative to the current folder or its `configs/`.
            The first one gives the name of the experiment, unless a file sets it.
        overrides: `dotted.key=value`, the value in YAML.

    Raises:
        ConfigError: A file is missing or not a YAML mapping, or an override is malformed.
    """
    places = [Path.cwd(), Path.cwd() / "configs"]
    merged: Any = {"experiment": Path(files[0]).stem if files else "unnamed"} | _defaults()
    for name in files:
        merged = _merge(merged, _load(_find(str(name), places)))
    merged = _merge(merged, _parse(overrides))
    try:
        return DictConfig(_without_marks(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    except RecursionError as error:
        raise ConfigError(f"{', '.join(map(str, files))}: {_TOO_DEEP}") from error


def _defaults() -> dict[str, Any]:
    logger = f"{trainer_module(choose_lightning())}.loggers.TensorBoardLogger"
    return {
        "run_dir": RUN_DIR,
        "logger": {"_target_": logger, "save_dir": "${run_dir}", "name": "", "version": ""},
    }


def resolve(config: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """Returns a config as plain containers with every `${...}` replaced.

    Raises:
        ConfigError: An interpolation cannot be resolved.
    """
    try:
        resolved: Any = OmegaConf.to_container(DictConfig(config), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    except RecursionError as error:
        raise ConfigError(f"config: {_TOO_DEEP}") from error
    return {str(key): value for key, value in resolved.items()}


def as_written(config: Mapping[str, Any] | DictConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a config as it is written to files, and the values of the environment in it.

    Interpolations are replaced, except for those with a value from the environment, which may be a
    secret: they stay expressions, and get their value again when the file is read.

    Args:
        config: The composed config.

    Returns:
        The config, and the expression of each value of the environment.

    Raises:
        ConfigError: An interpolation cannot be resolved.
    """
    resolved, raw = resolve(config), OmegaConf.to_container(DictConfig(config))
    values: dict[str, str] = {}
    try:
        with _environment_as_expressions(values):
            kept = resolve(config)
    except ConfigError:
        # An interpolation depends on the value itself, as in ${${oc.env:MODE}.lr}.
        return ({str(k): v for k, v in raw.items()} if isinstance(raw, dict) else {}), values
    written = _unresolved(resolved, kept, raw, values)
    return dict(written), values


@contextlib.contextmanager
def _environment_as_expressions(values: dict[str, str]) -> Iterator[None]:
    """Makes `${oc.env:NAME}` its own value, and collects the real ones of variables that are set.

    Args:
        values: Value -> expression; filled when interpolations are resolved.
    """

    def expression(*words: Any) -> str:
        text = f"${{oc.env:{', '.join(_quoted(word) for word in words)}}}"
        found = os.environ.get(str(words[0])) if words else None
        if found:
            values[found] = text
        return text

    _set_resolver("oc.env", expression)
    try:
        yield
    finally:
        _set_resolver("oc.env", oc.env)


def _set_resolver(name: str, resolver: Any) -> None:
    """Replaces a resolver of OmegaConf, whose function for that got another name in version 2.4."""
    new = "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    register = OmegaConf.register_resolver if new else OmegaConf.register_new_resolver
    register(name, resolver, replace=True)


def _quoted(word: Any) -> str:
    plain = isinstance(word, str) and re.fullmatch(r"[A-Za-z_]\w*", word)
    return word if plain else json.dumps(word)


def _unresolved(resolved: Any, kept: Any, raw: Any, values: dict[str, str]) -> Any:
    """Returns resolved values, with the expression in place of those from the environment.

    Args:
        resolved: With the values.
        kept: With expressions in their place; another structure if a value became a container.
        raw: As written in the files, where that is at the same place.
        values: Receives texts that contain a value of the environment.
    """
    if isinstance(resolved, dict) and isinstance(kept, dict):
        inner = raw if isinstance(raw, dict) else {}
        return {
            key: _unresolved(each, kept.get(key), inner.get(key), values)
            for key, each in resolved.items()
        }
    if isinstance(resolved, list) and isinstance(kept, list) and len(resolved) == len(kept):
        items = raw if isinstance(raw, list) and len(raw) == len(kept) else [None] * len(kept)
        triples = zip(resolved, kept, items, strict=True)
        return [_unresolved(*each, values) for each in triples]
    if repr(resolved) == repr(kept):
        return resolved
    written = raw if isinstance(raw, str) else kept
    if isinstance(resolved, str) and any(value in resolved for value in values):
        values[resolved] = str(kept)
    return written


def _first_line(error: OmegaConfBaseException) -> str:
    return f"{error.full_key or 'config'}: {str(error).splitlines()[0]}"


def _find(name: str, places: Sequence[Path]) -> Path:
    tried = [place / each for place in places for each in (name, f"{name}.yaml")]
    for path in tried:
        # Not `is_file`, which raises for a name that the file system cannot hold.
        if os.path.isfile(path):
            return path.resolve()
    roots = [place for place in places if place.name == "configs"]
    known = [
        path.relative_to(root).with_suffix("").as_posix()
        for root in roots
        for path in root.rglob("*.yaml")
    ]
    raise ConfigError(
        f"{name}: no such config file{suggest(name, known)}\n  tried "
        + "\n  tried ".join(str(path) for path in tried)
    )


def read_own(path: Path) -> dict[str, Any]:
    """Returns the content of a config file, without the files that it composes.

    Raises:
        ConfigError: The file is not a YAML mapping.
    """
    try:
        own: Any = OmegaConf.to_container(OmegaConf.load(path))
    except RecursionError as error:
        raise ConfigError(f"{path}:{_deepest_line(path)}: {_TOO_DEEP}") from error
    # A ValueError is for text that is not UTF-8, and for integers with thousands of digits.
    except (OSError, yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path}: not a YAML mapping: {error}") from error
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: expected a mapping of options, got a {type(own).__name__}")
    return {str(key): value for key, value in own.items()}


def _deepest_line(path: Path) -> int:
    """Returns the line at which a YAML file is nested most deeply, without recursion."""
    depth, deepest, line = 0, 0, 1
    with path.open(encoding="utf8") as file:
        for event in yaml.parse(file, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > deepest and event.start_mark is not None:
                deepest, line = depth, event.start_mark.line + 1
    return line


def _load(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a file and merges it over the files that it composes."""
    if path in above:
        raise ConfigError(f"{path}: composes itself, through {above[-1]}")
    own: Any = read_own(path)
    names = own.pop("compose", None) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: compose={names!r}: expected a list of file names")
    places = [*[root for root in path.parents if root.name == "configs"][:1], path.parent]
    merged: Any = {}
    for name in names:
        below = _load(_find(name, places), (*above, path))
        merged = _merge(merged, {key: each for key, each in below.items() if key not in _OWN})
    return dict(_merge(merged, own))


def _merge(old: Any, new: Any) -> Any:
    """Merges `new` over `old` by the rules in the module docstring."""
    if not isinstance(new, dict):
        return new
    below = old if isinstance(old, dict) and not new.get("_replace_") else {}
    if "_target_" in new and below.get("_target_", new["_target_"]) != new["_target_"]:
        below = {}
    return below | {key: _merge(below.get(key), value) for key, value in new.items()}


def _without_marks(value: Any) -> Any:
    """Removes `_replace_` keys, which are needed until the last file is merged."""
    if not isinstance(value, dict):
        return value
    return {key: _without_marks(each) for key, each in value.items() if key != "_replace_"}


def _parse(overrides: Sequence[str]) -> Any:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text}: expected KEY=VALUE; to add a config file use -c {text}")
        if not _KEY.fullmatch(key):
            raise ConfigError(f"{text}: {key!r} is not a dotted key, such as trainer.max_steps")
        if not value:
            raise ConfigError(f"{text}: no value; write {key}=null or {key}='\"\"'")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except RecursionError as error:
        raise ConfigError(f"{' '.join(overrides)[:80]}: {_TOO_DEEP}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{' '.join(overrides)}: not YAML: {error}") from error
