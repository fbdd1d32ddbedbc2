"""Batches on the devices ahead of the step: a background thread reads and places the next ones."""

from typing import Any

import grain
import jax

from flmjax.data.batch import Batch, global_batch

BUFFER = 2  # batches on the devices beside the one of the current update and the one that the thread places


def on_devices(
    batches: grain.IterDataset[Batch], sharding: jax.sharding.Sharding
) -> grain.DatasetIterator[dict[str, Any]]:
    """The batches on the devices of all processes, in their order; placing a batch needs no other process.

    The thread starts with the first batch that is asked for. An error of reading or placing is raised by the `next`
    that would have returned the batch. The iterator must be closed, which ends the thread, also one that waits because
    the buffer is full.

    Args:
        batches: the sequences of this process's data host.
        sharding: of the sequences over the devices.
    """
    placed = batches.map(lambda batch: global_batch(batch, sharding))
    return iter(grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=BUFFER))
