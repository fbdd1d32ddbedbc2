"""Gradients of microbatches summed over the replicas of a mesh once a step, or in every microbatch: same results."""

import functools
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from conftest import TINY, random_params, with_fields
from step_cases import mixed_batch, on_mesh

from flmjax.config import MeshConfig, MeshShape, OptimizerConfig, RunConfig, StageConfig
from flmjax.data.batch import BatchKind, abstract_batch
from flmjax.model.transformer import abstract_params
from flmjax.planning.exchanges import Collective, Schedule
from flmjax.planning.hlo import Module
from flmjax.planning.planner import replica_sums
from flmjax.planning.products import MatrixProducts
from flmjax.planning.roofline import replica_sum
from flmjax.planning.topology import parse_topology
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import Placement, batch_sharding, tree_shardings
from flmjax.stderr import captured_stderr
from flmjax.training.state import state_spec
from flmjax.training.step import gradients, jit_train_step

MICROBATCHES = 4
CASES = {  # model, and the relative error of sums in another order
    "dropout": (with_fields(TINY, dtype="float64", dropout=0.3), 1e-12),
    "recomputed layers": (with_fields(TINY, dropout=0.3, remat="full", z_loss=1e-3), 1e-6),
    "untied head": (with_fields(TINY, tied_embedding=False, remat="dots", num_kv_heads=2, activation="swiglu"), 1e-6),
}
MESH = (2, 2, 2)
NODE = 4  # devices of a replica: a group of more of them exchanges between replicas


def mesh_of(shape):
    return make_mesh(MeshShape(*shape), jax.devices()[: int(np.prod(shape))])


@pytest.mark.parametrize("reduction", ["step", "microbatch"])
def test_learned_positions_of_documents_gather_no_activation(reduction):
    """The table is split over fsdp like the sequences: a lookup of its shards gathered all sequences everywhere."""
    config, mesh = with_fields(TINY, position="learned"), mesh_of(MESH)
    batch = uneven_batch(config)
    batch["positions"] = np.tile(np.arange(config.max_length, dtype=np.int32), (16, 1))
    shardings = tree_shardings(mesh, abstract_params(config)[1])
    compute = functools.partial(
        gradients, config=config, placement=Placement(mesh), microbatches=MICROBATCHES, reduction=reduction
    )
    params = jax.device_put(random_params(config), shardings)
    with captured_stderr() as stderr_text:
        jax.jit(compute, out_shardings=(None, shardings)).lower(
            params, on_mesh(batch, mesh), jax.random.key(0)
        ).compile()
        warnings = stderr_text()
    assert "Involuntary full rematerialization" not in warnings


def uneven_batch(config):
    """Text and teachers' sequences; the second of two replicas has weighted targets in two microbatches alone."""
    batch = mixed_batch(rows=16, teachers=(1, 3, 9, 12), config=config)
    batch["weights"][[8, 10, 12, 14]] = 0
    return batch


def computed(config, shape, reduction="step", batch=None):
    """(sums, gradients) of four microbatches on a mesh, as NumPy arrays."""
    mesh = mesh_of(shape)
    shardings = tree_shardings(mesh, abstract_params(config)[1])
    compute = functools.partial(
        gradients, config=config, placement=Placement(mesh), microbatches=MICROBATCHES, reduction=reduction
    )
    drawn = random_params(with_fields(config, dtype="float32", attention="plain"))
    dtype = np.float64 if config.dtype == "float64" else np.float32
    params = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), drawn), shardings)
    batch = uneven_batch(config) if batch is None else batch
    run = jax.jit(compute, out_shardings=(None, shardings))
    return jax.tree.map(np.asarray, run(params, on_mesh(batch, mesh), jax.random.key(0)))


