"""The one strict way from YAML and `KEY=VALUE` overrides to a frozen dataclass, and back to plain data.

Every key is a field; an unknown key, a wrong type or a value that a dataclass refuses is a UserError that says where.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from rfbench.errors import UserError, did_you_mean


def load_plain(source: Path | dict[str, Any], overrides: Sequence[str] | Mapping[str, Any], kind: type) -> dict[str, Any]:
    """A YAML file or parsed YAML with overrides applied, interpolations resolved, not yet checked against the schema."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    where = source if isinstance(source, Path) else kind.__name__.lower()
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
    try:
        merged: Any = OmegaConf.load(source) if isinstance(source, Path) else OmegaConf.create(source)
        for override in overrides:
            key, equals, _ = override.partition("=")
            if not equals:
                raise UserError(f"'{override}' is not KEY=VALUE, for example 'seed=1'")
            check_key(kind, key)
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        plain = OmegaConf.to_container(merged, resolve=True)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(plain, dict):
        raise UserError(f"{where}: expected a mapping of keys, found {type(plain).__name__}")
    return typing.cast("dict[str, Any]", plain)


def check_key(kind: type, dotted: str) -> None:
    """Refuse an override of a field that does not exist, before it is merged in."""
    here: Any = kind
    for part in dotted.split("."):
        choices: list[Any] = [item for item in _alternatives(here) if dataclasses.is_dataclass(item)]
        if not choices:
            if dict in {typing.get_origin(item) or item for item in _alternatives(here)}:
                return
            raise UserError(f"'{dotted}': there is nothing below '{dotted[: dotted.rfind(part) - 1]}'")
        hints = typing.get_type_hints(choices[0])
        if part not in hints:
            raise UserError(f"'{dotted}': {choices[0].__name__} has no field '{part}'{did_you_mean(part, hints)}")
        here = hints[part]


def build(kind: Any, value: Any, *, where: str) -> Any:
    """A value of parsed YAML as the annotated type: dataclasses, tuples, unions, literals, dicts and scalars, no guessing.

    Raises:
        UserError: names the path to the key, what was expected and what was found.
    """
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        return _build_union(kind, value, where)
    if origin is Literal:
        if value in typing.get_args(kind):
            return value
        raise UserError(f"{where}: '{value}' is not one of {', '.join(map(str, typing.get_args(kind)))}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list, found {value!r}")
        inner = typing.get_args(kind)
        if len(inner) == 2 and inner[1] is Ellipsis:
            inner = (inner[0],) * len(value)
        if len(inner) != len(value):
            raise UserError(f"{where}: expected {len(inner)} values, found {len(value)}")
        return tuple(build(item, part, where=f"{where}[{i}]") for i, (item, part) in enumerate(zip(inner, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a mapping, found {value!r}")
        return {key: build(typing.get_args(kind)[1], part, where=f"{where}.{key}") for key, part in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Any or type(value) is kind:
        return value
    raise UserError(f"{where}: expected {kind.__name__}, found {value!r}")


def _build_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected the keys of {kind.__name__}, found {value!r}")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise UserError(f"{where}: unknown key '{key}'{did_you_mean(str(key), hints)}")
    for item in dataclasses.fields(kind):
        if item.name not in value and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: '{item.name}' is missing")
    parts = {key: build(hints[key], part, where=f"{where}: {key}" if ":" not in where else f"{where}.{key}") for key, part in value.items()}
    try:
        return kind(**parts)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _build_union(kind: Any, value: Any, where: str) -> Any:
    choices = typing.get_args(kind)
    if value is None and type(None) in choices:
        return None
    problems = []
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return build(choice, value, where=where)
        except UserError as error:
            problems.append(error)
    raise problems[0]


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def as_plain(value: Any) -> Any:
    """A noun as JSON-able data: what goes into fingerprints and into `baseline.yaml`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: as_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [as_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    return value
