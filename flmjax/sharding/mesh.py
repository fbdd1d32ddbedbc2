"""The device mesh (replica, fsdp, tensor)."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from flmjax.config import MESH_AXES, ConfigError, MeshShape


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device]) -> Mesh:
    """Mesh of shape (replica, fsdp, tensor) over `devices`; their number is shape.num_devices.

    Devices keep their order; with several slices of TPUs they are sorted by slice, so that only replica crosses slices.

    Raises:
        ConfigError: for slices that replica does not divide over.
    """
    slices = [getattr(device, "slice_index", 0) for device in devices]
    check_slices(shape, len(set(slices)))
    ordered = [devices[i] for i in sorted(range(len(devices)), key=slices.__getitem__)]
    sizes = [getattr(shape, axis) for axis in MESH_AXES]
    return Mesh(np.asarray(ordered).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_slices(shape: MeshShape, slices: int, setting: str = "mesh") -> None:
    """Refuse a mesh whose fsdp or tensor axis would cross slices of TPUs, between which the network is slow.

    Args:
        setting: path of the setting that decides the mesh.

    Raises:
        ConfigError: naming the setting.
    """
    if shape.replica % slices:
        raise ConfigError(
            f"{setting}.replica={shape.replica} is not a multiple of the {slices} slices of TPUs, and only the replica "
            f"axis may cross slices; {setting}.replica={slices} would"
        )
