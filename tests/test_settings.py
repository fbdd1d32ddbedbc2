"""Values of settings: every number has a range, paths and lists are taken as they are typed, ~ is the home folder."""

import dataclasses
import typing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from flmjax import cli
from flmjax.config import (
    ConfigError,
    DataConfig,
    GrowthConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    StageMeshConfig,
    differences,
    override,
    refuse_unread,
)
from flmjax.config.validate import constraints, validate
from flmjax.config.values import Range
from flmjax.model.positions import rotation

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = f"--config={CONFIGS}/quickstart.py"


def set_by(*flags: str) -> RunConfig:
    """The quickstart with settings by flag."""
    return cli.parse(["train", QUICKSTART, "--workdir=w", *(f"--config.{flag}" for flag in flags)]).config


def refusal(*flags: str) -> str:
    with pytest.raises(ConfigError) as refused:
        set_by(*flags)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


# ---- numbers ---------------------------------------------------------------------------------------------------------


def numbers(cls: type = RunConfig, path: str = "") -> dict[str, tuple[type, list[Range]]]:
    """{path: (int or float, its ranges)} of every numeric field below a dataclass, entries of tuples too."""
    fields = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        plain = typing.get_type_hints(cls)[name]
        types = {plain, *typing.get_args(plain)} | {a for arg in typing.get_args(plain) for a in typing.get_args(arg)}
        settings = [t for t in types if dataclasses.is_dataclass(t)]
        if settings:
            fields |= numbers(settings[0], f"{path}{name}{'[0]' if plain is not settings[0] else ''}.")
        elif numeric := types & {int, float}:
            (number,) = numeric
            fields[path + name] = number, [c for c in constraints(hint) if isinstance(c, Range)]
    return fields


NUMBERS = numbers()


def test_every_numeric_setting_has_one_range():
    assert len(NUMBERS) > 50
    assert [path for path, (_, ranges) in NUMBERS.items() if len(ranges) != 1] == []
    defaults = [
        getattr(cls(), field.name) for cls in (ModelConfig, OptimizerConfig) for field in dataclasses.fields(cls)
    ]
    assert sum(isinstance(value, int | float) and not isinstance(value, bool) for value in defaults) > 20
    validate(RunConfig())


