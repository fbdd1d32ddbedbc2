"""Families that are not exact, and how a mask opens."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_batch, random_params, with_fields
from growth_cases import ALL, BLOCKS, KEY, SMALL, adam, trained_state

from flmjax.config import GrowthConfig, resize
from flmjax.growth.certificate import GrowthPoint, certify
from flmjax.growth.grow import grow, grow_params
from flmjax.growth.growth import Growth
from flmjax.growth.learned import expand, first_matrices, fresh_part, tune, tuning_flops
from flmjax.growth.ramp import openness
from flmjax.model.loss import loss_sums
from flmjax.model.transformer import abstract_params


def test_openness_rises_from_0_to_1():
    linear, cosine = (GrowthConfig("mask", ramp_steps=10, ramp=ramp) for ramp in ("linear", "cosine"))
    for operator in (linear, cosine):
        assert [float(openness(operator, n)) for n in (0, 5, 10, 11)] == pytest.approx([0, 0.5, 1, 1])
    assert float(openness(linear, 2)) == pytest.approx(0.2)
    assert float(openness(cosine, 2)) == pytest.approx((1 - np.cos(np.pi * 0.2)) / 2)


@pytest.mark.parametrize(
    ("family", "layers"),
    [("stack", [0, 1, 2, 3, 0, 1]), ("interleave", [0, 0, 1, 2, 2, 3]), ("middle", [0, 1, 2, 1, 2, 3])],
)
def test_depth_families_copy_layers_and_their_moments(family, layers, one_device_mesh):
    old = with_fields(SMALL, num_layers=4)
    new = resize(old, family, num_layers=6, mlp_dim=31)
    _, state = trained_state(old, one_device_mesh, steps=2)
    grown = jax.jit(lambda s: grow(s, Growth(old, new, GrowthConfig(family), KEY)))(state)
    for before, after in ((state.params, grown.params), (adam(state).adam.nu, adam(grown).adam.nu)):
        a, b = before["layers"]["mlp"]["up"]["kernel"], after["layers"]["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(np.asarray(a)[layers], np.asarray(b)[..., :29])
    assert (np.asarray(adam(grown).births["layers"]) == -1).all()


def test_perturb_shrinks_pads_and_adds_noise():
    new = resize(SMALL, "perturb", embed_dim=37)
    params = random_params(SMALL)
    operator = GrowthConfig("perturb", shrink=0.5)
    grown = jax.jit(lambda p: grow_params(p, Growth(SMALL, new, operator, KEY)))(params)
    a, b = params["layers"]["mlp"]["up"]["kernel"], np.asarray(grown["layers"]["mlp"]["up"]["kernel"])
    noise = b[:, :24] - 0.5 * a
    assert 0.015 < noise.std() < 0.025  # init_std 0.02
    assert 0.015 < b[:, 24:].std() < 0.025
    gain = np.asarray(grown["final_norm"]["scale"])
    np.testing.assert_array_equal(gain, [*params["final_norm"]["scale"], *[1.0] * 13])


@pytest.mark.parametrize("block", ["gpt_learned_untied", "llama", "mup_tied"])
def test_learned_growth_starts_as_the_zero_family(block):
    old = with_fields(SMALL, **BLOCKS[block])
    new = resize(old, "learned", **ALL | ({"num_kv_heads": 3} if old.num_kv_heads else {}), max_length=11)
    params = random_params(old, spread=0.3)

    growth = Growth(old, new, GrowthConfig("learned"), KEY)

    def both(params):
        return expand(first_matrices(growth), params, fresh_part(growth), growth), grow_params(params, growth)

    expanded, grown = jax.jit(both)(params)
    chex.assert_trees_all_close(expanded, grown, rtol=1e-5, atol=1e-6)


def test_learned_growth_learns():
    old = with_fields(SMALL, norm_eps=1e-5)
    new = resize(old, "learned", embed_dim=37, mlp_dim=41, num_layers=3, num_heads=6)
    params, operator = random_params(old), GrowthConfig("learned", tuning_learning_rate=3e-3)
    batches = [random_batch(old, seed=0)] * 30

    def loss(p, batch, config=new):
        return loss_sums(p, batch, config)[0] / jnp.sum(batch["weights"])

    growth = Growth(old, new, operator, KEY)
    grown, losses = tune(params, growth, jax.value_and_grad(loss), batches)
    chex.assert_trees_all_equal_shapes(grown, abstract_params(new)[0])
    before = float(jax.jit(lambda p: loss(p, batches[0], old))(params))
    assert losses[0] == pytest.approx(before, abs=1e-5)
    assert float(jax.jit(loss)(grown, batches[0])) < losses[-1] < losses[0] - 0.1
    certificate = certify((params, grown), growth, batches[0], GrowthPoint(1, "a", "b"))
    certificate.check()  # the family claims nothing
    assert not certificate.exact
    assert certificate.max_difference["float64"] > 1e-3  # of the tuned parameters, not of their exact start
    assert certificate.loss_after < certificate.loss_before


def test_cost_of_learning_counts_every_product():
    """4 -> 6 places on one axis of each leaf: 6 FLOPs x entries x new places."""
    old = with_fields(SMALL, mlp_dim=4)
    new = with_fields(old, mlp_dim=6)
    entries = 2 * (24 * 4 + 4 + 4 * 24)  # layers x (up kernel and bias, down kernel)
    assert tuning_flops(Growth(old, new, GrowthConfig("learned"))) == 6 * entries * 6
