"""The place of this process among those of its run, as its launcher's environment variables say. Without JAX.

    launcher          number of processes            this one               its place on the host
    launch/local.sh   FLMJAX_PROCESSES               FLMJAX_PROCESS_ID      (JAX_LOCAL_DEVICE_IDS)
    Slurm's srun      SLURM_NTASKS                   SLURM_PROCID           SLURM_LOCALID
    Open MPI          OMPI_COMM_WORLD_SIZE           OMPI_COMM_WORLD_RANK   OMPI_COMM_WORLD_LOCAL_RANK

TPU pods and Kubernetes are detected by JAX (processes.py). JAX_COORDINATOR_ADDRESS, HOST:PORT, goes before the address
that Slurm or Open MPI imply.
"""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from flmjax.config import ConfigError

ADDRESS = "JAX_COORDINATOR_ADDRESS"


class Place(NamedTuple):
    """The place of this process among those of its run.

    Attributes:
        launcher: "launch/local.sh", "Slurm" or "Open MPI".
        processes: number of processes of the run.
        process: this process, 0 to processes - 1.
        local_processes: processes on this host.
        local_process: this process on this host.
        node: name that the launcher has for this host; None: the launcher has none.
    """

    launcher: str
    processes: int
    process: int
    local_processes: int = 1
    local_process: int = 0
    node: str | None = None

    @property
    def has_other_hosts(self) -> bool:
        """Whether some processes of the run are on other hosts, as far as the launcher says."""
        return self.node is not None and self.local_processes < self.processes


def launcher_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that a launcher gave this process; None for one process, and for launchers that only JAX knows.

    Raises:
        ConfigError: naming a variable that is absent or no number.
    """
    if "FLMJAX_PROCESSES" in environment:
        count, process = _numbers(environment, "FLMJAX_PROCESSES", "FLMJAX_PROCESS_ID")
        place = Place("launch/local.sh", count, process)
        if place.processes > 1 and ADDRESS not in environment:
            raise ConfigError(f"{ADDRESS} is not set; with FLMJAX_PROCESSES it names HOST:PORT of process 0")
    elif "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:  # a task of srun, no batch script
        name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        count, process, local = _numbers(environment, name, "SLURM_PROCID", "SLURM_LOCALID")
        node = environment.get("SLURMD_NODENAME") or socket.gethostname()
        place = Place("Slurm", count, process, _slurm_tasks(environment, count), local, node)
    elif "OMPI_COMM_WORLD_SIZE" in environment:
        names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
        count, process, tasks, local = _numbers(environment, *(f"OMPI_COMM_WORLD_{name}" for name in names))
        place = Place("Open MPI", count, process, tasks, local, socket.gethostname())
    else:
        return None
    if not 0 <= place.process < place.processes:
        raise ConfigError(f"{place.launcher}: process {place.process} is not one of {place.processes}, from 0")
    return place if place.processes > 1 else None


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of its run, as far as its environment says; it alone prints shared errors."""
    try:
        place = launcher_place(environment)
    except ConfigError:
        return True
    return place is None or place.process == 0


def _numbers(environment: Mapping[str, str], *names: str) -> list[int]:
    for name in names:
        if not environment.get(name, "").isdecimal():
            raise ConfigError(f"the launcher's variable {name} is {environment.get(name, '')!r}, not a whole number")
    return [int(environment[name]) for name in names]


def _slurm_tasks(environment: Mapping[str, str], tasks: int) -> int:
    """Tasks of the step on this node, from `8(x23),4`: 8 on each of the first 23 nodes."""
    counts: list[int] = []
    shape = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
    for entry in filter(None, shape.split(",")):
        if not (repeated := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)):
            raise ConfigError(f"the launcher's variable SLURM_STEP_TASKS_PER_NODE is {shape!r}, not like '8(x23),4'")
        counts += [int(repeated[1])] * int(repeated[2] or 1)
    (node,) = _numbers({"SLURM_NODEID": "0", **environment}, "SLURM_NODEID")
    return counts[node] if node < len(counts) and sum(counts) == tasks else 1


# ---- the coordinator -------------------------------------------------------------------------------------------------


