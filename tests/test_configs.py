"""The shipped configurations: each is legal on its machine, and its numbers are those of the papers."""

import dataclasses
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from quick_xla import QUICK_XLA

from flmjax.config import SIZES, STAGE_SIZES, ConfigError, RunConfig, choose_words, from_config_dict
from flmjax.config.validate import validate, validate_meshes
from flmjax.data.tokenizers import named_tokenizer
from flmjax.growth.growth import Growth
from flmjax.model.flops import num_parameters
from flmjax.optimizer.schedule import learning_rate
from flmjax.planning.cost import cost_from_scratch, saved_at_equal_tokens, stage_costs
from flmjax.planning.topology import parse_topology

CONFIGS = Path(__file__).parents[1] / "configs"
MACHINES = ("a800", "h100", "h200", "tpu_v5p", "tpu_v4", "tpu_v6e")
STRATEGIES = ("none", "linear", "moderate", "aggressive")
ARGUMENTS = {
    "bilingual": ("", "my/folder"),  # the argument is a folder, no word
    "eflm_16b": ("", "cpu", "scratch"),
    "flm_101b": (
        *MACHINES,
        *(f"{machine},{stage}" for stage in ("16b", "51b") for machine in MACHINES),
        "zero",
        "mask",
        "cpu",
        "cpu,16b",
        "cpu,51b",
        "cpu,mask",
    ),
    "flm_proxy": ("",),
    "growth_7b": ("", "h100_8", "h100_64", "v5e_64", "v6e_64"),
    "growth_strategies": STRATEGIES,
    "quickstart": ("", "bilingual"),
    "tele_flm_52b": ("", "52b"),
}
DEVICES = {"a800": 192, "h100": 128, "h200": 128, "tpu_v5p": 256, "tpu_v4": 256, "tpu_v6e": 256}


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"configs_{name}", CONFIGS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def load(name: str, argument: str | None = None) -> RunConfig:
    """None: without an argument, as `--config=configs/NAME.py` does."""
    get_config = module(name).get_config
    return validate(from_config_dict(get_config() if argument is None else get_config(argument)))


def saved(config: RunConfig) -> float:
    return saved_at_equal_tokens([stage.flops for stage in stage_costs(config)], cost_from_scratch(config))


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_every_file_is_known_here():
    assert sorted(ARGUMENTS) == sorted(path.stem for path in CONFIGS.glob("*.py"))


@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, all_of in ARGUMENTS.items() for a in (None, *all_of)])
def test_every_argument_gives_a_legal_run_whose_mesh_fits_its_machine(name, argument):
    config = load(name, argument)
    if config.mesh.topology is not None:
        validate_meshes(config, parse_topology(config.mesh.topology).num_devices)
        assert all(stage.layout.mesh.fsdp is not None for stage in config.schedule)  # nothing is left to be filled in
    elif name == "eflm_16b" and not argument:
        validate_meshes(config, 192)


@pytest.mark.parametrize("name", sorted(ARGUMENTS.keys() - {"bilingual"}))
def test_an_unknown_argument_is_refused_and_the_choices_are_named(name):
    with pytest.raises(ConfigError) as refusal:
        module(name).get_config("zzz")
    message = str(refusal.value)
    assert "'zzz'" in message
    for word in filter(None, ",".join(ARGUMENTS[name]).split(",")):
        assert word in message


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("tpu_v4p", r"unknown word 'tpu_v4p'; did you mean tpu_v4\?; machine: a800, .*; stage: 16b, 51b; operator: "),
        ("16B", r"'16B'; did you mean 16b\?"),
        ("a800,", "unknown word ''"),
        ("a800,16b,tpu_v4", "'a800' and 'tpu_v4' are both words for the machine; take one"),
        ("16b,16b", "'16b' and '16b' are both words for the stage"),
        ("mask,51b", "operator 'mask' is not read with '51b'"),
    ],
)
def test_words_that_cannot_be_meant_are_refused(argument, message):
    with pytest.raises(ConfigError, match=message):
        module("flm_101b").get_config(argument)


