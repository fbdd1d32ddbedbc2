"""A workdir on object storage: its URL and its checkpoints, on a local S3 server."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import TINY
from storage_cases import store_of

import flmjax
from flmjax import cli
from flmjax.config import ConfigError, OptimizerConfig
from flmjax.training.state import init_state, state_spec, to_items
from flmjax.workdir import storage
from flmjax.workdir.checkpoint import Checkpoints, remove_incomplete
from flmjax.workdir.paths import is_complete, saved_steps, was_complete, whole_steps
from flmjax.workdir.storage import StorageError, list_objects, remote_path, run_path

# ---- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3://", "workdir=s3:// names no bucket; write s3://BUCKET/FOLDER"),
        ("gs:///a", "workdir=gs:///a names no bucket; write gs://BUCKET/FOLDER"),
        ("s3://runs/", "workdir=s3://runs/ is a whole bucket; write s3://runs/FOLDER"),
        ("http://a/b", "workdir=http://a/b: a URL; only the workdir of a run may be one, at gs:// or s3://"),
    ],
)
def test_a_url_that_cannot_be_a_workdir_is_refused(text, words):
    with pytest.raises(ConfigError, match=words.replace("?", ".")):
        run_path(text, "workdir")


def test_a_path_of_a_url_keeps_its_scheme():
    path = run_path("s3://runs/a/b/", "workdir")
    assert str(path / "checkpoints") == "s3://runs/a/b/checkpoints"
    assert str(run_path("runs/a", "workdir")) == "runs/a"


def test_a_url_is_read_after_a_local_path_was(url, tmp_path):
    """etils keeps its answer whether TensorFlow reads URLs, and asks at the first path of any kind."""
    from etils import epath
    from etils.epath import gpath

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EPATH_USE_TF", raising=False)
        gpath._is_tf_installed.cache_clear()
        assert epath.Path(tmp_path).exists()
    assert not remote_path(url).exists()


@pytest.mark.parametrize("command", ["train", "report"])
def test_an_absent_bucket_is_one_line_and_status_2(command, s3, capsys):
    config = ["--config=configs/quickstart.py"] if command == "train" else []
    assert cli.main([command, *config, "--workdir=s3://absent/run"]) == 2
    error = capsys.readouterr().err
    assert error == "flmjax: s3://absent/run: there is no bucket absent, or it is not yours to read\n"


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    storage.file_system.cache_clear()
    monkeypatch.setitem(storage.PACKAGES, "s3", "absent_package")
    with pytest.raises(ConfigError, match=r"s3:// needs pip install 'flmjax\[storage\]'"):
        storage.connect("s3://runs/a")
    storage.file_system.cache_clear()


def test_missing_credentials_are_named(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    storage.file_system("s3")
    import s3fs

    bare = s3fs.S3FileSystem(skip_instance_cache=True)
    monkeypatch.setattr(storage, "file_system", lambda _: bare)
    with pytest.raises(ConfigError, match=r"^s3://runs/a: no credentials"):
        storage.connect("s3://runs/a")


def test_only_the_workdir_of_a_run_may_be_a_url(s3, capsys):
    assert cli.main(["report", f"--workdir={s3}/a", f"--output={s3}/b"]) == 2
    assert "--output=s3://runs/b: a URL; only the workdir of a run may be one" in capsys.readouterr().err


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items(one_device_mesh):
    return to_items(init_state(state_spec(TINY, OptimizerConfig(), one_device_mesh), 0))


def test_a_checkpoint_on_a_store_is_restored_bitwise(url, items):
    directory = remote_path(url) / "checkpoints"
    called = []
    with Checkpoints(directory, keep=2) as checkpoints:
        checkpoints.before_save = lambda: called.append(whole_steps(directory))
        for step in (1, 2, 3):
            checkpoints.save(step, items, {"stage": 0})
            checkpoints.wait()
    assert called == [[], [1], [1, 2]]
    assert whole_steps(directory) == [2, 3]
    assert not [name for name in list_objects(url) if name.startswith("checkpoints/1/")]
    assert not list((remote_path(url)).parent.glob("*.tmp"))
    with Checkpoints(directory, keep=None) as reader:
        restored = reader.restore(3, {"params": items["params"]})["params"]
        assert reader.meta(3)["stage"] == 0
    for a, b in zip(jax.tree.leaves(items["params"]), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_without_its_last_object_is_incomplete(url, items):
    directory = remote_path(url) / "checkpoints"
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, items, {})
            checkpoints.wait()
    store_of(url).write("checkpoints/2/commit_success.txt", None).result()
    assert whole_steps(directory) == [1]
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert not [name for name in list_objects(url) if name.startswith("checkpoints/2/")]
        checkpoints.save(2, items, {})
        checkpoints.wait()
    assert whole_steps(directory) == [1, 2]
    assert remove_incomplete(directory) == []


def test_a_version_of_orbax_built_otherwise_is_refused(monkeypatch):
    from flmjax.workdir import orbax_s3

    monkeypatch.setattr(orbax_s3, "REPLACED", (*orbax_s3.REPLACED, (SimpleNamespace(), "_new_name")))
    with pytest.raises(RuntimeError, match=r"cannot save to s3://: it has no _new_name"):
        orbax_s3.support_s3()


def test_load_names_a_url_without_a_run(url):
    with pytest.raises(ConfigError, match=f"{url} is no workdir of a run"):
        flmjax.load(url)


@pytest.mark.parametrize("call", [whole_steps, saved_steps, is_complete, was_complete])
def test_a_store_that_does_not_answer_is_named(call, s3, monkeypatch):
    """etils lets errors of aiohttp, botocore and google.auth through, which the command line does not expect."""
    from etils import epath

    def fail(_):
        raise type("ConnectionClosedError", (Exception,), {})("closed\nby the server")

    for name in ("is_file", "is_dir", "iterdir"):
        monkeypatch.setattr(epath.gpath._GPath, name, fail)
    with pytest.raises(StorageError, match=f"^{s3}/a: closed by the server$"):
        call(remote_path(f"{s3}/a"))


def test_what_another_process_writes_is_seen_at_once(url):
    """A cache of listings hid a checkpoint that another process had completed."""
    directory = remote_path(url) / "checkpoints"
    assert whole_steps(directory) == []
    for step in (1, 2):
        for name in ("_CHECKPOINT_METADATA", "commit_success.txt", "params/d"):
            store_of(url).write(f"checkpoints/{step}/{name}", b"1").result()
        assert max(whole_steps(directory)) == step
