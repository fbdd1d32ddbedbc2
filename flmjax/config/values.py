"""Values of settings: ranges of numbers, which are the types of fields (`steps: PositiveInt`), tuples, and paths."""

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from flmjax.config.errors import ConfigError, shorten

INT32_MAX = 2**31 - 1  # steps, sizes and token ids are int32 on the devices
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
FLOAT32_TINY = 2.0**-126  # smallest normal number; a smaller one is 0 on the devices


class Range(NamedTuple):
    """Numbers that a field takes. NaN lies in no range.

    Attributes:
        low, high: bounds.
        open_low, open_high: whether the bound itself is left out.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def violation(self, value: float) -> str | None:
        """End of a message, such as `must be positive`; None if the range has the value."""
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        if above and below:
            return None
        if self.high not in (INT32_MAX, FLOAT32_MAX):
            brackets = "("[not self.open_low :] or "[", ")"[not self.open_high :] or "]"
            return f"must lie in {brackets[0]}{_digits(self.low)}, {_digits(self.high)}{brackets[1]}"
        if above:
            return f"must be at most {_digits(self.high)}"
        if self.low == 0:
            return "must not be negative"
        if self.low in (1, FLOAT32_TINY) and value <= 0:
            return "must be positive"
        return f"must be at least {_digits(self.low)}"


PositiveInt = Annotated[int, Range(1, INT32_MAX)]
NonNegativeInt = Annotated[int, Range(0, INT32_MAX)]
MIN_VOCAB_SIZE = 300  # least number of pieces that are trained
Count = Annotated[int, Range(0, 2**63 - 1)]  # of parameters; not computed with on the devices
Seed = Annotated[int, Range(0, 2**32 - 1)]  # of JAX's and of NumPy's generators
PositiveFloat = Annotated[float, Range(FLOAT32_TINY, FLOAT32_MAX)]
NonNegativeFloat = Annotated[float, Range(0, FLOAT32_MAX)]
Share = Annotated[float, Range(0, 1)]
# Decay of a moving average: the largest float32 below 1, because the bias correction divides by 1 - b^t.
Decay = Annotated[float, Range(0, 1 - 2**-24)]


def make_tuples(settings: object, *names: str) -> None:
    """Turn the lists in these fields, and single values, into tuples."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not isinstance(value, tuple):
            object.__setattr__(settings, name, tuple(value) if isinstance(value, list) else (value,))


def expand_home(value: Any) -> Any:
    """The home folder in place of `~` at the start of a path, also of every path of a tuple and of TEMPLATE:PATH."""
    if isinstance(value, tuple):
        return tuple(expand_home(item) for item in value)
    return ":".join(map(os.path.expanduser, value.split(":", 1))) if isinstance(value, str) else value


def local_path(text: str, name: str) -> Path:
    """The path `text` with the home folder in place of `~` or `~user`.

    Args:
        name: of the setting or the flag, for messages.

    Raises:
        ConfigError: for `~user` where no user has that name, a path with the character NUL, or a URL.
    """
    shown = f"{name}={shorten(text, str)}"
    if "\0" in text:
        raise ConfigError(f"{shown!r}: a path cannot have the character NUL")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ConfigError(f"{shown}: a URL; only the workdir of a run may be one, at gs:// or s3://; name a local path")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text.partition("/")[0]
        raise ConfigError(f"{shown}: there is no user {user[1:]}; a folder of that name is ./{user}")
    return Path(expanded)


def _digits(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:.8g}"