def test_the_order_of_words_does_not_matter():
    assert load("flm_101b", "16b, tpu_v4") == load("flm_101b", "tpu_v4,16b")
    assert choose_words("", machine=("a",)) == {"machine": None}
    assert choose_words("b,x", letter=("a", "b"), other=("x",)) == {"letter": "b", "other": "x"}


@pytest.mark.parametrize(("name", "full", "twin"), [("flm_101b", "a800", "cpu"), ("flm_101b", "mask", "cpu,mask")])
def test_the_twin_of_minutes_has_the_runs_stages_and_operators(name, full, twin):
    full, twin = load(name, full), load(name, twin)
    assert [stage.name for stage in twin.stages] == [stage.name for stage in full.stages]
    for large, small in zip(full.stages, twin.stages, strict=True):
        ramp = {"ramp_steps": small.growth.ramp_steps}
        assert dataclasses.replace(large.growth, **ramp) == small.growth
        grown = [{size for size in STAGE_SIZES if getattr(stage, size) is not None} for stage in (large, small)]
        assert grown[0] == grown[1]
    for field in ("norm", "activation", "position", "bias", "tied_embedding", "softmax_temperature", "init_std"):
        assert getattr(twin.model, field) == getattr(full.model, field)
    assert num_parameters(twin.stage_models[-1]) < 2e6


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_twin_of_flm_101b_grows_twice_by_masks(tmp_path, own_environment):
    steps = [f"--config.stages[{i}].steps=12" for i in (1, 2)]
    argv = ["train", f"--config={CONFIGS}/flm_101b.py:cpu,mask", "--config.stages[0].steps=30", *steps]
    environment = own_environment | {"XLA_FLAGS": QUICK_XLA}
    subprocess.run([sys.executable, "-m", "flmjax", *argv, f"--workdir={tmp_path}"], env=environment, check=True)
    certificates = [json.loads(path.read_text()) for path in sorted((tmp_path / "certificates").iterdir())]
    assert [certificate["parameters"][1] for certificate in certificates] == [661_120, 1_279_680]
    assert all(certificate["max_difference"]["float64"] < 1e-12 for certificate in certificates)


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_the_launch_command_stands_at_the_top_of_every_file(name):
    assert f"--config=configs/{name}.py" in module(name).__doc__


# ---- FLM-101B --------------------------------------------------------------------------------------------------------


def test_the_stages_of_flm_101b_are_those_of_the_papers_table():
    config = load("flm_101b", "a800")
    stages = [(s.name, s.steps, s.batch_size, s.learning_rate, s.final_learning_rate) for s in config.stages]
    assert stages == [
        ("16B", 52_000, 2304, 4e-4, 3.4e-4),
        ("51B", 8_400, 2304, 3.4e-4, 2e-4),
        ("101B", 6_000, 2160, 2e-4, 6e-6),
    ]
    assert [s.final_learning_rate for s in load("flm_101b", "a800,sawtooth").stages] == [6e-6] * 3
    assert {s.schedule for s in config.stages} == {"cosine"}
    # The table counts the warm-up in samples: 4,608,000, 230,400 and 230,400, the last is no integer number of steps.
    assert [s.warmup_steps for s in config.stages] == [4_608_000 // 2304, 230_400 // 2304, -(-230_400 // 2160)]
    assert config.model.max_length == 2048
    assert [round(cost.tokens / 1e9, 2) for cost in stage_costs(config)] == [245.37, 39.64, 26.54]


@pytest.mark.parametrize("argument", ["a800", "cpu", "tpu_v5p,mask"])
def test_the_rate_of_flm_101b_does_not_jump_at_a_border(argument):
    """Growth at a rate that has decayed to 6e-6 would be followed by a jump of 57 times."""
    stages = load("flm_101b", argument).stages
    rates = [learning_rate(stages, step) for step in range(sum(stage.steps for stage in stages))]
    ratios = np.array(rates[1:]) / rates[:-1]
    first = stages[0].warmup_steps
    assert ratios[first:].min() > 0.5  # the last updates of the twin's short cosine
    assert ratios[first:].max() < 1.01
    sawtooth = load("flm_101b", f"{argument},sawtooth").stages
    assert learning_rate(sawtooth, stages[0].steps - 1) < 0.02 * learning_rate(
        sawtooth, stages[0].steps + stages[1].warmup_steps
    )


@pytest.mark.parametrize("machine", MACHINES)
def test_flm_101b_sees_the_papers_tokens_on_every_machine(machine):
    config = load("flm_101b", machine)
    assert sum(cost.tokens for cost in stage_costs(config)) == pytest.approx(311.55e9, rel=1e-3)
    # The last stage's peak, end and warm-up hold there too, whatever its batch.
    last = config.stages[-1]
    assert last.warmup_steps * last.batch_size == pytest.approx(230_400, abs=last.batch_size)
    assert (last.learning_rate, last.final_learning_rate) == (2e-4, 6e-6)
    assert parse_topology(config.mesh.topology).num_devices == DEVICES[machine]


def test_flm_101b_has_the_published_sizes():
    config = load("flm_101b")
    last = config.stage_models[-1]
    assert (last.num_layers, last.embed_dim, last.num_heads, last.head_dim) == (80, 10_240, 80, 128)
    # N layers of 12 D^2 weights and 13 D biases and norms, a final norm of 2 D, the table once.
    by_hand = [
        layers * (12 * d * d + 13 * d) + 2 * d + 100_256 * d for layers, d in ((40, 5632), (40, 10_240), (80, 10_240))
    ]
    assert [num_parameters(model) for model in config.stage_models] == by_hand
    assert by_hand[-1] == pytest.approx(101.7e9, rel=1e-3)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("stage", "index"), [("16b", 0), ("51b", 1)])
