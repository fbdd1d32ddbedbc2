"""Golden text: what every config's parameters are, how it resolves, and what tiny models compute, as files in a diff.

`python tests/test_golden.py [WORD...]` writes the files of tests/golden/ whose names hold one of the words, or all of
them; what changed is read in review:
    leaves/CONFIG[-ARGUMENT].txt: each parameter of a config's largest stage.
    configs/CONFIG.json: each argument of a config, resolved.
    numbers/MODEL.txt: losses, gradient norms and grown parameters of a tiny model, bitwise.
    programs/MODEL-PROGRAM.txt: the lowered text of a tiny model's training step, growth and certificate.
"""

import dataclasses
import hashlib
import json
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import conftest  # sets up eight CPU devices before JAX is imported
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from test_configs import ARGUMENTS, load

from flmjax.config import GrowthConfig, MeshShape, ModelConfig, OptimizerConfig, RunConfig, resize, to_json
from flmjax.config.validate import validate_meshes
from flmjax.growth.comparison import jit_comparison
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import Ramp
from flmjax.model.transformer import abstract_params, init_params
from flmjax.optimizer.adam import make_optimizer
from flmjax.sharding.axes import map_with_axes
from flmjax.sharding.mesh import MESH_AXES, make_mesh
from flmjax.sharding.rules import Placement, leaf_sharding
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import gradients, jit_growth, jit_train_step

GOLDEN = Path(__file__).parent / "golden"
FLOOR = "0.10.2"  # the version of JAX that wrote numbers/ and programs/
CL100K_IDS = 100_258


# ---- leaves ----------------------------------------------------------------------------------------------------------


LEAVES = {**{name: (name, None) for name in ARGUMENTS}, **{f"flm_101b-{s}": ("flm_101b", s) for s in ("16b", "51b")}}


def leaves_text(name: str, argument: str | None) -> str:
    """One line for each parameter of the largest stage of a config."""
    config = load(name, argument)
    vocabulary = CL100K_IDS if config.data.vocabulary == "cl100k" else config.data.vocab_size
    model = config.stage_models[-1]
    model = dataclasses.replace(model, vocab_size=model.vocab_size or vocabulary)
    last = config.schedule[-1].layout.mesh
    devices = last.replica * (last.fsdp or 1) * last.tensor
    mesh_config = validate_meshes(config, devices)[-1]
    mesh = AbstractMesh(tuple(getattr(mesh_config, axis) for axis in MESH_AXES), MESH_AXES)
    shapes, axes = abstract_params(model)
    stds, rates, decays = initial_stds(model), rate_multipliers(config, model), decay_multipliers(config, model)
    lines = ["path axes(role) shape sharding init_std rate decay"]

    def add(path, leaf, shape, std, rate, decay):
        named = ",".join(f"{axis}({role})" for axis, role in zip(leaf.names, leaf.roles, strict=True))
        size = "x".join(map(str, shape.shape))
        placed = ",".join("+".join(s) if isinstance(s, tuple) else str(s) for s in leaf_sharding(mesh, leaf).spec)
        lines.append(f"{path} {named} {size} {placed} {std:.6g} {rate:.4g} {decay:.4g}")

    map_with_axes(add, axes, shapes, stds, rates, decays)
    return "\n".join(lines) + "\n"


def thin(model: ModelConfig) -> ModelConfig:
    """The model with small axes but the depth and the width multiplier, which decide deviations and multipliers."""
    m = model.width_multiplier
    width, base = (int(m), 1) if m == int(m) else (model.embed_dim, model.base_embed_dim)
    sizes = {"num_heads": 2, "head_dim": 2, "mlp_dim": 3, "vocab_size": 8, "max_length": 4}
    kv_heads = None if model.num_kv_heads is None else 1
    base = None if model.base_embed_dim is None else base
    return dataclasses.replace(
        model, embed_dim=max(width, 2 if base is None else 1), base_embed_dim=base, num_kv_heads=kv_heads, **sizes
    )


def initial_stds(model: ModelConfig):
    """Standard deviation of each initial parameter: drawn values are replaced by their deviation, others stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.initializers, "normal", nn.initializers.constant)
        params = jax.jit(lambda key: init_params(thin(model), key))(jax.random.key(0))
    return jax.tree.map(one_value, params)


def one_value(x: jax.Array) -> float:
    values = np.unique(np.asarray(x))
    assert len(values) == 1
    return float(values[0])


def rate_multipliers(config: RunConfig, model: ModelConfig):
    """Learning rate of each leaf over the run's: the first update of parameters 0 with gradients 1."""
    return jax.tree.map(one_value, first_update(config.optimizer, model, 0.0))


