"""A chapter: a percent-format script, its cells, and what each of them printed and drew.

    python guide/site/cells.py guide/01_overview.py out.json

runs one chapter in this process, cell after cell in one namespace, as a notebook would, and writes a list of
{"kind": "markdown" | "code", "text", "stdout", "html"}. A cell that raises ends the run with its traceback: chapters
end in assertions, so a wrong sentence fails the build. The value of a cell's last line is shown when it can draw itself
(`_repr_html_`); `python guide/01_overview.py` runs the same lines and shows only what they print.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_MARK = re.compile(r"^# %%(.*)$", re.MULTILINE)


@dataclass
class Cell:
    """One cell. `stdout` and `html` are empty until it has run, and stay so for text."""

    kind: str
    text: str
    line: int  # of its first line in the file, for tracebacks
    stdout: str = ""
    html: str = ""


def read(path: Path) -> list[Cell]:
    """The cells of a script. What stands before the first `# %%` must be empty."""
    source = path.read_text(encoding="utf-8")
    marks = list(_MARK.finditer(source))
    if not marks or source[: marks[0].start()].strip():
        raise ValueError(f"{path.name}: a chapter begins with `# %% [markdown]`")
    cells = []
    for mark, end in zip(marks, [*(m.start() for m in marks[1:]), len(source)], strict=True):
        body = source[mark.end() + 1 : end]
        line = source.count("\n", 0, mark.end()) + 2
        if mark[1].strip() == "[markdown]":
            strangers = [each for each in body.splitlines() if each.strip() and not each.startswith("#")]
            if strangers:
                raise ValueError(f"{path.name}: code in a text cell: {strangers[0]!r}")
            body = "\n".join(re.sub(r"^# ?", "", each) for each in body.splitlines())
            cells.append(Cell("markdown", body.strip(), line))
        else:
            cells.append(Cell("code", body.rstrip(), line))
    return cells


def run(cells: list[Cell], path: Path) -> None:
    """Run the code cells in order and fill in their outputs. Raises what a cell raises."""
    sys.path.insert(0, str(path.parent))
    namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    for cell in cells:
        if cell.kind == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                value = _run_one(cell, path, namespace)
            cell.stdout = printed.getvalue()
            cell.html = value._repr_html_() if hasattr(value, "_repr_html_") else ""


def _run_one(cell: Cell, path: Path, namespace: dict[str, Any]) -> Any:
    """Run the statements of a cell; the value of its last line if that is an expression."""
    tree = ast.parse("\n" * (cell.line - 1) + cell.text, str(path))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(path), "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), str(path), "eval"), namespace)


def main() -> int:
    """Run the chapter argv[1] and write its cells to argv[2]."""
    path = Path(sys.argv[1]).resolve()
    cells = read(path)
    try:
        run(cells, path)
    except BaseException:
        traceback.print_exc()
        return 1
    Path(sys.argv[2]).write_text(json.dumps([asdict(cell) for cell in cells]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
