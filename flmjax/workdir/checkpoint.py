"""Checkpoints of a run, written by Orbax in the background: a step is complete on disk or it does not count.

A checkpoint has items by name: `params` and `train_state` are trees of arrays, `meta` is JSON. Parameters are an item
of their own, so that reading them for evaluation or export leaves the moments on disk.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from chex import ArrayTree

from flmjax.config import HEADER, check_format
from flmjax.sharding.axes import path_name


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; names the step and the folder."""


class Checkpoints:
    """The checkpoints under one folder, one for each saved step.

    Args:
        keep: newest steps that stay; None only reads: nothing is deleted, another process may be writing there.
    """

    def __init__(self, directory: Path, keep: int | None) -> None:
        self.directory = directory
        if keep is None:
            options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0)
        else:
            if jax.process_index() == 0:
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
        """The newest complete step, None if there is none."""
        return latest_whole_step(self.directory)

    def meta(self, step: int) -> dict[str, Any]:
        """What was stored beside the state: version, format, config, stage, samples_seen, fingerprint.

        Raises:
            ConfigError: for a checkpoint of another format. CheckpointError: an unreadable one.
        """
        meta = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        check_format(meta, f"checkpoint {self.directory / str(step)}")
        return meta

    def restore(self, step: int, abstract: Mapping[str, ArrayTree]) -> dict[str, Any]:
        """Items of a checkpoint, in the shapes and shardings of their abstract trees, whatever mesh wrote them.

        Args:
            abstract: "params" alone, or with "train_state"; what is not named is not read.

        Raises:
            CheckpointError: unreadable, damaged, or of another model (the message has the leaf and both shapes).
            ConfigError: of another format.
        """
        expected = self.meta(step)["checksums"]
        for name, tree in abstract.items():
            self._check_shapes(step, name, tree)
        items = self._read(step, **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()})
        restored = {name: items[name] for name in abstract}
        damaged = [path for path, value in _checksums(restored).items() if expected[path] != value]
        if damaged:
            raise self._read_error(step, f"damaged on disk: {', '.join(damaged[:3])}")
        return restored

    def save(self, step: int, items: Mapping[str, ArrayTree], meta: dict[str, Any]) -> None:
        """Start writing; an error of the save before is raised here.

        Args:
            items: "params" and "train_state". meta: what is stored as JSON beside them.

        Raises:
            CheckpointError: the disk refuses, or a newer step is there (Orbax would keep both, and resume from that).
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
        """Until the last save is whole on disk; raises its error."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(self.latest_step(), error) from error

    def _check_shapes(self, step: int, name: str, abstract: Any) -> None:
        """Raise CheckpointError naming the leaf and both shapes if the stored model has another size."""
        stored = _paths(self._metadata(step, name))
        for path, leaf in _paths(abstract).items():
            if path not in stored:
                raise self._read_error(step, f"it has no {name}/{path}")
            if tuple(stored[path].shape) != leaf.shape:
                raise CheckpointError(
                    f"checkpoint {self.directory / str(step)}: {path} has shape {tuple(stored[path].shape)}, the model "
                    f"{leaf.shape}; a checkpoint of a smaller model becomes one of a larger by growth"
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
        except Exception as error:  # Orbax raises that very class for an array that cannot be decoded
            raise self._read_error(step, error) from error

    def _read_error(self, step: int, error: Exception | str) -> CheckpointError:
        older = [s for s in self._manager.all_steps() if s < step]
        cure = f"; delete that folder to go on from step {max(older)}" if older else ""
        return CheckpointError(f"checkpoint {self.directory / str(step)} cannot be read: {_first_line(error)}{cure}")


def latest_whole_step(directory: Path) -> int | None:
    """The newest step in `directory` that was written to its end; None if there is none, or no such folder."""
    folders = directory.iterdir() if directory.is_dir() else ()
    return max((int(folder.name) for folder in folders if folder.name.isdigit() and _is_whole(folder)), default=None)


def remove_incomplete(directory: Path) -> list[Path]:
    """Delete step folders that are not whole (a killed save, or an empty folder that Orbax would take for the newest).

    Returns those removed; each is logged.
    """
    removed = []
    if directory.is_dir():
        for folder in sorted(directory.iterdir()):
            if folder.is_dir() and folder.name.isdigit() and not _is_whole(folder):
                logging.warning("skipped and removed %s: not a complete checkpoint", folder)
                shutil.rmtree(folder)
                removed.append(folder)
    return removed


def _is_whole(folder: Path) -> bool:
    return (folder / "_CHECKPOINT_METADATA").is_file() and (folder / "params").is_dir()


def _paths(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _checksums(tree: Any) -> dict[str, int]:
    """Sum modulo 2^32 of the bits of each leaf: the file format does not notice a flipped byte inside an array."""
    return {path: int(value) for path, value in _paths(jax.device_get(_sum_bits(tree))).items()}


@jax.jit
def _sum_bits(tree: Any) -> Any:
    def bits(x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.bitcast_convert_type(x, jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(bits, tree)


def _first_line(error: Exception | str) -> str:
    """One readable line; tensor stores append their whole specification."""
    return " ".join(str(error).split())[:300] or type(error).__name__
