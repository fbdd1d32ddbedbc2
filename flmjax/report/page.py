"""Pieces of the pages that people read: one file each, no scripts."""

import base64
import html
import io
import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png(figure: "Figure") -> bytes:
    """The picture, as a file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #22303c; background: #fff; }
body { max-width: 1180px; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; } figure { margin: 0 0 1rem; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; } img { width: 100%; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: 0.75rem; margin: 1rem 0; }
dl div, pre { background: #f3f6f9; border-radius: 8px; padding: 0.75rem 1rem; } dd { margin: 0; }
dd b { font-size: 1.35rem; } dt, .small, figcaption { font-size: 0.85rem; color: #55636f; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; white-space: pre; }
th, td { padding: 0.35rem 0.55rem; border-bottom: 1px solid #e1e6ea; text-align: right; } th { color: #55636f; }
th:first-child, td:first-child { text-align: left; } .good, .bad { color: #1b7a3d; font-weight: 600; }
.bad { color: #b3261e; } pre { margin: 0.25rem 0; white-space: pre-wrap; unicode-bidi: isolate; font-size: 0.85rem; }
"""


def page(title: str, body: str) -> str:
    """A whole page that needs no other file."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def picture(wide: bytes, narrow: bytes, words: str) -> str:
    """Two PNGs of the same, for a desk and for a phone."""
    images = [base64.b64encode(image).decode() for image in (wide, narrow)]
    return f"""<picture>
<source media="(max-width: 700px)" srcset="data:image/png;base64,{images[1]}">
<img alt="{escaped(words)}"
 src="data:image/png;base64,{images[0]}">
</picture>"""


def tiles(rows: Sequence[tuple[str, str, str]]) -> str:
    """Boxes of (label, value, note)."""
    boxes = (
        f'<div><dt>{escaped(label)}</dt><dd><b>{escaped(value)}</b></dd><dd class="small">{escaped(note)}</dd></div>'
        for label, value, note in rows
    )
    return f"<dl>{''.join(boxes)}</dl>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], tints: Sequence[str] = ()) -> str:
    """Escaped cells; ticks and crosses are coloured, and `tints` fill the first column."""
    lines = ["".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head)]
    for i, row in enumerate(rows):
        tint = f' style="background: {tints[i % len(tints)]}"' if tints else ""
        marks = [{"✓": ' class="good"', "✗": ' class="bad"'}.get(cell[:1], "") for cell in row[1:]]
        lines.append("".join(f"<td{m}>{escaped(cell)}</td>" for m, cell in zip([tint, *marks], row, strict=True)))
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def escaped(text: str) -> str:
    """Escaped for HTML; code points that no page may hold (a byte-level model writes them) are replaced."""
    plain = (c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Cn") else "\ufffd" for c in str(text))
    return html.escape("".join(plain))


def finite(value: Any) -> float:
    """NaN for what is missing."""
    return float(value) if isinstance(value, int | float) else math.nan


def number(value: Any, form: str = ".3f") -> str:
    """`value` in `form`; a dash for what is missing."""
    return format(value, form) if math.isfinite(finite(value)) else "-"


def short(value: float, unit: str = "") -> str:
    """1234567 -> 1.23 M. FLOP go on with G, T, P, E; counts with B, T."""
    if not math.isfinite(value):
        return "-"
    prefixes = ["", *("kMGTPEZY" if unit else "kMBT")]
    power = min(int(math.log10(max(abs(value), 1) * 1.00051) / 3), len(prefixes) - 1)  # 999,600 is 1 M, not 1e+03 k
    return f"{value / 1000**power:.3g} {prefixes[power]}{unit}".strip()


def duration(seconds: float) -> str:
    """In seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
