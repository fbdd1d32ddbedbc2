"""Growth of a checkpoint into a new workdir, without training: `flmjax grow`."""

import dataclasses
import functools
import math
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp

from flmjax.config import SIZES, ConfigError, ModelConfig, RunConfig, resize, to_json
from flmjax.config.validate import check_mesh, validate, validate_meshes
from flmjax.data.held_out import mixtures_of
from flmjax.data.loader import TrainingStream
from flmjax.data.prepare import has_same_preparation, prepare, ready_vocabulary
from flmjax.data.prepared import META_FILE, with_vocabulary
from flmjax.data.tokenizers import Tokenizer, load_tokenizer
from flmjax.growth.certificate import GrowthPoint
from flmjax.growth.families import family_of
from flmjax.growth.grow import plan_growth
from flmjax.growth.growth import Growth
from flmjax.growth.rules import GrowthError
from flmjax.model.attention import check_backends
from flmjax.model.transformer import abstract_params, count_parameters
from flmjax.optimizer.schedule import new_warmup
from flmjax.sharding.mesh import make_mesh
from flmjax.text_table import text_table
from flmjax.training.continuation import has_read, shifted
from flmjax.training.grow_config import vocabulary_settings
from flmjax.training.growth_point import growth_key, prove_growth
from flmjax.training.state import (
    ITEMS,
    StateSpec,
    TrainState,
    from_items,
    init_state,
    restore_items,
    state_spec,
    to_items,
)
from flmjax.training.step import jit_growth
from flmjax.workdir.checkpoint import CheckpointError, Checkpoints
from flmjax.workdir.local_copy import WorkingCopy, store_data, working_copy
from flmjax.workdir.paths import (
    Parent,
    begin_growth,
    checkpoint_directory,
    data_directory,
    end_growth,
    is_complete,
    latest_whole_step,
    locked_workdir,
    origin_url,
    unfinished_growth,
    write_config,
    write_parent,
)
from flmjax.workdir.position import Position, newest_position
from flmjax.workdir.starts import StartEntry
from flmjax.workdir.storage import remove_tree

LOG = functools.partial(print, flush=True)


def plan_checkpoint(config: RunConfig, source: Path, workdir: Path | None) -> str:
    """Plan of `grow_checkpoint` as text, one line for each leaf. No parameter is read and nothing is written.

    Args:
        workdir: of the new run, whose prepared data are checked; None: not known.

    Raises:
        ConfigError, GrowthError: as grow_checkpoint.
    """
    origin, growth_config = _newest(source), config.stages[0].growth
    new = _target(config, origin)
    check_vocabulary(config, source, origin, workdir)
    plan = plan_growth(Growth(origin.stage.model, new, growth_config, growth_key(config, 0)))
    rows = [
        (leaf.path, str(leaf.old_shape), f"-> {leaf.new_shape}", "; ".join(leaf.rules) or "unchanged") for leaf in plan
    ]
    before, after = (count_parameters(abstract_params(model)[0]) for model in (origin.stage.model, new))
    sizes = f"parameters {before:,} -> {after:,}"
    return "\n".join(
        [
            text_table(rows, left=4),
            f"'{growth_config.family}' from {_name(source)} step {origin.step}: {sizes}; dry run",
        ]
    )


def grow_checkpoint(config: RunConfig, source: Path, workdir: Path, weights_only: bool = False) -> None:
    """Grow the newest checkpoint of the run in `source` to the model of `config`'s first stage.

    `workdir` gets the certificate, then a checkpoint at step 0, from which `flmjax train` continues, and last the
    config. If growth is cut off before the config is written, `workdir` is not a workdir yet and growth starts again.
    The first stage has the family and the settings of the growth. The state is restored on the new mesh, then grown.

    Args:
        config: the new run; its data must have the vocabulary that the source was trained with.
        source: workdir of the old run, or a reading copy of it.
        workdir: a folder, or a path of etils on object storage.
        weights_only: leave the optimizer state behind; moments start at 0.

    Raises:
        ConfigError: for a workdir, a vocabulary or a setting that does not fit.
        CheckpointError: for an unreadable source.
        GrowthError: for impossible sizes, or a growth that does not keep its claim; no checkpoint is written.
    """
    with working_copy(workdir) as copy:
        _grow_in(config, source, copy, weights_only)


def _grow_in(config: RunConfig, source: Path, copy: WorkingCopy, weights_only: bool) -> None:
    workdir = copy.folder
    with locked_workdir(workdir), StartEntry(workdir) as entry:
        origin, checkpoints = _newest(source), checkpoint_directory(workdir)
        is_run = (workdir / "config.json").exists() or latest_whole_step(checkpoints) is not None
        if is_run and unfinished_growth(workdir) is None:
            raise ConfigError(f"{workdir} holds a run already; take another --workdir")
        _target(config, origin)  # raises before data is prepared
        first_mesh, *_ = validate_meshes(config, jax.device_count())
        check_backends(config, jax.devices()[0].platform)
        check_mesh(_on_mesh(origin.stage.model, config), first_mesh, f"--source={_name(source)}")
        check_vocabulary(config, source, origin, workdir)
        begin_growth(workdir, _name(source))
        copy.upload()
        try:
            with entry.time.during("growth"):
                _grow(config, source, origin, workdir, make_mesh(first_mesh, jax.devices()), entry, weights_only)
        except (ConfigError, GrowthError):
            end_growth(workdir)
            raise


