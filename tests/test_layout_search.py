"""The layout search: legal layouts, estimates of their memory and time, and the choice of those that fit."""

import dataclasses
import itertools
from typing import ClassVar

import pytest

from flmjax import cli
from flmjax.config import ConfigError, GrowthConfig, MeshConfig, MeshShape, ModelConfig, RunConfig, StageConfig
from flmjax.config.validate import legal_microbatches, validate_meshes
from flmjax.hardware import A800, GiB
from flmjax.model.flops import num_parameters
from flmjax.planning import layout_search
from flmjax.planning.layout_search import (
    LayoutSearch,
    StageLayout,
    estimates,
    fit,
    flags,
    layout_table,
    memory,
    meshes,
    search_layouts,
    seconds,
    with_layouts,
)
from flmjax.planning.program import Program
from flmjax.planning.roofline import certificate_time, growth_time
from flmjax.planning.topology import USABLE, TooLargeError, Topology

MODEL = ModelConfig(
    num_layers=4, embed_dim=1024, num_heads=8, head_dim=128, mlp_dim=4096, vocab_size=50_304, max_length=2048,
    dtype="bfloat16", attention="fused",
)  # fmt: skip
CONFIG = RunConfig(
    model=MODEL,
    stages=(
        StageConfig("small", steps=100, batch_size=96),
        StageConfig("large", steps=50, batch_size=192, growth=GrowthConfig("zero"), num_layers=8),
    ),
    mesh=MeshConfig(topology="a800:2x8"),
)
SMALL, LARGE = CONFIG.schedule


def machine(usable: float, devices: int = 16, **figures: float) -> Topology:
    """Nodes of 8 A800s with other figures; `usable` GiB of each device are for programs."""
    chip = dataclasses.replace(A800, memory=usable * GiB / USABLE["cuda"], **figures)
    return Topology("a800:2x8", "cuda", chip, devices, node_size=8)


def test_meshes_are_those_that_divide_sizes_and_batches():
    legal = {(mesh.replica, mesh.fsdp, mesh.tensor) for mesh in meshes(LARGE, 96)}
    by_hand = {
        (r, f, t)
        for r, f, t in itertools.product(range(1, 97), range(1, 65), range(1, 9))
        # a batch of 192 over replica x fsdp; width 1024; 8 heads, mlp 4096 and length 2048
        if r * f * t == 96 and 192 % (r * f) == 0 and 1024 % f == 0 and 8 % t == 0
    }
    assert legal == by_hand
    assert len(legal) > 10


def test_microbatches_divide_the_sequences_of_a_data_shard():
    stage = StageConfig(batch_size=96)
    assert legal_microbatches(stage, 8) == [1, 2, 3, 4, 6, 12]
    assert legal_microbatches(stage, 5) == []


def test_microbatches_remat_and_shards_save_memory():
    mesh = MeshShape(1, 8, 2)
    full, dots = (dataclasses.replace(MODEL, remat=remat) for remat in ("full", "dots"))
    assert memory(full, mesh, 24, 4) < memory(full, mesh, 48, 2) < memory(full, mesh, 96, 1)
    assert memory(full, mesh, 48, 2) < memory(dots, mesh, 48, 2)
    assert memory(full, MeshShape(1, 8, 4), 48, 2) < memory(full, mesh, 48, 2)


def test_state_and_gradients_are_cut_over_all_shards():
    parameters = num_parameters(MODEL)
    # Parameters, two moments and gradients in float32, a copy in bfloat16; with microbatches a sum of gradients, too.
    # Beside them a layer's weights, twice, and gradients.
    layer = 12 * 1024**2 * (2 * 2 + 4) / 2
    assert memory(MODEL, MeshShape(2, 8, 2), 0, 1) == pytest.approx(18 * parameters / 16 + layer)
    assert memory(MODEL, MeshShape(2, 8, 2), 0, 3) == pytest.approx(22 * parameters / 16 + layer)
    single = dataclasses.replace(MODEL, dtype="float32")
    layer = 12 * 1024**2 * (2 * 4 + 4) / 2
    assert memory(single, MeshShape(2, 8, 2), 0, 1) == pytest.approx(16 * parameters / 16 + layer)


