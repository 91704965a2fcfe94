"""The guide: every chapter runs, the site builds in both languages with every page, loads nothing, and no translation lags."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

pytestmark = pytest.mark.timeout(600)  # the first test builds the site: half a minute of processor time
pytest.importorskip("sphinx", reason="the site needs: pip install 'openmla[docs]'")

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "guide" / "site"
sys.path.insert(0, str(SITE))

import build  # noqa: E402
import cells  # noqa: E402
import translations  # noqa: E402

CHAPTERS = sorted((ROOT / "guide").glob("[0-9][0-9]_*.py"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The built site: this runs every chapter once, assertions included."""
    out = tmp_path_factory.mktemp("guide")
    return out, build.build(out)


class Reader(HTMLParser):
    """Links, loads and anchors of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") not in ("next", "prev", "index", "search", "genindex", "canonical"):
            self.loads.append(given["href"])


def test_every_page_is_there_in_every_language(site):
    out, names = site
    assert {path.stem for path in CHAPTERS} | {"index", "architecture"} <= set(names)
    for language in build.LANGUAGES:
        absent = [name for name in names if not (out / language / f"{name}.html").is_file()]
        assert not absent, (language, absent)
        assert (out / language / "searchindex.js").is_file()


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    out, _ = site
    pages = {
        path: Reader(path.read_text(encoding="utf-8")) for path in out.rglob("*.html") if "_static" not in path.parts
    }
    wrong = []
    for path, page in pages.items():
        for target in page.loads + [link for link in page.links if not link.startswith(("http", "mailto"))]:
            if re.match(r"[a-z]+:|//", target):
                if not target.startswith("data:"):
                    wrong.append(f"{path.relative_to(out)} loads {target}")
                continue
            name, _, anchor = target.partition("#")
            file = (path.parent / unquote(name.partition("?")[0])).resolve() if name.partition("?")[0] else path
            if not file.exists() or (anchor and file in pages and unquote(anchor) not in pages[file].anchors | {""}):
                wrong.append(f"{path.relative_to(out)} -> {target}")
        styles = re.findall(r"@import|url\((?![\"']?(?:data:|#))[^)]*//", path.read_text(encoding="utf-8"))
        wrong += [f"{path.relative_to(out)}: {each}" for each in styles]
    assert not wrong, wrong[:20]


def test_formulas_are_drawn_by_the_browser(site):
    out, _ = site
    text = (out / "en" / "01_overview.html").read_text(encoding="utf-8")
    assert "<math" in text
    assert "$$" not in text
    assert not re.search(r"<script[^>]*(mathjax|katex)", text, re.IGNORECASE)


def test_translated_pages_are_chinese_and_others_say_so(site):
    out, _ = site
    for page in translations.sources():
        text = (out / "zh_CN" / f"{page.stem}.html").read_text(encoding="utf-8")
        chinese = len(re.findall(r"[\u4e00-\u9fff]", text))
        if translations.load(page, "zh_CN") is None:
            assert "本页暂无中文版" in text, page.stem
        else:
            assert chinese > 500, (page.stem, chinese)


def test_chinese_words_can_be_searched(site):
    out, _ = site
    index = (out / "zh_CN" / "searchindex.js").read_text(encoding="utf-8")
    index = re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), index)
    for word in ("注意力", "解码", "潜在向量"):
        assert word in index, word
    static = out / "zh_CN" / "_static"
    stemmer = re.search(r"Stemmer = (\w+)", (static / "language_data.js").read_text(encoding="utf-8"))
    assert any(f"{stemmer[1]} =" in path.read_text(encoding="utf-8") for path in static.glob("*-stemmer.js")), stemmer


def test_every_page_of_the_guide_is_translated():
    for language in translations.LANGUAGES:
        assert [page.stem for page in translations.sources() if translations.load(page, language) is None] == []


def test_a_changed_paragraph_loses_its_translation(tmp_path, monkeypatch):
    page = ROOT / "guide" / "index.md"
    assert translations.missing(page, "zh_CN") == []
    changed = tmp_path / "index.md"
    changed.write_text(page.read_text(encoding="utf-8").replace("Five chapters", "Six chapters"), encoding="utf-8")
    found = translations.missing(changed, "zh_CN")
    assert sorted(each.split(":")[0] for each in found) == ["not translated", "translates nothing"]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_end_in_assertions(chapter):
    code = [cell.text for cell in cells.read(chapter) if cell.kind == "code"]
    assert re.search(r"^\s*assert ", code[-1], re.MULTILINE), "the last cell asserts what the chapter said"


def test_a_wrong_sentence_fails_the_build(tmp_path):
    chapter = tmp_path / "09_wrong.py"
    chapter.write_text("# %% [markdown]\n# # Wrong\n\n# %%\nassert 1 + 1 == 3\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"09_wrong\.py failed[\s\S]*AssertionError"):
        build.run_chapters([chapter])


def test_a_plain_run_prints_what_the_site_shows(site):
    out, _ = site
    command = [sys.executable, str(CHAPTERS[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    shown = (out / "en" / f"{CHAPTERS[0].stem}.html").read_text(encoding="utf-8")
    for line in done.stdout.splitlines()[1:6]:
        assert line.split("   ")[0] in shown
