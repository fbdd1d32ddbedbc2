"""Gradients and Adam's moments of a grown model are those that training the grown model would give."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_batch, random_params, with_fields
from growth_cases import BLOCKS, GROUPED, KEY, LLAMA, SMALL

from flmjax.config import GrowthConfig, resize
from flmjax.growth.grow import grow, grow_params
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import masked
from flmjax.model.loss import loss_sums
from flmjax.model.transformer import abstract_params
from flmjax.optimizer.adam import FIRST, AdamState
from flmjax.sharding.axes import axis_sizes, map_with_axes


@dataclasses.dataclass
class State:
    """The fields of a training state that growth reads."""

    params: object
    opt_state: object

    def replace(self, **fields):
        return dataclasses.replace(self, **fields)


@pytest.mark.parametrize("block", ["gpt_xpos_tied", "llama", "mup_tied"])
@pytest.mark.parametrize("family", ["zero", "duplicate"])
def test_gradient_pulled_back_through_growth_is_the_old_gradient(family, block):
    """f_new(grow(p)) = f_old(p) for every p, so the chain rule gives back the old gradient, leaf by leaf."""
    old = with_fields(SMALL, **BLOCKS[block], dtype="float64")
    sizes = {"embed_dim": 29, "mlp_dim": 31, "num_heads": 6, "head_dim": 8, "num_layers": 3}
    new = resize(old, family, **sizes)
    batch = random_batch(old)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), random_params(old))

        def both(params):
            operator = GrowthConfig(family)
            grown, pull_back = jax.vjp(lambda p: grow_params(p, Growth(old, new, operator, KEY)), params)
            new_gradient = jax.grad(lambda p: loss_sums(p, batch, new)[0])(grown)
            return jax.grad(lambda p: loss_sums(p, batch, old)[0])(params), pull_back(new_gradient)[0]

        expected, pulled_back = jax.jit(both)(params)
    chex.assert_trees_all_close(pulled_back, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "split", "fields", "embed_dim"),
    [
        ("zero", "equal", {"norm": "rmsnorm", "base_embed_dim": 8}, 37),
        ("duplicate", "equal", {"norm": "rmsnorm", "tied_embedding": False}, 37),
        ("duplicate", "equal", {"base_embed_dim": 8}, 48),
        ("duplicate", "unequal", {"norm": "rmsnorm", "tied_embedding": False}, 37),
        ("duplicate", "unequal", {"base_embed_dim": 8}, 48),
        ("duplicate", "unequal", LLAMA | GROUPED, 48),
        ("mask", "equal", {}, 37),
    ],
)
def test_growing_moments_is_training_the_grown_model(family, split, fields, embed_dim):
    """Grown moments of old weights and of copies equal the moments that the grown model's gradients give, at rate 0.

    Two exceptions are not compared. Where LayerNorm's mean fills new entries, the gradient of the old weights changes.
    Where unequal copies are written to the residual stream, the part of the writer's gradient that comes through the
    norm's denominator is the same for all copies.
    """
    old = with_fields(SMALL, **fields, dtype="float64")
    sizes = {"embed_dim": embed_dim, "mlp_dim": 41, "num_heads": 6, "head_dim": 12, "num_layers": 3}
    if old.num_kv_heads:
        sizes |= {"num_kv_heads": 3, "num_heads": 9}
    new = resize(old, family, **sizes)
    operator = GrowthConfig(family, split=split)
    batch = random_batch(old)

    def loss(params, config):
        if family == "mask" and config is new:
            params = masked(params, Growth(old, new, GrowthConfig("mask")), 0.0)
        return loss_sums(params, batch, config)[0]

    def first_moments(params, config):
        gradient = jax.grad(loss)(params, config)
        adam = optax.ScaleByAdamState(jnp.ones((), jnp.int32), gradient, jax.tree.map(jnp.square, gradient))
        births = {name: jnp.full(size, FIRST, jnp.int32) for name, size in axis_sizes(config).items()}
        return AdamState(adam, births, jax.tree.map(jnp.zeros_like, births), jnp.zeros((), jnp.int32))

    def both(params):
        state = State(params, (first_moments(params, old),))
        grown = grow(state, Growth(old, new, operator, KEY))
        return grown.opt_state[0].adam, first_moments(grown.params, new).adam, grown.opt_state[0].births

    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), random_params(old))
        grown, trained, births = jax.jit(both)(params)
    compared = 0

    def check(path, leaf, a, b):
        nonlocal compared
        born = functools.reduce(np.maximum, np.ix_(*(np.asarray(births[name]) for name in leaf.names)))
        has_history = np.broadcast_to(born < 0, a.shape)
        if split == "unequal" and leaf.role("embed") == "write":
            return
        compared += has_history.sum()
        scale = np.abs(b).max()
        np.testing.assert_allclose(
            np.where(has_history, a, 0), np.where(has_history, b, 0), rtol=1e-9, atol=1e-10 * scale, err_msg=path
        )
        assert not np.asarray(a)[~has_history].any(), path

    axes = abstract_params(new)[1]
    map_with_axes(check, axes, grown.mu, trained.mu)
    map_with_axes(check, axes, grown.nu, trained.nu)
    assert compared >= (2 if split == "equal" else 1) * sum(x.size for x in jax.tree.leaves(params))
