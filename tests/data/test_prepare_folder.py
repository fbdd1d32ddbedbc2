"""The folder that data are prepared in: new, empty, a mount, a link, or one with other files."""

import errno
import os

import pytest
from test_prepare import BYTES, DOCUMENTS

from flmjax.config import ConfigError
from flmjax.data.prepare import prepare
from flmjax.data.prepared_folder import discard


@pytest.fixture
def prepared(tmp_path):
    return prepare(BYTES, tmp_path / "prepared", sources=DOCUMENTS)


@pytest.mark.parametrize("entries", [[], ["lost+found"]])
def test_an_empty_folder_that_cannot_be_replaced_is_filled(tmp_path, monkeypatch, entries, prepared):
    """A mount cannot: Device or resource busy."""
    directory = tmp_path / "disk"
    for path in (directory, *(directory / name for name in entries)):
        path.mkdir()
    real = os.replace

    def replace_file(source, target):
        if target == directory:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_file)
    assert prepare(BYTES, directory, sources=DOCUMENTS).meta == prepared.meta
    assert {p.name for p in directory.iterdir()} == {p.name for p in prepared.directory.iterdir()} | {*entries}


def test_files_that_were_not_all_moved_are_moved_by_the_next_call(tmp_path, monkeypatch, prepared):
    directory = tmp_path / "disk"
    directory.mkdir()
    real = os.replace

    def killed(source, target):
        if target.parent == directory and target.name == "b-train.u32":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(BYTES, directory, sources=DOCUMENTS)
    assert (directory / "a-train.u32").exists()
    assert not (directory / "meta.json").exists()
    assert prepare(BYTES, directory, sources={"a": [], "b": []}).meta == prepared.meta
    assert not (directory / ".partial").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_filled_where_it_leads(tmp_path, exists, prepared):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "data").symlink_to("../disk/deep")
    if exists:
        (tmp_path / "disk" / "deep").mkdir(parents=True)
    done = prepare(BYTES, tmp_path / "w" / "data", sources=DOCUMENTS)
    assert (done.directory, done.meta) == (tmp_path / "w" / "data", prepared.meta)
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["data"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["deep"]
    assert prepare(BYTES, tmp_path / "w" / "data", sources=DOCUMENTS).meta == prepared.meta
    discard(done.directory)
    assert list((tmp_path / "w" / "data").iterdir()) == []


def test_a_link_that_leads_to_itself_is_refused(tmp_path):
    (tmp_path / "data").symlink_to("data")
    with pytest.raises(ConfigError, match="data is a link that leads to itself"):
        prepare(BYTES, tmp_path / "data", sources=DOCUMENTS)


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_a_folder_of_other_files_is_refused(tmp_path, kind):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("kept")
    if kind == "link":
        (tmp_path / "link").symlink_to("other")
    path = tmp_path / {"folder": "other", "link": "link", "file": "other/notes"}[kind]
    with pytest.raises(ConfigError, match="exists and is no prepared data"):
        prepare(BYTES, path, sources=DOCUMENTS)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["notes"]
