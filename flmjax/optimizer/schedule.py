"""Learning rate of every update of a run."""

import dataclasses
import math

from flmjax.config import StageConfig


def stage_rate(stage: StageConfig, update: int) -> float:
    """Learning rate of update 0, 1, ... of the schedule that `stage` starts; the last rate stays after the end.

    A linear warm-up reaches the peak at its last update. Then "constant"; "cosine" to final_learning_rate; or "wsd":
    constant, and linear to final_learning_rate over the last decay_fraction of the stage, at least one update. The last
    update of "cosine" and "wsd" has final_learning_rate exactly; the only update of a stage has the peak.

    Computed on the host, in float64: a rate from the device would wait for the update that runs there.
    """
    peak, final, warmup_steps, shape, decay_fraction = stage.schedule_settings
    if update < warmup_steps:
        return peak * (update + 1) / warmup_steps
    if shape == "constant" or stage.steps == 1:
        return peak
    rest = stage.steps - warmup_steps
    decay = rest - 1 if shape == "cosine" else min(rest, max(1, round(decay_fraction * stage.steps)))
    left = stage.steps - 1 - update  # updates until the last one
    if left <= 0:
        return final
    if left >= decay:
        return peak
    share = left / decay if shape == "wsd" else (1 + math.cos(math.pi * (1 - left / decay))) / 2
    return final + (peak - final) * share


def learning_rate(stages: tuple[StageConfig, ...], step: int) -> float:
    """Learning rate of global update `step`.

    A stage whose growth.rate_policy is "stage" starts a new schedule. Other stages continue the schedule before them,
    which lasts until the next stage with the policy "stage": "continue" changes nothing, "rewarm" multiplies by a
    linear warm-up over rewarm_fraction of the stage, and "rewind" starts again at the peak,
    over the remaining steps (MSG).

    Raises:
        ValueError: if `step` is after the end of the schedule.
    """
    first, start = 0, 0  # the stage at which the schedule began or was rewound, and its first step
    begin = 0
    for i, stage in enumerate(stages):
        if i and stage.growth.rate_policy in ("stage", "rewind"):
            first, start = i, begin
        if step < begin + stage.steps:
            break
        begin += stage.steps
    else:
        raise ValueError(f"the schedule ends {step - begin} steps before this one")
    origin = max(j for j in range(first + 1) if j == 0 or stages[j].growth.rate_policy == "stage")
    last = next((j for j in range(i + 1, len(stages)) if stages[j].growth.rate_policy == "stage"), len(stages))
    schedule = dataclasses.replace(stages[origin], steps=sum(s.steps for s in stages[first:last]))
    if first != origin:
        schedule = dataclasses.replace(schedule, warmup_steps=0)
    rate = stage_rate(schedule, step - start)
    if i and stage.growth.rate_policy == "rewarm":
        rate *= min(1.0, (step - begin + 1) / max(1, round(stage.growth.rewarm_fraction * stage.steps)))
    return rate


def new_warmup(stage: StageConfig) -> int:
    """Number of updates in which parameters created by the stage's growth reach their full learning rate."""
    return round(stage.growth.new_warmup_fraction * stage.steps)
