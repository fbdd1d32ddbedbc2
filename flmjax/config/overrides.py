"""One setting in place of a config's, as text: `stages[0].steps=50`, `data.sources=en,zh`."""

import ast
import dataclasses
import glob
import os
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from flmjax.config.convert import convert
from flmjax.config.errors import RENAMED_FIELDS, ConfigError, did_you_mean, nearest
from flmjax.config.fields import MESH_AXES, STAGE_SIZES, StageConfig, StageMeshConfig
from flmjax.config.run import RunConfig


def field_type(path: str) -> Any:
    """Type of the field that `path`, as in `stages[0].steps`, names in a run.

    Raises:
        ConfigError: for a path that names no field (with the nearest names), or a group of fields.
    """
    hint: Any = RunConfig
    walked = "config"
    for word in path.split("."):
        name, index = _split(word, path)
        if not dataclasses.is_dataclass(hint):
            cure = f"; name an entry: {walked}[0]" if _entry_type(hint) else ""
            raise ConfigError(f"{walked} has no field '{name}'{cure}")
        hints = typing.get_type_hints(hint)
        if name not in hints:
            groups = [] if did_you_mean(name, hints) or RENAMED_FIELDS.get(name) in hints else _groups_with(name)
            cure = (
                f"; did you mean {' or '.join(f'{group}.{name}' for group in groups)}?"
                if groups
                else nearest(name, hints)
            )
            raise ConfigError(f"{walked} has no field '{name}'{cure}")
        hint, walked = hints[name], f"{walked}.{word}"
        if index is not None:
            hint = _entry_type(hint)
            if hint is None:
                raise ConfigError(
                    f"config.{path}: {walked.partition('[')[0]} has no entries that can be set one by one"
                )
    if dataclasses.is_dataclass(hint) or _entry_type(hint):
        group = walked if dataclasses.is_dataclass(hint) else f"{walked}[0]"
        names = ", ".join(typing.get_type_hints(hint if dataclasses.is_dataclass(hint) else _entry_type(hint)))
        raise ConfigError(f"{walked} is no single setting; set a field of {group}: {names}")
    return hint


def parse_value(text: str, hint: Any, path: str) -> Any:
    """Value of a field of type `hint` from the text of a flag.

    A tuple is words between commas, `1,2`, or Python's, `(1, 2)` and `["a", "b"]`. A path with a comma that exists is
    one word. Text may stand in quotes where None is a value too.

    Raises:
        ConfigError: for a text that is no value of this type.
    """
    args = typing.get_args(hint)
    if types.NoneType in args:
        hint = next(arg for arg in args if arg is not types.NoneType)
        if text == "None":
            return None
        if hint is str:
            return _unquote(text)
    if typing.get_origin(hint) is tuple:
        return _parse_tuple(text, typing.get_args(hint)[0], path)
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            pass  # convert names the type
    return convert(text, hint, path)


def override(config: RunConfig, path: str, value: object) -> RunConfig:
    """The config with another value of the field `path`, whose name and type are right.

    Raises:
        ConfigError: for an entry that the config does not have.
    """
    return _replace(config, path.split("."), value, path)


def refuse_unread(configs: Sequence[RunConfig], path: str) -> None:
    """Refuse to set a setting of the run that changes nothing, because every stage that would read it states its own.

    Args:
        configs: without and with the settings of the command. A command that states those of the stages too, or takes
            them back, is not refused.

    Raises:
        ConfigError: naming the run's setting and the stage's.
    """
    if not any(_is_read(config.stages, path) for config in configs):
        setting = path if path.startswith("mesh.") else path.removeprefix("model.")
        raise ConfigError(f"config.{path} is not read: the stages state their own; set config.stages[0].{setting}")


def _is_read(stages: Sequence[StageConfig], path: str) -> bool:
    """Whether a stage reads the run's setting `path`."""
    group, _, name = path.rpartition(".")
    if path == "mesh.fsdp":  # a stage that states any axis takes fsdp from the number of devices
        return any(stage.mesh == StageMeshConfig() for stage in stages)
    if group == "mesh" and name in MESH_AXES:
        return any(getattr(stage.mesh, name) is None for stage in stages)
    if path in ("model.remat", "model.attention"):
        return any(getattr(stage, name) is None for stage in stages)
    if group == "model" and name in STAGE_SIZES:  # the first stage's; later ones start from it
        return getattr(stages[0], name) is None
    return True


def _replace(settings: Any, words: list[str], value: object, path: str) -> Any:
    name, index = _split(words[0], path)
    old = getattr(settings, name)
    if index is not None and index >= len(old):
        last = f"the last one is {name}[{len(old) - 1}]" if len(old) else "there is none"
        cure = "; a config file adds a stage, a flag does not" if name == "stages" else ""
        raise ConfigError(f"config.{path}: there is no {name}[{index}], {last}{cure}")
    if len(words) > 1:
        value = _replace(old if index is None else old[index], words[1:], value, path)
    if index is not None:
        value = (*old[:index], value, *old[index + 1 :])
    return dataclasses.replace(settings, **{name: value})


def _split(word: str, path: str) -> tuple[str, int | None]:
    """(name, index) of `stages[0]`, (name, None) of `seed`."""
    match = re.fullmatch(r"(\w+)(?:\[(0|[1-9]\d*)\])?", word, re.ASCII)
    if match is None:
        raise ConfigError(f"config.{path}: '{word}' names no field; a setting is NAME.NAME or NAME[0].NAME")
    return match[1], None if match[2] is None else int(match[2])


def _groups_with(name: str, settings: Any = RunConfig, path: str = "config") -> list[str]:
    """Paths of the groups of settings that have a field `name`."""
    hints = typing.get_type_hints(settings)
    groups = [path] if name in hints else []
    for field, hint in hints.items():
        group, index = (hint, "") if dataclasses.is_dataclass(hint) else (_entry_type(hint), "[0]")
        groups += _groups_with(name, group, f"{path}.{field}{index}") if group else []
    return groups


def _entry_type(hint: Any) -> Any:
    """The dataclass of the entries of a tuple field; None for other fields."""
    entry = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    return entry if dataclasses.is_dataclass(entry) else None


def _parse_tuple(text: str, item: Any, path: str) -> tuple[Any, ...]:
    if text[:1] in ("(", "[", "'", '"'):
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            pass  # such as the glob [a-z]*.txt
        else:
            return typing.cast(tuple[Any, ...], convert(value, tuple[item, ...], path))
    is_one = not text or (item is str and _exists(text))
    words = [text] if is_one else [word.strip() for word in text.split(",")]
    if "" in words:
        raise ConfigError(f"{path}='{text}': a word is empty; write words between commas, or () for none")
    return tuple(parse_value(word, item, f"{path}[{i}]") for i, word in enumerate(words))


def _exists(source: str) -> bool:
    """Whether a source, or the source of TEMPLATE:SOURCE, is a path or a glob of this machine."""
    paths = [os.path.expanduser(part) for part in (source, source.partition(":")[2]) if part]
    return any(os.path.exists(path) or glob.glob(path) for path in paths)


def _unquote(text: str) -> str:
    """The content of a text in quotes; another text as it is."""
    if text[:1] in ("'", '"') and text[:1] == text[-1:] and len(text) > 1:
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return text
        return value if isinstance(value, str) else text
    return text
