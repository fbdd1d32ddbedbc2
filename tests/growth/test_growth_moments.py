"""Adam's moments after growth, the births of weights, and the warm-up of those that a growth created."""

import functools

import chex
import jax
import numpy as np
import pytest
import reference
from conftest import random_batch, with_fields
from growth_cases import KEY, LLAMA, SMALL, adam, trained_state

from flmjax.config import GrowthConfig, OptimizerConfig, resize
from flmjax.growth.grow import grow
from flmjax.growth.growth import Growth
from flmjax.model.transformer import abstract_params
from flmjax.optimizer.adam import FIRST
from flmjax.sharding.axes import map_with_axes
from flmjax.training.state import state_spec
from flmjax.training.step import jit_train_step


@pytest.fixture(scope="module")
def grown_state(one_device_mesh):
    """A trained state, grown on every axis."""
    old = with_fields(SMALL, norm_eps=1e-5)
    new = resize(old, embed_dim=37, mlp_dim=31, num_heads=6, num_layers=3)
    optimizer = OptimizerConfig(b2=0.999)  # where a new weight's first update would be 3.2 rates
    _, state = trained_state(old, one_device_mesh, optimizer=optimizer)
    grown = jax.jit(lambda s: grow(s, Growth(old, new, GrowthConfig(), jax.random.key(3))))(state)
    return old, new, state, grown, state_spec(new, optimizer, one_device_mesh)


def test_moments_grow_by_the_rule_of_their_weights(grown_state):
    """Unclear or wrong moments after a change of the model: allenai/OLMo#758."""
    old, new, state, grown, _ = grown_state
    chex.assert_trees_all_equal_structs(adam(grown).adam.mu, grown.params)
    assert int(adam(grown).adam.count) == int(adam(state).adam.count) == 20
    assert int(grown.step) == 20
    gain = np.sqrt(old.embed_dim / new.embed_dim)

    def check(path, leaf, before, after, power):
        old_part = np.asarray(after)[tuple(slice(0, n) for n in before.shape)]
        factor = gain**-power if leaf.role("embed") in ("scale", "output_scale") else 1.0
        np.testing.assert_allclose(old_part, np.asarray(before) * factor, rtol=1e-6, err_msg=path)
        total = np.abs(np.asarray(after, np.float64)).sum()
        np.testing.assert_allclose(total, np.abs(np.float64(old_part)).sum(), rtol=1e-9, err_msg=path)  # new ones are 0

    axes = abstract_params(old)[1]
    map_with_axes(functools.partial(check, power=1), axes, adam(state).adam.mu, adam(grown).adam.mu)
    map_with_axes(functools.partial(check, power=2), axes, adam(state).adam.nu, adam(grown).adam.nu)


def test_parts_of_a_split_group_share_its_moments(one_device_mesh):
    """Their query heads part, so each key head gets some of the gradient, in expectation an equal share."""
    old = with_fields(SMALL, **LLAMA, num_heads=4, num_kv_heads=1)
    new = resize(old, num_kv_heads=2)
    _, state = trained_state(old, one_device_mesh, steps=2)
    grown = jax.jit(lambda s: grow(s, Growth(old, new, GrowthConfig(), KEY)))(state)
    for name, power in (("mu", 1), ("nu", 2)):
        before, after = (getattr(adam(s).adam, name)["layers"]["attention"]["key"]["kernel"] for s in (state, grown))
        np.testing.assert_allclose(after, np.repeat(before, 2, axis=2) / 2**power, rtol=1e-6)


def test_moments_can_be_forgotten(grown_state):
    old, new, state, _, _ = grown_state
    operator = GrowthConfig(moments="reset")
    grown = jax.jit(lambda s: grow(s, Growth(old, new, operator, KEY)))(state)
    assert not any(x.any() for x in jax.tree.leaves((adam(grown).adam.mu, adam(grown).adam.nu)))
    assert int(adam(grown).reset) == 20
    assert set(np.asarray(adam(grown).births["embed"])) == {FIRST, 20}
    assert set(np.asarray(adam(grown).births["vocab"])) == {FIRST}


def test_births_date_every_axis(grown_state):
    _, _, _, grown, _ = grown_state
    births = adam(grown).births
    for name, (before, after) in {"embed": (24, 37), "mlp": (29, 31), "layers": (2, 3), "heads": (4, 6)}.items():
        np.testing.assert_array_equal(births[name], [-1] * before + [20] * (after - before), err_msg=name)
    assert (np.asarray(births["vocab"]) == -1).all()


