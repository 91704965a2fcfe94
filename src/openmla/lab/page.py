"""Pages: one self-contained HTML file, the same shape for every verb of the laboratory.

A page is a claim in its title, a lead, some tiles, and sections of text, figures and tables. Colours are CSS variables
for light and dark; the file loads nothing. Text between backticks is set as code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from openmla.core.errors import ConfigError

Tone = Literal["", "good", "bad"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than its text: a verdict in colour."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """Rows under a head. Columns listed in `left` are text; the others are numbers, aligned to the right."""

    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    left: Sequence[int] = (0,)
    is_folded: bool = False  # behind a line to click on, named by `label`


@dataclass(frozen=True)
class Figure:
    """An <svg> from `openmla.lab.plot` with what to see in it."""

    svg: str
    caption: str
    heading: str = ""
    is_wide: bool = False  # scrolls sideways on a phone


@dataclass(frozen=True)
class Tile:
    """A number and what it is."""

    number: str
    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, figures in pairs, tables."""

    heading: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """Everything that a page shows."""

    title: str
    lead: str
    sections: Sequence[Section]
    tiles: Sequence[Tile] = ()
    footer: Sequence[str] = field(default=())


def check_installed() -> None:
    """Raises ConfigError, with the command to install them, unless the packages that draw pages are there."""
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ConfigError(f'a page needs {", ".join(missing)}; run: pip install "openmla[lab]"')


def _coded(text: str) -> Any:
    """Escaped text with what stands between backticks as <code>."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _cell(value: str | Cell) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)


def render(page: Page) -> str:
    """The page as HTML."""
    check_installed()
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("openmla.lab", "templates"), autoescape=True, trim_blocks=True)
    environment.filters |= {"coded": _coded, "cell": _cell}
    return environment.get_template("page.html.j2").render(page=page)


def write(page: Page, path: Path) -> None:
    """Write the page. Raises ConfigError when the folder is not there or cannot be written."""
    content = render(page)
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the page to {path}: {error.strerror}; give another path with --out") from error


def duration(seconds: float) -> str:
    """Three digits and a unit: 812 us, 4.21 ms, 1.50 s."""
    unit, name = next((each for each in ((1.0, "s"), (1e-3, "ms")) if seconds >= each[0]), (1e-6, "us"))
    value = seconds / unit
    return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f} {name}"  # %g would write 999.7 as 1e+03


def number(value: float, digits: int = 3) -> str:
    """So many digits, from 1000 on whole numbers: 0.0289, 34.3, 2,440."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.{digits}g}"  # %g would write 999.7 as 1e+03


def amount(count: float, unit: str = "B") -> str:
    """Three digits with a binary prefix: 656 B, 4.5 MiB."""
    for step, prefix in ((2**40, "Ti"), (2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
        if count >= step:
            return f"{number(count / step)} {prefix}{unit}"
    return f"{count:.4g} {unit}"
