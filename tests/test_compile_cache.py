"""Compiled programs of a run on disk: a process that goes on with the run compiles nothing."""

import os
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax._src import compilation_cache as jax_cache
from quick_xla import QUICK_XLA
from run_cases import write_lab

from flmjax.config import ConfigError, RunConfig
from flmjax.config.validate import validate
from flmjax.training.compile_cache import _remove_damaged, compile_cache

# The driver of run_cases.py in a process that writes a line for every program that JAX asks its cache for.
PROGRAM = """
import os, runpy, sys
import jax

def tell(event, **_):
    if event.startswith("/jax/compilation_cache/c"):
        with open(os.environ["EVENTS"], "a") as file:
            file.write(event.rsplit("/", 1)[1] + chr(10))

jax.monitoring.register_event_listener(tell)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def programs(lab: Path, when: str, workdir: Path, *flags: str) -> tuple[Counter, str]:
    """Numbers of JAX's events in a process of a run that dies at `when` (driver.py), and what it says on stderr."""
    driver = Path(__file__).parent / "driver.py"
    events = lab / "events"
    events.unlink(missing_ok=True)
    environment = {name: x for name, x in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERS"))}
    environment |= {
        "XLA_FLAGS": QUICK_XLA,
        "JAX_PLATFORMS": "cpu",
        "DRIVER_LOG": str(workdir) + ".batches",
        "EVENTS": str(events),
        "PYTHONPATH": os.pathsep.join([str(driver.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    line = [sys.executable, "-c", PROGRAM, str(driver), when, "train", f"--config={lab / 'config.py'}"]
    line += [f"--workdir={workdir}", *flags]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == (0 if when == "never" else -9), done.stdout + done.stderr
    return Counter(events.read_text().split()), done.stderr


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with the run `run`, which was killed before update 13 and has a checkpoint of update 10, evaluated."""
    folder = tmp_path_factory.mktemp("lab")
    write_lab(folder)
    events, _ = programs(folder, "saved:13", folder / "run")
    assert events["compile_requests_use_cache"] == events["cache_misses"] > 10
    return folder


def test_a_process_that_goes_on_with_a_run_compiles_nothing(lab):
    """Restoring, the step, checksums and a save are all loaded."""
    events, _ = programs(lab, "batch:14", lab / "run")
    assert events["compile_requests_use_cache"] == events["cache_hits"] > 5
    assert events["cache_misses"] == 0


def test_a_run_done_again_loads_growth_certificate_and_evaluation(lab):
    """Another workdir with the same folder of programs: two runs share them."""
    shared = f"--config.compile_cache={lab / 'shared'}"
    programs(lab, "never", lab / "first", shared)
    events, _ = programs(lab, "never", lab / "second", shared)
    assert events["compile_requests_use_cache"] == events["cache_hits"] > 20
    assert not (lab / "second" / "compile_cache").exists()


def test_a_damaged_program_is_compiled_and_stored_again(lab):
    """The file of a process that was killed while it wrote is half there; JAX alone never replaces it."""
    (step,) = (lab / "run" / "compile_cache").glob("jit_train_step-*-cache")
    whole = step.read_bytes()
    step.write_bytes(whole[: len(whole) // 2])
    events, error = programs(lab, "batch:14", lab / "run")
    assert f"removed {step}, which was damaged; jit_train_step is compiled again" in error
    assert events["compile_requests_use_cache"] == events["cache_hits"] + 1
    assert len(step.read_bytes()) > 0.9 * len(whole)
    events, error = programs(lab, "batch:14", lab / "run")
    assert events["compile_requests_use_cache"] == events["cache_hits"]
    assert "damaged" not in error


@pytest.mark.parametrize("library", ["zlib", "zstandard"])
def test_only_the_damaged_entry_of_a_program_is_removed(library, monkeypatch, tmp_path):
    """JAX compresses by Zstandard if that library is installed: all entries then looked damaged to zlib."""
    decompress = lambda data: zlib.decompress(data.removeprefix(b"zstandard"))
    fake = SimpleNamespace(ZstdDecompressor=lambda: SimpleNamespace(decompress=decompress))
    monkeypatch.setattr(jax_cache, "zstd", None)
    monkeypatch.setattr(jax_cache, "zstandard", fake if library == "zstandard" else None, raising=False)
    entry = library.removeprefix("zlib").encode() + zlib.compress(b"program")
    (tmp_path / "jit_step-a-cache").write_bytes(entry)
    (tmp_path / "jit_step-b-cache").write_bytes(entry[:-3])
    (tmp_path / "jit_other-c-cache").write_bytes(b"")
    assert _remove_damaged(tmp_path, "jit_step") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jit_other-c-cache", "jit_step-a-cache"]


def test_jax_has_its_own_settings_again_after_a_run(tmp_path, monkeypatch):
    """A second run in one process, of a notebook for example, has its own folder."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        for name in ("a", "b"):
            with compile_cache(RunConfig(), tmp_path / name):
                jax.jit(lambda x: x * 3)(1.0)
            assert jax.config.jax_compilation_cache_dir is None
            assert list((tmp_path / name / "compile_cache").iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before[1]


def test_the_folder_of_jax_is_kept_unless_the_config_names_one(tmp_path):
    own = jax.config.jax_compilation_cache_dir
    assert own is not None
    with compile_cache(RunConfig(), tmp_path):
        assert jax.config.jax_compilation_cache_dir == own
    with compile_cache(RunConfig(compile_cache=str(tmp_path / "shared")), tmp_path):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "shared")
    assert jax.config.jax_compilation_cache_dir == own


def test_a_file_is_no_folder_of_programs(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"compile_cache=.*file is a file; name a folder"):
        validate(RunConfig(compile_cache=str(file)))
