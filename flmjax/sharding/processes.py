"""The processes of a run, one or several a host: their start, which of them writes, and how they agree.

Functions that agree are called by every process of the run, in the same order; one process alone answers at once.
"""

import contextlib
import ctypes
import functools
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import logging
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax._src.lib import _jax  # type: ignore[attr-defined]
from jax.experimental import multihost_utils

from flmjax.config import ConfigError, DistributedConfig
from flmjax.sharding.environment import (
    ADDRESS,
    coordinator,
    launcher_place,
    local_gpus,
    make_room_for_gloo,
    refuse_loopback,
    why_unreachable,
)
from flmjax.sharding.peers import Peers, end_at_once

# Words of errors of collectives and of the coordination service whose cause is another process.
_PEER_ERROR = re.compile(r"gloo|nccl|peer|unavailable|coordination|heartbeat|barrier|socket|deadline", re.IGNORECASE)

_peers: Peers | None = None
_kept: list[Any] = []  # functions that C calls


# ---- the start -------------------------------------------------------------------------------------------------------


class StartError(RuntimeError):
    """The processes of the run have not met; the message says which one waited for what."""


def start_processes(config: DistributedConfig) -> None:
    """Join the other processes of the run, if the environment says that there are some; before JAX sees a device.

    Raises:
        ConfigError: for variables that contradict each other, or a coordinator that other hosts cannot reach.
        StartError: if the processes have not met after config.start_timeout_seconds.
    """
    global _peers
    place = launcher_place()
    detected = _detected(config) if place is None or coordinator() is None else None
    if place is None:
        if detected is None:
            return
        address, processes, process, gpus = *detected, None
    else:
        address = coordinator() or (detected[0] if detected is not None else "")
        if not address:
            raise ConfigError(f"{place.launcher} names no address of process 0; set {ADDRESS} to HOST:PORT")
        processes, process, gpus = place.processes, place.process, local_gpus(place)
        refuse_loopback(address, place)
    if gpus is None:
        make_room_for_gloo()
    # JAX's own notifier takes SIGTERM away from the run (training/stopping.py).
    jax.config.update("jax_enable_preemption_service", False)
    connect = functools.partial(
        jax.distributed.initialize,
        address,
        processes,
        process,
        gpus,
        "deactivate",
        initialization_timeout=config.start_timeout_seconds + 60,  # _within is first: JAX ends the process by an abort
        heartbeat_timeout_seconds=2 * config.heartbeat_seconds,  # the peers notice it first, and say which one is lost
        shutdown_timeout_seconds=config.shutdown_seconds,
    )
    began = time.monotonic()
    with _abort_ends_with_a_line(process, processes):
        try:
            is_met = _within(config.start_timeout_seconds, connect)
        except (RuntimeError, ValueError) as error:
            if not _PEER_ERROR.search(str(error)):
                raise StartError(f"process {process} of {processes} cannot start: {error}") from error
            is_met = False
    if not is_met:
        waited = f"process {process} of {processes} waited {time.monotonic() - began:.0f} s for the others"
        reason = why_unreachable(address)
        if reason is None:
            reason = f"not all of them came to {address}; every process must start, with the same address"
        raise StartError(f"{waited}: {reason}")
    _peers = Peers(distributed.global_state.client, process, processes, address, config.heartbeat_seconds)


def _detected(config: DistributedConfig) -> tuple[str, int, int] | None:
    """Address of process 0, number of processes and this process, as JAX detects them; None for one process."""
    if "KUBERNETES_SERVICE_HOST" in os.environ and not {"JOB_COMPLETION_INDEX", "TPU_WORKER_ID"} & os.environ.keys():
        return None  # a pod of no indexed job: JAX would raise an error
    try:
        address, processes, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get(ADDRESS), None, None, None, None, config.start_timeout_seconds
        )
    except Exception as error:  # of a cloud's metadata server, which a notebook's machine may lack
        logging.warning("JAX cannot detect other processes, the run has one: %s", " ".join(str(error).split())[:300])
        return None
    if address is None or processes is None or process is None or processes < 2:
        return None
    return address, processes, process