def test_a_second_forward_pass_takes_the_time_of_its_work():
    fast = machine(70, inter_node=1e18, intra_node=1e18)
    full, dots, none = (
        seconds(dataclasses.replace(MODEL, remat=remat), 96, 1, MeshShape(1, 16, 1), fast)
        for remat in ("full", "dots", "none")
    )
    tokens = 96 * 2048 / 16
    products = 2 * 4 * 12 * 1024**2 * tokens / (312e12 * 0.75)
    between = 40 * 1024 * 4 * tokens / (2039e9 * 0.8)
    attention = 2 * 4 * 1024 * 2048 * tokens / (312e12 * 0.5)
    assert full - dots == pytest.approx(products, rel=1e-6)
    assert dots - none == pytest.approx(between + attention, rel=1e-6)


def test_microbatches_and_remat_take_time():
    full, dots = (dataclasses.replace(MODEL, remat=remat) for remat in ("full", "dots"))
    slow = machine(70, inter_node=1e9)  # a network that nothing can hide

    def step(model, microbatches):
        return seconds(model, 96, microbatches, MeshShape(1, 16, 1), slow)

    assert step(dots, 1) < step(full, 1) < step(full, 3)
    # Weights go out twice with 2 bytes and gradients come back with 4 in every microbatch.
    moved = (2 * 2 + 4) * 4 * 12 * 1024**2 * 15 / 16 / (8e9 * 0.75)
    assert step(full, 3) - step(full, 2) == pytest.approx(moved, rel=1e-6)


def test_estimates_are_sorted_by_time():
    layouts = estimates(LARGE, machine(14.5))
    assert [layout.seconds for layout in layouts] == sorted(layout.seconds for layout in layouts)
    assert {layout.remat for layout in layouts} == {"none", "dots", "full"}


def test_estimated_memory_is_at_most_a_tenth_too_large():
    most = 0.0
    for layout in estimates(LARGE, machine(12)):
        config = with_layouts(CONFIG, {1: layout})
        assert validate_meshes(config, 16)[1] == layout.mesh
        model = config.schedule[1].model
        assert (model.remat, model.attention) == (layout.remat, "fused")
        sequences = LARGE.config.batch_size // layout.microbatches
        most = max(most, memory(model, layout.mesh, sequences, layout.microbatches))
    assert 12 * GiB < most < 1.1 * 12 * GiB


def test_no_layout_that_may_fit_is_an_error():
    with pytest.raises(ConfigError, match=r"stages\[1\] \(large\): no mesh of 16 devices"):
        estimates(LARGE, machine(0.1))
    with pytest.raises(ConfigError, match="no mesh of 7 devices"):
        estimates(LARGE, machine(14.5, devices=7))


def program(peak: float, name: str) -> Program:
    return Program(name, "take more", 0, 0, 0, 0, int(peak * GiB), 1e14, (), 0, 0.0)


class FakeCompiler:
    """Steps of 60 GiB over the number of microbatches, twice that for the second stage."""

    compiled: ClassVar[list] = []
    is_exact = True

    def __init__(self, config, topology):
        self.config, self.topology = config, topology

    def attention(self, _):
        return "cudnn"

    def mesh_shape(self, stage):
        mesh = stage.layout.mesh
        return MeshShape(mesh.replica, mesh.fsdp, mesh.tensor)

    def step(self, stage):
        count = stage.config.microbatches
        assert stage.layout.microbatches == count
        assert stage.layout.attention == "fused"
        self.compiled.append((stage.index, count))
        if count == 1 and stage.index == 1:
            raise TooLargeError(f"{stage.name} needs 44G")
        return program(60 * (stage.index + 1) / count, stage.name)

    def growth(self, stage):
        meshes = tuple(self.mesh_shape(x) for x in (stage.previous, stage))
        self.compiled.append(("growth", stage.index, *meshes))
        return program(10, f"growth into {stage.name}")

    def certificate(self, stage):
        return program(32.0, f"certificate of {stage.name}")


