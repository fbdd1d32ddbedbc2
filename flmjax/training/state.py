"""The training state, and its abstract form (shapes with shardings), which init, restore and growth all fill."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flmjax.config import ModelConfig, OptimizerConfig
from flmjax.model.transformer import abstract_params, init_params
from flmjax.optimizer.adam import FIRST, make_optimizer
from flmjax.sharding.axes import AxesTree, Params, path_name
from flmjax.sharding.rules import replicated, tree_shardings
from flmjax.workdir.checkpoint import Checkpoints


@struct.dataclass
class TrainState:
    """Arrays that a training step reads and writes.

    Attributes:
        step: updates since the run's start, skipped ones included, int32; growth does not restart it.
        params: float32 parameters.
        opt_state: optax state; its count leaves out skipped updates.
        rng: key data (uint32); every step folds its number into it, for dropout.
        skipped_updates: updates skipped in a row, int32.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    rng: jax.Array
    skipped_updates: jax.Array


def to_items(state: TrainState) -> dict[str, Any]:
    """Items of a checkpoint by name: "params", and "train_state" with all other fields of the state."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {"params": fields.pop("params"), "train_state": fields}


ITEMS = ("params", "train_state")


def from_items(items: Mapping[str, Any]) -> TrainState:
    """State from the items of a checkpoint; the inverse of to_items."""
    return TrainState(params=items["params"], **items["train_state"])


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """Description of a model's training state on a mesh.

    Attributes:
        axes: LeafAxes of the parameters.
        optimizer: the optax transformation of the updates.
        abstract: the state as ShapeDtypeStruct leaves with shardings.
    """

    config: ModelConfig
    optimizer_config: OptimizerConfig
    mesh: Mesh
    axes: AxesTree
    optimizer: optax.GradientTransformation
    abstract: TrainState

    @property
    def shardings(self) -> TrainState:
        """NamedSharding of every leaf of the state."""
        return jax.tree.map(lambda x: x.sharding, self.abstract)


def state_spec(config: ModelConfig, optimizer_config: OptimizerConfig, mesh: Mesh) -> StateSpec:
    """Description of the training state of a model on `mesh`; no array is computed."""
    params, axes = abstract_params(config)
    optimizer = make_optimizer(optimizer_config, config, axes)
    state = jax.eval_shape(lambda p, key: _new_state(p, optimizer, key), params, jax.random.key(0))
    param_shardings = tree_shardings(mesh, axes)
    # Moments have the structure of the parameters and their sharding; everything else is a scalar or a key.
    opt_shardings = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state.opt_state,
        param_shardings,
        transform_non_params=lambda _: replicated(mesh),
    )
    shardings = jax.tree.map(lambda _: replicated(mesh), state).replace(params=param_shardings, opt_state=opt_shardings)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    return StateSpec(config, optimizer_config, mesh, axes, optimizer, abstract)


def init_state(spec: StateSpec, seed: int) -> TrainState:
    """Initial state; its values do not depend on the mesh."""
    init = jax.jit(
        lambda key: _new_state(init_params(spec.config, key), spec.optimizer, key), out_shardings=spec.shardings
    )
    return init(jax.random.key(seed))


def restore_items(
    checkpoints: Checkpoints, step: int, stored: ModelConfig, spec: StateSpec, names: tuple[str, ...]
) -> dict[str, Any]:
    """Items of a checkpoint on the mesh of `spec`, also where this mesh pads the vocabulary to another size.

    Rows of the vocabulary that are padding get no gradient and are never sampled: they are added (as zeros) or cut off.

    Args:
        stored: the model's configuration under the mesh that wrote the checkpoint.
        spec: of the state to restore; its model differs from `stored` in vocab_multiple alone.
        names: of the items, as to_items has them.

    Raises:
        CheckpointError: as Checkpoints.restore.
    """
    abstract = {name: to_items(spec.abstract)[name] for name in names}
    if stored.padded_vocab_size == spec.config.padded_vocab_size:
        return checkpoints.restore(step, abstract)
    padded = dataclasses.replace(spec.config, vocab_multiple=stored.vocab_multiple)
    written = to_items(state_spec(padded, spec.optimizer_config, spec.mesh).abstract)
    items = checkpoints.restore(step, jax.tree.map(_divisible, {name: written[name] for name in names}))

    def fit(path: tuple[Any, ...], x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        if x.shape == like.shape:
            return x
        x = x[tuple(slice(size) for size in like.shape)]
        widths = [(0, new - old) for old, new in zip(x.shape, like.shape, strict=True)]
        return jnp.pad(x, widths, constant_values=FIRST if "births" in path_name(path) else 0)

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    fitted: dict[str, Any] = jax.jit(
        lambda items: jax.tree_util.tree_map_with_path(fit, items, abstract), out_shardings=shardings
    )(items)
    return fitted


def _divisible(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The leaf with a sharding that leaves dimensions together which do not divide over their mesh axes."""
    mesh, names = leaf.sharding.mesh, (*leaf.sharding.spec, *[None] * len(leaf.shape))
    kept = [
        None if name is None or size % mesh.shape[name] else name for name, size in zip(names, leaf.shape, strict=False)
    ]
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*kept)))


def _new_state(params: Params, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(jax.random.fold_in(key, 1)),
        skipped_updates=jnp.zeros((), jnp.int32),
    )