@pytest.mark.parametrize("path", NUMBERS)
def test_a_number_outside_its_range_is_refused_by_name(path):
    number, (allowed,) = NUMBERS[path]
    if number is int:
        outside = [allowed.low - 1, allowed.high + 1, 10**21, -(10**400), 10**5000]
    else:
        outside = [float("nan"), float("inf"), -float("inf"), -1.0, 1e300, 10**400, 10**5000]
    run = RunConfig()
    for value in outside:
        name = f"{path}[0]" if path.endswith("mixture_weights") else path
        changed = override(run, path, (value,) if name != path else value)
        with pytest.raises(ConfigError) as refused:
            validate(changed)
        assert name in str(refused.value)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["stages[0].embed_dim=0"], "stages[0].embed_dim=0 must be positive"),
        (["model.num_layers[0]=3"], "config.model.num_layers has no entries"),
        (["optimizer.learning_rate=5"], "has no field 'learning_rate'; did you mean config.stages[0].learning_rate?"),
        (["data.seed=5"], "config.data has no field 'seed'; did you mean config.seed?"),
        (["stages[0].growth.learning_rate=rewarm"], "it is called rate_policy now"),
        (["optimizer.max_nonfinite_updates=5"], "max_skipped_updates"),
        (["=5"], "config.: '' names no field"),
        ([".seed=5"], "'' names no field"),
        (["stages[01].steps=5"], "'stages[01]' names no field; a setting is NAME.NAME or NAME[0].NAME"),
        (["stages[-1].steps=5"], "'stages[-1]' names no field"),
        (["stages[].steps=5"], "'stages[]' names no field"),
        (["stages[9].steps=5"], "there is no stages[9], the last one is stages[2]; a config file adds a stage"),
        (["stages.steps=5"], "config.stages has no field 'steps'; name an entry: config.stages[0]"),
        (["stages[0]=5"], "config.stages[0] is no single setting; set a field of config.stages[0]: name, steps"),
        (["stages=5"], "set a field of config.stages[0]: name, steps"),
        (["model=5"], "set a field of config.model: num_layers"),
        (["model.num_layers.x=5"], "config.model.num_layers has no field 'x'"),
        (["data.sources[0]=x"], "config.data.sources has no entries"),
        (["model.embedding_multiplier=nan"], "must be a finite number"),
        (["model.output_multiplier=0"], "model.output_multiplier=0.0 must be positive"),
        (["model.output_multiplier=-1"], "must be positive"),
        (["optimizer.weight_decay=1e400"], "optimizer.weight_decay=inf must be a finite number"),
        (["optimizer.eps=1e-60"], "optimizer.eps=1e-60 must be at least 1.1754944e-38"),
        (["optimizer.b2=0.99999999"], "must lie in [0, 0.99999994]"),
        (["peak_flops=0"], "peak_flops=0.0 must be positive"),
        (["peak_flops=-0.5"], "peak_flops=-0.5 must be positive"),
        (["seed=-1"], "seed=-1 must lie in [0, 4294967295]"),
        (["seed=4294967296"], "seed=4294967296 must lie in [0, 4294967295]"),
        (["seed=9223372036854775808"], "must lie in [0, 4294967295]"),
        (["seed=1e21"], "config.seed must be of type int, not '1e21'"),
        (["seed=" + "9" * 5000], "config.seed must be of type int"),
        (["stages[0].steps=3000000000"], "stages[0].steps=3000000000 must be at most 2147483647"),
        ([f"stages[{i}].steps=1000000000" for i in range(3)], "stages have 3000000000 steps; at most 2147483647"),
        (["model.num_layers=0", "optimizer.eps=0"], "model.num_layers=0 must be positive; optimizer.eps=0.0 must be"),
        (["model.norm=rms", "optimizer.b1=1"], "did you mean rmsnorm?; choices: layernorm, rmsnorm; optimizer.b1=1.0"),
        (["stages[1].schedule=wds"], "did you mean wsd?; choices: constant, cosine, wsd"),
        (["model.vocab_size=one"], "config.model.vocab_size must be of type int, not 'one'"),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) else None,
)
def test_a_setting_that_cannot_be_is_one_line(flags, words):
    """Values of "flags", which JAX would take (jax-ml/jax#27282: seeds of 2**32 and 0 are one seed)."""
    assert words in refusal(*flags)


@pytest.mark.parametrize(
    ("config", "path", "cure"),
    [
        ("flm_101b.py", "mesh.fsdp=8", "stages[0].mesh.fsdp"),
        ("flm_101b.py", "mesh.tensor=8", "stages[0].mesh.tensor"),
        ("flm_101b.py:51b", "model.remat=none", "stages[0].remat"),
    ],
)
def test_a_setting_that_every_stage_states_is_refused_for_the_run(config, path, cure, capsys):
    """It would change nothing; `plan` with it printed the days of another mesh."""
    assert cli.main(["plan", "--cost-only", f"--config={CONFIGS}/{config}", f"--config.{path}"]) == 2
    error = capsys.readouterr().err.strip()
    path = path.partition("=")[0]
    assert error == f"flmjax: config.{path} is not read: the stages state their own; set config.{cure}"


def test_a_setting_is_read_where_one_stage_states_none():
    stages = (StageConfig(mesh=StageMeshConfig(tensor=2), remat="full"), StageConfig(num_layers=3))
    for path in ("mesh.tensor", "mesh.fsdp", "model.remat", "model.num_layers"):
        refuse_unread([RunConfig(stages=stages)], path)
    config = RunConfig(stages=(StageConfig(num_layers=3),))
    with pytest.raises(ConfigError, match=r"model.num_layers is not read.*stages\[0\].num_layers"):
        refuse_unread([config, config], "model.num_layers")
    for pair in ((config, RunConfig()), (RunConfig(), config)):  # the command states or takes back the stage's
        refuse_unread(pair, "model.num_layers")


