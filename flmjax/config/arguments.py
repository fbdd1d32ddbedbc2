"""The argument of a config file, `--config=FILE:WORD,WORD`: words separated by commas, in any order."""

from collections.abc import Iterable

from flmjax.config.errors import ConfigError, did_you_mean


def choose_words(argument: str, **choices: Iterable[str]) -> dict[str, str | None]:
    """The word of each kind in a config argument.

    Args:
        argument: words separated by commas; "" for none.
        choices: for each kind of word (machine, stage, operator, ...) the words that a config file knows.

    Returns:
        For each kind the word in `argument`; None if it has no word of that kind.

    Raises:
        ConfigError: for an unknown word (with the nearest word and the list of all) or two words of one kind.

    >>> choose_words("16b,a800", machine=("a800", "tpu_v4"), stage=("16b", "51b"), operator=("zero", "mask"))
    {'machine': 'a800', 'stage': '16b', 'operator': None}
    """
    kind_of = {word: kind for kind, words in choices.items() for word in words}
    chosen: dict[str, str | None] = dict.fromkeys(choices)
    for word in (word.strip() for word in argument.split(",")) if argument else ():
        if word not in kind_of:
            raise ConfigError(
                f"config argument: unknown word '{word}'{did_you_mean(word, kind_of, 1)}; {_list(choices)}"
            )
        kind = kind_of[word]
        if chosen[kind] is not None:
            raise ConfigError(f"config argument: '{chosen[kind]}' and '{word}' are both words for the {kind}; take one")
        chosen[kind] = word
    return chosen


def _list(choices: dict[str, Iterable[str]]) -> str:
    if not choices:
        return "this config takes no argument"
    return "; ".join(f"{kind}: {', '.join(words)}" for kind, words in choices.items())
