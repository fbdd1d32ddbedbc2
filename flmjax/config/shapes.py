"""Shapes that follow from settings: the mesh of devices, and the groups of heads that grow."""

import dataclasses

from flmjax.config.errors import ConfigError
from flmjax.config.fields import ModelConfig


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Number of devices along each mesh axis; validate.stage_mesh computes it from a MeshConfig and the devices."""

    replica: int
    fsdp: int
    tensor: int

    @property
    def num_devices(self) -> int:
        """Number of devices in the mesh."""
        return self.replica * self.fsdp * self.tensor

    @property
    def data_shards(self) -> int:
        """Number of parts that the sequences of a batch are split into."""
        return self.replica * self.fsdp


def split_factor(old: ModelConfig, new: ModelConfig) -> int:
    """Number of parts that each group of query heads splits into; every part gets a copy of the key and value head.

    1 means that groups are not split.

    Raises:
        ConfigError: if splitting groups and then adding heads and groups cannot produce the new heads.
    """
    old_heads, new_heads = old.num_heads // old.kv_heads, new.num_heads // new.kv_heads  # query heads of a group
    for parts in range(1, old_heads + 1):
        if old_heads % parts == 0 and old_heads // parts <= new_heads and old.kv_heads * parts <= new.kv_heads:
            return parts
    raise ConfigError(
        f"{old.num_heads} query heads in {old.kv_heads} groups cannot become {new.num_heads} in {new.kv_heads}: a "
        "group can gain heads, further groups can be added, or every group can be split into equal parts first"
    )
