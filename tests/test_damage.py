"""Errors of reading a checkpoint: which show damaged files, and which a machine or a store that cannot read now."""

import errno
import json

import aiohttp
import botocore.exceptions
import gcsfs.retry
import google.api_core.exceptions
import google.auth.exceptions
import jax
import pytest
import s3fs.errors

from flmjax.workdir.damage import is_damage


def store_error(module, **attributes):
    """An error of a class that is neither an OSError nor of an installed package."""
    return type("StoreError", (Exception,), {"__module__": module, **attributes})("no answer")


def client_error(status, code):
    """botocore's error of an answer of the store."""
    answer = {"Error": {"Code": code, "Message": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "GetObject")


NO_DAMAGE = [
    botocore.exceptions.ConnectionClosedError(endpoint_url="http://a"),
    botocore.exceptions.HTTPClientError(error="reset"),
    botocore.exceptions.CredentialRetrievalError(provider="iam-role", error_msg="no answer"),
    client_error(503, "SlowDown"),
    gcsfs.retry.HttpError({"code": 503, "message": "backend error"}),
    gcsfs.retry.ChecksumError(),
    google.auth.exceptions.RefreshError("the token has expired"),
    google.auth.exceptions.TransportError("no answer"),
    google.api_core.exceptions.ServiceUnavailable("backend error"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError("cut off"),
    *map(store_error, ["aiobotocore.response", "requests.exceptions", "urllib3.exceptions"]),
    MemoryError(),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    PermissionError(errno.EACCES, "Permission denied"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    TimeoutError("no answer"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 10 bytes"),
    jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo all-reduce failed: Connection closed by peer"),
    ValueError('PERMISSION_DENIED: Error opening "zarr" driver: Error reading local file "a"'),
    ValueError("No step path found: [Errno 116] Stale file handle: 'checkpoints/2'"),
    ValueError("UNKNOWN: Failed to open: \"a\": Input/output error [os_error_code='5']"),
    ExceptionGroup("of two threads", [ValueError("not found"), OSError(errno.EIO, "Input/output error")]),
    KeyboardInterrupt(),
]
DAMAGE = [
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
    NotADirectoryError(errno.ENOTDIR, "Not a directory"),
    ValueError("NOT_FOUND: Failed to open: \"a\": No such file or directory [os_error_code='2']"),
    ValueError("DATA_LOSS: CRC-32C checksum verification failed"),
    json.JSONDecodeError("Expecting value", "", 0),
    KeyError("params"),
    Exception("cannot decode"),
    client_error(404, "NoSuchKey"),
    client_error(404, "404"),
    s3fs.errors.translate_boto_error(client_error(404, "NoSuchKey")),
    gcsfs.retry.HttpError({"code": 404, "message": "absent"}),
    google.api_core.exceptions.NotFound("absent"),
    store_error("aiohttp.client_exceptions", status=404),
]


@pytest.mark.parametrize("error", NO_DAMAGE, ids=repr)
def test_an_error_of_the_machine_is_no_damage(error):
    assert not is_damage(error)
    outer = RuntimeError("restoring failed")
    outer.__cause__ = error
    assert not is_damage(outer)


@pytest.mark.parametrize("error", DAMAGE, ids=repr)
def test_an_error_of_the_files_is_damage(error):
    outer = RuntimeError("restoring failed")
    outer.__cause__ = error
    assert is_damage(error)
    assert is_damage(outer)
