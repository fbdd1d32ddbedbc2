"""Text for a terminal or a page: aligned columns, and printable characters."""

import math
import unicodedata
from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as lines whose columns are aligned, with two spaces between columns.

    Args:
        rows: all of the same number of cells; the heading is a row like the others.
        left: the number of leading columns that are flush left; the other columns are flush right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float) -> str:
    """`1.5 ms`, `1.5 s`, `2 min 30 s`, `1 h 15 min`."""
    if seconds < 120:
        return f"{1000 * seconds:.1f} ms" if 0 < seconds < 0.1 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    high, low = ((minutes, "min"), (seconds, "s")) if minutes < 60 else ((minutes // 60, "h"), (minutes % 60, "min"))
    return " ".join(f"{amount} {unit}" for amount, unit in (high, low) if amount)


def figure(value: float | None) -> str:
    """A number with at least three significant digits, `0.00123`, `12.0`, `12,345`; `-` for None and NaN."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def printable(text: str) -> str:
    """The text with U+FFFD for code points that no terminal or page may get: a byte-level model writes them."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Cn") else "\ufffd" for c in text)