def test_a_run_of_one_size_is_that_stage_of_flm_101b(stage, index, machine):
    alone, grown = load("flm_101b", f"{machine},{stage}"), load("flm_101b", machine)
    assert alone.stage_models == (grown.stage_models[index],)
    sizes = dict.fromkeys(("num_layers", "embed_dim", "mlp_dim", "num_heads", "initial_learning_rate"))
    assert alone.stages == (dataclasses.replace(grown.stages[index], growth=alone.stages[0].growth, **sizes),)
    for field in ("optimizer", "data", "mesh", "checkpoint", "seed"):
        assert getattr(alone, field) == getattr(grown, field)
    width = {"16b": 5632, "51b": 10_240}[stage]
    assert alone.model.norm_eps == pytest.approx(1e-5 * 5632 / width, rel=1e-12)


def test_the_proxy_is_the_16b_at_width_256():
    """Like the paper's proxy it has less than 100M parameters."""
    proxy, large = load("flm_proxy"), load("flm_101b", "16b,sawtooth")
    sizes = {"embed_dim": 256, "num_heads": 2, "mlp_dim": 1024, "remat": proxy.model.remat}
    (model,) = proxy.stage_models
    assert dataclasses.replace(large.model, **sizes, vocab_multiple=model.vocab_multiple) == model
    assert (model.width_multiplier, large.model.width_multiplier) == (1, 22)
    assert num_parameters(model) == 40 * (12 * 256**2 + 13 * 256) + 2 * 256 + 100_256 * 256 < 100e6
    assert parse_topology(proxy.mesh.topology).num_devices == 6 * 8
    assert proxy.data == large.data
    layout = {name: getattr(large.stages[0], name) for name in ("mesh", "remat", "microbatches")}
    assert dataclasses.replace(proxy.stages[0], name="16B", **layout) == large.stages[0]


def test_the_price_of_the_proxy_search_is_that_of_its_points():
    words = " ".join(module("flm_proxy").__doc__.split())
    hours, run = 24.6, 82_030  # stated for a point on 48 devices; device-hours of the run, tests/test_plan_full_size.py
    assert f"48 x {hours} = {48 * hours:,.0f} device-hours, {48 * hours / run:.1%} of the {run:,} " in words
    for points in (27, 7):
        total = 48 * points * hours
        assert f"{points} points: {points * hours:,.0f} hours" in words
        assert f"{total:,.0f} device-hours, {total / run:.0%} of the run" in words
    (point,) = stage_costs(load("flm_proxy"))
    assert point.flops / (48 * 32e12 * 3600) == pytest.approx(hours, rel=0.01)  # 32 TFLOP/s of a device


