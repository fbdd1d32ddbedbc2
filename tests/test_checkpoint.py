"""Checkpoints: which are kept, read on other meshes and in part, damaged, incomplete and foreign ones."""

import contextlib
import json
import os
import re
import resource
import shutil
import time
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import TINY, random_batch, with_fields

import flmjax
from flmjax.config import (
    FORMAT,
    CheckpointConfig,
    ConfigError,
    MeshShape,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    resize,
)
from flmjax.config.validate import validate
from flmjax.planning.planner import kept_saves
from flmjax.sharding.mesh import make_mesh
from flmjax.training.state import from_items, init_state, state_spec, to_items
from flmjax.training.step import jit_train_step
from flmjax.workdir import checkpoint as checkpoint_module
from flmjax.workdir.checkpoint import CheckpointError, Checkpoints, DamagedCheckpointError, remove_incomplete
from flmjax.workdir.paths import whole_steps
from flmjax.workdir.position import resumed_position

CONFIG = with_fields(TINY, num_heads=8)


def spec_on(*shape):
    mesh = make_mesh(MeshShape(*shape), jax.devices()[: int(np.prod(shape))])
    return state_spec(CONFIG, OptimizerConfig(), mesh)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint at step 3 written from 8 devices, and its state."""
    folder = tmp_path_factory.mktemp("checkpoints") / "checkpoints"
    spec = spec_on(1, 2, 4)
    state = init_state(spec, 0)
    step = jit_train_step(spec, 1)
    for i in range(3):
        state, _ = step(state, random_batch(CONFIG, rows=8, seed=i), np.float32(1e-2))
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(3, to_items(state), {"stage": 0})
        checkpoints.wait()
    return folder, jax.tree.map(np.asarray, state)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_any_mesh_reads_what_another_wrote(saved, shape):
    """Other device counts: google/orbax#648. Optimizer states that come back as lists: google/flax#1432."""
    folder, state = saved
    spec = spec_on(*shape)
    with Checkpoints(folder, keep=2) as checkpoints:
        restored = from_items(checkpoints.restore(3, to_items(spec.abstract)))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, restored), state)
    chex.assert_trees_all_equal_structs(restored, state)  # the types of optax, not lists and dictionaries
    for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(spec.abstract), strict=True):
        assert leaf.sharding == expected.sharding


def test_weights_are_read_without_the_moments(saved, tmp_path):
    """Evaluation and export need the weights alone (google/orbax#331): they are readable without the moments."""
    folder, state = saved
    shutil.copytree(folder, tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "train_state")
    abstract = to_items(spec_on(1, 1, 1).abstract)
    with Checkpoints(tmp_path / "checkpoints", keep=None) as checkpoints:
        params = checkpoints.restore(3, {"params": abstract["params"]})["params"]
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoints.restore(3, abstract)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, params), state.params)


def test_a_model_of_another_size_is_refused_with_leaf_and_shapes(saved):
    """A checkpoint of another size that loads without complaint fails later: google/flax#2436."""
    larger = resize(CONFIG, mlp_dim=64)
    spec = state_spec(larger, OptimizerConfig(), make_mesh(MeshShape(1, 1, 1), jax.devices()[:1]))
    words = r"layers/mlp/\w+/\w+ has shape \(2.*48.*\), the model \(2.*64.*\).*growth"
    with Checkpoints(saved[0], keep=2) as checkpoints, pytest.raises(CheckpointError, match=words):
        checkpoints.restore(3, to_items(spec.abstract))


def test_a_checkpoint_of_another_format_is_refused(saved, tmp_path):
    """Without a format number renamed items would be reported as missing items."""
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    (meta,) = (tmp_path / "checkpoints" / "3" / "meta").glob("metadata")
    stored = json.loads(meta.read_text())
    assert (stored["version"], stored["format"]) == (flmjax.__version__, FORMAT)
    del stored["digest"]
    meta.write_text(json.dumps({**stored, "format": FORMAT + 1}))
    with Checkpoints(tmp_path / "checkpoints", keep=None) as checkpoints:
        words = f"has format {FORMAT + 1}; flmjax .* reads format {FORMAT}"
        with pytest.raises(ConfigError, match=words):
            checkpoints.restore(3, to_items(spec_on(1, 1, 1).abstract))


