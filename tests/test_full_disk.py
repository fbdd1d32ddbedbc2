"""A disk that is full: the error names the file or the folder that was being written."""

import contextlib
import resource
import shutil
from pathlib import Path

import pytest
from report_runs import make_workdir

from flmjax import cli
from flmjax.config import RunConfig
from flmjax.lock import locked
from flmjax.workdir.metrics import MetricsWriter
from flmjax.workdir.paths import Parent, begin_growth, write_config, write_parent
from flmjax.workdir.starts import StartEntry

QUICKSTART = f"--config={Path(__file__).parents[1] / 'configs' / 'quickstart.py'}"


@contextlib.contextmanager
def full_disk(limit: int = 0):
    """No file may grow past `limit` bytes: as on a full disk, a file can be opened, but not written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("output", [False, True])
def test_a_report_that_cannot_be_written_is_named(output, tmp_path, capsys):
    make_workdir(tmp_path / "run")
    flags = [f"--output={tmp_path / 'page'}"] if output else []
    with full_disk():
        status = cli.main(["report", f"--workdir={tmp_path / 'run'}", *flags])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (1, 1)
    assert f"File too large: '{tmp_path / ('page' if output else 'run') / 'report.html'}'" in error


def test_a_comparison_that_cannot_be_written_is_named(tmp_path, capsys):
    make_workdir(tmp_path / "a")
    make_workdir(tmp_path / "b")
    with full_disk():
        cli.main(["report", *(f"--workdir={tmp_path / name}" for name in "ab"), f"--output={tmp_path / 'page'}"])
    assert f"File too large: '{tmp_path / 'page' / 'a-vs-b.html'}'" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [300, 5_000, 12_000, 40_000])
def test_data_that_cannot_be_prepared_are_named(limit, tmp_path, capsys):
    """The spool of the texts, the parts and the token files are files of the folder."""
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"text number {i} of some words " * 40)
    flags = [f"--config.data.sources={tmp_path / 'text'}", "--config.data.vocabulary=bytes"]
    with full_disk(limit):
        status = cli.main(["prepare", QUICKSTART, f"--workdir={tmp_path / 'run'}", *flags])
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 1
    assert error.startswith("flmjax: OSError: ")
    assert f"'{tmp_path / 'run'}/" in error


def write_metrics(folder: Path) -> None:
    with MetricsWriter(folder, 0) as writer, full_disk():
        writer.write("train", 1, loss=1.5)


def shorten_metrics(folder: Path) -> None:
    make_workdir(folder / "old")
    shutil.copy(folder / "old" / "metrics.jsonl", folder)
    with full_disk():
        MetricsWriter(folder, 2)


def write_start(folder: Path) -> None:
    with full_disk():
        StartEntry(folder).write()


def take_lock(folder: Path) -> None:
    with full_disk(), locked(folder / ".lock", "it"):
        pass


def store(write, *values: object):
    def write_in(folder: Path) -> None:
        with full_disk():
            write(*values, folder)

    return write_in


WRITERS = {
    "metrics.jsonl": write_metrics,
    "metrics.tmp": shorten_metrics,
    "starts.tmp": write_start,
    ".lock": take_lock,
    "config.tmp": store(write_config, RunConfig()),
    "parent.json": store(write_parent, Parent("p", 1, "a", 1, 1)),
    "growth.partial": lambda folder: store(lambda _: begin_growth(folder, Path("source")))(folder),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_a_workdir_that_cannot_be_written_is_named(name, tmp_path):
    with pytest.raises(OSError, match="File too large") as failure:
        WRITERS[name](tmp_path)
    assert failure.value.filename == str(tmp_path / name)
