"""Reading compiled programs: matrix products and collectives counted by hand, loops included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flmjax.config import MeshShape, ModelConfig, OptimizerConfig
from flmjax.data.batch import BatchKind, abstract_batch
from flmjax.planning.hlo import collectives, matmul_flops
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import batch_sharding
from flmjax.training.state import state_spec
from flmjax.training.step import jit_train_step


@pytest.mark.parametrize(
    ("groups", "size", "stride"),
    [
        ("replica_groups={{0,4,8},{1,5,9}}, x", 3, 4),
        ("replica_groups=[2,4]<=[8], x", 4, 1),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", 2, 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", 4, 1),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", 2, 4),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x", 2, 4),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','c'}, x", 4, 1),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','b'}, x", 4, 2),
        ("source_target_pairs={{3,7},{7,3}}, x", 2, 4),
    ],
)
def test_groups_are_read_in_every_spelling(groups, size, stride):
    text = f"ENTRY %m (x: f32[8]) -> f32[8] {{\n  %g = f32[16] all-gather(%x), {groups}\n}}\n"
    assert [(c.group, c.stride) for c in collectives(text, node_size=4)] == [(size, stride)]


PROGRAM = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %g = f32[32,4] all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %r = bf16[8,4] all-reduce(%y), replica_groups={{0,4},{1,5}}, to_apply=%add
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %v = (s32[], f32[8,4]) while(%t), condition=%cond, body=%body
  %q = f32[2,4] reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  %s = (f32[2,4], f32[8,4], u32[]) all-gather-start(%x), replica_groups={{0,1,2,3}}
  %p = s32[6] collective-permute(%x), source_target_pairs={{0,4},{4,0}}
}
"""


def test_collectives_of_a_text_have_the_bytes_counted_by_hand():
    totals = {
        (c.kind, c.dtype, c.group, c.stride, c.in_node): (c.count, c.bytes, c.largest)
        for c in collectives(PROGRAM, node_size=4)
    }
    gathered = 8 * 32 * 4 * 4 * 3 / 4  # three and five rounds (the second loop says so in its condition)
    assert totals == {
        ("all-gather", "f32", 4, 1, 4): (9, gathered + 8 * 4 * 4 * 3 / 4, 512),
        ("all-reduce", "bf16", 2, 4, 1): (8, 8 * 2 * (8 * 4 * 2) / 2, 64),
        ("reduce-scatter", "f32", 4, 1, 4): (1, 2 * 4 * 4 * 3, 32),
        ("collective-permute", "s32", 2, 4, 1): (1, 24.0, 24),
    }


@pytest.mark.parametrize(
    ("header", "groups", "group"),
    [
        ("HloModule m, num_partitions=8\n", "replica_groups={}", (8, 1, 4)),
        ("", "replica_groups={}", (1, 0, 1)),
        ("", "source_target_pairs={{0,0},{1,3}}", (2, 2, 2)),
    ],
)
def test_without_groups_all_devices_exchange(header, groups, group):
    """A device that sends to itself has no neighbour."""
    text = f"{header}ENTRY %m (x: f32[8]) -> f32[8] {{\n  %g = f32[16] all-gather(%x), {groups}\n}}\n"
    assert [(c.group, c.stride, c.in_node) for c in collectives(text, node_size=4)] == [group]


def test_a_group_in_the_second_node_is_within_it():
    text = "ENTRY %m (x: f32[8]) -> f32[8] {\n  %g = f32[16] all-gather(%x), replica_groups={{6,7},{4,5}}\n}\n"
    assert [(c.group, c.in_node) for c in collectives(text, node_size=4)] == [(2, 2)]


