"""Every machine's config starts with that machine's attention: init, step, evaluation, sample and growth, in small."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import random_batch
from test_configs import load

from flmjax.config import GrowthConfig, OptimizerConfig, resize
from flmjax.data.batch import global_batch
from flmjax.evaluation.generate import generate
from flmjax.evaluation.validation_loss import jit_source_sums
from flmjax.growth.growth import Growth
from flmjax.model import attention
from flmjax.planning.topology import parse_topology
from flmjax.sharding.rules import batch_sharding
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import jit_growth, jit_train_step

CONFIGS = [
    ("flm_101b", "a800", "cuda"), ("flm_101b", "tpu_v5p", "tpu"), ("flm_101b", "tpu_v4", "tpu"),
    ("flm_101b", "tpu_v6e", "tpu"), ("flm_proxy", "", "cuda"), ("tele_flm_52b", "", "cuda"), ("eflm_16b", "", "cuda"),
]  # fmt: skip
# Sizes of a kernel for TPUs: heads of 128, sequences of a multiple of 128.
SMALL = {"num_layers": 2, "embed_dim": 256, "num_heads": 2, "num_kv_heads": None, "head_dim": 128, "mlp_dim": 256}


class CudnnCalledError(Exception):
    """cuDNN's kernel was called, which no CPU has."""


@pytest.fixture
def on_machine(monkeypatch):
    """Makes "fused" the backend of a machine with the platform "cuda" or "tpu"."""

    def cudnn(*_):
        raise CudnnCalledError

    def pretend(platform):
        of_machine = {"cuda": "gpu"}.get(platform, platform)
        choose = attention.choose
        monkeypatch.setattr(attention, "choose", lambda _, *rest: choose(of_machine, *rest))
        monkeypatch.setitem(attention.IMPLEMENTATIONS, "cudnn", cudnn)

    yield pretend
    jax.clear_caches()  # traced with another machine's backend


@pytest.mark.parametrize(("name", "argument", "platform"), CONFIGS)
def test_a_config_starts_on_its_machine(name, argument, platform, on_machine, one_device_mesh):
    """Parameters were initialised on 8 tokens with the configured attention, which no kernel for TPUs takes."""
    config = load(name, argument)
    assert config.mesh.topology is None or parse_topology(config.mesh.topology).platform == platform
    on_machine(platform)
    base = None if config.model.base_embed_dim is None else 128
    model = dataclasses.replace(config.model, **SMALL, vocab_size=257, max_length=128, base_embed_dim=base)
    spec = state_spec(model, OptimizerConfig(), one_device_mesh)
    state = init_state(spec, 0)
    batch = global_batch(random_batch(model, segments=config.data.document_attention), batch_sharding(one_device_mesh))
    sums_of = jit_source_sums(model, one_device_mesh, 1)
    sample = generate(state.params, model, [np.array([1, 2, 3])], 4, jax.random.key(0))  # a window of 7 tokens
    assert len(sample[0]) == 7
    new = resize(model, num_layers=3)
    grown_spec = state_spec(new, OptimizerConfig(), one_device_mesh)
    grown = jit_growth(spec, grown_spec, Growth(model, new, GrowthConfig()))(state, jax.random.key(0))
    assert jax.tree.map(np.shape, grown.params) == jax.tree.map(np.shape, grown_spec.abstract.params)
    step, grown_step = jit_train_step(spec, 1), jit_train_step(grown_spec, 1)
    if model.attention == "fused" and platform == "cuda":
        for program, abstract in ((step, spec.abstract), (grown_step, grown_spec.abstract)):
            with pytest.raises(CudnnCalledError):
                program.lower(abstract, batch, np.float32(0))
        with pytest.raises(CudnnCalledError):
            sums_of(state.params, batch, np.zeros(4, np.int32))
        return
    sums = sums_of(state.params, batch, np.zeros(4, np.int32))
    loss = sums["loss"][0] / sums["weight"][0]
    for program, before in ((step, state), (grown_step, grown)):
        _, metrics = program(before, batch, np.float32(1e-3))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-3)
