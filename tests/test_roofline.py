"""Data sheets, and the time of a step by hand."""

import dataclasses
import re
from importlib import metadata

import pytest

from flmjax.config import ConfigError, MeshShape, ModelConfig
from flmjax.hardware import A800, Chip, GiB, chip_of
from flmjax.planning.exchanges import Collective, Schedule, Timeline, Transfer, Work
from flmjax.planning.hlo import Module
from flmjax.planning.products import MatrixProducts
from flmjax.planning.program import Program
from flmjax.planning.roofline import (
    Assumptions,
    certificate_time,
    fused_attention_flops,
    growth_time,
    link_bandwidth,
    step_time,
)
from flmjax.planning.topology import devices_of, parse_topology
from flmjax.sharding import mesh as mesh_module
from flmjax.sharding.mesh import check_slices

TINY = ModelConfig(num_layers=2, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=64, max_length=32)


HALF = Assumptions(matmul=0.5, attention=0.25, memory=0.5, link=0.5, bytes_per_token=10)
NVLINK = Collective("all-gather", "bf16", 2, 1, 2, 1, 100e9, 1)  # of the tensor axis: 1 s
NETWORK = Collective("all-gather", "bf16", 16, 2, 4, 1, 50e9, 1)  # four ports of 25 GB/s a node: 1 s
SLOW = Collective("all-reduce", "f32", 16, 2, 1, 1, 25e9, 1)  # one port: 2 s


def time_of(*timelines, model=TINY, **amounts):
    """The time of a step on A800s in a mesh of fsdp 16 and tensor 2."""
    zero = dict.fromkeys(("tokens", "matmul_flops", "attention_flops", "attention_products", "state_bytes"), 0.0)
    model = dataclasses.replace(model, dtype="bfloat16")
    return step_time(model, A800, MeshShape(1, 16, 2), assumed=HALF, timelines=timelines, **{**zero, **amounts})


def test_a_step_time_is_the_sum_of_its_parts():
    time = time_of(
        Timeline(1, (), tuple(Transfer(one, 0, 0) for one in (NVLINK, NETWORK, SLOW))),
        model=dataclasses.replace(TINY, remat="full"),
        tokens=1e6,
        matmul_flops=312e12,
        attention_flops=312e12,
        attention_products=1.0,
        state_bytes=2039e9 / 2 * 3 / 7,
    )
    between = 10 * 32 * 4 * 2 * 1e6 / (2039e9 * 0.5)
    assert time.compute == pytest.approx(2 + 4 + between)
    assert time.traffic(is_tensor=True) == pytest.approx((1.0, 0.0))
    assert time.traffic(is_tensor=False) == pytest.approx((1.0 + 2.0, 0.0))
    assert time.update == pytest.approx(1.0)
    assert time.seconds == pytest.approx(2 + 4 + between + 1 + 3 + 1)


def test_a_certificate_takes_its_products_in_two_dtypes():
    sizes = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "peak", "matmul_flops"), 0)
    sizes |= {"rematerialisations": 0, "compile_seconds": 1.0}
    empty = Program(name="certificate", advice="", collectives=(NETWORK,), **sizes)
    model = dataclasses.replace(TINY, dtype="bfloat16")
    assert certificate_time(A800, empty, model, HALF) == growth_time(A800, empty, HALF) == 1.0
    program = dataclasses.replace(empty, matmul_flops=312e12)
    # 2 s in bfloat16; half as many products in float32, at 156 / 8 of 312 TFLOP/s.
    assert certificate_time(A800, program, model, HALF) == pytest.approx(1 + 2 + 2 / 2 * 16)


SECOND = Work(flops=156e12)  # at half of the peak


