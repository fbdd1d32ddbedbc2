"""Site settings: names of a cluster or a cloud project, and what a run needs there. site.toml has the defaults."""

import dataclasses
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from flmjax.config import ConfigError, nearest
from flmjax.config.values import local_path

DEFAULTS = Path(__file__).with_name("site.toml")
Section = TypeVar("Section")


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Settings of a Slurm cluster; site.toml explains each and has its default."""

    partition: str
    account: str
    qos: str
    time: str
    options: tuple[str, ...]
    tasks: Literal["node", "gpu"]
    container: Literal["", "pyxis", "apptainer"]
    image: str
    mounts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """Settings of queued resources of Cloud TPUs."""

    project: str
    zone: str
    runtime_version: str
    tier: Literal["", "spot", "reserved", "guaranteed"]
    options: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GkeJobset:
    """Settings of a Kubernetes cluster with JobSet."""

    image: str
    namespace: str
    queue: str
    service_account: str


@dataclasses.dataclass(frozen=True)
class Xpk:
    """Settings of a Kubernetes cluster that xpk made."""

    cluster: str
    project: str
    zone: str
    image: str
    max_restarts: int
    options: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """Settings of a site.

    Attributes:
        setup: shell lines before the run.
        max_crashes: the launch file gives up after this number of crashes without a new checkpoint.
        grace_seconds: seconds between SIGTERM and SIGKILL.
        env: environment variables of the run, by name.
        slurm, tpu_vm, gke_jobset, xpk: settings of one kind of launch file.
    """

    setup: tuple[str, ...]
    max_crashes: int
    grace_seconds: int
    env: dict[str, str]
    slurm: Slurm
    tpu_vm: TpuVm
    gke_jobset: GkeJobset
    xpk: Xpk


def read_site(file: str | None) -> Site:
    """The settings of a site file, and the defaults in place of those that it leaves out; None: the defaults.

    Raises:
        ConfigError: for a file that cannot be read, and a setting that does not exist or has a wrong value.
    """
    defaults = tomllib.loads(DEFAULTS.read_text())
    if not file:
        return _section(Site, defaults, "", "")
    path = local_path(file, "--site")
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--site={file}: {error.strerror}; {DEFAULTS} is one to copy") from None
    except ValueError as error:  # of TOML or of UTF-8
        raise ConfigError(f"--site={file}: {error}") from None
    _refuse_unknown(settings, defaults, file, "")
    merged = {
        name: {**value, **settings.get(name, {})} if isinstance(value, dict) else settings.get(name, value)
        for name, value in defaults.items()
    }
    return _section(Site, merged, file, "")


def _refuse_unknown(settings: Mapping[str, Any], defaults: Mapping[str, Any], file: str, section: str) -> None:
    for name, value in settings.items():
        if name not in defaults:
            raise ConfigError(f"--site={file}: there is no setting '{section}{name}'{nearest(name, defaults)}")
        if isinstance(value, dict) != isinstance(defaults[name], dict):
            kind = "a table" if isinstance(defaults[name], dict) else "no table"
            raise ConfigError(f"--site={file}: {section}{name} is {kind} of settings")
        if isinstance(value, dict) and name != "env":
            _refuse_unknown(value, defaults[name], file, f"{name}.")


def _section(cls: type[Section], settings: Mapping[str, Any], file: str, section: str) -> Section:
    """An instance of a class of settings.

    Raises:
        ConfigError: for a value that the type of its field does not have.
    """
    values = {}
    for name, hint in typing.get_type_hints(cls).items():
        value, path = settings[name], f"{section}{name}"
        if dataclasses.is_dataclass(hint):
            values[name] = _section(typing.cast(type[Any], hint), value, file, f"{name}.")
            continue
        if requirement := _requirement(value, hint):
            raise ConfigError(f"--site={file}: {path}={value!r} must be {requirement}")
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _requirement(value: Any, hint: Any) -> str:
    """The rule that a value breaks, for the message; "" if it breaks none."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return "" if value in choices else "one of " + ", ".join(f'"{choice}"' for choice in choices)
    if hint is int:
        return "" if type(value) is int and 0 < value < 10**6 else "a positive whole number below a million"
    if hint is str:
        return "" if _is_line(value) else "a text of one line"
    if typing.get_origin(hint) is dict:
        is_valid = all(re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) and _is_line(text) for name, text in value.items())
        return "" if is_valid else "names of environment variables, with texts of one line"
    is_valid = isinstance(value, list) and all(map(_is_line, value))
    return "" if is_valid else "a list of texts of one line"


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and (value.isprintable() or value.replace("\t", "").isprintable())
