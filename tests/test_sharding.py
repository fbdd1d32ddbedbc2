"""Every mesh computes what one device computes."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_batch, random_params, with_fields
from jax.sharding import NamedSharding, PartitionSpec

from flmjax.config import (
    GROWTH_FAMILIES,
    ConfigError,
    GrowthConfig,
    MeshConfig,
    MeshShape,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    StageMeshConfig,
    resize,
)
from flmjax.config.validate import validate, validate_meshes
from flmjax.data.batch import global_batch
from flmjax.growth.growth import Growth
from flmjax.growth.learned import expand, first_matrices
from flmjax.model.transformer import Transformer
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.reshard import reshard, reshard_steps
from flmjax.sharding.rules import Placement, batch_sharding
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import gradients, jit_growth, jit_train_step

# A vocabulary of 61 divides over no mesh axis: rows up to 64 are padding.
CONFIG = with_fields(TINY, num_heads=8, num_layers=2)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]
KEY = jax.random.key(7)


def mesh_of(shape):
    return make_mesh(MeshShape(*shape), jax.devices()[: int(np.prod(shape))])


def run(shape, steps=20):
    """Gradients and their norm at the first step, and the losses of `steps` steps."""
    mesh = mesh_of(shape)
    spec = state_spec(CONFIG, OptimizerConfig(), mesh)
    state = init_state(spec, 0)
    start = jax.tree.map(np.asarray, state.params)
    batch = global_batch(random_batch(CONFIG, rows=8), batch_sharding(mesh))
    place = Placement(mesh)
    _, grads = jax.jit(
        lambda p, b: gradients(p, b, jax.random.key(0), CONFIG, place), out_shardings=(None, spec.shardings.params)
    )(state.params, batch)
    step, losses, norm = jit_train_step(spec, 1), [], None
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

    The trace to 1e-4: Adam divides by the root of the second moment, so that roundings of small gradients change
    updates by their full size, and 20 steps at a rate of 3e-3 add them up.

    Initial parameters are equal, whatever the mesh: jax-ml/jax#40232, levanter#163.
    """
    start, grads, norm, losses = run(shape)
    chex.assert_trees_all_equal(start, one_device[0])
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
    batch = global_batch(random_batch(CONFIG, rows=8), batch_sharding(mesh))
    text = jit_train_step(spec, 1).lower(spec.abstract, batch, np.float32(0)).as_text()
    constraints = re.findall(r"sharding_constraint.*", text)
    residual = [line for line in constraints if re.search(r'"replica", "fsdp"}, {"tensor"}', line)]
    heads = [line for line in constraints if re.search(r'"replica", "fsdp"}, {[^}]*}, {"tensor"}', line)]
    assert len(residual) >= 6, constraints[:3]  # between blocks: split over the sequence
    assert len(heads) >= 4


def growth_program(family, shape, new_shape, old=CONFIG):
    """(compiled growth on every axis, StateSpec of the old model, StateSpec of the new model)."""
    new = resize(old, family, embed_dim=64, mlp_dim=96, num_heads=16, head_dim=16, num_layers=3)
    before, after = (
        state_spec(config, OptimizerConfig(), mesh_of(s)) for config, s in ((old, shape), (new, new_shape))
    )
    program = jit_growth(before, after, Growth(old, new, GrowthConfig(family)))
    return program.lower(before.abstract, KEY).compile(), before, after


@functools.cache
def grown_on_one_device(family):
    compiled, before, _ = growth_program(family, (1, 1, 1), (1, 1, 1))
    return jax.tree.map(np.asarray, compiled(trained_state(before), KEY))


