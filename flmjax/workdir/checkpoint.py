"""Checkpoints of a run, written by Orbax in the background; a step that is not complete on disk is ignored.

A checkpoint has items by name: `params` and `train_state` are trees of arrays, `meta` is JSON. Parameters are a
separate item, so that evaluation and export read them without the moments.
"""

import logging as standard_logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from chex import ArrayTree

from flmjax.config import HEADER, ConfigError, RunConfig, check_format, stored_entry
from flmjax.sharding.axes import path_name
from flmjax.sharding.processes import any_process, barrier, from_writer, is_writer
from flmjax.workdir.damage import digest, is_damage
from flmjax.workdir.orbax_s3 import support_s3
from flmjax.workdir.paths import checkpoint_directory, is_complete, latest_whole_step, saved_steps, whole_steps
from flmjax.workdir.storage import is_url, move_tree, remove_tree

ASIDE = ".unreadable"  # ends the name of a damaged step's folder, which Orbax and this class then ignore


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names the step and the folder."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint with damaged or absent files; an older one may be readable.

    Attributes:
        step: of the checkpoint.
        reason: the damage, on one line.
    """

    def __init__(self, directory: Path, step: int, reason: str) -> None:
        older = [whole for whole in whole_steps(directory) if whole < step]
        cure = f"; flmjax train sets it aside and goes on from step {max(older)}" if older else ""
        super().__init__(f"checkpoint {directory / str(step)} cannot be read: {reason}{cure}")
        self.step, self.reason = step, reason


class Checkpoints:
    """Checkpoints in one folder, one for each saved step.

    A step is deleted only when a newer one is complete on disk: while the first checkpoint after a growth is written,
    that of the model before the growth stays, whatever `keep`.

    Args:
        directory: the folder.
        keep: number of newest steps that are kept. None opens the folder for reading: nothing is deleted or renamed,
            since another process may be writing to it.
        keep_every: steps that are multiples of this number are kept for ever; None: none are.
        kept_steps: further steps that are kept for ever.
        damaged: reasons by step; set_aside renames the folders of these steps.
    """

    def __init__(
        self,
        directory: Path,
        keep: int | None,
        keep_every: int | None = None,
        kept_steps: Collection[int] = (),
        damaged: Mapping[int, str] | None = None,
    ) -> None:
        self.directory, self._damaged = directory, dict(damaged or {})
        # Called before a checkpoint begins; stores what a run that resumes from it needs.
        self.before_save: Callable[[], None] = lambda: None
        self._saved: int | None = None  # the last step that this object has saved
        if is_url(directory):
            support_s3()
        logging.get_absl_logger().addFilter(_is_not_of_orbax)
        # The reader's group is this process alone: a process that fails to read must not leave the others in a barrier.
        # Orbax's mode read_only is not used, because it prints a warning at each opening.
        process = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(process, {process}, f"process_{process}")
        self._reader = _manager(directory, alone, create=False)
        self._writer = None
        if keep is not None:
            if is_writer():
                remove_incomplete(directory)
            barrier("incomplete checkpoints are removed")
            policies = ocp.checkpoint_managers
            policy = policies.AnyPreservationPolicy(
                [policies.LatestN(keep), policies.CustomSteps(kept_steps)]
                + ([] if keep_every is None else [policies.EveryNSteps(keep_every)])
            )
            self._writer = _manager(
                directory,
                ocp.options.MultiprocessingOptions(),
                preservation_policy=policy,
                async_options=_async_options(directory),
            )

    @classmethod
    def of_run(cls, workdir: Path, config: RunConfig, damaged: Mapping[int, str]) -> "Checkpoints":
        """The checkpoints of the run in `workdir`, opened for writing, which are kept as its config says."""
        settings = config.checkpoint
        ends = [stage.end for stage in config.schedule] if settings.keep_stage_ends else []
        return cls(checkpoint_directory(workdir), settings.keep, settings.keep_every, ends, damaged)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_error = kind is not None and issubclass(kind, Exception)
        if is_error and jax.process_count() > 1:  # a save waits for ever for a process that is lost
            return
        self._reader.close()
        if self._writer is not None:
            self._writer.close()

    def latest_step(self) -> int | None:
        """The newest complete step; None if there is none."""
        return latest_whole_step(self.directory)

    def meta(self, step: int) -> dict[str, Any]:
        """Metadata of a checkpoint: version, format, config, stage, samples_seen, fingerprint, checksums.

        Raises:
            ConfigError: for a checkpoint of another format.
            CheckpointError: for an unreadable checkpoint.
        """
        meta: dict[str, Any] = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        if isinstance(meta, dict) and "digest" in meta and meta["digest"] != digest(meta):  # older versions: none
            raise DamagedCheckpointError(self.directory, step, "its metadata were changed on disk")
        check_format(meta, f"checkpoint {self.directory / str(step)}")
        return meta

    def restore(self, step: int, abstract: Mapping[str, ArrayTree]) -> dict[str, Any]:
        """Items of a checkpoint with the shapes and shardings of `abstract`; the mesh that wrote them may differ.

        All processes raise the error of one of them.

        Args:
            abstract: trees of ShapeDtypeStruct by item name: "params" alone, or also "train_state". Other items are not
                read.

        Raises:
            DamagedCheckpointError: for a checkpoint with damaged or absent files.
            CheckpointError: for an unreadable checkpoint, or for another model (with the leaf and both shapes).
            ConfigError: for a checkpoint of another format, or without checksums.
        """
        expected: dict[str, Any] = {}
        restored: dict[str, Any] = {}
        error: CheckpointError | ConfigError | None = None
        try:
            name = f"checkpoint {self.directory / str(step)}: its metadata"
            meta = self.meta(step)
            expected = stored_entry(meta, "checksums", dict, name)
            shapes = stored_entry(meta, "shapes", dict, name) if "shapes" in meta else {}  # older versions: none
            for name, tree in abstract.items():
                self._check_shapes(step, name, tree, shapes)
            restored = self._read(step, **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()})
        except (CheckpointError, ConfigError) as failure:
            error = failure
        self._raise_of_any(step, error)
        # Sums over all devices: every process has the same.
        damaged = [path for path, value in _checksums(restored).items() if expected.get(path) != value]
        if damaged:
            reason = f"damaged on disk: {', '.join(damaged[:3])}"
            raise DamagedCheckpointError(self.directory, step, reason)
        return restored

    def save(self, step: int, items: Mapping[str, ArrayTree], meta: dict[str, Any]) -> None:
        """Start writing a checkpoint in the background. An error of the previous save is raised now.

        Args:
            items: trees of arrays, "params" and "train_state".
            meta: metadata, stored as JSON.

        Raises:
            CheckpointError: if writing failed, or if the folder has a newer step (Orbax would keep both steps, and the
                run would resume from the newer one).
        """
        if step == self._saved:
            return
        newest = from_writer(-1 if (latest := self.latest_step()) is None else latest)
        if step <= newest:
            raise CheckpointError(f"step {step} was not saved in {self.directory}: the newest there is {newest}")
        writer = self._opened_for_writing()
        shapes = {path: list(leaf.shape) for path, leaf in _paths(items).items()}
        meta = {**HEADER, **meta, "checksums": _checksums(items), "shapes": shapes}
        self.before_save()
        try:
            writer.check_for_errors()
            args = ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                meta=ocp.args.JsonSave({**meta, "digest": digest(meta)}),
            )
            writer.save(step, args=args, force=True)
            self._saved = step
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(step, error) from error

    def set_aside(self, resumed: int) -> list[str]:
        """Rename the folders of damaged steps to STEP.unreadable: nothing is lost, and the steps can be saved again.

        Args:
            resumed: the older step that was read in their place.

        Returns:
            A line for each of them.
        """
        if not self._damaged:
            return []
        lines = []
        for step, reason in sorted(self._damaged.items(), reverse=True):
            folder = self.directory / str(step)
            target = _free_name(folder.with_name(f"{step}{ASIDE}"))
            if is_writer():
                move_tree(folder, target)
            lines.append(
                f"warning: checkpoint {folder} cannot be read: {reason}; it is now {target.name}, and training goes on "
                f"from step {resumed}"
            )
        barrier("damaged checkpoints are set aside")
        self._damaged = {}
        self.reload()
        return lines

    def reload(self) -> None:
        """Read anew which steps the folder has, after some were renamed or removed."""
        self._opened_for_writing().reload()
        self._reader.reload()

    def wait(self) -> None:
        """Wait until the last save is complete on disk; raises CheckpointError if it failed."""
        writer = self._opened_for_writing()
        try:
            writer.wait_until_finished()
            writer.check_for_errors()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(self.latest_step(), error) from error

    def _opened_for_writing(self) -> ocp.CheckpointManager:
        assert self._writer is not None, f"{self.directory} is open for reading"
        return self._writer

    def _check_shapes(self, step: int, name: str, abstract: ArrayTree, shapes: Mapping[str, list[int]]) -> None:
        """Compare the shapes that the item's description has with those of its metadata, and with the model's.

        Raises:
            DamagedCheckpointError: where the checkpoint contradicts itself.
            CheckpointError: with the leaf and both shapes if the model has another size.
        """
        stored = {f"{name}/{path}": tuple(leaf.shape) for path, leaf in _paths(self._metadata(step, name)).items()}
        saved = {path: tuple(shape) for path, shape in shapes.items() if path.startswith(f"{name}/")}
        if saved and saved != stored:
            paths = sorted(path for path in saved.keys() | stored.keys() if saved.get(path) != stored.get(path))
            raise DamagedCheckpointError(self.directory, step, f"its description has another {', '.join(paths[:3])}")
        for path, leaf in _paths(abstract).items():
            if f"{name}/{path}" not in stored:
                raise CheckpointError(f"checkpoint {self.directory / str(step)} has no {name}/{path}")
            if stored[f"{name}/{path}"] != leaf.shape:
                raise CheckpointError(
                    f"checkpoint {self.directory / str(step)}: {path} has shape {stored[f'{name}/{path}']}, the model "
                    f"{leaf.shape}; growth turns a checkpoint of a smaller model into one of a larger"
                )

    def _metadata(self, step: int, name: str) -> Any:
        try:
            return self._reader.item_metadata(step)[name].tree
        except Exception as error:
            raise self._read_error(step, error) from error

    def _read(self, step: int, **args: Any) -> dict[str, Any]:
        try:
            items = self._reader.restore(step, args=ocp.args.Composite(**args))
            return {name: items[name] for name in args}
        except Exception as error:  # Orbax raises Exception itself for an array that cannot be decoded
            raise self._read_error(step, error) from error

    def _read_error(self, step: int, error: Exception) -> CheckpointError:
        reason = _first_line(error)
        if is_damage(error):
            return DamagedCheckpointError(self.directory, step, reason)
        return CheckpointError(f"checkpoint {self.directory / str(step)} cannot be read now: {reason}")

    def _raise_of_any(self, step: int, error: CheckpointError | ConfigError | None) -> None:
        """Raise `error`, or in the processes without one the error of another; damage counts if no other error came."""
        folder, is_damaged = self.directory / str(step), isinstance(error, DamagedCheckpointError)
        if any_process(error is not None and not is_damaged):
            raise error or CheckpointError(f"checkpoint {folder} cannot be read by another process")
        if any_process(is_damaged):
            raise error or DamagedCheckpointError(self.directory, step, "another process found it damaged")

    def _write_error(self, step: int | None, error: Exception) -> CheckpointError:
        return CheckpointError(f"saving in {self.directory} failed (at step {step}): {_first_line(error)}")


def _manager(directory: Path, processes: ocp.options.MultiprocessingOptions, **options: Any) -> ocp.CheckpointManager:
    """Orbax's manager of a folder; it does not read the times of the steps that it finds, which nothing needs."""
    return ocp.CheckpointManager(
        directory if is_url(directory) else directory.absolute(),
        options=ocp.CheckpointManagerOptions(multiprocessing_options=processes, lightweight_initialize=True, **options),
        item_handlers={
            "params": ocp.StandardCheckpointHandler(multiprocessing_options=processes),
            "train_state": ocp.StandardCheckpointHandler(multiprocessing_options=processes),
            "meta": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
        },
    )


