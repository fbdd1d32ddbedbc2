"""The device mesh (replica, fsdp, tensor)."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from flmjax.config import MESH_AXES, MeshShape


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device]) -> Mesh:
    """Mesh of shape (replica, fsdp, tensor) over `devices`, kept in order; their number is shape.num_devices."""
    sizes = [getattr(shape, axis) for axis in MESH_AXES]
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
