"""Logical axes -> mesh axes, for parameters and for activations."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flmjax.sharding.axes import LeafAxes, map_with_axes

# Layers stay whole, so that depth growth is local. Sharding length would shard a lookup table nobody needs sharded.
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


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where activations live. Carries its mesh: a constraint that asks for an ambient mesh is dropped without a word
    when there is none (flax 0.12 under `with mesh:`)."""

    mesh: Mesh

    @property
    def is_single_cpu(self) -> bool:
        """Whether there is nothing to place: one device, a CPU."""
        return self.mesh.size == 1 and self.mesh.devices.flat[0].platform == "cpu"

    def spec(self, *names: str | None) -> P:
        """PartitionSpec of an activation with these logical axes."""
        return P(*(ACTIVATION_RULES[name] for name in names))

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """Pin `x` to the sharding of its logical axes."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(*names)))


def constrain(placement: Placement | None, x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with the sharding of its logical axes; without a placement as it is."""
    return x if placement is None else placement.constrain(x, *names)


def leaf_sharding(mesh: Mesh, axes: LeafAxes) -> NamedSharding:
    """Sharding of one parameter. Gains and biases are too small to gather in every layer: not split over fsdp."""
    rules = PARAMETER_RULES if axes.is_matrix else {**PARAMETER_RULES, "embed": None}
    return NamedSharding(mesh, P(*(rules[name] for name in axes.names)))


def tree_shardings(mesh: Mesh, axes: Any) -> Any:
    """Shardings of a tree of LeafAxes."""
    return map_with_axes(lambda path, leaf: leaf_sharding(mesh, leaf), axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over replica and fsdp."""
    return NamedSharding(mesh, P(ACTIVATION_RULES["batch"]))


def whole_rows(rows: int, mesh: Mesh) -> int:
    """`rows`, and as many more as a batch needs to divide over the mesh."""
    shards = mesh.shape["replica"] * mesh.shape["fsdp"]
    return -(-rows // shards) * shards


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())
