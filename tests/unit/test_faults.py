"""The fault word outlives the call, thread and autograd mode that made it."""

from __future__ import annotations

import torch

from openmla.core import faults


def test_word_made_in_inference_mode_can_be_written_outside(monkeypatch) -> None:
    monkeypatch.setattr(faults, "_words", {})
    with torch.inference_mode():
        word = faults.fault_word(torch.device("cpu"))
    word |= int(faults.Fault.LENGTH_NEGATIVE)
    assert faults.check_errors("cpu") == (faults.Fault.LENGTH_NEGATIVE,)
    assert faults.check_errors("cpu") == ()
