"""Bytes that collectives move and FLOPs of matrix multiplications, read from the text of a compiled program (HLO).

A loop's body is counted as often as it runs, which the cost analysis of the compiler does not do.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(
    r"(body|calls|to_apply|true_computation|false_computation|branch_computations|async_computation|"
    r"called_computations)=\{?([%\w.\-, ]+)"
)

Shape = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a program that are alike.

    Attributes:
        kind: XLA's name of it.
        dtype: of the array that is moved.
        group: number of devices that exchange with each other.
        stride: between neighbours in a group; 1 along the mesh's last axis, 0 without a neighbour.
        in_node: members of a group in one node, of the group that is spread the widest.
        count: executions in a step.
        bytes: sent by a device in a step, on a ring of n devices: (n - 1) / n of a gathered or scattered array, twice
            that of a reduced one, all of a permuted one.
        largest: bytes of the largest result.
    """

    kind: str
    dtype: str
    group: int
    stride: int
    in_node: int
    count: int
    bytes: float
    largest: int


def collectives(text: str, node_size: int) -> list[Collective]:
    """Collectives of a program, those that are alike as one.

    Args:
        text: of the program after compilation.
        node_size: consecutive devices in a node.
    """
    totals: dict[tuple[str, str, int, int, int], list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0])
    partitions = re.search(r"num_partitions=(\d+)", text)
    all_devices = [list(range(int(partitions[1]) if partitions else 1))]
    for computation, times, line in _executed(text):
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        kind, shapes = match[2], _shapes(match[1])
        if not shapes:
            continue
        if match[3] and kind != "all-reduce":  # (operands, results, contexts)
            shapes = [shape for shape in shapes if shape[1] or shape[0] not in ("u32", "s32")]
            shapes = shapes[len(shapes) // 2 :] if len(shapes) > 1 else shapes
        groups = _groups(line) or all_devices
        group = groups[0]
        size, n = sum(map(_num_bytes, shapes)), max(len(group), 2)
        if kind == "all-reduce" and "reduce-scatter" in computation:  # the form of TPU programs
            kind, sent = "reduce-scatter", size * (n - 1) / n
        else:
            share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
            sent = size * share.get(kind, (n - 1) / n)
        # Of the group that is spread the widest: all wait for it.
        in_node = max(1, min(sum(d // node_size == g[0] // node_size for d in g) for g in groups))
        stride = min((abs(g[1] - g[0]) for g in groups if len(g) > 1 and g[1] != g[0]), default=0)
        entry = totals[kind, shapes[0][0], len(group), stride, in_node]
        entry[0] += times
        entry[1] += times * sent
        entry[2] = max(entry[2], size)
    return [Collective(*key, int(count), sent, int(largest)) for key, (count, sent, largest) in sorted(totals.items())]


def matmul_flops(text: str) -> float:
    """FLOPs of every matrix multiplication that a device executes, 2 M N K each; custom kernels are not counted.

    Example: a loop that runs 7 times over a product of (6, 10) and (10, 10) has 7 x 2 x 6 x 10 x 10 = 8,400 FLOPs.

    Raises:
        ValueError: for a multiplication whose contracted sizes cannot be read.
    """
    total = 0.0
    shape_of: dict[str, dict[str, Shape]] = {}
    for computation, times, line in _executed(text):
        if computation not in shape_of:
            shape_of[computation] = {}
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)", line)
        if match is None:
            continue
        shapes = _shapes(match[2].split(")")[0] if match[2].startswith("(") else match[2].split("(")[0])
        if shapes:
            shape_of[computation][match[1]] = shapes[0]
        if re.search(r" (dot|convolution)\(|custom_call_target=\"__cublas", line):
            total += times * 2 * _products(line, shapes[0][1], shape_of[computation])
    return total


def _products(line: str, result: tuple[int, ...], shape_of: dict[str, Shape]) -> int:
    """Scalar products of a matrix multiplication, M N K."""
    names = re.findall(r"%([\w.\-]+)", line.split("(", 1)[1])[:2]
    left, right = (shape_of[name][1] if name in shape_of else None for name in (*names, "", "")[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    if labels and left is not None and right is not None:
        # TPU programs write a product as a convolution. A spatial axis is contracted (the result's size is 1), an axis
        # of the batch or an axis of one factor alone: each has as many products as the largest of the three sizes.
        sizes = [dict(zip(*pair, strict=True)) for pair in zip(labels.groups(), (left, right, result), strict=True)]
        spatial = [max(size.get(name, 1) for size in sizes) for name in labels[1] if name.isdigit()]
        return sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"] * math.prod(spatial)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
    contracted = contracted or re.search(r'lhs_contracting_dimensions":\[([^\]]*)\]', line)
    if contracted is None or left is None:
        raise ValueError(f"no contracted sizes in {line.strip()[:200]}")
    return math.prod(result) * math.prod(left[int(i)] for i in re.findall(r"\d+", contracted[1]))


# ---- text ------------------------------------------------------------------------------------------------------------


def _shapes(text: str) -> list[Shape]:
    shapes = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    return [(dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in shapes if dtype in BYTES]


def _num_bytes(shape: Shape) -> int:
    return BYTES[shape[0]] * math.prod(shape[1])


def _executed(text: str) -> Iterator[tuple[str, float, str]]:
    """(computation, number of executions, line) of every line that is executed."""
    computations, entry = _computations(text)
    times: dict[str, float] = collections.defaultdict(float)

    def visit(name: str, count: float) -> None:
        times[name] += count
        for line in computations[name]:
            trips = _trips(line, computations) if " while(" in line else 1
            for key, called in _CALLED.findall(line):
                if key == "to_apply" and not re.search(r" (call|fusion|custom-call)\(", line):
                    continue  # the sum of a reduction
                for other in (word.strip().lstrip("%") for word in called.split(",")):
                    if other in computations:
                        visit(other, count * (trips if key == "body" else 1))

    visit(entry, 1.0)
    for name, count in times.items():
        for line in computations[name]:
            yield name, count, line


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(lines of every computation, the name of the entry computation)."""
    computations: dict[str, list[str]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            current = match[2]
            computations[current] = []
            entry = current if match[1] else entry
        elif line.rstrip() == "}":  # "}}," ends a kernel's attributes, not a computation
            current = None
        elif current is not None:
            computations[current].append(line)
    return computations, entry


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """Trip count of a loop: from its line, or (TPU) the constant that its condition compares with."""
    if known := re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    return max((int(n) for other in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", other)), default=1)


def _groups(line: str) -> list[list[int]]:
    """Devices of every group of an exchange; groups have three spellings, pairs a fourth."""
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _iota(match[2], match[3]).reshape(_numbers(match[1])).tolist()
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
    if match := re.search(mesh, line):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        devices = _iota(match[2] or ",".join(map(str, axes.values())), match[3]).reshape(list(axes.values()))
        used = [i for i, name in enumerate(axes) if f"'{name}'" in match[4]]
        moved = np.moveaxis(devices, used, range(-len(used), 0))
        return moved.reshape(-1, math.prod(devices.shape[i] for i in used)).tolist()
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}", line):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    return []


def _iota(sizes: str, order: str | None) -> np.ndarray:
    shape = _numbers(sizes)
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose(_numbers(order)) if order else devices


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
