"""Every mesh computes what one device computes."""

import re

import chex
import jax
import numpy as np
import pytest
from conftest import TINY, random_batch, with_fields

from flmjax.config import ConfigError, MeshConfig, OptimizerConfig, RunConfig, StageConfig, resize, validate_mesh
from flmjax.growth.grow import grow
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import Placement
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import compile_step, gradients, put_batch

# 61 words do not divide over anything: rows up to 64 are padding.
CONFIG = with_fields(TINY, num_heads=8, num_layers=2)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]


def mesh_of(shape):
    return make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


def run(shape, steps=20):
    """Gradients and their norm at the first step, and the losses of `steps` steps."""
    mesh = mesh_of(shape)
    spec = state_spec(CONFIG, OptimizerConfig(), mesh)
    state = init_state(spec, 0)
    start = jax.tree.map(np.asarray, state.params)
    rows = random_batch(CONFIG, rows=8)
    rows.pop("bytes")
    batch = put_batch(rows, np.ones(61, np.float32), mesh)
    place = Placement(mesh)
    _, grads = jax.jit(
        lambda p, b: gradients(p, b, jax.random.key(0), CONFIG, place), out_shardings=(None, spec.shardings.params)
    )(state.params, batch)
    step, losses, norm = compile_step(spec, 1), [], None
    for _ in range(steps):
        state, metrics = step(state, batch, np.float32(3e-3))
        norm = float(metrics["gradient_norm"]) if norm is None else norm
        losses.append(float(metrics["loss"]))
    return start, jax.tree.map(np.asarray, grads), norm, losses


@pytest.fixture(scope="module")
def one_device():
    return run((1, 1, 1))


@pytest.mark.parametrize("shape", MESHES)
def test_every_mesh_equals_one_device(shape, one_device):
    """Gradients to 1e-6 of the largest: sums in another order differ by a few float32 roundings (6e-8 each).

    The trace to 1e-4: Adam divides by the root of the second moment, so that roundings of small gradients move whole
    updates, and 20 steps at a rate of 3e-3 add them up.
    """
    start, grads, norm, losses = run(shape)
    chex.assert_trees_all_equal(start, one_device[0])  # case I03: the seed alone decides
    largest = max(np.abs(g).max() for g in jax.tree.leaves(one_device[1]))
    chex.assert_trees_all_close(grads, one_device[1], rtol=0, atol=1e-6 * largest)
    np.testing.assert_allclose(norm, one_device[2], rtol=1e-6)
    np.testing.assert_allclose(losses, one_device[3], rtol=0, atol=1e-4)
    assert losses[-1] < losses[0] - 0.5
    assert (grads["embedding"][61:] == 0).all()


def test_constraints_reach_the_lowered_program():
    """Flax 0.12 drops every logical constraint without a word where it finds no mesh."""
    mesh = mesh_of((2, 2, 2))
    spec = state_spec(CONFIG, OptimizerConfig(), mesh)
    rows = random_batch(CONFIG, rows=8)
    rows.pop("bytes")
    batch = put_batch(rows, np.ones(61, np.float32), mesh)
    text = compile_step(spec, 1).lower(spec.abstract, batch, np.float32(0)).as_text()
    constraints = re.findall(r"sharding_constraint.*", text)
    residual = [line for line in constraints if re.search(r'"replica", "fsdp"}, {"tensor"}', line)]
    heads = [line for line in constraints if re.search(r'"replica", "fsdp"}, {[^}]*}, {"tensor"}', line)]
    assert len(residual) >= 6, constraints[:3]  # between blocks: split over the sequence
    assert len(heads) >= 4


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_sharded_growth_equals_the_unsharded_and_gathers_nothing(shape):
    new = resize(CONFIG, embed_dim=48, mlp_dim=64, num_heads=16, num_layers=3)
    key = jax.random.key(7)

    def grown(shape):
        mesh = mesh_of(shape)
        old_spec, new_spec = (state_spec(c, OptimizerConfig(), mesh) for c in (CONFIG, new))
        state = init_state(old_spec, 0)
        program = jax.jit(lambda s: grow(s, CONFIG, new, "zero", key), out_shardings=new_spec.shardings)
        compiled = program.lower(state).compile()
        return jax.tree.map(np.asarray, compiled(state)), compiled.as_text()

    sharded, text = grown(shape)
    chex.assert_trees_all_close(sharded, grown((1, 1, 1))[0], rtol=1e-6, atol=1e-7)
    assert "all-gather" not in text


def test_default_mesh_is_all_data(tmp_path):  # case I05
    run_config = RunConfig(model=CONFIG, stages=(StageConfig(),))
    assert validate_mesh(run_config, 8) == MeshConfig(replica=1, fsdp=8, tensor=1)
    with pytest.raises(ConfigError, match=r"6 places for 8 devices"):
        validate_mesh(with_fields(run_config, mesh=MeshConfig(1, 3, 2)), 8)
    with pytest.raises(ConfigError, match=r"3 .*does not divide the 8 devices"):
        validate_mesh(with_fields(run_config, mesh=MeshConfig(3, None, 1)), 8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_heads": 6}, r"stages\[0\]: num_heads=6 does not divide over mesh axis tensor=4"),
        ({"mlp_dim": 50}, "mlp_dim=50 does not divide"),
        ({"num_kv_heads": 2}, "num_kv_heads=2 does not divide"),
        ({"embed_dim": 31}, "embed_dim=31 does not divide over mesh axis fsdp=2"),
    ],
)
def test_sizes_that_do_not_divide_are_named(fields, words):  # case I04
    config = RunConfig(model=with_fields(CONFIG, **fields), mesh=MeshConfig(1, 2, 4))
    with pytest.raises(ConfigError, match=words):
        validate_mesh(config, 8)


def test_vocabulary_that_does_not_divide_is_padded():  # case I04
    config = RunConfig(model=with_fields(CONFIG, vocab_size=259, vocab_multiple=1), mesh=MeshConfig(1, 2, 4))
    assert config.stage_models[0].padded_vocab_size == 260


def test_biases_are_added_once_whatever_the_split(one_device):  # case I07
    from conftest import random_params

    from flmjax.model.transformer import Transformer

    params = random_params(CONFIG)
    assert all(np.abs(x).min() > 0 for x in jax.tree.leaves(params["layers"]["mlp"]["down"]["bias"]))
    tokens = random_batch(CONFIG, rows=8)["tokens"]

    def logits(shape):
        mesh = mesh_of(shape)
        spec = state_spec(CONFIG, OptimizerConfig(), mesh)
        placed = jax.device_put(params, spec.shardings.params)
        return np.asarray(jax.jit(lambda p: Transformer(CONFIG, Placement(mesh)).apply({"params": p}, tokens))(placed))

    np.testing.assert_allclose(logits((1, 1, 4)), logits((1, 1, 1)), atol=1e-5)