def test_incomplete_steps_are_removed_and_nothing_else(tmp_path):
    """A killed save leaves a folder that blocks the next one (google/flax#1200, google/orbax#394), or a temporary one.

    Step 1 is what a killed deletion left. Step 8, newer than all complete ones, has files: it was complete once.
    """
    stale = f"6{ocp.utils.TMP_DIR_SUFFIX}-17"
    for name in ("1/params", "2/params", "7", "8/params", "9/params", "notes", f"{stale}/params", "5.unreadable"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("1/params/d", "2/_CHECKPOINT_METADATA", "8/params/d", f"{stale}/params/d"):
        (tmp_path / name).write_text("{}")
    assert sorted(path.name for path in remove_incomplete(tmp_path)) == ["1", stale, "7", "9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5.unreadable", "8", "notes"]
    assert remove_incomplete(tmp_path / "absent") == []


def test_a_save_that_orbax_declines_is_an_error(saved, tmp_path):
    spec = spec_on(1, 1, 1)
    state = init_state(spec, 0)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(5, to_items(state), {})
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"step 4 was not saved in .*: the newest there is 5"):
            checkpoints.save(4, to_items(state), {})


def test_the_program_does_not_grow_with_depth(one_device_mesh):
    sizes, seconds = {}, {}
    for depth in (6, 48):
        spec = state_spec(with_fields(CONFIG, num_layers=depth), OptimizerConfig(), one_device_mesh)
        lowered = jit_train_step(spec, 1).lower(spec.abstract, random_batch(CONFIG), np.float32(0))
        start = time.process_time()
        text = lowered.compile().as_text()
        seconds[depth] = time.process_time() - start
        sizes[depth] = len(re.findall(r"^ *(?:ROOT )?%?[\w.-]+ = ", text, re.MULTILINE))
    print(f"compiling 48 layers takes {seconds[48] / seconds[6]:.2f} of 6 layers, instructions {sizes}")
    assert sizes[48] <= 1.2 * sizes[6]


def test_the_newest_steps_are_kept_and_a_reader_deletes_nothing(one_device_mesh, tmp_path):
    spec = state_spec(TINY, OptimizerConfig(), one_device_mesh)
    items = to_items(init_state(spec, 0))
    folder = tmp_path / "checkpoints"
    steps = lambda: sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, items, {})
        checkpoints.wait()
    assert steps() == [3, 4]
    with Checkpoints(folder, keep=None) as reader:
        reader.restore(3, {"params": items["params"]})
    assert steps() == [3, 4]


# ---- which are kept --------------------------------------------------------------------------------------------------

ITEMS = {"params": {"x": jnp.arange(6.0), "y": jnp.ones(2)}, "train_state": {"step": jnp.zeros((), jnp.int32)}}


def save_steps(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, ITEMS, {})
    checkpoints.wait()


def test_multiples_and_ends_of_stages_are_kept_for_ever(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_every=4, kept_steps=[3]) as checkpoints:
        save_steps(checkpoints, 1, 2, 3, 4, 5, 6)
    assert whole_steps(tmp_path) == [3, 4, 6]


def test_a_resumed_run_keeps_what_its_new_config_says(tmp_path):
    """The second stage became longer: step 6 is the end of no stage any more; step 4 is, and stays."""
    settings = CheckpointConfig(keep=1, every=2)
    stages = (StageConfig("a", steps=4), StageConfig("b", steps=2))
    config = RunConfig(stages=stages, checkpoint=settings)
    with Checkpoints.of_run(tmp_path, config, {}) as checkpoints:
        save_steps(checkpoints, 2, 4, 5, 6)
    assert whole_steps(tmp_path / "checkpoints") == [4, 6]
    longer = with_fields(config, stages=(stages[0], with_fields(stages[1], steps=4)))
    with Checkpoints.of_run(tmp_path, longer, {}) as checkpoints:
        save_steps(checkpoints, 8)
    assert whole_steps(tmp_path / "checkpoints") == [4, 8]
    plain = with_fields(longer, checkpoint=with_fields(settings, keep_stage_ends=False))
    with Checkpoints.of_run(tmp_path, plain, {}) as checkpoints:
        save_steps(checkpoints, 10)
    assert whole_steps(tmp_path / "checkpoints") == [10]


