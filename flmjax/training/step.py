"""The training step: gradients of a batch, one optimizer update, and the jitted programs of step and growth."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flmjax.config import GradientReduction, ModelConfig
from flmjax.config.run import Layout
from flmjax.growth.grow import grow
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import Ramp
from flmjax.hardware import compiler_options
from flmjax.model.loss import divisor, loss_sums, teacher_means
from flmjax.model.microbatches import in_parts
from flmjax.model.transformer import abstract_params
from flmjax.sharding.axes import Params, path_name
from flmjax.sharding.reshard import divides, reshard
from flmjax.sharding.rules import REPLICAS, Placement, batch_sharding, replicated, tree_shardings
from flmjax.training.state import StateSpec, TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Update = tuple[int, TrainState, Metrics]  # updates of the run so far, state and metrics after the last of them


def accumulate(value_and_grad: Callable[..., Any], microbatches: int) -> Callable[..., Any]:
    """Function transform for gradient accumulation: the results of value_and_grad(params, batch, key), summed.

    Microbatch j has the sequences that in_parts gives it, and its own key, fold_in(key, j).
    The results must be sums, not means: the caller divides once, and a microbatch without a weighted target adds 0.
    """

    def summed(params: Params, batch: Batch, key: jax.Array) -> Any:
        def of_part(part: Batch, number: Any) -> tuple[Any, None]:
            key_of_part = key if number is None else jax.random.fold_in(key, number)
            return value_and_grad(params, part, key_of_part), None

        return in_parts(of_part, batch, microbatches)[0]

    return summed


def gradients(
    params: Params,
    batch: Batch,
    key: jax.Array,
    config: ModelConfig,
    placement: Placement | None,
    microbatches: int = 1,
    reduction: GradientReduction = "step",
) -> tuple[dict[str, jax.Array], Params]:
    """(sums of model.loss.loss_sums over the batch, gradients of the loss divided by the weight of the targets).

    Args:
        reduction: "microbatch": gradients are summed over all devices in every microbatch. "step": over fsdp and tensor
            in every microbatch, over the replicas once: each replica adds up its own microbatches.
    """
    if placement is None or placement.mesh.shape["replica"] == 1 or microbatches == 1 or reduction == "microbatch":
        sums, grads = accumulate(sums_and_gradients(config, placement), microbatches)(params, batch, key)
    else:
        sums, grads = over_replicas(config, placement, microbatches)(params, batch, key)
    weight = divisor(sums["weight"])
    return sums, jax.tree.map(lambda g: g / weight, grads)


def sums_and_gradients(config: ModelConfig, placement: Placement | None) -> Callable[..., Any]:
    """Function (params, batch, key) -> (sums of loss_sums, gradients of the sum that training minimises)."""

    def loss(params: Params, batch: Batch, key: jax.Array) -> Any:
        return loss_sums(params, batch, config, placement, key if config.dropout else None)

    def value_and_grad(params: Params, batch: Batch, key: jax.Array) -> Any:
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        return sums, grads

    return value_and_grad


def over_replicas(config: ModelConfig, placement: Placement, microbatches: int) -> Callable[..., Any]:
    """The accumulated sums_and_gradients, added up over the replicas after the last microbatch.

    The sequences of a batch are split over (replica, fsdp), replica first, so that a replica's are R neighbouring parts
    and every device keeps the sequences that it holds. The sums of all replicas have a leading axis R, which is sharded
    over `replica`: a device has no larger arrays than without it.
    """
    mesh = placement.mesh
    replicas = mesh.shape["replica"]
    of_replica = dataclasses.replace(placement, is_of_replica=True)
    value_and_grad = sums_and_gradients(config, of_replica)
    shardings = tree_shardings(mesh, abstract_params(config)[1])

    def pinned(params: Params, part: Batch, key: jax.Array) -> Any:
        sums, grads = value_and_grad(params, part, key)
        return sums, jax.lax.with_sharding_constraint(grads, shardings)

    def summed(params: Params, batch: Batch, key: jax.Array) -> Any:
        parts = jax.tree.map(lambda x: x.reshape(replicas, -1, *x.shape[1:]), batch)
        parts = jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, P("replica", "fsdp")))
        of_each = jax.vmap(
            accumulate(pinned, microbatches), (None, 0, None), axis_name=REPLICAS, spmd_axis_name="replica"
        )
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), of_each(params, parts, key))

    return summed


def train_step(
    state: TrainState,
    batch: Batch,
    learning_rate: jax.Array,
    loss_limit: jax.Array | None = None,
    *,
    spec: StateSpec,
    microbatches: int,
    ramp: Ramp | None = None,
    reduction: GradientReduction = "step",
    norms: bool = False,
) -> tuple[TrainState, Metrics]:
    """One update. If the loss, a gradient or a new parameter is not finite, nothing changes and the skip is counted.

    Args:
        state: the state before the update.
        batch: arrays of a Batch (flmjax.data.batch) on the devices.
        learning_rate: float32 scalar.
        loss_limit: float32 scalar; an update whose loss is above it is skipped too. None: no loss is too high.
        spec: description of the state.
        microbatches: number of parts that the batch is computed in.
        ramp: a growth mask that is still opening. Masked parameters have a gradient of 0 at the mask's first update
            only; weight decay shrinks them in that update too.
        reduction: when gradients are summed over the replicas; see `gradients`.
        norms: whether the metrics have the norms of the gradient of every leaf.

    Returns:
        The new state and metrics: loss (nats a token), bits_per_byte, gradient_norm, skipped_updates (skips in a row),
        finite (for each leaf, in tree order, whether its gradient and its new value are). If the data has teachers,
        loss is the mean over all sequences, language_loss and bits_per_byte are means over the sequences of text,
        teacher_loss is the mean over the sequences of teachers, and judgement_accuracy lies in 0 to 1; a mean is NaN if
        the batch has no such sequence. With a loss_limit also spike, whether the loss is above it; with norms also
        gradient_norms, one for each leaf in tree order.
    """
    sums, grads = state_gradients(state, batch, spec, microbatches, ramp, reduction)
    squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
    updates, opt_state = spec.optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
    # Finite gradients can still overflow a parameter, by a huge rate, weight decay or 1 / eps.
    finite = jnp.isfinite(jnp.stack(squares)) & jnp.stack([jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(params)])
    ok = jnp.all(finite) & jnp.isfinite(sums["loss"])
    is_spike = None if loss_limit is None else mean_loss(sums) > loss_limit
    if is_spike is not None:
        ok &= ~is_spike
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(ok, new, old))
    skipped_updates = jnp.where(ok, 0, state.skipped_updates + 1)
    metrics = {
        "loss": mean_loss(sums),
        "bits_per_byte": sums["loss"] / jnp.log(2.0) / jnp.maximum(sums["bytes"], 1.0),
        "gradient_norm": jnp.sqrt(sum(squares, jnp.zeros(()))),
        "skipped_updates": skipped_updates,
        "finite": finite,
        **(teacher_means(sums) if "marks" in batch else {}),
        **({} if is_spike is None else {"spike": is_spike}),
        **({"gradient_norms": jnp.sqrt(jnp.stack(squares))} if norms else {}),
    }
    new_state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped_updates=skipped_updates,
    )
    return new_state, metrics


def state_gradients(
    state: TrainState, batch: Batch, spec: StateSpec, microbatches: int, ramp: Ramp | None, reduction: GradientReduction
) -> tuple[dict[str, jax.Array], Params]:
    """`gradients` at a state, for its stored parameters: through a growth mask that is still opening.

    Args: as of train_step.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    params, pull_back = state.params, None
    if ramp is not None:  # once for all microbatches
        params, pull_back = jax.vjp(lambda stored: ramp.at(stored, state.step), state.params)
    sums, grads = gradients(params, batch, key, spec.config, Placement(spec.mesh), microbatches, reduction)
    if pull_back is not None:
        grads = pull_back(grads)[0]
    # Pinned, else the partitioner may not shard the gradients.
    return sums, jax.lax.with_sharding_constraint(grads, spec.shardings.params)