def trained_state(spec):
    """Random parameters, moments and births, and a count of 20: no leaf is trivial."""
    rng = np.random.default_rng(0)

    def fill(path, x):
        values = np.full(x.shape, 20) if x.dtype == np.int32 else rng.standard_normal(x.shape) ** 2
        if "births" in jax.tree_util.keystr(path):
            values = rng.integers(-1, 20, x.shape)
        return jax.device_put(jnp.asarray(values, x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(fill, spec.abstract)


def gathered(text):
    """Shapes of the results of all all-gathers in a program."""
    return {tuple(map(int, shape.split(","))) for shape in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)}


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize("family", GROWTH_FAMILIES)
def test_sharded_growth_equals_unsharded_and_gathers_nothing(family, shape):
    compiled, before, after = growth_program(family, shape, shape)
    grown = compiled(trained_state(before), KEY)
    assert all(np.abs(np.asarray(x, np.float64)).max() > 0 for x in jax.tree.leaves(grown.opt_state))
    chex.assert_trees_all_close(jax.tree.map(np.asarray, grown), grown_on_one_device(family), rtol=1e-6, atol=1e-7)
    replicated = {x.shape for x in jax.tree.leaves(after.abstract) if x.sharding.is_fully_replicated}
    if family == "duplicate":  # gains and biases are replicated on every device
        assert gathered(compiled.as_text()) <= replicated
    else:
        assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_learning_growth_gathers_one_layer_at_a_time(shape):
    old = with_fields(CONFIG, num_layers=5)  # 5 and 7 divide the sizes of stacks of all layers, and no other size
    new = resize(old, "learned", embed_dim=64, mlp_dim=96, num_heads=16, num_layers=7)
    before, after = (state_spec(config, OptimizerConfig(), mesh_of(shape)).abstract.params for config in (old, new))
    shardings = jax.tree.map(lambda x: x.sharding, after)
    growth = Growth(old, new, GrowthConfig("learned"))
    matrices = first_matrices(growth)

    def gradient(matrices, params, constant, cotangent):
        def expanded(matrices):
            return jax.lax.with_sharding_constraint(expand(matrices, params, constant, growth), shardings)

        return jax.vjp(expanded, matrices)[1](cotangent)

    text = jax.jit(gradient).lower(matrices, before, after, after).compile().as_text()
    sizes = [int(np.prod(part)) for part in gathered(text) if len(part) > 2]
    assert sizes
    assert not any(size % 5 == 0 or size % 7 == 0 for size in sizes)


@pytest.mark.parametrize("family", ["zero", "duplicate"])
@pytest.mark.parametrize(("shape", "new_shape"), list(itertools.permutations([(1, 8, 1), (2, 2, 2), (1, 2, 4)], 2)))
def test_growth_between_meshes_gathers_no_leaf(family, shape, new_shape):
    """XLA's partitioner alone gathers every matrix for pairs such as (1, 8, 1) and (2, 2, 2)."""
    compiled, before, after = growth_program(family, shape, new_shape)
    grown = compiled(trained_state(before), KEY)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, grown), grown_on_one_device(family), rtol=1e-6, atol=1e-7)
    assert jax.tree.leaves(grown.params)[0].sharding.mesh == after.mesh
    leaves = zip(*(jax.tree.leaves(spec.abstract) for spec in (before, after)), strict=True)
    split = {x.shape for pair in leaves if not pair[1].sharding.is_fully_replicated for x in pair}
    assert not gathered(compiled.as_text()) & split


@pytest.mark.parametrize("spec", [("fsdp", "tensor"), (None, "fsdp"), ("tensor", None)], ids=str)
@pytest.mark.parametrize(("shape", "new_shape"), list(itertools.permutations([*MESHES, (4, 2, 1), (1, 2, 4)], 2)))
def test_an_array_moves_between_meshes_without_being_gathered(shape, new_shape, spec):
    old, new = (NamedSharding(mesh_of(s), PartitionSpec(*spec)) for s in (shape, new_shape))
    x = np.arange(32.0 * 48).reshape(32, 48)
    program = jax.jit(lambda x: reshard(x, old, new), in_shardings=old, out_shardings=new).lower(x).compile()
    np.testing.assert_array_equal(program(jax.device_put(x, old)), x)
    if not new.is_fully_replicated:
        assert x.shape not in gathered(program.as_text())


def test_meshes_without_a_common_refinement_leave_the_way_to_xla():
    devices = jax.devices()[:6]
    old, new = (
        NamedSharding(make_mesh(MeshShape(1, *shape), devices), PartitionSpec("fsdp", "tensor"))
        for shape in ((2, 3), (3, 2))
    )
    assert reshard_steps((12, 12), old, new) == []
    x = np.arange(144.0).reshape(12, 12)
    moved = jax.jit(lambda x: reshard(x, old, new), in_shardings=old, out_shardings=new)(jax.device_put(x, old))
    np.testing.assert_array_equal(moved, x)


