"""Eight devices on the CPU, a compile cache between runs, small models."""

import logging
import os
import signal
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from quick_xla import QUICK_XLA

# A shell without job control starts what it puts in the background with Ctrl-C ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK_XLA}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "flmjax-test-compile-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import dataclasses

import jax
import numpy as np
import pytest

from flmjax.config import MeshShape, ModelConfig, OptimizerConfig
from flmjax.model.transformer import init_params
from flmjax.sharding.mesh import make_mesh
from flmjax.training.state import state_spec
from flmjax.training.step import jit_train_step

TINY = ModelConfig(
    num_layers=2, embed_dim=32, num_heads=4, head_dim=8, mlp_dim=48, vocab_size=61, max_length=16, dtype="float32"
)


def pytest_collection_modifyitems(items):
    """Whole runs first: one worker takes minutes for them while the other does the rest."""
    items.sort(key=lambda item: item.path.name != "test_run.py")


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture(scope="session")
def one_device_mesh():
    return make_mesh(MeshShape(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="session")
def tiny_spec(one_device_mesh):
    """StateSpec of TINY on one device."""
    return state_spec(TINY, OptimizerConfig(), one_device_mesh)


@pytest.fixture(scope="session")
def tiny_step(tiny_spec):
    """The jitted training step of `tiny_spec`, without accumulation."""
    return jit_train_step(tiny_spec, 1)


@pytest.fixture(scope="session")
def own_environment() -> dict[str, str]:
    """Environment variables of a subprocess with the platform's defaults, without the eight devices of this process."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: x for name, x in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The bucket s3://runs of a server in this process, for this process and its children."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with mock.patch.dict(os.environ, names):
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/runs", method="PUT"), timeout=30).close()
        yield "s3://runs"
    server.stop()


@pytest.fixture
def url(s3, request, tmp_path, monkeypatch) -> str:
    """URL of a workdir that no other test has; its local copies are in tmp_path, and a lease is waited for briefly."""
    from flmjax.workdir import lease

    monkeypatch.setenv("FLMJAX_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.05)
    return f"{s3}/{request.node.name.partition('[')[0]}"


@pytest.fixture(scope="session")
def compilers(own_environment) -> dict[str, str]:
    """For a process that has the compilers for GPUs and TPUs, and cuDNN: `pip install --no-deps --target DIR libtpu
    jax-cuda12-plugin jax-cuda12-pjrt nvidia-cudnn-cu12`, in the versions of launch/constraints.txt, and
    FLMJAX_COMPILERS=DIR.

    They are not in the environment itself, where JAX would look for their devices. In CI they must be there.
    """
    folder = os.environ.get("FLMJAX_COMPILERS")
    if folder is None:
        assert os.environ.get("CI") != "true", "CI has no compilers: FLMJAX_COMPILERS is not set"
        pytest.skip("FLMJAX_COMPILERS is not set: tests/conftest.py says what it is")
    return {**own_environment, "PYTHONPATH": os.pathsep.join([own_environment["PYTHONPATH"], folder])}


def random_params(config: ModelConfig, seed: int = 0, spread: float = 0.15):
    """Parameters with nothing trivial in them: no bias is 0, no gain is 1."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + spread * rng.standard_normal(x.shape).astype(np.float32), params)


def random_batch(config: ModelConfig, rows: int = 4, seed: int = 0, segments: bool = False) -> dict[str, np.ndarray]:
    """Random tokens; weights of 0 and 1 unevenly over the rows; with `segments` two documents in every row."""
    rng = np.random.default_rng(seed)
    shape = (rows, config.max_length)
    batch = {
        "tokens": rng.integers(0, config.vocab_size, shape).astype(np.int32),
        "targets": rng.integers(0, config.vocab_size, shape).astype(np.int32),
        "weights": (rng.random(shape) < np.linspace(0.2, 1.0, rows)[:, None]).astype(np.float32),
        "bytes": np.ones(rows, np.float32),
    }
    if segments:
        border = rng.integers(1, config.max_length, (rows, 1))
        place = np.arange(config.max_length)[None]
        batch["segment_ids"] = (1 + (place >= border)).astype(np.int32)
        batch["positions"] = np.where(place >= border, place - border, place).astype(np.int32)
    return batch


def with_fields(config, **fields):
    return dataclasses.replace(config, **fields)
