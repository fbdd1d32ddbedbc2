"""Start of a run, or its continuation by the same call: checks, locks and data, before loop.py trains."""

import contextlib
import functools
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from flmjax.config import ConfigError, MeshConfig, RunConfig
from flmjax.config.validate import validate, validate_meshes
from flmjax.data.held_out import mixtures_of
from flmjax.data.loader import TrainingStream
from flmjax.data.prepare import prepare
from flmjax.data.prepared import META_FILE, with_vocabulary
from flmjax.data.prepared_folder import discard
from flmjax.evaluation.generate import prompt_ids
from flmjax.interrupt import Stopped
from flmjax.model.attention import check_backends
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.processes import from_writer, is_writer, text_from_writer, writer_first
from flmjax.training.compile_cache import compile_cache
from flmjax.training.continuation import check_continuation, continued_stream
from flmjax.training.loop import Run, Session
from flmjax.training.profiling import check_window
from flmjax.training.spikes import SpikeError, finish_roll_back, roll_back
from flmjax.training.state import ITEMS, TrainState, from_items, restore_items, state_spec
from flmjax.training.stopping import Stopping
from flmjax.workdir.checkpoint import Checkpoints, DamagedCheckpointError
from flmjax.workdir.local_copy import fetch_data, store_data, working_copy
from flmjax.workdir.metrics import MetricsWriter, read_metrics
from flmjax.workdir.paths import (
    checkpoint_directory,
    data_directory,
    latest_whole_step,
    locked_workdir,
    origin_url,
    remove_certificates,
    stored_config,
    write_config,
)
from flmjax.workdir.position import Position, resumed_position
from flmjax.workdir.progress import ProgressBar
from flmjax.workdir.roll_backs import log_roll_backs, rolled_back_samples
from flmjax.workdir.shared import check_shared
from flmjax.workdir.starts import StartEntry


def train(config: RunConfig, workdir: Path, profile: range | None = None) -> None:
    """Run the schedule in `workdir` to its end, from the newest checkpoint there if it has one.

    Args:
        workdir: a folder, or a path of etils on object storage.
        profile: range(START, START + STEPS): a trace of the updates START + 1 to START + STEPS is written.

    Raises:
        ConfigError: for a setting, a source or a workdir that does not fit.
        CheckpointError: for a checkpoint that cannot be read or written.
        GrowthError: for a growth that does not keep its claim.
        TrainingError: after too many skipped updates in a row, or for a loss spike if the config says so.
        Stopped: after a signal or at the time limit; completed updates are saved.
        StorageError, LeaseLostError: for a workdir on object storage that cannot be written, or that another run has.
    """
    validate(config)
    if profile is not None:
        check_window(config, profile)
    meshes = stage_meshes(config)
    check_backends(config, jax.devices()[0].platform)
    with (
        Stopping(config.stop_after_seconds) as stopping,
        working_copy(workdir) as copy,
        locked_workdir(copy.folder),
        compile_cache(config, copy.folder),
        ProgressBar(config.total_steps) as bar,
    ):
        check_shared(copy.folder)
        session, damaged = Session(config, copy, meshes, bar, stopping, profile), dict[int, str]()
        while True:
            try:
                roll_back_message = attempt(session, damaged)
            except DamagedCheckpointError as error:
                if error.step in damaged:
                    raise
                damaged[error.step] = error.reason
                continue
            if roll_back_message is None:
                return
            bar.log(roll_back_message)
            damaged.clear()


