"""Launch files with stubs for the cluster's programs: restarts by exit status, and quoting.

The stubs of scontrol, srun and xpk record their calls. tests/test_launch_tpu.py has those of gcloud, and
tests/test_slurm.py a real Slurm.
"""

import subprocess
from pathlib import Path

import pytest
import yaml
from launch_cases import A800, BUCKET, PYXIS, RECORD, SITE, V5P, Stubs, write

from flmjax.launch.launch_file import TrainCommand

SCONTROL = """
case "$1 $2" in
  "show hostnames") printf 'gpu07\\ngpu08\\n' ;;
  "show node") echo "NodeName=$4 Arch=x86_64 Gres=gpu:8 ${ADDRESS:-} NodeHostName=$4 Port=1" ;;
  requeue*)
    refusals=$(cat "$STUBS/refusals" 2> /dev/null || echo 0)
    echo $((refusals - 1)) > "$STUBS/refusals"
    [ "$refusals" -le 0 ] ;;
esac
"""
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "flm",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "ADDRESS": "NodeAddr=10.0.0.7",
}
# Runs the command of TASKS tasks, one after the other, and ends with the largest exit status, as srun does.
SRUN = """
while [[ $1 == --* ]]; do shift; done
env > "$STUBS/environment"
largest=0
for ((i = 0; i < ${TASKS:-1}; i++)); do
  status=0
  SLURM_PROCID=$i "$@" || status=$?
  [ "$status" -le "$largest" ] || largest=$status
done
exit "$largest"
"""


def slurm(folder: Path, flmjax: str, workdir: str = "run", site: str | None = None) -> tuple[Stubs, Path]:
    """Stubs of Slurm, with a script in place of flmjax; and a launch file."""
    stubs = Stubs(folder, scontrol=SCONTROL, srun=SRUN, flmjax=flmjax, sleep="")
    return stubs, write(folder, "slurm", A800, f"--workdir={workdir}", site=site)


@pytest.mark.parametrize(
    ("status", "ends_with", "is_requeued", "words"),
    [
        (0, 0, False, ""),
        (2, 2, False, "exit status 2: the command or the config is wrong; not queued again"),
        (75, 75, True, "saved; queued again"),
        (1, 1, True, "exit status 1, crash 1 of 3 in a row at checkpoint 0; queued again"),
        (76, 1, True, "exit status 1, crash 1 of 3"),
        (137, 137, True, "exit status 137, crash 1 of 3 in a row at checkpoint 0; queued again"),
    ],
)
def test_a_job_is_queued_again_by_its_exit_status(status, ends_with, is_requeued, words, tmp_path):
    stubs, file = slurm(tmp_path, f"exit {status}")
    done = stubs.run(file, **JOB)
    assert done.returncode == ends_with, done.stderr
    assert stubs.calls("scontrol", "requeue") == [["scontrol", "requeue", "4711"]] * is_requeued
    assert words in done.stderr


@pytest.mark.parametrize(
    ("statuses", "words"),
    [
        ("75 1", "exit status 1, crash 1 of 3"),
        ("2 1", "exit status 1, crash 1 of 3"),
        ("75 134 1", "exit status 134, crash 1 of 3"),
        ("75 2", "exit status 2: the command or the config is wrong"),
        ("0 75", "saved; queued again"),
    ],
)
def test_the_worst_task_decides_how_a_job_ends(statuses, words, tmp_path):
    """After a crash srun ends the other tasks by SIGTERM, on which they save: 75 must not hide the crash."""
    stubs, file = slurm(tmp_path, f'statuses=({statuses}); exit "${{statuses[SLURM_PROCID]}}"')
    done = stubs.run(file, **JOB, TASKS=str(len(statuses.split())))
    assert words in done.stderr


@pytest.mark.parametrize(("refusals", "calls"), [(2, 3), (20, 20)])
def test_a_refused_requeue_is_tried_twenty_times(refusals, calls, tmp_path):
    stubs, file = slurm(tmp_path, "exit 75")
    (tmp_path / "refusals").write_text(str(refusals))
    done = stubs.run(file, **JOB)
    assert done.returncode == 75
    assert len(stubs.calls("scontrol", "requeue")) == calls
    assert len(stubs.calls("sleep", "30")) == refusals
    assert ("refused to queue the job again; sbatch continues" in done.stderr) == (refusals == 20)


