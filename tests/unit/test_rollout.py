"""Rollout: shares are exact, shadows serve theirs, a difference or an exception goes back to theirs at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fragile import arguments, forget

import openmla
from openmla.core import incidents
from openmla.core.errors import ConfigError, DeviceLostError
from openmla.observe.rollout import Rollout


@pytest.fixture(autouse=True)
def _clean():
    forget()
    yield
    forget()


class Counted:
    """A decode that counts its calls and may differ."""

    def __init__(self, spoil: Any = None) -> None:
        self.calls, self.spoil = 0, spoil

    def __call__(self, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        out, lse = openmla.decode(**given)
        assert lse is not None
        if self.spoil:
            self.spoil(out, lse)
        return out, lse


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 1.0])
def test_a_share_is_exact_and_evenly_spread(share):
    theirs, ours = Counted(), Counted()
    both = Rollout(theirs, ours, share=share)
    for _ in range(100):
        both(**arguments())
    assert ours.calls == 100 * share and theirs.calls == 100 - ours.calls
    assert both.report().ours == ours.calls


def test_a_shadow_runs_both_and_serves_theirs():
    theirs, ours = Counted(lambda out, lse: out.add_(0.001)), Counted()
    both = Rollout(theirs, ours, shadow=0.5)
    want = theirs(**arguments())[0]
    assert all(torch.equal(both(**arguments())[0], want) for _ in range(10))
    found = both.report()
    assert (found.compared, found.ours, found.beyond) == (5, 0, 0) and found.is_clean
    assert 0 < found.worst_out < 0.03


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out, lse: out[1].mul_(1.2),
        lambda out, lse: out[0, 0, 0].fill_(torch.nan),
        lambda out, lse: lse.add_(0.1),
        lambda out, lse: lse[0].fill_(torch.nan),
    ],
    ids=["out", "nan", "lse", "nan in lse"],
)
def test_a_difference_rolls_back(spoil):
    both = Rollout(Counted(), Counted(spoil), shadow=1.0, share=1.0)
    both(**arguments())
    found = both.report()
    assert found.beyond == 1 and "rolled back: 1 of 1 comparisons" in str(found)
    ours = both._ours
    before = ours.calls
    both(**arguments())
    assert ours.calls == before
    assert incidents.counts() == {("rolled_back", "rollout"): 1} and incidents.state()[0] == "degraded"
    both.resume()
    assert incidents.state()[0] == "ok"
    both(**arguments())
    assert ours.calls == before + 1


def test_empty_rows_of_two_conventions_agree():
    def plus(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = openmla.decode(**given)
        return out, torch.where(lse == -torch.inf, torch.inf, lse)

    given = arguments()
    given["cache_seqlens"][0] = 0
    both = Rollout(plus, openmla.decode, shadow=1.0)
    both(**given)
    assert both.report().is_clean


def test_an_exception_of_ours_costs_nobody_a_request():
    def broken(**given: Any) -> Any:
        raise RuntimeError("not today")

    both = Rollout(Counted(), broken, share=1.0)
    out, _ = both(**arguments())
    assert torch.equal(out, openmla.decode(**arguments())[0])
    assert "ours raised RuntimeError: not today" in both.report().stopped

    def lost(**given: Any) -> Any:
        raise DeviceLostError("cuda:0", "x")

    with pytest.raises(DeviceLostError):  # theirs would fail too, and hide it
        Rollout(Counted(), lost, share=1.0)(**arguments())


def test_another_shape_is_a_difference():
    both = Rollout(Counted(), lambda **given: (torch.zeros(1), torch.zeros(1)), shadow=1.0)
    both(**arguments())
    assert "ours returned (1,)" in both.report().stopped


def test_misuse():
    with pytest.raises(ConfigError, match=r"share must be between 0 and 1, got 5"):
        Rollout(Counted(), Counted(), share=5)
