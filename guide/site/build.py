"""Build the guide as a site: run every chapter once, write the pages of every language, call Sphinx.

    python guide/site/build.py                    # into build/guide; open build/guide/index.html
    python guide/site/build.py --out DIR

Nothing is fetched, neither while building nor while reading: search is an index beside the pages, formulas are MathML,
figures are inline SVG. A chapter that raises, a warning of Sphinx or a paragraph without its translation is an error.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import translations
from cells import Cell

SITE = Path(__file__).resolve().parent
ROOT = SITE.parents[1]
LANGUAGES = {"en": "English", "zh_CN": "简体中文"}
NOT_TRANSLATED = {"en": "", "zh_CN": "```{note}\n本页暂无中文版，以下为英文原文。\n```\n\n"}
CAPTIONS = {
    "en": ("Guide", "Kernels", "Concepts", "Decisions"),
    "zh_CN": ("指南", "内核", "概念", "设计决定"),
}
CAPTION = re.compile(r"<figcaption>(.*?)</figcaption>")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def run_chapters(chapters: list[Path]) -> dict[str, list[Cell]]:
    """The cells of every chapter with what they printed, each in a process of its own, two at a time."""

    def one(path: Path) -> list[Cell]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "cells.json"
            command = [sys.executable, str(SITE / "cells.py"), str(path), str(out)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{path.name} failed\n{done.stdout}{done.stderr}")
            return [Cell(**each) for each in json.loads(out.read_text(encoding="utf-8"))]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((path.stem for path in chapters), pool.map(one, chapters), strict=True))


def page_of(cells: list[Cell], translate: Callable[[str], str]) -> str:
    """A chapter as MyST Markdown."""
    parts = []
    for cell in cells:
        if cell.kind == "markdown":
            parts.append(translate(cell.text))
            continue
        parts.append(f"```python\n{cell.text.strip()}\n```")
        if cell.stdout.strip():
            parts.append(f"````{{container}} output\n```text\n{cell.stdout.rstrip()}\n```\n````")
        if cell.html:
            parts.append(f"```{{raw}} html\n{CAPTION.sub(lambda m: _caption(m[1], translate), cell.html)}\n```")
    return "\n\n".join(parts) + "\n"


def _caption(shown: str, translate: Callable[[str], str]) -> str:
    return f"<figcaption>{html.escape(translate(html.unescape(shown)))}</figcaption>"


def within_site(text: str, page: Path, pages: dict[Path, str], own: str) -> str:
    """Links of a file of the repository as links of the site; where they lead elsewhere, the path as code."""

    def one(match: re.Match[str]) -> str:
        name, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        where = (page.parent / path).resolve()
        found = pages.get(where)
        if found is None and where.suffix == ".html" and where.is_file():
            return f'<a href="{"../" * own.count("/")}{where.relative_to(ROOT)}">{name}</a>'  # a report made beforehand
        if found is None:
            shown = where.relative_to(ROOT) if where.is_relative_to(ROOT) else path
            return name if name.strip("`") == str(shown) else f"{name} (`{shown}`)"
        up = "../" * own.count("/")
        return f"[{name}]({up}{found}.md{'#' + anchor if anchor else ''})"

    return LINK.sub(one, text)


def write_pages(out: Path, language: str, chapters: dict[str, list[Cell]]) -> list[str]:
    """The source tree of one language; returns the names of its pages."""
    pages = {SITE.parent / f"{stem}.py": stem for stem in chapters}
    pages[ROOT / "ARCHITECTURE.md"] = "architecture"
    for path in sorted((ROOT / "docs").rglob("*.md")):
        pages[path] = str(path.relative_to(ROOT).with_suffix(""))
    (out / "extra").mkdir(parents=True)
    for path in (ROOT / "docs").rglob("*.html"):
        target = out / "extra" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for path in [SITE.parent / "index.md", *pages]:
        own = pages.get(path, "index")
        catalog = translations.load(path, language) if path.parent == SITE.parent and language != "en" else None
        translate = translations.translator(catalog) if catalog is not None else str
        text = page_of(chapters[own], translate) if own in chapters else translate(path.read_text(encoding="utf-8"))
        if catalog is None:
            text = re.sub(r"\A(# .*\n)", lambda m: f"{m[1]}\n{NOT_TRANSLATED[language]}", text, count=1)
        text = within_site(text, path, pages, own)
        if own == "index":
            text += _tables_of_contents(sorted(pages.values()), language)
        target = out / f"{own}.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return ["index", *pages.values()]


def _tables_of_contents(names: list[str], language: str) -> str:
    """Hidden tables that give the sidebar its order."""
    groups = (
        [name for name in names if re.match(r"\d\d_", name)] + ["architecture"],
        [name for name in names if name.startswith("docs/kernels/")],
        [name for name in names if name.startswith("docs/") and name.split("/")[1] not in ("kernels", "decisions")],
        [name for name in names if name.startswith("docs/decisions/")],
    )
    trees = [
        f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(group) + "\n```\n"
        for caption, group in zip(CAPTIONS[language], groups, strict=True)
        if group
    ]
    return "".join(trees)


def build(out: Path) -> list[str]:
    """The whole site. Returns the names of the pages, the same in every language."""
    missing = [
        f"{language} {page.stem}: {each}"
        for language in translations.LANGUAGES
        for page in translations.sources()
        for each in translations.missing(page, language)
    ]
    if missing:
        raise SystemExit("\n".join([*missing, "write them: python guide/site/translations.py --update"]))
    chapters = run_chapters([page for page in translations.sources() if page.suffix == ".py"])
    shutil.rmtree(out, ignore_errors=True)
    names: list[str] = []
    for language in LANGUAGES:
        source = out / "source" / language
        names = write_pages(source, language, chapters)
        for each in ("conf.py", "_static", "_templates"):
            (shutil.copytree if (SITE / each).is_dir() else shutil.copy)(SITE / each, source / each)
        with (source / "conf.py").open("a", encoding="utf-8") as file:
            context = {"languages": LANGUAGES, "language_code": language}
            file.write(f"\nlanguage = {language!r}\nhtml_context = {context!r}\n")
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
        done = subprocess.run([*command, str(source), str(out / language)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{language}: Sphinx found\n{done.stderr}")
        shutil.rmtree(out / language / ".doctrees", ignore_errors=True)
    shutil.rmtree(out / "source")
    links = " · ".join(f'<a href="{code}/index.html">{html.escape(name)}</a>' for code, name in LANGUAGES.items())
    (out / "index.html").write_text(
        '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=en/index.html">'
        f"<title>OpenMLA</title><p>{links}</p>\n",
        encoding="utf-8",
    )
    return names


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "guide")
    out = parser.parse_args().out.resolve()
    names = build(out)
    print(f"{len(names)} pages in {', '.join(LANGUAGES.values())}: {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
