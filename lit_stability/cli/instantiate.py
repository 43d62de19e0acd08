"""Checks the targets of a config against their signatures before anything is built.

Imports neither torch nor Lightning, which come with the targets.
"""

import collections.abc as abc
import difflib
import enum
import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

from lit_stability.cli.targets import Rules, refusal
from lit_stability.lightning_choice import mixed_packages

_LISTS: dict[Any, Callable[[list[Any]], Any]] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    abc.Sequence: list,
    abc.Iterable: list,
    abc.Collection: list,
}
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
_MISS = object()


@dataclass(frozen=True)
class Build:
    """A class or function with its checked options, not called yet."""

    target: Callable[..., Any]
    options: dict[str, Any]
    path: str


def bind(
    target: Callable[..., Any],
    options: dict[str, Any],
    path: str,
    bad: list[str],
    rules: Rules | None = None,
) -> Build:
    """Checks options against a target's signature, including nested targets and dataclasses.

    A target with `**kwargs` accepts any option; an option without annotation accepts any value, but
    not every nested target, see `lit_stability.cli.targets`.

    Args:
        target: A class or function.
        options: Its keyword arguments, as plain containers.
        path: Position of the options in the config; empty for the top level.
        bad: List to which one line per problem is appended.
        rules: Which targets the user allows.
    """
    rules = (rules or Rules()).below(target)
    known, takes_any = _parameters(target)
    label = f"{target.__module__}.{target.__qualname__}"
    dot, checked = f"{path}." if path else "", {}
    for key, value in options.items():
        if key not in known and not takes_any:
            hint = suggest(str(key), known)
            bad.append(f"{dot}{key}={_show(value)}: unknown option of {label}{hint}")
        expected, default = known.get(key, (Any, inspect.Parameter.empty))
        unset = value is None and default is None  # `width: int = None`
        checked[key] = None if unset else convert(value, expected, f"{dot}{key}", bad, rules)
    for key, (_, default) in known.items():
        if default is inspect.Parameter.empty and key not in options:
            bad.append(f"{dot}{key}: missing; {label} requires it")
    return Build(target, checked, path)


def convert(value: Any, expected: Any, path: str, bad: list[str], rules: Rules) -> Any:
    """Converts a value to the type of its annotation, with every target in it as a `Build`.

    Args:
        value: Plain containers and scalars.
        expected: The annotation; if it cannot be checked, any value is accepted.
        path: Position of the value in the config.
        bad: List to which one line per problem is appended.
        rules: Which targets may be built here.
    """
    if value == "???":
        bad.append(f"{path}: has no value; set it in a config file or with {path}=VALUE")
        return value
    members = _members(expected)
    if isinstance(value, dict) and "_target_" in value:
        return _plan(value, members, path, bad, rules)
    partial: list[tuple[Any, list[str]]] = []
    for member in sorted(members, key=lambda member: type(value) is not member):
        found: list[str] = []
        result = _match(value, member, path, found, rules)
        if result is not _MISS and not found:
            return result
        if result is not _MISS:
            partial.append((result, found))
    result, found = partial[0] if partial else (value, [_mismatch(value, members, path)])
    bad.extend(found)
    return result


def _match(value: Any, expected: Any, path: str, bad: list[str], rules: Rules) -> Any:
    """Converts the value to an annotation that is not a union; returns `_MISS` if impossible."""
    kind, parts = get_origin(expected) or expected, get_args(expected)
    if kind is Literal:
        same = (type(choice) is type(value) and choice == value for choice in parts)
        return value if any(same) else _MISS
    if kind is float and type(value) in (int, str):
        try:  # YAML 1.1 reads a quoted 3e-4, or one without a sign, as a string
            return float(value)
        except ValueError:
            return _MISS
    if kind in (bool, int, float, str):  # exact type, because True is an instance of int
        return value if type(value) is kind else _MISS
    if kind in _LISTS and isinstance(value, list):
        return _match_list(value, kind, parts, path, bad, rules)
    if kind in _MAPPINGS and isinstance(value, dict):
        inner = parts[1] if parts else Any
        return {
            key: convert(item, inner, f"{path}.{key}", bad, rules) for key, item in value.items()
        }
    if kind in _LISTS or kind in _MAPPINGS:  # a str is an instance of Sequence
        return _MISS
    if not _is_checkable(kind):
        is_container = isinstance(value, list | dict)
        return _match(value, type(value), path, bad, rules) if is_container else value
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        return bind(kind, value, path, bad, rules)
    if issubclass(kind, enum.Enum) and value in kind.__members__:
        return kind[value]
    if isinstance(value, kind):
        return value
    return Path(value) if isinstance(value, str) and issubclass(Path, kind) else _MISS


def _match_list(
    value: list[Any], kind: Any, parts: Any, path: str, bad: list[str], rules: Rules
) -> Any:
    if kind is tuple and parts and parts[-1] is not Ellipsis:
        if len(parts) != len(value):
            return _MISS
        inner = list(parts)
    else:
        inner = [parts[0] if parts else Any] * len(value)
    pairs = zip(value, inner, strict=True)
    return _LISTS[kind](
        [convert(item, want, f"{path}[{i}]", bad, rules) for i, (item, want) in enumerate(pairs)]
    )