def attempt(session: Session, damaged: Mapping[int, str]) -> str | None:
    """Train from the newest checkpoint that is not damaged.

    Args:
        damaged: steps whose checkpoints are passed over, with the reason for each; their folders are renamed once an
            older checkpoint is restored.

    Returns:
        None at the end of the run; a line about the roll-back if the run goes back to an older checkpoint.

    Raises:
        DamagedCheckpointError: for a further checkpoint that is damaged.
    """
    config, workdir, bar = session.config, session.copy.folder, session.bar
    with StartEntry(workdir) as entry:
        with bar.doing("loading"):
            stored = stored_config(workdir) if is_writer() else None
            position = resumed_position(workdir, damaged)
            check_continuation(workdir, position, config)
            step = position.step if position is not None else 0
            bar.resume(step)
        if step == config.total_steps and not are_lines_missing(config, workdir, step):
            bar.log(f"finished at step {step:,}, nothing left to do")
            return None
        doing = "loading the data" if is_prepared(config, workdir) else "preparing the data"
        with bar.doing(doing), entry.time.during("data preparation"), writer_first("data"):
            config, stream = open_stream(config, workdir, position)
        check_same_data(stream)
        entry.begin(step)
        claim = functools.partial(claim_workdir, session.config, stored, workdir)
        session = session._replace(config=config)
        try:
            spike = run_from(session, stream, damaged, entry, claim, position)
        except KeyboardInterrupt as error:
            saved = latest_whole_step(checkpoint_directory(workdir))
            on_disk = "no step is on disk yet" if saved is None else f"step {saved:,} is on disk"
            where = f"stopped at step {bar.step:,}; {on_disk}"
            raise (error.at(where) if isinstance(error, Stopped) else KeyboardInterrupt(where)) from None
        if spike is None:
            return None
        message = roll_back(spike, config, stream, 0 if position is None else position.first_sample, workdir)
        session.copy.upload()  # the record of the roll-back, before newer checkpoints are removed
        entry.continues = True
        return message


def run_from(
    session: Session,
    stream: TrainingStream,
    damaged: Mapping[int, str],
    entry: StartEntry,
    claim: Callable[[], None],
    position: Position | None,
) -> SpikeError | None:
    """Train from `position` to the end of the run, or to a spike after which the run goes back.

    Args:
        damaged, claim: as of `attempt` and of Run.

    Raises:
        DamagedCheckpointError: for the checkpoint at `position`.
    """
    workdir, step = session.copy.folder, position.step if position is not None else 0
    session.copy.upload()  # before files are removed: another run may have taken over a workdir on object storage
    with contextlib.ExitStack() as opened:
        checkpoints = opened.enter_context(Checkpoints.of_run(workdir, session.config, damaged))
        checkpoints.before_save = session.copy.upload
        # Before the metrics are cut back to the checkpoint: it may turn out to be damaged.
        with entry.time.during("restoring"):
            state = None if position is None else restored_state(session, checkpoints, position)
        finish_roll_back(workdir)
        checkpoints.reload()
        writer = opened.enter_context(MetricsWriter(workdir, step))
        if is_writer():
            remove_certificates(workdir, step)
        log_roll_backs(workdir, writer)
        run = Run(session, stream, checkpoints, writer, entry, claim, position, state)
        del state  # it is donated to the first update
        try:
            with session.stopping.deferred():
                run.run_schedule()
        except SpikeError as spike:  # of all processes; caught here, so that a save in progress is waited for
            return spike
    return None


def stage_meshes(config: RunConfig) -> list[jax.sharding.Mesh]:
    """The mesh of every stage on the devices of all processes.

    Raises:
        ConfigError: as validate_meshes, with the number of processes and the way to start others.
    """
    devices, processes = jax.device_count(), jax.process_count()
    try:
        shapes = validate_meshes(config, devices)
    except ConfigError as error:
        local = devices // processes
        wrong = [mesh for mesh in (stage.layout.mesh for stage in config.schedule) if not fills(mesh, devices)]
        if not wrong or stated_devices(wrong[0]) % local:
            raise
        needed = stated_devices(wrong[0]) // local
        raise ConfigError(
            f"{error}; or start {needed} process{'es' if needed > 1 else ''} with {local} device"
            f"{'s' if local > 1 else ''} each, not {processes}: 'launch/local.sh {needed} flmjax train ...' on one "
            "machine, the file that 'flmjax launch' writes on several"
        ) from None
    return [make_mesh(shape, jax.devices()) for shape in shapes]


