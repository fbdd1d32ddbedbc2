"""Optimizer state of a grown model."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from flmjax.growth.operators import GrowthError
from flmjax.model.axes import path_name


def grow_optimizer_state(opt_state: Any, grow_moment: Callable[[Any, int], Any]) -> Any:
    """The optax state of the larger model.

    With theta' = c theta on the old entries gradients are g' = g / c there, so the first moment divides by c and the
    second by c^2; new entries have no history: both moments 0, never a fill that belongs to the weights. The count is
    kept. At b1 = 0.9, b2 = 0.95 and a large count a new weight's first update is then 0.45 of the learning rate.

    Args:
        opt_state: nested optax states whose only parameter-shaped members are Adam's moments.
        grow_moment: (tree of moments, power) -> grown tree.

    Raises:
        GrowthError: naming a state that is neither Adam's nor a scalar.
    """

    def grow(path: tuple[Any, ...], state: Any) -> Any:
        if isinstance(state, optax.ScaleByAdamState):
            return state._replace(mu=grow_moment(state.mu, 1), nu=grow_moment(state.nu, 2))
        if getattr(state, "ndim", 0) > 0:
            raise GrowthError(f"optimizer state {path_name(path)} {state.shape}: no rule grows it")
        return state

    return jax.tree_util.tree_map_with_path(grow, opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
