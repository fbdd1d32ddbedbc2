"""Several processes that go back before a spike together: with one workdir, and with copies of one on a store."""

import pytest
from process_cases import command, running, statuses, train, write_lab

from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.metrics import read_metrics
from flmjax.workdir.paths import checkpoint_directory
from flmjax.workdir.roll_backs import read_roll_backs
from flmjax.workdir.storage import download, remote_path

SPIKE = ("action=roll_back", "window=4", "roll_back_steps=1", "skip_batches=1")
FLAGS = (*(f"--config.spike.{setting}" for setting in SPIKE), "--config.optimizer.max_skipped_updates=1")
# Update 6 is not finite, in the moment in which the checkpoint of step 5 is written; update 7 is left out, too.
WHEN, LEFT_OUT = "update.6:nan", "40:56"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a config and the run `without` of two processes, which never read the samples."""
    lab = write_lab(tmp_path_factory.mktemp("lab"))
    results = train(lab, lab / "without", f"--config.data.skip_samples={LEFT_OUT}", "--config.data.vocabulary=bytes")
    assert statuses(results) == [0, 0], [result.err for result in results]
    return lab


def checksums(workdir):
    with Checkpoints(checkpoint_directory(workdir), keep=None) as checkpoints:
        return checkpoints.meta(16)["checksums"]


def assert_rolled_back(workdir, lab):
    """Assert that the run in this folder went back once, and is one that never read the samples, bitwise."""
    (record,) = read_roll_backs(workdir)
    assert (record.from_step, record.to_step, record.is_complete) == (6, 5, True)
    assert f"{record.first_sample}:{record.end_sample}" == LEFT_OUT
    assert [line["step"] for line in read_metrics(workdir) if line["kind"] == "roll_back"] == [5]


def test_two_processes_roll_back_together(lab):
    workdir = lab / "rolled_back"
    results = train(lab, workdir, *FLAGS, when=WHEN)
    assert statuses(results) == [0, 0], [result.err for result in results]
    assert "back to step 5, samples 40 to 55 are left out" in results[0].out
    assert_rolled_back(workdir, lab)
    assert checksums(workdir) == checksums(lab / "without")


@pytest.mark.slow
def test_two_hosts_roll_back_together_on_a_store(lab, s3, tmp_path):
    """Each process has its own copy of the workdir; the second host had no config and no record of the roll-back."""
    url, commands = f"{s3}/rolled_back", []
    for host in range(2):
        line = command(lab, url, WHEN, *FLAGS)
        commands.append(["env", f"FLMJAX_SCRATCH={tmp_path / str(host)}", *line])
    with running(lab, *commands) as run:
        results = run.ended()
    assert statuses(results) == [0, 0], [result.err for result in results]
    for name in ("roll_backs.jsonl", "metrics.jsonl"):
        download(f"{url}/{name}", tmp_path / "copy" / name)
    assert_rolled_back(tmp_path / "copy", lab)
    assert checksums(remote_path(url)) == checksums(lab / "without")
