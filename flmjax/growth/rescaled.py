"""A model's function computed with other numbers: the yardstick of rounding for growth certificates.

The residual stream, the outputs of norms, the values and the queries are multiplied by factors that are no powers of
two, and the parameters that read them are divided by the same factors. In exact arithmetic every logit stays the same.
In the arithmetic of a device every product and every sum is rounded anew, as after an exact growth, which also
multiplies gains and kernels by such factors. The difference of both models' logits is therefore the rounding that the
model has at its depth and with its parameters, in the precision of the device's matrix products (float32, TF32,
bfloat16). The factors follow from the roles of axes (sharding/axes.py) and act entry by entry, so that no sharded
parameter moves between devices.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flmjax.config import ModelConfig
from flmjax.model.transformer import abstract_params
from flmjax.sharding.axes import LeafAxes, Params, map_with_axes

STREAM = 1.37  # factor of the residual stream
QUERY = 1.21  # factor of queries; keys are divided by it


class Factors(NamedTuple):
    """Factors of the outputs of norms (embed_dim,) and of values (head_dim,)."""

    normed: jax.Array
    value: jax.Array


def draw_factors(config: ModelConfig, draws: int) -> Factors:
    """Several sets of Factors, stacked on a first axis, from 0.71 to 1.41; the same in every call."""
    rng = np.random.default_rng(0)
    return Factors(*(jnp.asarray(2 ** rng.uniform(-0.5, 0.5, (draws, n))) for n in (config.embed_dim, config.head_dim)))


def rescaled(params: Params, config: ModelConfig, by: Factors) -> tuple[Params, ModelConfig]:
    """Parameters and config of a model that computes the same function as Transformer(config) with other numbers.

    Raises:
        ValueError: naming a parameter that has an axis with a role without a factor.
    """
    # A tied embedding is written and read: the last norm takes back its factor, and has no other.
    last = jnp.asarray(1 / STREAM) if config.tied_embedding else by.normed
    factors = {
        "embed": {"write": jnp.asarray(STREAM), "read": 1 / by.normed, "scale": by.normed, "shift": by.normed}
        | {"output_scale": last, "output_shift": last},
        "head_dim": {
            "query": jnp.asarray(QUERY),
            "key": jnp.asarray(1 / QUERY),
            "write": by.value,
            "read": 1 / by.value,
        },
    }

    def rescale(path: str, leaf: LeafAxes, x: jax.Array) -> jax.Array:
        for i, (axis, role) in enumerate(zip(leaf.names, leaf.roles, strict=True)):
            if axis in factors:
                if role not in factors[axis]:
                    raise ValueError(f"{path}: role '{role}' of axis '{axis}' has no factor in rescaled.py")
                shape = [-1 if i == j else 1 for j in range(x.ndim)]
                x = x * factors[axis][role].reshape(shape).astype(x.dtype)
        return x

    other: Params = map_with_axes(rescale, abstract_params(config)[1], params)
    return other, dataclasses.replace(config, norm_eps=config.norm_eps * STREAM**2)
