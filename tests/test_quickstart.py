"""The README's first command with nothing made smaller: three stages on real text."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flmjax.workdir.metrics import read_metrics

ROOT = Path(__file__).parents[1]
# Prints the largest resident memory of a command in KiB. From a process that is small itself: Linux counts what the
# process that starts a command holds at that moment, and a worker of the tests holds more than a quickstart does.
PEAK_MEMORY = """\
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
def test_quickstart_learns_more_than_gzip_and_grows_exactly(tmp_path):
    workdir = tmp_path / "quickstart"
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    start = time.monotonic()
    measured = [sys.executable, "-c", PEAK_MEMORY, str(ROOT / "launch" / "quickstart.sh"), str(workdir)]
    done = subprocess.run(measured, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=1500)
    seconds = time.monotonic() - start
    memory = int(done.stdout.splitlines()[-1]) / 2**20
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
