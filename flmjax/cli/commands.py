"""What each command does: one call per command, with imports inside, so that a typo is answered without JAX.

Work begins after the imports: from then on an interrupt is an exception, which closes what is open.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from flmjax.config import ConfigError, RunConfig
from flmjax.interrupt import raise_interrupts


def train(config: RunConfig, workdir: Path, profile: range | None) -> None:
    """Train the stages of a run, or resume the run of the workdir from its last checkpoint."""
    from flmjax.report.goodput import goodput_text
    from flmjax.report.run_page import write_report
    from flmjax.sharding.processes import is_writer, start_processes
    from flmjax.training.start import train as run
    from flmjax.workdir.starts import read_starts

    raise_interrupts()
    start_processes(config.distributed)
    run(config, workdir, profile)
    if not is_writer():
        return
    if (text := goodput_text(read_starts(workdir))) is not None:
        print(text, flush=True)
    print(f"report: {write_report(workdir)}", flush=True)


def prepare(config: RunConfig, workdir: Path, inspect: int) -> None:
    """Turn texts into token files, or verify the token files of the workdir."""
    from flmjax.data.held_out import mixtures_of
    from flmjax.data.inspection import show_samples, summary
    from flmjax.data.loader import TrainingStream
    from flmjax.data.prepare import prepare as run
    from flmjax.workdir.local_copy import store_data, working_copy
    from flmjax.workdir.paths import data_directory

    raise_interrupts()
    with working_copy(workdir) as copy:
        directory, mixtures = data_directory(config, copy.folder), mixtures_of(config)
        data = run(config.data, directory, mixtures=mixtures, progress=True, full_check=True)
        store_data(copy.folder)
    stream = TrainingStream.of_run(config, data)
    print(summary(stream), flush=True)
    for text in show_samples(stream, inspect, sys.stdout.isatty()):
        print(text, flush=True)


def grow(config: RunConfig, workdir: Path | None = None, *, source: str, dry_run: bool, weights_only: bool) -> None:
    """Grow the newest checkpoint of another run into the model of this config's first stage."""
    from flmjax.training.grow_checkpoint import grow_checkpoint, plan_checkpoint
    from flmjax.workdir.local_copy import reading_copy
    from flmjax.workdir.storage import run_path

    raise_interrupts()
    with reading_copy(run_path(source, "--source")) as folder:
        if workdir is None:
            print(plan_checkpoint(config, folder, None), flush=True)
            return
        if dry_run:
            with reading_copy(workdir) as target:
                print(plan_checkpoint(config, folder, target), flush=True)
            return
        grow_checkpoint(config, folder, workdir, weights_only)
    print(f"{workdir}: checkpoint at step 0; 'flmjax train' with this config and workdir continues from it", flush=True)


def plan(
    config: RunConfig,
    price: float | None,
    tflops: float | None,
    hours_between_failures: float | None,
    cost_only: bool,
    search_layout: bool,
    output: str | None,
) -> None:
    """Compile a run ahead of time for a machine and estimate memory, time and price."""
    from flmjax.planning.topology import TooLargeError
    from flmjax.report.plan_table import cost_table, plan_table
    from flmjax.stderr import captured_stderr

    modes = {"--cost-only": cost_only, "--search-layout": search_layout, "--output": output is not None}
    chosen = [flag for flag, is_set in modes.items() if is_set]
    refusals = [f"{flag} is not read with {chosen[0]}; take one of them" for flag in chosen[1:]]
    if tflops is not None and not cost_only:
        refusals.append(f"--tflops={tflops:g} is read with --cost-only alone; a plan estimates the speed")
    if price is not None and search_layout:
        refusals.append(f"--price={price:g} is not read with --search-layout: the fewest days are the cheapest")
    if hours_between_failures is not None and (cost_only or search_layout):
        refusals.append(f"--hours-between-failures={hours_between_failures:g} is not read with {chosen[0]}")
    numbers = {"price": price, "tflops": tflops, "hours-between-failures": hours_between_failures}
    for flag, value in numbers.items():
        if value is not None and not 0 < value < 1e9:
            refusals.append(f"--{flag}={value:g} must be a positive number below 1e9")
    if refusals:
        raise ConfigError("; ".join(refusals))
    if cost_only:
        print(cost_table(config, tflops, price), flush=True)
        return
    log = lambda text: print(f"compiling: {text}", file=sys.stderr, flush=True)
    with captured_stderr():  # the CUDA plugin reports that this machine has no GPU
        from flmjax.planning.layout_search import layout_table, search_layouts
        from flmjax.planning.planner import make_plan
    raise_interrupts()
    if search_layout:
        print(layout_table(search_layouts(config, log), [stage.name for stage in config.stages]), flush=True)
        return
    run_plan = make_plan(config, price, log, hours_between_failures)
    print(plan_table(run_plan), flush=True)
    if output is not None:
        from flmjax.report.plan_page import write_plan

        print(f"plan: {write_plan(run_plan, Path(output))}", flush=True)
    if run_plan.refusals:
        raise TooLargeError(run_plan.refusals[0])


def report(workdir: tuple[str, ...], output: str | None) -> None:
    """Write report.html of a run, finished or not; or compare several runs on one page."""
    from flmjax.workdir.storage import run_path

    runs, folder = [run_path(run, "--workdir") for run in workdir], Path(output) if output else None
    if len(runs) == 1:
        from flmjax.report.run_page import write_report

        raise_interrupts()
        print(f"report: {write_report(runs[0], folder)}", flush=True)
        return
    from flmjax.report.comparison import write_comparison

    raise_interrupts()
    print(f"comparison: {write_comparison(runs, folder or Path('comparison'))}", flush=True)


def launch(
    config: RunConfig, *, kind: str, flags: tuple[str, ...], workdir: str, output: str, site: str | None
) -> None:
    """Write the file that starts a run on the hosts of a cluster."""
    from flmjax.launch.launch_file import TrainCommand, write_launch_file

    start = write_launch_file(kind, config, TrainCommand(flags, workdir), site, output)
    print(f"{output}: start the run by: {start}", flush=True)


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "prepare": prepare,
    "grow": grow,
    "plan": plan,
    "report": report,
    "launch": launch,
}