def test_setup_may_fail_and_read_unset_variables(tmp_path):
    site = "setup = ['grep -q nothing /dev/null', 'export NOTE=$NOT_SET.', 'export OTHER=x']"
    stubs, file = slurm(tmp_path, 'exit "$STATUS"', site=site)
    done = stubs.run(file, **JOB, STATUS="0")
    assert done.returncode == 0, done.stderr
    assert {"NOTE=.", "OTHER=x"} <= set((tmp_path / "environment").read_text().splitlines())


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


def test_crashes_of_a_workdir_at_a_url_are_counted_in_all(tmp_path):
    stubs, file = slurm(tmp_path, "exit 1", workdir="gs://bucket/run")
    lines = [stubs.run(file, **JOB).stderr for _ in range(3)]
    assert [line.partition("exit status 1, ")[2].strip() for line in lines] == [
        "crash 1 of 3 in all; queued again",
        "crash 2 of 3 in all; queued again",
        "crash 3 of 3 in all; not queued again",
    ]


def test_the_workdir_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    stubs, file = slurm(tmp_path, "exit 1", workdir="~/run")
    (tmp_path / "run" / "checkpoints" / "20").mkdir(parents=True)
    assert "crash 1 of 3 in a row at checkpoint 20" in stubs.run(file, **JOB).stderr
    assert stubs.calls("flmjax") == [["flmjax", "train", A800, f"--workdir={tmp_path}/run"]]


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


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_signals_of_slurm_reach_the_run_and_not_its_shell(name, tmp_path):
    """srun sends them to all processes of a task, the shell around the run included."""
    run = f"trap 'exit 75' {name}; kill -{name} 0; for _ in {{1..100}}; do /bin/sleep 0.02; done"
    stubs, file = slurm(tmp_path, run)
    (tmp_path / "bin" / "srun").write_text(RECORD + SRUN.replace('"$@"', 'setsid --wait "$@"'))
    done = stubs.run(file, **JOB)
    assert (done.returncode, "saved; queued again" in done.stderr) == (75, True), done.stderr
    assert stubs.calls("sleep", "10")  # the other tasks may end with the same status


ODD_WORDS = ('/data set/it\'s "the" $HOME `run` #1', "a\\b*")


@pytest.mark.parametrize("container", ["", "pyxis", "apptainer"])
@pytest.mark.parametrize("word", ODD_WORDS)
def test_slurm_passes_any_characters_on(word, container, tmp_path):
    section = f"container = '{container}'\nimage = '''{word}'''\nmounts = ['''{word}''']\n" if container else ""
    site = f"[env]\nNOTE = '''{word}'''\n[slurm]\n{section}"
    workdir = f"{tmp_path}/{word}"
    stubs, file = slurm(tmp_path, "", workdir=workdir, site=site)
    (tmp_path / "bin" / "apptainer").write_text(RECORD)
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    done = stubs.run(file, **JOB)
    assert done.returncode == 0, done.stderr
    workdir = str(Path(workdir))
    command = ["flmjax", "train", A800, f"--workdir={workdir}"]
    (call,) = stubs.calls("srun")
    assert call[-4:] == command
    assert f"NOTE={word}" in (tmp_path / "environment").read_text().splitlines()
    here = str(tmp_path)
    if container == "pyxis":
        assert f"--container-image={word}" in call
        assert f"--container-mounts={here}:{here},{workdir}:{workdir},{word}" in call
        assert "--container-env=JAX_COORDINATOR_ADDRESS,PYTHONUNBUFFERED,NOTE" in call
    elif container == "apptainer":
        flags = ["exec", "--nv", "--pwd", here, "--bind", here, "--bind", workdir, "--bind", word, word]
        assert stubs.calls("apptainer") == [["apptainer", *flags, *command]]
    assert Path(workdir).is_dir() == bool(container)


