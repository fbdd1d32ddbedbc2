"""The error of an invalid setting, and suggestions of near names."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """An invalid setting; the message names the field and a valid value. The command line exits with code 2."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """End of a message: `; did you mean a, b?` with the nearest names, or all choices if no name is near."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else f"; choices: {', '.join(choices)}"
