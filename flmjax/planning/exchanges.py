"""Bytes that the collectives of a compiled program move, and the computation that runs while they do.

An asynchronous collective is two instructions of one computation, a start and a done. The text of a compiled program
has the order of its schedule, so that what stands between both is computed while the bytes are under way; it cannot
depend on them. A synchronous collective has nothing between. Between slices of TPUs a collective is a send and a recv
with one rendezvous, which end with the recv-done.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from flmjax.planning.hlo import KINDS, Instruction, num_bytes
from flmjax.planning.products import MatrixProducts

# Products over half of the square L x L in a kernel of fused attention: forward 2, backward 5.
_KERNELS = ((r"fmha\w*Backward|splash\w*_d(kv|q)", 5), (r"fmha|splash", 2))


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


@dataclasses.dataclass(frozen=True)
class Work:
    """Computation of an instruction that can hide an exchange.

    Attributes:
        flops: FLOPs of its matrix products.
        attention: products over half of the square of scores, of its kernels of fused attention: forward 2, backward 5.
    """

    flops: float = 0.0
    attention: float = 0.0


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective of a timeline.

    Attributes:
        collective: with the bytes of one execution.
        start, stop: the timeline's work[start:stop] stands between its start and its done.
        is_told: False for a collective inside a fusion with matrix products, where the compiler overlaps both in a way
            that the program does not tell.
    """

    collective: Collective
    start: int
    stop: int
    is_told: bool = True


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The schedule of one computation that has collectives.

    Attributes:
        count: executions of the computation in a step.
        work: in order.
        transfers: in the order of their starts.
    """

    count: int
    work: tuple[Work, ...]
    transfers: tuple[Transfer, ...]


def collectives_of(timelines: Sequence[Timeline]) -> list[Collective]:
    """Collectives of a program in all their executions, those that are alike as one."""
    totals: dict[tuple[str, str, int, int, int], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0])
    for timeline in timelines:
        for transfer in timeline.transfers:
            one = transfer.collective
            entry = totals[one.kind, one.dtype, one.group, one.stride, one.in_node]
            entry[0] += timeline.count * one.count
            entry[1] += timeline.count * one.bytes
            entry[2] = max(entry[2], one.largest)
    return [Collective(*key, int(count), sent, int(largest)) for key, (count, sent, largest) in sorted(totals.items())]


class Schedule:
    """The schedules of a program's computations.

    Attributes:
        products: the program's matrix products.
        node_size: consecutive devices in a node.
    """

    def __init__(self, products: MatrixProducts, node_size: int):
        self.module, self.products, self.node_size = products.module, products, node_size
        self._cached_attention = functools.cache(self._attention)

    def attention_products(self) -> float:
        """Products of all kernels of fused attention in a step, in the unit of Work.attention."""
        return self._attention(self.module.entry)

    def timelines(self) -> list[Timeline]:
        """The schedule of every computation that has collectives.

        Raises:
            ValueError: for a loop whose iterations cannot be read.
        """
        executions = self.module.executions()
        wrapped = {
            name
            for computation in executions
            for instruction in self.module.computations[computation].values()
            if instruction.operation == "async-start"
            for _, name in instruction.called()
        }
        chains: set[str] = set()  # collectives of a TPU that run in parts, one part in each of several fusions
        timelines = [self._timeline(name, count, chains) for name, count in executions.items() if name not in wrapped]
        return [timeline for timeline in timelines if timeline.transfers]

    def _timeline(self, computation: str, count: int, chains: set[str]) -> Timeline:
        work: list[Work] = []
        transfers: list[Transfer] = []
        starts: dict[str, int] = {}  # index of the transfer that an instruction started or went on with
        instructions = self.module.computations[computation].values()
        caller = self.module.caller(computation)
        is_fused = caller is not None and caller[1].operation == "fusion"
        is_told = not (is_fused and any(one.operation in ("dot", "convolution") for one in instructions))
        for instruction in instructions:
            operation = instruction.operation
            if (collective := self._collective(computation, instruction)) is not None:
                chain = re.search(r'chain_id="\d+"', instruction.line)
                if chain and chain[0] in chains:
                    continue
                if chain:
                    chains.add(chain[0])
                if operation == "send":
                    starts[_rendezvous(instruction)] = len(transfers)
                elif operation.endswith("-start"):
                    starts[instruction.name] = len(transfers)
                transfers.append(Transfer(collective, len(work), len(work), is_told and not chain))
            elif operation.endswith(("-update", "-done")) and instruction.operands[0] in starts:
                index = starts[instruction.name] = starts[instruction.operands[0]]
                if not _is_synchronous(self.module.computations[computation][instruction.operands[0]]):
                    transfers[index] = dataclasses.replace(transfers[index], stop=len(work))
            elif operation == "recv-done":
                recv = self.module.computations[computation][instruction.operands[0]]
                if (index := starts.get(_rendezvous(recv), -1)) >= 0:
                    transfers[index] = dataclasses.replace(transfers[index], stop=len(work))
            else:
                one = self._work(computation, instruction)
                work += [one] if one != Work() else []
        return Timeline(count, tuple(work), tuple(transfers))

    def _work(self, computation: str, instruction: Instruction) -> Work:
        """Computation in one execution of an instruction."""
        attention = _attention(instruction)
        for name, count in self.module.called(instruction):
            attention += count * self._cached_attention(name)
        return Work(self.products.instruction_flops(computation, instruction), attention)

    def _attention(self, name: str) -> float:
        return sum(self._work(name, instruction).attention for instruction in self.module.computations[name].values())

    def _collective(self, computation: str, instruction: Instruction) -> Collective | None:
        """The collective that an instruction executes or starts; None for other instructions."""
        if instruction.operation == "async-start":
            inner = [
                self._collective(name, one)
                for _, name in instruction.called()
                for one in self.module.computations.get(name, {}).values()
            ]
            return next((one for one in inner if one is not None), None)
        if instruction.operation == "send":
            return self._between_slices(instruction)
        kind, is_start = instruction.operation.removesuffix("-start"), instruction.operation.endswith("-start")
        shapes = list(instruction.shapes)
        if kind not in KINDS or not shapes:
            return None
        if is_start and kind != "all-reduce":  # (operands, results, contexts)
            shapes = [shape for shape in shapes if shape[1] or shape[0] not in ("u32", "s32")]
            shapes = shapes[len(shapes) // 2 :] if len(shapes) > 1 else shapes
        groups = _groups(instruction.line) or [list(range(self.module.num_partitions))]
        group = groups[0]
        size, n = sum(map(num_bytes, shapes)), max(len(group), 2)
        if kind == "all-reduce" and "reduce-scatter" in computation:  # the form of TPU programs
            kind, sent = "reduce-scatter", size * (n - 1) / n
        else:
            share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
            sent = size * share.get(kind, (n - 1) / n)
        # Of the group that is spread the widest: all wait for it.
        in_node = max(1, min(sum(d // self.node_size == g[0] // self.node_size for d in g) for g in groups))
        stride = min((abs(g[1] - g[0]) for g in groups if len(g) > 1 and g[1] != g[0]), default=0)
        return Collective(kind, shapes[0][0], len(group), stride, in_node, 1, sent, size)

    def _between_slices(self, send: Instruction) -> Collective | None:
        """The collective between slices of TPUs that a send starts; None for other sends."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.line)
        if kind is None:
            return None
        name, size = kind[1].lower().replace("_", "-"), num_bytes(send.shapes[0])
        n = max(2, self.module.num_partitions // self.node_size)
        share = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "reduce-scatter": (n - 1) / n}
        return Collective(name, send.shapes[0][0], n, self.node_size, 1, 1, size * share.get(name, 1), size)


def _rendezvous(instruction: Instruction) -> str:
    """The name that a send and its recv have in common; "" for other instructions."""
    match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.line)
    return match[1] if match else ""


def _is_synchronous(start: Instruction) -> bool:
    """Whether a GPU executes a start and its done as one, whatever stands between them."""
    return '"is_sync":true' in start.line


def _attention(instruction: Instruction) -> float:
    """Products of a kernel of fused attention; 0 for other instructions."""
    if instruction.operation != "custom-call":
        return 0.0
    return next((float(n) for pattern, n in _KERNELS if re.search(pattern, instruction.line)), 0.0)


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
