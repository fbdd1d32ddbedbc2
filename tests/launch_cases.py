"""Launch files of tests, and scripts in place of the programs of clusters."""

import os
import subprocess
from pathlib import Path

from flmjax import cli

ROOT = Path(__file__).parents[1]
SITE = """
setup = ["module load cuda"]
[env]
NCCL_IB_HCA = "mlx5_0,mlx5_1"
[slurm]
partition = "gpu"
account = "lab"
time = "2-00:00:00"
options = ["--constraint=a800"]
{slurm}
[tpu_vm]
project = "project"
zone = "us-central2-b"
runtime_version = "v2-alpha-tpuv5"
tier = "spot"
[gke_jobset]
image = "europe-docker.pkg.dev/project/flmjax:1"
namespace = "training"
queue = "tpus"
service_account = "trainer"
[xpk]
cluster = "cluster"
project = "project"
zone = "us-central2-b"
image = "europe-docker.pkg.dev/project/flmjax:1"
options = ["--priority=high"]
"""
PYXIS = 'container = "pyxis"\nimage = "/images/flmjax.sqsh"\nmounts = ["/data:/data"]\n'
A800 = "--config=configs/flm_101b.py:a800"
V5P = "--config=configs/flm_101b.py:tpu_v5p"
TWO_SLICES = (
    V5P,
    "--config.mesh.topology=v5p:4x8x8*2",
    *(f"--config.stages[{i}].mesh.replica=2" for i in range(3)),
)
BUCKET = "--workdir=gs://bucket/runs/flm_101b"


def write(folder: Path, kind: str, *flags: str, site: str | None = None, name: str = "file") -> Path:
    """The file that `flmjax launch KIND FLAGS` writes into a folder, with a site file of this text."""
    line = ["launch", kind, *flags, f"--output={folder / name}"]
    if site is not None:
        (folder / "site.toml").write_text(site)
        line.append(f"--site={folder / 'site.toml'}")
    here = Path.cwd()
    try:
        os.chdir(ROOT)
        assert cli.main(line) == 0
    finally:
        os.chdir(here)
    return folder / name


RECORD = """#!/bin/bash
printf '%s\\0' "$(basename "$0")" "$@" $'\\036' >> "$STUBS/calls"
"""


class Stubs:
    """Scripts in place of programs; calls of all of them are recorded."""

    def __init__(self, folder: Path, **scripts: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, script in scripts.items():
            path = folder / "bin" / name
            path.write_text(RECORD + script)
            path.chmod(0o755)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
            "STUBS": str(folder),
        }

    def calls(self, *words: str) -> list[list[str]]:
        """The calls that start with these words."""
        file = self.folder / "calls"
        text = file.read_text() if file.exists() else ""
        calls = [call.split("\0")[:-1] for call in text.split("\036\0")[:-1]]
        return [call for call in calls if call[: len(words)] == list(words)]

    def run(self, file: Path, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(file)],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
