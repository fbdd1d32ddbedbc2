"""The training state, and its abstract form (shapes with shardings), which init, restore and growth all fill."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from flmjax.config import ModelConfig, OptimizerConfig
from flmjax.model.transformer import abstract_params, init_params
from flmjax.optimizer.adam import make_optimizer
from flmjax.sharding.axes import AxesTree, Params
from flmjax.sharding.rules import replicated, tree_shardings


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
    return StateSpec(config, mesh, axes, optimizer, abstract)


def init_state(spec: StateSpec, seed: int) -> TrainState:
    """Initial state; its values do not depend on the mesh."""
    init = jax.jit(
        lambda key: _new_state(init_params(spec.config, key), spec.optimizer, key), out_shardings=spec.shardings
    )
    return init(jax.random.key(seed))


def _new_state(params: Params, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(jax.random.fold_in(key, 1)),
        skipped_updates=jnp.zeros((), jnp.int32),
    )
