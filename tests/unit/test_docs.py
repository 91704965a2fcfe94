"""Docs that run: every Python block of README and docs/ is executed, every public docstring has its parts."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import linecache
import re
from pathlib import Path

import pytest

import openmla

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"(?<![\w./\"-])openmla(?:\.[A-Za-z_]\w*)+")
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)(?:#[^)]*)?\)")

OPERATIONS = [
    openmla.decode,
    openmla.decode_shared_prefix,
    openmla.sparse_decode,
    openmla.sparse_prefill,
    openmla.prefill,
    openmla.append,
    openmla.plan,
    openmla.workspace_bytes,
]
BORDER = [
    getattr(openmla.flash_mla, name)
    for name in openmla.flash_mla.__all__
    if name.startswith(("flash_mla_", "flash_attn"))
]


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one page run in order in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for number, text in enumerate(BLOCK.findall(page.read_text()), 1):
        name = f"{page.name} block {number}"
        block = text.replace("port=9464", "port=0")  # a free one: another process of this machine may serve there
        linecache.cache[name] = (len(block), None, block.splitlines(True), name)  # mods read their own source
        exec(compile(block, name, "exec"), namespace)


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"],
    ids=lambda p: p.stem,
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_name_of_ours_that_is_written_is_there() -> None:
    """`openmla.x.y` in a page, a chapter, a docstring or a message, wherever its module does not need another library."""
    texts = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "guide").glob("*.py"), *(ROOT / "src").rglob("*.py")]
    found = {name for path in texts for name in NAME.findall(path.read_text(encoding="utf-8"))}
    assert len(found) > 100
    assert [name for name in sorted(found) if not _is_there(name)] == []


def _is_there(name: str) -> bool:
    value: object = openmla
    for number, part in enumerate(name.split(".")[1:], 2):
        module = ".".join(name.split(".")[:number])
        if module.startswith("openmla.integrations."):  # their modules import their hosts
            return importlib.util.find_spec(module) is not None
        if not hasattr(value, part) and importlib.util.find_spec(module) is None:
            return False
        value = getattr(value, part) if hasattr(value, part) else importlib.import_module(module)
    return True


@pytest.mark.parametrize("operation", [*OPERATIONS, *BORDER], ids=lambda op: op.__name__)
def test_docstrings_have_formula_shapes_errors_and_source(operation: object) -> None:
    text = inspect.getdoc(operation) or ""
    parameters = set(inspect.signature(operation).parameters)  # type: ignore[arg-type]
    for part in ("Args:", "Returns:", "Raises:", "Determinism", "Source:"):
        assert part in text, f"no {part}"
    arguments = text[text.index("Args:") : text.index("Returns:")]
    documented = {
        name.strip().lstrip("*")
        for line in re.findall(r"^    ([\w*, ]+):", arguments, re.MULTILINE)
        for name in line.split(",")
    }
    assert documented == parameters, f"undocumented or unknown: {documented ^ parameters}"
    raised = re.findall(r"^    (\w+Error)\b", text[text.index("Raises:") :], re.MULTILINE)
    errors = importlib.import_module("openmla.core.errors")
    assert raised
    assert all(hasattr(errors, name) for name in raised)


def test_every_word_of_a_signature_is_in_the_glossary() -> None:
    words = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "glossary.md").read_text()))
    shapes = {
        symbol
        for operation in OPERATIONS
        for shape in re.findall(r"\[([\w, +]+)\]", inspect.getdoc(operation) or "")
        for symbol in re.findall(r"[a-z]\w*", shape)
        if "_" in symbol or symbol in ("batch", "topk")
    }
    assert shapes - words - {"cu_seqlens", "attn"} == set()
