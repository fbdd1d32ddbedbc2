"""A run whose stages have three meshes, remat settings and numbers of microbatches: the results of one device."""

import json
import shutil

import numpy as np
import pytest
from run_cases import assert_same_run, start, write_lab

from flmjax.workdir.metrics import read_metrics

ONE_MESH = [f"--config.stages[{i}].mesh.{axis}=1" for i in range(3) for axis in ("replica", "fsdp", "tensor")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with the run `meshes` on eight devices, a mesh for each stage, which was not interrupted."""
    lab = tmp_path_factory.mktemp("layouts")
    write_lab(lab)
    start(lab, "never", lab / "meshes", config="layouts.py", devices=8)
    return lab


def losses(workdir, kind):
    return {line["step"]: line["loss"] for line in read_metrics(workdir) if line["kind"] == kind}


def test_three_stages_on_three_meshes_equal_one_device(lab):
    start(lab, "never", lab / "one", *ONE_MESH, config="layouts.py")
    for kind in ("train", "validation"):
        one, meshes = losses(lab / "one", kind), losses(lab / "meshes", kind)
        assert one.keys() == meshes.keys()
        np.testing.assert_allclose(list(meshes.values()), list(one.values()), rtol=1e-6, atol=0)
    assert len(losses(lab / "one", "train")) == 30


def test_growth_between_meshes_is_exact(lab):
    for step in (10, 20):
        certificate = json.loads((lab / "meshes" / "certificates" / f"step_{step:08d}.json").read_text())
        assert certificate["max_difference"]["float64"] <= 1e-12
        assert certificate["failure"] is None


@pytest.mark.parametrize("update", [10, 11, 20, 21])
def test_a_run_resumes_on_either_side_of_a_border(lab, update):
    """Killed before `update`; the growths come after updates 10 and 20, and every fifth state is saved."""
    workdir = lab / f"killed{update}"
    start(lab, f"saved:{update}", workdir, config="layouts.py", devices=8, expect=-9)
    start(lab, "never", workdir, config="layouts.py", devices=8)
    assert_same_run(workdir, lab / "meshes")


def test_a_checkpoint_of_one_mesh_is_resumed_on_another(lab):
    workdir = lab / "moved"
    shutil.copytree(lab / "meshes", workdir)
    for step in (25, 30):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    shown = start(lab, "never", workdir, *ONE_MESH, config="layouts.py").stdout
    assert "resume at step 21" in shown
    after, before = losses(workdir, "train"), losses(lab / "meshes", "train")
    np.testing.assert_allclose(list(after.values()), list(before.values()), rtol=1e-6, atol=0)
