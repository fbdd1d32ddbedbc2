"""Checkpoints of a run, written by Orbax in the background; a step that is not complete on disk is ignored.

A checkpoint has items by name: `params` and `train_state` are trees of arrays, `meta` is JSON. Parameters are a
separate item, so that evaluation and export read them without the moments.
"""

import logging as standard_logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from chex import ArrayTree

from flmjax.config import HEADER, check_format, stored_entry
from flmjax.sharding.axes import path_name
from flmjax.sharding.processes import is_writer
from flmjax.workdir.paths import is_complete, latest_whole_step


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names the step and the folder."""


class Checkpoints:
    """Checkpoints in one folder, one for each saved step.

    Args:
        directory: the folder.
        keep: number of newest steps that are kept. None opens the folder for reading: nothing is deleted, since another
            process may be writing to it.
    """

    def __init__(self, directory: Path, keep: int | None) -> None:
        self.directory = directory
        logging.get_absl_logger().addFilter(_is_told_once)
        if keep is None:
            # Not read_only, of which Orbax warns on standard error at each opening: without a save nothing is deleted.
            options = ocp.CheckpointManagerOptions(create=False)
        else:
            if is_writer():
                remove_incomplete(directory)
            policy = ocp.checkpoint_managers.LatestN(keep)
            options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=options,
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "train_state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest complete step; None if there is none."""
        return latest_whole_step(self.directory)

    def meta(self, step: int) -> dict[str, Any]:
        """Metadata of a checkpoint: version, format, config, stage, samples_seen, fingerprint, checksums.

        Raises:
            ConfigError: for a checkpoint of another format.
            CheckpointError: for an unreadable checkpoint.
        """
        meta = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        check_format(meta, f"checkpoint {self.directory / str(step)}")
        return meta

    def restore(self, step: int, abstract: Mapping[str, ArrayTree]) -> dict[str, Any]:
        """Items of a checkpoint with the shapes and shardings of `abstract`; the mesh that wrote them may differ.

        Args:
            abstract: trees of ShapeDtypeStruct by item name: "params" alone, or also "train_state". Other items are not
                read.

        Raises:
            CheckpointError: for an unreadable or damaged checkpoint, or for another model (with the leaf and both
                shapes).
            ConfigError: for a checkpoint of another format, or without checksums.
        """
        name = f"checkpoint {self.directory / str(step)}: its metadata"
        expected = stored_entry(self.meta(step), "checksums", dict, name)
        for name, tree in abstract.items():
            self._check_shapes(step, name, tree)
        items = self._read(step, **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()})
        restored = {name: items[name] for name in abstract}
        damaged = [path for path, value in _checksums(restored).items() if expected.get(path) != value]
        if damaged:
            raise self._read_error(step, f"damaged on disk: {', '.join(damaged[:3])}")
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
        newest = self.latest_step()
        if step == newest:
            return
        if newest is not None and step < newest:
            raise CheckpointError(f"step {step} was not saved in {self.directory}: the newest there is {newest}")
        try:
            self._manager.check_for_errors()
            args = ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                meta=ocp.args.JsonSave({**HEADER, **meta, "checksums": _checksums(items)}),
            )
            self._manager.save(step, args=args, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(step, error) from error

    def wait(self) -> None:
        """Wait until the last save is complete on disk; raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(self.latest_step(), error) from error

    def _check_shapes(self, step: int, name: str, abstract: ArrayTree) -> None:
        """Raise CheckpointError with the leaf and both shapes if the stored model has another size."""
        stored = _paths(self._metadata(step, name))
        for path, leaf in _paths(abstract).items():
            if path not in stored:
                raise self._read_error(step, f"it has no {name}/{path}")
            if tuple(stored[path].shape) != leaf.shape:
                raise CheckpointError(
                    f"checkpoint {self.directory / str(step)}: {path} has shape {tuple(stored[path].shape)}, the model "
                    f"{leaf.shape}; growth turns a checkpoint of a smaller model into one of a larger"
                )

    def _metadata(self, step: int, name: str) -> Any:
        try:
            return self._manager.item_metadata(step)[name].tree
        except Exception as error:
            raise self._read_error(step, error) from error

    def _write_error(self, step: int | None, error: Exception) -> CheckpointError:
        return CheckpointError(f"saving in {self.directory} failed (at step {step}): {_first_line(error)}")

    def _read(self, step: int, **args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # Orbax raises Exception itself for an array that cannot be decoded
            raise self._read_error(step, error) from error

    def _read_error(self, step: int, error: Exception | str) -> CheckpointError:
        older = [s for s in self._manager.all_steps() if s < step]
        cure = f"; delete that folder to resume from step {max(older)}" if older else ""
        return CheckpointError(f"checkpoint {self.directory / str(step)} cannot be read: {_first_line(error)}{cure}")


def _is_told_once(record: standard_logging.LogRecord) -> bool:
    """Whether a record of the log is no error of Orbax, which logs a traceback of every error that it also raises."""
    return record.levelno < standard_logging.ERROR or "orbax" not in Path(record.pathname).parts


def remove_incomplete(directory: Path) -> list[Path]:
    """Delete step folders that are not complete: killed saves, and empty folders, which Orbax takes for the newest.

    Returns:
        The deleted folders; each is also logged.
    """
    removed = []
    if directory.is_dir():
        for folder in sorted(directory.iterdir()):
            if folder.is_dir() and folder.name.isdigit() and not is_complete(folder):
                logging.warning("skipped and removed %s: not a complete checkpoint", folder)
                shutil.rmtree(folder)
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
