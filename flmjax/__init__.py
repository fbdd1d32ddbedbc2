"""Pre-train decoder language models by growing them.

Settings are in flmjax.config, the model in flmjax.model.transformer, growth in flmjax.growth.grow, sampling in
flmjax.evaluation.generate. `import flmjax` does not import JAX.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flmjax.evaluation.load import LoadedModel

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(workdir: str | os.PathLike[str], step: int | None = None) -> "LoadedModel":
    """The model that the run in `workdir` trained: its `params`, `config` and `tokenizer`.

    Args:
        workdir: folder of the run, also on object storage, of `flmjax train` or `flmjax grow`.
        step: of the checkpoint; None: the newest.

    Raises:
        ConfigError: naming the folder, for a folder that is no workdir, a step without a checkpoint (with the steps
            that have one), or missing files of the tokenizer.
        CheckpointError: for an unreadable or damaged checkpoint.
    """
    from flmjax.evaluation import load as loading
    from flmjax.workdir.local_copy import reading_copy
    from flmjax.workdir.storage import run_path

    with reading_copy(run_path(os.fspath(workdir), "workdir")) as folder:
        return loading.load(folder, step)
