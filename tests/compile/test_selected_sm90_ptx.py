"""Sparse prefill in its own order, run: the PTX that Triton makes of `selected_sm90`, on a CPU, against the oracle."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ptx_grid import GridCta
from ptx_lanes import Lanes
from ptx_machine import Cta
from ptx_program import SHARED, TYPES, Memory, parse
from test_triton import Recorder, compiled, pytestmark  # noqa: F401

from openmla.backends.base import SparsePrefillOperands
from openmla.backends.triton import SPARSE_PREFILL, config, launch
from openmla.core.problem import SparsePrefillProblem
from openmla.core.target import Target
from openmla.testing import budget
from openmla.testing.cases import Case

H100 = Target.preset("h100_sxm")


class TritonCta(GridCta):
    """A CTA of a kernel that Triton compiled."""

    def reader(self, operand: str, kind: str) -> Any:
        if operand == "global_smem":
            return lambda warp: np.full(32, SHARED, TYPES[kind])
        return super().reader(operand, kind)

    def do_bfe(self, p: list[str], o: list[str]) -> Any:
        write, value, first, count = self.writer(o[0]), self.reader(o[1], "u32"), int(o[2]), int(o[3])

        def run(warp: Any, mask: np.ndarray) -> None:
            found = value(warp).astype(np.int64) >> first & (1 << count) - 1
            if p[-1] == "s32":
                found = np.where(found >> count - 1 & 1, found - (1 << count), found)
            write(warp, mask, found.astype(TYPES[p[-1]]))

        return run

    def do_cp(self, p: list[str], o: list[str]) -> Any:
        return Cta.do_cp(self, p, o)  # copies land at their wait, not at once

    def do_shfl(self, p: list[str], o: list[str]) -> Any:
        return Lanes.do_shfl(self, p, o) if p[2] == "idx" else super().do_shfl(p, o)

    def do_bar(self, p: list[str], o: list[str]) -> Any:
        return super().do_bar(p, o[:1] if o[0] == "0" else o)

    def do_red(self, p: list[str], o: list[str]) -> Any:
        return self.do_atom(p, ["%unused", *o])

    def do_ret(self, p: list[str], o: list[str]) -> Any:
        leave = super().do_ret(p, o)

        def run(warp: Any, mask: np.ndarray) -> bool:
            assert not warp.copies and not any(warp.committed) and not any(warp.groups), "work in flight at the end"
            return leave(warp, mask)

        return run


class Emulated(Recorder):
    """Stands where the kernel stands in `launch`, and runs it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        record = super().__getitem__(grid)

        def run(*arguments: Any, **options: Any) -> None:
            record(*arguments, **options)
            source, _ = self.source()
            text = re.sub(r"^\s*\.(loc|file|section)[^\n]*$", "", compiled(self, "h100_sxm").asm["ptx"], flags=re.M)
            program = parse(text.replace("[ ", "[").replace(" + 0 ]", "]").replace(" ]", "]"))
            memory, given = Memory(), dict(zip(self.kernel.arg_names, arguments, strict=False))
            values = [
                np.array([memory.place(value)], np.uint64).tobytes() if isinstance(value, torch.Tensor)
                else np.array([value], np.float32 if isinstance(value, float) else np.int32).tobytes()
                for name, value in given.items() if source.signature[name] != "constexpr"
            ]  # fmt: skip
            values += [bytes(8)] * (len(program.params) - len(values))  # scratch that nobody asked for
            cta = TritonCta(
                program, memory, dict(zip(program.params, values, strict=True)), 256, H100.smem_bytes - 1024
            )
            for block in range(grid[0]):
                cta.run((block, 0, 0), seed=block)
            memory.read_back()

        return run


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a case in the kernel and holds it against the oracle; returns (operands, fault word)."""
    if not config.has_gluon():
        pytest.skip("this Triton has no Gluon for Hopper")
    kernel = Emulated(launch.sm90_kernel())
    monkeypatch.setattr(launch, "sm90_kernel", lambda: kernel)

    def judge(case: Case) -> int:
        given = case.tensors()
        problem = SparsePrefillProblem.from_tensors(
            *(given[name] for name in ("q", "kv", "indices")),
            **{name: given[name] for name in ("d_v", "topk_length", "attn_sink", "softmax_scale")},
        )
        rows = given["q"].shape[:2]
        operands = SparsePrefillOperands(
            given["q"], given["kv"], given["indices"], given["softmax_scale"], torch.full((*rows, 512), 7.0, dtype=case.dtype),
            torch.full(rows, 7.0), torch.full(rows, 7.0), torch.zeros(1, dtype=torch.int32), given["topk_length"],
            given["attn_sink"],
        )  # fmt: skip
        choice = SPARSE_PREFILL.configs(problem, H100)[0]
        SPARSE_PREFILL.launch(SPARSE_PREFILL.compile(problem, choice, H100), problem, operands, None)
        assert kernel.grid, "the portable kernel ran"
        report = budget.check(
            operands.out, operands.lse, case.golden(given), dtype=case.dtype, max_logits=operands.max_logits
        )
        report.require(str(case))
        return int(operands.fault_word)

    return judge


CASE = Case(
    op="sparse_prefill", seed=2, family="unit", dtype=torch.bfloat16, h_q=72, h_kv=1, d_qk=576, d_v=512,
    softmax_scale=0.3, seqlens_q=(1,), seqlens_k=(300,), topk=150, invalid_share=0.2, has_sink=True,
)  # fmt: skip


def test_hidden_keys_and_half_a_tile_of_heads(judged):
    assert judged(CASE) == 8


def test_peaks_that_move_negative_scores_lengths_and_nan(judged):
    case = replace(CASE, h_q=64, seqlens_q=(3,), softmax_scale=-1.0, has_topk_length=True, nan_tokens=True)
    assert judged(case) & 8
