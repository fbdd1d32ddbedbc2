"""The processes of a run, one or several a host: which of them writes, and how they agree.

All functions but `is_writer` are called by every process of the run, in the same order; one process alone answers at
once.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_writer() -> bool:
    """Whether this process writes files: process 0 alone does."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has called the function with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_writer(value: int) -> int:
    """The value of the process that writes; of the other processes it is dropped."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int64(value) if jax.config.jax_enable_x64 else np.int32(value)))


def any_process(flag: bool) -> bool:
    """Whether the flag is set in one of the processes."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))