def test_a_stage_has_its_own_mesh():
    stages = (
        StageConfig(name="a"),
        StageConfig(name="b", mesh=StageMeshConfig(tensor=4)),
        StageConfig(name="c", mesh=StageMeshConfig(replica=1)),
    )
    config = RunConfig(model=with_fields(CONFIG, vocab_multiple=3), stages=stages, mesh=MeshConfig(2, 2, 2))
    assert validate_meshes(config, 8) == (MeshShape(2, 2, 2), MeshShape(2, 1, 4), MeshShape(1, 4, 2))
    assert {stage.model.padded_vocab_size for stage in config.schedule} == {72}  # 61 rounded up to 3 x 4


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"mesh": StageMeshConfig(replica=3, fsdp=2)}, ".mesh: replica 3 x fsdp 2 x tensor 1 has 6 places"),
        (
            {"mesh": StageMeshConfig(tensor=4), "batch_size": 7},
            ": the 7 sequences of a microbatch (batch_size / microbatches) do not divide over the 2 data shards",
        ),
        (
            {"mesh": StageMeshConfig(tensor=8), "num_heads": 4},
            ": num_heads=4 does not divide over mesh axis",
        ),
        ({"mesh": StageMeshConfig(tensor=0)}, ".mesh.tensor=0 "),
        ({"remat": "most"}, ".remat='most'"),
    ],
)
def test_a_stage_that_does_not_fit_its_mesh_is_named(stage, words):
    stages = (StageConfig(name="a"), StageConfig(name="b", **stage))
    config = RunConfig(model=with_fields(CONFIG, num_heads=4), stages=stages)
    with pytest.raises(ConfigError, match=re.escape(f"stages[1]{words}")):
        validate_meshes(validate(config), 8)


def test_default_mesh_is_all_data():
    """Not all devices on the model axis: google-research/t5x#410."""
    run_config = RunConfig(model=CONFIG, stages=(StageConfig(),))
    (shape,) = validate_meshes(run_config, 8)
    assert (shape.replica, shape.fsdp, shape.tensor) == (1, 8, 1)
    with pytest.raises(ConfigError, match=r"1 x fsdp 3 x tensor 2 has 6 places for 8 devices; fsdp=4 would"):
        validate_meshes(with_fields(run_config, mesh=MeshConfig(1, 3, 2)), 8)
    for mesh, words in (
        (MeshConfig(3, None, 1), "replica 3 x fsdp 2 x tensor 1 has 6 places for 8 devices; replica=4 would"),
        (MeshConfig(1, None, 16), "has 16 places for 8 devices; tensor=8 would"),
        (MeshConfig(3, 3, 2), "has 18 places for 8 devices; replica=2, fsdp=2 would"),
    ):
        with pytest.raises(ConfigError, match=words):
            validate_meshes(with_fields(run_config, mesh=mesh), 8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_heads": 6}, r"stages\[0\]: num_heads=6 does not divide over mesh axis tensor=4"),
        ({"mlp_dim": 50}, "mlp_dim=50 does not divide"),
        ({"num_kv_heads": 2}, "num_kv_heads=2 does not divide"),
        ({"embed_dim": 31}, "embed_dim=31 does not divide over mesh axis fsdp=2"),
    ],
)
def test_sizes_that_do_not_divide_are_named(fields, words):
    """Before compiling, whose error is late and names no setting: jax-ml/jax#27808."""
    config = RunConfig(model=with_fields(CONFIG, **fields), mesh=MeshConfig(1, 2, 4))
    with pytest.raises(ConfigError, match=words):
        validate_meshes(config, 8)


def test_vocabulary_that_does_not_divide_is_padded():
    config = RunConfig(model=with_fields(CONFIG, vocab_size=259, vocab_multiple=1), mesh=MeshConfig(1, 2, 4))
    assert config.stage_models[0].padded_vocab_size == 260


def test_biases_are_added_once_whatever_the_split():
    """A bias after a contraction over shards must not be summed once a shard: EleutherAI/gpt-neox#1072."""
    params = random_params(CONFIG)
    assert all(np.abs(x).min() > 0 for x in jax.tree.leaves(params["layers"]["mlp"]["down"]["bias"]))
    tokens = random_batch(CONFIG, rows=8)["tokens"]

    def logits(shape):
        mesh = mesh_of(shape)
        spec = state_spec(CONFIG, OptimizerConfig(), mesh)
        placed = jax.device_put(params, spec.shardings.params)
        return np.asarray(jax.jit(lambda p: Transformer(CONFIG, Placement(mesh)).apply({"params": p}, tokens))(placed))

    np.testing.assert_allclose(logits((1, 1, 4)), logits((1, 1, 1)), atol=1e-5)
