"""OPENMLA_CHECKS: off, fast, device and strict; and that a bad value is named by tensor, row, column and value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fragile import arguments, forget

import openmla
from openmla.core import env, faults, incidents
from openmla.core.errors import ConfigError, ProblemError
from openmla.core.faults import Fault
from openmla.ops.append import append


@pytest.fixture(autouse=True)
def _clean():
    forget()
    faults.findings()
    yield
    forget()


def sparse(per_token: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "q": torch.randn(2, 3, 4, 64, generator=generator).bfloat16(),
        "kv_cache": torch.randn(3, 5, 1, 64, generator=generator).bfloat16(),
        "indices": torch.randint(15, (2, 3, 9), generator=generator, dtype=torch.int32),
        "topk_length": torch.full((2, 3) if per_token else (2,), 9, dtype=torch.int32),
        "d_v": 32,
    }


CASES = [
    ("decode", "block_table", (1, 1), 99, Fault.PAGE_OUT_OF_RANGE, "a page id is in [0, 4)"),
    ("decode", "block_table", (0, 0), -1, Fault.PAGE_OUT_OF_RANGE, "a page id is in [0, 4)"),
    ("decode", "cache_seqlens", (1,), -3, Fault.LENGTH_NEGATIVE, "a length is in [0, 32]"),
    ("decode", "cache_seqlens", (0,), 33, Fault.LENGTH_OVER_CAPACITY, "a length is in [0, 32]"),
    ("sparse_decode", "indices", (1, 2, 8), 15, Fault.INDEX_OUT_OF_RANGE, "an index is -1 or in [0, 15)"),
    ("sparse_decode", "indices", (0, 0, 0), -2, Fault.INDEX_OUT_OF_RANGE, "an index is -1 or in [0, 15)"),
    ("sparse_decode", "topk_length", (1,), 10, Fault.TOPK_LENGTH_OUT_OF_RANGE, "a topk_length is in [0, 9]"),
    ("sparse_prefill", "indices", (2, 0, 3), 7, Fault.INDEX_OUT_OF_RANGE, "an index is -1 or in [0, 7)"),
    ("prefill", "cu_seqlens_q", (2,), 4, Fault.CU_SEQLENS_NOT_MONOTONE, "offsets rise from 0 to 5"),
    ("prefill", "cu_seqlens_k", (2,), 6, Fault.CU_SEQLENS_NOT_MONOTONE, "offsets rise from 0 to 7"),
]


def given_for(op: str) -> dict[str, Any]:
    if op == "decode":
        return arguments()
    if op == "sparse_decode":
        return sparse()
    if op == "sparse_prefill":
        kv = torch.ones(7, 1, 64).bfloat16()
        indices = torch.zeros(3, 1, 6, dtype=torch.int32)
        return {"q": torch.ones(3, 4, 64).bfloat16(), "kv": kv, "indices": indices, "d_v": 32}
    q, k = torch.ones(5, 4, 16).bfloat16(), torch.ones(7, 4, 16).bfloat16()
    cu_q, cu_k = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 3, 7], dtype=torch.int32)
    return {"q": q, "k": k, "v": k, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 5, "max_seqlen_k": 7}


@pytest.mark.parametrize(("op", "name", "place", "value", "fault", "rule"), CASES)
def test_device_names_the_culprit_and_strict_raises_before_the_launch(monkeypatch, op, name, place, value, fault, rule):
    given = given_for(op)
    call = getattr(openmla, op)
    monkeypatch.setenv("OPENMLA_CHECKS", "device")
    call(**given)
    assert openmla.check_errors() == () and faults.findings() == ()
    given[name][place] = value
    call(**given)
    assert openmla.check_errors() == (fault,)
    (found,) = faults.findings()
    assert (found.op, found.tensor, found.place, found.value, found.fault) == (op, name, place, value, fault)
    assert str(found).startswith(f"{name}[{', '.join(map(str, place))}] = {value}: {rule}; ")
    monkeypatch.setenv("OPENMLA_CHECKS", "strict")
    before = incidents.counts()
    with pytest.raises(ProblemError) as caught:
        call(**given)
    assert str(found) in str(caught.value)
    assert incidents.counts() == before and openmla.check_errors() == ()  # nothing ran


def test_append_is_looked_at_too(monkeypatch):
    cache, slots = torch.zeros(2, 4, 1, 64), torch.tensor([3, -1, 7, 0])
    monkeypatch.setenv("OPENMLA_CHECKS", "strict")
    append(cache, slots, torch.ones(4, 64))
    assert cache[0, 3].all() and cache[1, 3].all() and not cache[1, 2].any()
    slots[2] = 2**40
    with pytest.raises(ProblemError, match=r"slots\[2\] = 1099511627776: a slot is -1 or in \[0, 8\)"):
        append(cache, slots, torch.ones(4, 64))
    monkeypatch.setenv("OPENMLA_CHECKS", "device")
    with pytest.raises(ProblemError):  # by the kernel, which looks as well on a CPU
        append(cache, slots, torch.ones(4, 64))
    (found,) = faults.findings()
    assert (found.op, found.tensor, found.place, found.value) == ("append", "slots", (2,), 2**40)


def test_more_than_one_bad_value_is_counted_and_each_tensor_is_named(monkeypatch):
    monkeypatch.setenv("OPENMLA_CHECKS", "strict")
    given = sparse(per_token=True)
    given["indices"][:, 1, 2:5] = 77
    given["topk_length"][1, 2] = -1
    with pytest.raises(ProblemError) as caught:
        openmla.sparse_decode(**given)
    assert len(caught.value.violations) == 2
    assert "indices[0, 1, 2] = 77 (and 5 more)" in str(caught.value)
    assert "topk_length[1, 2] = -1" in str(caught.value)


def test_values_that_nobody_reads_are_not_looked_at(monkeypatch):
    monkeypatch.setenv("OPENMLA_CHECKS", "strict")
    given = arguments()
    given["cache_seqlens"][:] = 16  # one page of two
    given["block_table"][:, 1] = -77
    openmla.decode(**given)
    given = sparse()
    given["topk_length"][:] = 4
    given["indices"][..., 4:] = 2**31 - 1
    openmla.sparse_decode(**given)


@pytest.mark.parametrize("mode", ["off", "fast", "device", "strict"])
def test_every_mode_has_the_same_bits(monkeypatch, mode):
    given = arguments()
    want = openmla.decode(**given)
    monkeypatch.setenv("OPENMLA_CHECKS", mode)
    got = openmla.decode(**given)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    monkeypatch.setenv("OPENMLA_CHECKS", "stict")
    with pytest.raises(ConfigError, match="off, fast, device, strict"):
        openmla.decode(**given)


def test_off_drops_what_costs_time_per_call_and_keeps_what_choosing_needs(monkeypatch):
    given = arguments()
    overlapping = given["q"][..., :32]
    with pytest.raises(ProblemError, match="must not overlap"):
        openmla.decode(**given, out=overlapping)
    monkeypatch.setenv("OPENMLA_CHECKS", "off")
    openmla.decode(**given, out=overlapping)
    with pytest.raises(ProblemError, match="block_table must have batch"):
        openmla.decode(**{**given, "block_table": given["block_table"][:1]})
    bad = arguments()
    bad["cache_seqlens"][0] = -1
    openmla.decode(**bad)  # guards inside kernels stay
    assert openmla.check_errors() == (Fault.LENGTH_NEGATIVE,)


def test_an_out_that_overlaps_itself_is_refused():
    given = arguments()
    with pytest.raises(ProblemError, match="one place per element"):
        openmla.decode(**given, out=torch.zeros(1, 1, 4, 32).bfloat16().expand(2, 1, 4, 32))
    wide = torch.zeros(2, 1, 4, 40).bfloat16()
    openmla.decode(**given, out=wide[..., :32])


def test_the_environment_is_read_anew_in_every_call(monkeypatch):
    for value in ("fast", "strict", "fast"):
        monkeypatch.setenv("OPENMLA_CHECKS", value)
        assert env.CHECKS.read() == value
    monkeypatch.delenv("OPENMLA_CHECKS")
    assert env.CHECKS.read() == "fast"
