"""Ctrl-C in a process of the command line: one line and status 130, at every moment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """
from flmjax.config import *

def get_config():
    model = ModelConfig(num_layers=1, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=48, max_length=32)
    return RunConfig(model=model, data=DataConfig(sources=("text",), vocabulary="bytes"))
"""
# A process that interrupts itself when it imports MODULE for the first time.
AT_IMPORT = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "MODULE":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = ["flmjax", "train", "--config=config.py", "--workdir=run"]
runpy.run_module("flmjax", run_name="__main__")
"""
# A process whose command is interrupted in a callback of the garbage collector, where exceptions are dropped.
IN_A_CALLBACK = """
import gc, os, runpy, signal, sys, time
from flmjax import cli

def command(*_, **__):
    begin()
    interrupt = lambda *_: (gc.callbacks.clear(), os.kill(os.getpid(), signal.SIGINT))
    gc.callbacks.append(interrupt)
    gc.collect()
    for _ in range(1000):
        time.sleep(0.01)
    print("the run goes on")

try:
    from flmjax.interrupt import raise_interrupts as begin
except ImportError:
    begin = lambda: None
cli.COMMANDS["train"] = command
sys.argv = ["flmjax", "train", "--config=config.py", "--workdir=run"]
runpy.run_module("flmjax", run_name="__main__")
"""


def interrupted(code: str, folder: Path) -> str:
    """Standard error of a process that was interrupted, checked to have ended with status 130 and no output."""
    (folder / "config.py").write_text(CONFIG)
    (folder / "text").mkdir()
    for i in range(20):
        (folder / "text" / f"{i}.txt").write_text(f"text number {i} " * 9)
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert "the run goes on" not in done.stdout
    assert done.returncode == 130, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "module", ["absl", "ml_collections", "flmjax.cli.help", "jax", "jax.numpy", "orbax.checkpoint"]
)
def test_an_interrupt_of_an_import_is_one_line(module, tmp_path):
    assert interrupted(AT_IMPORT.replace("MODULE", module), tmp_path) == "flmjax: interrupted\n"
    assert not (tmp_path / "run").exists()


def test_an_interrupt_of_a_late_import_is_one_line_with_the_step(tmp_path):
    """The metrics' library is imported when the run has begun: what is open is closed."""
    error = interrupted(AT_IMPORT.replace("MODULE", "tensorboardX"), tmp_path)
    assert error == (
        "flmjax: interrupted: stopped at step 0; no step is on disk yet; run the same command again to go on\n"
    )
    assert (tmp_path / "run" / "data" / "meta.json").exists()
    assert not (tmp_path / "run" / ".lock").exists()


def test_an_interrupt_that_a_callback_drops_is_raised_again(tmp_path):
    """Python prints and drops an exception of such a callback (JAX has one), and the run went on."""
    error = interrupted(IN_A_CALLBACK, tmp_path)
    assert error == "flmjax: interrupted; run the same command again to go on\n"
