"""Every variant of the few-row decode, the device plan and the combine: compiled for sm_90a without a GPU, within budget."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openmla.backends.cute.decode_dense_small import config as small
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target

pytest.importorskip("cutlass")

BUDGETS = tomllib.loads(Path(__file__).with_name("budgets_small.toml").read_text(encoding="utf-8"))
H100 = Target.preset("h100_sxm")


def problem(**changes):
    base = DecodeProblem(
        batch=4, s_q=1, total_q=4, h_q=16, h_kv=1, d_qk=576, d_v=512, dtype=torch.bfloat16,
        layout=kv_layout("bf16_576"), page_size=64, num_pages=100, max_pages=20,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.mark.parametrize("config", small.VARIANTS, ids=lambda config: config.name)
def test_variant_compiles_within_budget(config, tmp_path):
    from openmla.backends.cute.decode_dense_small.launch import build

    resources = build(config, tmp_path).resources
    budget = BUDGETS["decode_dense_small"][f"n{config.rows}"]
    assert resources.spills == 0, resources
    assert resources.registers <= budget["registers"], resources
    assert resources.dynamic_smem_bytes <= min(budget["smem_bytes"], small.SMEM_LIMIT), resources
    # 18 + 18 score and 16 value instructions per tile (16 + 16 with 512 columns); one bulk load per eight rows
    assert resources.sass["HGMMA"] >= config.d_qk // 16 + 16, resources
    assert resources.sass["UTMALDG"] == 8, resources


@pytest.mark.parametrize("columns", [512, 128])
@pytest.mark.parametrize("dtype", ["BFloat16", "Float16"])
def test_combine_compiles_within_budget(columns, dtype, tmp_path):
    import cutlass

    from openmla.backends.cute import combine
    from openmla.backends.cute.toolchain import compile_kernel

    element = getattr(cutlass, dtype)
    code = combine.Combine(element, columns)
    resources = compile_kernel(code, combine.fake_arguments(element), "combine", out_dir=tmp_path).resources
    assert resources.spills == 0, resources
    assert resources.registers <= BUDGETS["combine"]["registers"], resources
    assert resources.dynamic_smem_bytes <= BUDGETS["combine"]["smem_bytes"], resources


def test_device_plan_compiles_within_budget(tmp_path):
    from openmla.backends.cute import schedule
    from openmla.backends.cute.toolchain import compile_kernel

    compiled = compile_kernel(schedule.DecodePlan(), schedule.fake_arguments(), "decode_plan", out_dir=tmp_path)
    assert compiled.resources.spills == 0, compiled.resources
    assert compiled.resources.registers <= BUDGETS["decode_plan"]["registers"], compiled.resources
    assert compiled.resources.dynamic_smem_bytes <= BUDGETS["decode_plan"]["smem_bytes"], compiled.resources


def test_names_are_unique():
    assert len({config.name for config in small.VARIANTS}) == len(small.VARIANTS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"h_q": 64, "max_pages": 4000}, "32 query rows"),
        ({"s_q": 3, "total_q": 12}, "32 query rows"),
        ({"page_size": 12}, "multiple of 8"),
        ({"d_v": 256}, "d_v 512"),
        ({"batch": 5000, "total_q": 5000}, "batch of 1 to 4096"),
        ({"window": 100}, "sliding-window"),
        ({"is_varlen": True}, "cu_seqlens_q"),
        ({"layout": kv_layout("fp8_656")}, "bf16 and fp16 caches"),
    ],
)
def test_a_refusal_names_its_reason(changes, reason):
    verdict = small.supports(problem(**changes), H100)
    assert not verdict
    assert any(reason in why for why in verdict.reasons), verdict.reasons


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"h_q": 1},
        {"h_q": 5, "s_q": 3, "total_q": 12, "is_causal": True},
        {"h_q": 32, "h_kv": 2},
        {"h_q": 32, "has_sink": True},
        {"dtype": torch.float16, "layout": kv_layout("fp16_512"), "d_qk": 512},
        {"page_size": 8},
    ],
)
def test_supported_problems_have_a_compiled_variant(changes):
    asked = problem(**changes)
    assert small.supports(asked, H100)
    chosen = small.configs(asked, H100)
    assert chosen
    assert all(config in small.VARIANTS for config in chosen)
    assert chosen[0].rows >= small.rows_per_kv_head(asked)


def test_other_targets_are_refused():
    assert not small.supports(problem(), Target.preset("a100_sxm"))


def test_workspace_is_fixed_by_the_problem():
    asked = problem(h_q=32, h_kv=2)
    chosen = small.configs(asked, H100)[0]
    parts = small.num_parts(asked, H100)
    assert parts == 66
    room = small.workspace(asked, chosen, parts, "balanced", 4096)
    assert room.out_accum == (4 + 66, 2 * 16 * 512)
    assert room.lse_accum == (4 + 66, 2 * 16 * 2)
    assert room.counters == (2, 8, 1)
    chunked = small.workspace(asked, chosen, parts, "batch_invariant", 256)
    assert chunked.out_accum[0] == 4 * 5


def test_too_many_chunks_are_refused():
    asked = problem(max_pages=10_000)
    with pytest.raises(ValueError, match="longer chunks"):
        small.workspace(asked, small.configs(asked, H100)[0], 132, "batch_invariant", 64)


def shares(rows, holders):
    """Emulates `merge`: for each holder of `count` pieces, the (unit, warp) pairs of its turns."""
    pieces = sum(holders)
    units = 32 * ((rows + 7) // 8)
    split = 0
    for count in holders:
        team, turns = 1, count
        if units <= 4 * pieces:
            team = 8 if units <= pieces else 4 if units <= 2 * pieces else 2
        else:
            turns = ((units + pieces - 1) // pieces * count + 7) // 8
        done = []
        for turn in range(turns):
            for leader in range(0, 8, team):
                index = turn * (8 // team) + leader // team
                unit = split + index * pieces
                if count > 1:
                    unit = split + index % count + (index // count) * pieces
                if unit < units:
                    done.append(unit)
        yield done
        split += count


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 32])
@pytest.mark.parametrize(
    "holders", [[1, 1], [1] * 3, [1] * 33, [1] * 64, [1] * 132, [2, 1], [4] * 5, [7, 8, 8], [1, 100], [13] * 78]
)
def test_every_unit_of_a_merge_has_one_owner(rows, holders):
    owned = sorted(unit for done in shares(rows, holders) for unit in done)
    assert owned == list(range(32 * ((rows + 7) // 8)))


def test_scores_reach_shared_memory_transposed():
    """P goes from accumulators (key, row pair) to [row][key] by stmatrix.trans; the swizzle is the one wgmma reads."""
    stored = {}
    for warp in range(4):
        for lane in range(16):  # lanes 0 to 7 address the first 8x8 matrix, 8 to 15 the second
            row, chunk = lane % 8, (warp * 2 + lane // 8) ^ (lane % 8)
            for key in range(8):  # transposed: the matrix's column is the row in memory, its row the place in it
                stored[row * 128 + chunk * 16 + key * 2] = (row, warp * 16 + lane // 8 * 8 + key)
    for row in range(8):
        for key in range(64):
            byte = row * 128 + key * 2
            assert stored[byte ^ ((byte >> 7 & 7) << 4)] == (row, key)
