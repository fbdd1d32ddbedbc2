"""Sampling of text from a model."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flmjax.config import ConfigError, ModelConfig
from flmjax.data.tokenizers import Tokenizer
from flmjax.model.attention import with_plain_attention
from flmjax.model.transformer import forward
from flmjax.sharding.axes import Params


def prompt_ids(text: str, tokenizer: Tokenizer, max_length: int) -> np.ndarray:
    """Ids (P,) of a prompt, at least one: a prompt without any token is the end token, after which a text begins.

    Raises:
        ConfigError: for a prompt that is no Unicode text, or that leaves no place for a token within max_length.
    """
    try:
        ids = tokenizer.encode(text)
    except UnicodeEncodeError:
        raise ConfigError(f"sample_prompt={text!r} holds half of a surrogate pair, which is no text") from None
    if len(ids) >= max_length:
        raise ConfigError(
            f"sample_prompt has {len(ids)} tokens, which leaves no place for a sample in "
            f"model.max_length={max_length}; shorten it, or set sample_tokens=0"
        )
    return ids if len(ids) else np.array([tokenizer.end_id], np.uint32)


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[np.ndarray],
    num_tokens: int,
    key: jax.Array,
    temperature: float = 0.8,
) -> list[np.ndarray]:
    """Continue each prompt by up to `num_tokens` tokens, as far as max_length allows.

    The continuation of a prompt does not depend on the other prompts: sequences are padded on the right, and attention
    is causal. Each token takes a forward pass over the full window; this is meant for inspection, not for serving.

    Args:
        params: float32 parameters.
        prompts: ids (P,) of each prompt, at least one (prompt_ids); cut to max_length - 1.
        key: key of the sampling; a token's draw depends on the key and the token's position.
        temperature: divisor of the logits; 0 takes the most probable token.

    Returns:
        ids (P + new,) of each sequence, prompt included. Padded ids are never sampled.
    """
    cut = [np.asarray(prompt, np.int32)[: config.max_length - 1] for prompt in prompts]
    starts = np.array([len(prompt) for prompt in cut], np.int32)
    ends = np.minimum(starts.astype(np.int64) + num_tokens, config.max_length)  # num_tokens may be any int32
    window_BL = np.zeros((len(cut), int(ends.max(initial=1))), np.int32)
    for row, prompt in zip(window_BL, cut, strict=True):
        row[: len(prompt)] = prompt
    new_tokens = int((ends - starts).max(initial=0))
    plain = with_plain_attention(config)  # a fused kernel refuses most windows
    filled_BL = np.asarray(_generate(params, window_BL, starts, new_tokens, key, temperature, plain))
    return [row[:end] for row, end in zip(filled_BL, ends, strict=True)]


@functools.partial(jax.jit, static_argnames="config")
def _generate(
    params: Params,
    window_BL: jax.Array,
    starts_B: jax.Array,
    num_tokens: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    config: ModelConfig,
) -> jax.Array:
    rows_B = jnp.arange(window_BL.shape[0])

    def body(i: jax.Array, window_BL: jax.Array) -> jax.Array:
        places_B = starts_B + i
        logits_BV = forward(params, config, window_BL)[rows_B, places_B - 1]
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, places_B)
        sampled_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV / jnp.maximum(temperature, 1e-6))
        token_B = jnp.where(temperature > 0, sampled_B, jnp.argmax(logits_BV, axis=-1))
        return window_BL.at[rows_B, places_B].set(
            token_B.astype(jnp.int32), mode="drop"
        )  # positions past the end are dropped

    return jax.lax.fori_loop(0, num_tokens, body, window_BL)
