"""Settings of a run. Config files import them: `from flmjax.config import RunConfig, ...`."""

from flmjax.config.arguments import choose_words
from flmjax.config.convert import (
    FORMAT,
    HEADER,
    check_format,
    differences,
    from_config_dict,
    from_stored,
    stored_entry,
    to_config_dict,
    to_json,
    to_stored,
)
from flmjax.config.errors import ConfigError, did_you_mean, nearest, shorten
from flmjax.config.families import GROWTH_FAMILIES, FamilyTraits, outside_family
from flmjax.config.fields import (
    DERIVED,
    MESH_AXES,
    SIZES,
    STAGE_SIZES,
    CheckpointConfig,
    DataConfig,
    Dtype,
    GrowthConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    Remat,
    ScheduleSettings,
    StageConfig,
)
from flmjax.config.overrides import field_type, override, parse_value
from flmjax.config.run import RunConfig, Stage, resize
from flmjax.config.shapes import MeshShape, split_factor

__all__ = [
    "DERIVED",
    "FORMAT",
    "GROWTH_FAMILIES",
    "HEADER",
    "MESH_AXES",
    "SIZES",
    "STAGE_SIZES",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "Dtype",
    "FamilyTraits",
    "GrowthConfig",
    "MeshConfig",
    "MeshShape",
    "ModelConfig",
    "OptimizerConfig",
    "Remat",
    "RunConfig",
    "ScheduleSettings",
    "Stage",
    "StageConfig",
    "check_format",
    "choose_words",
    "did_you_mean",
    "differences",
    "field_type",
    "from_config_dict",
    "from_stored",
    "nearest",
    "outside_family",
    "override",
    "parse_value",
    "resize",
    "shorten",
    "split_factor",
    "stored_entry",
    "to_config_dict",
    "to_json",
    "to_stored",
]
