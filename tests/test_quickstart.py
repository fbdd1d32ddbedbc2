"""The README's first command with nothing made smaller: three stages on real text."""

import json
import os
import resource
import subprocess
import time
from pathlib import Path

import pytest

from flmjax.workdir.metrics import read_metrics

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_quickstart_learns_more_than_gzip_and_grows_exactly(tmp_path):
    workdir = tmp_path / "quickstart"
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    start = time.monotonic()
    subprocess.run([ROOT / "launch" / "quickstart.sh", workdir], env=environment, check=True, timeout=1500)
    seconds = time.monotonic() - start
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    last = [line for line in read_metrics(workdir) if line["kind"] == "validation"][-1]
    gzip = json.loads((workdir / "data" / "meta.json").read_text())["validation_gzip_bits_per_byte"]
    print(f"quickstart: {seconds:.0f} s, {memory:.2f} GiB, {last['bits_per_byte']:.3f} bits a byte, gzip -9 {gzip:.3f}")
    assert memory < 2.0
    assert last["bits_per_byte"] < 0.9 * gzip
    certificates = [json.loads(path.read_text()) for path in sorted((workdir / "certificates").iterdir())]
    assert len(certificates) == 2
    for certificate in certificates:
        assert certificate["max_difference"]["float32"] <= 1e-4
        assert certificate["max_difference"]["float64"] <= 1e-10
    assert (workdir / "report.html").stat().st_size > 10_000
