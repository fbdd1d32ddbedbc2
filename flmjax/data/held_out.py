"""The rule that every text a run trains on has held-out documents, for otherwise it has no validation loss."""

from collections.abc import Mapping

from flmjax.config import ConfigError, DataConfig, RunConfig
from flmjax.data.named_sources import setting_of

Mixtures = Mapping[str, tuple[float, ...] | None]  # mixture weights by the setting that holds them


def mixtures_of(config: RunConfig) -> Mixtures:
    """Mixture weights of the run's stages; None stands for the default, in which every source has a share."""
    name, weights = "data.mixture_weights", config.data.mixture_weights
    mixtures = {}
    for i, stage in enumerate(config.stages):
        if stage.mixture_weights is not None:
            name, weights = f"stages[{i}].mixture_weights", stage.mixture_weights
        mixtures[name] = weights
    return mixtures


def check_held_out(data: DataConfig, texts: Mapping[str, Mapping[str, int] | None], mixtures: Mixtures | None) -> None:
    """Refuse a source of text that has a share of a mixture, but no held-out document.

    Args:
        texts: number of documents of each split ("train", "validation") of each source, in the order of mixture
            weights; None for a teacher.
        mixtures: result of mixtures_of; None: that of the data alone.

    Raises:
        ConfigError: naming the source, the setting of its share, and the cures.
    """
    if mixtures is None:
        mixtures = {"data.mixture_weights": data.mixture_weights}
    for setting, weights in mixtures.items():
        weights = weights or (1.0,) * len(texts)
        for i, ((name, documents), weight) in enumerate(zip(texts.items(), weights, strict=False)):
            if not weight or documents is None or documents["validation"]:
                continue
            field = setting_of(data, is_teacher=False)
            by_text = ", hold out by document with data.split_by='text'" * (data.split_by == "path")
            is_alone = not any(weights[:i] + weights[i + 1 :])
            without = "" if is_alone else f", or set its entry of {setting} to 0"
            raise ConfigError(
                f"{field}: none of the {documents['train']} documents of '{name}' is held out at "
                f"data.validation_fraction={data.validation_fraction}: add documents, divide the text into more "
                f"documents (by two blank lines in .txt files; into more files with data.split_by='path'){by_text}, "
                f"{'or ' * is_alone}raise the fraction{without}"
            )
