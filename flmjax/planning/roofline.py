"""Step time of a compiled program, estimated from its FLOPs and its bytes. No device has confirmed the estimates.

Notation (FLOPs is a count, FLOP/s a rate; all of one device and one update):
    W   FLOPs of matrix products                    P    peak FLOP/s of the chip
    A   FLOPs of fused attention kernels            B    bytes/s of HBM
    T   tokens                                      R    bytes/s of the links of an exchange
    D   embed_dim;  N  layers                       S    bytes of parameters and both moments
    p   passes over a layer: forward, twice backward, and once more where the layer is recomputed
    E   bytes sent in an exchange                   u_*  share of a peak that programs reach (Assumptions)

    compute = W / (P u_matmul) + A / (P u_attention) + bytes_per_token D p N T / (B u_memory)
    exchange = E / (R u_link), tensor: within the tensor axis; data: of weights and gradients
    hidden = min(data, overlap x compute)
    update = S (2 + 1/3) / (B u_memory): parameters and moments read and written, gradients (S / 3) read
    step = compute + tensor + data - hidden + update

Example, with every u and the overlap 0.5: W = 312 x 10^12 FLOPs at P = 312 x 10^12 FLOP/s take 2 s. Gathered weights
of E = 50 x 10^9 bytes over four ports of 25 x 10^9 bytes/s take 50 / (100 x 0.5) = 1 s, which is hidden, because it is
no more than 0.5 x 2 s. S = 12 x 10^9 bytes at B = 2 x 10^12 bytes/s take 12 x 2.33 / (2,000 x 0.5) = 0.028 s. The step
takes 2 + 1 - 1 + 0.028 = 2.028 s.
"""

import dataclasses
from collections.abc import Sequence

from flmjax.config import MeshShape, ModelConfig
from flmjax.hardware import PlannableChip
from flmjax.planning.hlo import Collective
from flmjax.planning.program import Program


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Shares of a data sheet's peaks that programs reach: chosen by judgement, neither fitted nor measured.

    Attributes:
        matmul: of the peak FLOP/s, in matrix products.
        attention: of the peak FLOP/s, in a fused attention kernel.
        memory: of HBM bandwidth.
        link: of the bandwidth of links between devices.
        overlap: of the computation; gathers of weights and sums of gradients can hide behind it.
        bytes_per_token: HBM traffic of one pass over a layer beside its matrix products, in bytes a token and
            embed_dim.
    """

    matmul: float = 0.75
    attention: float = 0.5
    memory: float = 0.8
    link: float = 0.75
    overlap: float = 0.8
    bytes_per_token: int = 40

    def __str__(self) -> str:
        return (
            f"assumed: {self.matmul:.0%} of peak FLOP/s in matrix products, {self.attention:.0%} in fused attention, "
            f"{self.memory:.0%} of HBM bandwidth, {self.link:.0%} of link bandwidth; weights' traffic hides behind "
            f"{self.overlap:.0%} of the computation, tensor parallelism's does not"
        )


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one update.

    Attributes:
        compute: matrix products, attention and the HBM traffic between them.
        tensor: exchange within the tensor axis, which nothing hides.
        data: exchange of weights and gradients.
        hidden: the part of `data` that runs behind the computation.
        update: of the optimizer.
    """

    compute: float
    tensor: float
    data: float
    hidden: float
    update: float

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return self.compute + self.tensor + self.data - self.hidden + self.update


def fused_attention_flops(model: ModelConfig, tokens: float) -> float:
    """FLOPs of causal attention kernels on `tokens` tokens, forward and backward.

    A product over half of the L x L square takes H K L FLOPs a token and layer. The forward pass has 2 products, the
    backward pass 5, and recomputation adds the forward pass once more. Example: 2 layers, H K = 32, L = 32 and 10
    tokens without recomputation take (2 + 5) x 2 x 32 x 32 x 10 = 143,360 FLOPs.
    """
    products = 2 * (2 if model.remat != "none" else 1) + 5
    return float(products * model.num_layers * model.num_heads * model.head_dim * model.max_length * tokens)


def step_time(
    model: ModelConfig,
    chip: PlannableChip,
    mesh: MeshShape,
    *,
    tokens: float,
    matmul_flops: float,
    attention_flops: float,
    state_bytes: float,
    collectives: Sequence[Collective],
    assumed: Assumptions = Assumptions(),
) -> StepTime:
    """Time of one update on one device; all devices do the same.

    Args:
        tokens: of an update, divided by all devices.
        matmul_flops, collectives: from the program of one device.
        attention_flops: of kernels that the program's text does not show, on one device; 0 where attention is plain.
        state_bytes: of parameters and moments on one device.
    """
    peak = chip.bfloat16 if model.dtype == "bfloat16" else chip.float32
    passes = {"none": 3, "dots": 3, "full": 4}[model.remat]
    between = assumed.bytes_per_token * model.embed_dim * passes * model.num_layers * tokens
    compute = matmul_flops / (peak * assumed.matmul) + attention_flops / (peak * assumed.attention)
    compute += between / (chip.bandwidth * assumed.memory)
    tensor = data = 0.0
    for exchange in collectives:
        seconds = exchange.bytes / (link_bandwidth(chip, exchange) * assumed.link)
        if exchange.group <= mesh.tensor and 0 < exchange.stride < mesh.tensor:  # the mesh's last axis
            tensor += seconds
        else:
            data += seconds
    update = state_bytes * (2 + 1 / 3) / (chip.bandwidth * assumed.memory)
    return StepTime(compute, tensor, data, min(data, assumed.overlap * compute), update)


def growth_time(chip: PlannableChip, program: Program, assumed: Assumptions = Assumptions()) -> float:
    """Seconds of a growth: its exchanges, none of them hidden, and its reads and writes of HBM.

    Arguments are read and outputs written once, temporaries written and read.
    """
    exchanges = sum(x.bytes / (link_bandwidth(chip, x) * assumed.link) for x in program.collectives)
    moved = program.arguments + program.outputs + 2 * program.temporaries
    return exchanges + moved / (chip.bandwidth * assumed.memory)


def link_bandwidth(chip: PlannableChip, exchange: Collective) -> float:
    """Bandwidth of a ring in bytes/s: of intra-node links (a TPU has no others), or of its members' network ports.

    Example: a ring with 4 members in every node of A800s has 4 x 25 = 100 GB/s; one in a single node has NVLink's 200.
    """
    if exchange.in_node == exchange.group or chip.inter_node is None:
        return chip.intra_node
    return min(exchange.in_node * chip.inter_node, chip.intra_node)
