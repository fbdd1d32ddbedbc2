"""The growth between two stages of a run: the state of the larger model, and the certificate of the growth."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import jax

from flmjax.config import RunConfig, Stage
from flmjax.data.batch import data_host, global_batch, split_over_devices
from flmjax.data.loader import TrainingStream
from flmjax.evaluation.validation_loss import padded_batches
from flmjax.growth.certificate import GrowthPoint, certify
from flmjax.growth.growth import Growth
from flmjax.growth.learned import tune
from flmjax.model.loss import divisor
from flmjax.sharding.axes import Params
from flmjax.sharding.processes import is_writer
from flmjax.sharding.rules import Placement, batch_sharding, whole_rows
from flmjax.training.state import StateSpec, TrainState
from flmjax.training.step import gradients, jit_growth

Log = Callable[[str], None]


def grow_into(
    stage: Stage,
    state: TrainState,
    specs: tuple[StateSpec, StateSpec],
    key: jax.Array,
    stream: TrainingStream,
    log: Log,
    first_sample: int = 0,
) -> TrainState:
    """The state at the start of `stage`, grown from the state at the end of the stage before; not certified yet.

    Args:
        state: the state at the end of the stage before; not donated.
        specs: descriptions of the old and of the new state.
        key: key of the growth.
        stream: training data, for a learned growth.
        log: prints a line.
        first_sample: of the run in the stream; not 0 after a growth between runs.
    """
    old, new = specs
    grown = jit_growth(old, new, Growth.into(stage))(state, key)
    if not stage.tuning_steps:
        return grown
    assert stage.previous is not None
    first = first_sample + stage.previous.samples_before(stage.start)
    sharding, size = batch_sharding(new.mesh), stage.config.batch_size
    host_batches = stream.batches(start=first, batch_size=size, **data_host(sharding, size))
    batches = (global_batch(batch, sharding) for batch in itertools.islice(host_batches, stage.tuning_steps))
    model = dataclasses.replace(new.config, dropout=0.0)

    def value_and_grad(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, Params]:
        layout = stage.layout
        sums, grads = gradients(
            params, batch, key, model, Placement(new.mesh), layout.microbatches, layout.gradient_reduction
        )
        return sums["loss"] / divisor(sums["weight"]), grads

    params, losses = tune(state.params, Growth.into(stage, key), value_and_grad, batches, new.shardings.params)
    log(
        f"growth learned in {stage.tuning_steps} updates on {stage.tuning_steps * size:,} samples: "
        f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    )
    return dataclasses.replace(grown, params=params)


def prove_growth(
    config: RunConfig,
    workdir: Path,
    stream: TrainingStream,
    meshes: tuple[jax.sharding.Mesh, jax.sharding.Mesh],
    params: tuple[Params, Params],
    growth: Growth,
    point: GrowthPoint,
    log: Log,
) -> None:
    """Certify the growth from the first of `params` to the second on validation sequences, and refuse a wrong one.

    Sequences have the old model's length. The certificate is stored in WORKDIR/certificates, even if it fails.

    Args:
        meshes: of the old and of the new stage, over the same devices in the same order.

    Raises:
        GrowthError: if the growth does not keep its claim.
    """
    size = whole_rows(config.certificate_rows, *meshes)
    stream = dataclasses.replace(stream, length=growth.old.max_length)
    validation = stream.validation_set(size)
    batch, _ = next(padded_batches((validation.rows, validation.sources), size))
    certificate = certify(
        params,
        growth,
        split_over_devices(batch, batch_sharding(meshes[1])),
        point,
        placements=(Placement(meshes[0]), Placement(meshes[1])),
        float64_below=config.certificate_float64_below,
        roundings=config.certificate_roundings,
    )
    log(str(certificate))
    if is_writer():
        certificate.save(workdir / "certificates")
    certificate.check()


def growth_key(config: RunConfig, index: int) -> jax.Array:
    """Key of the growth into stage number `index`; for a growth between runs `index` is 0."""
    return jax.random.fold_in(jax.random.key(config.seed), index + 1)
