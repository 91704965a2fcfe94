"""The cache writers behind the four verbs. A call is one launch; nothing is planned and nothing waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from openmla.backends.base import AppendOperands, Verdict
from openmla.backends.cute import bundle
from openmla.backends.cute.writers import config as writers
from openmla.backends.cute.writers.launch import launch
from openmla.core.problem import AppendProblem
from openmla.core.target import Target


@dataclass(frozen=True)
class Append:
    """`writers`: bf16 rows into any layout."""

    op: str = field(default="append", init=False)
    backend: str = field(default="cute", init=False)
    name: str = field(default=writers.FAMILY, init=False)

    def supports(self, problem: AppendProblem, target: Target) -> Verdict:
        """The family's own rules, then whether its code can be had here."""
        verdict = writers.supports(problem, target)
        return bundle.availability(writers.FAMILY, writers.configs(problem, target)[0]) if verdict else verdict

    def configs(self, problem: AppendProblem, target: Target) -> Sequence[writers.Config]:
        """Variants, best first."""
        return writers.configs(problem, target)

    def compile(self, problem: AppendProblem, config: writers.Config, target: Target) -> Any:
        """Load the function, compiling it if neither bundle nor cache has it."""
        return bundle.serve(writers.FAMILY, config).function

    def launch(self, compiled: Any, problem: AppendProblem, operands: AppendOperands, plan: None) -> None:
        """Writes the rows into their slots, on the current stream."""
        if operands.slots.shape[0] and operands.out.shape[0]:
            launch(compiled, problem.layout.is_quantised, operands)


APPEND = Append()
