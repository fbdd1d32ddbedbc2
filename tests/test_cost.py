"""Arithmetic of costs: the paper's figures, sums by hand, and no JAX."""

import dataclasses
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest

from flmjax.config import ConfigError, GrowthConfig, MeshConfig, ModelConfig, RunConfig, StageConfig, from_config_dict
from flmjax.hardware import A800
from flmjax.model.flops import num_parameters
from flmjax.model.transformer import abstract_params, count_parameters
from flmjax.planning import cost
from flmjax.planning.cost import Machine, bill, saved_at_equal_loss, saved_at_equal_tokens, training_flops
from flmjax.report.plan_table import cost_table

CONFIGS = Path(__file__).parents[1] / "configs"


def flm(machine: str = "a800") -> RunConfig:
    spec = importlib.util.spec_from_file_location("flm_101b", CONFIGS / "flm_101b.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config(machine))


@pytest.mark.parametrize("peer", cost.PEERS, ids=lambda peer: peer.name)
def test_the_formula_gives_the_costs_of_the_papers_table(peer):
    amount, spread = peer.computed
    assert amount == pytest.approx(peer.zettaflops, abs=0.015)
    assert (spread is None) == (peer.spread is None)
    if spread is not None:
        assert spread == pytest.approx(peer.spread, abs=0.006)


def test_flm_101b_costs_what_the_paper_says():
    config = flm()
    costs = cost.stage_costs(config)
    assert sum(stage.flops for stage in costs) / 1e21 == pytest.approx(53.6, rel=0.01)
    assert sum(stage.tokens for stage in costs) == pytest.approx(311.55e9, rel=1e-4)
    machine = Machine(cost.DEVICES, cost.DOLLARS_PER_HOUR, watts=400.0)
    published = cost.published(costs)
    days = [
        cost.days(stage.flops, machine, paper.tflops * 1e12, cost.AVAILABILITY)
        for stage, paper in zip(costs, published, strict=True)
    ]
    for stage_days, paper in zip(days, published, strict=True):
        assert stage_days == pytest.approx(paper.days, rel=0.05)  # one availability for all three
    assert sum(days) == pytest.approx(21.54, abs=0.05)  # AVAILABILITY was derived from it: no proof, a consistency
    scratch = cost.days(cost.cost_from_scratch(config), machine, 165e12, cost.AVAILABILITY)
    assert scratch == pytest.approx(cost.DAYS_FROM_SCRATCH, rel=0.015)
    assert saved_at_equal_tokens(days, scratch) == pytest.approx(0.72, abs=0.005)
    total = bill(machine, cost.DAYS)
    assert total.device_hours == 21.54 * 24 * 192
    assert total.megawatt_hours == pytest.approx(cost.MEGAWATT_HOURS, rel=0.01)
    assert total.tonnes_co2e == pytest.approx(cost.TONNES_CO2E, rel=0.03)
    assert total.dollars == pytest.approx(100_000, rel=0.01)


def test_the_formula_is_narayanans_for_gpt():
    """With the matrices of a layer in place of 12 h^2 it counts those of other models too (arXiv 2104.04473)."""
    L, h, s, V, tokens = 3, 64, 128, 1000, 1e6
    gpt = ModelConfig(num_layers=L, embed_dim=h, num_heads=4, head_dim=16, mlp_dim=4 * h, vocab_size=V, max_length=s)
    for factor in (72, 96):
        by_hand = factor * tokens * L * h**2 * (1 + s / (6 * h) + V / (16 * L * h))
        assert training_flops(gpt, tokens, factor) == pytest.approx(by_hand, rel=1e-12)
    swiglu = dataclasses.replace(gpt, activation="swiglu", num_kv_heads=2)
    more = 72 * tokens * L * (h * 4 * h - 2 * h * 2 * 16) / 12  # a third matrix; half of keys and values
    assert training_flops(swiglu, tokens) - training_flops(gpt, tokens) == pytest.approx(more, rel=1e-9)
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        training_flops(ModelConfig(), 1)
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        cost.stage_costs(RunConfig())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tied_embedding": False, "bias": False, "activation": "swiglu", "norm": "rmsnorm", "position": "rope"},
        {"position": "learned", "norm": "rmsnorm"},
        {"num_kv_heads": 2, "activation": "swiglu", "vocab_multiple": 64},
        {"bias": False},
    ],
)
def test_parameters_from_the_configuration_are_those_of_the_tree(settings):
    config = ModelConfig(**{"num_layers": 3, "vocab_size": 501, "mlp_dim": 200, "max_length": 24, **settings})
    assert num_parameters(config) == count_parameters(abstract_params(config)[0])