def test_a_period_that_no_save_has_is_refused():
    config = RunConfig(checkpoint=CheckpointConfig(every=100, keep_every=250))
    with pytest.raises(ConfigError, match=r"keep_every=250 must be a multiple of checkpoint\.every=100"):
        validate(config)
    validate(with_fields(config, checkpoint=CheckpointConfig(every=125, keep_every=250)))


@pytest.mark.parametrize("keep_stage_ends", [True, False])
@pytest.mark.parametrize("keep_every", [None, 5, 10])
@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("steps", [5, 6, 14, 20])
def test_a_plan_counts_the_checkpoints_that_orbax_keeps(steps, keep, keep_every, keep_stage_ends, monkeypatch):
    settings = CheckpointConfig(every=5, keep=keep, keep_every=keep_every, keep_stage_ends=keep_stage_ends)
    config = RunConfig(stages=(StageConfig("a", steps=steps),), checkpoint=settings)
    built = []
    monkeypatch.setattr(checkpoint_module, "_manager", lambda *_, **options: built.append(options))
    monkeypatch.setattr(Checkpoints, "__exit__", lambda *_: None)
    with Checkpoints.of_run(checkpoint_module.Path("absent"), config, {}):
        policy = built[1]["preservation_policy"]
    on_disk = []
    for step in range(1, steps + 1):
        if step % 5 == 0 or step == steps:
            on_disk.append(SimpleNamespace(step=step))
            keeps = policy.should_preserve(on_disk, context=None)
            on_disk = [info for info, is_kept in zip(on_disk, keeps, strict=True) if is_kept]
    for_ever = [
        x for x in on_disk if (keep_stage_ends and x.step == steps) or (keep_every and x.step % keep_every == 0)
    ]
    assert kept_saves(settings, config.schedule[0]) == (len(on_disk), len(for_ever))


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with checkpoints of ITEMS at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("pair") / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        save_steps(checkpoints, 1, 2)
    return folder


@pytest.fixture
def damaged(pair, tmp_path):
    """A copy of `pair`."""
    return shutil.copytree(pair, tmp_path / "checkpoints")


ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), ITEMS)


def read(folder, step=2):
    with Checkpoints(folder, keep=None) as checkpoints:
        return checkpoints.restore(step, ABSTRACT)


