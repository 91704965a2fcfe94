"""Which mods the kernels of this backend inline, and why not the others. No DSL import.

A kernel that inlines mods carries them in its Config: another function, or another captured number, is another kernel.
A mask that says what the kernel's own `window` says is not inlined at all: it costs nothing, and needs no kernel of its
own.
"""

from __future__ import annotations

from typing import Any

from openmla.mods import Mod, Mods, sliding_window


def inlined(form: Mods | None) -> tuple[Mod, ...]:
    """The functions that a kernel has to call for each score: every score_mod in turn, then every mask_mod.

    `Problem.window` is the narrowest window of all masks, so it stands for every `sliding_window`.
    """
    if form is None:
        return ()
    return (*form.scores, *(each for each in form.masks if not _is_window(each)))


def _is_window(mask: Mod) -> bool:
    return mask.window > 0 and mask == sliding_window(mask.window)


def refusals(form: Mods | None) -> tuple[str, ...]:
    """Reasons why a kernel of this backend cannot inline the mods of a problem."""
    if form is None:
        return ()
    found = [
        f"reads no tables in a mod, {each.name} reads {', '.join(name for name, _ in each.tables)}"
        for each in inlined(form)
        if each.tables
    ]
    if form.activation is not None:
        found.append(f"inlines no activation in place of softmax, got {form.activation}")
    if form.rope is not None:
        found.append(f"does not rotate q, got {form.rope}; apply RoPE to q before the call")
    return tuple(found)


class _Line:
    """factor * score, as a function of the user's makes it."""

    def __init__(self, factor: float, amplitude: float | None = None) -> None:
        self.factor, self.amplitude = factor, amplitude  # amplitude * tanh(factor * score), where there is one

    def __mul__(self, number: Any) -> _Line:
        if not isinstance(number, int | float):
            raise TypeError
        if self.amplitude is None:
            return _Line(self.factor * number)
        return _Line(self.factor, self.amplitude * number)

    __rmul__ = __mul__

    def __truediv__(self, number: Any) -> _Line:
        return self.__mul__(1.0 / number)


class _Tanh:
    """`m`, of which this knows one function."""

    @staticmethod
    def tanh(x: _Line) -> _Line:
        """Of a line."""
        if x.amplitude is not None:
            raise TypeError
        return _Line(x.factor, 1.0)


def soft_cap_of(mod: Mod) -> tuple[float, float] | None:
    """(a, b) of a score_mod that says a * tanh(b * score) and nothing else, however it is written; else None."""
    if mod.kind != "score_mod" or mod.tables:
        return None
    try:
        found = mod.rebound(_Tanh)(_Line(1.0), None, None, None, None)
    except (TypeError, AttributeError, ZeroDivisionError):
        return None
    return (found.amplitude, found.factor) if isinstance(found, _Line) and found.amplitude is not None else None
