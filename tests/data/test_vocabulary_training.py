"""A vocabulary that is trained on text: on every line, with the same result each time, or one line why not."""

import re

import pytest
import sentencepiece
from test_tokenizers import CORPUS

from flmjax.config import ConfigError
from flmjax.data.tokenizers import SentencePieceTokenizer


def test_training_twice_gives_the_same_model_and_other_text_another():
    assert (
        SentencePieceTokenizer.train(CORPUS, 400).fingerprint == SentencePieceTokenizer.train(CORPUS, 400).fingerprint
    )
    assert (
        SentencePieceTokenizer.train(CORPUS[:30], 400).fingerprint
        != SentencePieceTokenizer.train(CORPUS, 400).fingerprint
    )


def test_keep_trains_on_a_part_spread_evenly():
    half = [line for i, text in enumerate(CORPUS) for line in text.split("\n")[:1] if i % 2]
    lines = [text.split("\n")[0] for text in CORPUS]  # one line a document; every second one is kept
    assert (
        SentencePieceTokenizer.train(lines, 320, keep=0.5).fingerprint
        == SentencePieceTokenizer.train(half, 320).fingerprint
    )


def test_a_vocabulary_too_large_names_the_largest_that_works():
    with pytest.raises(ConfigError, match=r"data\.vocab_size=4000 .*at most (\d+) pieces") as error:
        SentencePieceTokenizer.train(CORPUS, 4000)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert SentencePieceTokenizer.train(CORPUS, largest).vocab_size == largest


def test_a_vocabulary_too_small_names_what_the_characters_need():
    text = ["".join(chr(0x4E00 + i) for i in range(200))] * 3
    with pytest.raises(ConfigError, match=r"data\.vocab_size=300 is too small: .* need 458"):  # 258 + 200
        SentencePieceTokenizer.train(text, 300)


def test_no_text_is_one_line():
    with pytest.raises(ConfigError, match="no text to train"):
        SentencePieceTokenizer.train([], 300)


DIFFICULT = {
    "reserved by the trainer": ["\u2585 the cat {0}", "the cat \u2585 sat {0} \u2585", "\u2585\u2585"],
    "two thousand blank lines in front": ["\n" * 5000 + "the cat {0}"],
    "long": ["the cat sat {0} " * 1000, "\n" + "\U0001f600 {0}" * 5000],
    "tabs": ["\t", "a\tb {0}\t\t", "\tthe cat"],
    "controls": ["\0", "the \0 cat {0} \x01\x07\x7f\x1b"],
    "other line breaks": ["a {0}\r\nb\rc\x0bd\x0ce\x85f\u2028g\u2029h\r\n"],
    "the space sign": ["\u2581", "a\u2581b {0}\u2581"],
    "control pieces": ["</s><unk><s> {0} <0x41>"],
    "noncharacters": ["\ufffd {0} \uffff \U0010ffff \ufeff"],
}


@pytest.mark.parametrize("name", DIFFICULT)
def test_the_trainer_skips_no_line(name, monkeypatch, capfd):
    """google/sentencepiece#1052: a line with U+2585 was skipped in silence, and so is one above 4192 bytes."""
    given, train = [], sentencepiece.SentencePieceTrainer.train

    def loud(sentence_iterator, **options):
        given.extend(sentence_iterator)
        train(sentence_iterator=iter(given), **{**options, "minloglevel": 0})

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", loud)
    texts = [line.format(i) for i in range(30) for line in DIFFICULT[name]]
    SentencePieceTokenizer.train([*CORPUS, *texts], 400)
    log = capfd.readouterr().err
    loaded = int(re.search(r"Loaded all (\d+) sentences", log)[1])
    assert loaded == len([line for line in given if line.strip("\r\n")])
    assert not re.search(r"Skip|[Tt]oo long", log)
    given_text = "".join("".join(given).split())
    assert given_text == "".join("".join([*CORPUS, *texts]).replace("\u2585", "").split())


def test_words_beside_a_reserved_character_are_learned():
    """google/sentencepiece#1052: half of the lines held U+2585, and their words took three times the tokens."""
    marked = [text.replace("\n", " \u2585\n") for text in CORPUS]
    assert SentencePieceTokenizer.train(marked, 400).vocab_size == 400
    plain = SentencePieceTokenizer.train([text.replace("\n", " \n") for text in CORPUS], 400)
    assert SentencePieceTokenizer.train(marked, 400).fingerprint == plain.fingerprint


@pytest.mark.parametrize(("words", "lower"), [(1, ""), (300, "lower it, ")])
def test_a_size_that_is_too_large_has_a_cure_that_works(words, lower):
    """With less than 300 possible pieces, "lower it" led to another refusal."""
    text = [" ".join(f"{chr(97 + i % 26)}{i}x{i * i}" for i in range(words))]
    with pytest.raises(ConfigError) as refusal:
        SentencePieceTokenizer.train(text, 4000)
    pieces = int(re.search(r"at most (\d+) pieces", str(refusal.value))[1])
    assert (pieces >= 300) is bool(lower)
    cures = f"can be formed; {lower}add text{',' * bool(lower)} or set data.vocabulary='bytes'"
    assert str(refusal.value).endswith(cures)
