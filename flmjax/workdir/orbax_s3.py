"""Checkpoints on s3://: what Orbax has for gs:// alone, extended to S3.

Orbax writes JSON files through etils, which knows s3://, and arrays through TensorStore, which has a driver for it. In
between Orbax asks whether a path is one of Google's: it then ends a checkpoint by the object commit_success.txt instead
of renaming folders, which a store cannot, and opens TensorStore's driver for gs://. The prefixes of such paths and the
functions that build the driver's description are replaced, in one place; another version of Orbax that lacks them is
refused here, and not by a checkpoint that cannot be read.
"""

from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from flmjax.workdir.storage import tensorstore_spec

REPLACED = (
    (gcs_utils, "_GCS_PATH_PREFIX"),
    (gcs_utils, "get_kvstore_for_gcs"),
    (tensorstore_utils, "_use_gcs_driver"),
    (tensorstore_utils, "_normalize_path"),
)
S3 = "s3://"


def support_s3() -> None:
    """Let Orbax save to and restore from s3:// URLs in this process.

    Raises:
        RuntimeError: for a version of Orbax that is built otherwise.
    """
    missing = [name for module, name in REPLACED if not hasattr(module, name)]
    if missing:
        raise RuntimeError(f"this version of orbax-checkpoint cannot save to {S3}: it has no {', '.join(missing)}")
    gcs: Any = gcs_utils
    arrays: Any = tensorstore_utils
    if S3 in gcs._GCS_PATH_PREFIX:
        return
    of_gs, uses_driver, normalized = gcs.get_kvstore_for_gcs, arrays._use_gcs_driver, arrays._normalize_path

    def get_kvstore(path: str) -> dict[str, Any]:
        return tensorstore_spec(str(path)) if str(path).startswith(S3) else of_gs(path)

    def normalize_path(path: str) -> str:
        return normalized(path).replace("s3:/", S3, 1) if path.startswith(S3) else normalized(path)

    gcs._GCS_PATH_PREFIX = (*gcs._GCS_PATH_PREFIX, S3)
    gcs.get_kvstore_for_gcs = get_kvstore
    arrays._use_gcs_driver = lambda directory: directory.startswith(S3) or uses_driver(directory)
    arrays._normalize_path = normalize_path
