"""Growth of a checkpoint into a new workdir, without training: `flmjax grow`."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flmjax.config import (
    SIZES,
    ConfigError,
    ModelConfig,
    RunConfig,
    from_config_dict,
    resize,
    to_json,
    validate,
    validate_mesh,
)
from flmjax.data.loader import fingerprint, validation_rows
from flmjax.data.prepare import load, prepare
from flmjax.data.tokenizers import Tokenizer
from flmjax.growth.certificate import Certificate, certify
from flmjax.growth.grow import check_growth, grow, grow_params, plan_growth
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import Placement
from flmjax.training.checkpoint import Checkpoints
from flmjax.training.loop import claim_workdir, data_directory, mixture_schedule, stage_ramp, with_vocabulary
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import put_batch

DURING_TRAINING = {
    "mask": "its mask opens while the model trains",
    "learned": "it learns from batches of text",
}


class Source(NamedTuple):
    """The newest checkpoint of a run."""

    workdir: Path
    step: int
    config: RunConfig
    stage: int

    @property
    def model(self) -> ModelConfig:
        """Of the stage that the checkpoint belongs to."""
        return self.config.stage_models[self.stage]


def plan_checkpoint(config: RunConfig, source: Path) -> str:
    """What `grow_checkpoint` would do, a line for each leaf. Touches no weight, writes nothing.

    Raises:
        ConfigError, GrowthError: as grow_checkpoint.
    """
    found, operator = _newest(source), config.stages[0].growth
    plan = plan_growth(found.model, _target(config, found.model), operator)
    rows = [(leaf.path, str(leaf.old_shape), str(leaf.new_shape), "; ".join(leaf.rules) or "as it is") for leaf in plan]
    path, old, new = (max(len(row[i]) for row in rows) for i in range(3))
    lines = [f"{row[0]:{path}}  {row[1]:{old}} -> {row[2]:{new}}  {row[3]}" for row in rows]
    before, after = (
        sum(math.prod(shape) for shape in shapes) for shapes in zip(*[leaf[1:3] for leaf in plan], strict=True)
    )
    return "\n".join(
        [*lines, f"'{operator.family}' from {source} step {found.step}: parameters {before:,} -> {after:,}; dry run"]
    )


def grow_checkpoint(config: RunConfig, source: Path, workdir: Path, weights_only: bool = False) -> Certificate:
    """Grow the newest checkpoint of the run in `source` to the model of `config`'s first stage.

    `workdir` gets the config, the certificate and a checkpoint at step 0, from which `flmjax train` goes on. The
    operator is the first stage's. The state is restored on the new mesh, so that growth never crosses meshes.

    Args:
        config: of the new run; its data must have the vocabulary that the source was trained with.
        weights_only: do not take the optimizer's state along; moments start at 0.

    Raises:
        ConfigError: a workdir, a vocabulary or a setting that does not fit. CheckpointError: an unreadable source.
        GrowthError: sizes that cannot be, or a result that is not what the operator claims. Nothing is written then
            but the prepared data.
    """
    found = _newest(source)
    if (workdir / "checkpoints").exists():
        raise ConfigError(f"{workdir} holds checkpoints already; take another --workdir")
    _target(config, found.model)  # refuses before anything is computed
    data = prepare(config.data, data_directory(config, workdir), progress=True)
    asked, config = config, with_vocabulary(config, data)
    new = _target(config, found.model)
    check_vocabulary(load(data_directory(found.config, source)).tokenizer, data.tokenizer, source, workdir)
    mesh = make_mesh(validate_mesh(config, jax.device_count()), jax.devices())
    before, after = (state_spec(model, config.optimizer, mesh) for model in (found.model, new))
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    operator = config.stages[0].growth
    with Checkpoints(source / "checkpoints", keep=None) as checkpoints:
        if weights_only:
            params = checkpoints.restore_params(found.step, before.abstract.params)
            program = jax.jit(
                lambda params, key: grow_params(params, found.model, new, operator, key),
                out_shardings=after.shardings.params,
            )
            grown = dataclasses.replace(init_state(after, config.seed), params=program(params, key))
        else:
            state = checkpoints.restore(found.step, before.abstract)
            params = state.params
            program = jax.jit(
                lambda state, key: grow(state, found.model, new, operator, key), out_shardings=after.shardings
            )
            zero = jnp.zeros((), jnp.int32)
            grown = dataclasses.replace(program(state, key), step=zero, nonfinite=zero)

    data_axes = mesh.shape["replica"] * mesh.shape["fsdp"]
    rows = -(-config.certificate_rows // data_axes) * data_axes
    batch = validation_rows(data, config.data, length=found.model.max_length, rows=rows)
    certificate = certify(
        params,
        grown.params,
        found.model,
        new,
        put_batch(batch, data.tokenizer.token_bytes, mesh),
        operator=operator,
        key=key,
        placement=Placement(mesh),
        float64_below=config.certificate_float64_below,
        step=0,
        from_stage=f"{source} step {found.step}",
        to_stage=config.stages[0].name,
        tolerance=config.certificate_tolerance,
    )
    certificate.check()
    claim_workdir(asked, workdir)
    certificate.save(workdir / "certificates")
    schedule: Any = mixture_schedule(config, data)
    meta = {
        "stage": 0,
        "samples_seen": 0,
        "fingerprint": fingerprint(data, config.data, seed=config.seed, length=new.max_length, schedule=schedule),
        "config": to_json(config),
    }
    with Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints:
        checkpoints.save(0, grown, meta)
        checkpoints.wait()
    return certificate


def check_vocabulary(old: Tokenizer, new: Tokenizer, source: Path, workdir: Path) -> None:
    """Every old id must mean what it meant; the new vocabulary has at least as many.

    Raises:
        ConfigError: naming the first id that does not.
    """
    if old.fingerprint == new.fingerprint:
        return
    differs = next((i for i in range(old.vocab_size) if old.decode([i]) != new.decode([i])), None)
    if old.end_id != new.end_id:
        differs = old.end_id
    if differs is not None:
        raise ConfigError(
            f"the vocabulary of {workdir} is not that of {source}: id {differs} means {new.decode([differs])!r}, there "
            f"{old.decode([differs])!r}; --config.data.directory={source / 'data'} takes its data"
        )


def _newest(source: Path) -> Source:
    if not (source / "checkpoints").is_dir():
        raise ConfigError(f"--source={source} is no workdir of a run: it has no checkpoints")
    with Checkpoints(source / "checkpoints", keep=None) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise ConfigError(f"--source={source} has no complete checkpoint")
        meta = checkpoints.meta(step)
    config = from_config_dict(meta["config"])
    ramp = stage_ramp(config, meta["stage"])
    if ramp is not None and step < ramp.end:
        raise ConfigError(f"--source={source} stands at step {step}, its mask is open at step {ramp.end}: train on")
    return Source(source, step, config, meta["stage"])


def _target(config: RunConfig, old: ModelConfig) -> ModelConfig:
    """The new model, checked against what growth makes of the old one.

    Raises:
        ConfigError: with the flags that would do.
    """
    family = config.stages[0].growth.family
    if family in DURING_TRAINING:
        raise ConfigError(
            f"stages[0].growth.family='{family}' grows in a run, not between runs: {DURING_TRAINING[family]}; make the "
            "larger model a further stage, or take zero or duplicate"
        )
    validate(config)
    new = config.stage_models[0]
    if new.vocab_size is None:
        new = dataclasses.replace(new, vocab_size=old.vocab_size)
    derived = resize(old, family, **{field: getattr(new, field) for field in SIZES})
    kept = {name: getattr(derived, name) for name in ("norm_eps", "rotary_dim", "rotary_repeat")}
    check_growth(old, dataclasses.replace(new, **kept), config.stages[0].growth)
    wrong = [f"--config.model.{name}={value}" for name, value in kept.items() if value != getattr(new, name)]
    if wrong:
        raise ConfigError(f"growth keeps the function with {' '.join(wrong)}; 'flmjax train' needs the same after it")
    return new