@pytest.fixture(autouse=True)
def forget_compiled(monkeypatch):
    monkeypatch.setattr(FakeCompiler, "compiled", [])


LAYOUT = StageLayout(MeshShape(1, 8, 2), "full", 1, seconds=9.0)


def fitted(layout: StageLayout, usable: float, compiler=FakeCompiler, log=print) -> StageLayout:
    return fit(LARGE, layout, compiler(CONFIG, machine(usable)), log)


def test_microbatches_increase_until_the_step_fits():
    lines = []
    layout = fitted(LAYOUT, 35.0, log=lines.append)
    assert (layout.microbatches, layout.peak) == (4, 30 * GiB)
    assert layout.seconds != 9.0
    assert FakeCompiler.compiled == [(1, 1), (1, 2), (1, 3), (1, 4)]
    assert lines[0].startswith("  2 microbatches: 60.0 GiB, ")


def test_microbatches_never_decrease():
    assert fitted(dataclasses.replace(LAYOUT, microbatches=6), 35.0).microbatches == 6
    assert FakeCompiler.compiled == [(1, 6)]


def test_a_step_that_never_fits_is_named():
    class Refusing(FakeCompiler):
        def step(self, stage):
            raise TooLargeError(f"{stage.name} needs 44G")

    with pytest.raises(TooLargeError, match=r"^large needs 5\.0 GiB a device; .*: take more"):
        fitted(LAYOUT, 1.0)
    with pytest.raises(TooLargeError, match=r"^large needs 44G"):
        fitted(LAYOUT, 35.0, Refusing)


def search(monkeypatch, compiler=FakeCompiler, config=CONFIG, log=print, tries=2):
    monkeypatch.setattr(layout_search, "Compiler", compiler)
    return search_layouts(config, log, tries)


def test_a_search_compiles_until_enough_layouts_of_every_stage_fit(monkeypatch):
    lines = []
    result = search(monkeypatch, log=lines.append)
    topology = machine(USABLE["cuda"] * 80)
    for stage, layouts, best in zip(CONFIG.schedule, result.stages, result.best, strict=True):
        assert [x.seconds for x in layouts] == sorted(x.seconds for x in layouts)
        assert {x.mesh for x in layouts} == {x.mesh for x in estimates(stage, topology)[:2]}
        assert best == layouts[0]
    assert result.tried == 4
    assert result.possible == sum(len(estimates(stage, topology)) for stage in CONFIG.schedule)
    steps = sum(n * x.seconds for n, x in zip((100, 50), result.best, strict=True))
    growth = growth_time(topology.chip, program(10, "growth"))
    certificate = certificate_time(topology.chip, program(32.0, "certificate"), CONFIG.schedule[1].model)
    assert certificate > 1
    assert result.days == pytest.approx((steps + growth + certificate) / 86_400)
    assert result.peak == max(32 * GiB, *(x.peak for x in result.best))
    text = layout_table(result, ["small", "large"])
    assert f"compiled: 4 of {result.possible} layouts that may fit" in text
    assert text.count("taken") == 2
    assert sum(line.startswith("large: replica") for line in lines) == 2


def test_updates_that_tune_a_growth_count(monkeypatch):
    last = dataclasses.replace(CONFIG.stages[1], growth=GrowthConfig("learned", tuning_steps=50))
    learned = search(monkeypatch, config=dataclasses.replace(CONFIG, stages=(CONFIG.stages[0], last)))
    plain = search(monkeypatch)
    assert learned.best == plain.best
    assert learned.days - plain.days == pytest.approx(50 * plain.best[1].seconds / 86_400)