@pytest.mark.parametrize("warmup", [0, 10])
def test_first_update_of_new_weights_is_below_the_rate(grown_state, warmup):
    """Corrected by the run's count of updates, Adam's first update would be 3.2 rates at b2 = 0.999."""
    old, new, state, _, spec = grown_state
    rate = 1e-3
    grown = jax.jit(lambda s: grow(s, Growth(old, new, GrowthConfig(), KEY, warmup)))(state)
    before = jax.tree.map(np.asarray, grown.params)
    after, _ = jit_train_step(spec, 1)(grown, random_batch(old, seed=99), np.float32(rate))
    decay = 0.1 * rate

    def check(path, leaf, a, b):
        new = np.ones(a.shape, bool)
        new[tuple(slice(0, n) for n in leaf_shape(old, path))] = False
        if not new.any():
            return
        update = np.abs(np.asarray(b) - a) - decay * np.abs(a) * leaf.is_matrix
        assert update[new].max() <= rate / max(warmup, 1) * 1.001, path
        assert "mlp/down" not in path or update[new].max() >= 0.9 * rate / max(warmup, 1)

    map_with_axes(check, abstract_params(old)[1], before, after.params)


def leaf_shape(config, path):
    return reference.shapes(config)[path.replace("/", ".")]


def test_each_growth_warms_up_the_weights_that_it_made(one_device_mesh):
    """Two growths: weights of the first one end their warm-up of 6 updates while those of the second one begin theirs.

    A stage that grows nothing slowed the weights of the growth before it down again, to 0.014 of the rate.
    """
    old = with_fields(SMALL, norm_eps=1e-5)
    middle, new = resize(old, mlp_dim=35), resize(old, mlp_dim=35, num_layers=3)
    optimizer, rate = OptimizerConfig(weight_decay=0.0, clip_norm=None), 1e-3
    _, state = trained_state(old, one_device_mesh, steps=2, optimizer=optimizer)
    state = jax.jit(lambda s: grow(s, Growth(old, middle, GrowthConfig(), KEY, 6)))(state)
    step = jit_train_step(state_spec(middle, optimizer, one_device_mesh), 1)
    moved = []
    for i in range(3):
        state, change = down_kernels_moved_by(step, state, random_batch(old, seed=i), rate)
        moved.append(change[:, 29:].max() / rate)
    np.testing.assert_allclose(moved[0], 1 / 6, rtol=1e-3)  # a first update is the rate, times its warm-up
    assert moved[0] < moved[1] < 2.1 / 6
    assert moved[1] < moved[2] < 3.1 / 6
    spec = state_spec(new, optimizer, one_device_mesh)
    larger = Growth(middle, new, GrowthConfig(), KEY, 1000)
    state = jax.jit(lambda s: grow(s, larger), out_shardings=spec.shardings)(state)
    _, change = down_kernels_moved_by(jit_train_step(spec, 1), state, random_batch(old, seed=9), rate)
    assert 1.5 / 6 < change[:2, 29:].max() / rate < 4.1 / 6
    assert 0 < change[2].max() < 1.01e-3 * rate


def down_kernels_moved_by(step, state, batch, rate):
    """(the state after an update, |change| of the kernels from MLP to residual stream)."""
    before = np.asarray(state.params["layers"]["mlp"]["down"]["kernel"])
    state, _ = step(state, batch, np.float32(rate))
    return state, np.abs(np.asarray(state.params["layers"]["mlp"]["down"]["kernel"]) - before)


@pytest.mark.parametrize("grows", [True, False])
def test_a_reset_of_moments_leaves_warm_ups_alone(grows, one_device_mesh):
    """After a reset Adam's ages start at 0; a weight still warms up from its birth, and older weights not at all."""
    old = with_fields(SMALL, norm_eps=1e-5)
    middle = resize(old, mlp_dim=35)
    new = resize(middle, num_layers=3) if grows else middle
    optimizer, rate = OptimizerConfig(weight_decay=0.0, clip_norm=None), 1e-3
    _, state = trained_state(old, one_device_mesh, steps=2, optimizer=optimizer)
    state = jax.jit(lambda s: grow(s, Growth(old, middle, GrowthConfig(), KEY)))(state)
    state, _ = jit_train_step(state_spec(middle, optimizer, one_device_mesh), 1)(
        state, random_batch(old), np.float32(rate)
    )
    spec = state_spec(new, optimizer, one_device_mesh)
    reset = Growth(middle, new, GrowthConfig(moments="reset"), KEY, 1000)
    state = jax.jit(lambda s: grow(s, reset), out_shardings=spec.shardings)(state)
    before = np.asarray(state.params["layers"]["mlp"]["down"]["kernel"])
    state, _ = jit_train_step(spec, 1)(state, random_batch(old, seed=9), np.float32(rate))
    moved = np.abs(np.asarray(state.params["layers"]["mlp"]["down"]["kernel"]) - before)
    assert moved[:2].max() == pytest.approx(rate, rel=1e-3)  # a first update, at the full rate
    assert moved[:2, 29:].max() == pytest.approx(rate, rel=1e-3)
    assert not grows or 0 < moved[2].max() < 1.01e-3 * rate
