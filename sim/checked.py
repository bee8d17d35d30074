"""Objects from config nodes, every value checked against the annotation that receives it.

Hydra refuses unknown keys and takes values of any type; here `rate_rps: fast` becomes
`workload.rate_rps must be a number, got 'fast'`. Numbers are taken as YAML reads them: text that looks
like a number ("1e-3", which YAML 1.1 reads as text) is refused, not converted.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from enum import Enum
from traceback import extract_tb
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf

from sim.errors import keys_as, message, nearest

LARGEST_WHOLE = 2**63 - 1
"""What a column of whole numbers holds."""
INFINITE = {".inf": math.inf, "-.inf": -math.inf}
"""As YAML writes them, and configs are shown; the command line reads them as text."""
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def build(target: Callable[..., Any] | None, node: object, where: str, **given: object) -> Any:
    """Call `target` (None: what the node's `_target_` names) with the node's keys as arguments.

    `where` is the node's dotted key, for messages; `given` are arguments that no config can hold.
    Nodes inside are built in turn: by their own `_target_`, or as the dataclass that the annotation
    names. Raises ValueError for an unknown, missing or ill-typed key.
    """
    values = _plain(node)
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a group of keys, got {values!r}")
    values = dict(values)
    name = values.pop("_target_", None)
    if target is None:
        target = locate(name, where)
    parameters = inspect.signature(target).parameters
    try:
        hints = get_type_hints(_annotated(target))
    except NameError as error:
        told = f"an annotation of {target.__name__} names {error.name!r}, which is not imported when it runs"
        raise ValueError(f"{where}._target_: {told}") from error
    _check_keys(values, parameters, given, where)
    checked = {key: check(value, hints.get(key, Any), f"{where}.{key}") for key, value in values.items()}
    # What the target says of an argument of its own, or of a key within it, is said of the key that the user knows.
    own = {f"{name} ": f"{where}.{name} " for name in parameters}
    own |= {f"{name}.": f"{where}.{name}." for name, value in values.items() if isinstance(value, Mapping)}
    with keys_as(own):
        return target(**checked, **given)


def check(value: object, annotation: Any, where: str) -> Any:
    """`value` as `annotation` asks for it, or ValueError. A whole number passes as a number."""
    value = _plain(value)
    if isinstance(value, Mapping) and "_target_" in value:
        value = build(None, value, where)
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _check_union(value, get_args(annotation), annotation, where)
    if origin is Literal:
        return _require(value in get_args(annotation), value, annotation, where)
    if annotation is Any or annotation is object:
        return value
    if annotation is float:
        value = INFINITE.get(value, value) if isinstance(value, str) else value
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
        try:
            return float(_require(ok, value, annotation, where))
        except OverflowError:
            raise ValueError(f"{where} must be at most {sys.float_info.max:.2g}, got more") from None
    if annotation is int:
        whole: int = _require(
            isinstance(value, int) and not isinstance(value, bool), value, annotation, where
        )
        if whole > LARGEST_WHOLE:
            raise ValueError(f"{where} must be at most {LARGEST_WHOLE}, got more")
        return whole
    if annotation is None or annotation is type(None):
        return _require(value is None, value, type(None), where)
    if annotation in (bool, str):
        return _require(isinstance(value, annotation), value, annotation, where)
    return _check_container(value, annotation, origin or annotation, where)


def _check_container(value: Any, annotation: Any, kind: Any, where: str) -> Any:
    args = get_args(annotation)
    if kind is tuple and args and args[-1] is not Ellipsis:
        _require(isinstance(value, (list, tuple)) and len(value) == len(args), value, annotation, where)
        return tuple(check(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    if kind in (list, tuple, Sequence):
        _require(isinstance(value, (list, tuple)), value, annotation, where)
        items = [check(v, args[0] if args else Any, f"{where}[{i}]") for i, v in enumerate(value)]
        return items if kind is list else tuple(items)
    if kind in (dict, Mapping):
        _require(isinstance(value, Mapping), value, annotation, where)
        key_type, value_type = args or (Any, Any)
        return {check(k, key_type, where): check(v, value_type, f"{where}.{k}") for k, v in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [member.value for member in kind]
        return kind(_require(value in names, value, Literal[tuple(names)], where))
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
        return build(kind, value, where)
    # What is left is a class or a protocol: only a node with a `_target_` makes one.
    built = not isinstance(value, (Mapping, list, tuple, str, int, float, type(None)))
    return _require(built and all(hasattr(value, name) for name in _members(kind)), value, annotation, where)


def _members(protocol: Any) -> list[str]:
    """What an object of a protocol has; nothing is asked of one of a class."""
    if not getattr(protocol, "_is_protocol", False):
        return []
    return [
        name
        for base in protocol.__mro__
        if getattr(base, "_is_protocol", False)
        for name in {**vars(base), **inspect.get_annotations(base)}
        if not name.startswith("_")
    ]


def _check_union(value: object, options: tuple[Any, ...], annotation: Any, where: str) -> Any:
    inner = [option for option in options if option is not type(None)]
    if value is None and len(inner) < len(options):
        return None
    if len(inner) == 1 and isinstance(value, (Mapping, list)):
        return check(value, inner[0], where)
    # An exact type first, so that 3 stays whole under int | float.
    for option in sorted(inner, key=lambda option: option is not type(value)):
        try:
            return check(value, option, where)
        except ValueError:
            continue
    return _require(False, value, annotation, where)


def _require(ok: bool, value: Any, annotation: Any, where: str) -> Any:
    if not ok:
        raise ValueError(f"{where} must be {words(annotation)}, got {value!r}")
    return value


def words(annotation: Any) -> str:
    """An annotation as a user would say it."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(words(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: " + ", ".join(words(arg) for arg in args)
    if (origin or annotation) in (list, tuple, Sequence):
        return f"a list, each item {words(args[0])}" if args else "a list"
    if (origin or annotation) in (dict, Mapping) or is_dataclass(annotation):
        return "a group of keys"
    return f"a node whose _target_ makes a {getattr(annotation, '__name__', annotation)}"


def _check_keys(
    values: Mapping[str, object],
    parameters: Mapping[str, inspect.Parameter],
    given: Mapping[str, object],
    where: str,
) -> None:
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in given
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in values:
        if key not in named and not takes_any:
            known = ", ".join(named) or "none"
            raise ValueError(f"{where} has no key {key!r}{nearest(str(key), named)}; known: {known}")
    missing = [n for n, p in named.items() if p.default is p.empty and n not in values]
    if missing:
        *most, last = (f"{where}.{name}" for name in missing)
        told = f"{', '.join(most)} and {last} are missing; they" if most else f"{last} is missing; it"
        raise ValueError(f"{told} must be given")


def _plain(node: object) -> object:
    """A config node as plain dicts and lists, interpolations resolved."""
    if isinstance(node, (DictConfig, ListConfig)):
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    return node


def _annotated(target: Callable[..., Any]) -> Callable[..., Any]:
    """What holds the annotations of `target`'s arguments: a dataclass or named tuple itself."""
    if isinstance(target, type) and not (is_dataclass(target) or hasattr(target, "_fields")):
        return target.__init__  # type: ignore[misc, no-any-return]
    return target


def locate(name: object, where: str) -> Callable[..., Any]:
    """The class or function of a `_target_`; ValueError says why there is none."""
    if not isinstance(name, str):
        raise ValueError(f"{where}._target_ must name a class, got {name!r}")
    module, _, attribute = name.rpartition(".")
    if not module or module.startswith("."):
        raise ValueError(f"{where}._target_ must be MODULE.CLASS, got {name!r}")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            path = "" if "." in str(error.name) else "; is its folder on PYTHONPATH?"
            raise ValueError(
                f"{where}._target_ names a module that does not exist: {name!r}{path}"
            ) from error
        # A package that the module itself imports and that is not installed is another matter.
        if message(error) is not None:
            raise
        raise ValueError(f"{where}._target_ {name!r} cannot be imported: {_place(error)}") from error
    except Exception as error:
        raise ValueError(f"{where}._target_ {name!r} cannot be imported: {_place(error)}") from error
    if not hasattr(found, attribute):
        known = [key for key, value in vars(found).items() if isinstance(value, type)]
        raise ValueError(f"{where}._target_ names nothing that exists: {name!r}{nearest(attribute, known)}")
    target = getattr(found, attribute)
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        raise ValueError(f"{where}._target_ must name a class or function, got {name!r}")
    return target


def _place(error: Exception) -> str:
    """`FILE, line N: what` of an error in a module that is imported; without a place where Python has none to tell."""
    if isinstance(error, SyntaxError):
        place, what = (error.filename, error.lineno), f"not Python: {error.msg}"
    else:
        # The first frame is that of `locate`, the next ones are the import's own.
        machinery = ("<frozen importlib", str(importlib.__file__))
        frames = [f for f in extract_tb(error.__traceback__)[1:] if not f.filename.startswith(machinery)]
        place = (frames[-1].filename, frames[-1].lineno) if frames else (None, None)
        what = f"{type(error).__name__}: {error}"
    return what if None in place else f"{place[0]}, line {place[1]}: {what}"
