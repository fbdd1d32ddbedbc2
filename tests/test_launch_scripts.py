"""What launch files do when the programs that they call end as they may, and how any characters get through them.

Programs of clusters (scontrol, srun, gcloud, xpk) are scripts here that record how they are called: no file was started
on GPUs or TPUs. tests/test_slurm.py has a real Slurm.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from launch_cases import A800, BUCKET, RECORD, ROOT, SITE, TWO_SLICES, V5P, Stubs, write

from flmjax.launch.launch_file import Run

GOLDEN = ROOT / "tests" / "golden" / "launch"

SCONTROL = """
case "$1 $2" in
  "show hostnames") printf 'gpu07\\ngpu08\\n' ;;
  "show node") echo "NodeName=$4 Arch=x86_64 Gres=gpu:8 ${ADDRESS:-} NodeHostName=$4 Port=1" ;;
esac
"""
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "flm",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "ADDRESS": "NodeAddr=10.0.0.7",
}
# Runs the command as srun does for one task; its environment goes to a file.
SRUN = """
while [[ $1 == --* ]]; do shift; done
env > "$STUBS/environment"
"$@"
"""


def slurm(folder: Path, flmjax: str, workdir: str = "run", site: str | None = None) -> tuple[Stubs, Path]:
    """Stubs of Slurm, with a script in place of flmjax; and a launch file."""
    stubs = Stubs(folder, scontrol=SCONTROL, srun=SRUN, flmjax=flmjax, sleep="")
    return stubs, write(folder, "slurm", A800, f"--workdir={workdir}", site=site)


@pytest.mark.parametrize(
    ("status", "ends_with", "is_requeued", "words"),
    [
        (0, 0, False, ""),
        (2, 2, False, "the command or the config cannot be meant; not queued again"),
        (75, 75, True, "saved; queued again"),
        (137, 137, True, "exit status 137, crash 1 of 3 in a row at checkpoint 0; queued again"),
    ],
)
def test_a_job_is_queued_again_by_its_exit_status(status, ends_with, is_requeued, words, tmp_path):
    stubs, file = slurm(tmp_path, f"exit {status}")
    done = stubs.run(file, **JOB)
    assert done.returncode == ends_with, done.stderr
    assert stubs.calls("scontrol", "requeue") == [["scontrol", "requeue", "4711"]] * is_requeued
    assert words in done.stderr


def test_crashes_are_counted_across_starts_until_progress(tmp_path):
    """Crash, crash, saved, crash after a new checkpoint, crash, crash at the cap."""
    stubs, file = slurm(tmp_path, 'exit "$STATUS"', workdir="my run")
    counts = []
    for status, checkpoint in ((1, None), (134, None), (75, None), (1, 20), (1, None), (1, None)):
        if checkpoint:
            (tmp_path / "my run" / "checkpoints" / str(checkpoint)).mkdir(parents=True)
        done = stubs.run(file, **JOB, STATUS=str(status))
        counts.append(done.stderr.partition("crash ")[2][:1])
    assert counts == ["1", "2", "", "1", "2", "3"]
    assert "crash 3 of 3 in a row at checkpoint 20; not queued again" in done.stderr
    assert len(stubs.calls("scontrol", "requeue")) == 5


def test_the_coordinator_is_the_first_node_at_a_port_of_the_start(tmp_path):
    stubs, file = slurm(tmp_path, "")
    addresses = []
    for more in ({}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "4712"}, {"ADDRESS": ""}):
        assert stubs.run(file, **{**JOB, **more}).returncode == 0
        lines = (tmp_path / "environment").read_text().splitlines()
        addresses += [line for line in lines if line.startswith("JAX_COORDINATOR_ADDRESS=")]
    hosts, ports = zip(*(address.partition("=")[2].split(":") for address in addresses), strict=True)
    assert hosts == ("10.0.0.7",) * 3 + ("gpu07",)
    assert ports[0] == str(61440 + 4711 * 31 % 4096) == ports[3]
    assert len(set(ports)) == 3
    assert all(61440 <= int(port) < 65536 for port in ports)


def test_sigterm_of_slurm_reaches_the_run_and_not_its_shell(tmp_path):
    """srun sends it to all processes of a task, the shell around the run included."""
    run = "trap 'exit 75' TERM; kill -TERM 0; for _ in {1..100}; do /bin/sleep 0.02; done"
    stubs, file = slurm(tmp_path, run)
    (tmp_path / "bin" / "srun").write_text(RECORD + SRUN.replace('"$@"', 'exec setsid --wait "$@"'))
    done = stubs.run(file, **JOB)
    assert (done.returncode, "saved; queued again" in done.stderr) == (75, True), done.stderr
    assert stubs.calls("sleep", "10")  # the other tasks may end with the same status


ODD_WORDS = ('/data set/it\'s "the" $HOME `run` #1', "a\\b*")


@pytest.mark.parametrize("container", ["", "pyxis", "apptainer"])
@pytest.mark.parametrize("word", ODD_WORDS)
def test_slurm_passes_any_characters_on(word, container, tmp_path):
    section = f"container = '{container}'\nimage = '''{word}'''\nmounts = ['''{word}''']\n" if container else ""
    site = f"[env]\nNOTE = '''{word}'''\n[slurm]\n{section}"
    stubs, file = slurm(tmp_path, "", workdir=word, site=site)
    (tmp_path / "bin" / "apptainer").write_text(RECORD)
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    done = stubs.run(file, **JOB)
    assert done.returncode == 0, done.stderr
    command = ["flmjax", "train", A800, f"--workdir={word}"]
    (call,) = stubs.calls("srun")
    assert call[-4:] == command
    assert f"NOTE={word}" in (tmp_path / "environment").read_text().splitlines()
    here = str(tmp_path)
    if container == "pyxis":
        assert f"--container-image={word}" in call
        assert f"--container-mounts={here}:{here},{word}" in call
    elif container == "apptainer":
        flags = ["exec", "--nv", "--pwd", here, "--bind", here, "--bind", word, word]
        assert stubs.calls("apptainer") == [["apptainer", *flags, *command]]


@pytest.mark.parametrize("word", ODD_WORDS)
def test_a_pods_command_passes_any_characters_on(word, tmp_path):
    """Of GKE and of xpk: the text that their shell gets, run by a shell."""
    stubs = Stubs(tmp_path, xpk="", flmjax="")
    site = SITE.format(slurm="").replace("module load cuda", "true")
    workdir = f"gs://bucket/{word}"
    done = stubs.run(write(tmp_path, "xpk", V5P, f"--workdir={workdir}", site=site))
    assert done.returncode == 0, done.stderr
    (call,) = stubs.calls("xpk")
    assert call[1:4] == ["workload", "create", "--workload=" + Run((), workdir).name]
    jobset = yaml.safe_load(write(tmp_path, "gke_jobset", V5P, f"--workdir={workdir}", site=site).read_text())
    (container,) = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    for text in (call[-1].removeprefix("--command="), *container["args"]):
        subprocess.run(["bash", "-c", text], env=stubs.environment, check=True, timeout=10)
    assert stubs.calls("flmjax") == [["flmjax", "train", V5P, f"--workdir={workdir}"]] * 2


# ---- Cloud TPUs ------------------------------------------------------------------------------------------------------

# Slices exist from `create` on; ssh answers with the next line of the file `runs`: exit statuses of the hosts, or
# `preempted`, `hangs` (until pkill).
GCLOUD = """
case "$*" in
  *"queued-resources describe"*)
    [ -e "$STUBS/slices" ] || { echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; }
    echo ACTIVE ;;
  *"tpu-vm describe"*) cat "$STUBS/node" 2> /dev/null || echo READY ;;
  *"queued-resources create"*) touch "$STUBS/slices" ;;
  *"queued-resources delete"*) rm -f "$STUBS/slices" "$STUBS/node" ;;
  *"storage ls"*) cat "$STUBS/checkpoints" 2> /dev/null || exit 1 ;;
  *pkill*) touch "$STUBS/killed" ;;
  *"queued-resources ssh"*)
    run=$(head -n 1 "$STUBS/runs")
    sed -i 1d "$STUBS/runs"
    case $run in
      preempted) echo PREEMPTED > "$STUBS/node"; exec /bin/sleep 500 ;;
      hangs) rm -f "$STUBS/killed"; until [ -e "$STUBS/killed" ]; do /bin/sleep 0.02; done; echo "flmjax-exit 75" ;;
      lost) exit 255 ;;
      saves*)
        echo "gs://bucket/runs/flm_101b/checkpoints/${run#saves}/" >> "$STUBS/checkpoints"
        echo "flmjax-exit 1"
        exit 1 ;;
      *) for status in $run; do echo "flmjax-exit $status"; done; [[ $run != *[1-9]* ]] ;;
    esac ;;
