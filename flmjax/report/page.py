"""Pages for people, one HTML file each without scripts: templates, pictures, and the forms of numbers."""

import base64
import functools
import io
import math
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from flmjax.hardware import GiB
from flmjax.text_table import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render(template: str, **values: object) -> str:
    """The page that a file of report/templates makes of `values`.

    Every value is escaped for HTML, and code points that no page may hold are replaced.

    Raises:
        jinja2.UndefinedError: for a value that the template names and `values` lacks.
    """
    return _templates().get_template(template).render(values)


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("flmjax.report"),
        autoescape=True,
        finalize=_finalized,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalized(value: object) -> str:
    """Printable text of a template's value; markup stays as it is."""
    return value if isinstance(value, Markup) else printable(str(value))


def png(figure: "Figure") -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def base64_text(image: bytes) -> str:
    """A picture as a template's `data:` address takes it."""
    return base64.b64encode(image).decode()


def finite(value: object) -> float:
    """A number as a float; NaN for what is missing."""
    return float(value) if isinstance(value, int | float) else math.nan


def number(value: object, form: str = ".3f") -> str:
    """A number in the format `form`; a dash for what is missing."""
    return format(value, form) if math.isfinite(finite(value)) else "-"


def short(value: float, unit: str = "") -> str:
    """A large number in three digits: 1234567 -> 1.23 M. FLOP continue with G, T, P, E; counts with B, T."""
    if not math.isfinite(value):
        return "-"
    prefixes = ["", *("kMGTPEZY" if unit else "kMBT")]
    power = min(int(math.log10(max(abs(value), 1) * 1.00051) / 3), len(prefixes) - 1)  # 999,600 is 1 M, not 1e+03 k
    return f"{value / 1000**power:.3g} {prefixes[power]}{unit}".strip()


def gib(size: float) -> str:
    """A number of bytes in GiB."""
    return f"{size / GiB:.1f} GiB"
