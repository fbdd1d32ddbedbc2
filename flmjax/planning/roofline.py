"""Step time of a compiled program from what it computes and moves: a model that ranks settings, not a measurement."""

import dataclasses
from collections.abc import Sequence

from flmjax.config import MeshConfig, ModelConfig
from flmjax.hardware import Chip
from flmjax.planning.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Shares of a data sheet's peaks that programs reach. Chosen by judgement, not fitted, and measured nowhere."""

    matmul: float = 0.75  # of the peak in matrix multiplications
    attention: float = 0.5  # of it inside a fused attention kernel
    memory: float = 0.8  # of the memory's bandwidth
    link: float = 0.75  # of the links' between devices
    overlap: float = 0.8  # of the computation that gathers of weights and sums of gradients can hide behind
    bytes_per_token: int = 40  # memory traffic of a layer's pass beside its matrix products, times embed_dim

    def __str__(self) -> str:
        return (
            f"assumed: {self.matmul:.0%} of peak FLOP/s in matrix products, {self.attention:.0%} in fused attention, "
            f"{self.memory:.0%} of memory bandwidth, {self.link:.0%} of links; weights' traffic hides behind "
            f"{self.overlap:.0%} of the computation, tensor parallelism's does not"
        )


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one update.

    compute: matrix products, attention and what is between them. tensor: exchange within the tensor axis, not hidden.
    data: exchange of weights and gradients, `hidden` seconds of it behind the computation. update: the optimizer's.
    """

    compute: float
    tensor: float
    data: float
    hidden: float
    update: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.tensor + self.data - self.hidden + self.update


def fused_attention_flops(model: ModelConfig, tokens: float) -> float:
    """FLOPs of causal attention kernels on `tokens`: a forward pass of 2, a backward pass of 5 products of half the
    square, and the forward pass once more where it is recomputed."""
    passes = 2 * (2 if model.remat != "none" else 1) + 5
    return float(passes * model.num_layers * model.num_heads * model.head_dim * model.max_length * tokens)


def step_time(
    model: ModelConfig,
    chip: Chip,
    mesh: MeshConfig,
    *,
    tokens: float,
    matmul_flops: float,
    attention_flops: float,
    state_bytes: float,
    collectives: Sequence[Collective],
    assumed: Assumptions = Assumptions(),
) -> StepTime:
    """Time of one update on one device, all of which do the same.

    Args:
        tokens: of a step, over the device's share of them all. matmul_flops, collectives: as read from the program.
        attention_flops: of kernels that the program's text does not show; 0 where attention is plain.
        state_bytes: of parameters and moments.
    """
    peak = chip.bfloat16 if model.dtype == "bfloat16" else chip.float32
    passes = {"none": 3, "dots": 3, "full": 4}[model.remat]
    between = assumed.bytes_per_token * model.embed_dim * passes * model.num_layers * tokens
    compute = matmul_flops / (peak * assumed.matmul) + attention_flops / (peak * assumed.attention)
    compute += between / (chip.bandwidth * assumed.memory)
    tensor = data = 0.0
    for exchange in collectives:
        # A ring with several members in a node has the network ports of all of them.
        near = exchange.in_node == exchange.group
        rate = chip.near if near else min(exchange.in_node * chip.far, chip.near)
        seconds = exchange.bytes / (rate * assumed.link)
        if exchange.group <= mesh.tensor and 0 < exchange.stride < mesh.tensor:  # the mesh's last axis
            tensor += seconds
        else:
            data += seconds
    # Read and written: parameters and both moments; read: the gradients, as large as the parameters.
    update = state_bytes * (2 + 1 / 3) / (chip.bandwidth * assumed.memory)
    return StepTime(compute, tensor, data, min(data, assumed.overlap * compute), update)
