"""Names of every parameter's axes, and the role that each axis plays for the parameter.

Sharding, growth and reports read this tree and nothing else: none of them looks at a parameter's name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from chex import ArrayTree
from flax import struct

from flmjax.config import ModelConfig

AXES = ("layers", "embed", "mlp", "heads", "kv_heads", "head_dim", "vocab", "length")
ROLES = (
    "write",  # the parameter produces the entries of this axis in its output
    "read",  # the parameter is contracted with the entries of this axis in its input
    "query",  # the parameter produces queries, which are multiplied with keys along this axis
    "key",  # the parameter produces keys, which are multiplied with queries along this axis
    "scale",  # the parameter multiplies the normalised entries of this axis (gain of a norm)
    "shift",  # the parameter is added to the normalised entries of this axis (bias of a norm)
    "output_scale",  # gain of the last norm, whose output is read by the head or by the tied embedding
    "output_shift",  # bias of the last norm
    "index",  # the parameter is a lookup table, indexed along this axis
    "stack",  # the parameter has one copy for each entry of this axis (layers under nn.scan)
)


Params = dict[str, Any]  # tree of parameters (or of their gradients, shapes, shardings): nested names -> leaves
AxesTree = dict[str, Any]  # the same tree with the LeafAxes of each parameter as its leaf


class LeafAxes(NamedTuple):
    """Axis names and roles of one parameter, in the order of its dimensions."""

    names: tuple[str, ...]
    roles: tuple[str, ...]

    def role(self, name: str) -> str | None:
        """Role of axis `name`; None if the parameter does not have this axis."""
        return self.roles[self.names.index(name)] if name in self.names else None

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter maps one axis to another. Gains and biases do not: no weight decay, no FSDP."""
        return "read" in self.roles or "index" in self.roles


class Box(nn.LogicallyPartitioned):
    """Flax's box of a parameter with logical axis names, extended by the roles of the axes."""

    roles: tuple[str, ...] = struct.field(default=(), pytree_node=False)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Box":
        """Box with a further axis at `index`; nn.scan calls it for the axis of layers."""
        box: Any = super().add_axis(index, params)
        return box.replace(roles=(*self.roles[:index], "stack", *self.roles[index:]))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Box":
        """Box without the axis at `index`; the inverse of add_axis."""
        box: Any = super().remove_axis(index, params)
        return box.replace(roles=(*self.roles[:index], *self.roles[index + 1 :]))


def declare(init: Callable[..., jax.Array], **roles: str) -> Callable[..., Any]:
    """Initializer whose result is boxed with axis names and roles, in the order of its dimensions.

    Example: `declare(normal(0.02), embed="read", mlp="write")` is the initializer of an (embed, mlp) matrix.

    Raises:
        ValueError: for an axis or a role that does not exist.
    """
    for name, role in roles.items():
        if name not in AXES or role not in ROLES:
            raise ValueError(f"unknown axis or role: {name}={role!r}; axes {AXES}, roles {ROLES}")

    def boxed(*args: Any, **kwargs: Any) -> Box:
        return Box(init(*args, **kwargs), tuple(roles), roles=tuple(roles.values()))

    return boxed


def axes_of(boxed: Params) -> AxesTree:
    """Tree of LeafAxes of a tree of boxed parameters.

    Raises:
        ValueError: naming a parameter whose axes were not declared.
    """

    def read(path: tuple[Any, ...], leaf: object) -> LeafAxes:
        if not isinstance(leaf, Box):
            raise ValueError(f"{path_name(path)}: this parameter's axes were not declared")
        return LeafAxes(tuple(str(name) for name in leaf.names), leaf.roles)

    axes: AxesTree = jax.tree_util.tree_map_with_path(
        read, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
    )
    return axes


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Size of every axis in a model."""
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


def map_with_axes(function: Callable[..., Any], axes: AxesTree, *trees: ArrayTree) -> Any:
    """tree.map of function(path name, LeafAxes, *leaves) over trees that have the structure of `axes`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf_axes, *leaves: function(path_name(path), leaf_axes, *leaves),
        axes,
        *trees,
        is_leaf=lambda x: isinstance(x, LeafAxes),
    )


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in a tree as one string, such as `layers/attention/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
