"""Processes of a run: where the environment says they are, how they start, and that they compute what one would."""

import shutil
import socket

import jax
import pytest
from process_cases import LOCAL, assert_close, command, left_over, running, statuses, timeless, train, write_lab

from flmjax import cli
from flmjax.config import ConfigError, DistributedConfig
from flmjax.sharding import environment, processes
from flmjax.sharding.environment import Place, coordinator, is_first, launcher_place, local_gpus, refuse_loopback
from flmjax.workdir.starts import read_starts

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "gpu[1-24]",
    "SLURM_NTASKS": "24",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "1(x24)",
    "SLURMD_NODENAME": "gpu4",
}
ONE_A_GPU = {
    **SLURM,
    "SLURM_NTASKS": "192",
    "SLURM_PROCID": "29",
    "SLURM_LOCALID": "5",
    "SLURM_STEP_TASKS_PER_NODE": "8(x24)",
}
MPI = {
    f"OMPI_COMM_WORLD_{name}": n for name, n in (("SIZE", "4"), ("RANK", "2"), ("LOCAL_SIZE", "2"), ("LOCAL_RANK", "0"))
}
LOCAL_SH = {"FLMJAX_PROCESSES": "2", "FLMJAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "127.0.0.1:5"}


# ---- the environment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (LOCAL_SH, Place("launch/local.sh", 2, 1)),
        ({**LOCAL_SH, "FLMJAX_PROCESSES": "1", "FLMJAX_PROCESS_ID": "0"}, None),
        (SLURM, Place("Slurm", 24, 3, 1, 0, "gpu4")),
        (ONE_A_GPU, Place("Slurm", 192, 29, 8, 5, "gpu4")),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # a step of one task in a larger job
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # the batch script itself
        (MPI, Place("Open MPI", 4, 2, 2, 0, socket.gethostname())),
    ],
)
def test_the_place_of_a_process_is_that_of_its_launcher(variables, expected):
    assert launcher_place(variables) == expected
    assert is_first(variables) == (expected is None or expected.process == 0)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"FLMJAX_PROCESSES": "2", "FLMJAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is not set"),
        ({**LOCAL_SH, "FLMJAX_PROCESS_ID": ""}, "FLMJAX_PROCESS_ID is '', not a whole number"),
        ({**LOCAL_SH, "FLMJAX_PROCESS_ID": "2"}, "process 2 is not one of 2"),
        ({**SLURM, "SLURM_LOCALID": "x"}, "SLURM_LOCALID is 'x', not a whole number"),
        ({**SLURM, "SLURM_NODEID": "x"}, "SLURM_NODEID is 'x', not a whole number"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x"}, r"SLURM_STEP_TASKS_PER_NODE is '8\(x', not like"),
    ],
)
def test_variables_that_cannot_be_are_named(variables, words):
    with pytest.raises(ConfigError, match=words):
        launcher_place(variables)


@pytest.mark.parametrize(
    ("variables", "gpus", "expected"),
    [
        (SLURM, 8, list(range(8))),  # JAX alone takes [SLURM_LOCALID]: one of eight
        (ONE_A_GPU, 8, [5]),
        ({**ONE_A_GPU, "CUDA_VISIBLE_DEVICES": "5"}, 8, [0]),  # --gpus-per-task=1: number 5 is not visible
        ({**ONE_A_GPU, "SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0"}, 1, [0]),  # with cgroups
        ({**ONE_A_GPU, "SLURM_STEP_TASKS_PER_NODE": "4(x48)", "SLURM_LOCALID": "1"}, 8, [2, 3]),
        (
            {
                **ONE_A_GPU, "SLURM_STEP_TASKS_PER_NODE": "2(x96)", "SLURM_LOCALID": "1",
                "SLURM_STEP_GPUS": "0,1,2,3", "CUDA_VISIBLE_DEVICES": "2,3",
            },
            8,
            [0, 1],
        ),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": ""}, 8, None),
        ({**SLURM, "JAX_PLATFORMS": "cpu"}, 8, None),
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "1"}, 8, None),
        (SLURM, 0, None),
        (MPI, 2, [0]),
    ],
)  # fmt: skip
def test_a_process_takes_its_share_of_the_gpus_it_sees(variables, gpus, expected, tmp_path):
    """jax-ml/jax#23452, #28194: with one GPU a task visible, processes asked for numbers that were not there."""
    for i in range(gpus):
        (tmp_path / f"nvidia{i}").touch()
    (tmp_path / "nvidiactl").touch()
    place = launcher_place(variables)
    assert place is not None
    assert local_gpus(place, variables, tmp_path) == expected