def assert_equal_results(result, expected, relative):
    """Sums to `relative`, gradients to that share of the largest."""
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected[1]))
    chex.assert_trees_all_close(result[1], expected[1], rtol=0, atol=relative * largest)
    chex.assert_trees_all_close(result[0], expected[0], rtol=relative, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_both_reductions_equal_one_device(name):
    config, error = CASES[name]
    with jax.enable_x64(config.dtype == "float64"):
        expected = computed(config, (1, 1, 1))
        for reduction in ("step", "microbatch"):
            assert_equal_results(computed(config, MESH, reduction), expected, error)


def test_gradients_of_a_bfloat16_model_are_summed_over_replicas_in_float32():
    """The programs of both reductions differ in the order of sums alone; bfloat16 would round by 2e-3."""
    config = with_fields(TINY, dtype="bfloat16")
    once, often = (computed(config, MESH, reduction) for reduction in ("step", "microbatch"))
    assert {leaf.dtype for leaf in jax.tree.leaves(once[1])} == {np.dtype("float32")}
    assert_equal_results(once, often, 1e-6)


def test_splash_attention_is_computed_replica_by_replica():
    config = with_fields(TINY, max_length=128, num_layers=1)
    batch = uneven_batch(config)
    expected = computed(config, (1, 1, 1), batch=batch)
    assert_equal_results(computed(with_fields(config, attention="splash"), MESH, batch=batch), expected, 1e-5)


def between_replicas(config, reduction) -> list[tuple[int, Collective]]:
    """(Executions in a step, collective) of each exchange between the replicas in the compiled training step."""
    spec = state_spec(config, OptimizerConfig(), mesh_of(MESH))
    batch = abstract_batch(BatchKind(False, False), 16, config.max_length, batch_sharding(spec.mesh))
    step = jit_train_step(spec, MICROBATCHES, reduction=reduction)
    text = step.lower(spec.abstract, batch, np.float32(0)).compile().as_text()
    timelines = Schedule(MatrixProducts(Module(text)), NODE).timelines()
    exchanges = [(timeline.count, transfer.collective) for timeline in timelines for transfer in timeline.transfers]
    return [(count, one) for count, one in exchanges if one.in_node < one.group]


def gradient_bytes(config):
    return sum(
        4 * int(np.prod(sharding.shard_shape(leaf.shape)))
        for leaf, sharding in zip(
            jax.tree.leaves(abstract_params(config)[0]),
            jax.tree.leaves(tree_shardings(mesh_of(MESH), abstract_params(config)[1])),
            strict=True,
        )
    )


def test_replicas_exchange_gradients_once_a_step():
    config = with_fields(TINY, remat="full")
    exchanges = between_replicas(config, "step")
    assert {count for count, _ in exchanges} == {1}
    sums = [one for _, one in exchanges if (one.kind, one.group, one.stride) == ("all-reduce", 2, NODE)]
    assert sum(one.bytes for one in sums) == pytest.approx(gradient_bytes(config), abs=16)  # and three sums of losses
    assert sum(one.bytes for _, one in exchanges) == pytest.approx(gradient_bytes(config), abs=600)  # and norms


def test_replicas_exchange_gradients_in_every_microbatch_on_demand():
    config = with_fields(TINY, remat="full")
    exchanges = between_replicas(config, "microbatch")
    in_layers = [one for count, one in exchanges if count == MICROBATCHES * config.num_layers]
    assert max(one.largest for one in in_layers) >= 4 * 32 * 48 / 4  # a matrix of the MLP


def test_the_planned_costs_are_those_of_the_program():
    config = with_fields(TINY, remat="full")
    run = RunConfig(
        model=config, stages=(StageConfig(batch_size=16, microbatches=MICROBATCHES),), mesh=MeshConfig(*MESH)
    )
    spec = state_spec(config, OptimizerConfig(), mesh_of(MESH))
    topology = parse_topology("a800:1x8")
    compiler = SimpleNamespace(mesh_shape=lambda _: MeshShape(*MESH), spec=lambda _: spec, topology=topology)
    (stage,) = run.schedule
    sums = replica_sums(compiler, stage)
    assert sums.reduction == "step"
    sent = sum(one.bytes for _, one in between_replicas(config, "step") if one.stride == NODE)
    assert sums.step.bytes == gradient_bytes(config) == pytest.approx(sent, abs=16)
    assert sums.step.seconds == pytest.approx(sums.step.bytes / (200e9 * 0.75))  # NVLink
    assert sums.microbatch.bytes == MICROBATCHES * sums.step.bytes
    assert sums.microbatch.seconds == MICROBATCHES * sums.step.seconds


def test_without_replicas_the_plan_shows_no_sum_over_them():
    mesh = (1, 8, 1)
    run = RunConfig(model=TINY, stages=(StageConfig(batch_size=16, microbatches=4),), mesh=MeshConfig(*mesh))
    compiler = SimpleNamespace(mesh_shape=lambda _: MeshShape(*mesh), topology=parse_topology("a800:1x8"))
    assert replica_sums(compiler, run.schedule[0]) is None


@pytest.mark.parametrize(
    ("mesh", "sent", "in_node"), [((3, 64, 1), 8e9, 1), ((4, 2, 1), 9e9, 4), ((8, 2, 2), 10.5e9, 2)], ids=str
)
def test_the_sum_over_replicas_is_a_ring(mesh, sent, in_node):
    """6 GB of gradients in nodes of 8 devices."""
    one = replica_sum(6e9, MeshShape(*mesh), 8)
    assert (one.bytes, one.group, one.in_node) == (pytest.approx(sent), mesh[0], in_node)