def files_of(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x15
    path.write_bytes(data)


def test_a_changed_byte_of_any_file_is_damage_or_harmless(damaged):
    """Of 5 places in each file."""
    noticed = set()
    for path in files_of(damaged / "2"):
        whole = path.read_bytes()
        for place in sorted({i * (len(whole) - 1) // 4 for i in range(5)} if whole else ()):
            flip(path, place)
            try:
                chex.assert_trees_all_equal(read(damaged), ITEMS)
            except DamagedCheckpointError:
                noticed.add(str(path.relative_to(damaged / "2")))
            path.write_bytes(whole)
    print(f"damage was noticed in {sorted(noticed)}")
    assert "meta/metadata" in noticed
    assert {"params", "train_state"} <= {name.split("/")[0] for name in noticed}


def test_a_changed_byte_inside_an_array_is_noticed_by_its_checksum(tmp_path):
    """The file format compresses nothing in random numbers, and has no checksum of them."""
    noise = {**ITEMS, "params": {"x": jax.random.normal(jax.random.key(0), (4096,))}}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, noise, {})
        checkpoints.wait()
        largest = max(files_of(tmp_path / "1"), key=lambda path: path.stat().st_size)
        flip(largest, largest.stat().st_size // 2)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), noise)
        with pytest.raises(DamagedCheckpointError, match="damaged on disk: params/x"):
            checkpoints.restore(1, abstract)


def test_an_array_that_the_description_does_not_name_is_damage(damaged):
    """It is not taken for a checkpoint of another model, which would be refused and stay."""
    description = damaged / "2" / "params" / "_METADATA"
    stored = json.loads(description.read_text())
    stored["tree_metadata"] = {key: leaf for key, leaf in stored["tree_metadata"].items() if "x" not in key}
    description.write_text(json.dumps(stored))
    with pytest.raises(DamagedCheckpointError, match=r"its description has another params/x; .* step 1$"):
        read(damaged)


@pytest.mark.parametrize("cut", ["absent", "empty", "half"])
def test_an_absent_or_short_file_is_damage_or_harmless(cut, damaged):
    noticed = set()
    for path in files_of(damaged / "2"):
        whole = path.read_bytes()
        path.unlink() if cut == "absent" else path.write_bytes(whole[: 0 if cut == "empty" else len(whole) // 2])
        try:
            chex.assert_trees_all_equal(read(damaged), ITEMS)
        except DamagedCheckpointError:
            noticed.add(str(path.relative_to(damaged / "2")))
        path.write_bytes(whole)
    assert {"meta/metadata", "params/_METADATA", "params/manifest.ocdbt"} <= noticed


def test_a_changed_number_of_the_metadata_is_damage(damaged):
    meta = damaged / "2" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"format": ', '"format":  '))
    read(damaged)  # spaces say nothing
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "samples_seen": 7}))
    with pytest.raises(
        DamagedCheckpointError, match=r"2 cannot be read: its metadata were changed on disk; .* step 1$"
    ):
        read(damaged)


@contextlib.contextmanager
def without_rights():
    """File access as another user than root."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def without_descriptors():
    """No further file can be opened."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def refusal_of(folder) -> str:
    with pytest.raises(CheckpointError) as refused:
        read(folder)
    assert not isinstance(refused.value, DamagedCheckpointError), refused.value
    return str(refused.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user for a moment")
@pytest.mark.parametrize("part", ["meta/metadata", "params/_METADATA", "params/d", "params/manifest.ocdbt"])
def test_a_lack_of_rights_sets_nothing_aside(part, damaged):
    for folder in (*damaged.parents, damaged):
        with contextlib.suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o055)
    (damaged / "2" / part).chmod(0)
    with without_rights():
        error = refusal_of(damaged)
    assert str(damaged / "2") in error
    assert "permission" in error.lower()
    assert "aside" not in error


def test_a_lack_of_file_descriptors_sets_nothing_aside(damaged):
    with Checkpoints(damaged, keep=None) as checkpoints:
        checkpoints.restore(1, ABSTRACT)  # imports and threads are there
        with without_descriptors(), pytest.raises(CheckpointError) as refused:
            checkpoints.restore(2, ABSTRACT)
    assert not isinstance(refused.value, DamagedCheckpointError), refused.value


def test_a_loop_of_links_is_an_error_of_the_file_system(damaged):
    """TensorStore's own words for an error of the operating system that is not an absent file."""
    path = damaged / "2" / "params" / "manifest.ocdbt"
    path.unlink()
    path.symlink_to(path)
    assert "cannot be read now" in refusal_of(damaged)


# ---- setting aside ---------------------------------------------------------------------------------------------------


def test_a_damaged_step_is_renamed_and_can_be_saved_again(damaged):
    (damaged / "2.unreadable").mkdir()
    with Checkpoints(damaged, keep=2, damaged={2: "a byte changed"}) as checkpoints:
        (line,) = checkpoints.set_aside(1)
        assert line == (
            f"warning: checkpoint {damaged / '2'} cannot be read: a byte changed; it is now 2.unreadable.2, and "
            "training goes on from step 1"
        )
        assert checkpoints.set_aside(1) == []
        save_steps(checkpoints, 2, 3)
    assert sorted(path.name for path in damaged.iterdir()) == ["2", "2.unreadable", "2.unreadable.2", "3"]
    assert files_of(damaged / "2.unreadable.2")


def test_steps_that_cannot_be_read_are_passed_over_until_none_is_left(damaged):
    """Without an older checkpoint the run is refused: it must not start from scratch in a used workdir."""
    (damaged / "2" / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"checkpoints/2 cannot be read: files are missing.*step 1$"):
        resumed_position(damaged.parent, {})
    (damaged / "1" / "meta" / "metadata").write_text("{")
    with pytest.raises(DamagedCheckpointError, match="checkpoints/1 cannot be read") as refused:
        resumed_position(damaged.parent, {2: "files are missing"})
    words = rf"no checkpoint in {damaged} can be read \(step 2: files are missing; step 1: a\); nothing was deleted"
    with pytest.raises(CheckpointError, match=words):
        resumed_position(damaged.parent, {1: "a", 2: "files are missing"})
    assert refused.value.step == 1
    assert resumed_position(damaged.parent / "absent", {}) is None