def _grow(
    config: RunConfig,
    source: Path,
    origin: Position,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    entry: StartEntry,
    weights_only: bool,
) -> None:
    """Prepare the data, grow, prove and write what grow_checkpoint promises."""
    with entry.time.during("data preparation"):
        data = prepare(config.data, data_directory(config, workdir), mixtures=mixtures_of(config), progress=True)
        store_data(workdir)
    user_config, config = config, with_vocabulary(config, data)
    check_vocabulary(config, source, origin, workdir)
    new = _target(config, origin)
    old = _on_mesh(origin.stage.model, config)
    before, after = (state_spec(model, config.optimizer, mesh) for model in (old, new))
    key = growth_key(config, 0)
    growth = Growth(old, new, config.stages[0].growth, key, new_warmup(config.stages[0]))
    try:
        state = _restore(checkpoint_directory(source), origin, before, config.seed, weights_only)
    except CheckpointError:
        if is_complete(checkpoint_directory(source) / str(origin.step)):
            raise
        newest = _newest(source)  # the source is in training and keeps its newest checkpoints alone
        LOG(f"{_name(source)}: the checkpoint at step {origin.step} is gone; that at step {newest.step} is grown")
        _grow(config, source, newest, workdir, mesh, entry, weights_only)
        return
    program = jit_growth(before, after, growth)
    zero = jnp.zeros((), jnp.int32)
    grown = dataclasses.replace(program(state, key), step=zero, skipped_updates=zero)
    stream = TrainingStream.of_run(config, data)
    prove_growth(
        config,
        workdir,
        stream,
        (mesh, mesh),
        (state.params, grown.params),
        growth,
        GrowthPoint(0, f"{_name(source)} step {origin.step}", config.stages[0].name),
        LOG,
    )
    stream, first_sample = _lineage(stream, source, origin)
    meta = {
        "stage": 0,
        "samples_seen": first_sample,
        "skipped_samples": [str(skipped) for skipped in stream.skipped],
        "fingerprint": stream.fingerprint,
        "config": to_json(config),
    }
    directory = checkpoint_directory(workdir)
    if directory.exists():  # of a growth that was cut off
        remove_tree(directory)
    with Checkpoints(directory, config.checkpoint.keep) as checkpoints:
        checkpoints.save(0, to_items(grown), meta)
        checkpoints.wait()
    tokens = origin.stage.tokens_before(origin.step)
    path = origin_url(source) or str(source.resolve())
    write_parent(Parent(path, origin.step, origin.stage.name, tokens, first_sample), workdir)
    entry.write(first_step=0, last_step=0)
    write_config(user_config, workdir)
    end_growth(workdir)


def _lineage(stream: TrainingStream, source: Path, origin: Position) -> tuple[TrainingStream, int]:
    """The stream of the new run, and its first sample: the next one of the source's data if both streams are one."""
    continued = shifted(stream, origin.samples_seen)
    if has_read(origin, continued):
        LOG(f"data: training goes on at sample {origin.samples_seen:,}, where {_name(source)} stopped")
        return continued, origin.samples_seen
    LOG(f"data: not the data, order or mixture of {_name(source)}: training starts at sample 0, and samples may repeat")
    return stream, 0


def _on_mesh(model: ModelConfig, config: RunConfig) -> ModelConfig:
    """The source's model with the padding of the vocabulary that the new run's mesh needs."""
    multiple = math.lcm(model.vocab_multiple, config.schedule[0].model.vocab_multiple)
    return dataclasses.replace(model, vocab_multiple=multiple)


def _restore(directory: Path, origin: Position, spec: StateSpec, seed: int, weights_only: bool) -> TrainState:
    """The source's state, or with `weights_only` an initial state that has the source's parameters."""
    with Checkpoints(directory, keep=None) as checkpoints:
        names = ("params",) if weights_only else ITEMS
        items = restore_items(checkpoints, origin.step, origin.stage.model, spec, names)
    return dataclasses.replace(init_state(spec, seed), **items) if weights_only else from_items(items)


