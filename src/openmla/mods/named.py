"""Mods by name, for command lines: `soft_cap(30.0)`, `alibi`, `my_module:my_mod`."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterable

from openmla.core.errors import ConfigError
from openmla.mods import library
from openmla.mods.attached import Mods, form_of
from openmla.mods.function import Mod
from openmla.mods.rope import Rope, RopeForm

_FORM = re.compile(r"(?:(?P<module>[\w.]+):)?(?P<name>\w+)(?:\((?P<arguments>.*)\))?")


def named(texts: Iterable[str]) -> Mods:
    """The form of mods given by name; tables are not needed to say who can inline them.

    Args:
        texts: each a name of the library with its numbers, `rope`, or module:name of a mod of your own.

    Raises:
        ConfigError: no mod of that name; says what there is.
    """
    return form_of([_one(text) for text in texts])


def _one(text: str) -> Mod | RopeForm:
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} names no mod; write soft_cap(30.0), alibi or my_module:my_mod")
    name, arguments = match["name"], match["arguments"]
    if match["module"] is None:
        if name == "rope":
            return Rope.of_base(2, 1).form
        if name not in library.LIBRARY:
            raise ConfigError(f"unknown mod {name!r}; the library has: {', '.join(library.LIBRARY)}, rope")
        found = getattr(library, f"_{name}", None)  # behind a factory that takes tensors alone
        found = found if isinstance(found, Mod) else getattr(library, name)
    else:
        try:
            found = getattr(importlib.import_module(match["module"]), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{text!r} cannot be imported: {error}") from error
    if not isinstance(found, Mod) and callable(found):
        try:
            found = found(*ast.literal_eval(f"({arguments},)")) if arguments else found()
        except (TypeError, ValueError, SyntaxError) as error:
            raise ConfigError(f"{text!r} cannot be made: {error}; write its numbers as in soft_cap(30.0)") from error
    if not isinstance(found, Mod):
        raise ConfigError(f"{text!r} is a {type(found).__name__}, no mod; decorate it with @score_mod or its kin")
    return found