@pytest.mark.parametrize("kind", ["growth", "certificate", "refusal"])
def test_growths_of_the_fastest_layouts_must_fit(monkeypatch, kind):
    """The second fastest layouts are taken where the growth between the fastest does not fit."""
    refused: list[MeshShape] = []

    class Fake(FakeCompiler):
        def too_large(self, stage):
            refused.append(self.mesh_shape(stage))
            return refused[0] == refused[-1]

        def growth(self, stage):
            if kind == "certificate" or not self.too_large(stage):
                return super().growth(stage)
            if kind == "refusal":
                raise TooLargeError("growth needs 44G")
            return program(80, f"growth into {stage.name}")

        def certificate(self, stage):
            large = kind == "certificate" and self.too_large(stage)
            return program(80 if large else 32, f"certificate of {stage.name}")

    lines = []
    result = search(monkeypatch, Fake, log=lines.append)
    assert result.best[1].mesh != refused[0]
    assert any("needs 80.0 GiB" in line or "needs 44G" in line for line in lines)


def test_a_growth_is_compiled_once_for_its_meshes(monkeypatch):
    class Never(FakeCompiler):
        def certificate(self, stage):
            return program(80.0, f"certificate of {stage.name}")

    with pytest.raises(ConfigError, match=r"have growths that do not; of the last ones, certificate of large needs 80"):
        search(monkeypatch, Never, tries=3)
    growths = [entry for entry in FakeCompiler.compiled if entry[0] == "growth"]
    assert growths
    assert len(growths) == len(set(growths))


def test_a_search_without_a_result_gives_the_reason(monkeypatch):
    class Never(FakeCompiler):
        def step(self, stage):
            return program(80.0, stage.name)

    reason = r"none of the \d+ layouts of stage small that may fit a800:2x8 does; of the last one, small needs 80\.0"
    with pytest.raises(ConfigError, match=reason):
        search(monkeypatch, Never)
    with pytest.raises(ConfigError, match=r"model\.vocab_size is None"):
        search_layouts(dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=None)))
    with pytest.raises(ConfigError, match=r"mesh\.topology is None"):
        search_layouts(dataclasses.replace(CONFIG, mesh=MeshConfig()))


def test_without_the_machines_compiler_no_layout_is_said_to_fit(monkeypatch):
    class OnFakeDevices(FakeCompiler):
        is_exact = False

    with pytest.raises(ConfigError, match=r"compiler of a800:2x8 is missing.*pip install 'flmjax\[plan-gpu\]'"):
        search(monkeypatch, OnFakeDevices)


def test_the_flags_of_a_layout_make_its_config():
    layouts = (
        StageLayout(MeshShape(3, 64, 1), "dots", 2, 10.0, int(50 * GiB)),
        StageLayout(MeshShape(3, 32, 2), "full", 3, 11.0, int(51 * GiB)),
        StageLayout(MeshShape(3, 16, 4), "full", 5, 12.5, int(52 * GiB)),
    )
    result = LayoutSearch(tuple((x,) for x in layouts), layouts, 20.0, int(52 * GiB), possible=9, tried=3)
    text = layout_table(result, ["16B", "51B", "101B"])
    row = "101B replica 3 x fsdp 16 x tensor 4 full 5 12.5 s 52.0 GiB taken"
    assert text.splitlines()[3].split() == row.split()
    assert text.splitlines()[-1] == flags(layouts)
    words = [flag.strip("'") for flag in flags(layouts).split()]
    _, config, _, _ = cli.parse(["plan", "--config=configs/flm_101b.py", *words])
    assert config.stages == with_layouts(config, dict(enumerate(layouts))).stages
    assert validate_meshes(config, 192) == tuple(layout.mesh for layout in layouts)
