"""Plug-ins of JAX: the compilers for GPUs and TPUs are of no use to a run on a machine without these devices."""

import subprocess
import sys
from pathlib import Path

import pytest

from flmjax import hardware

CONFIG = f"""
import jax
from ml_collections import config_dict
jax.devices()
exec(open({str(Path(__file__).parents[1] / "configs" / "quickstart.py")!r}).read())
"""


@pytest.mark.skipif(any(Path("/dev").glob("nvidia*")), reason="this machine has a GPU")
def test_a_run_on_cpus_is_silent_beside_compilers(compilers, tmp_path):
    """The CUDA plug-in writes C++ log and a traceback when it has no driver, libtpu an error without a TPU.

    The config file uses JAX itself; the run is then refused in one line, by the devices that JAX has.
    """
    (tmp_path / "own.py").write_text(CONFIG)
    flags = ["--config.model.attention=cudnn", "--config.data.vocabulary=bytes", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "flmjax", "train", f"--config={tmp_path / 'own.py'}", *flags]
    done = subprocess.run(command, env=compilers, capture_output=True, text=True, timeout=120)
    assert "model.attention='cudnn' needs an NVIDIA GPU" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("node", "platforms", "hidden"),
    [
        (None, None, {"cuda", "tpu"}),
        (None, "", {"cuda", "tpu"}),
        (None, "cpu", {"cuda", "tpu"}),
        (None, "cuda", set()),
        ("nvidia0", None, {"tpu"}),
        ("nvidiactl", None, {"tpu"}),
        ("dxg", "cpu", {"tpu"}),
        ("accel0", None, {"cuda"}),
        ("vfio/0", None, {"cuda"}),
    ],
)
def test_plugins_of_devices_of_the_machine_stay(node, platforms, hidden, tmp_path, monkeypatch):
    """As do those that JAX_PLATFORMS demands: JAX then says what is missing."""
    if platforms is None:
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    else:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    if node is not None:
        (tmp_path / node).parent.mkdir(exist_ok=True)
        (tmp_path / node).touch()
    modules = {}
    monkeypatch.setattr(hardware.sys, "modules", modules)
    hardware.hide_plugins(tmp_path)
    monkeypatch.undo()
    kinds = {"libtpu": "tpu"}
    assert {kinds.get(name, "cuda") for name in modules} == hidden
