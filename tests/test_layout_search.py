"""The layout search: legal layouts, estimates of their memory and time, and the choice of those that fit."""

import dataclasses
import itertools
from typing import ClassVar

import pytest

from flmjax import cli
from flmjax.config import ConfigError, GrowthConfig, MeshConfig, MeshShape, ModelConfig, RunConfig, StageConfig
from flmjax.config.validate import legal_microbatches, validate_mesh
from flmjax.hardware import A800, GiB
from flmjax.model.flops import num_parameters
from flmjax.planning import layout_search
from flmjax.planning.layout_search import (
    Candidate,
    LayoutSearch,
    estimates,
    fit,
    growth_peak,
    layout_table,
    memory,
    meshes,
    search_layouts,
    seconds,
)
from flmjax.planning.program import Program
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


def machine(usable: float, devices: int = 16, **figures: float) -> Topology:
    """Nodes of 8 A800s with other figures; `usable` GiB of each device are for programs."""
    chip = dataclasses.replace(A800, memory=usable * GiB / USABLE["cuda"], **figures)
    return Topology("a800:2x8", "cuda", chip, devices, node_size=8)


def test_meshes_are_those_that_divide_sizes_and_batches():
    legal = {(mesh.replica, mesh.fsdp, mesh.tensor) for mesh in meshes(CONFIG, 96)}
    by_hand = {
        (r, f, t)
        for r, f, t in itertools.product(range(1, 97), range(1, 65), range(1, 9))
        # batches of 96 and 192 over replica x fsdp; width 1024; 8 heads, mlp 4096 and length 2048
        if r * f * t == 96 and 96 % (r * f) == 0 and 1024 % f == 0 and 8 % t == 0
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
    full, dots = (
        seconds(dataclasses.replace(MODEL, remat=remat), 96, 1, MeshShape(1, 16, 1), fast) for remat in ("full", "dots")
    )
    tokens = 96 * 2048 / 16
    products = 2 * 4 * 12 * 1024**2 * tokens / (312e12 * 0.75)
    between = 40 * 1024 * 4 * tokens / (2039e9 * 0.8)
    assert full - dots == pytest.approx(products + between, rel=1e-6)


def test_microbatches_and_remat_take_time():
    full, dots = (dataclasses.replace(MODEL, remat=remat) for remat in ("full", "dots"))
    slow = machine(70, inter_node=1e9)  # a network that nothing can hide

    def step(model, microbatches):
        return seconds(model, 96, microbatches, MeshShape(1, 16, 1), slow)

    assert step(dots, 1) < step(full, 1) < step(full, 3)
    # Weights go out twice and gradients come back once for each microbatch: two more cost twice the first one's.
    moved = 3 * 2 * 4 * 12 * 1024**2 * 15 / 16 / (8e9 * 0.75)
    assert step(full, 3) - step(full, 2) == pytest.approx(moved, rel=1e-6)


def test_estimates_are_sorted_by_days():
    candidates = estimates(CONFIG, machine(14.5))
    assert [candidate.days for candidate in candidates] == sorted(candidate.days for candidate in candidates)
    assert {candidate.remat for candidate in candidates} == {"none", "dots", "full"}


def test_estimated_memory_is_at_most_a_tenth_too_large():
    most = 0.0
    for candidate in estimates(CONFIG, machine(14.5)):
        config = candidate.apply(CONFIG)
        assert validate_mesh(config, 16) == candidate.mesh
        for stage in config.schedule:
            microbatches = stage.layout.microbatches
            sequences = stage.config.batch_size // microbatches
            most = max(most, memory(stage.model, candidate.mesh, sequences, microbatches))
    assert 14.5 * GiB < most < 1.1 * 14.5 * GiB


def test_updates_that_tune_a_growth_count():
    def days(**fields):
        last = dataclasses.replace(CONFIG.stages[1], **fields)
        config = dataclasses.replace(CONFIG, stages=(CONFIG.stages[0], last))
        return [candidate.days for candidate in estimates(config, machine(14.5))]

    assert days(growth=GrowthConfig("learned", tuning_steps=50)) == days(steps=100)  # instead of 50


def test_no_layout_that_may_fit_is_an_error():
    with pytest.raises(ConfigError, match="no mesh of 16 devices"):
        estimates(CONFIG, machine(0.1))
    with pytest.raises(ConfigError, match="no mesh of 7 devices"):
        estimates(CONFIG, machine(14.5, devices=7))


def program(peak: float, name: str) -> Program:
    return Program(name, "take more", 0, 0, 0, 0, int(peak * GiB), 1e14, (), 0, 0.0)


class FakeCompiler:
    """Steps of 60 GiB over the number of microbatches, twice that for the second stage."""

    compiled: ClassVar[list] = []
    certificate_peak = 32.0

    def __init__(self, config, topology):
        self.config, self.topology, self.mesh_shape = config, topology, config.mesh
        self.is_exact = True

    def attention(self, _):
        return "cudnn"

    def step(self, stage):
        count = stage.config.microbatches
        assert stage.layout.microbatches == count
        self.compiled.append((stage.index, count))
        if count == 1 and stage.index == 1:
            raise TooLargeError(f"{stage.name} needs 44G")
        return program(60 * (stage.index + 1) / count, stage.name)

    def growth(self, stage):
        self.compiled.append(("growth", stage.index))
        return program(10, f"growth into {stage.name}")

    def certificate(self, stage):
        return program(self.certificate_peak, f"certificate of {stage.name}")


@pytest.fixture(autouse=True)
def forget_compiled(monkeypatch):
    monkeypatch.setattr(FakeCompiler, "compiled", [])


def fitted(candidate: Candidate, usable: float, compiler=FakeCompiler, log=print) -> Candidate:
    return fit(candidate, compiler(candidate.apply(CONFIG), machine(usable)), log)


CANDIDATE = Candidate(MeshShape(1, 8, 2), "full", (1, 1), days=9.0)


def test_microbatches_increase_until_each_stage_fits():
    lines = []
    layout = fitted(CANDIDATE, 35.0, log=lines.append)
    assert layout.microbatches == (2, 4)
    assert layout.peak == 30 * GiB
    assert layout.days != 9.0
    assert FakeCompiler.compiled == [(1, 1), (1, 2), (1, 3), (1, 4), (0, 1), (0, 2)]  # the last stage first
    assert lines[0] == "  step of large in 2 microbatches: 60.0 GiB"


def test_microbatches_never_decrease():
    assert fitted(dataclasses.replace(CANDIDATE, microbatches=(3, 6)), 35.0).microbatches == (3, 6)
    assert FakeCompiler.compiled == [(1, 6), (0, 3)]


def test_a_stage_that_never_fits_is_named():
    class Refusing(FakeCompiler):
        def step(self, stage):
            raise TooLargeError(f"{stage.name} needs 44G")

    with pytest.raises(TooLargeError, match=r"^large needs 5\.0 GiB a device; .*: take more"):
        fitted(CANDIDATE, 1.0)
    with pytest.raises(TooLargeError, match=r"^large needs 44G"):
        fitted(CANDIDATE, 35.0, Refusing)


@pytest.mark.parametrize(
    ("peaks", "outcome"),
    [
        ({("growth", 1): 36.0}, r"^growth into large needs 36\.0 GiB"),
        ({("growth", 2): 36.0}, r"^growth into last needs 36\.0 GiB"),
        ({("growth", 2): None}, r"^growth needs 44G"),
        ({("certificate", 2): 36.0}, r"^certificate of last needs 36\.0 GiB"),
        ({("certificate", 2): None}, r"^certificate needs 44G"),
        ({("growth", 1): 34.0}, 34.0),
        ({("growth", 2): 34.0}, 34.0),
        ({("certificate", 2): 34.0}, 34.0),
        ({("certificate", 1): 99.0}, 10.0),  # the last alone is compiled
    ],
    ids=str,
)
def test_every_growth_and_the_last_certificate_must_fit(peaks, outcome):
    class Fake(FakeCompiler):
        def growth(self, stage, kind="growth", words="growth into"):
            peak = peaks.get((kind, stage.index), 10.0)
            if peak is None:
                raise TooLargeError(f"{kind} needs 44G")
            return program(peak, f"{words} {stage.name}")

        def certificate(self, stage):
            return self.growth(stage, "certificate", "certificate of")

    last = dataclasses.replace(CONFIG.stages[1], name="last", num_layers=9)
    config = dataclasses.replace(CONFIG, stages=(*CONFIG.stages, last), mesh=MeshConfig(1, 8, 2))
    compiler = Fake(config, machine(35.0))
    if isinstance(outcome, float):
        assert growth_peak(compiler, print) == outcome * GiB
        return
    with pytest.raises(TooLargeError, match=outcome):
        growth_peak(compiler, print)


def test_a_search_ends_when_enough_layouts_fit(monkeypatch):
    class Narrow(FakeCompiler):
        """The certificate fits where tensor is 4 or more."""

        @property
        def certificate_peak(self):
            return 80.0 if self.mesh_shape.tensor < 4 else 70.0

    monkeypatch.setattr(layout_search, "Compiler", Narrow)
    by_estimate = estimates(CONFIG, machine(USABLE["cuda"] * 80))
    wide = [i for i, candidate in enumerate(by_estimate) if candidate.mesh.tensor >= 4]
    lines = []
    search = search_layouts(CONFIG, lines.append, tries=2)
    assert (search.possible, search.tried) == (len(by_estimate), wide[1] + 1)
    assert search.tried > 2
    meshes_of = lambda candidates: {candidate.mesh for candidate in candidates}
    assert meshes_of(search.fitting) == meshes_of(by_estimate[i] for i in wide[:2])
    assert [candidate.days for candidate in search.fitting] == sorted(candidate.days for candidate in search.fitting)
    assert {candidate.peak for candidate in search.fitting} == {70 * GiB}
    assert f"the best {search.tried} by estimate of {search.possible} layouts" in layout_table(search)
    assert any(line.startswith("  certificate of large needs 80.0 GiB a device") for line in lines)
    assert sum(line.startswith("  fits, ") for line in lines) == 2
    # Growths depend on the mesh alone: once for each.
    meshes_tried = meshes_of(by_estimate[: search.tried])
    assert FakeCompiler.compiled.count(("growth", 1)) == len(meshes_tried) < search.tried


def test_a_search_without_a_result_gives_the_reason(monkeypatch):
    class Never(FakeCompiler):
        certificate_peak = 80.0

    monkeypatch.setattr(layout_search, "Compiler", Never)
    reason = r"none of the \d+ layouts that may fit a800:2x8 does; of the last one, the growths|certif.*80\.0"
    with pytest.raises(ConfigError, match=reason):
        search_layouts(dataclasses.replace(CONFIG, certificate_rows=96), tries=1)
    with pytest.raises(ConfigError, match=r"model\.vocab_size is None"):
        search_layouts(dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=None)))
    with pytest.raises(ConfigError, match=r"mesh\.topology is None"):
        search_layouts(dataclasses.replace(CONFIG, mesh=MeshConfig()))


