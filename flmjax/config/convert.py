"""Conversion of settings to and from ml_collections, JSON and the files of a run."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

import flmjax
from flmjax.config.errors import ConfigError, nearest
from flmjax.config.fields import EXECUTION, RunConfig

# Format number of config.json and of checkpoints. It rises if a field or an item is renamed or removed, never if one is
# added.
FORMAT = 2
HEADER = {"version": flmjax.__version__, "format": FORMAT}


def to_config_dict(config: Any) -> config_dict.ConfigDict:
    """The settings as a locked ConfigDict. Fields that may be None accept any literal, so that flags can set them."""
    hints = typing.get_type_hints(type(config))
    out = config_dict.ConfigDict()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            value = tuple(to_config_dict(item) for item in value)
        elif types.NoneType in typing.get_args(hints[field.name]):  # object: the flag takes a literal, None too
            value = config_dict.FieldReference(value, field_type=object)
        out[field.name] = value
    return out.lock()


def from_config_dict(tree: Mapping[str, Any], cls: type = RunConfig, path: str = "config") -> Any:
    """A dataclass of settings from a ConfigDict or a plain mapping; the inverse of to_config_dict.

    Raises:
        ConfigError: for a key that is not a field (with the nearest names) or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in fields:
            raise ConfigError(f"{path} has no field '{key}'{nearest(key, fields)}")
        values[key] = _convert(value, hints[key], f"{path}.{key}")
    return cls(**values)


def to_json(config: RunConfig) -> dict[str, Any]:
    """The config as a plain nested dictionary; from_config_dict is the inverse."""
    return dataclasses.asdict(config)


def to_stored(config: RunConfig) -> dict[str, Any]:
    """The content of config.json: the config, and the version and format of flmjax that wrote it."""
    return {**HEADER, "config": to_json(config)}


def from_stored(stored: object, name: str) -> RunConfig:
    """Config from the content of config.json or the metadata of a checkpoint; the inverse of to_stored.

    A field that the stored config lacks gets its default.

    Args:
        stored: the JSON object.
        name: the file's name in messages.

    Raises:
        ConfigError: for another format (with both numbers), or a config that this version cannot read.
    """
    stored = check_format(stored, name)
    if not isinstance(stored.get("config"), Mapping):
        raise ConfigError(f"{name} has no 'config' with the settings of a run")
    try:
        return from_config_dict(stored["config"])
    except ConfigError as error:
        raise ConfigError(f"{name} cannot be read as a config: {error}") from error


def check_format(stored: object, name: str) -> Mapping[str, Any]:
    """`stored` as a mapping. Raises ConfigError, with both numbers, if it has another format than this version."""
    if not isinstance(stored, Mapping):
        raise ConfigError(f"{name} is no JSON object")
    if (number := stored.get("format", 1)) != FORMAT:
        raise ConfigError(f"{name} has format {number}; flmjax {flmjax.__version__} reads format {FORMAT}")
    return stored


def differences(stored: object, current: object, path: str = "") -> list[str]:
    """Lines `field: stored -> current` for the fields that differ and decide the results of a run; long values are cut.

    Args:
        stored, current: two RunConfigs, or the same part of both.
        path: name of the part.
    """
    pairs: list[tuple[str, Any, Any]]
    if dataclasses.is_dataclass(stored):
        names = [field.name for field in dataclasses.fields(stored) if field.metadata != EXECUTION]
        pairs = [(f"{path}.{name}".strip("."), getattr(stored, name), getattr(current, name)) for name in names]
    elif isinstance(stored, tuple) and isinstance(current, tuple) and len(stored) == len(current):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(stored, current, strict=True))]
    elif path == "stages" and isinstance(stored, tuple) and isinstance(current, tuple):
        shared = min(len(stored), len(current))
        return [*differences(stored[:shared], current[:shared], path), f"stages: {len(stored)} -> {len(current)}"]
    else:
        return [] if stored == current else [f"{path}: {_cut(stored)} -> {_cut(current)}"]
    return [line for name, a, b in pairs for line in differences(a, b, name)]


def _cut(value: object, length: int = 60) -> str:
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}..."


def check_path(path: str) -> None:
    """Raise ConfigError with the nearest names unless `path`, as in `stages[0].steps`, names a field of a run."""
    hint: Any = RunConfig
    walked = "config"
    for word in path.split("."):
        name = word.split("[")[0]
        if not dataclasses.is_dataclass(hint):
            raise ConfigError(f"{walked} has no fields; '{name}' cannot be one")
        hints = typing.get_type_hints(hint)
        if name not in hints:
            raise ConfigError(f"{walked} has no field '{name}'{nearest(name, hints)}")
        hint = typing.get_args(hints[name])[0] if "[" in word else hints[name]
        walked += f".{word}"


def _convert(value: object, hint: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping | config_dict.ConfigDict):
            raise ConfigError(f"{path} must be a mapping of fields, not {value!r}")
        return from_config_dict(value, typing.cast(type, hint), path)
    args = typing.get_args(hint)
    if types.NoneType in args:
        return None if value is None else _convert(value, next(a for a in args if a is not types.NoneType), path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple | list):
            value = (value,)
        return tuple(_convert(item, args[0], f"{path}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(hint) is typing.Literal:  # validate checks that the value is one of the words
        hint = str
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{path} must be of type {hint.__name__}, not {value!r}")
    return value
