"""The device mesh (replica, fsdp, tensor)."""

import numpy as np
from jax.sharding import AxisType, Mesh

from flmjax.config import MESH_AXES, MeshConfig


def make_mesh(config: MeshConfig, devices: list) -> Mesh:
    """Mesh over `devices` in their order; `config` comes from validate_mesh, so its sizes are known and fit."""
    shape = [getattr(config, axis) for axis in MESH_AXES]
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
