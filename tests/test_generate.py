"""Samples of text: their prompts, and how they continue."""

import io

import jax
import numpy as np
import pytest
import sentencepiece
from conftest import TINY, random_params, with_fields

from flmjax.config import ConfigError
from flmjax.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
from flmjax.evaluation.generate import generate, prompt_ids
from flmjax.model.transformer import forward

WITH_BYTES = with_fields(TINY, vocab_size=257)


def stripping_model() -> bytes:
    """A SentencePiece model that strips white space, so that a prompt of spaces has no token."""
    model = io.BytesIO()
    lines = iter([f"the cat sat on mat {i}" for i in range(50)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=40, model_type="bpe", minloglevel=3
    )
    return model.getvalue()


@pytest.mark.parametrize("text", ["", "\u3000", " "])
def test_a_prompt_without_tokens_is_the_end_token(text):
    """google-deepmind/gemma#488: an empty prompt continued id 0, or the padding."""
    tokenizer = SentencePieceTokenizer(stripping_model())
    assert prompt_ids(text, tokenizer, 16).tolist() == [tokenizer.end_id]
    assert prompt_ids("", ByteTokenizer(), 16).tolist() == [256]


def test_a_sample_of_an_empty_prompt_follows_the_end_token():
    prompt, params = prompt_ids("", ByteTokenizer(), 16), random_params(WITH_BYTES)
    ids = generate(params, WITH_BYTES, [prompt], 3, jax.random.key(0), 0.0)[0]
    assert ids[0] == 256
    assert ids[1] == np.argmax(forward(params, WITH_BYTES, np.array([[256]]))[0, 0])


def test_a_prompt_that_leaves_no_place_is_refused():
    assert len(prompt_ids("a" * 15, ByteTokenizer(), 16)) == 15
    with pytest.raises(ConfigError, match=r"sample_prompt has 16 tokens, .*max_length=16; shorten it"):
        prompt_ids("a" * 16, ByteTokenizer(), 16)
    with pytest.raises(ConfigError, match=r"sample_prompt='a\\udc80' holds half of a surrogate pair"):
        prompt_ids("a\udc80", ByteTokenizer(), 16)


@pytest.mark.timeout(60)
def test_more_tokens_than_there_is_place_for_take_no_longer():
    """Sampling went on after the end of the window, and 2^31 - 1 tokens made that end a negative number."""
    key, params = jax.random.key(0), random_params(WITH_BYTES)
    window = generate(params, WITH_BYTES, [np.array([1])], WITH_BYTES.max_length, key)[0]
    assert len(window) == WITH_BYTES.max_length
    np.testing.assert_array_equal(generate(params, WITH_BYTES, [np.array([1])], 2**31 - 1, key)[0], window)


def test_prompts_continue_in_a_batch_as_they_do_alone():
    """Padding must not change how a short prompt continues: huggingface/transformers#26137."""
    config = with_fields(TINY, max_length=32)
    params = random_params(config)
    prompts = [np.arange(n, dtype=np.int32) * 7 % config.vocab_size for n in (3, 9, 17)]
    key = jax.random.key(0)
    for temperature in (0.0, 0.8):
        batched = generate(params, config, prompts, 20, key, temperature)
        alone = [generate(params, config, [prompt], 20, key, temperature)[0] for prompt in prompts]
        assert [len(ids) for ids in batched] == [23, 29, 32]  # 37 would not fit
        for prompt, one, other in zip(prompts, batched, alone, strict=True):
            np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(one[: len(prompt)], prompt)
    greedy = generate(params, config, prompts, 20, key, 0.0)[0]
    logits = forward(params, config, greedy[None])[0]
    np.testing.assert_array_equal(np.argmax(logits[2:-1], axis=-1), greedy[3:])
