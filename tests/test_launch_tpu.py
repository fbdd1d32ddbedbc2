"""The launch file of Cloud TPU VMs with a stub of gcloud: requests, preemption, restarts, and the commands of hosts."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_cases import BUCKET, SITE, TWO_SLICES, V5P, Stubs, write

# Files in $STUBS decide its answers: line N of `runs` is the end of start N, a word or the exit statuses of a slice's
# hosts; the next line of `creates` is the state of a new request (ACTIVE without a line) or a refusal, of `deletes` a
# refusal; `unknown` is the number of questions for a state that fail. `request` and `slice.NAME` have the states.
GCLOUD = r"""
next() { [ ! -s "$STUBS/$1" ] || { head -n 1 "$STUBS/$1"; sed -i 1d "$STUBS/$1"; }; }
refuse() { echo "ERROR: (gcloud) $*" >&2; exit 1; }
state() {
  echo "WARNING: a new release is available" >&2
  unknown=$(cat "$STUBS/unknown" 2> /dev/null || echo 0)
  if [ "$unknown" -gt 0 ]; then echo $((unknown - 1)) > "$STUBS/unknown"; refuse "UNAVAILABLE: try later"; fi
  cat "$STUBS/$1" 2> /dev/null || echo "${2:-$(refuse "NOT_FOUND: no such resource")}" | grep .
}
run() { # START NODE
  case $(sed -n "$1p" "$STUBS/runs") in
    preempted)
      [[ $2 == *-0 ]] || echo PREEMPTED > "$STUBS/slice.$2"
      echo $$ >> "$STUBS/connections"
      exec /bin/sleep 500 ;;
    hangs)
      rm -f "$STUBS/stopped"
      until [ -e "$STUBS/stopped" ]; do /bin/sleep 0.02; done
      /bin/sleep 1
      echo "flmjax-exit 75" ;;
    unknown*0) echo 1000 > "$STUBS/unknown"; /bin/sleep 0.5; rm "$STUBS/unknown"; echo "flmjax-exit 0" ;;
    unknown*1) echo 20 > "$STUBS/unknown"; echo "flmjax-exit 1" ;;
    saves*20) echo "gs://bucket/runs/flm_101b/checkpoints/20/" > "$STUBS/checkpoints"; echo "flmjax-exit 1" ;;
    *lost) echo "flmjax-exit 0"; exit 255 ;;
    silent) exit 255 ;;
    *) for status in $(sed -n "$1p" "$STUBS/runs"); do echo "flmjax-exit $status"; done ;;
  esac
}
case "$*" in
  "compute tpus queued-resources describe"*) state request ;;
  "compute tpus tpu-vm describe"*) state "slice.$5" READY ;;
  *"compute tpus queued-resources create"*)
    [ "$1" = alpha ] || refuse "argument --type: Invalid choice"
    answer=$(next creates)
    [ "$answer" != refused ] || refuse "RESOURCE_EXHAUSTED: quota"
    echo "${answer:-ACTIVE}" > "$STUBS/request" ;;
  "compute tpus queued-resources delete"*" --force")
    [ "$(next deletes)" != refused ] || refuse "INTERNAL: try later"
    rm -f "$STUBS/request" "$STUBS"/slice.* ;;
  "storage ls"*) cat "$STUBS/checkpoints" 2> /dev/null || exit 1 ;;
  "compute tpus tpu-vm ssh"*" --worker=all --quiet "*)
    [ "$(readlink /proc/self/fd/0)" = /dev/null ] || refuse "reads the terminal"
    case "$*" in
      *pkill*) touch "$STUBS/stopped" ;;
      *) run "$(sed -n 's/.*--command=mkdir .tmp.flmjax-[0-9]*-\([0-9]*\) .*/\1/p' <<< "$*")" "$5" ;;
    esac ;;
  *) refuse "no stub of: $*" ;;
