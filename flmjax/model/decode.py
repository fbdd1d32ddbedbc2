"""Text from a model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flmjax.config import ModelConfig
from flmjax.model.transformer import forward


def generate(
    params: Any, config: ModelConfig, prompt: np.ndarray, num_tokens: int, key: jax.Array, temperature: float = 0.8
) -> np.ndarray:
    """Continue `prompt` (P,) by up to `num_tokens` sampled tokens; the whole stays within max_length.

    Every token is one forward pass over the whole window: meant for a look at a model, not for serving it.

    Returns:
        ids (P + new,), the prompt included; padded ids have no probability.
    """
    prompt = np.asarray(prompt, np.int32)[: config.max_length - 1]
    length = min(config.max_length, len(prompt) + num_tokens)
    window = np.zeros((1, length), np.int32)
    window[0, : len(prompt)] = prompt
    return np.asarray(_generate(params, window, len(prompt), key, temperature, config))[0]


@functools.partial(jax.jit, static_argnames="config")
def _generate(
    params: Any, window_1L: jax.Array, start: jax.Array, key: jax.Array, temperature: jax.Array, config: ModelConfig
) -> jax.Array:
    def body(position: jax.Array, window_1L: jax.Array) -> jax.Array:
        logits_1LV = forward(params, config, window_1L)
        logits_V = logits_1LV[0, position - 1]
        token = jax.random.categorical(jax.random.fold_in(key, position), logits_V / temperature)
        return window_1L.at[0, position].set(token.astype(jnp.int32))

    return jax.lax.fori_loop(start, window_1L.shape[1], body, window_1L)