def test_the_smallest_and_the_largest_seed_are_legal():
    assert [set_by(f"seed={seed}").seed for seed in (0, 2**32 - 1)] == [0, 2**32 - 1]


def test_numbers_of_numpy_are_numbers():
    config = validate(RunConfig(seed=np.int64(3), optimizer=OptimizerConfig(eps=np.float32(0.5))))
    assert (type(config.seed), type(config.optimizer.eps)) == (int, float)


@pytest.mark.parametrize(
    ("base", "dtype"), [(512.0, "float32"), (512.0, "bfloat16"), (1.0, "float32"), (9e6, "float32")]
)
def test_xpos_is_refused_where_its_scales_leave_float32(base, dtype):
    """Up to the limit that the refusal names, the scales are finite and none is 0; a little beyond they are not."""
    model = ModelConfig(max_length=2**31 - 1, xpos_scale_base=base, dtype=dtype)
    with pytest.raises(ConfigError, match=r"max_length=2147483647 is too long .* above (\d+) tokens") as refused:
        validate(RunConfig(model=model))
    longest = int(str(refused.value).split("above ")[1].split(" tokens")[0])
    assert longest == pytest.approx(2 * 69.7 * base, rel=0.02)
    for length, is_legal in ((longest, True), (int(longest * 1.03) + 4, False)):
        model = dataclasses.replace(model, max_length=length)
        tables = rotation(model, jnp.array([[0, length // 2, length - 1]]))
        assert all(bool(jnp.isfinite(table).all()) for table in tables) == is_legal
        if is_legal:
            validate(RunConfig(model=model))
        else:
            with pytest.raises(ConfigError, match="is too long for xPos"):
                validate(RunConfig(model=model))
    validate(RunConfig(model=dataclasses.replace(model, position="rope")))


# ---- text, paths, lists ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("my folder", ("my folder",)),
        ("2024", ("2024",)),
        ("1e5", ("1e5",)),
        ("en,zh", ("en", "zh")),
        ("en, zh", ("en", "zh")),
        ("/d/a,/d/b", ("/d/a", "/d/b")),
        ('["a","b"]', ("a", "b")),
        ("('a',)", ("a",)),
        ('"a"', ("a",)),
        ("a", ("a",)),
        ("None", ("None",)),
        ("a'b", ("a'b",)),
        ("[ab]*.txt", ("[ab]*.txt",)),
        ("(draft).txt", ("(draft).txt",)),
        ("with,comma", ("with,comma",)),
        ("with,comma/*.txt", ("with,comma/*.txt",)),
        ("~/texts,~/more", ("HOME/texts", "HOME/more")),
        ("文本", ("文本",)),
    ],
)
def test_sources_are_paths_as_they_are_typed(text, sources, tmp_path, monkeypatch):
    """Commas part them, unless the path exists."""
    (tmp_path / "with,comma").mkdir()
    (tmp_path / "with,comma" / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/reader")
    sources = tuple(source.replace("HOME", "/home/reader") for source in sources)
    assert set_by(f"data.sources={text}").data.sources == sources
    assert set_by(f"data.teachers={text}", "data.sources=(x)").data.teachers == sources


def test_tuples_of_numbers_and_flags_that_repeat():
    assert set_by("data.sources=a", "data.sources=b").data.sources == ("a", "b")
    assert set_by("data.sources=a", "data.teachers=()").data.teachers == ()
    for weights in ("1,2", "(1,2)", "[1, 2.0]", "1, 2"):
        assert set_by("data.sources=a,b", f"data.mixture_weights={weights}").data.mixture_weights == (1.0, 2.0)
        stages = set_by("data.sources=a,b", f"stages[1].mixture_weights={weights}").stages
        assert [stage.mixture_weights for stage in stages] == [None, (1.0, 2.0), None]
    assert set_by("data.mixture_weights=None").data.mixture_weights is None
    assert set_by("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("data.sources=", "a word is empty"),
        ("data.sources=en,,zh", "config.data.sources='en,,zh': a word is empty"),
        ("data.sources=(2024,)", "config.data.sources[0] must be of type str, not 2024"),
        ("data.mixture_weights=1,two", "config.data.mixture_weights[1] must be of type float, not 'two'"),
        ("data.mixture_weights='x'", "must be of type float"),
    ],
)
def test_a_list_that_cannot_be_is_one_line(flag, words):
    assert words in refusal(flag)


def test_a_text_that_may_be_none_can_stand_in_quotes():
    assert set_by("data.directory=2024").data.directory == "2024"
    assert set_by("data.directory='None'").data.directory == "None"
    assert set_by("data.directory=None").data.directory is None
    assert set_by("sample_prompt='quoted'").sample_prompt == "'quoted'"


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from flmjax.config import *\ndef get_config():\n    return RunConfig(seed=4)\n")
    flags = ["--config=~/mine.py", "--config.data.directory=~/d", "--config.data.vocabulary=~/v.model"]
    teachers = "--config.data.teachers=pairs:~/p,~/q.jsonl"
    line = cli.parse(["grow", *flags, teachers, "--workdir=~/runs/x", "--source=~/runs/y"])
    assert (line.config.seed, line.workdir) == (4, tmp_path / "runs" / "x")
    assert line.options["source"] == str(tmp_path / "runs" / "y")
    assert line.config.data.directory == f"{tmp_path}/d"
    assert line.config.data.vocabulary == f"{tmp_path}/v.model"
    assert line.config.data.teachers == (f"pairs:{tmp_path}/p", f"{tmp_path}/q.jsonl")
    assert cli.parse(["plan", "--config=~/mine.py", "--output=~/p"]).options["output"] == f"{tmp_path}/p"
    assert DataConfig(sources=["~/a"]).sources == (f"{tmp_path}/a",)


# ---- schedules and differences ---------------------------------------------------------------------------------------


def test_a_schedule_default_equals_none_for_a_resumed_run():
    default = {"learning_rate": 1e-3, "final_learning_rate": 0.0, "warmup_steps": 0, "schedule": "cosine"}
    old, new = (RunConfig(stages=(StageConfig(**fields), StageConfig(name="b", **fields))) for fields in (default, {}))
    assert differences(old, new) == differences(new, old) == []
    faster = RunConfig(stages=(StageConfig(learning_rate=2e-3), StageConfig(name="b")))
    assert differences(old, faster) == ["stages[0].learning_rate: 0.001 -> 0.002"]


def test_a_stage_that_starts_a_schedule_takes_the_defaults():
    new = GrowthConfig(rate_policy="stage")
    stages = (StageConfig(learning_rate=2e-3), StageConfig(name="b", warmup_steps=3, growth=new))
    rates = [stage.schedule_settings for stage in validate(RunConfig(stages=stages)).stages]
    assert [(rate.learning_rate, rate.warmup_steps, rate.schedule) for rate in rates] == [
        (2e-3, 0, "cosine"),
        (1e-3, 3, "cosine"),
    ]
    with pytest.raises(ConfigError, match=r"learning_rate=0.001 must be at least final_learning_rate=0.002"):
        validate(RunConfig(stages=(StageConfig(final_learning_rate=2e-3),)))


def test_stages_that_differ_in_number_are_compared_one_by_one():
    """The message names the stage and not all fields of it."""
    two = RunConfig(stages=(StageConfig(name="a"), StageConfig(name="b")))
    three = RunConfig(stages=(StageConfig(name="a", steps=7), *two.stages[1:], StageConfig(name="c")))
    assert differences(two, three) == ["stages[0].steps: 100 -> 7", "stages[2]: None -> stage 'c'"]
    many = RunConfig(data=DataConfig(sources=tuple(map(str, range(1000)))))
    assert len("".join(differences(two, many))) < 500
