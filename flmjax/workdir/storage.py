"""Object storage: a workdir at gs://BUCKET/FOLDER or s3://BUCKET/FOLDER, with one object for each file.

A URL is a path of etils, which has the methods of pathlib.Path that read. Stores are reached through fsspec, with the
credentials and the endpoint of the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AWS_REGION, or those that gcloud
sets up). A store has no folders and no renaming: an object is there with its whole content or not at all.
"""

import contextlib
import functools
import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from flmjax.config import ConfigError
from flmjax.config.values import local_path

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # fsspec's package for each scheme of a URL
PREFIXES = tuple(f"{scheme}://" for scheme in PACKAGES)
COMMIT_FILE = "commit_success.txt"  # last object that Orbax writes of a checkpoint on object storage
SMALL_BYTES = 64 << 20  # a smaller file is read whole and stored by one request; larger ones are stored in parts


class StorageError(OSError):
    """An error of a store while a run works; the message names the URL."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the URL of a folder or an object on object storage."""
    return os.fspath(path).startswith(PREFIXES)


def run_path(text: str, name: str) -> Path:
    """The folder of a run, local or on object storage.

    Args:
        name: name of the setting or the flag, for messages.

    Raises:
        ConfigError: for a URL of another scheme or without a bucket, and as local_path.
    """
    if not is_url(text):
        return local_path(text, name)
    scheme, _, rest = text.partition("://")
    if not rest.partition("/")[0]:
        raise ConfigError(f"{name}={text} names no bucket; write {scheme}://BUCKET/FOLDER")
    if not rest.partition("/")[2].strip("/"):
        raise ConfigError(f"{name}={text} is a whole bucket; write {text.rstrip('/')}/FOLDER")
    return remote_path(text)


def resolved(path: Path) -> Path:
    """The path of a run's folder without links; a URL as it is."""
    return path if is_url(path) else path.resolve()


def remote_path(url: str) -> Path:
    """The URL as a path of etils; raises as file_system."""
    from etils import epath
    from etils.epath import gpath

    _on_store(url)  # etils takes the file system that is set up there
    os.environ["EPATH_USE_TF"] = "false"  # TensorFlow, where it is installed, knows no s3://
    gpath._is_tf_installed.cache_clear()  # its answer is older where local paths were used before
    return cast(Path, epath.Path(url.rstrip("/")))


@functools.cache
def file_system(scheme: str) -> Any:
    """The file system of fsspec for a scheme, without a cache of listings: other processes write too.

    Raises:
        ConfigError: if its package is missing.
    """
    try:
        import fsspec

        importlib.import_module(PACKAGES[scheme])
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs pip install 'flmjax[storage]': {error}") from error
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    return fsspec.filesystem(scheme)


def _on_store(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path BUCKET/OBJECT in it."""
    scheme, _, path = url.partition("://")
    return file_system(scheme), path


def connect(url: str) -> None:
    """Check that the bucket of `url` exists and can be read.

    Raises:
        ConfigError: in one line that names the URL, for a package, a bucket, credentials or a server that is missing.
    """
    files, path = _on_store(url)
    bucket = path.partition("/")[0]
    try:
        with access(url):
            # Listing the folder needs no right to list the bucket; an absent folder and an absent bucket look alike.
            if not files.exists(path) and not files.exists(bucket):
                raise ConfigError(f"{url}: there is no bucket {bucket}, or it is not yours to read")
    except StorageError as error:
        raise ConfigError(str(error)) from error


@contextlib.contextmanager
def access(url: str) -> Iterator[None]:
    """Name the URL in an error of its store.

    Raises:
        StorageError: in one line.
    """
    try:
        yield
    except (ConfigError, StorageError):
        raise
    except Exception as error:  # fsspec's packages raise errors of aiohttp, botocore and google.auth
        text = " ".join(str(error).split())[:300] or type(error).__name__
        if "credentials" in f"{type(error).__name__} {text}".lower():
            text = f"no credentials ({text})"
        raise StorageError(f"{url}: {text}") from error


def list_objects(url: str, without: tuple[str, ...] = ()) -> dict[str, int]:
    """Sizes in bytes of the objects below `url`, by their path from there; {} if there is none.

    Args:
        without: names of folders of `url` that are not listed.
    """
    files, root = _on_store(url)
    sizes: dict[str, int] = {}
    with access(url):
        try:
            entries = files.ls(root, detail=True)
        except FileNotFoundError:
            return {}
        for entry in entries:
            name = entry["name"].removeprefix(f"{root}/")
            if entry["type"] != "directory":
                sizes[name] = entry["size"]
            elif name not in without:
                below = files.find(entry["name"], detail=True)
                sizes |= {path.removeprefix(f"{root}/"): info["size"] for path, info in below.items()}
    return {name: size for name, size in sizes.items() if name and not name.endswith("/")}


def read_object(url: str) -> bytes | None:
    """The content of an object; None if it does not exist."""
    files, path = _on_store(url)
    with access(url):
        try:
            return files.cat_file(path)
        except FileNotFoundError:
            return None


def upload(file: Path, url: str) -> None:
    """Store a file as an object. A file that grows is stored as far as it goes now.

    Raises:
        FileNotFoundError: for an absent file.
        StorageError: for a store that does not answer.
    """
    files, path = _on_store(url)
    content = file.read_bytes() if file.stat().st_size < SMALL_BYTES else None
    with access(url):
        if content is not None:
            files.pipe_file(path, content)
        else:
            files.put_file(str(file), path)


def download(url: str, file: Path) -> bool:
    """Write the content of an object to a file; a kill leaves no partial one.

    Returns:
        Whether the object exists.
    """
    files, path = _on_store(url)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.tmp")
    with access(url):
        try:
            files.get_file(path, str(partial))
        except FileNotFoundError:
            partial.unlink(missing_ok=True)
            return False
    partial.replace(file)
    return True


def remove_object(url: str) -> None:
    """Remove an object, which may be absent."""
    files, path = _on_store(url)
    with access(url), contextlib.suppress(FileNotFoundError):
        files.rm_file(path)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all files, local or on a store; a removal that is cut off leaves no complete checkpoint."""
    if not is_url(folder):
        shutil.rmtree(folder)
        return
    remove_object(str(folder / COMMIT_FILE))
    files, path = _on_store(str(folder))
    with access(str(folder)), contextlib.suppress(FileNotFoundError):
        files.rm(path, recursive=True)


def move_tree(folder: Path, target: Path) -> None:
    """Rename a folder; on a store its objects are copied there and removed, which a kill may cut off between two."""
    if not is_url(folder):
        folder.rename(target)
        return
    files, path = _on_store(str(folder))
    with access(str(folder)):
        files.copy(path, _on_store(str(target))[1], recursive=True)
    remove_tree(folder)


def tensorstore_spec(url: str) -> dict[str, Any]:
    """The key-value store of TensorStore at `url`, a folder.

    Its driver of S3 does not take the endpoint from the environment, and would look for files with credentials, of
    which it complains, where the environment has them.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    spec: dict[str, Any] = {"driver": "gcs" if scheme == "gs" else scheme, "bucket": bucket, "path": path}
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if endpoint:
            spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
        elif region:
            spec["aws_region"] = region
        if "AWS_ACCESS_KEY_ID" in os.environ:
            spec["aws_credentials"] = {"type": "environment"}
    return spec
