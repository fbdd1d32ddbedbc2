"""The last step of a preparation: parts become token files, which are described by their sizes and checksums."""

import contextlib
import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from flmjax.data.encode import Encoder, Part
from flmjax.data.prepared import CORRECTIONS, sha256
from flmjax.data.spool import Spool

GZIP_BYTES = 16 << 20  # gzip is measured on at most this much held-out text of each source


def seal(parts: list[Part], encoder: Encoder, stem: Path, is_teacher: bool, files: dict[str, Any]) -> tuple[int, int]:
    """Join the parts of a split to its token files and describe these in `files`.

    Returns:
        The number of tokens, and that of the documents that do not decode to their text.
    """
    kinds = {"u32": "<u4", "offsets.u64": "<u8", CORRECTIONS: "<i8", **({"weights.u8": "u1"} if is_teacher else {})}
    paths = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in kinds}
    hashes = {kind: hashlib.sha256() for kind in kinds}
    total = changed = 0
    with contextlib.ExitStack() as stack:
        opened = {kind: stack.enter_context(path.open("wb")) for kind, path in paths.items()}

        def write(kind: str, array: np.ndarray) -> None:
            raw = array.astype(kinds[kind]).tobytes()
            opened[kind].write(raw)
            hashes[kind].update(raw)

        for part in parts:
            columns = encoder.read(part)
            ends = total + np.cumsum(columns["lengths"])
            write("u32", columns["tokens"])
            write(CORRECTIONS, columns["corrections"] + np.array([total, 0]))
            changed += int(columns["changed"])
            write("offsets.u64", np.concatenate([[total], ends[:-1]]))
            if is_teacher:
                write("weights.u8", columns["weights"])
            total = int(ends[-1])
        write("offsets.u64", np.array([total]))
    if not paths[CORRECTIONS].stat().st_size:
        paths.pop(CORRECTIONS).unlink()
    for kind, path in paths.items():
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hashes[kind].hexdigest()}
    return total, changed


def gzip_bits_per_byte(spools: Iterable[Spool]) -> float | None:
    """Compression of the held-out text of all spools together by gzip -9; None without text."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: with gzip's header and trailer
    compressed = total = 0
    for spool in spools:
        size = 0
        for text in spool.splits["validation"].read():
            raw = text.encode()
            size += len(raw)
            compressed += len(compressor.compress(raw))
            if size >= GZIP_BYTES:
                break
        total += size
    return 8 * (compressed + len(compressor.flush())) / total if total else None


def describe_file(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, as meta.json has them."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
