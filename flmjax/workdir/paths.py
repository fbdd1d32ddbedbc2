"""The workdir of a run: the folder with its config, checkpoints, metrics and, by default, its data."""

import contextlib
import json
import shlex
from pathlib import Path
from typing import NamedTuple

from flmjax.config import ConfigError, RunConfig, from_stored, to_stored
from flmjax.config.validate import validate
from flmjax.disk import writing
from flmjax.lock import locked
from flmjax.workdir.storage import COMMIT_FILE, access, is_url, remote_path

CONFIG_FILE = "config.json"
PARENT_FILE = "parent.json"
GROWTH_FILE = "growth.partial"  # while `flmjax grow` writes the workdir: the source
ORIGIN_FILE = ".origin.json"  # in the local copy of a workdir on object storage: its URL


def data_directory(config: RunConfig, workdir: Path) -> Path:
    """Folder of the run's token files: data.directory, or WORKDIR/data."""
    return Path(config.data.directory) if config.data.directory else workdir / "data"


def origin_url(workdir: Path) -> str | None:
    """The URL on object storage that `workdir` is, or is the local copy of; None for another folder."""
    if is_url(workdir):
        return str(workdir)
    try:
        return str(json.loads((workdir / ORIGIN_FILE).read_text(encoding="utf-8"))["url"])
    except (OSError, ValueError, KeyError, TypeError):  # absent, or cut off itself
        return None


def checkpoint_directory(workdir: Path) -> Path:
    """Folder of the run's checkpoints; that of a local copy is on object storage."""
    url = origin_url(workdir)
    return (workdir if url is None else remote_path(url)) / "checkpoints"


def locked_workdir(workdir: Path) -> contextlib.AbstractContextManager[None]:
    """Keep the workdir for this run until the block ends; raises ConfigError if another process is at work in it.

    The workdir of a local copy is leased already.
    """
    from flmjax.sharding.processes import is_writer

    is_locked = is_writer() and origin_url(workdir) is None
    return locked(workdir / ".lock", str(workdir)) if is_locked else contextlib.nullcontext()


def stored_config(workdir: Path) -> RunConfig | None:
    """The config of the run in `workdir`; None if no run has begun there.

    Raises:
        ConfigError: naming config.json if it cannot be read, or is absent beside checkpoints; or a growth that was cut
            off, with the way to go on.
    """
    if (workdir / CONFIG_FILE).is_file():
        return read_config(workdir)
    if (source := unfinished_growth(workdir)) is not None:
        raise ConfigError(
            f"{workdir} holds a growth that was cut off; to train from scratch, take another --workdir; to go on, run "
            f"the same command again: flmjax grow --source={shlex.quote(source)} --workdir={shlex.quote(str(workdir))}"
        )
    if (step := latest_whole_step(checkpoint_directory(workdir))) is not None:
        raise ConfigError(
            f"{workdir} has a checkpoint at step {step} but no {CONFIG_FILE}; put that file back or take another "
            "--workdir"
        )
    return None


def begin_growth(workdir: Path, source: Path | str) -> None:
    """Mark `workdir` as the target of a growth from `source` until its config is written."""
    workdir.mkdir(parents=True, exist_ok=True)
    _write_json({"source": str(source)}, workdir / GROWTH_FILE)


def unfinished_growth(workdir: Path) -> str | None:
    """Source of a growth into `workdir` that did not end; None if there is none."""
    if (workdir / CONFIG_FILE).is_file():  # written last
        return None
    try:
        return str(json.loads((workdir / GROWTH_FILE).read_text(encoding="utf-8"))["source"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # the file itself was cut off
        return "SOURCE"


def end_growth(workdir: Path) -> None:
    """Remove the mark of begin_growth."""
    (workdir / GROWTH_FILE).unlink(missing_ok=True)


class Parent(NamedTuple):
    """The run that another one was grown from by `flmjax grow`.

    Attributes:
        workdir: absolute path of its workdir at that time.
        step, stage, tokens: updates, stage and tokens of the checkpoint that was grown.
        first_sample: number of the grown run's first sample in the training stream; not 0 where it goes on in the
            parent's data.
    """

    workdir: str
    step: int
    stage: str
    tokens: int
    first_sample: int


def write_parent(parent: Parent, workdir: Path) -> None:
    """Write parent.json in `workdir`."""
    _write_json(parent._asdict(), workdir / PARENT_FILE)


def read_parent(workdir: Path) -> Parent | None:
    """The parent of the run in `workdir`; None for a run that was not grown from another.

    Raises:
        ConfigError: naming parent.json if it cannot be read.
    """
    path = workdir / PARENT_FILE
    try:
        parent = Parent(**json.loads(path.read_text(encoding="utf-8")))
        numbers = parent.step, parent.tokens, parent.first_sample
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"{numbers} are not counts")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} does not describe a parent run: {error}; without that file none is named") from error
    return parent