def decay_multipliers(config: RunConfig, model: ModelConfig):
    """Weight decay of each leaf over the optimizer's, per unit of the leaf's own rate."""
    optimizer = dataclasses.replace(config.optimizer, weight_decay=0.5)
    first, decayed = (first_update(optimizer, model, value) for value in (0.0, 1.0))
    return jax.tree.map(lambda a, b: (one_value(b) - one_value(a)) / 0.5 / one_value(a), first, decayed)


def first_update(optimizer_config: OptimizerConfig, model: ModelConfig, parameter: float):
    shapes, axes = abstract_params(thin(model))
    full = lambda value: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), shapes)
    optimizer = make_optimizer(dataclasses.replace(optimizer_config, clip_norm=None), thin(model), axes)
    update = jax.jit(lambda params: optimizer.update(full(1.0), optimizer.init(params), params)[0])
    return update(full(parameter))


# ---- configs ---------------------------------------------------------------------------------------------------------


def config_text(name: str) -> str:
    """Every argument of a config with every field."""
    configs = {argument: to_json(load(name, argument)) for argument in ARGUMENTS[name]}
    return json.dumps(configs, indent=1) + "\n"


# ---- tiny models -----------------------------------------------------------------------------------------------------

SIZES = {"num_layers": 2, "embed_dim": 32, "head_dim": 8, "mlp_dim": 48, "vocab_size": 61, "max_length": 16}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A small model, what it grows to, and how. kind: of its batches, "text", "documents" or "teachers"."""

    model: ModelConfig
    sizes: dict[str, int]
    growth: GrowthConfig
    kind: str = "text"

    @property
    def larger(self) -> ModelConfig:
        return resize(self.model, self.growth.family, **self.sizes)


TINY = {
    "gpt": Tiny(
        ModelConfig(**SIZES, num_heads=4, position="learned", dropout=0.1),
        {"embed_dim": 48, "mlp_dim": 64, "num_layers": 3},
        GrowthConfig("zero"),
    ),
    "llama": Tiny(
        ModelConfig(
            **SIZES,
            num_heads=4,
            num_kv_heads=2,
            norm="rmsnorm",
            activation="swiglu",
            position="rope",
            bias=False,
            tied_embedding=False,
            base_embed_dim=16,
            remat="full",
        ),
        {"embed_dim": 64, "num_heads": 8, "num_kv_heads": 4, "mlp_dim": 80},
        GrowthConfig("duplicate"),
        kind="documents",
    ),
    "flm_teachers": Tiny(
        ModelConfig(**SIZES, num_heads=4, base_embed_dim=16, softmax_temperature=2.0),
        {"embed_dim": 48, "num_heads": 6, "num_layers": 3},
        GrowthConfig("mask", ramp_steps=4),
        kind="teachers",
    ),
}


def batch_of(tiny: Tiny, seed: int) -> dict[str, np.ndarray]:
    batch = conftest.random_batch(tiny.model, rows=8, seed=seed, segments=tiny.kind != "text")
    if tiny.kind == "teachers":
        batch["marks"] = np.array([[5, 9] if row % 2 else [0, 0] for row in range(8)], np.int32)
        batch["decisive"] = np.zeros_like(batch["weights"])
        batch["decisive"][1::2, 3] = 1
        batch["targets"][1::2, 3] = [5, 9, 9, 5]
        batch["weights"][1::2] = batch["decisive"][1::2]
    return batch


def numbers_text(name: str) -> str:
    """Ten updates with a growth after the fifth: hexadecimal numbers, and checksums of the grown parameters."""
    tiny = TINY[name]
    mesh = make_mesh(MeshShape(1, 1, 1), jax.devices()[:1])
    specs = [state_spec(model, OptimizerConfig(), mesh) for model in (tiny.model, tiny.larger)]
    key = jax.random.key(7)
    state = init_state(specs[0], 3)
    norms = jax.jit(lambda params, batch: gradients(params, batch, key, tiny.model, None)[1])(
        state.params, batch_of(tiny, 0)
    )
    lines = [f"gradient {p} {float(jnp.sqrt(jnp.sum(g * g))).hex()}" for p, g in paths(norms)]
    ramp = Ramp(Growth(tiny.model, tiny.larger, tiny.growth), 5) if tiny.growth.family == "mask" else None
    for stage, spec in enumerate(specs):
        if stage:
            state = jit_growth(specs[0], spec, Growth(specs[0].config, spec.config, tiny.growth, new_warmup=3))(
                state, key
            )
            lines += [f"grown {p} {summary(x)}" for p, x in paths(state.params)]
            lines += [f"grown {p} {summary(x)}" for p, x in moments(state.opt_state)]
        step = jit_train_step(spec, 2, ramp=ramp if stage else None)
        for update in range(5):
            state, metrics = step(state, batch_of(tiny, 5 * stage + update), np.float32(3e-3))
            lines.append(f"loss {5 * stage + update + 1} {float(metrics['loss']).hex()}")
    return "\n".join(lines) + "\n"


def paths(tree) -> list[tuple[str, jax.Array]]:
    with_path = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in with_path]


def moments(opt_state) -> list[tuple[str, jax.Array]]:
    found = [(re.search(r"\b[mn]u/.*", path), x) for path, x in paths(opt_state)]
    return [(match[0], x) for match, x in found if match]


def summary(x: jax.Array) -> str:
    """Sum of squares, and a checksum of all bits."""
    values = np.asarray(x)
    checksum = hashlib.sha256(values.tobytes()).hexdigest()[:16]
    return f"{'x'.join(map(str, values.shape))} {float(np.sum(np.square(values.astype(np.float64)))).hex()} {checksum}"


PROGRAMS = ("step", "growth", "certificate")


def program_text(name: str, program: str) -> str:
    """The lowered text on a mesh of 2 x 2 x 2 devices, without names that do not matter to what it computes."""
    tiny = TINY[name]
    mesh = make_mesh(MeshShape(2, 2, 2), jax.devices()[:8])
    old, new = (state_spec(model, OptimizerConfig(), mesh) for model in (tiny.model, tiny.larger))
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch_of(tiny, 0).items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    if program == "step":
        ramp = Ramp(Growth(tiny.model, tiny.larger, tiny.growth), 5) if tiny.growth.family == "mask" else None
        lowered = jit_train_step(new, 2, ramp=ramp).lower(new.abstract, batch, np.float32(0))
    elif program == "growth":
        lowered = jit_growth(old, new, Growth(old.config, new.config, tiny.growth)).lower(old.abstract, key)
    else:
        growth = Growth(tiny.model, tiny.larger, tiny.growth)
        compare = jit_comparison(growth, dtype="float32", placements=(Placement(mesh), Placement(mesh)), gradients=True)
        lowered = compare.lower((old.abstract.params, new.abstract.params), batch)
    names = r"""(?<=module) @\w+|, jax\.result_info = "[^"]*"|jax\.result_info = "[^"]*"(, )?"""
    text = re.sub(names, "", lowered.as_text())
    # Values without their numbers, which one more operation would all change; the checksum is of the numbered text.
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return re.sub(r"%\w+(#\d+)?", "%", text) + f"\nsha256 {checksum}\n"


# ---- files -----------------------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[], str]] = {
    **{f"leaves/{file}.txt": lambda of=of: leaves_text(*of) for file, of in LEAVES.items()},
    **{f"configs/{name}.json": lambda name=name: config_text(name) for name in ARGUMENTS},
}
BITWISE: dict[str, Callable[[], str]] = {
    **{f"numbers/{name}.txt": lambda name=name: numbers_text(name) for name in TINY},
    **{f"programs/{n}-{p}.txt": lambda n=n, p=p: program_text(n, p) for n in TINY for p in PROGRAMS},
}
HOW = "golden text differs; if the change is meant, run `python tests/test_golden.py` and read the diff"


def machine() -> str:
    """What bits depend on beside the program: JAX, and the vector instructions that its compiler uses."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    vectors = sorted(flags & {"avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve"})
    return f"jax {jax.__version__}, {platform.machine()}, {' '.join(vectors)}\n"


@pytest.mark.parametrize("file", WRITERS)
def test_leaves_and_configs_are_the_golden_ones(file):
    assert WRITERS[file]() == (GOLDEN / file).read_text(), HOW


@pytest.mark.parametrize("name", TINY)
def test_numbers_are_the_golden_ones(name):
    """Bitwise on the machine and the version of JAX that wrote them, to four digits elsewhere."""
    golden, text = (GOLDEN / f"numbers/{name}.txt").read_text(), numbers_text(name)
    if machine() == (GOLDEN / "machine.txt").read_text():
        assert text == golden, HOW
        return
    rows = [[line.split() for line in lines.splitlines()] for lines in (golden, text)]
    for before, after in zip(*rows, strict=True):
        numbers = [[float.fromhex(w) for w in row if w.startswith(("0x", "-0x"))] for row in (before, after)]
        assert before[:2] == after[:2]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4, abs=1e-9), before[:2]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", TINY)
def test_programs_are_the_golden_ones(name, program):
    if jax.__version__ != FLOOR:
        pytest.skip(f"lowered text is that of JAX {FLOOR}")
    assert program_text(name, program) == (GOLDEN / f"programs/{name}-{program}.txt").read_text(), HOW


if __name__ == "__main__":
    for file, write in {**WRITERS, **BITWISE, "machine.txt": machine}.items():
        if sys.argv[1:] and not any(word in file for word in sys.argv[1:]):
            continue
        (GOLDEN / file).parent.mkdir(parents=True, exist_ok=True)
        (GOLDEN / file).write_text(write())
        print(GOLDEN / file)
