"""Ahead-of-time compilation: the planned programs are those that train, and refusals of compilers are explained."""

import dataclasses
import re
import sys

import jax
import pytest

from flmjax.config import (
    ConfigError,
    DataConfig,
    GrowthConfig,
    MeshConfig,
    MeshShape,
    ModelConfig,
    RunConfig,
    SpikeConfig,
    StageConfig,
)
from flmjax.hardware import A800
from flmjax.planning import compile as compile_module
from flmjax.planning.compile import Compiler, compile_program, teachers_of
from flmjax.planning.topology import TooLargeError, Topology, parse_topology
from flmjax.sharding.mesh import make_mesh
from flmjax.training import growth_point, loop, start, step
from flmjax.training.state import state_spec

TINY = ModelConfig(num_layers=2, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=64, max_length=32)


@pytest.fixture
def lowering(monkeypatch):
    """Makes Compilers for this process's eight CPU devices; instead of a Program they give its lowered text."""
    monkeypatch.setattr(compile_module, "devices_of", lambda _: jax.devices())
    monkeypatch.setattr(
        compile_module, "compile_program", lambda program, arguments, *_, **__: program.lower(*arguments).as_text()
    )
    topology = Topology("cpu", "cuda", A800, num_devices=8, node_size=4)
    return lambda config: Compiler(config, topology)


TASKS = """
import tensorflow as tf
import seqio
from flmjax.data.sources.seqio_tasks import TEXT, add_text_task, local_files_source

def judged(split, shuffle_files=False, seed=None):
    numbers = tf.data.Dataset.range(300)
    text = lambda i: tf.strings.join([tf.strings.as_string(i), " is a number"])
    return numbers.map(lambda i: {"targets": text(i), "judgement": i % 2 == 0})

add_text_task("plan_text", local_files_source({"train": "text.txt"}))
source = seqio.FunctionDataSource(judged, splits=("train",))
seqio.TaskRegistry.add("plan_judged", source, preprocessors=[], output_features={"targets": TEXT})
seqio.MixtureRegistry.add("plan_mixture", [("plan_text", 1.0), ("plan_judged", 1.0)])
"""


@pytest.mark.parametrize(
    "data",
    [
        {"sources": ("text.txt",)},
        {"sources": ("text.txt",), "document_attention": True},
        {"mixture": "plan_mixture", "task_module": "plan_tasks"},
    ],
    ids=["text", "document_attention", "mixture_with_teachers"],
)
def test_the_planned_programs_are_those_that_train(data, lowering, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n\n".join(f"some text, number {i}, and more of it" for i in range(300)))
    (tmp_path / "plan_tasks.py").write_text(TASKS)
    mask = GrowthConfig("mask", ramp_steps=1, rate_policy="stage", new_warmup_fraction=0.5)
    config = RunConfig(
        model=dataclasses.replace(TINY, dropout=0.1, remat="full"),
        stages=(
            StageConfig("small", steps=1, batch_size=8),
            StageConfig("large", steps=2, batch_size=16, microbatches=2, growth=mask, num_layers=3, embed_dim=48),
        ),
        data=DataConfig(vocabulary="bytes", **data),
        mesh=MeshConfig(2, 2, 2),
        evaluation_rows=8,
        # The step that skips takes one argument more, and the step of a run that writes norms returns them.
        spike=SpikeConfig("skip" if "mixture" in data else "none"),
        norms_every=None if "mixture" in data else 2,
    )
    lowered = []

    def spy(function):
        def recorded(*arguments):
            program = function(*arguments)

            def call(*values):
                lowered.append(program.lower(*values).as_text())
                return program(*values)

            return call

        return recorded

    monkeypatch.setattr(loop, "jit_stage_step", spy(loop.jit_stage_step))
    monkeypatch.setattr(growth_point, "jit_growth", spy(growth_point.jit_growth))
    start.train(config, tmp_path / "run")
    small, growth, masked, _ = lowered
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=257))
    compiler = lowering(config)
    first, second = config.schedule
    assert compiler.step(first) == small
    assert compiler.growth(second) == growth
    assert compiler.step(second) == masked


@pytest.mark.parametrize(
    ("data", "has_teachers"),
    [
        (DataConfig(), False),
        (DataConfig(sources=(), teachers=("hsk_levels",)), True),
        (DataConfig(mixture="flm_c4"), False),
        (DataConfig(mixture="super_glue_judgements"), True),
        (DataConfig(mixture="eflm_c4"), True),
        (DataConfig(mixture="c4_en"), False),
    ],
    ids=["text", "teachers", "text_mixture", "teacher_mixture", "both", "task"],
)
def test_a_mixture_has_the_teachers_of_its_tasks(data, has_teachers):
    """None of these data sets is on the machine."""
    assert teachers_of(data) == (has_teachers, ())


def test_a_mixture_with_teachers_is_planned_as_teachers_are(lowering):
    def step(**data):
        config = RunConfig(
            model=dataclasses.replace(TINY, vocab_size=64),
            stages=(StageConfig(batch_size=8),),
            data=DataConfig(**data),
            mesh=MeshConfig(2, 2, 2),
        )
        return lowering(config).step(config.schedule[0])

    teachers = step(mixture="eflm_c4")
    assert teachers == step(teachers=("hsk_levels",))
    assert teachers != step(mixture="flm_c4") == step()


