"""A workdir on object storage: its URL, its local copy and its checkpoints, on a local S3 server."""

import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import TINY
from storage_cases import SILENT, store_of

import flmjax
from flmjax import cli
from flmjax.config import ConfigError, OptimizerConfig
from flmjax.training.state import init_state, state_spec, to_items
from flmjax.workdir import lease, local_copy, storage
from flmjax.workdir.checkpoint import Checkpoints, remove_incomplete
from flmjax.workdir.lease import LEASE_FILE, leased
from flmjax.workdir.local_copy import fetch_data, reading_copy, store_data, working_copy
from flmjax.workdir.paths import checkpoint_directory, whole_steps
from flmjax.workdir.storage import (
    StorageError,
    list_objects,
    remote_path,
    run_path,
)


@pytest.fixture
def url(s3, request, tmp_path, monkeypatch):
    """URL of a workdir that no other test has; its copies are in tmp_path."""
    monkeypatch.setenv("FLMJAX_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.05)
    return f"{s3}/{request.node.name.partition('[')[0]}"


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


# ---- the local copy --------------------------------------------------------------------------------------------------


def test_files_of_a_copy_are_stored_as_they_change(url):
    with working_copy(remote_path(url), SILENT) as copy:
        (copy.folder / "certificates").mkdir()
        for name in ("config.json", "certificates/step_5.json", "metrics.tmp", ".hidden", "checkpoints", "data"):
            path = copy.folder / name
            path.mkdir() if name in local_copy.APART else path.write_text("1")
        (copy.folder / "data" / "tokens.u32").write_text("1")
        copy.upload()
        assert sorted(list_objects(url)) == [LEASE_FILE, "certificates/step_5.json", "config.json"]
        (copy.folder / "config.json").write_text("22")
        (copy.folder / "certificates" / "step_5.json").unlink()
        copy.upload()
        assert list_objects(url, without=()) == {LEASE_FILE: list_objects(url)[LEASE_FILE], "config.json": 2}
        (copy.folder / "late").write_text("1")
    assert sorted(list_objects(url)) == ["config.json", "late"]  # stored at the end; no lease is left


def test_the_store_counts_when_a_run_starts_again(url):
    """Another host may have gone on since."""
    with working_copy(remote_path(url), SILENT) as copy:
        (copy.folder / "metrics.jsonl").write_text("old")
        (copy.folder / "only_here").write_text("old")
    store_of(url).write("metrics.jsonl", b"newer").result()
    store_of(url).write("only_here", None).result()
    with working_copy(remote_path(url), SILENT) as again:
        assert again.folder == copy.folder
        assert (again.folder / "metrics.jsonl").read_text() == "newer"
        assert not (again.folder / "only_here").exists()


def test_files_are_stored_while_the_run_works(url, monkeypatch):
    monkeypatch.setattr(local_copy, "UPLOAD_SECONDS", 0.05)
    with working_copy(remote_path(url), SILENT) as copy:
        (copy.folder / "heartbeat.json").write_text("1")
        deadline = time.monotonic() + 20
        while "heartbeat.json" not in list_objects(url):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_an_error_names_the_url_and_the_copy_is_still_stored(url):
    def run() -> None:
        with working_copy(remote_path(url), SILENT) as copy:
            (copy.folder / "certificate.json").write_text("1")
            raise ConfigError(f"{copy.folder / 'config.json'} is no JSON")

    with pytest.raises(ConfigError, match=f"^{url}/config.json is no JSON$"):
        run()
    assert "certificate.json" in list_objects(url)


def test_a_store_that_fails_in_a_save_stops_the_run(url, monkeypatch):
    def fail(*_):
        raise StorageError(f"{url}: gone")

    def run() -> None:
        with working_copy(remote_path(url), SILENT) as copy:
            (copy.folder / "config.json").write_text("1")
            monkeypatch.setattr(local_copy, "upload", fail)
            copy.upload()

    with pytest.raises(StorageError, match="gone"):
        run()


def test_prepared_data_are_stored_once_and_fetched_whole(url, tmp_path, monkeypatch):
    with working_copy(remote_path(url), SILENT) as copy:
        data = copy.folder / "data"
        data.mkdir()
        for name in ("meta.json", "a-train.u32", "verified.json"):
            (data / name).write_text(name)
        store_data(copy.folder)
        assert "data/verified.json" not in list_objects(url)
        monkeypatch.setattr(local_copy, "upload", None)
        store_data(copy.folder)  # stores nothing
        monkeypatch.undo()
    monkeypatch.setenv("FLMJAX_SCRATCH", str(tmp_path / "other host"))
    with working_copy(remote_path(url), SILENT) as other:
        assert other.folder != copy.folder
        assert {path.name for path in (other.folder / "data").iterdir()} == {"meta.json", "a-train.u32"}
        (other.folder / "data" / "a-train.u32").write_text("cut")
        fetch_data(other.folder)
        assert (other.folder / "data" / "a-train.u32").read_text() == "a-train.u32"


def test_data_that_are_not_stored_whole_are_not_fetched(url):
    store_of(url).write("data/a-train.u32", b"1").result()
    with working_copy(remote_path(url), SILENT) as copy:
        assert not (copy.folder / "data").exists()


def test_a_reader_changes_nothing_and_fetches_no_tokens(url):
    for name in ("config.json", "data/meta.json", "data/a-train.u32", "tensorboard/events", "checkpoints/5/d"):
        store_of(url).write(name, b"1").result()
    before = list_objects(url)
    with leased(url, SILENT), reading_copy(remote_path(url)) as folder:  # a run is at work
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert names == {"config.json", "data/meta.json", ".origin.json"}
        assert folder.name == url.rpartition("/")[2]
        assert str(checkpoint_directory(folder)) == f"{url}/checkpoints"
    assert list_objects(url) == before


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


def test_what_another_process_writes_is_seen_at_once(url):
    """A cache of listings hid a checkpoint that another process had completed."""
    directory = remote_path(url) / "checkpoints"
    assert whole_steps(directory) == []
    for step in (1, 2):
        for name in ("_CHECKPOINT_METADATA", "commit_success.txt", "params/d"):
            store_of(url).write(f"checkpoints/{step}/{name}", b"1").result()
        assert max(whole_steps(directory)) == step
