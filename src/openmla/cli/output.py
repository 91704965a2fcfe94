"""How the command line speaks: results on standard output as text or JSON, everything else on standard error."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from typing import Any

WIDTH = 100
JSON_SCHEMA = 1  # of explain, bench and compile; the others carry their own


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))


def fold(text: str) -> str:
    """Long lines cut at 100 columns, continued under their own indentation."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        lines += textwrap.wrap(line, WIDTH, subsequent_indent=indent, drop_whitespace=True) or [""]
    return "\n".join(lines)


def show(args: argparse.Namespace, found: Any, as_page: Any) -> None:
    """A result as text or JSON, and as a page where one was asked for."""
    if args.out:
        from openmla.lab import page

        page.write(as_page(found), args.out)
    if args.json:
        print_json({**found.as_dict(), "page": str(args.out) if args.out else None})
    else:
        print(fold(str(found)))
        print(f"page: {args.out}" if args.out else "a page with figures: add --out page.html")