@pytest.mark.parametrize(
    ("transfers", "hidden", "exposed"),
    [
        ([(NETWORK, 0, 0)], 0.0, 1.0),
        ([(NETWORK, 0, 1)], 1.0, 0.0),
        ([(SLOW, 0, 1)], 1.0, 1.0),
        ([(SLOW, 0, 3)], 2.0, 0.0),
        ([(NETWORK, 0, 1), (NETWORK, 0, 1)], 1.0, 1.0),
        ([(NETWORK, 0, 2), (NETWORK, 1, 2)], 2.0, 0.0),
        ([(NETWORK, 0, 1), (SLOW, 0, 2)], 2.0, 1.0),
        ([(NETWORK, 0, 1), (NVLINK, 0, 1)], 2.0, 0.0),
    ],
    ids=["none", "all", "half", "longer", "shared", "in_turn", "partly_shared", "two_links"],
)
def test_what_is_computed_meanwhile_hides_an_exchange(transfers, hidden, exposed):
    """Exchanges that are under way at once share the computation, unless they take different links."""
    timeline = Timeline(3, (SECOND, SECOND, SECOND), tuple(Transfer(*one) for one in transfers))
    time = time_of(timeline)
    assert sum(one.hidden for one in time.exchanges) == pytest.approx(3 * hidden)
    assert time.exposed == time.seconds == pytest.approx(3 * exposed)


def test_attention_hides_an_exchange_too():
    timeline = Timeline(1, (Work(attention=2.0),), (Transfer(SLOW, 0, 1),))
    time = time_of(timeline, attention_flops=7 * 39e12, attention_products=7.0)  # 0.5 s a product
    assert (time.exposed, time.compute) == pytest.approx((1.0, 3.5))


def test_what_the_program_does_not_tell_is_exposed():
    work, transfers = (SECOND,), (Transfer(NETWORK, 0, 0, is_told=False), Transfer(NVLINK, 0, 1))
    time = time_of(Timeline(1, work, transfers))
    assert (time.untold, time.exposed) == pytest.approx((1.0, 1.0))


HLO = """HloModule m, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%scatter (p: f32[64]) -> f32[8] {
  ROOT %r.1 = f32[8] reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%product (p.1: f32[4,4]) -> f32[4,4] {
  ROOT %d.1 = f32[4,4] dot(%x.1, %x.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %x.1 = f32[4,4] parameter(0)
}

%body (p.2: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %x = f32[4,4] get-tuple-element(%p.2), index=1
  %g = (f32[8], f32[64]) all-gather-start(%y), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %m = f32[4,4] fusion(%x), kind=kOutput, calls=%product
  %g.1 = f32[64] all-gather-done(%g)
  %q = (f32[8], f32[64]) all-gather-start(%y), replica_groups={{0,1,2,3,4,5,6,7}}, backend_config={"is_sync":true}
  %d = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %q.1 = f32[64] all-gather-done(%q)
  %r = ((f32[64]), f32[8]) async-start(%g.1), calls=%scatter
  %u = ((f32[64]), f32[8]) async-update(%r)
  %c = f32[4,4] custom-call(%x, %x), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %e = f32[4,4] add(%x, %x)
  %r.2 = f32[8] async-done(%u)
  %o = f32[64] all-gather(%y), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

ENTRY %main (x.2: f32[4,4]) -> f32[4,4] {
  %w = (s32[], f32[4,4]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_work_between_start_and_done_is_read_from_the_schedule():
    """Starts have four forms, one of which a GPU executes at once in spite of its two instructions."""
    schedule = Schedule(MatrixProducts(Module(HLO)), node_size=8)
    (timeline,) = schedule.timelines()
    product = Work(flops=2.0 * 4 * 4 * 4)
    assert (timeline.count, timeline.work) == (5, (product, product, Work(attention=5.0)))
    transfers = [(x.collective.kind, timeline.work[x.start : x.stop]) for x in timeline.transfers]
    assert transfers == [
        ("all-gather", (product,)),
        ("all-gather", ()),
        ("reduce-scatter", (Work(attention=5.0),)),
        ("all-gather", ()),
    ]
    assert all(transfer.is_told for transfer in timeline.transfers)
    assert schedule.attention_products() == 25


CHAIN = """HloModule m, num_partitions=8

%starting (p: f32[8]) -> f32[64] {
  ROOT %g = f32[64] all-gather(%p), replica_groups={}, frontend_attributes={chain_id="9"}
}

%fused (p.1: f32[8], x: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4] parameter(1)
  %d = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g.1 = f32[64] all-gather(%p.1), replica_groups={}, frontend_attributes={chain_id="9"}
}