def test_gpus_that_do_not_divide_are_refused(tmp_path):
    for i in range(8):
        (tmp_path / f"nvidia{i}").touch()
    variables = {**ONE_A_GPU, "SLURM_STEP_TASKS_PER_NODE": "3(x64)"}
    with pytest.raises(ConfigError, match="the 8 GPUs of gpu4 do not divide over its 3 processes"):
        local_gpus(launcher_place(variables), variables, tmp_path)


@pytest.mark.parametrize(
    ("address", "names", "is_refused"),
    [
        ("127.0.0.1:1", {}, True),
        ("localhost:1", {"localhost": "127.0.0.1"}, True),
        ("[::1]:1", {"::1": "::1"}, True),
        ("gpu1:1", {"gpu1": "127.0.1.1"}, True),
        ("gpu1:1", {"gpu1": "10.0.0.1"}, False),
        ("gpu1:1", {}, False),  # the name may resolve later
        ("gpu4:1", {"gpu4": "127.0.1.1"}, False),  # process 0 itself, in Debian
        ("gpu1:1", {"gpu1": "127.0.0.1", "gpu4": "127.0.0.1"}, False),  # nodes simulated on one machine
    ],
)
def test_a_loopback_coordinator_of_several_hosts_is_refused(address, names, is_refused, monkeypatch):
    """Each node would wait for itself for ever."""

    def getaddrinfo(host, port):
        if host == "127.0.0.1":
            names.setdefault(host, host)
        if host not in names:
            raise socket.gaierror(-2, "unknown")
        return [(0, 0, 0, "", (names[host], port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    if is_refused:
        with pytest.raises(ConfigError, match=r"the coordinator's address .* is this host itself"):
            refuse_loopback(address, launcher_place(SLURM))
    else:
        refuse_loopback(address, launcher_place(SLURM))
    refuse_loopback(address, launcher_place(LOCAL_SH))


def test_an_address_without_a_port_is_refused():
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS=gpu1 must be HOST:PORT"):
        coordinator({"JAX_COORDINATOR_ADDRESS": "gpu1"})


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"NPROC": "2"}, "8"),
        ({"NPROC": "2", "JAX_NUM_CPU_DEVICES": "4"}, "16"),
        ({"NPROC": "40", "JAX_NUM_CPU_DEVICES": "4"}, "40"),
        ({"NPROC": "2", "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, "12"),
    ],
)
def test_the_pool_has_a_thread_for_every_exchange(variables, threads):
    environment.make_room_for_gloo(variables)
    assert variables["NPROC"] == threads


# ---- the start -------------------------------------------------------------------------------------------------------


def started(monkeypatch, variables: dict[str, str], config: DistributedConfig) -> dict[str, object]:
    """The arguments that jax.distributed.initialize gets."""
    calls: list[tuple] = []
    for name in list(environment.os.environ):
        if name.startswith(("SLURM", "OMPI", "FLMJAX_P", "JAX_COORD")):
            monkeypatch.delenv(name)
    for name, value in {"NPROC": "8", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(processes, "Peers", lambda *_: None)
    monkeypatch.setattr(processes, "local_gpus", lambda place: [0, 1])
    processes.start_processes(config)
    if not calls:
        return {}
    ((args, kwargs),) = calls
    names = ("coordinator_address", "num_processes", "process_id", "local_device_ids", "cluster_detection_method")
    return dict(zip(names, args, strict=True)) | kwargs


def test_jax_is_started_with_the_settings_of_the_config(monkeypatch):
    """marin-community/marin#5480: a variable that was meant to raise the timeout was read by nobody."""
    config = DistributedConfig(start_timeout_seconds=900, heartbeat_seconds=70, shutdown_seconds=50)
    arguments = started(monkeypatch, {**SLURM, "JAX_COORDINATOR_ADDRESS": "gpu1:77"}, config)
    assert arguments == {
        "coordinator_address": "gpu1:77",
        "num_processes": 24,
        "process_id": 3,
        "local_device_ids": [0, 1],
        "cluster_detection_method": "deactivate",
        "initialization_timeout": 960,
        "heartbeat_timeout_seconds": 140,
        "shutdown_timeout_seconds": 50,
    }
    assert not jax.config.jax_enable_preemption_service


def test_slurm_alone_gives_an_address(monkeypatch):
    assert started(monkeypatch, SLURM, DistributedConfig())["coordinator_address"] == f"gpu1:{65535 - 2**12 + 1 + 7}"


def test_a_process_alone_starts_nothing(monkeypatch):
    assert started(monkeypatch, {}, DistributedConfig()) == {}


def test_commands_of_one_process_are_refused_to_several(monkeypatch, capsys, tmp_path):
    for rank in "01":
        for name, value in {**LOCAL_SH, "FLMJAX_PROCESS_ID": rank}.items():
            monkeypatch.setenv(name, value)
        assert cli.main(["report", f"--workdir={tmp_path}"]) == 2
        error = capsys.readouterr().err
        assert ("runs in one process, and launch/local.sh started 2" in error) == (rank == "0")


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a config and the run `one` of one process with one device."""
    lab = write_lab(tmp_path_factory.mktemp("lab"))
    assert statuses(train(lab, lab / "one", processes=1)) == [0]
    return lab


@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, {"tensor": 2}),
        pytest.param(2, {"fsdp": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"replica": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2, "fsdp": 2}, marks=pytest.mark.nightly),
        pytest.param(4, {"tensor": 2, "replica": 2}, marks=pytest.mark.nightly),
    ],
)
def test_several_processes_compute_what_one_does(count, mesh, lab):
    """Through a growth, evaluations and text samples. With tensor over two processes each read other sequences."""
    workdir = lab / "-".join([str(count), *(f"{axis}{size}" for axis, size in mesh.items())])
    results = train(lab, workdir, *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()), processes=count)
    assert statuses(results) == [0] * count, [result.err for result in results]
    assert_close(workdir, lab / "one", 1e-6)
    for result in results[1:]:  # one process writes and prints
        assert [line for line in result.out.splitlines() if "[Gloo]" not in line] == []
        assert result.lines == []
    lines = timeless(workdir)
    assert len({(line["kind"], line["step"]) for line in lines}) == len(lines)
    (entry,) = read_starts(workdir)
    assert (entry["processes"], entry["devices"]) == (count, count)
    assert len(list((workdir / "certificates").iterdir())) == 1
    assert not list(workdir.glob(".seen*"))


@pytest.mark.slow
def test_local_sh_starts_processes_with_several_devices(lab):
    workdir = lab / "devices"
    line = [str(LOCAL), "2", *command(lab, workdir, "never", "--config.mesh.tensor=2")]
    with running(lab, line, DEVICES="2") as run:
        (ended,) = run.ended()
    assert ended.status == 0, ended.err
    assert_close(workdir, lab / "one", 1e-6)
    assert "mesh replica 1 x fsdp 2 x tensor 2" in ended.out
    assert ended.out.count("report:") == 1
    assert left_over(workdir) == []


def test_only_one_process_hashes_the_tokens(lab):
    """Each of 24 hosts read 1.25 TB at the first start; the others trust the process that writes."""
    data = lab / "one" / "data"
    for rank, expected in (("1", [0, 0]), ("0", [1, 1])):
        (data / "verified.json").unlink()
        results = train(lab, lab / f"trusted{rank}", f"--config.data.directory={data}", when=f"hash:raise:{rank}")
        assert statuses(results) == expected, [result.err for result in results]
        assert not (data / "verified.json").exists() or rank == "1"
    train(lab, lab / "one", processes=1)  # writes verified.json again


def test_every_host_checks_token_files_of_its_own(lab):
    """Only process 0 did: a file of the right size with other content was trained on."""
    folders = [lab / f"data{host}" for host in range(2)]
    for folder in folders:
        shutil.copytree(lab / "one" / "data", folder)
    tokens = max(folders[1].rglob("*.u*"), key=lambda path: path.stat().st_size)
    tokens.write_bytes(bytes(reversed(tokens.read_bytes())))
    commands = [command(lab, lab / "own_data", "never", f"--config.data.directory={folder}") for folder in folders]
    with running(lab, *commands) as run:
        results = run.ended()
    assert statuses(results) == [2, 2], [result.err for result in results]
    lines = [line for result in results for line in result.lines]
    assert any(str(tokens) in line for line in lines), lines
