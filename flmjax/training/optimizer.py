"""AdamW and the learning rate of every stage."""

from typing import Any

import jax
import optax

from flmjax.config import OptimizerConfig, StageConfig
from flmjax.model.axes import LeafAxes


def make_optimizer(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decay on matrices. The step multiplies by the learning rate, which is an argument
    of the compiled step: another schedule compiles nothing anew.

    Args:
        axes: tree of LeafAxes of the parameters; biases, gains and shifts do not decay.
    """
    matrices = jax.tree.map(lambda leaf: leaf.is_matrix, axes, is_leaf=lambda x: isinstance(x, LeafAxes))
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.masked(optax.add_decayed_weights(config.weight_decay), matrices),
    )


def stage_schedule(stage: StageConfig) -> optax.Schedule:
    """Learning rate of the stage's update n = 0, 1, ...

    A linear warm-up reaches the peak at its last step. Then "constant"; "cosine" to final_learning_rate; or "wsd":
    constant, and linear to final_learning_rate over the last decay_fraction of the stage.
    """
    peak, final = stage.learning_rate, stage.final_learning_rate
    rest = stage.steps - stage.warmup_steps
    if stage.schedule == "cosine":
        body = optax.cosine_decay_schedule(peak, rest, alpha=final / peak if peak else 0.0)
    elif stage.schedule == "wsd":
        decay = min(rest, max(1, round(stage.decay_fraction * stage.steps)))
        linear = optax.linear_schedule(peak, final, decay)
        body = optax.join_schedules([optax.constant_schedule(peak), linear], [rest - decay])
    else:
        body = optax.constant_schedule(peak)
    if stage.warmup_steps == 0:
        return body
    warmup = optax.linear_schedule(peak / stage.warmup_steps, peak, stage.warmup_steps - 1)
    return optax.join_schedules([warmup, body], [stage.warmup_steps])


def learning_rate(stages: tuple[StageConfig, ...], step: int) -> float:
    """Learning rate of global update `step`."""
    for stage in stages:
        if step < stage.steps:
            return float(stage_schedule(stage)(step))
        step -= stage.steps
    raise ValueError(f"the schedule ends {step} steps before this one")
