"""`flmjax train --profile=START:STEPS`: a trace of the updates that the flag names, and of no other."""

import jax
import jax.numpy as jnp
import pytest
from run_cases import start, write_lab

from flmjax import cli
from flmjax.config import ConfigError, RunConfig, StageConfig
from flmjax.training.profiling import check_window, traced

CONFIG = RunConfig(stages=(StageConfig(name="small", steps=10), StageConfig(name="large", steps=5)))


def events(folder) -> dict[str, list]:
    """Names of the events in the only trace of a folder, with their statistics."""
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")  # the layout that TensorBoard's plugin reads
    names: dict[str, list] = {}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                names.setdefault(event.name, []).append(dict(event.stats))
    return names


def traced_steps(folder) -> list[int]:
    """Updates of a trace, by the annotation that xprof takes for a step."""
    return [stats["step_num"] for stats in events(folder)["train"]]


def updates(first: int, last: int):
    """Updates of a stage, each of a program of its own name."""
    for step in range(first + 1, last + 1):
        program = jax.jit(lambda x: x @ x)
        yield step, None, {"loss": program(jnp.ones((8, 8)))}


@pytest.mark.parametrize(("first", "window", "steps"), [(0, range(3, 5), [4, 5]), (4, range(3, 6), [5, 6])])
def test_the_trace_has_the_updates_of_the_window(tmp_path, first, window, steps):
    """The second run goes on within the window."""
    lines: list[str] = []
    made = traced(updates(first, 10), first, CONFIG.schedule[0], window, tmp_path, lines.append)
    assert [step for step, _, _ in made] == list(range(first + 1, 11))
    assert traced_steps(tmp_path) == steps
    assert [str(tmp_path) in line for line in lines] == [True]


@pytest.mark.parametrize("window", [range(12, 13), range(2, 4)])
def test_updates_outside_the_window_are_not_traced(tmp_path, window):
    """A window of another stage, and one that the run has passed: a command that is repeated goes on."""
    stage, first = CONFIG.schedule[0], 5
    assert len(list(traced(updates(first, 10), first, stage, window, tmp_path, print))) == 5
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_window_ends_the_trace(tmp_path):
    def failing():
        yield 1, None, {"loss": jnp.zeros(())}
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(traced(failing(), 0, CONFIG.schedule[0], range(0, 5), tmp_path, print))
    with jax.profiler.trace(tmp_path / "another"):  # JAX refuses a second trace while one is taken
        pass


def test_a_run_leaves_a_trace_of_its_training_step(tmp_path):
    write_lab(tmp_path)
    shown = start(tmp_path, "batch:9", tmp_path / "run", "--profile=4:3", expect=-9).stdout
    assert f"trace of updates 5 to 7: xprof or tensorboard --logdir={tmp_path / 'run' / 'profile'}" in shown
    assert traced_steps(tmp_path / "run" / "profile") == [5, 6, 7]
    assert any("train_step" in name for name in events(tmp_path / "run" / "profile"))


@pytest.mark.parametrize("text", ["5", "a:b", "-1:3", "3:0", "1:2:3", ":", "1.5:2"])
def test_a_window_that_is_none_is_one_line(capsys, tmp_path, text):
    assert cli.main(["train", "--config=configs/quickstart.py", f"--workdir={tmp_path}", f"--profile={text}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--profile={text} must be START:STEPS" in line
    assert not list(tmp_path.iterdir())


def test_a_window_after_the_end_or_over_a_growth_is_refused():
    check_window(CONFIG, range(0, 10))
    check_window(CONFIG, range(10, 15))
    with pytest.raises(ConfigError, match=r"--profile=15:1: the run has 15 updates; START must be below that"):
        check_window(CONFIG, range(15, 16))
    with pytest.raises(ConfigError, match=r"--profile=8:4 goes beyond update 10, .* stage small; take at most 8:2"):
        check_window(CONFIG, range(8, 12))
