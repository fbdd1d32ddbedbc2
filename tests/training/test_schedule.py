"""Learning rates over stages and after growth."""

import math

import jax
import numpy as np
import optax
import pytest
from conftest import TINY, random_batch
from step_cases import adam

from flmjax.config import GrowthConfig, StageConfig
from flmjax.optimizer.schedule import learning_rate, new_warmup
from flmjax.training.state import init_state
from flmjax.training.step import jit_train_step


def test_learning_rate_counts_updates_over_all_stages(tiny_spec):
    """Updates, not microbatches: huggingface/accelerate#963, maxtext#3452."""
    stage_rates = GrowthConfig(rate_policy="stage")
    stages = (
        StageConfig(name="a", steps=10, learning_rate=1.0, warmup_steps=4, final_learning_rate=0.1),
        StageConfig(name="b", steps=10, learning_rate=0.5, schedule="wsd", decay_fraction=0.4, growth=stage_rates),
        StageConfig(name="c", steps=2, learning_rate=0.3, schedule="constant", growth=stage_rates),
    )
    rates = [learning_rate(stages, i) for i in range(22)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 5)) / 2 for i in range(6)]
    np.testing.assert_allclose(rates[4:10], cosine, rtol=1e-12)
    np.testing.assert_allclose(rates[10:20], [0.5] * 6 + [0.375, 0.25, 0.125, 0.0], rtol=1e-12)
    np.testing.assert_allclose(rates[20:], 0.3)
    with pytest.raises(ValueError, match="schedule ends"):
        learning_rate(stages, 22)
    run = jit_train_step(tiny_spec, 4)
    state = init_state(tiny_spec, 0)
    for i in range(10):
        state, _ = run(state, random_batch(TINY, seed=i), np.float32(rates[i]))
    assert int(adam(state).count) == int(state.step) == 10


@pytest.mark.parametrize("shape", ["cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(5, 0), (40, 1), (41, 7), (3, 2)])
def test_a_stage_has_the_rates_of_optax(shape, steps, warmup):
    """Optax computes in float32, and its schedules have one value more than a stage has updates."""
    peak, final, rest = 3e-3, 1e-4, steps - warmup
    stage = StageConfig(
        steps=steps,
        learning_rate=peak,
        final_learning_rate=final,
        warmup_steps=warmup,
        schedule=shape,
        decay_fraction=0.5,
    )
    decay = min(rest, max(1, round(0.5 * steps)))
    linear = optax.linear_schedule(peak, final, decay)
    body = {
        "cosine": optax.cosine_decay_schedule(peak, max(rest - 1, 1), alpha=final / peak),
        "wsd": lambda n: linear(n - (rest - decay - 1)),
    }[shape]
    for n in range(steps):
        expected = peak * (n + 1) / warmup if n < warmup else final if rest == 1 else body(n - warmup)
        assert learning_rate((stage,), n) == pytest.approx(float(expected), rel=3e-6)


def test_a_rate_asks_no_device():
    """A rate from the device waits for the update that it computes, and training is no longer ahead of it."""
    with jax.transfer_guard("disallow"):
        assert isinstance(learning_rate((StageConfig(),), 7), float)


def test_learning_rate_after_growth_follows_its_policy():
    def rates(policy, **growth):
        after = GrowthConfig(rate_policy=policy, **growth)
        first = StageConfig(name="a", steps=4, learning_rate=1.0, warmup_steps=2, schedule="cosine")
        stages = (first, StageConfig(name="b", steps=4, growth=after), StageConfig(name="c", steps=2, growth=after))
        return [learning_rate(stages, i) for i in range(10)]

    def cosine(n, length):
        return (1 + math.cos(math.pi * n / length)) / 2

    unbroken = [0.5, 1.0, *[cosine(i, 7) for i in range(8)]]
    np.testing.assert_allclose(rates("continue"), unbroken, rtol=1e-12)
    warmed = [*unbroken[:4], unbroken[4] / 2, *unbroken[5:]]  # the warm-up is two of four updates, one of two
    np.testing.assert_allclose(rates("rewarm", rewarm_fraction=0.5), warmed, rtol=1e-12)
    rewound = [*unbroken[:4], *[cosine(i, 5) for i in range(4)], 1.0, cosine(1, 1)]
    np.testing.assert_allclose(rates("rewind"), rewound, rtol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(2, 0), (3, 2), (7, 0), (10, 4), (1000, 10)])
@pytest.mark.parametrize("fraction", [0.001, 0.2, 1.0])
def test_last_update_has_the_final_rate(schedule, steps, warmup, fraction):
    """A decay over `steps` ended one update early, and one of a single update never began."""
    stage = StageConfig(
        steps=steps,
        warmup_steps=warmup,
        schedule=schedule,
        decay_fraction=fraction,
        learning_rate=1.0,
        final_learning_rate=0.1,
    )
    rates = [learning_rate((stage,), i) for i in range(steps)]
    assert rates[-1] == pytest.approx(0.1, rel=1e-6)
    assert max(rates[:-1]) > 0.1
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup:
        assert rates[warmup - 1] == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_only_update_of_a_stage_has_the_peak_rate(schedule):
    assert learning_rate((StageConfig(steps=1, learning_rate=0.5, schedule=schedule),), 0) == 0.5


def test_warm_up_of_new_weights_is_a_share_of_the_stage():
    stage = StageConfig(steps=1000, growth=GrowthConfig(new_warmup_fraction=0.02))
    assert new_warmup(stage) == 20
    assert new_warmup(StageConfig(steps=1000)) == 10