ENTRY %main (x.2: f32[4,4]) -> f32[4,4] {
  %async-collective-start = f32[64] fusion(%y), kind=kCustom, calls=%starting
  %m = f32[4,4] fusion(%y, %z), kind=kCustom, calls=%fused
}
"""


def test_a_collective_that_a_tpu_fuses_with_products_is_not_told():
    """It runs in parts, one in each of several fusions, and is one collective."""
    (timeline,) = Schedule(MatrixProducts(Module(CHAIN)), node_size=8).timelines()
    (transfer,) = timeline.transfers
    assert not transfer.is_told
    assert (timeline.count, transfer.collective.bytes) == (1, 64 * 4 * 7 / 8)


@pytest.mark.parametrize(
    ("ring", "in_node", "is_tensor"),
    [
        ((4, 1), 4, True),
        ((4, 4), 2, False),
        ((4, 4), 4, False),
        ((2, 2), 2, True),
        ((8, 1), 8, False),
        ((4, 1), 2, True),
    ],
)
def test_tensor_traffic_is_that_along_the_last_axis(ring, in_node, is_tensor):
    exchange = Collective("all-gather", "bf16", *ring, in_node, 1, 1e9, 1)
    time = step_time(
        TINY, A800, MeshShape(1, 4, 4), tokens=0, matmul_flops=0, attention_flops=0, attention_products=0,
        state_bytes=0, timelines=[Timeline(1, (), (Transfer(exchange, 0, 0),))],
    )  # fmt: skip
    assert [one.is_tensor for one in time.exchanges] == [is_tensor]


def test_flops_of_fused_attention_by_hand():
    assert fused_attention_flops(dataclasses.replace(TINY, remat="none"), 10) == (2 + 5) * 2 * 32 * 32 * 10
    assert fused_attention_flops(dataclasses.replace(TINY, remat="full"), 10) == (2 * 2 + 5) * 2 * 32 * 32 * 10


@pytest.mark.parametrize(("group", "in_node", "rate"), [(8, 8, 200e9), (16, 4, 100e9), (32, 16, 200e9), (16, 1, 25e9)])
def test_a_ring_has_the_network_ports_of_its_members_in_a_node(group, in_node, rate):
    assert link_bandwidth(A800, Collective("all-gather", "bf16", group, 1, in_node, 1, 1e9, 1)) == rate


SLICES = """HloModule m, num_partitions=8