def test_without_the_machines_compiler_no_layout_is_said_to_fit():
    class OnFakeDevices(FakeCompiler):
        is_exact = property(lambda _: False, lambda *_: None)

    with pytest.raises(ConfigError, match=r"compiler of a800:2x8 is missing.*pip install 'flmjax\[plan-gpu\]'"):
        fitted(CANDIDATE, 35.0, OnFakeDevices)


def test_the_flags_of_a_layout_make_its_config():
    candidate = Candidate(MeshShape(3, 16, 4), "dots", (2, 3, 5), 10.0, int(50 * GiB))
    text = layout_table(LayoutSearch((candidate, dataclasses.replace(candidate, days=12.0)), possible=9, tried=3))
    row = [
        "replica",
        "3",
        "x",
        "fsdp",
        "16",
        "x",
        "tensor",
        "4",
        "dots",
        "2",
        "/",
        "3",
        "/",
        "5",
        "10.0",
        "50.0",
        "GiB",
    ]
    assert text.splitlines()[1].split() == row
    assert text.splitlines()[-1] == f"the fastest of them that fits: {candidate.flags()}"
    flags = [flag.strip("'") for flag in candidate.flags().split()]
    _, config, _, _ = cli.parse(["plan", "--config=configs/flm_101b.py", *flags])
    applied = candidate.apply(config)
    assert (config.mesh.replica, config.mesh.fsdp, config.mesh.tensor) == (3, 16, 4)
    assert config.model.remat == "dots"
    assert [s.microbatches for s in config.stages] == [2, 3, 5] == [s.microbatches for s in applied.stages]
