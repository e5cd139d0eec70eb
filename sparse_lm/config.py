"""Typed configuration: frozen dataclasses are the one source of defaults, and a bad value stops before any compute.

A configuration is a tree of `Config` dataclasses, each standing beside the code that it configures. `option` declares
a default with its bounds; `from_dict` and `to_config_dict` go between the tree and `ml_collections.ConfigDict`; every
fault is a `ConfigError` that names the key, the value and the way out.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from ml_collections import config_dict

KIND = "kind"  # the key that chooses among the variants of a field, for example model.moe.router.kind


class ConfigError(ValueError):
    """A configuration that must not run. Attributes: `key` (dotted), `value`, `why` (the reason and the way out)."""

    def __init__(self, key: str, value: Any, why: str):
        super().__init__(f"config.{key}={value!r}: {why}")
        self.key, self.value, self.why = key, value, why

    def under(self, prefix: str) -> ConfigError:
        """The same fault, named from one level further out."""
        return ConfigError(f"{prefix}.{self.key}", self.value, self.why)


def option(
    default: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    variants: Mapping[str, type] | None = None,
) -> Any:
    """A dataclass field with inclusive (`ge`, `le`) or exclusive (`gt`, `lt`) bounds, or a table of kinds."""
    metadata = {"bounds": {"ge": ge, "gt": gt, "le": le, "lt": lt}, "variants": variants}
    return dataclasses.field(default=default, metadata=metadata)


class Config:
    """Base of every configuration dataclass: checks types and bounds on construction, then `check`."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = coerce(getattr(self, field.name), hints[field.name], field.name, field.metadata.get("variants"))
            _check_bounds(field.name, value, field.metadata.get("bounds") or {})
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Raises `ConfigError` when fields contradict each other. Overridden where there is something to check."""

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; a dotted name such as `moe__top_k` is written with two underscores."""
        nested: dict[str, dict[str, Any]] = {}
        flat: dict[str, Any] = {}
        for name, value in changes.items():
            head, _, rest = name.partition("__")
            if rest:
                nested.setdefault(head, {})[rest] = value
            else:
                flat[head] = value
        flat |= {head: getattr(self, head).replace(**rest) for head, rest in nested.items()}
        return dataclasses.replace(self, **flat)  # type: ignore[type-var]


def python_file(path: Path) -> types.ModuleType | None:
    """What a Python file of the user's own, such as those in configs/, defines; None where there is no such file."""
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_dict(cls: type, values: Mapping[str, Any] | config_dict.ConfigDict) -> Any:
    """Builds a `Config` from nested mappings; keys left out take their defaults.

    Raises `ConfigError` on an unknown key (naming the closest known one), a wrong type, a value out of bounds, or
    fields that contradict each other.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    built = {}
    for key, value in values.items():
        if key == KIND and value == getattr(cls, KIND, None):
            continue
        if key not in fields:
            raise ConfigError(key, value, f"unknown key; {closest(key, fields)}")
        built[key] = coerce(value, hints[key], key, fields[key].metadata.get("variants"))
    return cls(**built)


def closest(word: str, known: typing.Iterable[str]) -> str:
    """A hint at the known word that looks most like `word`, followed by all of them."""
    names = sorted(str(name) for name in known)
    match = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return (f"did you mean {match[0]!r}? " if match else "") + f"known: {', '.join(names)}"


def coerce(value: Any, hint: Any, key: str, variants: Mapping[str, type] | None = None) -> Any:
    """`value` as the type `hint` asks for; raises `ConfigError` naming `key` when it is of another type."""
    if isinstance(value, config_dict.ConfigDict):
        value = value.to_dict()
    if variants is not None and isinstance(value, Mapping):
        kind = str(value.get(KIND))
        if kind not in variants:
            raise ConfigError(f"{key}.{KIND}", kind, closest(kind, variants))
        return _nested(variants[kind], value, key)
    if variants is not None and not (value is None and type(None) in typing.get_args(hint)):
        if not isinstance(value, tuple(variants.values())):
            raise ConfigError(key, value, f"expected one of the kinds {', '.join(sorted(variants))}")
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [arg for arg in args if arg is not type(None)]
        return coerce(value, inner, key)
    if origin is Literal:
        if value not in args:
            raise ConfigError(key, value, closest(str(value), args))
        return value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise ConfigError(key, value, "expected a tuple")
        return tuple(coerce(item, args[0], f"{key}[{i}]") for i, item in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, Config):
        if isinstance(value, Mapping):
            return _nested(hint, value, key)
        if not isinstance(value, hint):
            raise ConfigError(key, value, f"expected a {hint.__name__} or a mapping of its fields")
        return value
    return _scalar(value, hint, key)


def _nested(cls: type, value: Mapping[str, Any], key: str) -> Any:
    try:
        return from_dict(cls, value)
    except ConfigError as error:
        raise error.under(key) from None


def _scalar(value: Any, hint: Any, key: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(key, value, f"expected {hint.__name__}, got {type(value).__name__}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(key, value, "expected a finite number; leave an option out or set it to None to turn it off")
    return value


_BOUNDS = {
    "ge": (lambda value, bound: value >= bound, "at least"),
    "gt": (lambda value, bound: value > bound, "greater than"),
    "le": (lambda value, bound: value <= bound, "at most"),
    "lt": (lambda value, bound: value < bound, "less than"),
}


def _check_bounds(key: str, value: Any, bounds: Mapping[str, float | None]) -> None:
    for name, bound in bounds.items():
        holds, words = _BOUNDS[name]
        if bound is not None and value is not None and not holds(value, bound):
            raise ConfigError(key, value, f"must be {words} {bound}")


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as nested plain dictionaries, ready for JSON; variants carry their `kind`."""
    out: dict[str, Any] = {}
    if hasattr(type(config), KIND):
        out[KIND] = getattr(config, KIND)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, tuple):
            value = list(value)
        out[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return out


def dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their whole names, such as model.moe.top_k."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        key: value
        for name, item in tree.items()
        for key, value in dotted(item, f"{prefix}.{name}" if prefix else name).items()
    }


def to_config_dict(config: Any) -> config_dict.ConfigDict:
    """The tree as a `ConfigDict` for `config_flags`; an option that is off keeps its type, so that flags can set it."""
    out = config_dict.ConfigDict()
    hints = typing.get_type_hints(type(config))
    if hasattr(type(config), KIND):
        out[KIND] = getattr(config, KIND)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif value is None:
            (inner,) = [arg for arg in typing.get_args(hints[field.name]) if arg is not type(None)]
            is_config = isinstance(inner, type) and issubclass(inner, Config)
            value = None if is_config else config_dict.placeholder(str if typing.get_origin(inner) else inner)
        out[field.name] = value
    return out