@pytest.mark.parametrize("machine", ["", "cpu"])
def test_eflm_continues_the_16b_stage_of_flm_101b(machine):
    """One vocabulary for the line: the ids of 16B were 100,256 and end with 1432, those of eFLM were others."""
    old, new = load("flm_101b", f"{machine},16b".strip(",")), load("eflm_16b", machine)
    growth = Growth(old.schedule[0].model, new.schedule[0].model, new.stages[0].growth)
    assert growth.old.vocab_size == growth.new.vocab_size
    for field in ("vocabulary", "end_id", "end_of_document"):
        assert getattr(old.data, field) == getattr(new.data, field)


# ---- Tele-FLM --------------------------------------------------------------------------------------------------------


def test_tele_flm_has_the_published_sizes_batch_and_rates():
    config = load("tele_flm_52b")
    small, large = config.stage_models
    # Per layer four projections, three matrices of the MLP and two gains; a final gain; the table and the head.
    by_hand = 64 * (4 * 8192**2 + 3 * 8192 * 21_824 + 2 * 8192) + 8192 + 2 * 80_000 * 8192
    assert num_parameters(small) == by_hand == 52_817_829_888
    assert num_parameters(large) == pytest.approx(102e9, rel=0.005)
    stage = config.stages[0]
    assert stage.batch_size * small.max_length == 5_505_024
    assert (stage.learning_rate, stage.final_learning_rate, stage.warmup_steps) == (1.5e-4, 1.5e-5, 2000)
    assert [cost.tokens for cost in stage_costs(config)] == pytest.approx([2.0e12, 0.3e12], rel=1e-3)
    assert (small.norm, small.activation, small.position, small.rope_theta) == ("rmsnorm", "swiglu", "rope", 10_000)
    assert (small.bias, small.tied_embedding, config.optimizer.weight_decay) == (False, False, 0.0)
    applied = small.output_multiplier / (small.softmax_temperature * small.width_multiplier)
    assert (small.embedding_multiplier, applied) == (1.0, 3.125e-2)


def test_tele_flm_52b_alone_is_the_first_stage_of_both():
    alone, both = load("tele_flm_52b", "52b"), load("tele_flm_52b")
    assert alone == dataclasses.replace(both, stages=both.stages[:1])
    assert [stage.name for stage in both.stages] == ["52B", "102B"]


# ---- strategies of growth --------------------------------------------------------------------------------------------


def test_the_strategies_save_nothing_half_less_and_more():
    none, linear, moderate, aggressive = (saved(load("growth_strategies", name)) for name in STRATEGIES)
    assert none == 0.0
    assert 0.45 <= linear <= 0.55
    assert 0.1 < moderate < 0.45
    assert 0.55 < aggressive < 0.95


def test_the_strategies_docstring_says_what_they_save():
    text = module("growth_strategies").__doc__
    said = {name: float(re.search(rf"^ +{name} .* (\d+\.\d) % ", text, re.MULTILINE)[1]) for name in STRATEGIES}
    assert said == {name: round(100 * saved(load("growth_strategies", name)), 1) for name in STRATEGIES}


def test_the_strategies_differ_in_nothing_but_growth():
    """They end at one model after equal tokens with equal rates."""
    runs = [load("growth_strategies", name) for name in STRATEGIES]
    ends = {tuple(getattr(run.stage_models[-1], size) for size in SIZES) for run in runs}
    assert len(ends) == 1
    assert {sum(cost.tokens for cost in stage_costs(run)) for run in runs} == {983_040}
    for step in range(480):
        assert len({learning_rate(run.stages, step) for run in runs}) == 1
    for run in runs:
        assert all(stage.growth.family == "zero" for stage in run.stages)  # exact
        assert len({model.head_dim for model in run.stage_models}) == 1
        assert run.model.vocab_size == named_tokenizer(run.data.vocabulary, run.data.end_id).vocab_size


def test_the_linear_strategy_grows_in_equal_steps_over_equal_tokens():
    costs = stage_costs(load("growth_strategies", "linear"))
    assert len({cost.tokens for cost in costs}) == 1
    steps = [new.parameters - old.parameters for old, new in itertools.pairwise(costs)]
    assert steps == pytest.approx([sum(steps) / len(steps)] * len(steps), rel=0.05)
