"""Runs whose workdir is a URL on a local S3 server: killed, resumed, reported and kept apart."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from run_cases import batches, make_lab, start

import flmjax
from flmjax import cli
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.lease import LEASE_FILE, leased
from flmjax.workdir.metrics import read_metrics
from flmjax.workdir.paths import whole_steps
from flmjax.workdir.starts import read_starts
from flmjax.workdir.storage import list_objects, read_object, remote_path

HOST = """
import os, sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
from flmjax.sharding.processes import barrier, is_writer
from flmjax.workdir.checkpoint import Checkpoints
from flmjax.workdir.local_copy import fetch_data, store_data, working_copy
from flmjax.workdir.paths import checkpoint_directory
from flmjax.workdir.storage import remote_path

with working_copy(remote_path(sys.argv[3])) as copy:
    data = copy.folder / "data"
    if is_writer():
        data.mkdir()
        (data / "meta.json").write_text("meta")
        (data / "a-train.u32").write_text("tokens")
        (copy.folder / "config.json").write_text("{}")
        store_data(copy.folder)
    barrier("prepared")
    fetch_data(copy.folder)
    assert (data / "a-train.u32").read_text() == "tokens"
    assert is_writer() == (copy.folder / "config.json").exists()
    split = NamedSharding(Mesh(jax.devices(), ("fsdp",)), PartitionSpec("fsdp"))
    whole = np.arange(8, dtype=np.float32)
    array = jax.make_array_from_callback((8,), split, lambda index: whole[index])
    with Checkpoints(checkpoint_directory(copy.folder), keep=2) as checkpoints:
        checkpoints.before_save = copy.upload
        for step in (1, 2, 3):
            checkpoints.save(step, {"params": {"a": array}, "train_state": {"b": array}}, {})
            checkpoints.wait()
        restored = checkpoints.restore(3, {"params": {"a": jax.ShapeDtypeStruct((8,), np.float32, sharding=split)}})
    assert np.array_equal(multihost_utils.process_allgather(restored["params"]["a"], tiled=True), whole)
