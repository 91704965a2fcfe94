"""What a run of the demo found: every request, every check, every rate. The report reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from openmla.lab.demo.measure import KVForm, Rate
from openmla.lab.demo.serve import RequestLog, StepLog


@dataclass
class RequestResult:
    """One request: what it was given, what it wrote, and whether stock transformers wrote the same."""

    log: RequestLog
    prompt_end: str  # last characters of the prompt
    continuation: str
    expected: list[int]

    @property
    def is_equal(self) -> bool:
        """True when every token equals that of `generate()`."""
        return self.log.tokens == self.expected


@dataclass(frozen=True)
class Control:
    """A deliberate mistake; `ratio` is the worst error over its limit, which a caught mistake has above 1."""

    name: str
    rule: str
    ratio: float

    @property
    def is_caught(self) -> bool:
        """True when the check of outputs refused it."""
        return self.ratio > 1


@dataclass
class OracleResult:
    """Every attention output of the run against fp64. `worst` is error over limit, by rule."""

    outputs: int
    rows: int
    worst: dict[str, float]
    where: dict[str, str]
    failures: list[str]
    controls: list[Control]


@dataclass
class DemoResult:
    """Everything the report says; `as_dict()` is JSON-able."""

    versions: dict[str, str]
    machine: str
    arch: str
    threads: int
    seed: int
    is_quick: bool
    model: dict[str, int]
    page_size: int
    num_pages: int
    dtype: str
    requests: list[RequestResult]
    steps: list[StepLog]
    oracle: OracleResult
    integrity: tuple[str, ...]
    choices: list[dict[str, Any]]
    stock_tokens_per_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    tokens_per_s: float  # new tokens of all requests over the seconds of the timed run
    served: Rate
    sweep: list[Rate]
    forms: list[KVForm]
    roof: dict[str, float]
    report: str
    stages: list[tuple[str, float]] = field(default_factory=list)
    narrow: dict[str, Any] | None = None  # on a GPU: the same batch in bf16

    @property
    def tokens_equal(self) -> bool:
        """True when every request wrote what stock transformers writes."""
        return all(request.is_equal for request in self.requests)

    @property
    def passed(self) -> bool:
        """Tokens equal, all outputs within tolerance, cache sound, every control caught."""
        caught = all(control.is_caught for control in self.oracle.controls)
        return self.tokens_equal and not self.oracle.failures and not self.integrity and caught

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(seconds for _, seconds in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"schema": 1, "passed": self.passed, "tokens_equal": self.tokens_equal, **asdict(self)}
