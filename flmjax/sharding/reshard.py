"""Movement of an array from one mesh to another over the same devices, without gathering it on any device.

XLA's partitioner goes from one sharding to another in one step; where the mesh axes of both do not line up, the step
gathers the array on every device ("involuntary full rematerialization"). Here the way is divided into steps that are
one all-to-all, permutation, slice or partial gather each (as in arXiv 2112.01075).

Example: over 8 devices a matrix (D, F) goes from mesh (replica, fsdp, tensor) = (1, 8, 1) to (2, 2, 2). Both meshes are
refined to the axes (4, 2, 1), each of 2 devices and named by the distance of neighbours. fsdp of the old mesh is
(4, 2, 1); in the new mesh 4 is replica, 2 fsdp, and 1 tensor. The specs are
    (4 2 1, -)  old
    (2 4 1, -)  a permutation
    (2 4, 1)    an all-to-all along 1
    (2, 1)      a gather of two shards along 4: new
"""

import itertools
import math
import typing
from collections.abc import Iterator

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Spec = list[tuple[str, ...]]  # refined axes along which each dimension of an array is split, the slowest one first


def reshard(x: jax.Array, old: NamedSharding, new: NamedSharding) -> jax.Array:
    """`x` under jit, moved from the sharding `old` to `new`; unchanged if a dimension does not divide over `new`."""
    if (old.mesh == new.mesh and old.spec == new.spec) or not divides(x.shape, new):
        return x
    for sharding in reshard_steps(x.shape, old, new):
        x = jax.lax.with_sharding_constraint(x, sharding)
    return jax.lax.with_sharding_constraint(x, new)


def divides(shape: tuple[int, ...], sharding: NamedSharding) -> bool:
    """Whether every dimension of `shape` divides over its mesh axes."""
    sizes = [math.prod(sharding.mesh.shape[axis] for axis in axes) for axes in _axes(sharding, len(shape))]
    return all(n % size == 0 for n, size in zip(shape, sizes, strict=True))


def reshard_steps(shape: tuple[int, ...], old: NamedSharding, new: NamedSharding) -> list[NamedSharding]:
    """Shardings between `old` and `new`, over a common refinement of both meshes, that an array takes in turn.

    Args:
        shape: of the array.
        old, new: over meshes of the same devices in the same order.

    Returns:
        The steps; none if the meshes have no common refinement (2 x 3 and 3 x 2 devices).
    """
    refined = _refinement(typing.cast(Mesh, old.mesh), typing.cast(Mesh, new.mesh))
    if refined is None:
        return []
    before, after = (_refined_spec(sharding, refined, len(shape)) for sharding in (old, new))
    steps = []
    for spec in _specs(before, after):
        sharding = NamedSharding(refined, PartitionSpec(*spec))
        if divides(shape, sharding):
            steps.append(sharding)
    return [step for step, _ in itertools.groupby(steps)]


def _specs(before: Spec, after: Spec) -> Iterator[Spec]:
    """The specs from `before` to `after`. Axes that a step moves or gathers are the fastest of their dimension."""
    used_before = set(itertools.chain(*before))
    # Axes over which the array was replicated: each device keeps a slice of its copy.
    spec = [axes + tuple(x for x in target if x not in used_before) for axes, target in zip(before, after, strict=True)]
    yield spec
    order = [_by_target(axes, i, after) for i, axes in enumerate(spec)]
    yield [stay + gathered + leave for stay, gathered, leave in order]  # a permutation
    arrived = [
        stay + gathered + tuple(x for x in target if x not in stay)
        for (stay, gathered, _), target in zip(order, after, strict=True)
    ]
    yield arrived  # all-to-alls
    order = [_by_target(axes, i, after) for i, axes in enumerate(arrived)]
    yield [stay + gathered for stay, gathered, _ in order]  # a permutation
    yield after  # a gather


def _by_target(axes: tuple[str, ...], dimension: int, after: Spec) -> tuple[tuple[str, ...], ...]:
    """The axes of a dimension that stay, those that no dimension of `after` has, and those of other dimensions."""
    used = set(itertools.chain(*after))
    stay = tuple(x for x in after[dimension] if x in axes)
    return stay, tuple(x for x in axes if x not in used), tuple(x for x in axes if x in used and x not in stay)


def _refinement(*meshes: Mesh) -> Mesh | None:
    """Mesh of which every axis of `meshes` is a product of axes; None if there is none.

    An axis has as its name the distance of neighbours along it, in devices.
    """
    distances = {1, meshes[0].size}
    for mesh in meshes:
        distances |= set(itertools.accumulate(reversed(mesh.devices.shape), lambda a, b: a * b))
    cuts = sorted(distances)
    sizes = [high / low for low, high in itertools.pairwise(cuts)]
    if not all(size.is_integer() for size in sizes):
        return None
    shape = [int(size) for size in reversed(sizes)]
    return Mesh(meshes[-1].devices.reshape(shape), [str(low) for low in reversed(cuts[:-1])])


def _refined_spec(sharding: NamedSharding, refined: Mesh, dimensions: int) -> Spec:
    """The axes of `refined` in place of the mesh axes of a sharding."""
    names, shape = sharding.mesh.axis_names, sharding.mesh.devices.shape
    parts = {}
    for i, name in enumerate(names):
        low = math.prod(shape[i + 1 :])
        parts[name] = [axis for axis in refined.axis_names if low <= int(axis) < low * shape[i]]
    return [tuple(part for axis in axes for part in parts[axis]) for axes in _axes(sharding, dimensions)]


def _axes(sharding: NamedSharding, dimensions: int) -> list[tuple[str, ...]]:
    """Mesh axes of each dimension of an array."""
    entries = (*sharding.spec, *[None] * (dimensions - len(sharding.spec)))
    return [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in entries]
