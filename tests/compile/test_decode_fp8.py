"""Every variant of the FP8 decode: compiled for sm_90a without a GPU, no spills, products not waited for one by one."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from openmla.backends.cute.decode_dense import config as dense
from openmla.backends.cute.decode_fp8 import config as coded
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target

H100 = Target.preset("h100_sxm")


def problem(**changes):
    base = DecodeProblem(
        batch=4, s_q=1, total_q=4, h_q=128, h_kv=1, d_qk=576, d_v=512, dtype=torch.float8_e4m3fn,
        layout=kv_layout("fp8_576"), page_size=64, num_pages=100, max_pages=20,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.mark.parametrize("config", coded.VARIANTS, ids=lambda config: config.name)
def test_variant_compiles_within_budget(config, tmp_path):
    pytest.importorskip("cutlass")
    from openmla.backends.cute.decode_fp8.kernel import REGISTERS
    from openmla.backends.cute.decode_fp8.launch import build
    from openmla.backends.cute.toolchain import disassemble

    compiled = build(config, tmp_path)
    resources = compiled.resources
    assert resources.spills == 0, resources
    assert resources.dynamic_smem_bytes + resources.static_smem_bytes <= dense.SMEM_LIMIT, resources
    sass = disassemble(compiled.cubin_path)
    # 18 steps of 32 columns per score, where pieces begin and where they go on; 4 x 64 columns x 64 keys of O per term
    assert len(re.findall("QGMMA", sass)) == 2 * 18 + 8 * config.terms
    # More would mean that the assembler waits for wgmmas one by one (its remarks C7510 to C7517).
    assert resources.sass["WARPGROUP"] <= 13, resources
    for_scores, for_values, for_loads = REGISTERS
    assert for_scores + 2 * for_values + for_loads == 512  # x 128 threads = 65,536
    roles = re.findall(r"USETMAXREG\S*\s+(?:UP0, )?(0x[0-9a-f]+)", sass)
    assert sorted(int(value, 16) for value in roles) == sorted(REGISTERS)


def test_supported_problems_get_an_ahead_of_time_variant():
    for s_q in (1, 2, 4):
        for h_q in (1, 16, 64, 100, 128):
            for page_size in (1, 16, 48, 63, 64, 128):
                asked = problem(s_q=s_q, total_q=4 * s_q, h_q=h_q, page_size=page_size)
                assert coded.supports(asked, H100)
                (config,) = coded.configs(asked, H100)
                assert config in coded.VARIANTS
                assert page_size % config.box_rows == 0 and config.page_size in (0, page_size)
                assert dense.row_blocks(asked) % config.cluster == 0


def test_many_rows_over_few_keys_are_four_groups():
    few = problem(batch=1, total_q=1, max_pages=64)
    (config,) = coded.configs(few, H100)
    assert (config.rows, config.cluster) == (32, 1) and config in coded.VARIANTS
    assert coded.grouped(few, config).h_kv == 4
    half = replace(few, h_q=64)
    assert coded.configs(half, H100)[0].rows == 16 and coded.grouped(half, coded.configs(half, H100)[0]).h_kv == 4
    for changes in (
        {"max_pages": 4096}, {"batch": 128}, {"h_q": 100}, {"h_q": 16}, {"s_q": 2, "total_q": 2}, {"page_size": 128},
        {"is_varlen": True}, {"is_batch_invariant": True},
    ):  # fmt: skip
        asked = replace(few, **changes)
        assert coded.grouped(asked, coded.configs(asked, H100)[0]) == asked, changes


def test_a_variant_chosen_for_more_keys_keeps_its_rows_on_few():
    many, few = problem(batch=4, max_pages=4096), problem(batch=1, total_q=1, max_pages=2)
    (config,) = coded.configs(many, H100)
    seen = coded.grouped(few, config)
    assert seen == few
    blocks = -(-dense.row_blocks(seen) // config.cluster) * config.cluster
    assert blocks * seen.h_kv * dense.num_parts(seen, H100) <= H100.num_sms


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"dtype": torch.bfloat16}, "q in bfloat16"),
        ({"layout": kv_layout("fp8_656")}, "fp8_656"),
        ({"batch": 5000}, "batch"),
        ({"s_q": 100}, "132 SMs"),
    ],
)
def test_refusal_names_the_reason(changes, word):
    verdict = coded.supports(problem(**changes), H100)
    assert not verdict
    assert any(word in reason for reason in verdict.reasons), verdict
    assert any("sm_80" in reason for reason in coded.supports(problem(), Target.preset("a100_sxm")).reasons)
