"""Step time of a compiled program, estimated from its FLOPs and its bytes. No device has confirmed the estimates.

Notation (FLOPs is a count, FLOP/s a rate; all of one device and one update):
    W   FLOPs of matrix products                    P    peak FLOP/s of the chip
    A   FLOPs of fused attention kernels            B    bytes/s of HBM
    T   tokens                                      R    bytes/s of the links of an exchange
    D   embed_dim;  N  layers                       S    bytes of parameters and both moments
    p   passes over a layer: forward, twice backward, and once more where the layer is recomputed
    E   bytes sent in an exchange                   u_*  share of a peak that programs reach (Assumptions)
    W', A'  FLOPs that the program computes between the start and the done of an exchange (planning/exchanges.py)

    compute = W / (P u_matmul) + A / (P u_attention) + bytes_per_token D p N T / (B u_memory)
    exchange = E / (R u_link), tensor: within the tensor axis; data: of weights and gradients
    hidden = min(exchange, W' / (P u_matmul) + A' / (P u_attention)) of each exchange; exchanges under way at once on
             the same links share what hides them
    update = S (2 + 1/3) / (B u_memory): parameters and moments read and written, gradients (S / 3) read
    step = compute + tensor + data - hidden + update

Example, with every u 0.5: W = 312 x 10^12 FLOPs at P = 312 x 10^12 FLOP/s take 2 s. Gathered weights of
E = 50 x 10^9 bytes over four ports of 25 x 10^9 bytes/s take 50 / (100 x 0.5) = 1 s. Between their start and their done
the program computes W' = 93.6 x 10^12 FLOPs in 0.6 s, which hide 0.6 s of it. S = 12 x 10^9 bytes at
B = 2 x 10^12 bytes/s take 12 x 2.33 / (2,000 x 0.5) = 0.028 s. The step takes 2 + 1 - 0.6 + 0.028 = 2.428 s.
"""

import collections
import dataclasses
from collections.abc import Sequence

from flmjax.config import ConfigError, MeshShape, ModelConfig
from flmjax.hardware import Chip, PlannableChip
from flmjax.planning.exchanges import Collective, Timeline
from flmjax.planning.program import Program

# Time of a float32 product at the precision "highest", in that of JAX's default (Chip.float32): 6 bfloat16 passes on a
# TPU; float32 units in place of TF32's on GPUs, 156 to 19.5 TFLOP/s on an A800.
HIGHEST_PRECISION = 8


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Shares of a data sheet's peaks that programs reach: chosen by judgement, neither fitted nor measured.

    Attributes:
        matmul: of the peak FLOP/s, in matrix products.
        attention: of the peak FLOP/s, in a fused attention kernel.
        memory: of HBM bandwidth.
        link: of the bandwidth of links between devices.
        bytes_per_token: HBM traffic of one pass over a layer beside its matrix products, in bytes a token and
            embed_dim.
    """

    matmul: float = 0.75
    attention: float = 0.5
    memory: float = 0.8
    link: float = 0.75
    bytes_per_token: int = 40

    def __str__(self) -> str:
        return (
            f"assumed: {self.matmul:.0%} of peak FLOP/s in matrix products, {self.attention:.0%} in fused attention, "
            f"{self.memory:.0%} of HBM bandwidth, {self.link:.0%} of link bandwidth"
        )


@dataclasses.dataclass(frozen=True)
class ExchangeTime:
    """Seconds of the executions in an update of all collectives that are alike.

    Attributes:
        kind, dtype, group, stride, in_node: of the Collective.
        is_tensor: whether it is within the tensor axis.
        seconds: of the links.
        hidden: the part of `seconds` that runs behind computation.
        untold: the part of `seconds` of which the program does not tell whether it is hidden; counted as exposed.
    """

    kind: str
    dtype: str
    group: int
    stride: int
    in_node: int
    is_tensor: bool
    seconds: float
    hidden: float
    untold: float

    @property
    def exposed(self) -> float:
        """Seconds in which the device waits."""
        return self.seconds - self.hidden


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one update.

    Attributes:
        compute: matrix products, attention and the HBM traffic between them.
        update: of the optimizer.
        exchanges: with other devices.
    """

    compute: float
    update: float
    exchanges: tuple[ExchangeTime, ...]

    def traffic(self, is_tensor: bool) -> tuple[float, float]:
        """(Seconds, of them hidden) of the exchanges within the tensor axis, or of those of weights and gradients."""
        chosen = [exchange for exchange in self.exchanges if exchange.is_tensor == is_tensor]
        return sum(exchange.seconds for exchange in chosen), sum(exchange.hidden for exchange in chosen)

    @property
    def exposed(self) -> float:
        """Seconds of all exchanges in which the device waits."""
        return sum(exchange.exposed for exchange in self.exchanges)

    @property
    def untold(self) -> float:
        """Seconds of exchanges of which the program does not tell whether they are hidden; counted as exposed."""
        return sum(exchange.untold for exchange in self.exchanges)

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return self.compute + self.exposed + self.update


