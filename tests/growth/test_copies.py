"""Unequal shares of copies: exact, apart by a least gap, and enough to make a unit and its copies part in training."""

import functools

import jax
import numpy as np
import pytest
from conftest import TINY, random_batch, with_fields
from growth_cases import KEY
from hypothesis import given, settings
from hypothesis import strategies as st

from flmjax.config import GrowthConfig, OptimizerConfig, resize
from flmjax.growth.grow import grow
from flmjax.growth.growth import Growth
from flmjax.growth.rules import draw_share
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import jit_train_step


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 60), st.sampled_from([0.05, 0.2, 0.49]), st.integers(0, 9))
def test_shares_of_copies_keep_their_gap(before, more, gap, seed):
    source = np.arange(before + more) % before
    copies = np.bincount(source)[source]
    share = np.asarray(draw_share(source, copies, GrowthConfig("duplicate", split_gap=gap), jax.random.key(seed)))
    for unit in range(before):
        shares = np.sort(share[source == unit])
        n = len(shares)
        assert shares.sum() == pytest.approx(1, abs=1e-6)
        assert shares[0] > 0
        if n > 1:
            assert np.diff(shares).min() >= 2 * gap / (n * (n - 1)) - 1e-6


def test_places_without_a_source_have_the_share_one():
    source = np.array([0, 1, 0, 1, -1])
    share = draw_share(source, np.array([2, 2, 2, 2, 1]), GrowthConfig("duplicate"), KEY)
    assert share[4] == 1
    np.testing.assert_allclose(share[:2] + share[2:4], 1, rtol=1e-6)


def test_every_place_of_the_order_is_drawn():
    """Neither the unit nor its copies always have the largest share."""
    source = np.arange(300) % 100
    share = draw_share(source, np.full(300, 3), GrowthConfig("duplicate"), KEY).reshape(3, 100)
    largest = np.bincount(np.argmax(share, axis=0), minlength=3)
    assert largest.min() > 15


@pytest.mark.parametrize("copies", [2, 3])
def test_a_unit_and_its_copy_part_in_training(copies, one_device_mesh):
    """Shares without a least gap left twins for good: a third of the units after 300 updates.

    A unit and its copy are twins while both their input and their output weights have a cosine above 0.999.
    """
    old = with_fields(TINY, mlp_dim=64, norm_eps=1e-5)
    new = resize(old, "duplicate", mlp_dim=64 * copies)
    specs = [state_spec(model, OptimizerConfig(), one_device_mesh) for model in (old, new)]
    state, rate = init_state(specs[0], 0), np.float32(3e-3)
    step = jit_train_step(specs[0], 1)
    for i in range(100):
        state, _ = step(state, text_batch(old, i), rate)
    state = jax.jit(functools.partial(grow, growth=Growth(old, new, GrowthConfig("duplicate"), KEY)))(state)
    assert twins(state, copies).all()
    step = jit_train_step(specs[1], 1)
    for i in range(50):
        state, _ = step(state, text_batch(old, 100 + i), rate)
    assert not twins(state, copies).any()


def text_batch(config, seed):
    """Sequences with something to learn: four of five tokens follow from the token before."""
    chance = np.random.default_rng(seed)
    follower = np.random.default_rng(0).permutation(config.vocab_size)
    batch = random_batch(config, rows=8, seed=seed)
    words = chance.integers(0, config.vocab_size, (8, config.max_length + 1))
    for i in range(config.max_length):
        words[:, i + 1] = np.where(chance.random(8) < 0.8, follower[words[:, i]], words[:, i + 1])
    return batch | {"tokens": words[:, :-1].astype(np.int32), "targets": words[:, 1:].astype(np.int32)}


def twins(state, copies):
    """Whether each MLP unit and each of its copies have the same input and output directions."""
    mlp = state.params["layers"]["mlp"]
    inputs = np.asarray(mlp["up"]["kernel"], np.float64)
    outputs = np.swapaxes(np.asarray(mlp["down"]["kernel"], np.float64), 1, 2)
    return np.minimum(cosines(inputs, copies), cosines(outputs, copies)) > 0.999


def cosines(kernels, copies):
    """Cosines (pair of copies, layer, unit) of the columns of kernels (layer, embed, copies x units)."""
    columns = kernels.reshape(*kernels.shape[:-1], copies, -1)
    columns = columns / np.linalg.norm(columns, axis=1, keepdims=True)
    pairs = [(a, b) for a in range(copies) for b in range(a)]
    return np.stack([(columns[:, :, a] * columns[:, :, b]).sum(1) for a, b in pairs])
