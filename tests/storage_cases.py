"""Objects of a workdir on object storage, as another process writes them."""

import json
from typing import Any

import tensorstore

from flmjax.lock import Owner
from flmjax.workdir.lease import LEASE_FILE
from flmjax.workdir.storage import tensorstore_spec

SILENT = lambda _: None


def store_of(url: str) -> tensorstore.KvStore:
    """The objects below `url`, by their path from there."""
    return tensorstore.KvStore.open(tensorstore_spec(f"{url}/")).result()


def write_lease(url: str, host: str, pid: int, start: str | None, expires: float, **fields: Any) -> None:
    """Write the lease of another run.

    Args:
        fields: further fields of the owner.
    """
    owner = {**Owner(host, pid, start, "2026-01-01 00:00:00")._asdict(), **fields}
    value = json.dumps({"owner": owner, "token": "other", "expires": expires})
    store_of(url).write(LEASE_FILE, value.encode()).result()
