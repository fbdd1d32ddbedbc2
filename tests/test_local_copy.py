"""A workdir on object storage: its local copy and the prepared data, on a local S3 server."""

import threading
import time

import pytest
from storage_cases import SILENT, store_of

from flmjax import cli
from flmjax.config import ConfigError
from flmjax.workdir import local_copy, storage
from flmjax.workdir.lease import LEASE_FILE, leased
from flmjax.workdir.local_copy import fetch_data, reading_copy, store_data, working_copy
from flmjax.workdir.paths import checkpoint_directory
from flmjax.workdir.storage import StorageError, list_objects, remote_path


def test_files_of_a_copy_are_stored_as_they_change(url):
    with working_copy(remote_path(url), SILENT) as copy:
        (copy.folder / "certificates").mkdir()
        for name in ("config.json", "certificates/step_5.json", "metrics.tmp", ".hidden", "checkpoints", "data"):
            path = copy.folder / name
            path.mkdir() if name in local_copy.NOT_COPIED else path.write_text("1")
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


def test_a_local_copy_is_no_workdir(url, capsys):
    """A run there would write checkpoints to the store without a lease."""
    with working_copy(remote_path(url), SILENT) as copy:
        folder = copy.folder
    assert cli.main(["train", "--config=configs/quickstart.py", f"--workdir={folder}"]) == 2
    assert capsys.readouterr().err == f"flmjax: {folder} is the local copy of {url}; name --workdir={url}\n"


def test_what_is_not_stored_after_an_error_is_said(url, monkeypatch):
    lines: list[str] = []

    def fail(*_):
        raise StorageError(f"{url}/config.json: gone")

    def run() -> None:
        with working_copy(remote_path(url), lines.append) as copy:
            (copy.folder / "config.json").write_text("1")
            monkeypatch.setattr(local_copy, "upload", fail)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert lines == [f"warning: {url}: what changed since the last save is not stored: {url}/config.json: gone"]


def test_a_copy_that_is_not_whole_is_not_stored(url, monkeypatch):
    """Neither by the thread nor at the end: its files are older than those of the store."""
    monkeypatch.setattr(local_copy, "UPLOAD_SECONDS", 0.01)
    with working_copy(remote_path(url), SILENT) as copy:
        (copy.folder / "metrics.jsonl").write_text("old")
    store_of(url).write("metrics.jsonl", b"newer").result()

    def fail(folder) -> None:
        time.sleep(0.2)
        (folder / "metrics.jsonl").write_text("of this host")
        raise StorageError(f"{url}/data: gone")

    monkeypatch.setattr(local_copy, "fetch_data", fail)
    with pytest.raises(StorageError, match="gone"), working_copy(remote_path(url), SILENT):
        pass
    assert list_objects(url) == {"metrics.jsonl": 5}


def test_an_error_before_the_run_begins_ends_the_thread_of_the_copy(url, monkeypatch):
    def fail(_: str) -> None:
        raise RuntimeError("another process is lost")

    monkeypatch.setattr(local_copy, "barrier", fail)
    with pytest.raises(RuntimeError, match="lost"), working_copy(remote_path(url), SILENT):
        pass
    assert not [thread for thread in threading.enumerate() if "_upload_until_closed" in thread.name]


def test_a_file_that_is_removed_while_the_copy_is_stored_is_left_out(url, monkeypatch):
    listed = local_copy._files
    with working_copy(remote_path(url), SILENT) as copy:
        (copy.folder / "config.json").write_text("1")
        with monkeypatch.context() as patch:
            patch.setattr(local_copy, "_files", lambda folder: {**listed(folder), "absent": (1, 1)})
            copy.upload()
        assert sorted(list_objects(url)) == [LEASE_FILE, "config.json"]


def prepared(folder, sources: str) -> None:
    """Data of these sources in the folder of a run."""
    (folder / "data").mkdir()
    (folder / "data" / "meta.json").write_text(sources)
    (folder / "data" / "a-train.u32").write_text(f"tokens of {sources}")


@pytest.mark.parametrize("way", ["stored", "fetched"])
def test_data_that_the_store_has_no_more_are_removed(url, way, tmp_path, monkeypatch):
    """The run was deleted (aws s3 rm), and the next one at this URL may have other sources."""
    with working_copy(remote_path(url), SILENT) as copy:
        prepared(copy.folder, "X")
        store_data(copy.folder)
    if way == "fetched":
        monkeypatch.setenv("FLMJAX_SCRATCH", str(tmp_path / "other host"))
        with working_copy(remote_path(url), SILENT):
            pass
    for name in list_objects(url):
        store_of(url).write(name, None).result()
    with working_copy(remote_path(url), SILENT) as again:
        assert not (again.folder / "data").exists()


def test_data_that_were_never_stored_stay(url):
    """The run was killed before it stored them, and goes on."""
    with working_copy(remote_path(url), SILENT) as copy:
        prepared(copy.folder, "X")
    with working_copy(remote_path(url), SILENT) as again:
        assert (again.folder / "data" / "meta.json").exists()


def test_data_that_are_fetched_in_part_are_not_mixed_with_others(url, monkeypatch):
    """Files of one size: a start was killed while it fetched data of an earlier run at this URL."""
    for name, content in (("meta.json", b"X"), ("a-train.u32", b"tokens of X")):
        store_of(url).write(f"data/{name}", content).result()

    def killed(source: str, file) -> bool:
        if source.endswith("meta.json"):
            raise StorageError("killed")
        return storage.download(source, file)

    with monkeypatch.context() as patch:
        patch.setattr(local_copy, "download", killed)
        with pytest.raises(StorageError, match="killed"), working_copy(remote_path(url), SILENT):
            pass
    for name, content in (("meta.json", b"Y"), ("a-train.u32", b"tokens of Y")):
        store_of(url).write(f"data/{name}", content).result()
    with working_copy(remote_path(url), SILENT) as copy:
        assert (copy.folder / "data" / "a-train.u32").read_text() == "tokens of Y"
        assert not list(copy.folder.glob(".data.fetched*"))


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
    kept = ["config.json", "data/meta.json"]
    for name in (*kept, "data/a-train.u32", *(f"{folder}/5/d" for folder in local_copy.NOT_READ)):
        store_of(url).write(name, b"1").result()
    before = list_objects(url)
    with leased(url, SILENT), reading_copy(remote_path(url)) as folder:  # a run is at work
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert names == {*kept, ".origin.json"}
        assert folder.name == url.rpartition("/")[2]
        assert str(checkpoint_directory(folder)) == f"{url}/checkpoints"
    assert list_objects(url) == before


def test_a_file_that_the_run_removes_is_left_out_of_a_reading_copy(url, monkeypatch):
    store_of(url).write("config.json", b"1").result()
    monkeypatch.setattr(local_copy, "list_objects", lambda *_, **__: {"config.json": 1, "growth.partial": 1})
    with reading_copy(remote_path(url)) as folder:
        assert sorted(path.name for path in folder.iterdir()) == [".origin.json", "config.json"]
