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


def test_a_card_without_a_number_is_the_current_one(monkeypatch) -> None:
    """Tensors are on "cuda:1"; asked for "cuda", nothing would be found under that name."""
    word = torch.full((1,), int(faults.Fault.CU_SEQLENS_NOT_MONOTONE), dtype=torch.int32)
    monkeypatch.setattr(faults, "_words", {torch.device("cuda", 1): word})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert faults.check_errors("cuda:0") == ()
    assert faults.check_errors("cuda") == (faults.Fault.CU_SEQLENS_NOT_MONOTONE,)
    assert int(word) == 0
