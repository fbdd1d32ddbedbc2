"""Growth of a checkpoint into a new workdir, without training: `flmjax grow`."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flmjax.config import DERIVED, SIZES, ConfigError, ModelConfig, RunConfig, Stage, from_stored, resize, to_json
from flmjax.config.validate import check_mesh, validate, validate_mesh
from flmjax.data.loader import TrainingStream
from flmjax.data.prepare import prepare
from flmjax.data.prepared import load, with_vocabulary
from flmjax.data.tokenizers import Tokenizer
from flmjax.growth.certificate import GrowthPoint
from flmjax.growth.families import family_of
from flmjax.growth.grow import plan_growth
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import ramp_of
from flmjax.optimizer.schedule import new_warmup
from flmjax.sharding.mesh import make_mesh
from flmjax.text_table import text_table
from flmjax.training.growth_point import growth_key, prove_growth
from flmjax.training.state import StateSpec, TrainState, from_items, init_state, state_spec, to_items
from flmjax.training.step import jit_growth
from flmjax.workdir.checkpoint import Checkpoints, latest_whole_step
from flmjax.workdir.paths import data_directory, write_config


class Source(NamedTuple):
    """The newest checkpoint of a run: its step, the run's config, and its stage."""

    step: int
    config: RunConfig
    stage: Stage

    @property
    def model(self) -> ModelConfig:
        """Configuration of the model in the checkpoint."""
        return self.stage.model


def plan_checkpoint(config: RunConfig, source: Path) -> str:
    """Plan of `grow_checkpoint` as text, one line for each leaf. No parameter is read and nothing is written.

    Raises:
        ConfigError, GrowthError: as grow_checkpoint.
    """
    origin, growth_config = _newest(source), config.stages[0].growth
    plan = plan_growth(Growth(origin.model, _target(config, origin.model), growth_config, growth_key(config, 0)))
    rows = [
        (leaf.path, str(leaf.old_shape), f"-> {leaf.new_shape}", "; ".join(leaf.rules) or "unchanged") for leaf in plan
    ]
    before, after = (
        sum(math.prod(shape) for shape in shapes) for shapes in zip(*[leaf[1:3] for leaf in plan], strict=True)
    )
    return "\n".join(
        [
            text_table(rows, left=4),
            f"'{growth_config.family}' from {source} step {origin.step}: parameters {before:,} -> {after:,}; dry run",
        ]
    )


def grow_checkpoint(config: RunConfig, source: Path, workdir: Path, weights_only: bool = False) -> None:
    """Grow the newest checkpoint of the run in `source` to the model of `config`'s first stage.

    `workdir` gets the certificate, then a checkpoint at step 0, from which `flmjax train` continues, and last the
    config. If growth is cut off before the config is written, `workdir` is not a workdir yet and growth starts again.
    The first stage has the family and the settings of the growth. The state is restored on the new mesh, then grown.

    Args:
        config: the new run; its data must have the vocabulary that the source was trained with.
        source: workdir of the old run.
        weights_only: leave the optimizer state behind; moments start at 0.

    Raises:
        ConfigError: for a workdir, a vocabulary or a setting that does not fit.
        CheckpointError: for an unreadable source.
        GrowthError: for impossible sizes, or a growth that does not keep its claim; no checkpoint is written.
    """
    origin = _newest(source)
    if (workdir / "config.json").exists() or latest_whole_step(workdir / "checkpoints") is not None:
        raise ConfigError(f"{workdir} holds a run already; take another --workdir")
    _target(config, origin.model)  # raises before data is prepared
    mesh_shape = validate_mesh(config, jax.device_count())
    check_mesh(origin.model, mesh_shape, f"--source={source}")
    data = prepare(config.data, data_directory(config, workdir), progress=True)
    user_config, config = config, with_vocabulary(config, data)
    new = _target(config, origin.model)
    check_vocabulary(data_directory(origin.config, source), data.tokenizer, workdir)
    mesh = make_mesh(mesh_shape, jax.devices())
    before, after = (state_spec(model, config.optimizer, mesh) for model in (origin.model, new))
    key = growth_key(config, 0)
    growth = Growth(origin.model, new, config.stages[0].growth, key, new_warmup(config.stages[0]))
    state = _restore(source / "checkpoints", origin.step, before, config.seed, weights_only)
    program = jit_growth(before, after, growth.config, growth.new_warmup)
    zero = jnp.zeros((), jnp.int32)
    grown = dataclasses.replace(program(state, key), step=zero, skipped_updates=zero)
    stream = TrainingStream.of_run(config, data)
    prove_growth(
        config,
        workdir,
        stream,
        mesh,
        (state.params, grown.params),
        growth,
        GrowthPoint(0, f"{source} step {origin.step}", config.stages[0].name),
        functools.partial(print, flush=True),
    )
    meta = {
        "stage": 0,
        "samples_seen": 0,
        "fingerprint": stream.fingerprint,
        "config": to_json(config),
    }
    with Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints:
        checkpoints.save(0, to_items(grown), meta)
        checkpoints.wait()
    write_config(user_config, workdir)


