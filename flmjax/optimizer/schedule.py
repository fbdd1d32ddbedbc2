"""Learning rate of every update of a run."""

import dataclasses

import optax

from flmjax.config import StageConfig


def stage_schedule(stage: StageConfig) -> optax.Schedule:
    """Schedule of one stage: the learning rate of its update n = 0, 1, ...

    A linear warm-up reaches the peak at its last update. Then "constant"; "cosine" to final_learning_rate; or "wsd":
    constant, and linear to final_learning_rate over the last decay_fraction of the stage, at least one update. The last
    update of "cosine" and "wsd" has final_learning_rate exactly; the only update of a stage has the peak.
    """
    peak, final, warmup_steps, shape, decay_fraction = stage.schedule_settings
    rest = stage.steps - warmup_steps
    if shape == "constant" or stage.steps == 1:
        body = optax.constant_schedule(peak)
    elif rest == 1:
        body = optax.constant_schedule(final)
    elif shape == "cosine":
        body = optax.cosine_decay_schedule(peak, rest - 1, alpha=final / peak if peak else 0.0)
    else:
        decay = min(rest, max(1, round(decay_fraction * stage.steps)))
        linear = optax.linear_schedule(peak, final, decay)
        # The line starts at the update before the decay, whose rate is still the peak.
        body = optax.join_schedules([optax.constant_schedule(peak), linear], [rest - decay - 1])
    if warmup_steps == 0:
        return body
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1)
    return optax.join_schedules([warmup, body], [warmup_steps])


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
    rate = float(stage_schedule(schedule)(step - start))
    if i and stage.growth.rate_policy == "rewarm":
        rate *= min(1.0, (step - begin + 1) / max(1, round(stage.growth.rewarm_fraction * stage.steps)))
    return rate


def new_warmup(stage: StageConfig) -> int:
    """Number of updates in which parameters created by the stage's growth reach their full learning rate."""
    return round(stage.growth.new_warmup_fraction * stage.steps)
