"""Checkpoints read on other meshes, for other sizes and in part; incomplete and foreign ones are refused."""

import json
import re
import shutil
import time

import chex
import jax
import numpy as np
import pytest
from conftest import TINY, random_batch, with_fields

import flmjax
from flmjax.config import FORMAT, ConfigError, MeshShape, OptimizerConfig, resize
from flmjax.sharding.mesh import make_mesh
from flmjax.training.state import from_items, init_state, state_spec, to_items
from flmjax.training.step import jit_train_step
from flmjax.workdir.checkpoint import CheckpointError, Checkpoints, remove_incomplete

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
    meta.write_text(json.dumps({**stored, "format": FORMAT + 1}))
    with Checkpoints(tmp_path / "checkpoints", keep=None) as checkpoints:
        words = f"has format {FORMAT + 1}; flmjax .* reads format {FORMAT}"
        with pytest.raises(ConfigError, match=words):
            checkpoints.restore(3, to_items(spec_on(1, 1, 1).abstract))


def test_incomplete_steps_are_removed_and_nothing_else(tmp_path):
    """A killed save leaves a folder that blocks the next one: google/flax#1200, google/orbax#394."""
    for name in ("2/params", "7", "9/params", "notes"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "2" / "_CHECKPOINT_METADATA").write_text("{}")
    assert [path.name for path in remove_incomplete(tmp_path)] == ["7", "9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "notes"]
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
