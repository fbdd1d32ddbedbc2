"""Reading compiled programs: matrix products and collectives counted by hand, loops included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flmjax.config import MeshShape, ModelConfig, OptimizerConfig
from flmjax.data.batch import BatchKind, abstract_batch
from flmjax.planning.exchanges import Collective, Schedule, collectives_of
from flmjax.planning.hlo import Module
from flmjax.planning.products import MatrixProducts
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import batch_sharding
from flmjax.training.state import state_spec
from flmjax.training.step import jit_train_step


def collectives(text: str, node_size: int) -> list[Collective]:
    return collectives_of(Schedule(MatrixProducts(Module(text)), node_size).timelines())


def matmul_flops(text: str) -> float:
    return MatrixProducts(Module(text)).flops()


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


_LOOP = """%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[] add(%i, %one)
  %g = f32[32,4] all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %r = bf16[8,4] all-reduce(%y), replica_groups={{0,4},{1,5}}, to_apply=%add
  ROOT %state = (s32[], f32[8,4]) tuple(%next, %y)
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
  %p.1 = (s32[], f32[8,4]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%i.1, %c), direction=LT
}
"""
PROGRAM = f"""HloModule m

%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %s = f32[] add(%a, %b)
}}

{_LOOP}
{_LOOP.replace("%body", "%other_body").replace("%cond", "%other_cond")}
ENTRY %main (x: f32[8,4]) -> f32[8,4] {{
  %zero = s32[] constant(0)
  %t = (s32[], f32[8,4]) tuple(%zero, %x)
  %w = (s32[], f32[8,4]) while(%t), condition=%cond, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %v = (s32[], f32[8,4]) while(%t), condition=%other_cond, body=%other_body
  %q = f32[2,4] reduce-scatter(%x), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  %s = (f32[2,4], f32[8,4], u32[]) all-gather-start(%x), replica_groups={{{{0,1,2,3}}}}
  %p = s32[6] collective-permute(%x), source_target_pairs={{{{0,4}},{{4,0}}}}
}}
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
        ("6,4,5", "4,5,7", "6,7,1", "window={size=4}, dim_labels=b0f_0io->bf0", 6 * 7 * 4 * 5),  # two axes contracted
        ("3,6,10", "3,10,7", "3,6,7", "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf", 3 * 6 * 7 * 10),
        ("1,6,10", "5,10,7", "5,6,7", "window={size=5 pad=4_4 rhs_reversal=1}, dim_labels=0bf_0io->0bf", 5 * 6 * 70),
        # One step of a collective matrix product of a v5p: 2 of 32 shards of 128 are contracted, 32 heads are not.
        (
            "4,2048,2,128,1",
            "2,128,32,128,1",
            "4,2048,32,128,1",
            "window={size=1x32x2 pad=0_0x31_31x0_0 rhs_reversal=0x1x0}, dim_labels=0b2f1_2i1o0->0b1f2",
            4 * 2048 * 2 * 128 * 32 * 128,
        ),
    ],
)
def test_convolutions_of_tpus_count_as_products(left, right, result, labels, products):
    """The second to last has two axes of the right factor alone, the one before it a batch of both factors."""
    labels = labels if "=" in labels else f"dim_labels={labels}"
    lines = [f"%a = bf16[{left}] parameter(0)", f"%b = bf16[{right}] parameter(1)"]
    lines.append(f"%d = f32[{result}] convolution(%a, %b), {labels}")
    text = "\n".join(["ENTRY %main (x: f32[8,4]) -> f32[8,4] {", *(f"  {line}" for line in lines), "}", ""])
    assert matmul_flops(text) == 2 * products


LOOP = """HloModule m

%test (a: u32[], b: u32[]) -> pred[] {
  %a = u32[] parameter(0)
  %b = u32[] parameter(1)
  ROOT %c = pred[] compare(%b, %a), direction=GT
}

%body (p: (u32[], f32[4,4], u32[])) -> (u32[], f32[4,4], u32[]) {
  %p = (u32[], f32[4,4], u32[]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %x = f32[4,4] get-tuple-element(%p), index=1
  %n = u32[] get-tuple-element(%p), index=2
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %d = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %state = (u32[], f32[4,4], u32[]) tuple(%next, %d, %n)
}

%cond (q: (u32[], f32[4,4], u32[])) -> pred[] {
  %q = (u32[], f32[4,4], u32[]) parameter(0)
  %j = u32[] get-tuple-element(%q), index=0
  %m = u32[] get-tuple-element(%q), index=2
  ROOT %f = pred[] fusion(%j, %m), kind=kLoop, calls=%test
}

ENTRY %main (x: f32[4,4]) -> f32[4,4] {
  %x.1 = f32[4,4] parameter(0)
  %start = u32[] constant(1)
  %limit = u32[]{:T(128)} constant(16)
  %t = (u32[], f32[4,4], u32[]) tuple(%start, %x.1, %limit)
  %w = (u32[], f32[4,4], u32[]) while(%t), condition=%cond, body=%body
  ROOT %r = f32[4,4] get-tuple-element(%w), index=1
}
"""


def test_a_loop_without_its_number_is_counted_from_its_counter():
    """A TPU's collective matrix products count a u32[] in steps of 2; a GPU's pipelined loop has its test in a fusion.

    1, 3 ... 15 are below 16, which the loop's state holds.
    """
    assert matmul_flops(LOOP) == 8 * 2 * 4 * 4 * 4
    assert matmul_flops(LOOP.replace("direction=GT", "direction=GE")) == 8 * 2 * 4 * 4 * 4
    assert matmul_flops(LOOP.replace("constant(16)", "constant(17)")) == 8 * 2 * 4 * 4 * 4
    assert matmul_flops(LOOP.replace("constant(16)", "constant(17)").replace("GT", "GE")) == 9 * 2 * 4 * 4 * 4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("add(%i, %two)", "multiply(%i, %two)"),
        ("constant(16)", "custom-call()"),
        ("tuple(%next, %d, %n)", "tuple(%next, %d, %next)"),
        ("direction=GT", "direction=EQ"),
        ("tuple(%start,", "tuple(%unknown,"),
        ("add(%i, %two)", "add(%n, %two)"),
    ],
    ids=["step", "limit", "moving_limit", "test", "start", "another_counter"],
)
def test_a_loop_whose_iterations_cannot_be_read_is_an_error(old, new):
    assert old in LOOP
    with pytest.raises(ValueError, match=r"^the number of iterations of loop %w cannot be read"):
        matmul_flops(LOOP.replace(old, new))


def test_a_loop_with_nothing_to_count_needs_no_number():
    text = LOOP.replace("dot(%x, %x)", "add(%x, %x)").replace("direction=GT", "direction=EQ")
    assert matmul_flops(text) == 0


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
