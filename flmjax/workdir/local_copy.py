"""The local copy of a workdir on object storage: the folder in which a run with such a --workdir works.

The process that writes stores what has changed in the copy: before every checkpoint begins, so that a checkpoint is
never newer than the metrics up to it, every UPLOAD_SECONDS in a thread, and at the end. Checkpoints do not pass through
the copy: every process writes its share of them to the store. Prepared data are stored once, and fetched by every host.
The copy stays when the run has ended; the store is what counts, and the next start renews the copy from it.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from flmjax.config import ConfigError
from flmjax.disk import writing
from flmjax.lock import SHOW, Log, locked
from flmjax.sharding.processes import barrier, from_writer, is_writer
from flmjax.workdir.lease import LEASE_FILE, Lease, leased
from flmjax.workdir.paths import CONFIG_FILE, ORIGIN_FILE, origin_url
from flmjax.workdir.storage import (
    StorageError,
    connect,
    download,
    is_url,
    list_objects,
    read_object,
    remove_object,
    upload,
)

SCRATCH = "FLMJAX_SCRATCH"  # environment variable that names the folder of the local copies
UPLOAD_SECONDS = 15.0
NOT_COPIED = ("checkpoints", "data")  # folders of the workdir that the copy of a working run leaves out
NOT_READ = ("checkpoints", "compile_cache", "profile", "tensorboard")  # folders that a reading copy leaves out
DATA_META = "data/meta.json"  # stored last: without it the data are not complete
DATA_ORIGIN = ".data.sha256"  # SHA-256 of data/meta.json when the store had the same data
VERIFIED_FILE = "data/verified.json"  # names files by their inodes on this host, so it is not stored
TOKEN_FILES = (".u32", ".u64", ".u8", ".i64")  # endings of the files of prepared data that training alone reads


class WorkingCopy:
    """The folder in which a run works: its workdir, or the local copy of a workdir on object storage.

    Args:
        folder: folder of the run on this machine.
        url: URL of the workdir on object storage; None: the workdir is local, and nothing is stored.
        lease: lease of the workdir in the process that writes; None in the others.
    """

    def __init__(self, folder: Path, url: str | None = None, lease: Lease | None = None) -> None:
        self.folder = folder
        self._url, self._lease = url, lease
        # Size and time of every file as it was stored or fetched; None: the copy is not complete yet.
        self._stored: dict[str, tuple[int, int]] | None = None
        self._mutex, self._stop = threading.Lock(), threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._upload_until_closed, daemon=True)

    def open(self, session: int) -> None:
        """Replace the copy by the files of the store; processes of one host share it.

        Args:
            session: number of this start, the same in all processes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        assert self._url is not None
        with locked(self.folder / ".copy.lock", str(self.folder), wait=True):
            origin = self.folder / ORIGIN_FILE
            this_start = json.dumps({"url": self._url, "session": session})
            if not origin.exists() or origin.read_text(encoding="utf-8") != this_start:
                for name in _files(self.folder):
                    (self.folder / name).unlink()
                for name in list_objects(self._url, without=NOT_COPIED):
                    if name != LEASE_FILE:  # one that the writer has removed since is left out
                        download(f"{self._url}/{name}", self.folder / name)
                with writing(origin):
                    origin.write_text(this_start, encoding="utf-8")
        fetch_data(self.folder)
        if self._lease is not None:
            self._stored = _files(self.folder)
            self._thread.start()

    def upload(self) -> None:
        """Store the files that have changed, and remove those that are gone, if this process writes an open copy.

        Raises:
            StorageError: for a store that does not answer, now or in the thread.
            LeaseLostError: if another run is at work in the workdir.
        """
        if self._lease is None or self._stored is None:
            return
        self._lease.confirm()
        with self._mutex:
            error, self._error = self._error, None
            files = _files(self.folder)
            for name in sorted(files, key=lambda name: name == CONFIG_FILE):  # the others are there when it is
                stamp = files[name]
                if self._stored.get(name) != stamp:
                    with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                        upload(self.folder / name, f"{self._url}/{name}")
                        self._stored[name] = stamp
            for name in self._stored.keys() - files.keys():
                remove_object(f"{self._url}/{name}")
                del self._stored[name]
        if error is not None and not isinstance(error, StorageError):  # a store that answers again is no error
            raise error

    def close(self) -> None:
        """Store what has changed, and end the thread; raises as `upload`."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self.upload()

    def _upload_until_closed(self) -> None:
        while not self._stop.wait(UPLOAD_SECONDS):
            try:
                self.upload()
            except Exception as error:  # raised by the next call of the main thread
                self._error = error


@contextlib.contextmanager
def working_copy(workdir: Path, log: Log = SHOW) -> Iterator[WorkingCopy]:
    """The folder in which a run works in `workdir` until the block ends; on object storage it is leased and copied.

    Args:
        workdir: a folder, or a path of etils.
        log: prints a line.

    Raises:
        ConfigError: for a store that cannot be used, a workdir in use (with the owner) or a local copy (with its URL).
        StorageError, LeaseLostError: as WorkingCopy.upload.
    """
    url = origin_url(workdir)
    if url is None:
        yield WorkingCopy(workdir)
        return
    if not is_url(workdir):  # its checkpoints are on the store, of which this run would have no lease
        raise ConfigError(f"{workdir} is the local copy of {url}; name --workdir={url}")
    connect(url)
    folder = copy_folder(url)
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(leased(url, log)) if is_writer() else None
        session = from_writer(random.SystemRandom().getrandbits(30))
        copy = WorkingCopy(folder, url, lease)
        with _named_by_url(url, folder):
            try:
                if lease is not None:
                    copy.open(session)
                barrier("the writer has copied the workdir")
                if lease is None:
                    copy.open(session)
                yield copy
            except BaseException:
                try:
                    copy.close()
                except Exception as error:  # the error of the block is raised
                    reason = " ".join(str(error).split())
                    log(f"warning: {url}: what changed since the last save is not stored: {reason}")
                raise
            copy.close()


@contextlib.contextmanager
def reading_copy(workdir: Path) -> Iterator[Path]:
    """A folder with the small files of the run in `workdir`, which is only read; a local workdir is this folder.

    Token files and the folders NOT_READ are not fetched. Checkpoints are read from the store. A file that the run
    removes meanwhile is left out.

    Raises:
        ConfigError: for a store that cannot be used.
        StorageError: for a store that does not answer.
    """
    if not is_url(workdir):
        yield workdir
        return
    url = str(workdir)
    connect(url)
    with tempfile.TemporaryDirectory(prefix="flmjax-") as parent:
        folder = Path(parent) / workdir.name
        folder.mkdir()
        with _named_by_url(url, folder):
            for name in list_objects(url, without=NOT_READ):
                if name != LEASE_FILE and not name.endswith(TOKEN_FILES):
                    download(f"{url}/{name}", folder / name)
            (folder / ORIGIN_FILE).write_text(json.dumps({"url": url}), encoding="utf-8")
            yield folder


def copy_folder(url: str) -> Path:
    """The folder of the local copy: the same at every start on this machine."""
    parent = os.environ.get(SCRATCH) or Path(tempfile.gettempdir()) / f"flmjax-{os.getuid()}"
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return Path(parent).expanduser().absolute() / f"{url.rpartition('/')[2]}-{digest}"


# ---- prepared data ---------------------------------------------------------------------------------------------------


def fetch_data(folder: Path) -> None:
    """Make the data in the local copy those of the store; nothing for a local workdir.

    Without data on the store, data that were there once are removed: their run was deleted. Data of this start that are
    not stored yet stay. Files of the same data that are there with their size are kept: their checksums are compared
    when the data are opened.

    Raises:
        StorageError: for a store that does not answer.
    """
    url = origin_url(folder)
    if url is None:
        return
    noted = _noted_digest(folder)  # before the store is read: another process may store data in this moment
    meta = read_object(f"{url}/{DATA_META}")
    with locked(folder / ".copy.lock", str(folder), wait=True):
        target = folder / "data"
        local_digest = _digest((folder / DATA_META).read_bytes()) if (folder / DATA_META).exists() else None
        if meta is None:
            if local_digest is not None and local_digest == noted:
                shutil.rmtree(target)
            return
        digest = _digest(meta)
        if local_digest not in (None, digest):
            shutil.rmtree(target)  # of another run at this URL
        partial = folder / f".data.fetched-{digest[:12]}"
        for other in folder.glob(".data.fetched*"):
            if other != partial:
                shutil.rmtree(other)
        place = target if target.exists() else partial
        sizes = {name: size for name, size in list_objects(f"{url}/data").items() if f"data/{name}" != VERIFIED_FILE}
        for name, size in sorted(sizes.items(), key=lambda item: f"data/{item[0]}" == DATA_META):
            path = place / name
            if (not path.exists() or path.stat().st_size != size) and not download(f"{url}/data/{name}", path):
                raise StorageError(f"{url}/data/{name}: removed while the data were fetched")
        if place == partial:
            partial.replace(target)
        _note_stored(folder, meta)


def store_data(folder: Path) -> None:
    """Store the prepared data of the run, once, if this process writes; nothing for a local workdir."""
    url = origin_url(folder)
    if url is None or not is_writer() or not (folder / DATA_META).exists():
        return
    meta = (folder / DATA_META).read_bytes()
    if read_object(f"{url}/{DATA_META}") != meta:
        names = [str(path.relative_to(folder)) for path in (folder / "data").rglob("*") if path.is_file()]
        for name in sorted(names, key=lambda name: name == DATA_META):
            if name != VERIFIED_FILE:
                upload(folder / name, f"{url}/{name}")
    _note_stored(folder, meta)


def _note_stored(folder: Path, meta: bytes) -> None:
    """Note that the store has the data with this meta.json."""
    with writing(folder / DATA_ORIGIN):
        (folder / DATA_ORIGIN).write_text(_digest(meta), encoding="ascii")


def _noted_digest(folder: Path) -> str | None:
    """Digest of the data that the store had when this copy was last compared with it; None: it has never had data."""
    try:
        return (folder / DATA_ORIGIN).read_text(encoding="ascii")
    except FileNotFoundError:
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the files of a copy that are stored, by their path in it: not hidden and temporary ones."""
    files = {}
    for parent, folders, names in os.walk(folder):
        relative = Path(parent).relative_to(folder)
        folders[:] = [name for name in folders if not name.startswith(".") and str(relative / name) not in NOT_COPIED]
        for name in names:
            if not name.startswith(".") and not name.endswith(".tmp"):
                with contextlib.suppress(FileNotFoundError):  # replaced in this moment
                    stat = (Path(parent) / name).stat()
                    files[str(relative / name)] = (stat.st_size, stat.st_mtime_ns)
    return files


@contextlib.contextmanager
def _named_by_url(url: str, folder: Path) -> Iterator[None]:
    """Name the workdir by its URL, not by its local copy, in an error of the block."""
    try:
        yield
    except Exception as error:
        error.args = tuple(arg.replace(str(folder), url) if isinstance(arg, str) else arg for arg in error.args)
        raise