def check_vocabulary(config: RunConfig, source: Path, origin: Position, workdir: Path | None) -> None:
    """Check that every id of the source's vocabulary means the same in the new run's, which may have further ids.

    Nothing is prepared: a vocabulary that is still to be trained passes if its settings are the source's.

    Args:
        workdir: of the new run; None: not known, so its data are not prepared, but for those of data.directory.

    Raises:
        ConfigError: with the flags that take the source's vocabulary; or if the source has no tokenizer.
    """
    old_directory = data_directory(origin.config, source)
    is_known = workdir is not None or config.data.directory is not None
    directory = data_directory(config, workdir or Path())
    old, is_prepared = load_tokenizer(old_directory), is_known and (directory / META_FILE).exists()
    if not is_prepared and has_same_preparation(config.data, origin.config.data):
        return  # the text may have changed since: checked again when the data are prepared
    new = load_tokenizer(directory) if is_prepared else _ready_vocabulary(config)
    fault = "it would be trained anew" if new is None else vocabulary_fault(old, new)
    if fault is None:
        return
    cures = _vocabulary_cures(config, source, origin, is_prepared)
    if is_prepared and not any("--config.data.directory=" in cure for cure in cures):
        cures.append(f"another --workdir (or no {directory})")
    run = "the new run" if workdir is None else workdir
    raise ConfigError(f"the vocabulary of {run} is not the source's: {fault}; {' and '.join(cures)} takes the source's")


def _vocabulary_cures(config: RunConfig, source: Path, origin: Position, is_prepared: bool) -> list[str]:
    """The flags that take the source's vocabulary, as one text; [] if the config has them.

    Flags cannot name data on object storage: these are to be copied to a local folder first.
    """
    directory = data_directory(origin.config, source)
    settings = vocabulary_settings(directory)
    if settings is None:
        cure: dict[str, object] = {"directory": str(directory)}
    else:
        cure = {name: value for name, value in settings.items() if getattr(config.data, name) != value}
        if is_prepared and config.data.directory is not None:
            cure["directory"] = None
    if not cure:
        return []
    copying, url = "", origin_url(source)
    if url is not None and any(str(value).startswith(str(directory)) for value in cure.values()):
        copying = f"copy {url}/data to a local folder, DATA; "
        cure = {name: str(value).replace(str(directory), "DATA") for name, value in cure.items()}
    return [copying + " ".join(shlex.quote(f"--config.data.{name}={value}") for name, value in cure.items())]


def _ready_vocabulary(config: RunConfig) -> Tokenizer | None:
    """The vocabulary of the data before they are prepared; None if it is to be trained."""
    data, of_mixture = config.data, None
    if data.mixture is not None and data.vocabulary is None:
        from flmjax.data.sources.seqio_mixture import read_mixture  # TensorFlow: 5 s, an optional package

        of_mixture = read_mixture(data).vocabulary
    return ready_vocabulary(data, of_mixture)


def vocabulary_fault(old: Tokenizer, new: Tokenizer) -> str | None:
    """The first id of `old` that means something else in `new`, as text; None if there is none."""
    if old.fingerprint == new.fingerprint:
        return None
    if old.vocab_size > new.vocab_size:
        return f"it has {new.vocab_size:,} ids, there are {old.vocab_size:,}"
    if old.end_id != new.end_id:
        return f"its end id is {new.end_id}, there {old.end_id}"
    differs = next((i for i in range(old.vocab_size) if old.decode([i]) != new.decode([i])), None)
    return None if differs is None else f"id {differs} means {new.decode([differs])!r}, there {old.decode([differs])!r}"


def _name(source: Path) -> Path | str:
    """The source as its user named it: the URL, not its reading copy."""
    return origin_url(source) or source


def _newest(source: Path) -> Position:
    position = newest_position(source)
    if position is None:
        raise ConfigError(f"--source={_name(source)} is no workdir of a run: it has no complete checkpoint")
    if position.step in position.stage.ramp:
        raise ConfigError(
            f"--source={_name(source)} is at step {position.step}, but its growth mask is open only at step "
            f"{position.stage.ramp.stop}; continue its training first"
        )
    return position


def _target(config: RunConfig, origin: Position) -> ModelConfig:
    """The new model, checked to be one that growth can reach from the source's.

    Raises:
        ConfigError: with all flags that are needed, for impossible sizes, or if the family grows only within a run.
    """
    old, growth = _on_mesh(origin.stage.model, config), config.stages[0].growth
    if (reason := family_of(growth).needs_training) is not None:
        raise ConfigError(
            f"stages[0].growth.family='{growth.family}' grows in a run, not between runs: {reason}; make the "
            "larger model a further stage, or take zero or duplicate"
        )
    validate(config)
    new = config.schedule[0].model
    if new.vocab_size is None:
        new = dataclasses.replace(new, vocab_size=old.vocab_size)
    derived = resize(old, growth.family, **{field: getattr(new, field) for field in SIZES})
    names = [field.name for field in dataclasses.fields(ModelConfig) if not field.metadata and field.name not in SIZES]
    kept = {name: getattr(derived, name) for name in names}
    try:
        Growth(old, dataclasses.replace(new, **kept), growth)
    except GrowthError as error:
        raise ConfigError(str(error)) from error
    same = {name: value == getattr(new, name) for name, value in kept.items()}
    same["norm_eps"] = math.isclose(kept["norm_eps"], new.norm_eps, rel_tol=1e-9)  # the tolerance of Growth
    wrong = [f"--config.model.{name}={kept[name]}" for name in kept if not same[name]]
    if wrong:
        raise ConfigError(f"growth keeps the function with {' '.join(wrong)}; 'flmjax train' needs the same after it")
    return new
