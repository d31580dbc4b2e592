"""The HTML templates: one environment, everything escaped, nothing loaded from elsewhere."""

import math
from base64 import b64encode
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


@cache
def page(name: str) -> Template:
    """Return a template of this package.

    Raises:
        jinja2.TemplateNotFound: There is none of that name.
    """
    return _environment().get_template(name)


def data_uri(content: bytes, kind: str) -> str:
    """Return a picture as an address that holds it.

    Args:
        content: The encoded picture.
        kind: Of it, such as ``png``.
    """
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


def ramp(colours: list[str]) -> str:
    """Return a CSS background that goes through colours from left to right."""
    return f"linear-gradient(90deg,{','.join(colours)})"


def css_colour(rgb: tuple[int, int, int], opacity: float = 1.0) -> str:
    """Return a colour, 0 to 255 each, as CSS."""
    red, green, blue = rgb
    return f"rgb({red} {green} {blue} / {opacity:.2f})"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("apps.imaging.outputs"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["digits"] = _digits
    return environment


def _digits(value: float | None, digits: int) -> str:
    """Return a number with so many digits after the point, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    text = f"{value:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else f"{0.0:.{digits}f}"
