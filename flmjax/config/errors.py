"""The error of a setting, and the names that its message suggests."""

import difflib
from collections.abc import Callable, Iterable

# Fields of older versions, and their names now.
RENAMED_FIELDS = {
    "learning_rate": "rate_policy",  # of a growth; a stage has a learning_rate
    "weights": "mixture_weights",
    "max_nonfinite_updates": "max_skipped_updates",
}


class ConfigError(ValueError):
    """An invalid setting; the message names the field and a valid value. The command line exits with code 2."""


def did_you_mean(word: str, choices: Iterable[str], count: int = 3) -> str:
    """End of a message: `; did you mean a, b?` with at most `count` names near `word`; "" if no name is near."""
    names = {choice.lower(): choice for choice in sorted(choices)}
    close = difflib.get_close_matches(word.lower(), names, n=count, cutoff=0.5)
    return f"; did you mean {', '.join(names[name] for name in close)}?" if close else ""


def nearest(word: str, choices: Iterable[str]) -> str:
    """End of a message: the new name of a renamed field, else the nearest names, else all choices."""
    choices = sorted(choices)
    if RENAMED_FIELDS.get(word) in choices:
        return f"; it is called {RENAMED_FIELDS[word]} now"
    return did_you_mean(word, choices) or f"; choices: {', '.join(choices)}"


def shorten(value: object, show: Callable[[object], str] = repr, length: int = 100) -> str:
    """A value as it stands in a message: about `length` characters at most; its type if it cannot be shown."""
    try:
        text = show(value)
    except Exception:  # an integer of more than 4,300 digits, or a class with a faulty __repr__
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= length else f"{text[:length]}..."
