"""Rolling OpenMLA out beside a backend that serves already: compare in the shadow, take over by percent, go back at once.

    from openmla.observe.rollout import Rollout

    decode = Rollout(theirs=old_decode, ours=new_decode, shadow=0.01)     # 1 % of calls run both; theirs is served
    ...
    print(decode.report())                                               # compared, worst error, beyond the limit
    decode.share = 0.05                                                  # ours serves 5 % of calls
    decode.rollback("latency of p99 went up")                            # from the next call on: theirs alone

Both functions take the same arguments and return (out, lse). Comparing happens on the device and waits for nothing; the
sums are read by `report()`. Which calls are ours follows from a counter, not from dice: 5 % is every twentieth call.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from openmla.core import incidents
from openmla.core.errors import ConfigError, DeviceLostError

# Two bf16 kernels that round in different places differ by at most 2^-7 of a row's largest element in practice; a wrong
# page, head or scale differs by more than a tenth.
LIMIT = 0.03
Result = tuple[torch.Tensor, torch.Tensor]

_log = logging.getLogger("openmla")


@dataclass(frozen=True)
class Report:
    """What a rollout has seen so far."""

    calls: int
    ours: int
    compared: int
    beyond: int  # compared calls with a row whose error is beyond the limit
    worst_out: float  # largest |difference| over the largest |element| of theirs, per row
    worst_lse: float  # largest |difference|, in the unit of lse
    stopped: str  # why everything goes to theirs; empty while it does not

    @property
    def is_clean(self) -> bool:
        """Nothing beyond the limit, and not rolled back."""
        return self.beyond == 0 and not self.stopped

    def __str__(self) -> str:
        state = f"rolled back: {self.stopped}" if self.stopped else "running"
        return (
            f"{state}; {self.calls} calls, {self.ours} served by ours, {self.compared} compared, {self.beyond} beyond the "
            f"limit, worst out {self.worst_out:.2e}, worst lse {self.worst_lse:.2e}"
        )


class Rollout:
    """A decode function that is theirs, ours, or both.

    Args:
        theirs: the function that serves today: arguments -> (out, lse).
        ours: the function that shall serve; same arguments, same meaning of lse, results of the same shape.
        share: part of the calls that ours serves, 0 to 1; may be set at any time.
        shadow: part of the calls that run both and serve theirs; compared, never served. Counted before `share`.
        limit: error of a row, as a part of its largest element, beyond which a comparison counts against ours.

    Notes:
        CUDA graphs: a captured call keeps the choice that was made at its capture; `share` and `rollback` take effect at
        the next capture. Comparisons inside a graph count at every replay.
        An exception of ours falls back to theirs for that call and rolls back, except DeviceLostError, after which theirs
        would fail too.
    """

    def __init__(
        self,
        theirs: Callable[..., Result],
        ours: Callable[..., Result],
        *,
        share: float = 0.0,
        shadow: float = 0.0,
        limit: float = LIMIT,
    ) -> None:
        self._theirs, self._ours, self.limit = theirs, ours, limit
        self.share, self.shadow = share, shadow
        self._lock = threading.Lock()
        self._calls = self._served = 0
        self._stopped = ""
        self._sums: dict[torch.device, torch.Tensor] = {}  # fp32 [compared, beyond, worst out, worst lse]

    @property
    def share(self) -> float:
        """Part of the calls that ours serves."""
        return self._share

    @share.setter
    def share(self, value: float) -> None:
        self._share = _part("share", value)

    @property
    def shadow(self) -> float:
        """Part of the calls that run both."""
        return self._shadow

    @shadow.setter
    def shadow(self, value: float) -> None:
        self._shadow = _part("shadow", value)

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        """One call, to whom it is due."""
        with self._lock:
            number = self._calls
            self._calls += 1
        if self._stopped:
            return self._theirs(*args, **kwargs)
        if _is_due(number, self._shadow):
            wanted = self._theirs(*args, **kwargs)
            found = self._try(*args, **kwargs)
            if found is not None:
                self._compare(found, wanted)
            return wanted
        if _is_due(number, self._share):
            found = self._try(*args, **kwargs)
            if found is not None:
                with self._lock:
                    self._served += 1
                return found
        return self._theirs(*args, **kwargs)

    def _try(self, *args: Any, **kwargs: Any) -> Result | None:
        try:
            return self._ours(*args, **kwargs)
        except Exception as error:
            if not isinstance(error, DeviceLostError):
                self.rollback(f"ours raised {type(error).__name__}: {error}")
                return None
            raise

    def rollback(self, reason: str) -> None:
        """Send every call to theirs from now on."""
        if not self._stopped:
            incidents.note("rolled_back", "rollout", reason)
        self._stopped = self._stopped or reason

    def resume(self) -> None:
        """Undo `rollback`, and compare anew."""
        self._stopped = ""
        for sums in self._sums.values():
            sums.zero_()
        incidents.over("rollout")

    def _compare(self, found: Result, wanted: Result) -> None:
        """Add one comparison to the sums of the device. No synchronisation."""
        (out, lse), (their_out, their_lse) = found, wanted
        if out.shape != their_out.shape or lse.shape != their_lse.shape:
            shapes = f"{tuple(out.shape)} and {tuple(lse.shape)}, theirs {tuple(their_out.shape)} and {tuple(their_lse.shape)}"
            self.rollback(f"ours returned {shapes}")
            return
        device = out.device
        if device not in self._sums:
            self._sums[device] = torch.zeros(4, dtype=torch.float32, device=device)
        apart = (out.float() - their_out.float()).abs().amax(-1)
        error = apart / their_out.float().abs().amax(-1).clamp_min(1e-12)
        same = (lse == their_lse) | (lse.isinf() & their_lse.isinf())  # an empty row is +inf here and -inf there
        of_lse = torch.where(same, 0.0, (lse.float() - their_lse.float()).abs())
        # NaN counts as beyond any limit; a maximum would carry it along and hide every later number.
        worst = torch.stack(
            [x.nan_to_num(nan=torch.inf).max() if x.numel() else x.new_zeros(()) for x in (error, of_lse)]
        )
        sums = self._sums[device]
        beyond = (worst > self.limit).any().float()
        sums[:2] += torch.stack([torch.ones_like(beyond), beyond])
        sums[2:] = torch.maximum(sums[2:], worst)

    def report(self) -> Report:
        """What was seen so far; waits for the device. A comparison beyond the limit rolls back."""
        compared = beyond = 0
        worst_out = worst_lse = 0.0
        for sums in list(self._sums.values()):
            values = sums.tolist()
            compared, beyond = compared + int(values[0]), beyond + int(values[1])
            worst_out, worst_lse = max(worst_out, values[2]), max(worst_lse, values[3])
        if beyond:
            self.rollback(
                f"{beyond} of {compared} comparisons are beyond {self.limit}, worst {max(worst_out, worst_lse):.2e}"
            )
        return Report(self._calls, self._served, compared, beyond, worst_out, worst_lse, self._stopped)


def _part(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be between 0 and 1, got {value!r}")
    return float(value)


def _is_due(number: int, part: float) -> bool:
    """Whether call `number` is among the evenly spread `part` of all calls."""
    return int((number + 1) * part) > int(number * part)