def _plan(
    value: dict[str, Any], members: Sequence[Any], path: str, bad: list[str], rules: Rules
) -> Any:
    name = value["_target_"]
    target = _import(name, path, bad)
    if target is None:
        return value
    kinds = [get_origin(member) or member for member in members]
    problem = _mismatched(target, kinds, members) or refusal(target, str(name), kinds, rules)
    if problem is not None:
        bad.append(f"{path}._target_={name}: {problem}")
        return value
    options = {key: value[key] for key in value if key != "_target_"}
    return bind(target, options, path, bad, rules)


def _mismatched(target: Any, kinds: Sequence[Any], members: Sequence[Any]) -> str | None:
    """Returns what an option expects if a class cannot be it; functions may return anything."""
    closed = [kind for kind in kinds if _is_checkable(kind)]
    # A literal is a plain value, which no target builds.
    others = [kind for kind in kinds if kind is not Literal and not _is_checkable(kind)]
    if not inspect.isclass(target) or others or any(issubclass(target, kind) for kind in closed):
        return None
    mixed = mixed_packages(target)
    return f"expected {_name(members)}" + (f"; this is one of {mixed}" if mixed else "")


def _import(name: Any, path: str, bad: list[str]) -> Any:
    """Returns the class or function at a dotted path, or None with the reason in `bad`."""
    parts, where, tried = str(name).split("."), f"{path}._target_={name}", []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return bad.append(f"{where}: expected a dotted path, such as package.module.Class")
    for cut in range(len(parts) - 1, 0, -1):
        tried.append(".".join(parts[:cut]))
        try:
            found: Any = importlib.import_module(tried[-1])
        except ModuleNotFoundError as error:
            if f"{tried[-1]}.".startswith(f"{error.name}."):
                continue
            return bad.append(f"{where}: importing {tried[-1]} failed: {error}")
        except Exception as error:  # any error in the module's code is reported for this line
            return bad.append(f"{where}: importing {tried[-1]} failed: {error!r}")
        for part in parts[cut:]:
            if not hasattr(found, part):
                hint = suggest(part, dir(found))
                return bad.append(f"{where}: {found.__name__} has no {part}{hint}")
            found = getattr(found, part)
        if inspect.isclass(found) or inspect.isfunction(found) or inspect.ismethod(found):
            return found
        return bad.append(f"{where}: is a {type(found).__name__}, not a class or function")
    return bad.append(f"{where}: cannot be imported; tried the modules {', '.join(tried)}")


def _parameters(target: Callable[..., Any]) -> tuple[dict[str, tuple[Any, Any]], bool]:
    """Returns (annotation, default) by keyword argument, and whether any other is accepted."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:  # some classes written in C have no signature
        return {}, True
    call = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    scope = getattr(call, "__globals__", {})
    known = {
        each.name: (_annotation(each.annotation, scope), each.default)
        for each in parameters
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    return known, any(each.kind is each.VAR_KEYWORD for each in parameters)


def _annotation(written: Any, scope: dict[str, Any]) -> Any:
    if not isinstance(written, str):
        return Any if written is inspect.Parameter.empty else written
    try:
        return eval(written, scope)
    except Exception:  # a name imported for type checkers only: this option is not checked
        return Any


def _members(expected: Any) -> list[Any]:
    """Returns the flat members of a union, with `Annotated` and `NewType` removed."""
    if get_origin(expected) in (Union, types.UnionType):
        return [member for part in get_args(expected) for member in _members(part)]
    if get_origin(expected) is Annotated:
        return _members(get_args(expected)[0])
    if hasattr(expected, "__supertype__"):
        return _members(expected.__supertype__)
    return [types.NoneType if expected is None else expected]


def _is_checkable(kind: Any) -> bool:
    special = getattr(kind, "_is_protocol", False) or is_typeddict(kind)
    return inspect.isclass(kind) and kind not in (object, Any) and not special


def _mismatch(value: Any, members: Sequence[Any], path: str) -> str:
    near = difflib.get_close_matches(str(value), map(str, _choices(members)), n=1)
    quote = str in members and not isinstance(value, list | dict)
    hint = f"; did you mean {near[0]}?" if near else "; quote it" if quote else ""
    return f"{path}={_show(value)}: expected {_name(members)}, got {type(value).__name__}{hint}"


def _choices(members: Sequence[Any]) -> list[Any]:
    literals = [each for one in members if get_origin(one) is Literal for each in get_args(one)]
    enums = [one for one in members if inspect.isclass(one) and issubclass(one, enum.Enum)]
    return literals + [name for one in enums for name in one.__members__]


def _name(members: Sequence[Any]) -> str:
    """Describes annotations as text: `int or null or one of 'a', 'b'`."""
    words = []
    for member in members:
        kind, parts = get_origin(member) or member, get_args(member)
        if kind is types.NoneType:
            words.append("null")
        elif kind in (bool, int, float, str):
            words.append(kind.__name__)
        elif kind in _LISTS:
            inner = ", ".join(_name(_members(part)) for part in parts if part is not Ellipsis)
            words.append(f"list of {inner}" if inner else "list")
        elif kind in _MAPPINGS or is_dataclass(kind):
            words.append("mapping")
        elif not _choices([member]):
            words.append(f"a mapping whose _target_ is a {getattr(kind, '__name__', kind)}")
    choices = ", ".join(repr(each) for each in _choices(members))
    return " or ".join([*words, f"one of {choices}"] if choices else words)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def suggest(word: str, choices: Iterable[object]) -> str:
    """Returns `; did you mean X?`, or the choices if none is similar and they are few."""
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; choose from {', '.join(sorted(names))}" if 0 < len(names) <= 15 else ""