print("done", flush=True)
"""
TIMES = ("tokens_per_second", "model_flops_utilization", "seconds")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with the local run `straight`, which was not interrupted."""
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Folder of the local copies."""
    folder = tmp_path / "scratch"
    monkeypatch.setenv("FLMJAX_SCRATCH", str(folder))
    return folder


def timeless(workdir) -> list[dict]:
    """The lines of metrics without their times."""
    lines = read_metrics(workdir)
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def checksums(directory, step: int) -> dict[str, int]:
    with Checkpoints(directory, keep=None) as checkpoints:
        return checkpoints.meta(step)["checksums"]


def objects_of(url: str, step: int) -> set[str]:
    """Objects of the checkpoint at `step`, by their path in it."""
    head = f"checkpoints/{step}/"
    return {name.removeprefix(head) for name in list_objects(url) if name.startswith(head)}


@pytest.mark.slow
def test_a_run_on_a_store_survives_kills_bitwise(lab, s3, scratch, capsys):
    """kill -9 between saves and, on the next host, during a save: the losses are those of the local run."""
    url, log = f"{s3}/killed", lab / "remote.batches"
    start(lab, "saved:8", url, expect=-9, log=log)
    assert whole_steps(remote_path(url) / "checkpoints") == [5]
    assert LEASE_FILE in list_objects(url)
    assert [line["step"] for line in read_metrics(url) if line["kind"] == "train"][:5] == [1, 2, 3, 4, 5]

    shutil.rmtree(scratch)  # the next start is on another host, which has no copy
    result = start(lab, "saving:2", url, expect=-9, log=log)
    assert "resume at step 5" in result.stdout
    assert "the lease of process " in result.stdout
    assert "which has ended, is taken over" in result.stdout
    assert "loading the data" in result.stdout  # not prepared again
    newest = max(whole_steps(remote_path(url) / "checkpoints"))
    print(f"killed in the save after step {newest}: {len(objects_of(url, 15))} objects of step 15")
    assert "commit_success.txt" not in objects_of(url, 15)

    result = start(lab, "never", url, log=log)
    assert f"resume at step {newest}" in result.stdout
    assert f"report: {url}/report.html" in result.stdout
    assert str(scratch) not in result.stdout + result.stderr
    directory = remote_path(url) / "checkpoints"
    assert whole_steps(directory) == whole_steps(lab / "straight" / "checkpoints")
    assert checksums(directory, 30) == checksums(lab / "straight" / "checkpoints", 30)
    assert timeless(url) == timeless(lab / "straight")
    assert batches(lab / "remote") == batches(lab / "straight")
    assert [entry["first_step"] for entry in read_starts(remote_path(url))] == [0, 5, newest]
    names = list_objects(url)
    assert LEASE_FILE not in names
    local = {
        str(path.relative_to(lab / "straight")) for path in (lab / "straight").rglob("*.json*") if path.is_file()
    } - {"data/verified.json"}
    assert {name for name in local if not name.startswith("checkpoints")} <= names.keys()
    assert not [name for name in names if name.endswith((".tmp", ".lock")) or "orbax-checkpoint-tmp" in name]

    report_and_load(url, lab, capsys)


def report_and_load(url: str, lab, capsys) -> None:
    """Report the finished run, compare it with the local one, and load its model, from the URL."""
    capsys.readouterr()
    assert cli.main(["report", f"--workdir={url}"]) == 0
    assert capsys.readouterr().out == f"report: {url}/report.html\n"
    assert b"<title>killed" in read_object(f"{url}/report.html")
    assert cli.main(["report", f"--workdir={url}", f"--workdir={lab / 'straight'}", f"--output={lab}"]) == 0
    assert "killed" in (lab / "killed-vs-straight.html").read_text()
    assert flmjax.load(url).step == 30


def test_two_runs_in_one_url_are_refused(lab, s3, scratch):
    url = f"{s3}/taken"
    with leased(url, print):
        result = start(lab, "never", url, expect=2, log=lab / "taken.batches")
    assert result.stderr.startswith(f"flmjax: {url} is in use by process {os.getpid()} on ")
    assert result.stderr.count("\n") == 1
    assert list_objects(url) == {}  # the refused run has written nothing
    assert not list(scratch.glob("*"))


@pytest.mark.nightly
def test_a_run_grows_between_urls(lab, s3, scratch):
    source, target, log = f"{s3}/small", f"{s3}/grown", lab / "grown.batches"
    start(lab, "never", source, log=log)
    flags = (f"--source={source}",)
    start(lab, "never", target, *flags, command="grow", config="big.py", log=log)
    assert "checkpoints/0/commit_success.txt" in list_objects(target)
    assert json.loads(read_object(f"{target}/parent.json"))["workdir"] == source
    assert "growth.partial" not in list_objects(target)
    start(lab, "never", target, config="big.py", log=log)
    assert max(whole_steps(remote_path(target) / "checkpoints")) == 4
    error = start(lab, "never", f"{s3}/other", *flags, command="grow", config=None, expect=2, log=log).stderr
    assert "--config is missing; growth from a run on object storage needs it" in error


def test_two_hosts_with_own_copies_share_a_checkpoint(s3, tmp_path):
    """Each process has its own scratch folder, as on hosts that share no file system."""
    url = f"{s3}/hosts"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for number in range(2):
        environment = {
            **{name: value for name, value in os.environ.items() if "CACHE" not in name},
            "XLA_FLAGS": "",
            "JAX_PLATFORMS": "cpu",
            "NPROC": "8",
            "FLMJAX_SCRATCH": str(tmp_path / str(number)),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        }
        line = [sys.executable, "-c", HOST, address, str(number), url]
        processes.append(
            subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    directory = remote_path(url) / "checkpoints"
    assert whole_steps(directory) == [2, 3]
    assert {"config.json", "data/meta.json"} <= list_objects(url).keys()
    shape = jax.ShapeDtypeStruct((8,), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with Checkpoints(directory, keep=None) as reader:  # one process
        restored = reader.restore(3, {"params": {"a": shape}})["params"]["a"]
    np.testing.assert_array_equal(restored, np.arange(8, dtype=np.float32))