esac
"""
SSH = ("gcloud", "compute", "tpus", "tpu-vm", "ssh")


def babysit(folder: Path, *runs: str, slices: int = 1, **answers: str) -> tuple[Stubs, Path]:
    """Stubs of gcloud with these runs and answers, and a launch file; time passes quickly."""
    stubs = Stubs(folder, gcloud=GCLOUD, sleep="exec /bin/sleep 0.02")
    for name, lines in {"runs": "\n".join(runs), **answers}.items():
        (folder / name).write_text(lines + "\n")
    flags = (V5P,) if slices == 1 else TWO_SLICES
    return stubs, write(folder, "tpu_vm", *flags, BUCKET, site=SITE.format(slurm=""))


def verbs(stubs: Stubs) -> list[str]:
    """The calls that change something, on the first slice: create, delete, stop (the processes of a run), run."""
    names = []
    for call in stubs.calls("gcloud"):
        if "queued-resources" in call and "describe" not in call:
            names.append("create" if "create" in call else "delete")
        elif call[:5] == list(SSH) and call[5] in ("flm-101b", "flm-101b-0"):
            names.append("stop" if "pkill" in call[-1] else "run")
    return names


def commands(stubs: Stubs, verb: str) -> list[str]:
    """The commands that hosts get: to stop a run, or to run."""
    calls = [call[-1].removeprefix("--command=") for call in stubs.calls(*SSH)]
    return [command for command in calls if ("pkill" in command) == (verb == "stop")]


START = ["stop", "run"]


def test_a_preempted_slice_is_recreated_and_the_run_goes_on(tmp_path):
    stubs, file = babysit(tmp_path, "preempted", "0 0")
    done = stubs.run(file)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs) == ["create", *START, "delete", "create", *START, "delete"]
    assert "slices: PREEMPTED" in done.stderr
    assert "crash" not in done.stderr
    first, second = [command.partition("\n")[2] for command in commands(stubs, "run")]
    assert first == second
    assert "--workdir=gs://bucket/runs/flm_101b" in first


def test_one_preempted_slice_of_several_ends_the_run_of_all(tmp_path):
    stubs, file = babysit(tmp_path, "preempted", "0 0", slices=2)
    done = stubs.run(file)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs) == ["create", *START, "delete", "create", *START, "delete"]
    connections = (tmp_path / "connections").read_text().split()
    assert len(connections) == 2
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in connections):
        assert time.monotonic() < end, connections
        time.sleep(0.05)


def test_several_slices_are_one_request_and_all_hosts_run(tmp_path):
    stubs, file = babysit(tmp_path, "0 0", slices=2)
    assert stubs.run(file).returncode == 0
    (create,) = stubs.calls("gcloud", "alpha")
    assert create[1:] == [
        *("alpha", "compute", "tpus", "queued-resources", "create", "flm-101b", "--project=project"),
        *("--zone=us-central2-b", "--quiet", "--type=v5p", "--topology=4x8x8", "--runtime-version=v2-alpha-tpuv5"),
        *("--spot", "--node-count=2", "--node-prefix=flm-101b"),
    ]
    nodes = {call[5] for call in stubs.calls("gcloud", "compute", "tpus", "tpu-vm", "describe")}
    assert nodes == {"flm-101b-0", "flm-101b-1"} == {call[5] for call in stubs.calls(*SSH)}
    first, second = commands(stubs, "run")
    assert first == second
    assert all({"--worker=all", "--ssh-flag=-oServerAliveInterval=30"} <= set(call) for call in stubs.calls(*SSH))


@pytest.mark.parametrize(
    ("runs", "status", "words"),
    [
        (("75 75", "75 75", "75 75", "75 75", "0 0"), 0, "saved; started again"),
        (("0 2 75",), 2, "the command or the config is wrong"),
        (("1 75", "silent", "2 134 0"), 1, "exit status 134, crash 3 of 3 in a row at checkpoint 0"),
        (("1 1", "1 1", "saves checkpoint 20", "1 1", "0 0"), 0, "crash 1 of 3 in a row at checkpoint 20; started"),
        (("0 and lost", "0 0"), 0, "exit status 255, crash 1 of 3"),
        (("unknown for a time, then 0",), 0, "the run has ended"),
        (("unknown at the end, then 1", "0 0"), 0, "exit status 1, crash 1 of 3"),
    ],
)
def test_runs_on_slices_start_again_by_their_exit_status(runs, status, words, tmp_path):
    stubs, file = babysit(tmp_path, *runs)
    done = stubs.run(file)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert verbs(stubs) == ["create", *START * len(runs), *["delete"] * (status == 0)]


@pytest.mark.parametrize(
    ("answers", "calls", "words"),
    [
        ({"creates": "refused\nrefused"}, ["create"] * 3, "gcloud refused; tried again in 60 seconds"),
        ({"creates": "SUSPENDED"}, ["create", "delete", "create"], "slices: SUSPENDED"),
        ({"creates": "FAILED\nFAILED"}, ["create", "delete"] * 2 + ["create"], "slices: FAILED"),
        ({"unknown": "3"}, ["create"], "gcloud: ERROR: (gcloud) UNAVAILABLE: try later"),
        (
            {"creates": "SUSPENDED", "deletes": "refused"},
            ["create", "delete", "delete", "create"],
            "gcloud refused; tried again in 60 seconds",
        ),
    ],
)
def test_slices_are_requested_until_they_are_there(answers, calls, words, tmp_path):
    stubs, file = babysit(tmp_path, "0 0", **answers)
    done = stubs.run(file)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs) == [*calls, *START, "delete"]
    assert words in done.stderr


def test_a_request_that_fails_three_times_in_a_row_is_given_up(tmp_path):
    stubs, file = babysit(tmp_path, creates="FAILED\nFAILED\nFAILED")
    done = stubs.run(file)
    assert done.returncode == 1
    assert verbs(stubs) == ["create", "delete", "create", "delete", "create"]
    assert "the request failed 3 times in a row: gcloud compute tpus queued-resources describe flm-101b" in done.stderr


def test_the_slices_are_deleted_even_if_gcloud_refuses_at_first(tmp_path):
    stubs, file = babysit(tmp_path, "0 0", deletes="refused\nrefused")
    done = stubs.run(file)
    assert done.returncode == 0, done.stderr
    assert verbs(stubs) == ["create", *START, "delete", "delete", "delete"]
    assert done.stderr.count("gcloud refused to delete the slices") == 2
    assert done.stderr.endswith("the slices are deleted\n")


def interrupted(stubs: Stubs, file: Path, last: str) -> tuple[int, str]:
    """Exit status and messages of a babysitter that gets Ctrl-C after a call."""
    process = subprocess.Popen(
        ["bash", str(file)], cwd=file.parent, env=stubs.environment, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end and last not in verbs(stubs):
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, error


def test_interrupting_the_babysitter_saves_the_run(tmp_path):
    stubs, file = babysit(tmp_path, "hangs")
    status, error = interrupted(stubs, file, "run")
    assert status == 130
    assert "interrupted: the run saves" in error
    assert "the slices stay: gcloud compute tpus queued-resources delete flm-101b" in error
    assert verbs(stubs) == ["create", *START, "stop"]
    assert (tmp_path / "flm-101b.1.log").read_text() == "flmjax-exit 75\n"


def test_an_interrupt_without_a_run_stops_nothing(tmp_path):
    stubs, file = babysit(tmp_path, creates="WAITING_FOR_RESOURCES")
    status, error = interrupted(stubs, file, "create")
    assert (status, "the run saves" in error, "the slices stay" in error) == (130, False, True)
    assert verbs(stubs) == ["create"]


# ---- on a host -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ['data set/it\'s "the" $HOME `run` #1', "a\\b*"])
def test_a_host_starts_one_run_however_often_it_is_told(word, tmp_path):
    """gcloud repeats a command when the connection is lost, up to ten times; any characters get through."""
    stubs, _ = babysit(tmp_path, "0 0")
    for name in ("flmjax", "module"):
        (tmp_path / "bin" / name).write_text((tmp_path / "bin" / "sleep").read_text().rpartition("exec")[0])
        (tmp_path / "bin" / name).chmod(0o755)
    workdir = f"--workdir=gs://bucket/{word}"
    assert stubs.run(write(tmp_path, "tpu_vm", V5P, workdir, site=SITE.format(slurm=""))).returncode == 0
    (command,) = commands(stubs, "run")
    for _ in range(2):
        text = command.replace("/tmp/", f"{tmp_path}/", 1)
        done = subprocess.run(["bash", "-c", text], env=stubs.environment, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0
    assert stubs.calls("module") == [["module", "load", "cuda"]]
    assert stubs.calls("flmjax") == [["flmjax", "train", V5P, workdir]]


def processes(*arguments: str) -> list[str]:
    return subprocess.run(["pgrep", *arguments], capture_output=True, text=True, timeout=10).stdout.split()


RUN = """
import signal, time
signal.signal(signal.SIGTERM, {handler})
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("handler", "seconds", "status"), [("lambda *_: time.sleep(2) or exit(75)", 300, 75), ("signal.SIG_IGN", 1, 137)]
)
def test_a_stopped_run_may_save_before_it_is_killed(handler, seconds, status, tmp_path):
    """On processes like those of a host: the shell that started the run goes on, and the command ends after the run."""
    site = f"grace_seconds = {seconds}\n{SITE.format(slurm='')}"
    text = write(tmp_path, "tpu_vm", V5P, BUCKET, site=site).read_text()
    stop = text.partition("stop_command()")[2].partition("'FLMJAX_END'\n")[2].partition("FLMJAX_END")[0]
    (tmp_path / "flmjax").write_text(f"#!{sys.executable}\n{RUN.format(handler=handler)}")
    (tmp_path / "flmjax").chmod(0o755)
    line = f"{shlex.quote(str(tmp_path / 'flmjax'))} train --config=x; echo ended $?"
    shell = subprocess.Popen(["bash", "-c", line], stdout=subprocess.PIPE, text=True, process_group=0)
    try:
        assert shell.stdout.readline() == "started\n"
        # Only on the processes of this test.
        own = f'pkill() {{ command pkill -g {shell.pid} "$@"; }}; pgrep() {{ command pgrep -g {shell.pid} "$@"; }}\n'
        subprocess.run(["bash", "-c", own + stop], timeout=30, check=False)
        assert not processes("-g", str(shell.pid), "-f", "flmjax train --config=x$")
        assert shell.stdout.readline() == f"ended {status}\n"
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait(10)
