"""What the verbs have in common on the command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openmla.core.errors import ConfigError

SHAPES = {  # what a case is made of -> its meaning
    "batch": "requests",
    "s_q": "query tokens per request",
    "h_q": "query heads",
    "h_kv": "KV heads",
    "s_k": "keys per request",
    "d_qk": "columns of a key",
    "d_v": "columns of a value",
    "dtype": "bf16, fp16, fp32",
    "layout": "plain or a byte layout such as fp8_656",
    "page_size": "tokens per page",
    "lengths": "fixed, varlen",
    "policy": "balanced, batch_invariant",
    "cache": "cold, warm",
}


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if not text.strip().lstrip("+-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def positive_number(text: str) -> float:
    """A finite number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def new_file(text: str) -> Path:
    """A file that can be written when the work is done, for argparse: told before the minutes, not after them."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, got the folder {text}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}; make it, or give another path")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}: no permission; give another path")
    return path


def _new_page(text: str) -> Path:
    """A page that can be drawn and written."""
    from openmla.lab import page

    try:
        page.check_installed()
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return new_file(text)


def check_compiler() -> None:
    """Raises ConfigError, with the command to install it, unless the compiler of the Hopper kernels is there."""
    from openmla.core import env

    packages = {"cutlass": "nvidia-cutlass-dsl", "tvm_ffi": "apache-tvm-ffi"}
    missing = [package for module, package in packages.items() if not env.is_importable(module)]
    if missing:
        raise ConfigError(
            f"Hopper kernels are compiled by {', '.join(missing)}; run: pip install 'openmla[cuda]' (no GPU needed)"
        )


def add_verb(verbs: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    """A verb with --json; `run` takes the parsed arguments and returns the exit code."""
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:])
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")


def add_page(parser: argparse.ArgumentParser, meaning: str = "also write a page") -> None:
    """--out, the page of a verb."""
    parser.add_argument("--out", type=_new_page, metavar="PAGE.html", help=meaning)


def add_cases(parser: argparse.ArgumentParser) -> None:
    """What to look at: a suite, or a sweep made on the spot."""
    parser.add_argument("--suite", metavar="NAME|PATH", help="default: smoke, unless a sweep is given")
    parser.add_argument("--case", metavar="GLOB", help="only cases whose name matches, such as '*hq16*'")
    group = parser.add_argument_group(
        "sweep", "instead of a suite: every combination of the values given, such as --s-k 1k..32k --h-q 16,128"
    )
    for name, meaning in SHAPES.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=choices, metavar="A,B,..", help=meaning)
    group.add_argument("--causal", action="store_true", help="queries are the last tokens and see no later key")


def choices(text: str) -> list[int | str]:
    """`1,4,16`, `1k..32k` (doubling) or words; k is 1024."""
    found: list[int | str] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        if dots:
            low, high = _number(first), _number(last)
            if not isinstance(low, int) or not isinstance(high, int) or low < 1:
                raise argparse.ArgumentTypeError(f"a range is two numbers such as 1k..32k, got {part!r}")
            while low <= high:
                found.append(low)
                low *= 2
        else:
            found.append(_number(part))
    return found


def _number(text: str) -> int | str:
    text = text.strip()
    digits = text[:-1] if text.endswith("k") else text
    return int(digits) * (1024 if text.endswith("k") else 1) if digits.isdecimal() else text


def chosen_cases(args: argparse.Namespace, default: str = "smoke") -> tuple[Any, Any]:
    """(suite, cases) of the command line. Raises ConfigError for a suite and a sweep at once."""
    from openmla.lab import suite as suites

    choices: dict[str, Any] = {name: getattr(args, name) for name in SHAPES if getattr(args, name) is not None}
    if args.causal:
        choices["is_causal"] = True
    if choices and args.suite:
        raise ConfigError(f"--suite {args.suite} holds its own cases; leave out {', '.join(choices)}, or the suite")
    suite = suites.sweep(choices, ("sdpa",)) if choices else suites.load(args.suite or default)
    return suite, suite.matching(args.case)


def known_backends(names: Sequence[str] | None) -> tuple[str, ...]:
    """The backends asked for, default OPENMLA_BACKEND. Raises ConfigError for an unknown one."""
    from openmla.backends import BACKENDS
    from openmla.core import env

    for name in names or ():
        if name not in ("auto", *BACKENDS):
            raise ConfigError(f"unknown backend {name!r}; use one of: auto, {', '.join(BACKENDS)}")
    return tuple(names or (env.BACKEND.read(),))