def _free_name(path: Path) -> Path:
    """The first of `path`, `path.2`, `path.3` and so on that does not exist."""
    number = 2
    free = path
    while free.exists():
        free, number = path.with_name(f"{path.name}.{number}"), number + 1
    return free


def _async_options(directory: Path) -> ocp.AsyncOptions:
    """Options of saving in the background.

    On a store a step has its name from the first object on. Each process refuses a step that exists already: the first
    object is written when all have looked, not meanwhile.
    """
    return ocp.AsyncOptions(create_directories_asynchronously=not is_url(directory))


def _is_not_of_orbax(record: standard_logging.LogRecord) -> bool:
    """Whether a record of the log is to be shown: errors that Orbax logs are dropped, because it raises them, too."""
    return record.levelno < standard_logging.ERROR or "orbax" not in Path(record.pathname).parts


def remove_incomplete(directory: Path) -> list[Path]:
    """Delete what killed saves and killed deletions leave: temporary folders, empty steps, and parts of older steps.

    Orbax takes an empty folder for the newest step, and a temporary one of a step that is never saved again would stay
    with its full size. A step that was saved and is newer than all complete ones is damaged, and not deleted.

    Returns:
        The deleted folders; each is also logged.
    """
    removed = []
    if directory.is_dir():
        newest, saved = latest_whole_step(directory), saved_steps(directory)
        for folder in sorted(directory.iterdir()):
            is_step = folder.name.isdigit() and not is_complete(folder)
            is_damaged = is_step and int(folder.name) in saved and (newest is None or int(folder.name) > newest)
            if folder.is_dir() and not is_damaged and (is_step or ocp.utils.TMP_DIR_SUFFIX in folder.name):
                logging.warning("skipped and removed %s: not a complete checkpoint", folder)
                remove_tree(folder)
                removed.append(folder)
    return removed


def _paths(tree: ArrayTree) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _checksums(tree: Mapping[str, ArrayTree]) -> dict[str, int]:
    """Checksum of each leaf by path: its words of 32 bits summed modulo 2^32.

    The file format does not notice a changed byte inside an array.
    """
    return {path: int(value) for path, value in _paths(jax.device_get(_sum_bits(tree))).items()}


@jax.jit
def _sum_bits(tree: ArrayTree) -> Any:
    def bits(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.bitcast_convert_type(x, jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(bits, tree)


def _first_line(error: Exception | str) -> str:
    """The first 300 characters of an error on one line: TensorStore appends its full specification."""
    return " ".join(str(error).split())[:300] or type(error).__name__
