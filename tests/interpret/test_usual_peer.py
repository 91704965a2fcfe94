"""The usual Triton kernel, the laboratory's yardstick: right, or its times would mean nothing."""

import dataclasses

import pytest
import torch

from openmla.core.target import Target
from openmla.lab import gate, peers, workload
from openmla.lab.suite import Case

CASE = Case(batch=3, s_k=70, h_q=20, d_qk=80, d_v=64, dtype="fp16", page_size=16)


@pytest.mark.parametrize(
    "case",
    [CASE, dataclasses.replace(CASE, lengths="varlen", dtype="fp32"), dataclasses.replace(CASE, s_k=2, page_size=1)],
    ids=["fixed", "varlen", "fewer-keys-than-splits"],
)
def test_it_passes_the_gate(case):
    sets = [workload.decode_inputs(case, torch.device("cpu"), index) for index in range(2)]
    contender = peers.peer(case, sets, Target.detect("cpu"), "triton_usual")
    assert isinstance(contender, peers.Contender), contender
    for index, inputs in enumerate(sets):
        verdict = gate.check(case, inputs, *contender.call(index))
        assert verdict.is_green, verdict.text


def test_it_says_every_reason():
    case = dataclasses.replace(CASE, s_q=2, h_q=4, h_kv=2, d_v=60, dtype="bf16")
    refusal = peers.peer(case, [], Target.detect("cpu"), "triton_usual")
    for part in ("multiplies bf16 wrongly", "one query token", "one KV head", "powers of two of at least 16"):
        assert part in refusal.reason
