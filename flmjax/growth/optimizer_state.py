"""Growth of an optimizer's state."""

from collections.abc import Callable
from typing import Any

import jax

from flmjax.growth.rules import GrowthError
from flmjax.optimizer.adam import AdamState
from flmjax.sharding.axes import path_name


def map_adam(
    opt_state: Any,
    grow_moment: Callable[[Any, int], Any],
    grow_births: Callable[[dict[str, jax.Array], jax.Array], dict[str, jax.Array]],
    reset: bool,
) -> Any:
    """Grow Adam's part of nested optax states; counts are kept.

    Args:
        opt_state: its only parameter-shaped members are Adam's moments.
        grow_moment: (tree of moments, power) -> grown tree.
        grow_births: (births, count) -> births of the larger model.
        reset: whether all moments start anew.

    Raises:
        GrowthError: naming a state that is neither Adam's nor a scalar.
    """

    def grow(path: tuple[Any, ...], state: Any) -> Any:
        if isinstance(state, AdamState):
            adam = state.adam._replace(mu=grow_moment(state.adam.mu, 1), nu=grow_moment(state.adam.nu, 2))
            births = grow_births(state.births, adam.count)
            return AdamState(adam, births, adam.count if reset else state.reset)
        if getattr(state, "ndim", 0) > 0:
            raise GrowthError(f"optimizer state {path_name(path)} {state.shape}: no rule grows it")
        return state

    return jax.tree_util.tree_map_with_path(grow, opt_state, is_leaf=lambda x: isinstance(x, AdamState))