def fused_attention_flops(model: ModelConfig, tokens: float, products: float | None = None) -> float:
    """FLOPs of causal attention kernels on `tokens` tokens, forward and backward.

    A product over half of the L x L square takes H K L FLOPs a token and layer. The forward pass has 2 products, the
    backward pass 5, and recomputation adds the forward pass once more. Example: 2 layers, H K = 32, L = 32 and 10
    tokens without recomputation take (2 + 5) x 2 x 32 x 32 x 10 = 143,360 FLOPs.

    Args:
        products: of all layers, counted in a program; None: those above.
    """
    if products is None:
        products = (2 * (2 if model.remat != "none" else 1) + 5) * model.num_layers
    return float(products * model.num_heads * model.head_dim * model.max_length * tokens)


def step_time(
    model: ModelConfig,
    chip: PlannableChip,
    mesh: MeshShape,
    *,
    tokens: float,
    matmul_flops: float,
    attention_flops: float,
    attention_products: float,
    state_bytes: float,
    timelines: Sequence[Timeline],
    passes: int | None = None,
    assumed: Assumptions = Assumptions(),
) -> StepTime:
    """Time of one update, or of one batch of an evaluation, on one device; all devices do the same.

    Args:
        passes: over a layer; None: those of an update, which remat decides.
        tokens: of an update, divided by all devices.
        matmul_flops, timelines: from the program of one device.
        attention_flops: of kernels that the program's text does not show, on one device; 0 where attention is plain.
        attention_products: that `attention_flops` are of, in the unit of Work.attention.
        state_bytes: of parameters and moments on one device.
    """
    product = 1 / (peak_rate(chip, model) * assumed.matmul)  # seconds of a FLOP
    kernel = attention_flops / (peak_rate(chip, model) * assumed.attention)
    # Remat "dots" keeps the matrix products and computes what stands between them again.
    passes = (3 if model.remat == "none" else 4) if passes is None else passes
    between = assumed.bytes_per_token * model.embed_dim * passes * model.num_layers * tokens
    compute = matmul_flops * product + kernel + between / (chip.bandwidth * assumed.memory)
    per_product = kernel / attention_products if attention_products else 0.0
    totals: dict[Collective, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for timeline in timelines:
        work = [one.flops * product + one.attention * per_product for one in timeline.work]
        for index, (seconds, hidden) in enumerate(_exchanged(timeline, work, chip, assumed.link)):
            transfer = timeline.transfers[index]
            alike = dataclasses.replace(transfer.collective, count=0, bytes=0.0, largest=0)
            untold = 0.0 if transfer.is_told else seconds
            for i, value in enumerate((seconds, hidden, untold)):
                totals[alike][i] += timeline.count * value
    exchanges = [
        ExchangeTime(one.kind, one.dtype, one.group, one.stride, one.in_node, _is_tensor(one, mesh), *seconds)
        for one, seconds in totals.items()
    ]
    update = state_bytes * (2 + 1 / 3) / (chip.bandwidth * assumed.memory)
    return StepTime(compute, update, tuple(exchanges))


def _exchanged(
    timeline: Timeline, work: Sequence[float], chip: PlannableChip, share: float
) -> list[tuple[float, float]]:
    """(Seconds, of them hidden) of one execution of each transfer of a timeline.

    Links carry one exchange after another, in the order of their starts; each hides behind the work between its start
    and its done that has not hidden an earlier one on the same links.

    Args:
        work: seconds of each piece of the timeline's work.
    """
    free: dict[bool, list[float]] = {True: list(work), False: list(work)}  # of the links in a node, and between nodes
    times = []
    for transfer in timeline.transfers:
        one, hidden = transfer.collective, 0.0
        seconds = one.bytes / (link_bandwidth(chip, one) * share)
        left = free[one.in_node == one.group]
        for i in range(transfer.start, transfer.stop):
            taken = min(left[i], seconds - hidden)
            left[i] -= taken
            hidden += taken
        times.append((seconds, hidden))
    return times


def _is_tensor(exchange: Collective, mesh: MeshShape) -> bool:
    """Whether an exchange is along the mesh's last axis."""
    return exchange.group <= mesh.tensor and 0 < exchange.stride < mesh.tensor


def peak_rate(chip: Chip, model: ModelConfig) -> float:
    """Peak FLOP/s of a chip in the dtype of a model's matrix products.

    Raises:
        ConfigError: for float64, for which there is no figure.
    """
    if model.dtype == "float64":
        raise ConfigError("model.dtype='float64' has no price: data sheets of bfloat16 and float32 are known")
    return chip.bfloat16 if model.dtype == "bfloat16" else chip.float32


def replica_sum(size: float, mesh: MeshShape, node_size: int) -> Collective:
    """One sum over the replicas of a mesh of float32 arrays with `size` bytes on every device, on a ring.

    Example: 6 GB of gradients over 3 replicas send 6 x 2 x 2 / 3 = 8 GB.

    Args:
        node_size: consecutive devices that intra-node links join.
    """
    n, stride = mesh.replica, mesh.fsdp * mesh.tensor
    in_node = max(1, min(n, node_size // stride))
    return Collective("all-reduce", "f32", n, stride, in_node, 1, size * 2 * (n - 1) / n, int(size))


def growth_time(chip: PlannableChip, program: Program, assumed: Assumptions = Assumptions()) -> float:
    """Seconds of a growth: its exchanges, none of them hidden, and its reads and writes of HBM.

    Arguments are read and outputs written once, temporaries written and read.
    """
    exchanges = sum(link_seconds(chip, exchange, assumed) for exchange in program.collectives)
    moved = program.arguments + program.outputs + 2 * program.temporaries
    return exchanges + moved / (chip.bandwidth * assumed.memory)


def certificate_time(
    chip: PlannableChip, program: Program, model: ModelConfig, assumed: Assumptions = Assumptions()
) -> float:
    """Seconds of the comparisons of a growth's certificate, at most.

    Logits alone are compared a second time, in full float32: a product takes HIGHEST_PRECISION times that of
    chip.float32. Of the forward passes, in units of a pass of one model, that comparison has 5 of the old and 1 of the
    new, the comparison of gradients 8 and 4: at most half as many.

    Args:
        program: the comparison of gradients in the dtype of the run.
        model: after the growth.
    """
    products = program.matmul_flops / peak_rate(chip, model)
    products += program.matmul_flops / 2 * HIGHEST_PRECISION / chip.float32
    return growth_time(chip, program, assumed) + products / assumed.matmul


def link_seconds(chip: PlannableChip, exchange: Collective, assumed: Assumptions = Assumptions()) -> float:
    """Seconds of the links that an exchange takes, hidden or not."""
    return exchange.bytes / (link_bandwidth(chip, exchange) * assumed.link)


def link_bandwidth(chip: PlannableChip, exchange: Collective) -> float:
    """Bandwidth of a ring in bytes/s: of the links in a node or a slice of TPUs, or of its members' network ports.

    Example: a ring with 4 members in every node of A800s has 4 x 25 = 100 GB/s; one in a single node has NVLink's 200.
    """
    if exchange.in_node == exchange.group:
        return chip.intra_node
    return min(exchange.in_node * chip.inter_node, chip.intra_node)