ENTRY %main (x: f32[4,4]) -> f32[4,4] {
  %recv = (f32[32], u32[], token[]) recv(%after), frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.9_0"}
  %send = (f32[32], u32[], token[]) send(%y, %after), frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.9_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %x = f32[4,4] parameter(0)
  %d = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = (f32[32], token[]) recv-done(%recv)
  %e = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %end = token[] send-done(%send)
}
"""  # noqa: E501


def test_between_slices_of_tpus_a_send_starts_and_its_recv_ends():
    (timeline,) = Schedule(MatrixProducts(Module(SLICES)), node_size=2).timelines()
    (transfer,) = timeline.transfers
    assert transfer.collective == Collective("all-reduce", "f32", 4, 2, 1, 1, 2 * 3 / 4 * 32 * 4, 32 * 4)
    assert (transfer.start, transfer.stop, len(timeline.work)) == (0, 1, 2)
    chip = parse_topology("v5p:2x2x1*4").chip
    assert link_bandwidth(chip, transfer.collective) == 6.25e9


# ---- machines --------------------------------------------------------------------------------------------------------


MACHINES = {  # devices, devices in a node or a slice, bfloat16 TFLOP/s and GiB of a device
    "a100:1x8": (8, 8, 312, 80),
    "a800:24x8": (192, 8, 312, 80),
    "h100:16x8": (128, 8, 989, 79.1),
    "h200:2x8": (16, 8, 989, 141),
    "b200:2x8": (16, 8, 2250, 178.4),
    "gb200:36x4": (144, 72, 2500, 184.3),
    "v4:4x8x8": (256, 256, 275, 32),
    "v5p:4x8x8": (256, 256, 459, 95),
    "v5e:16x16": (256, 256, 197, 16),
    "v6e:16x16": (256, 256, 918, 32),
    "v7x:4x4x8": (256, 256, 1153.5, 96),
    "v5p:4x8x8*2": (512, 256, 459, 95),
    "v7x:2x2x1*4": (32, 8, 1153.5, 96),
}


@pytest.mark.parametrize("name", MACHINES)
def test_machines_have_data_sheets(name):
    topology = parse_topology(name)
    chip = topology.chip
    figures = (topology.num_devices, topology.node_size, chip.bfloat16 / 1e12, pytest.approx(chip.memory / GiB, 1e-3))
    assert figures == MACHINES[name]
    assert 0.9 * chip.memory < topology.usable < chip.memory
    assert chip.inter_node < chip.intra_node < chip.bandwidth
    assert topology.slices == topology.num_devices // topology.node_size or topology.platform == "cuda"


@pytest.mark.parametrize("name", ["h100:2x8x2", "a800:2x8*2", "v5p:2x2", "v5p:2x2x2*0", "v5p:2x2x2*", "h100"])
def test_a_shape_that_a_machine_does_not_have_is_refused(name):
    with pytest.raises(ConfigError, match=r"is not a known machine; choices: .*h100:HOSTSx8.*gb200:HOSTSx4.*v7x:4x4x8"):
        parse_topology(name)


@pytest.mark.parametrize(("name", "cure"), [("h100:2x4", "h100:2x8"), ("gb200:2x8", "gb200:2x4")])
def test_hosts_of_another_size_are_refused(name, cure):
    with pytest.raises(ConfigError, match=rf"has hosts of \d GPUs; those of .* have \d: {cure}$"):
        parse_topology(name)


def test_every_pod_has_its_size():
    with pytest.raises(ConfigError, match=r"'v7x:32x32x32\*2' has 32768 chips; a pod of v7x has 9216"):
        parse_topology("v7x:32x32x32*2")


def test_unknown_figures_of_a_chip_are_none():
    pcie = chip_of("NVIDIA H100 PCIe")
    assert type(pcie) is Chip
    assert (pcie.memory, pcie.bandwidth, pcie.intra_node, pcie.inter_node) == (None,) * 4
    assert chip_of("a stranger") is None
    assert [chip_of(f"NVIDIA {name}").kind for name in ("GB200", "B200")] == ["GB200", "B200"]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_compiler_of_another_version_is_refused(monkeypatch, platform):
    """libtpu 0.0.52 compiled for minutes, and jaxlib 0.10.2 could not read its programs (RET_CHECK, async-update)."""
    package, asked = {"cuda": ("jax-cuda12-plugin", "<=0.10.2,>=0.10.2"), "tpu": ("libtpu", "==0.0.42.*")}[platform]
    versions = {"jax": "0.10.2", package: "0.0.52"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    lines = [
        "numpy>=2",
        'libtpu==0.0.42.*; extra == "tpu"',
        'jax-cuda12-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda12"',
    ]
    monkeypatch.setattr(metadata, "requires", {"jax": lines}.__getitem__)
    words = f"^{package} 0.0.52 does not belong to jax 0.10.2; pip install '{re.escape(package + asked)}'$"
    with pytest.raises(ConfigError, match=words):
        devices_of(parse_topology({"cuda": "a800:1x8", "tpu": "v5e:2x4"}[platform]))


def test_only_the_replica_axis_crosses_slices():
    check_slices(MeshShape(4, 2, 1), 2)
    with pytest.raises(
        ConfigError, match=r"^mesh\.replica=3 is not a multiple of the 2 slices .*; mesh\.replica=2 would$"
    ):
        check_slices(MeshShape(3, 2, 1), 2)


def test_slices_lie_along_replica_in_any_order_of_devices(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        slice_index: int

    devices = [Device(i, i % 2) for i in range(8)]
    monkeypatch.setattr(mesh_module, "Mesh", lambda devices, *_, **__: devices)
    mesh = mesh_module.make_mesh(MeshShape(4, 2, 1), devices)
    assert [[device.id for device in row.flat] for row in mesh] == [[0, 2], [4, 6], [1, 3], [5, 7]]
    with pytest.raises(ConfigError, match=r"mesh\.replica=1 is not"):
        mesh_module.make_mesh(MeshShape(1, 8, 1), devices)
