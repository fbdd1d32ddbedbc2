"""A config file: Python whose function `get_config` returns a RunConfig; what fails in it is told in one line."""

import dataclasses
import inspect
import re
import sys
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import config_dict

import flmjax.config
from flmjax.config import ConfigError, RunConfig, from_config_dict, nearest, shorten, to_json
from flmjax.config.values import local_path


def load_config(argument: str) -> RunConfig:
    """The config of `FILE` or `FILE:WORDS`; the words are the argument of its get_config.

    A file may import its neighbours. get_config returns a RunConfig, or a ConfigDict or dictionary of its fields.

    Raises:
        ConfigError: for a file that does not exist, and, with file and line, for everything that fails in it.
    """
    file, colon, words = argument.partition(":")
    path = local_path(file, "--config")
    if not path.is_file():
        hint = f"; did you mean {file}.py" if path.name and path.with_name(f"{path.name}.py").is_file() else ""
        raise ConfigError(f"there is no config file '{file}'{hint}")
    module = types.ModuleType("config_file")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses of the file look for their module
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    line: int | None = None
    try:
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(module))
        get_config = _get_config(module)
        line = getattr(getattr(get_config, "__code__", None), "co_firstlineno", None)
        _check_arguments(get_config, *([words] if colon else []))
        returned = get_config(words) if colon else get_config()
        return _run_config(returned)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too
        raise ConfigError(f"{_place(error, path, line)}: {_reason(error)}") from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _get_config(module: types.ModuleType) -> Any:
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ConfigError("there is no function get_config, which returns the RunConfig")
    return get_config


def _check_arguments(get_config: Any, *words: str) -> None:
    try:
        inspect.signature(get_config).bind(*words)
    except TypeError:
        if words:
            raise ConfigError(f"get_config takes no argument, but --config has ':{words[0]}'") from None
        raise ConfigError("get_config needs an argument: --config=FILE:WORDS") from None


def _run_config(returned: object) -> RunConfig:
    if isinstance(returned, RunConfig):
        returned = to_json(returned)
    if isinstance(returned, Mapping | config_dict.ConfigDict):
        config: RunConfig = from_config_dict(returned)
        return config
    if returned is None:
        raise ConfigError("get_config returns None; does it end with 'return config'?")
    raise ConfigError(f"get_config must return a RunConfig, not {shorten(returned)}")


def _place(error: BaseException, path: Path, get_config_line: int | None) -> str:
    """FILE:LINE of an error: the syntax error's, else the deepest frame in the config file or a neighbour that it
    imports, else get_config's line.
    """
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f"{error.filename}:{error.lineno}" if error.lineno else error.filename
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.lineno}" for frame in frames if _is_of_user(frame.filename, path)]
    if places:
        return places[-1]
    return f"{path}:{get_config_line}" if get_config_line else str(path)


def _is_of_user(filename: str, path: Path) -> bool:
    """Whether code is of the config file or of a neighbour: a file of its folder, but none of an installed package."""
    if filename == str(path):
        return True
    file, package = Path(filename).resolve(), Path(flmjax.config.__file__).parents[1]
    is_installed = file.is_relative_to(package) or "site-packages" in file.parts
    return file.is_relative_to(path.parent.resolve()) and file.is_file() and not is_installed


def _reason(error: BaseException) -> str:
    """The message of an error in a config file, with the nearest names for a name that does not exist."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    if isinstance(error, TypeError) and (
        match := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    ):
        cls = getattr(flmjax.config, match[1], None)
        if dataclasses.is_dataclass(cls):
            return f"{match[1]} has no field '{match[2]}'{_nearest_field(match[2], cls)}"
    if isinstance(error, TypeError) and (
        match := re.search(r"override field '(\w+)'.* <class '(.*)'>.* <class '(.*)'>", text)
    ):
        actual, expected = (name.rpartition(".")[2] for name in match.groups()[1:])
        return f"the field '{match[1]}' takes a value of type {expected}, not {actual}"
    if isinstance(error, AttributeError) and dataclasses.is_dataclass(error.obj):
        return f"{type(error.obj).__name__} has no field '{error.name}'{_nearest_field(str(error.name), error.obj)}"
    if isinstance(error, AttributeError | KeyError) and (fields := _config_dict_fields(error)):
        key = re.search(r"""["'](\w+)["']""", str(error).replace("\\", ""))
        if key is not None:
            return f"the config has no field '{key[1]}'{nearest(key[1], fields)}"
    if isinstance(error, ImportError) and error.name == "flmjax.config":
        name = re.search(r"cannot import name '(\w+)'", text)
        return text + (nearest(name[1], flmjax.config.__all__) if name else "")
    return text


def _nearest_field(name: str, settings: Any) -> str:
    return nearest(name, [field.name for field in dataclasses.fields(settings)])


def _config_dict_fields(error: BaseException) -> list[str]:
    """Fields of the ConfigDict that raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = [frame.f_locals.get("self") for frame in frames]
    dicts = [owner for owner in owners if isinstance(owner, config_dict.ConfigDict)]
    return [str(key) for key in dicts[-1]] if dicts else []