def remove_certificates(workdir: Path, resume_step: int) -> None:
    """Remove the certificates of growths that a run which resumes at `resume_step` does again.

    The certificate of step 0 is of the growth that made the run.
    """
    for path in (workdir / "certificates").glob("step_*.json"):
        if int(path.stem.removeprefix("step_")) >= max(resume_step, 1):
            path.unlink()


def latest_whole_step(directory: Path) -> int | None:
    """The newest complete step in `directory`; None if there is none, or if the folder does not exist."""
    return max(whole_steps(directory), default=None)


def whole_steps(directory: Path) -> list[int]:
    """The complete steps in `directory`, in order; [] if the folder does not exist.

    Raises:
        StorageError: for a store that does not answer.
    """
    return sorted(int(folder.name) for folder in _step_folders(directory) if is_complete(folder))


def saved_steps(directory: Path) -> list[int]:
    """The steps in `directory` that were saved, in order, though files may be absent since; [] if it does not exist.

    Raises:
        StorageError: for a store that does not answer.
    """
    return sorted(int(folder.name) for folder in _step_folders(directory) if was_complete(folder))


def _step_folders(directory: Path) -> list[Path]:
    with _store_errors(directory):
        folders = directory.iterdir() if directory.is_dir() else ()
        return [folder for folder in folders if folder.name.isdigit()]


def was_complete(folder: Path) -> bool:
    """Whether a step's folder was complete once: on disk it gets its name then, on object storage its last object.

    Raises:
        StorageError: for a store that does not answer.
    """
    with _store_errors(folder):
        if is_url(folder):
            return (folder / COMMIT_FILE).is_file()
        return any(path.is_file() for path in folder.rglob("*"))


def is_complete(folder: Path) -> bool:
    """Whether the checkpoint in `folder` was written to its end.

    On object storage, which cannot rename a complete folder, the last object says so.

    Raises:
        StorageError: for a store that does not answer.
    """
    with _store_errors(folder):
        is_committed = not is_url(folder) or (folder / COMMIT_FILE).is_file()
        return is_committed and (folder / "_CHECKPOINT_METADATA").is_file() and (folder / "params").is_dir()


def _store_errors(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Turn an error of etils in the block into a StorageError that names the URL; nothing for a local folder."""
    return access(str(folder)) if is_url(folder) else contextlib.nullcontext()


def read_config(workdir: Path) -> RunConfig:
    """The config of the run in `workdir`.

    Raises:
        ConfigError: naming config.json if it is absent, no JSON, of another format, or with a setting that cannot be.
    """
    path = workdir / CONFIG_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; is {workdir} the workdir of a run?") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return valid_config(stored, str(path))


def valid_config(stored: object, name: str) -> RunConfig:
    """Config from the content of config.json or the metadata of a checkpoint, checked against the rules of a run.

    Args:
        stored: the JSON object.
        name: the file's name in messages.

    Raises:
        ConfigError: naming the file, as from_stored, and for a setting that breaks a rule.
    """
    config = from_stored(stored, name)
    try:
        return validate(config)
    except ConfigError as error:
        raise ConfigError(f"{name} cannot be read as a config: {error}") from error


def write_config(config: RunConfig, workdir: Path) -> None:
    """Write config.json in `workdir`, which becomes the workdir of `config`; a killed write leaves no partial file."""
    workdir.mkdir(parents=True, exist_ok=True)
    partial = workdir / "config.tmp"
    _write_json(to_stored(config), partial, indent=1)
    partial.replace(workdir / CONFIG_FILE)


def _write_json(value: object, path: Path, indent: int | None = None) -> None:
    with writing(path):
        path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
