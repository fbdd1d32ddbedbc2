"""Loss spikes: which loss is one, and what a run does about it; the norms of every leaf."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import TINY, random_batch
from step_cases import on_mesh

from flmjax.config import (
    CheckpointConfig,
    ConfigError,
    GrowthConfig,
    MeshShape,
    OptimizerConfig,
    RunConfig,
    SpikeConfig,
    StageConfig,
)
from flmjax.config.validate import validate
from flmjax.sharding.axes import path_name
from flmjax.sharding.mesh import make_mesh
from flmjax.training.pending import AHEAD, Fetched
from flmjax.training.spikes import LossWatch, LossWindow, SpikeError, TrainingError
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import gradients, jit_parameter_norms, jit_train_step, named_norms

# ---- the limit -------------------------------------------------------------------------------------------------------

SETTINGS = SpikeConfig(window=8, deviations=3.0)


def bars(losses, settings=SETTINGS, resumed_at=None) -> list[float]:
    """Bars of the updates with these losses, each computed before its loss is known."""
    window, found = LossWindow(settings), []
    for step, loss in enumerate(losses, start=1):
        found.append(window.limit(step))
        window.add(step, loss)
        if step == resumed_at:
            window = LossWindow(settings, json.loads(json.dumps(window.losses)), step)
    return found


def test_the_bar_is_median_plus_median_absolute_deviations():
    losses = [5.0, 4.0, 7.0, 3.0, 2.0, 9.0, 1.0, 6.0, 8.0, 2.5, 3.5]
    found = bars(losses)
    known = np.array(losses[: 8 + 1 - AHEAD])  # update 8 + AHEAD - 1 = 9 is compared with those up to 9 - 1 - AHEAD
    median = np.median(known[:6])
    expected = median + 3.0 * 1.4826 * np.median(np.abs(known[:6] - median))
    assert found[8] == pytest.approx(expected, rel=1e-12)
    newest = np.array(losses[10 - 8 - AHEAD : 10 - AHEAD])  # of update 11: a whole window
    median = np.median(newest)
    assert found[10] == pytest.approx(median + 3.0 * 1.4826 * np.median(np.abs(newest - median)), rel=1e-12)


def test_nothing_is_a_spike_before_half_a_window_is_known():
    """Of 8 losses 4 are enough; one that is not finite does not count, and the newest are not known yet."""
    found = bars([1.0, math.nan, 1.1, 1.2, 0.9, 1.0, 1.0, 1.0])
    assert [step for step, limit in enumerate(found, start=1) if math.isfinite(limit)] == [8]


def test_spikes_do_not_raise_the_limit():
    """With mean and standard deviation three spikes hide the fourth."""
    rng = np.random.default_rng(0)
    calm = list(2 + 0.01 * rng.standard_normal(40))
    settings = SpikeConfig(window=16, deviations=6.0)
    spiked = [*calm[:30], 9.0, 9.0, 9.0, *calm[33:]]
    assert max(bars(spiked, settings)[33:]) < 2.2
    assert bars(spiked, settings)[32] < 2.2


@pytest.mark.parametrize("at", [1, 5, 9, 10, 17, 30])
def test_the_bars_of_an_interrupted_run_are_the_same(at):
    rng = np.random.default_rng(1)
    losses = [float(x) for x in np.float32(rng.random(40))]
    assert bars(losses) == bars(losses, resumed_at=at)


def test_a_bar_that_the_step_gets_is_the_bar_of_the_host():
    """Losses of updates in the queue of the devices are not waited for."""
    rng = np.random.default_rng(2)
    losses = [float(x) for x in np.float32(rng.random(30))]
    window, found = LossWindow(SETTINGS), []
    for step, loss in enumerate(losses, start=1):
        found.append(window.limit(step))
        known = len(window.losses)
        assert known == min(max(step - 1 - AHEAD, 0), SETTINGS.window + AHEAD)
        window.dispatched(step, np.float32(loss))
    assert found == bars(losses)


def test_growth_that_changes_the_function_begins_a_new_window():
    watch = LossWatch(RunConfig(spike=SpikeConfig(action="stop", window=8)), [1.0] * 8, 8)
    exact, changed = (SimpleNamespace(config=StageConfig(growth=GrowthConfig(f))) for f in ("zero", "perturb"))
    watch.after_growth(exact)
    assert watch.window.limit(9) == 1.0
    watch.after_growth(changed)
    assert math.isinf(watch.window.limit(9))


# ---- actions ---------------------------------------------------------------------------------------------------------


def fetched(step, loss, skipped=0, **metrics) -> Fetched:
    values = {"loss": np.float32(loss), "skipped_updates": np.int32(skipped), "finite": np.ones(1, bool), **metrics}
    return Fetched(step, values, 0.0)


PARAMS = {"kernel": 0}


def watch_of(action: str, **optimizer) -> LossWatch:
    settings = SpikeConfig(action=action, window=8)
    config = RunConfig(spike=settings, optimizer=OptimizerConfig(**optimizer))
    return LossWatch(config, [1.0, 1.1] * 5, 10)


def test_a_spike_stops_the_run_if_the_config_says_so():
    assert watch_of("none").check(fetched(11, 9.0), PARAMS) is None
    stop = watch_of("stop")
    assert stop.check(fetched(11, 1.2), PARAMS) is None
    with pytest.raises(TrainingError, match=r"^step 12: loss spike: 9.0000 above the limit of 1.49"):
        stop.check(fetched(12, 9.0), PARAMS)


def test_a_spike_or_lasting_nans_roll_back():
    with pytest.raises(SpikeError, match=r"loss spike: 9\.0000 above") as spike:
        watch_of("roll_back").check(fetched(11, 9.0), PARAMS)
    assert (spike.value.first, spike.value.last) == (11, 11)
    watch = watch_of("roll_back", max_skipped_updates=3)
    lines = [watch.check(fetched(10 + n, math.nan, n), PARAMS) for n in (1, 2)]
    assert lines[1] == "step 12: update skipped, not finite: the loss (2 in a row)"
    with pytest.raises(SpikeError, match="3 updates in a row not finite") as spike:
        watch.check(fetched(13, math.nan, 3), PARAMS)
    assert (spike.value.first, spike.value.last) == (11, 13)


def test_skipped_spikes_in_a_row_stop_the_run():
    watch = watch_of("skip", max_skipped_updates=2)
    line = watch.check(fetched(11, 9.0, 1, spike=np.bool_(True)), PARAMS)
    assert line == "step 11: update skipped, loss spike, loss 9.0000 (1 in a row)"
    with pytest.raises(TrainingError, match=r"\(2 in a row\); training stopped with the parameters of step 10"):
        watch.check(fetched(12, 9.0, 2, spike=np.bool_(True)), PARAMS)


def test_a_step_skips_a_loss_above_the_limit(tiny_spec, tiny_step):
    batch = random_batch(TINY)
    run = jit_train_step(tiny_spec, 1, skips_spikes=True)
    expected, plain = tiny_step(init_state(tiny_spec, 0), batch, np.float32(1e-3))
    loss = np.float32(plain["loss"])
    for limit in (np.float32(np.inf), loss):
        state, metrics = run(init_state(tiny_spec, 0), batch, np.float32(1e-3), limit)
        assert not metrics["spike"]
        jax.tree.map(np.testing.assert_array_equal, state, expected)
    state, metrics = run(init_state(tiny_spec, 0), batch, np.float32(1e-3), np.nextafter(loss, np.float32(0)))
    assert bool(metrics["spike"])
    assert (int(state.step), int(state.skipped_updates), int(metrics["skipped_updates"])) == (1, 1, 1)
    assert float(metrics["loss"]) == loss
    before = init_state(tiny_spec, 0)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))


def test_a_roll_back_needs_checkpoints_that_are_old_enough():
    settings = SpikeConfig(action="roll_back", roll_back_steps=41)
    with pytest.raises(ConfigError, match=r"^spike.roll_back_steps=41 .* checkpoint.every=20 .*; keep=4 does$"):
        validate(RunConfig(spike=settings, checkpoint=CheckpointConfig(every=20)))
    stages = (StageConfig(name="a"), StageConfig(name="b"))
    with pytest.raises(ConfigError, match=r"^spike.roll_back_steps=41 .*; keep=6 does$"):
        validate(RunConfig(spike=settings, checkpoint=CheckpointConfig(every=20, keep=5), stages=stages))
    validate(RunConfig(spike=dataclasses.replace(settings, roll_back_steps=40), checkpoint=CheckpointConfig(every=20)))
    validate(RunConfig(spike=dataclasses.replace(settings, action="stop"), checkpoint=CheckpointConfig(every=20)))


# ---- norms -----------------------------------------------------------------------------------------------------------


def test_norms_of_every_leaf_are_those_of_numpy():
    mesh = make_mesh(MeshShape(2, 2, 2), jax.devices())
    spec = state_spec(TINY, OptimizerConfig(), mesh)
    batch = on_mesh(random_batch(TINY, rows=8), mesh)
    plain, _ = jit_train_step(spec, 1)(init_state(spec, 0), batch, np.float32(1e-2))
    state, metrics = jit_train_step(spec, 1, norms=True)(init_state(spec, 0), batch, np.float32(1e-2))
    jax.tree.map(np.testing.assert_array_equal, state, plain)
    metrics |= {"parameter_norms": jit_parameter_norms(spec)(state.params)}
    norms = named_norms(jax.device_get(metrics), spec.abstract.params)
    trees = {"parameter": state.params, "gradient": gradient(spec, batch)}
    for kind, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            expected = np.linalg.norm(np.float64(leaf))
            np.testing.assert_allclose(norms.pop(f"{kind}/{path_name(path)}"), expected, rtol=1e-4, atol=1e-7)
    assert not norms


def gradient(spec, batch):
    """Gradients of the first update, by another program than the step."""
    of_batch = jax.jit(lambda p, b: gradients(p, b, jax.random.key(0), TINY, None)[1])
    return jax.tree.map(np.asarray, of_batch(init_state(spec, 0).params, batch))