def mean_loss(sums: dict[str, jax.Array]) -> jax.Array:
    """The loss of a batch, nats a weighted token, of the sums of loss_sums."""
    return sums["loss"] / divisor(sums["weight"])


def jit_train_step(
    spec: StateSpec,
    microbatches: int,
    ramp: Ramp | None = None,
    overlap_collectives: bool = True,
    deterministic: bool = False,
    reduction: GradientReduction = "step",
    norms: bool = False,
    skips_spikes: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted train_step: (state, batch, learning_rate) -> (state, metrics). The state is donated.

    The other arguments of train_step are fixed; see there. overlap_collectives and deterministic are settings of the
    run. With skips_spikes the function takes the loss_limit as a fourth argument.
    """
    options = compiler_options(spec.mesh.devices.flat[0].platform, overlap_collectives, deterministic)
    scalars = [replicated(spec.mesh)] * (2 if skips_spikes else 1)
    return jax.jit(
        functools.partial(
            train_step, spec=spec, microbatches=microbatches, ramp=ramp, reduction=reduction, norms=norms
        ),
        in_shardings=(spec.shardings, batch_sharding(spec.mesh), *scalars),
        out_shardings=(spec.shardings, replicated(spec.mesh)),
        donate_argnums=0,
        compiler_options=options or None,
    )


def jit_stage_step(
    spec: StateSpec, layout: Layout, ramp: Ramp | None, skips_spikes: bool = False
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted train_step with a stage's layout: training executes it, and `flmjax plan` compiles it."""
    return jit_train_step(
        spec,
        layout.microbatches,
        ramp,
        layout.overlap_collectives,
        layout.deterministic,
        layout.gradient_reduction,
        layout.norms,
        skips_spikes,
    )


def jit_growth(old: StateSpec, new: StateSpec, growth: Growth) -> Callable[[TrainState, jax.Array], TrainState]:
    """The jitted `growth`: (state, key) -> grown state. The old state is not donated: the certificate needs it.

    Between two meshes, which have the same devices in the same order, a leaf moves before it grows, when it is smaller;
    a leaf that does not divide over the new mesh before it has grown moves afterwards.
    """

    def program(state: TrainState, key: jax.Array) -> TrainState:
        moved = jax.tree.map(reshard, state, old.shardings, new.shardings)
        grown: TrainState = grow(moved, dataclasses.replace(growth, key=key))
        return jax.tree.map(
            lambda x, leaf, before, after: x if divides(leaf.shape, after) else reshard(x, before, after),
            *(grown, old.abstract, old.shardings, new.shardings),
        )

    return jax.jit(
        program,
        in_shardings=(old.shardings, replicated(old.mesh)),
        out_shardings=new.shardings,
    )


def nonfinite_leaves(finite: np.ndarray, params: Params) -> list[str]:
    """Paths of the parameters whose gradient or new value was not finite.

    Args:
        finite: the metric of train_step, one flag for each leaf in tree order.
        params: parameters or their abstract form, for the paths.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return [path_name(path) for path, ok in zip(paths, finite, strict=True) if not ok]


def jit_parameter_norms(spec: StateSpec) -> Callable[[Params], jax.Array]:
    """The jitted function from parameters to the norm of each leaf, in tree order.

    It is a program beside the step, for the few updates whose norms are written: another pass over the parameters in
    every step costs some percent of a step with few tokens.
    """

    def norms(params: Params) -> jax.Array:
        return jnp.sqrt(jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params)]))

    return jax.jit(norms, out_shardings=replicated(spec.mesh))


def named_norms(metrics: Mapping[str, np.ndarray], params: Params) -> dict[str, float]:
    """Norms by name, such as `gradient/layers/mlp/up/kernel`, which is of the leaves of all layers together.

    Args:
        metrics: gradient_norms and parameter_norms, of every leaf.
        params: parameters or their abstract form, for the paths.
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {
        f"{name}/{path}": float(norm)
        for name in ("gradient", "parameter")
        for path, norm in zip(paths, metrics[f"{name}_norms"], strict=True)
    }