esac
"""


def babysit(folder: Path, *runs: str, slices: int = 1) -> tuple[Stubs, Path]:
    """Stubs of gcloud whose runs end so, and a launch file; time passes quickly."""
    stubs = Stubs(folder, gcloud=GCLOUD, sleep="exec /bin/sleep 0.02")
    (folder / "runs").write_text("".join(run + "\n" for run in runs))
    flags = (V5P,) if slices == 1 else TWO_SLICES
    return stubs, write(folder, "tpu_vm", *flags, BUCKET, site=SITE.format(slurm=""))


QUEUED = ("gcloud", "compute", "tpus", "queued-resources")


def verbs(stubs: Stubs) -> list[str]:
    """The calls that change something: create, delete, run."""
    calls = [(call[4], call[-1]) for call in stubs.calls(*QUEUED) if call[4] != "describe"]
    return ["run" if "train" in last and "pkill" not in last else verb for verb, last in calls if "pkill" not in last]


def test_a_preempted_slice_is_recreated_and_the_run_goes_on(tmp_path):
    stubs, file = babysit(tmp_path, "preempted", "0 0")
    done = stubs.run(file)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs) == ["create", "run", "delete", "create", "run", "delete"]
    assert "slices: PREEMPTED" in done.stderr
    assert "crash" not in done.stderr
    first, second = [call[-1] for call in stubs.calls(*QUEUED, "ssh") if "pkill" not in call[-1]]
    assert first == second
    assert "--workdir=gs://bucket/runs/flm_101b" in first


def test_several_slices_are_one_request_and_all_hosts_run(tmp_path):
    stubs, file = babysit(tmp_path, "0 0", slices=2)
    assert stubs.run(file).returncode == 0
    (create,) = stubs.calls(*QUEUED, "create")
    assert create[5:] == [
        *("flm-101b", "--project=project", "--zone=us-central2-b", "--type=v5p", "--topology=4x8x8"),
        *("--runtime-version=v2-alpha-tpuv5", "--node-count=2", "--node-prefix=flm-101b", "--spot", "--quiet"),
    ]
    nodes = {call[5] for call in stubs.calls("gcloud", "compute", "tpus", "tpu-vm", "describe")}
    assert nodes == {"flm-101b-0", "flm-101b-1"}
    ssh = stubs.calls(*QUEUED, "ssh")[-1]
    assert {"--node=all", "--worker=all"} <= set(ssh)


@pytest.mark.parametrize(
    ("runs", "status", "words"),
    [
        (("75 75", "75 75", "75 75", "75 75", "0 0"), 0, "saved; started again"),
        (("0 2",), 2, "the command or the config cannot be meant"),
        (("1 1", "lost", "0 134"), 1, "exit status 134, crash 3 of 3 in a row at checkpoint 0"),
        (("1 1", "1 1", "saves20", "1 1", "0 0"), 0, "crash 1 of 3 in a row at checkpoint 20; started again"),
    ],
)
def test_runs_on_slices_start_again_by_their_exit_status(runs, status, words, tmp_path):
    stubs, file = babysit(tmp_path, *runs)
    done = stubs.run(file)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert verbs(stubs) == ["create", *["run"] * len(runs), *["delete"] * (status == 0)]


def test_interrupting_the_babysitter_saves_the_run(tmp_path):
    stubs, file = babysit(tmp_path, "hangs")
    process = subprocess.Popen(
        ["bash", str(file)], cwd=tmp_path, env=stubs.environment, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end and "run" not in verbs(stubs):
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "the run saves; the slices stay" in error
    assert "pkill -TERM" in stubs.calls(*QUEUED, "ssh")[-1][-1]
    assert "delete" not in verbs(stubs)


def pids(*arguments: str) -> list[str]:
    return subprocess.run(["pgrep", *arguments], capture_output=True, text=True, timeout=10).stdout.split()


def test_the_stop_of_a_run_spares_the_shell_that_started_it(tmp_path):
    """`pkill -f` of the babysitter, on processes like those of a host."""
    (tmp_path / "flmjax").write_text(f"#!{sys.executable}\nimport time\ntime.sleep(30)\n")
    (tmp_path / "flmjax").chmod(0o755)
    line = f"{tmp_path}/flmjax train --config=x; exit 7"
    shell = subprocess.Popen(["bash", "-c", line])
    try:
        command = (GOLDEN / "tpu_vm.sh").read_text().partition('echo "pkill -$1 ')[2].partition('"\n')[0]
        assert command.startswith("-f '^")
        pattern = shlex.split(command)[1]
        end = time.monotonic() + 20
        while time.monotonic() < end and shell.poll() is None:
            host = {str(shell.pid), *pids("-P", str(shell.pid))}
            for pid in host.intersection(pids("-f", pattern)):
                os.kill(int(pid), signal.SIGTERM)
            time.sleep(0.05)
        assert shell.wait(1) == 7
    finally:
        shell.kill()
