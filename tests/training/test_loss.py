"""The cross-entropy and its gradient against their plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_batch, random_params, with_fields

from flmjax.config import MeshShape
from flmjax.model import loss
from flmjax.model.loss import loss_sums, training_sum
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import Placement


def test_loss_of_bfloat16_states_is_float32_and_exact():
    """A cross-entropy of bfloat16 logits comes out quantised: optax#1020, google/flax#677."""
    config = with_fields(TINY, vocab_size=1000, dtype="bfloat16")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 8, 32)) * 3, jnp.bfloat16)
    table = jnp.asarray(rng.standard_normal((1000, 32)), jnp.bfloat16)
    targets = rng.integers(0, 1000, (2, 8))
    value, _ = training_sum(x, table, targets, jnp.ones((2, 8)), config)
    logits = np.einsum("bld,vd->blv", np.float64(x), np.float64(table))
    top = np.log(np.exp(logits).sum(-1))
    exact = (top - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).sum()
    assert value.dtype == jnp.float32
    assert abs(float(value) - exact) / 16 < 1e-3


@pytest.mark.parametrize("chunks", [1, 4])
def test_gradient_of_the_loss_is_that_of_its_plain_formula(chunks):
    """In one part and, from 2^21 logits on, in several parts of the sequence."""
    config = with_fields(TINY, vocab_size={1: 61, 4: 2**17 - 3}[chunks])  # and three padded ids
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 16, 32)), jnp.float32)
    table = jnp.asarray(rng.standard_normal((config.padded_vocab_size, 32)), jnp.float32)
    batch = random_batch(config, rows=3)

    def plain(x, table):
        log_probs = jax.nn.log_softmax((x @ table.T)[..., : config.vocab_size])
        picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * batch["weights"])

    def ours(x, table):
        return 3.0 * training_sum(x, table, batch["targets"], batch["weights"], config)[0]

    assert f"length={chunks}" in str(jax.make_jaxpr(ours)(x, table))
    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, table)
    expected, expected_gradients = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(x, table)
    np.testing.assert_allclose(value, 3 * expected, rtol=1e-6)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, 3 * expected, rtol=0, atol=2e-6 * 3 * np.abs(expected).max())


@pytest.mark.parametrize("chunks", [1, 4])
def test_z_loss_is_that_of_its_plain_formula(chunks):
    """In float64. What is reported stays the cross-entropy."""
    config = with_fields(TINY, vocab_size={1: 61, 4: 2**17 - 3}[chunks], z_loss=0.03, dtype="float64")
    rng = np.random.default_rng(0)
    batch = random_batch(config, rows=3)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((3, 16, 32)))
        table = jnp.asarray(rng.standard_normal((config.padded_vocab_size, 32)))
        weights = jnp.asarray(batch["weights"], jnp.float64)

        def plain(x, table):
            logits = (x @ table.T)[..., : config.vocab_size]
            log_sums = jax.nn.logsumexp(logits, axis=-1)
            picked = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
            cross_entropy = jnp.sum(weights * (log_sums - picked))
            return cross_entropy + 0.03 * jnp.sum(weights * log_sums**2), cross_entropy

        def ours(x, table):
            objective, loss_B = training_sum(x, table, batch["targets"], weights, config)
            return objective, jnp.sum(loss_B)

        run = [jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(x, table) for f in (ours, plain)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), *run)


def test_the_reported_loss_has_no_z_loss():
    """z-loss changes the update, not the loss that is logged, evaluated and compared between runs."""
    params, batch = random_params(TINY), random_batch(TINY)
    config = with_fields(TINY, z_loss=1e-2)
    (objective, sums), (plain, plain_sums) = (
        jax.jit(loss_sums, static_argnums=2)(params, batch, c) for c in (config, TINY)
    )
    assert objective > plain
    np.testing.assert_array_equal(sums["loss"], plain_sums["loss"])


def test_chunks_on_eight_devices_reduce_the_table_s_gradient_once(monkeypatch):
    """Each device sums its chunks: a gradient that is reduced in every chunk forbade chunks on several devices."""
    config = with_fields(TINY, z_loss=0.03, dtype="float64")
    mesh = make_mesh(MeshShape(2, 2, 2), jax.devices()[:8])
    rng = np.random.default_rng(0)
    batch = random_batch(config, rows=4)
    monkeypatch.setitem(loss.LOGITS, "cpu", 4 * config.padded_vocab_size // 2)  # four tokens of a shard's sequence
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((4, 16, 32)))
        table = jnp.asarray(rng.standard_normal((config.padded_vocab_size, 32)))
        weights = jnp.asarray(batch["weights"], jnp.float64)

        def run(placement):
            def objective(x, table):
                return training_sum(x, table, batch["targets"], weights, config, placement)

            return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))

        sharded = run(Placement(mesh)).lower(x, table).compile()
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
            sharded(x, table),
            run(None)(x, table),
        )
    text = sharded.as_text()
    assert '"known_trip_count":{"n":"4"}' in text
    outside = text[text.index("ENTRY") :]
    assert text.count(" reduce-scatter(") == outside.count(" reduce-scatter(") == 1
