"""Learning rate of every update of a run."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable

from flmjax.config import StageConfig


def stage_rate(stage: StageConfig, update: int) -> float:
    """Learning rate of update 0, 1, ... of the schedule that `stage` starts; the last rate stays after the end.

    A linear warm-up from initial_learning_rate reaches the peak at its last update. Then "constant"; "cosine" to
    final_learning_rate; or "wsd": constant, and linear to final_learning_rate over the last decay_fraction of the
    stage, at least one update. The last update of "cosine" and "wsd" has final_learning_rate exactly; the only update
    of a stage has the peak.

    Computed on the host, in float64: a rate from the device would wait for the update that runs there.
    """
    peak, final, initial, warmup_steps, shape, _ = stage.schedule_settings
    if update < warmup_steps:
        return initial + (peak - initial) * (update + 1) / warmup_steps
    if shape == "constant" or stage.steps == 1:
        return peak
    decay = _decay_updates(stage)
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
    ends = list(itertools.accumulate(stage.steps for stage in stages))
    index = bisect.bisect_right(ends, step)
    if index == len(stages):
        raise ValueError(f"the schedule ends {step - ends[-1]} steps before this one")
    return rates_of_stage(stages, index)(step)


def rates_of_stage(stages: tuple[StageConfig, ...], index: int) -> Callable[[int], float]:
    """learning_rate of the updates of stage number `index`, whose schedule is found once for all of them."""
    stage, begin = stages[index], sum(stage.steps for stage in stages[:index])
    schedule, start = _schedule_in(stages, index)
    rewarm_updates = _rewarm_updates(stage) if index and stage.growth.rate_policy == "rewarm" else None

    def rate(step: int) -> float:
        if rewarm_updates is None:
            return stage_rate(schedule, step - start)
        return stage_rate(schedule, step - start) * min(1.0, (step - begin + 1) / rewarm_updates)

    return rate


def borders(stages: tuple[StageConfig, ...]) -> set[int]:
    """Updates of a run next to which the course of the learning rate may turn, the run's end included.

    Between two of them the rate is constant, a line or a part of a cosine.
    """
    turns, begin = set(), 0
    for index, stage in enumerate(stages):
        schedule, start = _schedule_in(stages, index)
        end = start + schedule.steps
        turns |= {begin, start + schedule.schedule_settings.warmup_steps, end - 1 - _decay_updates(schedule), end}
        if index and stage.growth.rate_policy == "rewarm":
            turns.add(begin + _rewarm_updates(stage))
        begin += stage.steps
    return turns | {begin}


def _schedule_in(stages: tuple[StageConfig, ...], index: int) -> tuple[StageConfig, int]:
    """The schedule that holds in stage number `index`, as a stage with all its updates, and its first update."""
    policies = ["stage", *(stage.growth.rate_policy for stage in stages[1:])]
    first = max(i for i in range(index + 1) if policies[i] in ("stage", "rewind"))
    origin = max(i for i in range(first + 1) if policies[i] == "stage")
    last = next((i for i in range(index + 1, len(stages)) if policies[i] == "stage"), len(stages))
    schedule = dataclasses.replace(stages[origin], steps=sum(stage.steps for stage in stages[first:last]))
    if first != origin:
        schedule = dataclasses.replace(schedule, warmup_steps=0)
    return schedule, sum(stage.steps for stage in stages[:first])


def _decay_updates(schedule: StageConfig) -> int:
    """Number of updates after the last one with the peak, of "cosine" and "wsd"."""
    settings = schedule.schedule_settings
    rest = schedule.steps - settings.warmup_steps
    if settings.schedule == "cosine":
        return rest - 1
    return min(rest, max(1, round(settings.decay_fraction * schedule.steps)))


def _rewarm_updates(stage: StageConfig) -> int:
    return max(1, round(stage.growth.rewarm_fraction * stage.steps))


def new_warmup(stage: StageConfig) -> int:
    """Number of updates in which parameters created by the stage's growth reach their full learning rate."""
    return round(stage.growth.new_warmup_fraction * stage.steps)