@pytest.mark.parametrize("workdir", ["run", "gs://bucket/run"])
def test_a_container_sees_the_workdir_at_its_own_path(workdir, tmp_path):
    """A folder beside that of sbatch may be a link; a URL is no folder."""
    stubs, file = slurm(tmp_path, "", workdir=workdir, site=f"[slurm]\n{PYXIS}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to("elsewhere")
    assert stubs.run(file, **JOB).returncode == 0
    mounts = [
        f"{tmp_path}:{tmp_path}",
        *([f"{tmp_path}/run:{tmp_path}/run"] if workdir == "run" else []),
        "/data:/data",
    ]
    assert f"--container-mounts={','.join(mounts)}" in stubs.calls("srun")[0]
    assert not (tmp_path / "gs:").exists()


# What xpk makes of a command: str.format puts it into a line of YAML at this indentation.
XPK_CONTAINER = """
command:
                - bash
                - -c
                - |
                  trap 'kill -SIGTERM $! 2> /dev/null' SIGTERM;
                  ({command}) & PID=$!;
                  while kill -0 $PID 2> /dev/null; do sleep 0.1; done;
                  wait $PID;
                  exit $?
"""


def xpk_script(call: list[str]) -> str:
    """The script of a pod that xpk makes of its --command."""
    (command,) = [word.removeprefix("--command=") for word in call if word.startswith("--command=")]
    return str(yaml.safe_load(XPK_CONTAINER.format(command=command))["command"][2])


@pytest.mark.parametrize("word", ODD_WORDS)
def test_a_pods_command_passes_any_characters_on(word, tmp_path):
    """The text that a pod's shell gets from GKE and from xpk, run by a shell."""
    stubs = Stubs(tmp_path, xpk="", flmjax="")
    site = SITE.format(slurm="").replace("module load cuda", "true")
    workdir = f"gs://bucket/{word}"
    done = stubs.run(write(tmp_path, "xpk", V5P, f"--workdir={workdir}", site=site))
    assert done.returncode == 0, done.stderr
    (call,) = stubs.calls("xpk")
    assert call[1:4] == ["workload", "create", "--workload=" + TrainCommand((), workdir).name]
    jobset = yaml.safe_load(write(tmp_path, "gke_jobset", V5P, f"--workdir={workdir}", site=site).read_text())
    (container,) = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    for text in (xpk_script(call), *container["args"]):
        subprocess.run(["bash", "-c", text], env=stubs.environment, check=True, timeout=10)
    assert stubs.calls("flmjax") == [["flmjax", "train", V5P, f"--workdir={workdir}"]] * 2


def test_xpk_restarts_after_every_status_but_success_and_refusal(tmp_path):
    """xpk adds 42 and 127 to 255 to the exit codes that restart a run."""
    stubs = Stubs(tmp_path, xpk="")
    assert stubs.run(write(tmp_path, "xpk", V5P, BUCKET, site=SITE.format(slurm=""))).returncode == 0
    (call,) = stubs.calls("xpk")
    (flag,) = [word.partition("=")[2] for word in call if word.startswith("--restart-on-exit-codes=")]
    ranges = [part.split("-") for part in flag.split(",")]
    codes = {42, *range(127, 256)}.union(*(range(int(ends[0]), int(ends[-1]) + 1) for ends in ranges))
    assert codes == set(range(1, 256)) - {2}
    assert "--max-restarts=100" in call


def test_sigterm_reaches_the_run_in_a_pod_of_xpk(tmp_path):
    stubs = Stubs(tmp_path, xpk="", flmjax="echo started; trap 'exit 75' TERM; while :; do sleep 0.1; done")
    assert stubs.run(write(tmp_path, "xpk", V5P, BUCKET, site=SITE.format(slurm=""))).returncode == 0
    script = xpk_script(stubs.calls("xpk")[0])
    with subprocess.Popen(["bash", "-c", script], env=stubs.environment, stdout=subprocess.PIPE) as pod:
        try:
            assert pod.stdout.readline() == b"started\n"
            pod.terminate()
            assert pod.wait(20) == 75
        finally:
            pod.kill()
