"""Translations: one PO file per page and language, keyed by the English paragraph.

A paragraph is what stands between blank lines; code, formulas and directives are not translated. The key is the English
text itself, so a paragraph that changes loses its translation, and the build fails until somebody has looked at it.

    python guide/site/translations.py            # what is missing; exit code 1 if anything is
    python guide/site/translations.py --update   # write new paragraphs into the PO files, drop those that are gone
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po

from cells import read

GUIDE = Path(__file__).resolve().parents[1]
LANGUAGES = ("zh_CN",)

# a fence, a display formula, an HTML comment, or text up to a blank line
_BLOCK = re.compile(r"```.*?^```[^\n]*|\$\$.*?\$\$|[^\n]+(?:\n(?!```|\$\$)[^\n]+)*", re.MULTILINE | re.DOTALL)
_WORD = re.compile(r"[A-Za-z]{2}")


def sources() -> list[Path]:
    """Pages that are translated: the landing page and the chapters."""
    return [GUIDE / "index.md", *sorted(GUIDE.glob("[0-9][0-9]_*.py"))]


def texts(page: Path) -> list[str]:
    """What a page says: its Markdown, cell by cell, and the captions of its figures."""
    if page.suffix == ".md":
        return [page.read_text(encoding="utf-8")]
    return [text for cell in read(page) for text in ([cell.text] if cell.kind == "markdown" else _captions(cell.text))]


def _captions(code: str) -> list[str]:
    """Every `caption="..."` of a code cell."""
    given = [
        each.value for each in ast.walk(ast.parse(code)) if isinstance(each, ast.keyword) and each.arg == "caption"
    ]
    return [str(ast.literal_eval(each)) for each in given]


def paragraphs(markdown: str) -> Iterator[str]:
    """The paragraphs to translate."""
    for block in _BLOCK.findall(markdown):
        if not block.startswith(("```", "$$")) and _WORD.search(block):
            yield block


def path_of(page: Path, language: str) -> Path:
    """The PO file of a page."""
    return GUIDE / "locale" / language / f"{page.stem}.po"


def load(page: Path, language: str) -> Catalog | None:
    """The translations of a page; None where nobody has begun, and the page is shown in English."""
    path = path_of(page, language)
    if not path.exists():
        return None
    with path.open("rb") as file:
        return read_po(file, locale=language)


def missing(page: Path, language: str) -> list[str]:
    """Paragraphs of a begun page without a translation, and translations of paragraphs that are gone."""
    catalog = load(page, language)
    if catalog is None:
        return []
    wanted = {each for text in texts(page) for each in paragraphs(text)}
    found = {message.id: message for message in catalog if message.id}
    absent = [each for each in wanted if each not in found or not found[each].string or found[each].fuzzy]
    gone = [str(each) for each in found if each not in wanted]
    return [f"not translated: {each[:80]!r}" for each in absent] + [
        f"translates nothing: {each[:80]!r}" for each in gone
    ]


def translator(catalog: Catalog) -> Callable[[str], str]:
    """Markdown in, Markdown out, paragraph by paragraph."""

    def one(match: re.Match[str]) -> str:
        message = catalog.get(match[0])
        return str(message.string) if message is not None and message.string else match[0]

    return lambda markdown: _BLOCK.sub(one, markdown)


def update(page: Path, language: str) -> None:
    """Bring a PO file up to date: old translations stay, new paragraphs come in empty, in the order of the page."""
    old, new = load(page, language), Catalog(locale=language, project="OpenMLA guide", fuzzy=False)
    for text in texts(page):
        for each in paragraphs(text):
            known = old.get(each) if old is not None else None
            new.add(each, known.string if known is not None else "")
    if old is not None and _pairs(old) == _pairs(new):
        return  # the header carries a date, which is no reason to touch the file
    path_of(page, language).parent.mkdir(parents=True, exist_ok=True)
    with path_of(page, language).open("wb") as file:
        write_po(file, new, width=0, omit_header=False, ignore_obsolete=True)


def _pairs(catalog: Catalog) -> list[tuple[object, object]]:
    return [(message.id, message.string) for message in catalog if message.id]


def main() -> int:
    """Check, or update, every begun page of every language (or the pages named)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true")
    parser.add_argument(
        "pages", nargs="*", help="stems to begin or update, such as 02_architecture; default: begun ones"
    )
    args = parser.parse_args()
    found = []
    for language in LANGUAGES:
        for page in sources():
            if args.update and (page.stem in args.pages or (not args.pages and path_of(page, language).exists())):
                update(page, language)
            found += [f"{language} {page.stem}: {each}" for each in missing(page, language)]
    print("\n".join(found) or "every begun page is translated")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
