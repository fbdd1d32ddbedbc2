"""The workdir of a run: the folder with its config, checkpoints, metrics and, by default, its data."""

import json
from pathlib import Path

from flmjax.config import ConfigError, RunConfig, differences, from_stored, to_stored


def data_directory(config: RunConfig, workdir: Path) -> Path:
    """Folder of the run's token files: data.directory, or WORKDIR/data."""
    return Path(config.data.directory) if config.data.directory else workdir / "data"


def claim_workdir(config: RunConfig, workdir: Path) -> None:
    """Store the config in a new workdir, or check that an existing workdir belongs to the same config.

    Raises:
        ConfigError: for the workdir of a run with another config (with the fields that differ), or a folder with
            checkpoints and no config.
    """
    path = workdir / "config.json"
    if path.is_file():
        changed = differences(read_config(workdir), config)
        if changed:
            raise ConfigError(f"{workdir} holds a run of another config: {'; '.join(changed)}; take another --workdir")
    else:
        if (workdir / "checkpoints").exists():
            raise ConfigError(f"{workdir} has checkpoints but no config.json: no workdir, or a growth that was cut off")
        write_config(config, workdir)


def read_config(workdir: Path) -> RunConfig:
    """The config of the run in `workdir`.

    Raises:
        ConfigError: naming config.json if it is absent, no JSON, or of another format.
    """
    path = workdir / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; is {workdir} the workdir of a run?") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return from_stored(stored, str(path))


def write_config(config: RunConfig, workdir: Path) -> None:
    """Write config.json in `workdir`, which becomes the workdir of `config`; a killed write leaves no partial file."""
    workdir.mkdir(parents=True, exist_ok=True)
    partial = workdir / "config.tmp"
    partial.write_text(json.dumps(to_stored(config), indent=1) + "\n")
    partial.replace(workdir / "config.json")
