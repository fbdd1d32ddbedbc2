"""Conversion of settings to and from ml_collections, JSON and the files of a run."""

import dataclasses
import itertools
import json
import numbers
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import config_dict

import flmjax
from flmjax.config.errors import ConfigError, nearest, shorten
from flmjax.config.fields import EXECUTION, ScheduleSettings, StageConfig
from flmjax.config.run import RunConfig

T = TypeVar("T")

# Format number of config.json and of checkpoints. It rises if a field or an item is renamed or removed, never if one is
# added.
FORMAT = 2
HEADER = {"version": flmjax.__version__, "format": FORMAT}
# Fields of a RunConfig that older versions stored and that no result depends on; they are left out.
RETIRED = ("certificate_tolerance",)


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
            raise ConfigError(f"{path} has no field '{key}'{nearest(str(key), fields)}")
        values[key] = convert(value, hints[key], f"{path}.{key}")
    return cls(**values)


def to_json(config: Any) -> dict[str, Any]:
    """Settings as a plain nested dictionary; from_config_dict is the inverse."""
    return dataclasses.asdict(config)


def to_stored(config: RunConfig) -> dict[str, Any]:
    """The content of config.json: the config, and the version and format of flmjax that wrote it."""
    return {**HEADER, "config": to_json(config)}


def from_stored(stored: object, name: str) -> RunConfig:
    """Config from the content of config.json or the metadata of a checkpoint; the inverse of to_stored.

    A field that the stored config lacks gets its default, and RETIRED fields are left out. Older versions stored the
    default of the schedule's fields in stages that continue a schedule, which do not read them; they become None.

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
        config: RunConfig = from_config_dict({k: v for k, v in stored["config"].items() if k not in RETIRED})
    except ConfigError as error:
        raise ConfigError(f"{name} cannot be read as a config: {error}") from error
    stages = (stage if stage.starts_schedule(i) else _without_defaults(stage) for i, stage in enumerate(config.stages))
    return dataclasses.replace(config, stages=tuple(stages))


def check_format(stored: object, name: str) -> Mapping[str, Any]:
    """`stored` as a mapping. Raises ConfigError, with both numbers, if it has another format than this version."""
    if not isinstance(stored, Mapping):
        raise ConfigError(f"{name} is no JSON object")
    number = stored.get("format", 1)
    if type(number) is not int:
        raise ConfigError(f"{name}: format must be an integer, not {json.dumps(number)[:100]}")
    if number != FORMAT:
        raise ConfigError(f"{name} has format {number}; flmjax {flmjax.__version__} reads format {FORMAT}")
    return stored


def stored_entry(stored: object, key: str, kind: type[T], name: str) -> T:
    """Entry `key` of a JSON object that was read from a file.

    Args:
        kind: type of the entry; float takes every number, int no boolean.
        name: the object's name in messages: the file's path, or more.

    Raises:
        ConfigError: naming the object and the entry, if it is absent or of another type.
    """
    if not isinstance(stored, Mapping):
        raise ConfigError(f"{name} is no JSON object")
    value = stored.get(key)
    kinds = (int, float) if kind is float else (kind,)
    if isinstance(value, kinds) and (kind is bool or not isinstance(value, bool)):
        return typing.cast(T, value)
    raise ConfigError(f"{name} has no '{key}'" if value is None else f"{name} has {key}={shorten(value)}")


def differences(stored: object, current: object, path: str = "") -> list[str]:
    """Lines `field: stored -> current` for the fields that differ and decide the results of a run; long values are cut.

    Args:
        stored, current: two RunConfigs, or the same part of both.
        path: name of the part.
    """
    if isinstance(stored, StageConfig) and isinstance(current, StageConfig):
        stored, current = _with_defaults(stored), _with_defaults(current)
    pairs: list[tuple[str, Any, Any]]
    if dataclasses.is_dataclass(stored) and type(stored) is type(current):
        names = [field.name for field in dataclasses.fields(stored) if field.metadata != EXECUTION]
        pairs = [(f"{path}.{name}".strip("."), getattr(stored, name), getattr(current, name)) for name in names]
    elif _is_tuple_of_settings(stored) and _is_tuple_of_settings(current):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(itertools.zip_longest(stored, current))]
    else:
        before, now = (
            f"stage '{x.name}'" if isinstance(x, StageConfig) else shorten(x, str, 60) for x in (stored, current)
        )
        return [] if stored == current else [f"{path}: {before} -> {now}"]
    return [line for name, a, b in pairs for line in differences(a, b, name)]


def convert(value: object, hint: Any, path: str) -> Any:
    """`value` as type `hint` of field `path`: lists become tuples, mappings dataclasses, integers floats, paths texts.

    Raises:
        ConfigError: for a value of another type.
    """
    if dataclasses.is_dataclass(hint):
        cls = typing.cast(type, hint)
        if isinstance(value, cls):
            value = to_json(value)
        if not isinstance(value, Mapping | config_dict.ConfigDict):
            raise ConfigError(f"{path} must be a {cls.__name__} or a mapping of its fields, not {shorten(value)}")
        return from_config_dict(value, cls, path)
    args = typing.get_args(hint)
    if types.NoneType in args:
        return None if value is None else convert(value, next(a for a in args if a is not types.NoneType), path)
    if typing.get_origin(hint) is tuple:
        entries = value if isinstance(value, tuple | list) else (value,)
        return tuple(convert(item, args[0], f"{path}[{i}]") for i, item in enumerate(entries))
    if typing.get_origin(hint) is typing.Literal:  # validate checks that the value is one of the words
        hint = str
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    number = {int: numbers.Integral, float: numbers.Real}.get(hint)  # also those of NumPy
    if number is not None and isinstance(value, number) and not isinstance(value, bool):
        try:
            return hint(value)
        except OverflowError:
            raise ConfigError(f"{path} is too large for a number of type {hint.__name__}") from None
    if type(value) is not hint:
        raise ConfigError(f"{path} must be of type {hint.__name__}, not {shorten(value)}")
    return value


def _is_tuple_of_settings(value: object) -> typing.TypeGuard[tuple[object, ...]]:
    return isinstance(value, tuple) and all(dataclasses.is_dataclass(entry) for entry in value)


def _with_defaults(stage: StageConfig) -> StageConfig:
    """The stage with the schedule's defaults in place of None."""
    return dataclasses.replace(stage, **stage.schedule_settings._asdict())


def _without_defaults(stage: StageConfig) -> StageConfig:
    """The stage with None in place of the schedule's defaults."""
    defaults = ScheduleSettings()._asdict()
    unset: dict[str, Any] = {name: None for name, default in defaults.items() if getattr(stage, name) == default}
    return dataclasses.replace(stage, **unset)
