"""A Slurm cluster of simulated nodes on this machine: munged, slurmctld and a slurmd for each node, in a folder.

It needs the programs (apt-get install slurm-wlm munge), no root and no system service: its ports are free ones, its key
and its socket lie in the folder. Every node says that it has 8 GPUs; there are none. Jobs run as this user.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PATH = os.pathsep.join(["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin"])
CONFIG = """
ClusterName=simulated
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=20
MinJobAge=3600
InactiveLimit=0
KillWait=15
JobRequeue=1
GresTypes=gpu
SlurmdParameters=config_overrides
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# A job that is queued again waits until its credential has expired, here 5 seconds instead of 120, and until the
# scheduler looks at it, here after a second instead of 60.


def missing_programs() -> list[str]:
    """Programs of Slurm that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def own_address() -> str:
    """An address of this machine that is not a loopback one, as the address of a node is; 127.0.0.1 without one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


class SlurmCluster:
    """A context manager: the cluster runs inside, and every process of it and of its jobs is killed at the end.

    Args:
        folder: an empty folder with a short path.
        nodes: number of nodes: node0, node1...
    """

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.nodes = folder, [f"node{i}" for i in range(nodes)]
        self.environment = {
            "PATH": PATH,
            "HOME": os.environ.get("HOME", "/"),
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "SlurmCluster":
        try:
            self._configure()
            self._start("munged", "--foreground", "--force", *self._munge_files())
            self.until((self.folder / "munge.socket").exists, 10, "munged listens")
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            self.until(lambda: self.states() == ["idle"] * len(self.nodes), 20, "all nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        for pid in self.processes():
            _kill(pid)
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait(10)
        for pid in self.processes():  # of jobs, started meanwhile
            _kill(pid)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node, also after kill_node."""
        self._start("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """Kill everything that runs on a node, as if its power had failed."""
        self.daemons[node].kill()
        tasks = [pid for pid in self.processes() if _environment(pid).get("SLURMD_NODENAME") == node]
        parents = {_parent(pid) for pid in tasks} & set(self.processes())  # slurmstepd
        for pid in {*parents, *tasks}:
            _kill(pid)
        self.daemons[node].wait(10)

    def processes(self) -> list[int]:
        """Processes of this cluster and of its jobs: those that have its SLURM_CONF in their environment."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
        return [pid for pid in pids if _environment(pid).get("SLURM_CONF") == self.environment["SLURM_CONF"]]

    def task(self, job: str, process: int) -> int | None:
        """The process of Python that runs task number `process` of a job; None: it does not run."""
        for pid in self.processes():
            environment = _environment(pid)
            if (environment.get("SLURM_JOB_ID"), environment.get("SLURM_PROCID")) == (job, str(process)):
                words = _read(pid, "cmdline").split("\0")
                if "python" in words[0] and "train" in words:
                    return pid
        return None

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Standard output of a command of Slurm."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd or self.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr, self.logs())
        return done.stdout

    def until(self, condition: Callable[[], object], seconds: float, claim: str) -> object:
        """The first value of the condition that is true; fails with the daemons' logs if there is none in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := condition():
                return value
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds:g} s: {claim}\n{self.logs()}")

    def states(self) -> list[str]:
        """The state of every node: idle, alloc, down, idle*..."""
        done = subprocess.run(
            ["sinfo", "--noheader", "-N", "-o", "%t"], env=self.environment, capture_output=True, text=True, timeout=30
        )
        return done.stdout.split()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", number)))

    def logs(self) -> str:
        """The last lines of the daemons' logs."""
        return "\n".join(
            _last_lines(path) for path in sorted(self.folder.glob("*.*")) if path.suffix in (".log", ".output")
        )

    def _configure(self) -> None:
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        controller_port, *ports = free_ports(1 + len(self.nodes))
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        host = socket.gethostname().partition(".")[0]
        text = CONFIG.format(host=host, user=user, folder=self.folder, controller_port=controller_port)
        for node, port in zip(self.nodes, ports, strict=True):
            (self.folder / f"spool.{node}").mkdir()
            text += f"NodeName={node} NodeHostname={host} NodeAddr={own_address()} Port={port} CPUs=8 RealMemory=1000 "
            text += "Gres=gpu:8 State=UNKNOWN\n"
        (self.folder / "slurm.conf").write_text(text)
        for gpu in range(8):  # Slurm counts files, which are devices where there are GPUs
            (self.folder / f"gpu{gpu}").touch()
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-7]\n")

    def _munge_files(self) -> Iterator[str]:
        yield from (f"--key-file={self.folder}/munge.key", f"--socket={self.folder}/munge.socket")
        yield from (f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed"))

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        output = (self.folder / f"{name or program}.output").open("ab")
        self.daemons[name or program] = subprocess.Popen(
            [str(shutil.which(program, path=PATH)), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        output.close()


def _read(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    except OSError:  # it has ended, or is another user's
        return ""


def _environment(pid: int) -> dict[str, str]:
    entries = (entry.partition("=") for entry in _read(pid, "environ").split("\0"))
    return {name: value for name, _, value in entries}


def _parent(pid: int) -> int:
    status = re.search(r"^PPid:\s*(\d+)", _read(pid, "status"), re.MULTILINE)
    return int(status[1]) if status else 0


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _last_lines(path: Path) -> str:
    return f"{path.name}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-8:])
