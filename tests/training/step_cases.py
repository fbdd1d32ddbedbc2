"""Batches with teachers, the plain formula of the loss, and readers of a step's state and of its log line."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from conftest import TINY, random_batch

from flmjax.config import RunConfig, StageConfig
from flmjax.data.batch import global_batch
from flmjax.model.transformer import forward
from flmjax.optimizer.adam import AdamState
from flmjax.sharding.rules import batch_sharding
from flmjax.training.pending import Fetched
from flmjax.training.run_metrics import RunMetrics
from flmjax.training.spikes import LossWatch
from flmjax.workdir.metrics import MetricsWriter, read_metrics


def adam(state):
    """Adam's moments and count in a training state."""
    return next(s for s in state.opt_state if isinstance(s, AdamState)).adam


PREFIX, TRUE, FALSE = 5, 7, 9  # a proposition ends in 5 7 or 5 9
TEACHER_WEIGHT = 0.25


def mixed_batch(rows=8, teachers=(1, 3, 4, 7), config=TINY):
    """Random batch whose rows `teachers` hold five propositions each, and one decisive place of weight 0.

    A proposition ends in PREFIX TRUE or PREFIX FALSE; the place of weight 0 must not be counted.
    """
    batch, rng = random_batch(config, rows=rows), np.random.default_rng(1)
    batch["marks"] = np.zeros((rows, 2), np.int32)
    batch["decisive"] = np.zeros((rows, config.max_length), np.float32)
    for row in teachers:
        batch["marks"][row] = TRUE, FALSE
        batch["weights"][row] = 0
        for end in (3, 6, 9, 12, 15):
            batch["targets"][row, end - 1 : end + 1] = PREFIX, rng.choice((TRUE, FALSE))
            batch["weights"][row, end - 1 : end + 1] = TEACHER_WEIGHT
            batch["decisive"][row, end] = 1
        batch["targets"][row, 0], batch["decisive"][row, 0] = TRUE, 1
        batch["bytes"][row] = 0
    return batch


def plain_nll(params, batch, config=TINY):
    """Cross-entropy (B, L) of every target, from the logits (B, L, V) at once."""
    log_probs = jax.nn.log_softmax(forward(params, config, batch["tokens"]))
    return -jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]


def on_mesh(batch, mesh):
    """A host batch placed on the mesh as the training loop places it."""
    return global_batch(batch, batch_sharding(mesh))


def log_train(workdir, spec, metrics):
    """Lines of metrics.jsonl after the training loop has logged one step."""
    config = RunConfig(model=TINY, stages=(StageConfig(name="a", steps=10),), log_every=1, peak_flops=1.0)
    bar = SimpleNamespace(update=lambda *_: None)
    with MetricsWriter(workdir, 0) as writer:
        heartbeat = SimpleNamespace(note=lambda **_: None)
        run_metrics = RunMetrics(config, writer, bar, heartbeat, {}, LossWatch.of_run(config, None))
        clock = SimpleNamespace(tick=lambda finished: None, rate=lambda tokens: 1.0)
        run_metrics.log(Fetched(1, jax.device_get(metrics), 0.0), config.schedule[0], spec, clock)
    return read_metrics(workdir)