def test_an_unknown_kind_of_data_is_a_remark(monkeypatch):
    from flmjax.data.sources import seqio_tasks as tasks

    source = tasks.seqio.TfdsDataSource("not_prepared:1.0.0", splits=("train",))
    tasks.seqio.TaskRegistry.add("plan_foreign", source, preprocessors=[], output_features={"targets": tasks.TEXT})
    has_teachers, (remark,) = teachers_of(DataConfig(mixture="plan_foreign"))
    assert not has_teachers
    assert re.search("'plan_foreign': only its data set can tell .*; the plan assumes text without teachers", remark)
    monkeypatch.setitem(sys.modules, "seqio", None)
    for module in ("seqio_tasks", "seqio_mixture"):
        monkeypatch.delattr(f"flmjax.data.sources.{module}")
        monkeypatch.delitem(sys.modules, f"flmjax.data.sources.{module}")
    has_teachers, (remark,) = teachers_of(DataConfig(mixture="eflm_c4"))
    assert not has_teachers
    assert re.search(r"pip install 'flmjax\[data\]'; the plan assumes text without teachers", remark)


def test_a_mixture_that_is_not_registered_is_refused():
    with pytest.raises(
        ConfigError, match=r"data\.mixture: there is no Task or Mixture 'eflm_c5'; did you mean eflm_c4"
    ):
        teachers_of(DataConfig(mixture="eflm_c5"))


@pytest.mark.parametrize("overlap", [True, False])
def test_the_planned_step_has_the_compiler_options_of_training(lowering, monkeypatch, overlap):
    """XLA refuses an option that it does not know: both compile with the options of compiler_options."""
    seen = []

    def options(*arguments):
        seen.append(arguments)
        return {"xla_unheard_of": True}

    monkeypatch.setattr(step, "compiler_options", options)
    config = RunConfig(
        model=dataclasses.replace(TINY, vocab_size=64),
        stages=(StageConfig(batch_size=8),),
        mesh=MeshConfig(2, 2, 2),
        overlap_collectives=overlap,
        deterministic=not overlap,
    )
    monkeypatch.setattr(compile_module, "compile_program", lambda program, arguments, *_, **__: (program, arguments))
    program, arguments = lowering(config).step(config.schedule[0])
    for call in (lambda: program.lower(*arguments).compile(), lambda: next(one_update(config, program, arguments))):
        with pytest.raises(Exception, match="No such compile option: 'xla_unheard_of'"):
            call()
    assert seen == [("cpu", overlap, not overlap)] * 2


def one_update(config, program, arguments):
    """The first update of a stage as training makes it, with the abstract state's zeros."""
    state, batch, _ = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), arguments)
    spec = state_spec(config.schedule[0].model, config.optimizer, make_mesh(MeshShape(2, 2, 2), jax.devices()))
    return loop.run_stage(state, spec, config.schedule[0], lambda _: 1e-3, iter([batch]))


# ---- refusals of compilers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "index", "change", "words"),
    [
        ("step", 0, {}, r"stages\[0\] \(small\) needs .*: take stages\[0\]\.microbatches=3$"),
        ("step", 1, {"remat": "dots"}, r"stages\[1\] \(middle\) needs .*: take model\.remat='full'$"),
        ("growth", 1, {}, r"growth small -> middle needs .*: take more devices along fsdp or tensor$"),
        ("certificate", 2, {}, r"the certificate of growth middle -> large needs .*: take more devices"),
    ],
    ids=str,
)
def test_a_compilers_refusal_names_the_program_and_its_remedy(monkeypatch, kind, index, change, words):
    """A TPU's compiler makes no program that does not fit."""

    class TooLarge:
        def lower(self, *_):
            raise RuntimeError(
                "RESOURCE_EXHAUSTED: bla: HLO temporaries (44.71G) exceeds available HBM (31.25G) by 13G\nmore"
            )

    for name in ("jit_stage_step", "jit_growth", "jit_comparison"):
        monkeypatch.setattr(compile_module, name, lambda *_, **__: TooLarge())
    monkeypatch.setattr(compile_module, "devices_of", lambda _: jax.devices())
    names = ("small", "middle", "large")
    config = RunConfig(
        model=dataclasses.replace(TINY, vocab_size=64, remat="full"),
        stages=tuple(StageConfig(name, batch_size=96, microbatches=2) for name in names),
        mesh=MeshConfig(1, 8, 1),
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    compiler = Compiler(config, parse_topology("v6e:2x4"))
    with pytest.raises(TooLargeError, match=words) as refusal:
        getattr(compiler, kind)(config.schedule[index])
    assert "needs 44.71GiB a device, of 31.25GiB, says the compiler of v6e:2x4" in str(refusal.value)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            "cuDNN not found.",
            ConfigError,
            "cuDNN is missing: pip install 'flmjax[plan-gpu]', or model.attention='plain'",
        ),
        (
            "RESOURCE_EXHAUSTED: bla: HLO temporaries (1.07T) exceeds available HBM (31.25G) by 1.1T\nmore",
            TooLargeError,
            "x needs 1.07TiB a device, of 31.25GiB, says the compiler of v6e:16x16: take less",
        ),
        ("INTERNAL: line\nline two", ConfigError, "v6e:16x16: its compiler failed: INTERNAL: line line two"),
    ],
    ids=["cuDNN", "memory", "other"],
)
def test_errors_of_compilers_are_explained(error, kind, words):
    class Failing:
        def lower(self):
            raise RuntimeError(error)

    with pytest.raises(kind) as explained:
        compile_program(Failing(), (), parse_topology("v6e:16x16"), name="x", advice="take less")
    assert str(explained.value) == words
