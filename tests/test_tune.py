"""The search: what is legal, what should fit, and that the cheapest that does fit is found."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import ClassVar

import pytest

from flmjax import cli
from flmjax.config import ConfigError, GrowthConfig, MeshConfig, ModelConfig, RunConfig, StageConfig
from flmjax.config.validate import legal_microbatches
from flmjax.hardware import A800, GiB
from flmjax.model.flops import num_parameters
from flmjax.planning import layout_search as tune
from flmjax.planning.compile import Program
from flmjax.planning.layout_search import Setting, estimates, fit, growth_peak, meshes, table
from flmjax.planning.topology import USABLE, TooLargeError

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
)


def test_meshes_are_all_those_that_divide_and_no_other():
    found = {(mesh.replica, mesh.fsdp, mesh.tensor) for mesh in meshes(CONFIG, 96)}
    by_hand = {
        (r, f, t)
        for r, f, t in itertools.product(range(1, 97), range(1, 65), range(1, 9))
        # batches of 96 and 192 over replica x fsdp; width 1024; 8 heads, mlp 4096 and length 2048
        if r * f * t == 96 and 96 % (r * f) == 0 and 1024 % f == 0 and 8 % t == 0
    }
    assert found == by_hand
    assert len(found) > 10


def test_microbatches_divide_the_rows_of_a_data_shard():
    stage = StageConfig(batch_size=96)
    assert legal_microbatches(stage, 8) == [1, 2, 3, 4, 6, 12]
    assert legal_microbatches(stage, 5) == []


def test_more_microbatches_rematerialisation_and_shards_take_less_memory():
    mesh = MeshConfig(1, 8, 2)
    full, dots = (dataclasses.replace(MODEL, remat=remat) for remat in ("full", "dots"))
    assert tune.memory(full, mesh, 24, 4) < tune.memory(full, mesh, 48, 2) < tune.memory(full, mesh, 96, 1)
    assert tune.memory(full, mesh, 48, 2) < tune.memory(dots, mesh, 48, 2)
    assert tune.memory(full, MeshConfig(1, 8, 4), 48, 2) < tune.memory(full, mesh, 48, 2)


def test_state_and_gradients_are_cut_over_all_shards_by_hand():
    parameters = num_parameters(MODEL)
    # Parameters, two moments and gradients in float32, a copy in bfloat16; with microbatches a sum of gradients, too.
    # Beside them a layer's weights, twice, and gradients.
    layer = 12 * 1024**2 * (2 * 2 + 4) / 2
    assert tune.memory(MODEL, MeshConfig(2, 8, 2), 0, 1) == pytest.approx(18 * parameters / 16 + layer)
    assert tune.memory(MODEL, MeshConfig(2, 8, 2), 0, 3) == pytest.approx(22 * parameters / 16 + layer)
    single = dataclasses.replace(MODEL, dtype="float32")
    layer = 12 * 1024**2 * (2 * 4 + 4) / 2
    assert tune.memory(single, MeshConfig(2, 8, 2), 0, 1) == pytest.approx(16 * parameters / 16 + layer)


def test_a_second_forward_pass_takes_what_it_computes_by_hand():
    fast = dataclasses.replace(A800, far=1e18, near=1e18)
    full, dots = (
        tune.seconds(CONFIG.stages[0], dataclasses.replace(MODEL, remat=remat), MeshConfig(1, 16, 1), 1, fast, 16, 8)
        for remat in ("full", "dots")
    )
    tokens = 96 * 2048 / 16
    products = 2 * 4 * 12 * 1024**2 * tokens / (312e12 * 0.75)
    between = 40 * 1024 * 4 * tokens / (2039e9 * 0.8)
    assert full - dots == pytest.approx(products + between, rel=1e-6)


def test_more_microbatches_and_rematerialisation_take_more_time():
    mesh, stage = MeshConfig(1, 16, 1), CONFIG.stages[0]
    full, dots = (dataclasses.replace(MODEL, remat=remat) for remat in ("full", "dots"))
    slow = dataclasses.replace(A800, far=1e9)  # a network that nothing can hide

    def seconds(model, microbatches):
        return tune.seconds(stage, model, mesh, microbatches, slow, 16, 8)

    assert seconds(dots, 1) < seconds(full, 1) < seconds(full, 3)
    # Weights go out twice and gradients come back once for each microbatch: two more cost twice the first one's.
    moved = 3 * 2 * 4 * 12 * 1024**2 * 15 / 16 / (8e9 * 0.75)
    assert seconds(full, 3) - seconds(full, 2) == pytest.approx(moved, rel=1e-6)


def test_estimates_are_sorted_and_fit_by_their_own_account():
    usable = 14.5 * GiB
    found = estimates(CONFIG, A800, 16, 8, usable)
    assert [s.days for s in found] == sorted(s.days for s in found)
    assert {s.remat for s in found} == {"none", "dots", "full"}
    most = 0.0
    for setting in found:
        chosen = setting.apply(CONFIG)
        assert chosen.mesh == setting.mesh
        for stage, model in zip(chosen.stages, chosen.stage_models, strict=True):
            rows = stage.batch_size // stage.microbatches
            most = max(most, tune.memory(model, setting.mesh, rows, stage.microbatches))
    assert usable < most < 1.1 * usable  # an estimate may be a tenth off
    learned = dataclasses.replace(CONFIG.stages[1], growth=GrowthConfig("learned", tuning_steps=50))
    tuned = estimates(dataclasses.replace(CONFIG, stages=(CONFIG.stages[0], learned)), A800, 16, 8, usable)
    twice = dataclasses.replace(CONFIG.stages[1], steps=100)  # as many updates as 50, and 50 that tune
    doubled = estimates(dataclasses.replace(CONFIG, stages=(CONFIG.stages[0], twice)), A800, 16, 8, usable)
    assert [setting.days for setting in tuned] == [setting.days for setting in doubled]
    with pytest.raises(ConfigError, match="no mesh of 16 devices"):
        estimates(CONFIG, A800, 16, 8, 0.1 * GiB)
    with pytest.raises(ConfigError, match="no mesh of 7 devices"):
        estimates(CONFIG, A800, 7, 8, usable)


def program(peak: float) -> Program:
    return Program(0, 0, 0, 0, int(peak * GiB), 1e12, (), 0, 0.0)


class FakeCompiler:
    """Programs whose peak is 60 GiB over the number of microbatches, twice that for the second stage."""

    made: ClassVar[list] = []
    proof = 32.0

    def __init__(self, config):
        self.config, self.mesh_config = config, config.mesh
        self.topology = SimpleNamespace(name="a800:2x8", platform="cuda", chip=A800, num_devices=16)
        self.is_exact = True

    def attention(self, _):
        return "cudnn"

    def step(self, index):
        count = self.config.stages[index].microbatches
        self.made.append((index, count))
        if count == 1 and index == 1:
            raise TooLargeError("needs 44G")
        return program(60 * (index + 1) / count)

    def growth(self, index):
        self.made.append(("growth", index))
        return program(10)

    def certificate(self, _):
        return program(self.proof)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(FakeCompiler, "made", [])
    topology = SimpleNamespace(name="a800:2x8", platform="cuda", chip=A800, num_devices=16, node=8)

    def use(kind):
        monkeypatch.setattr(tune, "compiler_for", lambda _: (kind, topology))

    return use


def test_microbatches_go_up_until_the_compiled_program_fits_the_last_stage_first(fake):
    setting = Setting(MeshConfig(1, 8, 2), "full", (1, 1), days=9.0)
    lines = []
    found = fit(setting, CONFIG, 35.0 * GiB, FakeCompiler, lines.append)
    assert found.microbatches == (2, 4)
    assert found.peak == 30 * GiB
    assert found.days != 9.0
    assert FakeCompiler.made == [(1, 1), (1, 2), (1, 3), (1, 4), (0, 1), (0, 2)]
    assert lines[0] == "  step of large in 2 microbatches: 60.0 GiB"
    FakeCompiler.made.clear()
    more = dataclasses.replace(setting, microbatches=(3, 6))
    assert fit(more, CONFIG, 35.0 * GiB, FakeCompiler, lines.append).microbatches == (3, 6)
    assert FakeCompiler.made == [(1, 6), (0, 3)]  # never fewer than it says
    with pytest.raises(TooLargeError, match=r"^stages\[1\] \(large\) needs 5\.0 GiB a device, .*: take more devices"):
        fit(setting, CONFIG, 1.0 * GiB, FakeCompiler, lines.append)

    class Refusing(FakeCompiler):
        def step(self, index):
            raise TooLargeError("needs 44G")

    with pytest.raises(TooLargeError, match=r"^stages\[1\] \(large\) needs 44G: take more devices"):
        fit(setting, CONFIG, 35.0 * GiB, Refusing, lines.append)


@pytest.mark.parametrize(
    ("peaks", "words"),
    [
        ({("growth", 1): 36.0}, r"^growth small -> large needs 36\.0 GiB"),
        ({("growth", 2): 36.0}, r"^growth large -> last needs 36\.0 GiB"),
        ({("growth", 2): None}, r"^growth large -> last needs 44G: take more devices"),
        ({("certificate", 2): 36.0}, r"^the certificate of growth large -> last needs 36\.0 GiB"),
        ({("certificate", 2): None}, r"^the certificate of growth large -> last needs 44G: take more devices"),
        ({("growth", 1): 34.0}, 34.0),
        ({("growth", 2): 34.0}, 34.0),
        ({("certificate", 2): 34.0}, 34.0),
        ({("certificate", 1): 99.0}, 10.0),  # the last alone is compiled
    ],
    ids=str,
)
def test_every_growth_and_the_last_certificate_must_fit(peaks, words):
    class Fake(FakeCompiler):
        def growth(self, index, kind="growth"):
            if peaks.get((kind, index), 10.0) is None:
                raise TooLargeError("needs 44G")
            return program(peaks.get((kind, index), 10.0))

        def certificate(self, index):
            return self.growth(index, "certificate")

    last = dataclasses.replace(CONFIG.stages[1], name="last", num_layers=9)
    compiler = Fake(dataclasses.replace(CONFIG, stages=(*CONFIG.stages, last), mesh=MeshConfig(1, 8, 2)))
    if isinstance(words, float):
        assert growth_peak(compiler, 35.0 * GiB, print) == words * GiB
        return
    with pytest.raises(TooLargeError, match=words):
        growth_peak(compiler, 35.0 * GiB, print)


def test_the_search_goes_on_until_enough_settings_fit_with_all_their_programs(fake):
    class Narrow(FakeCompiler):
        """The certificate fits where tensor is 4 or more."""

        @property
        def proof(self):
            return 80.0 if self.mesh_config.tensor < 4 else 70.0

    fake(Narrow)
    by_estimate = estimates(CONFIG, A800, 16, 8, USABLE["cuda"] * A800.memory)
    wide = [i for i, setting in enumerate(by_estimate) if setting.mesh.tensor >= 4]
    lines = []
    found = tune.tune(CONFIG, lines.append, tries=2)
    assert (found.possible, found.tried) == (len(by_estimate), wide[1] + 1)
    assert found.tried > 2
    assert {setting.mesh for setting in found.settings} == {by_estimate[i].mesh for i in wide[:2]}
    assert [s.days for s in found.settings] == sorted(s.days for s in found.settings)
    assert {s.peak for s in found.settings} == {70 * GiB}
    assert f"the best {found.tried} by estimate of {found.possible} settings" in table(found)
    assert any(line.startswith("  the certificate of growth small -> large needs 80.0 GiB a device") for line in lines)
    assert sum(line.startswith("  fits, ") for line in lines) == 2
    # Growths depend on the mesh alone: once for each.
    meshes_tried = {by_estimate[i].mesh for i in range(found.tried)}
    assert FakeCompiler.made.count(("growth", 1)) == len(meshes_tried) < found.tried


def test_a_search_that_finds_nothing_says_why(fake):
    class Never(FakeCompiler):
        proof = 80.0

    fake(Never)
    with pytest.raises(
        ConfigError, match=r"none of \d+ settings that may fit a800:2x8 does; of the last, the certif.*80\.0"
    ):
        tune.tune(dataclasses.replace(CONFIG, certificate_rows=96), tries=1)
    with pytest.raises(ConfigError, match=r"model\.vocab_size is None"):
        tune.tune(dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=None)))


def test_without_the_machines_compiler_nothing_is_said_to_fit():
    def stand_in(config):
        compiler = FakeCompiler(config)
        compiler.is_exact = False
        return compiler

    setting = Setting(MeshConfig(1, 8, 2), "full", (1, 1), days=9.0)
    with pytest.raises(ConfigError, match=r"compiler of a800:2x8 is missing.*pip install 'flmjax\[plan-gpu\]'"):
        fit(setting, CONFIG, 35.0 * GiB, stand_in, print)


def test_the_flags_of_a_setting_make_the_config_that_it_is():
    setting = Setting(MeshConfig(3, 16, 4), "dots", (2, 3, 5), 10.0, int(50 * GiB))
    text = table(tune.Search((setting, dataclasses.replace(setting, days=12.0)), possible=9, tried=3))
    assert text.splitlines()[0].endswith("microbatches 2 / 3 / 5: 10.0 days, 50.0 GiB")
    flags = [flag.strip("'") for flag in setting.flags().split()]
    _, config, _, _ = cli.parse(["plan", "--config=configs/flm_101b.py", *flags])
    applied = setting.apply(config)
    assert (config.mesh.replica, config.mesh.fsdp, config.mesh.tensor) == (3, 16, 4)
    assert config.model.remat == "dots"
    assert [s.microbatches for s in config.stages] == [2, 3, 5] == [s.microbatches for s in applied.stages]
