"""Launch files: their golden text, that shells and YAML accept them, and what `flmjax launch` refuses.

`python tests/test_launch.py` writes the golden files; the diff is read in review.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launch_cases import A800, BUCKET, PYXIS, ROOT, SITE, TWO_SLICES, V5P, write

from flmjax import cli
from flmjax.config import ConfigError
from flmjax.hardware import compiler_options
from flmjax.launch import launch_file
from flmjax.launch.launch_file import KINDS, MARK, TrainCommand
from flmjax.launch.site import read_site

GOLDEN = Path(__file__).parent / "golden" / "launch"
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# The golden files: kind, lines of the site's section on Slurm, flags. Without lines there is no site file.
FILES = {
    "slurm.sbatch": ("slurm", None, (A800, "--workdir=/shared/flm_101b")),
    "slurm_gpu_pyxis.sbatch": ("slurm", f'tasks = "gpu"\n{PYXIS}', (A800, "--workdir=/shared/flm_101b")),
    "slurm_apptainer.sbatch": ("slurm", PYXIS.replace("pyxis", "apptainer"), (A800, "--workdir=/shared/flm_101b")),
    "tpu_vm.sh": ("tpu_vm", "", (V5P, BUCKET)),
    "tpu_vm_two_slices.sh": ("tpu_vm", "", (*TWO_SLICES, BUCKET)),
    "gke_jobset.yaml": ("gke_jobset", "", (*TWO_SLICES, BUCKET)),
    "xpk.sh": ("xpk", "", (*TWO_SLICES, BUCKET)),
}
SHELL = [name for name in FILES if not name.endswith(".yaml")]


def golden_text(name: str, folder: Path) -> str:
    kind, slurm, flags = FILES[name]
    file = write(folder, kind, *flags, site=None if slurm is None else SITE.format(slurm=slurm))
    return file.read_text().replace(str(folder), ".")


@pytest.mark.parametrize("name", FILES)
def test_launch_files_are_the_golden_ones(name, tmp_path):
    how = "golden text differs; if the change is meant, run `python tests/test_launch.py` and read the diff"
    assert golden_text(name, tmp_path) == (GOLDEN / name).read_text(), how


@pytest.mark.parametrize("name", SHELL)
def test_shells_and_shellcheck_accept_the_launch_files(name):
    text = (GOLDEN / name).read_text()
    assert "\nset -euo pipefail\n" in text
    shellcheck = shutil.which("shellcheck", path=PROGRAMS)
    assert shellcheck, "no shellcheck: pip install -e '.[test]'"
    for command in (["bash", "-n"], [shellcheck, "--severity=style", "--shell=bash"]):
        done = subprocess.run([*command, str(GOLDEN / name)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", FILES)
def test_launch_files_set_no_options_of_xla(name):
    """The program passes those of flmjax/hardware.py to its compiler; a name that XLA lacks would abort every start."""
    assert "xla" not in (GOLDEN / name).read_text().lower()
    assert "LIBTPU_INIT_ARGS" not in (GOLDEN / name).read_text()


def test_a_jobset_has_a_pod_for_each_host_of_each_slice():
    jobset = yaml.safe_load((GOLDEN / "gke_jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], chips) == (2, 64, 64, 4)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8x8"
    assert jobset["metadata"]["name"] == "flm-101b"
    assert (spec["backoffLimit"], pod["restartPolicy"]) == (0, "Never")


def test_a_jobset_restarts_by_exit_status():
    """JobSet applies the first rule that fits a failed job: its reason, and a pattern of the message of Kubernetes."""
    spec = yaml.safe_load((GOLDEN / "gke_jobset.yaml").read_text())["spec"]
    pod_rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in pod_rules] == ["FailJob"] * 2
    assert pod_rules[0]["onExitCodes"] == {"containerName": "flmjax", "operator": "In", "values": [2, 75]}
    assert pod_rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    policy = spec["failurePolicy"]
    assert (
        policy["maxRestarts"] == read_site(None).max_crashes - 1
    )  # the run ends at the last crash, which is no restart
    assert all(rule["onJobFailureReasons"] == ["PodFailurePolicy"] for rule in policy["rules"])
    messages = {
        "Container flmjax for pod training/x failed with exit code 2 matching FailJob rule at index 0": "FailJobSet",
        "Container flmjax for pod training/x failed with exit code 75 matching FailJob rule at index 0": "Restart",
        "Pod training/x has condition DisruptionTarget matching FailJob rule at index 1": "Restart",
    }
    for message, action in messages.items():
        matches = (
            rule["action"]
            for rule in policy["rules"]
            if any(re.search(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", [""]))
        )
        assert next(matches) == {"Restart": "RestartJobSetAndIgnoreMaxRestarts"}.get(action, action), message


@pytest.mark.parametrize(
    ("kind", "topology", "lines"),
    [
        ("tpu_vm", "v5e:2x4", ["# 1 slice of 8 v5e chips; hosts of a slice: 1 "]),
        ("tpu_vm", "v5e:4x4", ["# 1 slice of 16 v5e chips; hosts of a slice: 4 "]),
        ("gke_jobset", "v5e:2x4", ["ct5lp-hightpu-4t.", "parallelism: 2 ", "google.com/tpu: 4"]),
        ("gke_jobset", "v6e:1x1", ["ct6e-standard-1t.", "parallelism: 1 ", "google.com/tpu: 1"]),
    ],
)
def test_hosts_of_small_slices_differ_between_cloud_tpu_and_gke(kind, topology, lines, tmp_path):
    """A slice of 2x4 is one machine of Cloud TPU; on GKE the type of the node pool decides."""
    devices = {"2x4": 8, "4x4": 16, "1x1": 1}[topology.partition(":")[2]]
    flags = ["--config=configs/flm_101b.py:tpu_v5p", f"--config.mesh.topology={topology}", BUCKET]
    flags += [f"--config.stages[{i}].mesh.{axis}=1" for i in range(3) for axis in ("replica", "tensor")]
    flags += [f"--config.stages[{i}].mesh.fsdp={devices}" for i in range(3)]
    text = write(tmp_path, kind, *flags, site=SITE.format(slurm="")).read_text()
    assert [line for line in lines if line not in text] == []


# Options of XLA in other projects' scripts that end the process at its start: XLA does not know them any more.
REMOVED_OPTIONS = [
    *("xla_gpu_enable_async_collectives", "xla_gpu_enable_async_all_gather", "xla_gpu_enable_async_all_reduce"),
    *("xla_gpu_enable_async_reduce_scatter", "xla_gpu_simplify_all_fp_conversions", "xla_gpu_pipeline_all_gather"),
    *("xla_gpu_pipeline_reduce_scatter", "xla_gpu_pipeline_all_reduce", "xla_gpu_enable_triton_softmax_fusion"),
    *("xla_gpu_graph_level", "xla_gpu_cuda_graph_level", "xla_gpu_enable_custom_fusions"),
    *("xla_gpu_lhs_enable_gpu_async_tracker", "xla_gpu_enable_pipelined_collectives"),
    *("xla_gpu_executable_terminate_timeout_seconds", "xla_gpu_executable_warn_stuck_timeout_seconds"),
    "xla_gpu_enable_heuristic_pass_configuration",
]


def test_the_program_sets_no_option_that_xla_has_removed():
    options = {name for platform in ("gpu", "tpu", "cpu") for name in compiler_options(platform, deterministic=True)}
    assert "xla_gpu_enable_latency_hiding_scheduler" in options
    assert options.isdisjoint(REMOVED_OPTIONS)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "KIND is missing: slurm, tpu_vm, gke_jobset, xpk; usage: flmjax launch KIND --config=FILE"),
        (["slrum", A800], "unknown kind of launch file 'slrum'; did you mean slurm"),
        (["slurm", A800, "--workdir=w"], "--output is missing; usage: flmjax launch KIND"),
        (["slurm", A800, "--output=OUT"], "--workdir is missing"),
        (["slurm", "--workdir=w", "--output=OUT"], "--config is missing"),
        (["slurm", V5P, "--workdir=w", "--output=OUT"], "has TPUs, and 'slurm' starts GPUs; take tpu_vm or gke_jobset"),
        (["xpk", A800, "--workdir=w", "--output=OUT"], "mesh.topology='a800:24x8' has GPUs, and 'xpk' starts TPUs"),
        (["slurm", "--config=configs/quickstart.py", "--workdir=w", "--output=OUT"], "mesh.topology is None; name the"),
        (["tpu_vm", V5P, BUCKET, "--output=OUT"], "'tpu_vm' needs tpu_vm.zone and tpu_vm.runtime_version; "),
        (
            ["tpu_vm", V5P, BUCKET, "--output=OUT"],
            "set them in a copy of flmjax/launch/site.toml, and name it: --site=COPY",
        ),
        (["tpu_vm", V5P, BUCKET, "--output=OUT", "--site=BARE"], "needs setup: a new slice has neither flmjax nor the"),
        (["slurm", A800, "--workdir=w", "--output=OUT", "--site=BARE"], "slurm.container and slurm.image must both be"),
        (["tpu_vm", V5P, "--workdir=/runs/flm", "--site=SITE", "--output=OUT"], "is lost with the hosts of a slice"),
        (["slurm", A800, "--workdir=w", "--output=OUT", "--site=none.toml"], "--site=none.toml: No such file"),
        (["slurm", A800, "--workdir=a\nb", "--output=OUT"], "characters that are not printable"),
        (["slurm", A800, "--workdir=w", "--output=FOLDER"], "is a folder; name a file"),
        (["slurm", A800, "--workdir=w", "--output=OTHER"], "exists and is no launch file; name another"),
        (["slurm", A800, "--workdir=~nobody_of_this_name/w", "--output=OUT"], "there is no user nobody_of_this_name"),
        (
            ["xpk", V5P, "--config.mesh.topology=v5p:4x8x8*2", BUCKET, "--site=SITE", "--output=OUT"],
            "has 256 places for 512 devices",
        ),
    ],
)
def test_a_wrong_launch_is_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    notes = f"some notes,\nfor example\n{MARK}flmjax launch slurm\n"
    (tmp_path / "other").write_text(notes)
    (tmp_path / "site").write_text(SITE.format(slurm=""))
    (tmp_path / "bare").write_text("[slurm]\ncontainer = 'pyxis'\n[tpu_vm]\nzone = 'z'\nruntime_version = 'v'\n")
    places = {name.upper(): tmp_path / name for name in ("out", "other", "site", "bare")} | {"FOLDER": tmp_path}
    for name, path in places.items():
        argv = [f"{word.removesuffix(name)}{path}" if word.endswith(f"={name}") else word for word in argv]
    assert cli.main(["launch", *argv]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert words in error
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "other").read_text() == notes


def test_slices_that_the_replica_axis_does_not_cross_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = [*(flag.replace("replica=2", "fsdp=128") for flag in TWO_SLICES), BUCKET, f"--output={tmp_path / 'file'}"]
    (tmp_path / "site.toml").write_text(SITE.format(slurm=""))
    assert cli.main(["launch", "xpk", *flags, f"--site={tmp_path / 'site.toml'}"]) == 2
    assert "replica=1 is not a multiple of the 2 slices of TPUs" in capsys.readouterr().err


def test_a_launch_file_replaces_a_launch_file(tmp_path):
    before = write(tmp_path, "slurm", A800, "--workdir=a").read_text()
    after = write(tmp_path, "slurm", A800, "--workdir=b").read_text()
    assert ("--workdir=a" in before, "--workdir=a" in after, "--workdir=b" in after) == (True, False, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[slurm]\npartitoin = 'x'", "there is no setting 'slurm.partitoin'; did you mean partition"),
        ("[slrum]\npartition = 'x'", "there is no setting 'slrum'; did you mean slurm"),
        ("slurm = 'x'", "slurm is a table of settings"),
        ("[max_crashes]\na = 1", "max_crashes is no table of settings"),
        ("max_crashes = 0", "max_crashes=0 must be a positive whole number"),
        ("max_crashes = true", "max_crashes=True must be a positive whole number"),
        ("setup = 'module load cuda'", "setup='module load cuda' must be a list of texts"),
        ("[env]\n'A B' = 'x'", "must be names of environment variables"),
        ("[env]\nA = 1", "must be names of environment variables"),
        ("[slurm]\ncontainer = 'docker'", 'container=\'docker\' must be one of "", "pyxis", "apptainer"'),
        ('[slurm]\npartition = "a\\nb"', "must be a text of one line"),
        ("[slurm", "Expected"),
    ],
)
def test_a_faulty_setting_of_a_site_is_named(text, words, tmp_path):
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"site\.toml: ") as error:
        read_site(str(tmp_path / "site.toml"))
    assert words in str(error.value)


def test_settings_that_a_site_leaves_out_have_the_defaults(tmp_path):
    (tmp_path / "site.toml").write_text("[slurm]\npartition = 'gpu'\n[env]\nOTHER = 'x'\n")
    site, defaults = read_site(str(tmp_path / "site.toml")), read_site(None)
    assert (site.slurm.partition, site.env["OTHER"], site.max_crashes) == ("gpu", "x", defaults.max_crashes)
    assert not any(defaults.env.values())  # nobody has measured a value


@pytest.mark.parametrize(
    ("workdir", "name"),
    [
        ("gs://b/runs/FLM_101B.v2/", "flm-101b-v2"),
        ("7b", "run-7b"),
        ("gs://bucket", "bucket"),
        ("r/" + "ab-" * 20, "ab-" * 13 + "a"),
        ("r/" + "a-" * 40, "a-" * 19 + "a"),
    ],
)
def test_names_are_those_that_clusters_accept(workdir, name):
    assert TrainCommand((), workdir).name == name


def test_every_kind_has_a_golden_file():
    assert {kind for kind, *_ in FILES.values()} == set(KINDS)
    templates = Path(launch_file.__file__).parent / "templates"
    assert {path.name for path in templates.iterdir()} == {kind.template for kind in KINDS.values()}


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    for name in FILES:
        with tempfile.TemporaryDirectory() as folder:
            (GOLDEN / name).write_text(golden_text(name, Path(folder)))
        print(GOLDEN / name)
