"""Sharding rules: the mesh axis of each logical axis, for parameters and for activations."""

import dataclasses
import math

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flmjax.sharding.axes import AxesTree, LeafAxes, Params, map_with_axes

# The layers axis is not sharded, so that depth growth moves nothing between devices. The length axis is not sharded
# either: the table of learned positions is small.
PARAMETER_RULES: dict[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    "length": None,
}
ACTIVATION_RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    "batch": ("replica", "fsdp"),
    "sequence": "tensor",  # of the residual stream, between blocks
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

REPLICAS = "replicas"  # name of the axis of a vmap over the replicas of a batch


@dataclasses.dataclass(frozen=True)
class Placement:
    """Mesh on which activations are sharded by ACTIVATION_RULES.

    The mesh is explicit: flax 0.12 drops a constraint without a message if no ambient mesh is set (`with mesh:`).

    Attributes:
        mesh: of the devices.
        is_local: whether arrays are the shards of one device, inside of a shard_map over the mesh.
        is_of_replica: whether arrays are those of one replica, inside of a vmap over the axis REPLICAS.
    """

    mesh: Mesh
    is_local: bool = False
    is_of_replica: bool = False

    @property
    def is_single_cpu(self) -> bool:
        """Whether the mesh is one CPU device, so that nothing is distributed."""
        return self.mesh.size == 1 and self.mesh.devices.flat[0].platform == "cpu"

    def spec(self, *names: str | None) -> P:
        """PartitionSpec of an activation with the logical axes `names`; None is a dimension that is not sharded."""
        rules = {**ACTIVATION_RULES, "batch": "fsdp"} if self.is_of_replica else ACTIVATION_RULES
        return P(*(rules[name] for name in names))

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """Pin `x` to the sharding of its logical axes `names`."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(*names)))


def constrain(placement: Placement | None, x: jax.Array, *names: str | None) -> jax.Array:
    """`x` pinned to the sharding of its logical axes `names`; unchanged if there is no placement."""
    return x if placement is None else placement.constrain(x, *names)


def platform_of(placement: Placement | None) -> str:
    """Platform of the target devices: "cpu", "gpu" or "tpu". Ahead of time they are not the local devices."""
    return jax.default_backend() if placement is None else placement.mesh.devices.flat[0].platform


def leaf_sharding(mesh: Mesh, axes: LeafAxes) -> NamedSharding:
    """Sharding of one parameter. Gains and biases are not split over fsdp: a gather in every layer would cost more."""
    rules = PARAMETER_RULES if axes.is_matrix else {**PARAMETER_RULES, "embed": None}
    return NamedSharding(mesh, P(*(rules[name] for name in axes.names)))


def tree_shardings(mesh: Mesh, axes: AxesTree) -> Params:
    """Tree of the NamedSharding of each parameter."""
    shardings: Params = map_with_axes(lambda path, leaf: leaf_sharding(mesh, leaf), axes)
    return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: its sequences are split over replica and fsdp."""
    return NamedSharding(mesh, P(ACTIVATION_RULES["batch"]))


def whole_rows(rows: int, *meshes: Mesh) -> int:
    """The smallest number of sequences, at least `rows`, that divides over the data shards of every mesh."""
    shards = math.lcm(*(mesh.shape["replica"] * mesh.shape["fsdp"] for mesh in meshes))
    return -(-rows // shards) * shards


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds in full."""
    return NamedSharding(mesh, P())
