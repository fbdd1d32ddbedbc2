"""Text for a terminal or a page: aligned columns, and printable characters."""

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
    """`1.5 s`, or below a tenth of a second `1.5 ms`."""
    return f"{1000 * seconds:.1f} ms" if 0 < seconds < 0.1 else f"{seconds:,.1f} s"


def printable(text: str) -> str:
    """The text with U+FFFD for code points that no terminal or page may get: a byte-level model writes them."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Cn") else "\ufffd" for c in text)