def coordinator(environment: Mapping[str, str] = os.environ) -> str | None:
    """HOST:PORT of process 0, from JAX_COORDINATOR_ADDRESS; None if that is not set.

    Raises:
        ConfigError: for an address without a port.
    """
    address = environment.get(ADDRESS)
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"{ADDRESS}={address} must be HOST:PORT")
    return address


def refuse_loopback(address: str, place: Place) -> None:
    """Refuse an address of this host's own loopback device while processes run on other hosts: each would wait there.

    On the host of process 0 its own name may resolve to a loopback address, as in Debian, because the process listens
    on all addresses. Nodes that are simulated on one machine all have the coordinator's address.

    Raises:
        ConfigError: naming the address.
    """
    host = address.rpartition(":")[0].strip("[]")
    if not place.has_other_hosts or not (loopback := _addresses(host)) or not all(map(_is_loopback, loopback)):
        return
    assert place.node is not None
    if loopback & _addresses(place.node):
        return
    shown = host if host in loopback else f"{host}, which is {min(loopback)} on {socket.gethostname()}"
    raise ConfigError(
        f"the coordinator's address {shown}, is this host itself, and the run has processes on other hosts; set "
        f"{ADDRESS} to HOST:PORT of process 0 with a name or an address that all hosts reach"
    )


def _addresses(host: str) -> set[str]:
    """IP addresses of a host; empty if the name does not resolve, yet."""
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def why_unreachable(address: str, seconds: float = 2.0) -> str | None:
    """The reason why no connection to HOST:PORT can be made, for messages; None: something answers there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except socket.gaierror:
        return f"the name {host} does not resolve on {socket.gethostname()}"
    except OSError as error:
        return f"nothing answers at {address} ({error.strerror or 'no reply'})"
    return None


# ---- devices ---------------------------------------------------------------------------------------------------------


def local_gpus(
    place: Place, environment: Mapping[str, str] = os.environ, nodes: Path = Path("/dev")
) -> list[int] | None:
    """Numbers of this process's GPUs among those that it sees; None: there are none, or JAX_LOCAL_DEVICE_IDS says.

    One process on a host has all of them, several share them evenly. Slurm may also show each task its own GPUs alone
    (--gpus-per-task, --gpu-bind): then all that are visible are the task's. JAX itself would take one GPU for each
    process, numbered by its place on the host, also where that number is not visible.

    Args:
        nodes: the folder of device nodes.

    Raises:
        ConfigError: for GPUs that do not divide over the processes of the host.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment or environment.get("JAX_PLATFORMS") == "cpu":
        return None
    on_host = len([path for path in nodes.glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()])
    visible = _visible_gpus(environment, on_host)
    if not visible:
        return None
    tasks = place.local_processes
    of_step = environment.get("SLURM_STEP_GPUS", environment.get("SLURM_JOB_GPUS", ""))
    is_bound = "SLURM_GPUS_PER_TASK" in environment or len(list(filter(None, of_step.split(",")))) > visible
    if is_bound or visible < tasks:
        return list(range(visible))
    if visible % tasks:
        raise ConfigError(f"the {visible} GPUs of {place.node or 'this host'} do not divide over its {tasks} processes")
    share = visible // tasks
    return list(range(place.local_process * share, (place.local_process + 1) * share))


def _visible_gpus(environment: Mapping[str, str], on_host: int) -> int:
    names = environment.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return on_host
    listed = [name.strip() for name in names.split(",")]
    return len(listed) if on_host and all(listed) and listed[0] != "-1" else 0


def make_room_for_gloo(environment: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """Let the pool of threads of XLA's CPU devices have a thread for every exchange that may be under way.

    A blocked exchange between processes (gloo) holds a thread; with a thread for each core of a small machine and
    several devices in a process, all wait for ever. To be called before the first use of a device.
    """
    flags = re.findall(r"--xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", ""))
    devices = int(environment.get("JAX_NUM_CPU_DEVICES") or (flags[-1] if flags else 1))
    threads = environment.get("NPROC", "")
    least = max(8, 4 * devices)
    environment["NPROC"] = str(max(least, int(threads) if threads.isdecimal() else (os.cpu_count() or 1)))
