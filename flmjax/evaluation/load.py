"""A trained model, read from its run's workdir."""

import dataclasses
import operator
from pathlib import Path

import jax

from flmjax.config import ConfigError, ModelConfig, RunConfig
from flmjax.data.tokenizers import Tokenizer, load_tokenizer
from flmjax.growth.ramp import ramp_of
from flmjax.model.transformer import abstract_params
from flmjax.sharding.axes import Params
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.paths import checkpoint_directory, data_directory, whole_steps
from flmjax.workdir.position import position_at


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model.

    Attributes:
        params: float32 parameters on the default device, those that the model computes with: while a growth mask opens,
            the mask is applied.
        config: settings of the model, of the checkpoint's stage.
        tokenizer: of the run's data, with `encode`, `decode`, `vocab_size` and `end_id`.
        step: updates of the run before the checkpoint.
        run: settings of the run that wrote the checkpoint.
    """

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer
    step: int
    run: RunConfig


def load(workdir: Path, step: int | None = None) -> LoadedModel:
    """The model of the run in `workdir`, without the optimizer's state, which is not read.

    Args:
        step: of the checkpoint; None: the newest.

    Raises:
        ConfigError: naming the folder, for a folder that is no workdir, a step without a checkpoint (with the steps
            that have one), or missing files of the tokenizer.
        CheckpointError: for an unreadable or damaged checkpoint.
    """
    directory = checkpoint_directory(workdir)
    steps = whole_steps(directory)
    if not steps:
        raise ConfigError(f"{workdir} is no workdir of a run: it has no complete checkpoint")
    if step is not None and operator.index(step) not in steps:
        raise ConfigError(f"{workdir} has no checkpoint at step {step}, only at {', '.join(map(str, steps))}")
    position = position_at(workdir, steps[-1] if step is None else step)
    tokenizer = load_tokenizer(data_directory(position.config, workdir))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes, _ = abstract_params(position.stage.model)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    with Checkpoints(directory, keep=None) as checkpoints:
        params = checkpoints.restore(position.step, {"params": abstract})["params"]
    ramp = ramp_of(position.stage)
    if ramp is not None and position.step in position.stage.ramp:
        params = jax.jit(ramp.at)(params, position.step)
    return LoadedModel(params, position.stage.model, tokenizer, position.step, position.config)
