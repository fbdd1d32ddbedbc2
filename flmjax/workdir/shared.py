"""Whether all hosts of a run see the same workdir."""

import os
import socket
import time
import uuid
from pathlib import Path

from flmjax.config import ConfigError
from flmjax.disk import writing
from flmjax.sharding.processes import is_writer, run_peers
from flmjax.workdir.paths import origin_url

WAIT_SECONDS = 10  # a network file system shows a new file to other hosts after some seconds
POLL_SECONDS = 0.2


def check_shared(workdir: Path) -> None:
    """Refuse a workdir that is another folder on some hosts of the run; each process calls it once.

    Process 0 writes a file with a new name, and the others look for it. Every host has a local copy of its own of a
    workdir on object storage.

    Raises:
        ConfigError: in process 0, naming the hosts; the others wait, and end with it.
    """
    peers = run_peers()
    if peers is None or origin_url(workdir) is not None:
        return
    key = peers.next_key("workdir")
    if not is_writer():
        name = peers.wait_for(key)[key]
        peers.put(f"{key}/sees/{peers.process}", "" if _appears(workdir, name) else socket.gethostname())
        peers.wait_for(f"{key}/is_shared")
        return
    token = workdir / f".seen-{uuid.uuid4().hex}"
    with writing(token):
        token.touch()
    try:
        peers.put(key, token.name)
        answers = [f"{key}/sees/{process}" for process in range(1, peers.processes)]
        entries = peers.wait_for(*answers)
    finally:
        token.unlink(missing_ok=True)
    hosts = [f"{entries[answer]} (process {process})" for process, answer in enumerate(answers, 1) if entries[answer]]
    if hosts:
        raise ConfigError(
            f"{workdir} is not the same folder on all hosts: what {socket.gethostname()} writes there is not seen by "
            f"{', '.join(hosts)}; name a folder of a file system that all hosts share"
        )
    peers.put(f"{key}/is_shared")


def _appears(folder: Path, name: str) -> bool:
    """Whether a file appears in a folder."""
    until = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            if name in os.listdir(folder):  # a list is read anew; the absence of a name may be remembered
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(POLL_SECONDS)
