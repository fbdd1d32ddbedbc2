"""Growth of an optimizer state: applies functions to Adam's part of nested optax states."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flmjax.growth.rules import GrowthError
from flmjax.optimizer.adam import AdamState
from flmjax.sharding.axes import Params, path_name


def map_adam(
    opt_state: optax.OptState,
    grow_moment: Callable[[Params, int], Params],
    grow_places: Callable[[dict[str, jax.Array], jax.Array], dict[str, jax.Array]],
    new_warmup: int,
    reset: bool,
) -> optax.OptState:
    """The optimizer state with Adam's moments, births and warm-ups grown; counts stay.

    Args:
        opt_state: nested optax states; Adam's moments are the only members with the shapes of parameters.
        grow_moment: (tree of moments, power) -> grown tree; power 1 for first moments, 2 for second moments.
        grow_places: (vector for each axis, value of new places) -> vectors of the larger model.
        new_warmup: number of updates in which new places reach their full learning rate.
        reset: whether all moments start at 0 again.

    Raises:
        GrowthError: naming an array that is neither Adam's nor a scalar.
    """

    def grow(path: tuple[Any, ...], state: Any) -> Any:
        if isinstance(state, AdamState):
            adam = state.adam._replace(mu=grow_moment(state.adam.mu, 1), nu=grow_moment(state.adam.nu, 2))
            births = grow_places(state.births, adam.count)
            warmups = grow_places(state.warmups, jnp.asarray(new_warmup, jnp.int32))
            return AdamState(adam, births, warmups, adam.count if reset else state.reset)
        if getattr(state, "ndim", 0) > 0:
            raise GrowthError(f"optimizer state {path_name(path)} {state.shape}: no rule grows it")
        return state

    return jax.tree_util.tree_map_with_path(grow, opt_state, is_leaf=lambda x: isinstance(x, AdamState))
