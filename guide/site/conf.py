"""Sphinx settings of the guide. `build.py` writes the pages and calls Sphinx once per language."""

import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.search.zh import SearchChinese

project = "OpenMLA"
author = "The OpenMLA authors"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "misc.highlighting_failure"]  # matters of taste in pages that are not the guide's
html_theme = "furo"
html_title = "OpenMLA"
html_static_path = ["_static"]
html_extra_path = ["extra"]  # pages that the laboratory wrote
html_css_files = ["guide.css"]
templates_path = ["_templates"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
html_permalinks = False
pygments_style, pygments_dark_style = "friendly", "github-dark"
html_math_renderer = "mathml"
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "languages.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}


class Bigrams(SearchChinese):
    """Chinese words without a dictionary: every pair of characters, and the runs between punctuation.

    The search page looks a query of two characters up as it is and a longer one as a part of a run, so both are found.
    """

    language_name = "English"  # of the stemmer's class in JavaScript; Chinese words are not stemmed

    def split(self, input: str) -> list[str]:
        """Terms of a text."""
        runs = re.findall(r"[\u4e00-\u9fff]+", input)
        return super().split(input) + runs + [run[i : i + 2] for run in runs for i in range(len(run) - 1)]


def _inline(writer, node):
    writer.body.append(convert(node.astext()))
    raise SkipNode


def _block(writer, node):
    writer.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app):
    """Formulas as MathML, which browsers draw by themselves: no script, no fonts, nothing to load."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.add_search_language(Bigrams)