def _within(seconds: float, call: Callable[[], None]) -> bool:
    """Whether a call ends in this time. It runs in a thread, so that an interrupt is answered at once."""
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)
        done.set()

    threading.Thread(target=run, daemon=True).start()
    is_done = done.wait(seconds)
    if errors:
        raise errors[0]
    return is_done


@contextlib.contextmanager
def _abort_ends_with_a_line(process: int, processes: int) -> Iterator[None]:
    """Let the client of JAX's coordination service that the block makes end this process by one line and status 1.

    By itself the client aborts the process when process 0 is lost. jaxlib's client takes a callback for this case, but
    jax.distributed.initialize does not pass one on, so the client's constructor is wrapped. jaxlib 0.10 fails to call
    Python with the error and still aborts; the handler of SIGABRT therefore does the same. It is a C handler, because
    Python's handlers wait for the main thread.
    """
    library: Any = _jax
    make = library.get_distributed_runtime_client

    def lose(*_: object) -> None:
        if _peers is None:
            end_at_once(f"process {process} of {processes}: another one was lost at the start", 1)
        _peers.end_without_store(is_abort=True)

    if threading.current_thread() is threading.main_thread():
        _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(lose))
        ctypes.CDLL(None).signal(signal.SIGABRT, _kept[-1])
    with mock.patch.object(
        library, "get_distributed_runtime_client", functools.partial(make, missed_heartbeat_callback=lose)
    ):
        yield


# ---- the end ---------------------------------------------------------------------------------------------------------


def is_not_first() -> bool:
    """Whether this process leaves the messages that all processes have to process 0."""
    return _peers is not None and _peers.process != 0


def end_processes() -> None:
    """Wait for the end of the other processes, and part from them."""
    if _peers is not None:
        _peers.close()
        try:
            jax.distributed.shutdown()
        except jax.errors.JaxRuntimeError:
            end_at_once(f"{_peers.name(_peers.process)}: another one was lost at the end of the run", 1)


def leave(error: BaseException, text: str, status: int) -> None:
    """End this process at once if it is one of several; do nothing in a run of one process.

    An end in order would wait for the others, for minutes or for ever.

    Args:
        error: the cause.
        text: a line for the user.
        status: exit status.
    """
    if isinstance(error, StartError):
        end_at_once(text, status)
    if _peers is None:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends within seconds, and says why
    if _is_of_peers(error):
        _peers.end_after_lost(text)
    _peers.leave(text, status, is_shared=status != 1)


def _is_of_peers(error: BaseException | None) -> bool:
    """Whether another process may be the cause of an error."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and _PEER_ERROR.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---- agreement -------------------------------------------------------------------------------------------------------


def run_peers() -> Peers | None:
    """The processes of the run, also of one that was not started here; None for one process."""
    global _peers
    if _peers is None and distributed.global_state.client is not None and jax.process_count() > 1:
        state, heartbeat = distributed.global_state, DistributedConfig().heartbeat_seconds
        address = state.coordinator_address or ""
        _peers = Peers(state.client, jax.process_index(), jax.process_count(), address, heartbeat)
    return _peers


def is_writer() -> bool:
    """Whether this process writes files: process 0 alone does."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has called the function with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def writer_first(name: str) -> Iterator[None]:
    """Let the process that writes run the block first, for hours if need be; then the others run it."""
    others = run_peers()
    key = "" if others is None else others.next_key(f"written/{name}")
    if others is not None and not is_writer():
        others.wait_for(key)
    yield
    if others is not None and is_writer():
        others.put(key)


def text_from_writer(name: str, text: str) -> str:
    """The text of the process that writes; that of the other processes is dropped.

    Args:
        name: of the text; all processes use a name in the same order.
    """
    others = run_peers()
    if others is None:
        return text
    key = others.next_key(f"text/{name}")
    if is_writer():
        others.put(key, text)
        return text
    return others.wait_for(key)[key]


def from_writer(value: int) -> int:
    """The value, below 2^31, of the process that writes; of the other processes it is dropped."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_process(flag: bool) -> bool:
    """Whether the flag is set in one of the processes."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))
