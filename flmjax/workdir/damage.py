"""Whether an error of reading a checkpoint shows damaged files, or a machine that cannot read them now.

A run goes on from an older checkpoint where the newest is damaged. An error that the next start may not see, such as a
lack of memory or of permission, a file system that does not answer or a process that is lost, shows no damage.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import jax

# The names of files are part of a checkpoint: one that is absent, or another kind of file, is damage.
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
OF_THE_MACHINE = (MemoryError, jax.errors.JaxRuntimeError)
# Packages through which object storage is read. Few of their errors are OSErrors: those of a lost connection, of a
# server and of credentials have classes of their own.
STORES = frozenset({"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "urllib3"})
NOT_FOUND = 404  # HTTP status of an absent object
# TensorStore raises ValueError and RuntimeError that begin with a code and have the error of the operating system:
# `UNKNOWN: Error opening "zarr" driver: [...] Failed to open: "x": Input/output error [os_error_code='5']`.
CODES = re.compile(
    r"\b(ABORTED|CANCELLED|DEADLINE_EXCEEDED|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE)\b"
)
# Orbax, too, puts the errors of the operating system into the text of others. 2, 20 and 21 are ABSENT.
SYSTEM = re.compile(r"(?:os_error_code='|\[Errno )(?!(?:2|20|21)\b)\d+")


def is_damage(error: BaseException) -> bool:
    """Whether an error shows that files of a checkpoint are damaged or absent."""
    return not any(_is_of_the_machine(cause) for cause in _causes(error))


def _is_of_the_machine(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, ABSENT)
    if isinstance(error, OF_THE_MACHINE) or not isinstance(error, Exception):
        return True
    if type(error).__module__.partition(".")[0] in STORES:
        return _http_status(error) != NOT_FOUND  # s3fs raises its FileNotFoundError from botocore's ClientError
    text = str(error)
    return bool(CODES.search(text) or SYSTEM.search(text))


def _http_status(error: BaseException) -> int | None:
    """HTTP status of a store's answer; None for an error without an answer, as where the connection is lost."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:  # aiohttp; gcsfs and google.api_core; requests
        status = getattr(error, "status", None) or getattr(error, "code", None)
        status = status or getattr(response, "status_code", None)
    return int(status) if str(status).isdigit() else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, the errors that it was raised from, and the members of groups of errors."""
    waiting, seen = [error], set[int]()
    while waiting:
        cause = waiting.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        members = cause.exceptions if isinstance(cause, BaseExceptionGroup) else ()
        waiting += [x for x in (cause.__cause__, cause.__context__, *members) if x is not None]


def digest(meta: dict[str, Any]) -> str:
    """SHA-256 of the metadata of a checkpoint without their digest: JSON does not notice a changed digit."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(json.loads(json.dumps(rest)), sort_keys=True).encode()).hexdigest()