@pytest.mark.parametrize(
    ("groups", "in_node"),
    [
        ("replica_groups=[2,6]<=[12]", 2),  # {6 .. 11} has two devices in the first node of 8
        ("replica_groups={{0,1,2},{3,4,5},{6,7,8}}", 2),
        ("source_target_pairs={{0,4},{4,8}}", 1),
        ("replica_groups=[3,4]<=[12]", 4),
    ],
)
def test_the_group_that_is_spread_the_widest_counts(groups, in_node):
    text = f"ENTRY %m (x: f32[8]) -> f32[8] {{\n  %g = f32[16] all-gather(%x), {groups}\n}}\n"
    assert [c.in_node for c in collectives(text, node_size=8)] == [in_node]


def test_a_product_in_a_loop_counts_once_for_each_iteration():
    def program(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    x, w = jnp.zeros((6, 10)), jnp.zeros((7, 10, 10))
    text = jax.jit(program).lower(x, w).compile().as_text()
    assert matmul_flops(text) == 7 * 2 * 6 * 10 * 10


@pytest.mark.parametrize(
    ("left", "right", "result", "labels", "products"),
    [
        ("6,10", "10,7", "6,7", "bf_io->bf", 6 * 7 * 10),
        ("6,4,5", "4,5,7", "6,7,1", "b0f_0io->bf0", 6 * 7 * 4 * 5),  # two axes contracted
        ("3,6,10", "3,10,7", "3,6,7", "0bf_0io->0bf", 3 * 6 * 7 * 10),  # a batch
        ("1,6,10", "5,10,7", "5,6,7", "0bf_0io->0bf", 5 * 6 * 7 * 10),  # two axes of the right factor
    ],
)
def test_convolutions_of_tpus_count_as_products(left, right, result, labels, products):
    lines = [f"%a = bf16[{left}] parameter(0)", f"%b = bf16[{right}] parameter(1)"]
    lines.append(f"%d = f32[{result}] convolution(%a, %b), dim_labels={labels}")
    text = "\n".join(["ENTRY %main (x: f32[8,4]) -> f32[8,4] {", *(f"  {line}" for line in lines), "}", ""])
    assert matmul_flops(text) == 2 * products


def test_a_product_whose_sizes_cannot_be_read_is_an_error():
    text = "ENTRY %main (x: f32[8,4]) -> f32[8,4] {\n  %d = f32[8,4] dot(%unknown, %w), lhs_contracting_dims={1}\n}\n"
    with pytest.raises(ValueError, match="no contracted sizes"):
        matmul_flops(text)


def test_gathers_of_a_real_program_are_those_of_its_shardings():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    split, replicated = NamedSharding(mesh, P("b")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=split)
    text = jax.jit(lambda x: x * 2, out_shardings=replicated).lower(x).compile().as_text()
    (gather,) = collectives(text, node_size=4)
    assert (gather.kind, gather.group, gather.in_node, gather.count) == ("all-gather", 4, 4, 1)
    assert gather.bytes == 16 * 3 * 4 * 3 / 4


@pytest.mark.parametrize(("remat", "passes"), [("none", 3), ("full", 4)])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_flops_of_a_step_are_those_counted_by_hand(remat, passes, microbatches):
    sizes = {"num_layers": 2, "embed_dim": 24, "num_heads": 2, "head_dim": 12, "mlp_dim": 40, "vocab_size": 64}
    model = ModelConfig(**sizes, max_length=16, remat=remat)
    mesh = make_mesh(MeshShape(1, 2, 2), jax.devices()[:4])
    spec = state_spec(model, OptimizerConfig(), mesh)
    batch = abstract_batch(BatchKind(False, False), 8, 16, batch_sharding(mesh))
    text = jit_train_step(spec, microbatches).lower(spec.abstract, batch, np.float32(0)).compile().as_text()
    tokens = 8 * 16
    layer = 2 * tokens * (4 * 24 * 24 + 2 * 24 * 40) + 2 * 2 * tokens * 16 * 24  # matrices; QK^T and AV, full square
    spared = 2 * tokens * 24 * 40 if remat == "full" else 0  # nothing needs the MLP's second product once more
    head = 3 * 2 * tokens * 24 * 64  # never computed twice
    assert matmul_flops(text) == (2 * (passes * layer - spared) + head) / 4