def _restore(directory: Path, step: int, spec: StateSpec, seed: int, weights_only: bool) -> TrainState:
    """The stored state at `step`, or with `weights_only` an initial state that has the stored parameters."""
    with Checkpoints(directory, keep=None) as checkpoints:
        if not weights_only:
            return from_items(checkpoints.restore(step, to_items(spec.abstract)))
        params = checkpoints.restore(step, {"params": spec.abstract.params})["params"]
    return dataclasses.replace(init_state(spec, seed), params=params)


def check_vocabulary(directory: Path, new: Tokenizer, workdir: Path) -> None:
    """Check that every id of the prepared data in `directory` means the same in `new`, which may have further ids.

    Raises:
        ConfigError: naming the first id with another meaning.
    """
    old = load(directory).tokenizer
    if old.fingerprint == new.fingerprint:
        return
    differs = next((i for i in range(old.vocab_size) if old.decode([i]) != new.decode([i])), None)
    if old.end_id != new.end_id:
        differs = old.end_id
    if differs is not None:
        raise ConfigError(
            f"the vocabulary of {workdir} is not the source's: id {differs} means {new.decode([differs])!r}, there "
            f"{old.decode([differs])!r}; --config.data.directory={directory} takes the source's data"
        )


def _newest(source: Path) -> Source:
    step = latest_whole_step(source / "checkpoints")
    if step is None:
        raise ConfigError(f"--source={source} is no workdir of a run: it has no complete checkpoint")
    with Checkpoints(source / "checkpoints", keep=None) as checkpoints:
        meta = checkpoints.meta(step)
    config = from_stored(meta, f"--source={source}")
    stage = config.schedule[meta["stage"]]
    ramp = ramp_of(stage)
    if ramp is not None and step < ramp.end:
        raise ConfigError(
            f"--source={source} is at step {step}, but its growth mask is open only at step "
            f"{ramp.end}; continue its training first"
        )
    return Source(step, config, stage)


def _target(config: RunConfig, old: ModelConfig) -> ModelConfig:
    """The new model, checked to be one that growth can reach from the old model.

    Raises:
        ConfigError: with the flags that are needed, or if the family grows only within a run.
        GrowthError: for impossible sizes.
    """
    family = config.stages[0].growth.family
    if (reason := family_of(config.stages[0].growth).needs_training) is not None:
        raise ConfigError(
            f"stages[0].growth.family='{family}' grows in a run, not between runs: {reason}; make the "
            "larger model a further stage, or take zero or duplicate"
        )
    validate(config)
    new = config.schedule[0].model
    if new.vocab_size is None:
        new = dataclasses.replace(new, vocab_size=old.vocab_size)
    derived = resize(old, family, **{field: getattr(new, field) for field in SIZES})
    kept = {name: getattr(derived, name) for name in DERIVED}
    Growth(old, dataclasses.replace(new, **kept), config.stages[0].growth)  # raises for impossible sizes
    same = {name: value == getattr(new, name) for name, value in kept.items()}
    same["norm_eps"] = math.isclose(kept["norm_eps"], new.norm_eps, rel_tol=1e-9)  # the tolerance of Growth
    wrong = [f"--config.model.{name}={kept[name]}" for name in kept if not same[name]]
    if wrong:
        raise ConfigError(f"growth keeps the function with {' '.join(wrong)}; 'flmjax train' needs the same after it")
    return new
