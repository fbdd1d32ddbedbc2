"""Training after growth: new weights learn, copies part, and the loss does not jump."""

import jax
import numpy as np
import pytest
from conftest import random_batch, with_fields
from growth_cases import EXACT, KEY, SMALL, trained_state

from flmjax.config import GrowthConfig, OptimizerConfig, resize
from flmjax.growth.grow import grow
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import Ramp
from flmjax.model.loss import loss_sums
from flmjax.sharding.axes import map_with_axes
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import jit_train_step


@pytest.mark.parametrize("family", EXACT)
def test_everything_new_learns_within_three_steps(family, one_device_mesh):
    """Every new weight moves by its gradient alone: decay, which moves every weight that is not 0, is off.

    A weight that is new on one axis needs two steps, because its readers must move first. A new dimension of a new head
    waits for its key and for its output; a mask is closed at the first step.
    """
    old = with_fields(SMALL, norm_eps=1e-5)
    new = resize(old, family, embed_dim=37, mlp_dim=31, num_heads=6, head_dim=8, num_layers=3)
    optimizer, operator = OptimizerConfig(weight_decay=0.0), GrowthConfig(family)
    _, state = trained_state(old, one_device_mesh, optimizer=optimizer)
    spec = state_spec(new, optimizer, one_device_mesh)
    state = jax.jit(lambda s: grow(s, Growth(old, new, operator, KEY)), out_shardings=spec.shardings)(state)
    step = jit_train_step(spec, 1, ramp=Ramp(Growth(old, new, operator), 20) if family == "mask" else None)
    before = jax.tree.map(np.asarray, state.params)
    for i in range(3):
        state, _ = step(state, random_batch(old, rows=8, seed=i), np.float32(1e-2))

    def check(path, leaf, a, b):
        if path.endswith("embedding"):  # rows of padded and of unseen ids do not move
            a, b = a[:61], b[:61]
        assert (np.asarray(a) != np.asarray(b)).mean() > 0.95, path

    map_with_axes(check, spec.axes, before, state.params)


@pytest.mark.parametrize("split", ["unequal", "equal"])
def test_unequal_copies_part_and_equal_ones_never(split, one_device_mesh):
    old = with_fields(SMALL, norm_eps=1e-5)
    new = resize(old, "duplicate", mlp_dim=58, num_heads=8)
    _, state = trained_state(old, one_device_mesh)
    spec = state_spec(new, OptimizerConfig(), one_device_mesh)
    operator = GrowthConfig("duplicate", split=split)
    state = jax.jit(lambda s: grow(s, Growth(old, new, operator, KEY)), out_shardings=spec.shardings)(state)
    step = jit_train_step(spec, 1)
    for i in range(50):
        state, _ = step(state, random_batch(new, seed=i), np.float32(3e-3))
    up = np.asarray(state.params["layers"]["mlp"]["up"]["kernel"])
    apart = np.abs(up[..., :29] - up[..., 29:]).max() / np.abs(up).max()
    query = np.asarray(state.params["layers"]["attention"]["query"]["kernel"])
    heads_apart = np.abs(query[:, :, :4] - query[:, :, 4:]).max() / np.abs(query).max()
    if split == "equal":
        assert max(apart, heads_apart) < 1e-5
    else:
        assert min(apart, heads_apart) > 1e-2


@pytest.mark.parametrize("family", ["zero", "duplicate"])
def test_loss_does_not_jump_after_growth(family, one_device_mesh):
    """Equal outputs at the growth and a loss that shoots up in the updates after it: leela-zero/leela-zero#591."""
    config = with_fields(SMALL, norm_eps=1e-5)
    rng = np.random.default_rng(0)
    successor = rng.integers(0, 61, (61, 3))  # a language of 61 words, three of which may follow each

    def batch(seed, rows=64):
        rng = np.random.default_rng(seed)
        tokens = np.zeros((rows, config.max_length + 1), np.int32)
        tokens[:, 0] = rng.integers(0, 61, rows)
        for i in range(config.max_length):
            tokens[:, i + 1] = successor[tokens[:, i], rng.integers(0, 3, rows)]
        ones = np.ones((rows, config.max_length), np.float32)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": ones, "bytes": ones[:, 0]}

    held_out = batch(10**6, rows=256)
    spec = state_spec(config, OptimizerConfig(), one_device_mesh)
    state = init_state(spec, 0)
    step = jit_train_step(spec, 1)
    for i in range(300):
        state, _ = step(state, batch(i), np.float32(2e-3))
    weight = held_out["weights"].sum()
    before = float(jax.jit(lambda p: loss_sums(p, held_out, config)[0])(state.params)) / weight
    new = resize(config, family, embed_dim=37, mlp_dim=48, num_heads=6, num_layers=3)
    spec = state_spec(new, OptimizerConfig(), one_device_mesh)
    operator = GrowthConfig(family)
    state = jax.jit(lambda s: grow(s, Growth(config, new, operator, KEY)), out_shardings=spec.shardings)(state)
    step, evaluate = jit_train_step(spec, 1), jax.jit(lambda p: loss_sums(p, held_out, new)[0])
    losses = []
    for i in range(300, 350):
        state, _ = step(state, batch(i), np.float32(2e-3))
        losses.append(float(evaluate(state.params)) / weight)
    assert before < 2.0  # it has learnt something: 61 words are 4.1 nats
    assert max(losses) <= before + 0.05
    assert losses[-1] <= before