def stated_devices(mesh: MeshConfig) -> int:
    """Devices that a mesh states; an fsdp that takes the remaining devices counts as 1."""
    return mesh.replica * (mesh.fsdp or 1) * mesh.tensor


def fills(mesh: MeshConfig, devices: int) -> bool:
    """Whether a mesh uses exactly these devices."""
    return devices % stated_devices(mesh) == 0 if mesh.fsdp is None else devices == stated_devices(mesh)


def claim_workdir(config: RunConfig, stored: RunConfig | None, workdir: Path) -> None:
    """Make the workdir that of `config`, unless the config stored there is the same."""
    if is_writer() and stored != config:
        write_config(config, workdir)


def restored_state(session: Session, checkpoints: Checkpoints, position: Position) -> TrainState:
    """The state at `position`, on the mesh of its stage; damaged checkpoints after it are set aside.

    Raises:
        DamagedCheckpointError, CheckpointError: as Checkpoints.restore.
    """
    stage = session.config.schedule[position.stage.index]
    spec = state_spec(stage.model, session.config.optimizer, session.meshes[stage.index])
    state = from_items(restore_items(checkpoints, position.step, position.stage.model, spec, ITEMS))
    for line in checkpoints.set_aside(position.step):
        session.bar.log(line)
    return state


def is_prepared(config: RunConfig, workdir: Path) -> bool:
    """Whether the run's token files exist."""
    return (data_directory(config, workdir) / META_FILE).exists()


def open_stream(config: RunConfig, workdir: Path, position: Position | None) -> tuple[RunConfig, TrainingStream]:
    """The config with the vocabulary of its data, and the training stream, checked to fill batches and validation.

    Data that this call prepared in the workdir and that are too small are removed: they would refuse the corrected
    command, which has other sources.
    """
    fetch_data(workdir)
    is_new = not is_prepared(config, workdir) and config.data.directory is None
    directory = data_directory(config, workdir)
    is_of_writer = (
        origin_url(workdir) is None and config.data.directory is None
    )  # else each host may have its own files
    is_trusted = is_of_writer and not is_writer()
    data = prepare(config.data, directory, mixtures=mixtures_of(config), progress=is_writer(), is_trusted=is_trusted)
    config = with_vocabulary(config, data)
    try:
        stream = TrainingStream.of_run(config, data, rolled_back_samples(workdir))
        for stage in config.schedule:
            stream.check_size(stage.config.batch_size)
        stream.validation_rows(1)
    except ConfigError:
        if is_new:
            discard(data.directory)
        raise
    store_data(workdir)
    if config.sample_tokens:
        prompt_ids(config.sample_prompt, data.tokenizer, config.model.max_length)  # refuses one that is too long
    return config, continued_stream(workdir, position, stream)


def check_same_data(stream: TrainingStream) -> None:
    """Refuse a process whose data are not those of process 0, as where data.directory is another folder on each host.

    Raises:
        ConfigError: naming the host and the folder.
    """
    if text_from_writer("fingerprint", stream.fingerprint) != stream.fingerprint:
        raise ConfigError(
            f"the data in {stream.prepared.directory} on {socket.gethostname()} are not those of process 0; copy that "
            "folder, or name one that all hosts share"
        )


def are_lines_missing(config: RunConfig, workdir: Path, step: int) -> bool:
    """Whether a stop came before the evaluation or the text sample of the stage that ended at `step`."""
    kinds = ["validation", "sample"] if config.sample_tokens else ["validation"]
    written = {(line["kind"], line["step"]) for line in read_metrics(workdir)} if is_writer() else set()
    return bool(from_writer(not all((kind, step) in written for kind in kinds)))