def test_stages_and_scratch_cost_the_sums_by_hand():
    model = ModelConfig(num_layers=2, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=128, vocab_size=96, max_length=8)
    stages = (
        StageConfig("small", steps=10, batch_size=4),
        StageConfig("large", steps=5, batch_size=2, num_layers=4),
    )
    config = RunConfig(model=model, stages=stages)
    small, large = cost.stage_costs(config)
    assert (small.tokens, large.tokens) == (320.0, 80.0)
    layer, head = 12 * 32**2 / 12 + 32 * 8 / 6, 96 * 32 / 16
    assert small.flops == pytest.approx(72 * 320 * (2 * layer + head))
    assert large.flops == pytest.approx(72 * 80 * (4 * layer + head))
    tuned = dataclasses.replace(stages[1], growth=GrowthConfig("learned", tuning_steps=5))
    assert cost.stage_costs(dataclasses.replace(config, stages=(tuned, tuned)))[1].tokens == 160.0  # twice the updates
    assert cost.stage_costs(dataclasses.replace(config, stages=(tuned, tuned)))[0].tokens == 80.0
    scratch = cost.cost_from_scratch(config)
    assert scratch == pytest.approx(72 * 400 * (4 * layer + head))
    assert saved_at_equal_tokens([small.flops, large.flops], scratch) == pytest.approx(
        1 - (small.flops + large.flops) / scratch
    )


def test_a_saving_at_equal_loss_needs_measurements():
    assert saved_at_equal_loss([], [(1.0, 3.0)]) is None
    assert saved_at_equal_loss([(1.0, 3.0)], []) is None
    assert saved_at_equal_loss([(1.0, 2.0)], [(1.0, 3.0), (9.0, 2.5)]) is None  # never reached
    # From 3.0 at 4 to 2.0 at 8 the loss is 2.5 at 6.
    assert saved_at_equal_loss([(1.0, 3.0), (3.0, 2.5)], [(4.0, 3.0), (8.0, 2.0)]) == pytest.approx(1 - 3 / 6)
    assert saved_at_equal_loss([(3.0, 2.5)], [(2.0, 2.5)]) == pytest.approx(-0.5)  # it can be a loss


def test_an_unknown_price_or_power_is_not_billed():
    hours = bill(Machine(4), 0.5)
    assert (hours.device_hours, hours.dollars, hours.megawatt_hours, hours.tonnes_co2e) == (48.0, None, None, None)
    billed = bill(Machine(4, 2.0, 500.0, carbon=0.1), 0.5)
    assert (billed.dollars, billed.megawatt_hours) == (96.0, 0.024)
    assert math.isclose(billed.tonnes_co2e, 0.0024)
    assert cost.machine_of(A800, 4, None) == Machine(4, cost.DOLLARS_PER_HOUR, 400.0)
    assert cost.machine_of(A800, 4, 2.0).dollars_per_hour == 2.0


def test_only_the_papers_stages_have_its_figures():
    costs = cost.stage_costs(flm())
    assert [p.tflops for p in cost.published(costs)] == [162, 160, 165]
    tuned = dataclasses.replace(flm().stages[1], growth=GrowthConfig("learned"))  # 100 updates, 1.2 % more tokens
    tuned = dataclasses.replace(flm(), stages=(flm().stages[0], tuned))
    assert cost.published(cost.stage_costs(tuned))[1] is cost.STAGES["51B"]
    assert "51B: of 8,500 updates 100 tune its growth" in cost_table(tuned, None, None)
    other = dataclasses.replace(costs[0], tokens=costs[0].tokens * 1.02)
    assert cost.published([other, dataclasses.replace(costs[1], name="small")]) == [None, None]


def test_the_table_has_the_papers_speeds_or_a_stated_one():
    text = cost_table(flm(), None, None)
    for words in ("53.64 zettaFLOPs", "52.76 zettaFLOPs", "21.5 days", "72.2% of days", "equal loss: not measured"):
        assert words in text
    first = dataclasses.replace(flm(), stages=flm().stages[:1])
    assert "52.76" not in cost_table(first, None, None)  # that is of three stages
    stated = cost_table(flm(), 330.0, 2.0)
    assert "the paper: days" in stated
    assert "330" in stated
    with pytest.raises(ConfigError, match=r"stage stage; --tflops=N"):
        cost_table(RunConfig(model=ModelConfig(vocab_size=300), mesh=MeshConfig(fsdp=1)), None, None)
    with pytest.raises(ConfigError, match=r"for example --config.model.vocab_size=4096 --config.mesh.fsdp=8"):
        cost_table(RunConfig(), 1.0, None)


def test_a_cost_alone_needs_no_jax_and_less_than_two_seconds():
    code = (
        "import sys, time; start = time.perf_counter(); from flmjax import cli; "
        "status = cli.main(['plan', '--cost-only', '--config=configs/flm_101b.py']); "
        "print(status, 'jax' in sys.modules, time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=CONFIGS.parent)
    status, has_jax, seconds = done.stdout.split("\n")[-2].split()
    assert (status, has_jax) == ("0", "False"), done.stderr
    assert float(seconds) < 2
    assert "GPT-3" in done.stdout
