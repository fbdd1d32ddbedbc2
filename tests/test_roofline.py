"""Data sheets, and the time of a step by hand."""

import dataclasses

import pytest

from flmjax.config import (
    MeshShape,
    ModelConfig,
)
from flmjax.hardware import A800, Chip, chip_of
from flmjax.planning.hlo import Collective
from flmjax.planning.roofline import Assumptions, fused_attention_flops, link_bandwidth, step_time
from flmjax.planning.topology import parse_topology

TINY = ModelConfig(num_layers=2, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=64, max_length=32)


def test_a_step_time_is_the_sum_of_its_parts():
    model = dataclasses.replace(TINY, dtype="bfloat16", remat="full")
    assumed = Assumptions(matmul=0.5, attention=0.25, memory=0.5, link=0.5, overlap=0.5, bytes_per_token=10)
    exchanges = (
        Collective("all-gather", "bf16", 2, 1, 2, 1, 100e9, 1),  # tensor: NVLink, 200 GB/s
        Collective("all-gather", "bf16", 16, 2, 4, 1, 50e9, 1),  # four ports of 25 GB/s a node
        Collective("all-reduce", "f32", 16, 2, 1, 1, 25e9, 1),
    )
    time = step_time(
        model,
        A800,
        MeshShape(1, 16, 2),
        tokens=1e6,
        matmul_flops=312e12,
        attention_flops=312e12,
        state_bytes=2039e9 / 2 * 3 / 7,
        collectives=exchanges,
        assumed=assumed,
    )
    between = 10 * 32 * 4 * 2 * 1e6 / (2039e9 * 0.5)
    assert time.compute == pytest.approx(2 + 4 + between)
    assert time.tensor == pytest.approx(1.0)
    assert time.data == pytest.approx(1.0 + 2.0)
    assert time.hidden == pytest.approx(3.0)  # less than half of the computation
    assert time.update == pytest.approx(1.0)
    assert time.seconds == pytest.approx(2 + 4 + between + 1 + 0 + 1)


def test_on_a_torus_weights_are_hidden_and_tensor_traffic_is_not():
    chip = parse_topology("v5p:4x8x8").chip
    rings = ((64, 4), (4, 1))
    exchanges = [Collective("all-gather", "bf16", *ring, ring[0], 1, chip.intra_node, 1) for ring in rings]
    time = step_time(
        dataclasses.replace(TINY, dtype="bfloat16"),
        chip,
        MeshShape(1, 64, 4),
        tokens=0.0,
        matmul_flops=chip.bfloat16 * 100,
        attention_flops=0.0,
        state_bytes=0.0,
        collectives=exchanges,
    )
    second = pytest.approx(1 / Assumptions().link)
    assert (time.data, time.hidden, time.tensor) == (second, second, second)


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
        TINY, A800, MeshShape(1, 4, 4), tokens=0, matmul_flops=0, attention_flops=0, state_bytes=0,
        collectives=[exchange],
    )  # fmt: skip
    assert (time.tensor > 0, time.data > 0) == (is_tensor, not is_tensor)


def test_flops_of_fused_attention_by_hand():
    assert fused_attention_flops(dataclasses.replace(TINY, remat="none"), 10) == (2 + 5) * 2 * 32 * 32 * 10
    assert fused_attention_flops(dataclasses.replace(TINY, remat="full"), 10) == (2 * 2 + 5) * 2 * 32 * 32 * 10


@pytest.mark.parametrize(("group", "in_node", "rate"), [(8, 8, 200e9), (16, 4, 100e9), (32, 16, 200e9), (16, 1, 25e9)])
def test_a_ring_has_the_network_ports_of_its_members_in_a_node(group, in_node, rate):
    assert link_bandwidth(A800, Collective("all-gather", "bf16", group, 1, in_node, 1, 1e9, 1)) == rate


# ---- machines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a100:1x8", "a800:24x8", "v4:4x8x8", "v5p:4x8x8", "v5e:16x16", "v6e:16x16"])
def test_machines_have_data_sheets(name):
    topology = parse_topology(name)
    assert (topology.chip.inter_node is None) == (topology.platform == "tpu")
    assert 0.9 * topology.chip.memory < topology.usable < topology.chip.memory
    assert topology.num_devices == {"a100": 8, "a800": 192}.get(name.split(":")[0], 256)


def test_unknown_figures_of_a_chip_are_none():
    h100 = chip_of("NVIDIA H100 80GB HBM3")
    assert type(h100) is Chip
    assert (h100.memory, h100.bandwidth, h100.intra_node, h100.inter_node) == (None,) * 4
    assert chip_of("a stranger") is None
