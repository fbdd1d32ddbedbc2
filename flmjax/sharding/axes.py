"""Every parameter's axes, named once, and how the parameter meets each of them.

Sharding, growth and reports read this tree and nothing else: none of them looks at a parameter's name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import struct

from flmjax.config import ModelConfig

AXES = ("layers", "embed", "mlp", "heads", "kv_heads", "head_dim", "vocab", "length")
ROLES = (
    "write",  # its values become entries of this axis: rows or columns of an output
    "read",  # it is summed against entries of this axis
    "query",  # its values are multiplied with keys along this axis
    "key",  # its values are multiplied with queries along this axis
    "scale",  # it multiplies the normalised entries of this axis
    "shift",  # it is added to the normalised entries of this axis
    "output_scale",  # the same, of the last norm: what it makes is read by the head, or by the tied embedding
    "output_shift",
    "index",  # it is looked up along this axis
    "stack",  # one copy for each place on this axis
)


class LeafAxes(NamedTuple):
    """Names and roles of one leaf's dimensions, in order."""

    names: tuple[str, ...]
    roles: tuple[str, ...]

    def role(self, name: str) -> str | None:
        """How the leaf meets axis `name`; None if it does not have it."""
        return self.roles[self.names.index(name)] if name in self.names else None

    @property
    def is_matrix(self) -> bool:
        """Whether it maps between axes; gains, shifts and biases do not (weight decay and FSDP leave those alone)."""
        return "read" in self.roles or "index" in self.roles


class Box(nn.LogicallyPartitioned):
    """Flax's box of logical axis names with the roles beside them."""

    roles: tuple[str, ...] = struct.field(default=(), pytree_node=False)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Box":
        """Called by nn.scan for the axis of layers."""
        box: Any = super().add_axis(index, params)
        return box.replace(roles=(*self.roles[:index], "stack", *self.roles[index:]))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Box":
        """Inverse of add_axis."""
        box: Any = super().remove_axis(index, params)
        return box.replace(roles=(*self.roles[:index], *self.roles[index + 1 :]))


def declare(init: Callable[..., jax.Array], **roles: str) -> Callable[..., Any]:
    """Wrap an initializer: `declare(normal(0.02), embed="read", mlp="write")` names the axes in order of dimensions."""
    for name, role in roles.items():
        if name not in AXES or role not in ROLES:
            raise ValueError(f"unknown axis or role: {name}={role!r}; axes {AXES}, roles {ROLES}")

    def boxed(*args: Any, **kwargs: Any) -> Box:
        return Box(init(*args, **kwargs), tuple(roles), roles=tuple(roles.values()))

    return boxed


def axes_of(boxed: Any) -> Any:
    """The tree of LeafAxes of a boxed parameter tree.

    Raises:
        ValueError: naming a leaf whose axes were not declared.
    """

    def read(path: tuple[Any, ...], leaf: Any) -> LeafAxes:
        if not isinstance(leaf, Box):
            raise ValueError(f"{path_name(path)}: this parameter's axes were not declared")
        return LeafAxes(tuple(str(name) for name in leaf.names), leaf.roles)

    return jax.tree_util.tree_map_with_path(read, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Places of every axis."""
    sizes = {
        "layers": config.num_layers,
        "embed": config.embed_dim,
        "mlp": config.mlp_dim,
        "heads": config.num_heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab": config.padded_vocab_size,
        "length": config.max_length,
    }
    assert tuple(sizes) == AXES
    return sizes


def map_with_axes(function: Callable[..., Any], axes: Mapping[str, Any], *trees: Any) -> Any:
    """tree.map of function(path name, LeafAxes, *leaves) over trees of the structure of `axes`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf_axes, *leaves: function(path_name(path), leaf_axes, *leaves),
        axes,
        *trees,
        is_leaf=lambda x: isinstance(x, LeafAxes),
    )


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/attention/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
