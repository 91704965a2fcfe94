"""The exception family. A message always says the rule, what was got, and what to do; all violations at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class OpenMLAError(Exception):
    """Base of every exception raised on purpose by OpenMLA."""


class ProblemError(OpenMLAError, ValueError):
    """The inputs contradict each other or the contract; the caller can fix it.

    Args:
        op: name of the public operation that refused.
        violations: one sentence per broken rule, each with the offending value and the fix.
    """

    def __init__(self, op: str, violations: Sequence[str]) -> None:
        self.op = op
        self.violations = tuple(violations)
        lines = "\n".join(f"  - {violation}" for violation in self.violations)
        super().__init__(f"{op}: {len(self.violations)} problem(s) with the inputs\n{lines}")

    def __reduce__(self) -> tuple[type[ProblemError], tuple[str, tuple[str, ...]]]:
        return (type(self), (self.op, self.violations))


class ModError(ProblemError):
    """A function cannot be a mod (`openmla.mods`): it would not mean the same in every backend."""


class PlanMismatchError(ProblemError):
    """A plan was reused for a different problem; the message names each differing field."""


class UnsupportedError(OpenMLAError, NotImplementedError):
    """The problem is well formed, but no permitted backend can run it.

    Args:
        headline: what could not run, where.
        reasons: kernel name -> every reason why not.
        problem: one-line description of the problem.
    """

    def __init__(self, headline: str, reasons: Mapping[str, Sequence[str]], problem: str) -> None:
        self.headline = headline
        self.reasons = {name: tuple(why) for name, why in reasons.items()}
        self.problem = problem
        lines = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in self.reasons.items())
        super().__init__(f"{headline}\n{lines}\n  problem: {problem}")

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[str, dict[str, tuple[str, ...]], str]]:
        return (type(self), (self.headline, self.reasons, self.problem))


class CompileError(OpenMLAError, RuntimeError):
    """The kernel toolchain failed; the message carries kernel, config and the path of the log."""


class DeviceLostError(OpenMLAError, RuntimeError):
    """The device is in a state that only a new process can clear (a sticky CUDA error, or a fork after CUDA began).

    Nothing runs on it any more: no other backend is tried, `openmla.observe.metrics.health()` is failed, and the process should end.

    Args:
        device: the device.
        reason: what happened, and to whom it is attributed.
    """

    def __init__(self, device: str, reason: str) -> None:
        self.device, self.reason = device, reason
        super().__init__(
            f"{device} cannot be used by this process any more: {reason}; "
            "end the process and start a new one (nothing else clears such an error)"
        )

    def __reduce__(self) -> tuple[type[DeviceLostError], tuple[str, str]]:
        return (type(self), (self.device, self.reason))


class OutOfPagesError(OpenMLAError, RuntimeError):
    """The KV allocator has fewer free pages than were asked for; nothing was changed."""

    def __init__(self, requested: int, free: int, evictable: int) -> None:
        self.requested, self.free, self.evictable = requested, free, evictable
        super().__init__(
            f"asked for {requested} page(s), {free} free and {evictable} evictable; "
            "free finished requests, evict cached prefixes, or build the cache with more pages"
        )

    def __reduce__(self) -> tuple[type[OutOfPagesError], tuple[int, int, int]]:
        return (type(self), (self.requested, self.free, self.evictable))


class ConfigError(OpenMLAError, ValueError):
    """An environment variable, tuned table or command-line value is malformed; names source and legal values."""
