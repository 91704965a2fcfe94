"""Every variant of the few-row decode, the device plan and the combine: compiled for sm_90a without a GPU, within budget."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from openmla.backends.cute.decode_dense_small import config as small
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.split.schedule import plan_decode, ranges_needed

pytest.importorskip("cutlass")

BUDGETS = tomllib.loads(Path(__file__).with_name("budgets_small.toml").read_text(encoding="utf-8"))
H100 = Target.preset("h100_sxm")
WIDE = {"h_q": 64, "batch": 128, "total_q": 128, "max_pages": 384, "num_pages": 128 * 256}


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
    kind = (
        "_pairs"
        if config.pairs
        else ""
        if config.layout == "plain"
        else "_codes_alone"
        if config.stages == small.LONE_STAGES
        else "_codes"
    )
    budget = BUDGETS["decode_dense_small"][f"n{config.rows}{kind}"]
    assert resources.spills == 0, resources
    assert resources.registers <= budget["registers"], resources
    assert resources.dynamic_smem_bytes <= min(budget["smem_bytes"], small.SMEM_LIMIT), resources
    # 18 score and 16 value instructions per tile and warpgroup (16 with 512 columns), for codes those of single warps
    # instead; one bulk load in a loop, of rows two, of rows that index lists name sixteen at once and one
    scores = config.d_qk // (16 if config.rows == 64 else 32)  # with 64 rows each warpgroup multiplies all columns
    assert resources.sass["HGMMA"] == (scores + 16 if config.layout == "plain" else 0), resources
    assert resources.sass["UTMALDG"] == (config.layout == "plain"), resources
    assert resources.sass["UBLKCP"] == (0 if config.layout == "plain" else 17 if config.gathers else 2), resources


def test_two_ctas_of_codes_fit_on_an_sm():
    found = {
        (config.rows, config.stages): config.ctas_per_sm for config in small.VARIANTS if config.layout == "fp8_656"
    }
    assert found == {(16, 2): 2, (16, 4): 1, (32, 3): 1}
    reserved = 1024  # by the driver, of each CTA
    assert 2 * (BUDGETS["decode_dense_small"]["n16_codes"]["smem_bytes"] + reserved) <= small.SMEM_LIMIT + reserved
    # the registers of 18 warps lie in four parts of 16,384: five warps of the fullest one
    assert 5 * 32 * BUDGETS["decode_dense_small"]["n16_codes"]["registers"] <= 16384


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
        ({**WIDE, "batch": 127, "total_q": 127}, "64 of 128 and more requests"),
        ({**WIDE, "max_pages": 383}, "tables of 24576 tokens"),
        ({**WIDE, "num_pages": 128 * 192 - 1}, "cache of 12288 to 24576 tokens per request"),
        ({**WIDE, "num_pages": 128 * 384 + 1}, "cache of 12288 to 24576 tokens per request"),
        ({**WIDE, "h_q": 65}, "32 query rows"),
        ({**WIDE, "page_size": 12, "max_pages": 4000}, "32 query rows"),
        ({**WIDE, "window": 4096}, "32 query rows"),
        ({**WIDE, "is_batch_invariant": True}, "32 query rows"),
        ({**WIDE, "layout": kv_layout("fp8_656")}, "32 query rows"),
        ({"total_q": 0}, "at least one query"),
        ({"d_v": 256}, "d_v 512"),
        ({"batch": 5000, "total_q": 5000}, "batch of 1 to 4096"),
        ({"layout": kv_layout("fp8_584"), "d_qk": 512}, "fp8_656 and fp8_528 with q in bf16; this is fp8_584"),
        ({"layout": kv_layout("fp8_656"), "dtype": torch.float16}, "with q in float16"),
    ],
)
def test_a_refusal_names_its_reason(changes, reason):
    verdict = small.supports(problem(**changes), H100)
    assert not verdict
    assert any(reason in why for why in verdict.reasons), verdict.reasons


def test_64_rows_are_taken_where_memory_is_slow_enough_and_known():
    assert small.supports(problem(**WIDE), H100)
    for gbps in (4000, 4800, 0):
        verdict = small.supports(problem(**WIDE), replace(H100, hbm_gbps=gbps))
        assert any("a card of less than 4000 GB/s" in why for why in verdict.reasons), verdict.reasons


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"h_q": 1},
        {"h_q": 5, "s_q": 3, "total_q": 12, "is_causal": True},
        {"h_q": 32, "h_kv": 2},
        {"h_q": 32, "has_sink": True},
        WIDE,
        {**WIDE, "h_q": 20, "s_q": 3, "total_q": 384, "page_size": 24, "max_pages": 1024, "num_pages": 128 * 700},
        {"dtype": torch.float16, "layout": kv_layout("fp16_512"), "d_qk": 512},
        {"page_size": 8},
        {"layout": kv_layout("fp8_656"), "h_q": 32},
        {"layout": kv_layout("fp8_656"), "batch": 128, "total_q": 128, "max_pages": 256},
        {"layout": kv_layout("fp8_528"), "d_qk": 512, "page_size": 3},
        {"page_size": 1},
        {"page_size": 12, "window": 100},
        {"is_varlen": True, "s_q": 2, "total_q": 5},
    ],
)
def test_supported_problems_have_a_compiled_variant(changes):
    asked = problem(**changes)
    assert small.supports(asked, H100)
    chosen = small.configs(asked, H100)
    assert chosen
    assert all(config in small.VARIANTS for config in chosen)
    assert chosen[0].rows >= small.rows_per_kv_head(asked)


@pytest.mark.parametrize(
    ("changes", "is_paired"),
    [
        ({"h_q": 128, "batch": 1, "total_q": 1, "max_pages": 64}, True),
        ({"h_q": 128, "batch": 1, "total_q": 1, "max_pages": 16}, False),  # a tile for each part, and no more
        ({"h_q": 128, "max_pages": 16}, True),
        ({"h_q": 128, "batch": 1, "total_q": 1, "max_pages": 63}, False),  # nor where it has fewer than four
        ({"h_q": 64, "batch": 1, "total_q": 1, "max_pages": 64}, False),
        ({"h_q": 64, "batch": 1, "total_q": 1, "max_pages": 128}, True),
        ({"h_q": 48}, False),  # three groups
        ({"h_q": 32}, False),
        ({"h_q": 128, "layout": kv_layout("fp8_656")}, False),
        ({"h_q": 128, "is_batch_invariant": True}, False),
    ],
)
def test_two_groups_share_the_tiles_of_a_part_that_has_several(changes, is_paired):
    asked = problem(**changes)
    assert small.is_paired(asked, H100) == is_paired
    if small.supports(asked, H100):
        chosen = small.configs(asked, H100)[0]
        assert chosen.pairs == is_paired
        assert chosen in small.VARIANTS
        assert small.workspace(asked, chosen, 16, "balanced", 4096).exchange[2] == chosen.rows * chosen.words_per_row


def test_other_targets_are_refused():
    assert not small.supports(problem(), Target.preset("a100_sxm"))


def test_workspace_is_fixed_by_the_problem():
    asked = problem(h_q=32, h_kv=2)
    chosen = small.configs(asked, H100)[0]
    parts = small.num_parts(asked, H100)
    assert parts == 64
    room = small.workspace(asked, chosen, parts, "balanced", 4096)
    assert room.exchange == (2, 4 + 64, 16 * 328)
    chunked = small.workspace(asked, chosen, parts, "batch_invariant", 256)
    assert chunked.exchange[1] == 4 * 5
    windowed = small.workspace(problem(window=200), chosen, parts, "batch_invariant", 256)
    assert windowed.exchange[1] == 4 * 2  # 200 keys and the rest of their first tile


@pytest.mark.parametrize(("h_kv", "parts"), [(1, 128), (2, 64), (4, 32), (8, 16), (3, 44), (16, 8), (132, 1)])
def test_parts_fit_on_the_machine_and_divide_usual_batches(h_kv, parts):
    assert small.num_parts(problem(h_q=h_kv, h_kv=h_kv), H100) == parts
    assert parts * h_kv <= H100.num_sms


@pytest.mark.parametrize(("h_kv", "parts", "merge"), [(1, 132, 13), (2, 66, 19), (4, 33, 32)])
def test_wide_plans_take_every_sm_and_pay_for_partials(h_kv, parts, merge):
    asked = problem(**{**WIDE, "h_q": 64 * h_kv, "h_kv": h_kv})
    config = small.configs(asked, H100)[0]
    assert small.num_parts(asked, H100) == parts
    told = small.splitting(asked, config, parts)
    assert (told.merge_blocks, told.merge_from) == (merge, 1)
    assert small.workspace(asked, config, parts, "balanced", 8192).exchange == (h_kv, 128 + parts, 64 * 328)
    assert small.splitting(problem(), small.configs(problem(), H100)[0], 128) == small.Splitting()


def test_equal_requests_of_a_wide_plan_stay_whole_and_long_ones_are_cut():
    asked = problem(**WIDE)
    parts = small.num_parts(asked, H100)
    told = small.splitting(asked, small.configs(asked, H100)[0], parts)
    plans = [
        plan_decode(
            lengths, parts, overhead_blocks=small.WIDE_OVERHEAD_BLOCKS, merge_blocks=told.merge_blocks,
            margin=told.margin, merge_from=told.merge_from, ranges=ranges_needed(128, parts),
        )
        for lengths in ([24576] * 128, [24128 + 64 * (i % 7) for i in range(128)], [2000 + 180 * i for i in range(128)])
    ]  # fmt: skip
    assert [plan.num_pieces for plan in plans[:2]] == [128, 128]
    assert all(begin >= end for plan in plans for begin, end, *_ in plan.parts), "dealt, not cut evenly"
    assert 128 < plans[2].num_pieces < 200


def test_too_many_chunks_are_refused():
    asked = problem(max_pages=10_000)
    with pytest.raises(ValueError, match="longer chunks"):
        small.workspace(asked, small.configs(asked, H100)[0], 132, "batch_invariant", 64)


def shares(rows, holders, error):
    """Emulates `share` in fp32: the units of each holder of `count` pieces. `error`: of the approximate reciprocal."""
    f = np.float32
    pieces, units = sum(holders), 32 * ((rows + 7) // 8)
    inverse = np.nextafter(f(1) / f(pieces), f(error)) if error is not None else f(1) / f(pieces)
    per_piece, margin = f(units) * inverse, f(0.5) * inverse
    split = 0
    for count in holders:
        yield range(int(f(split) * per_piece + margin), int(f(split + count) * per_piece + margin))
        split += count


@pytest.mark.parametrize("error", [None, 0, 2])
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 32])
@pytest.mark.parametrize(
    "holders", [[1, 1], [1] * 3, [1] * 33, [1] * 64, [1] * 132, [2, 1], [4] * 5, [7, 8, 8], [1, 100], [13] * 78]
)
def test_every_unit_of_a_merge_has_one_owner(rows, holders, error):
    owned = [unit for units in shares(rows, holders, error) for unit in units]
    assert owned == list(range(32 * ((rows + 7) // 8)))


def test_shares_are_exact_for_as_many_pieces_as_there_may_be():
    for pieces in (*range(1, 200), 333, 512, 767, small.MAX_PIECES):
        for error in (None, 0, 2):
            found = [units.start for units in shares(32, [1] * pieces, error)]
            assert found == [split * 128 // pieces for split in range(pieces)]


@pytest.mark.parametrize("error", [None, 0, 2])
def test_rows_are_split_into_query_and_head_without_division(error):
    for group in range(1, 33):
        f = np.float32
        inverse = np.nextafter(f(1) / f(group), f(error)) if error is not None else f(1) / f(group)
        per_group = int(f(65536) * inverse) + 1
        assert [row * per_group >> 16 for row in range(32)] == [row // group for row in range(32)]


def test_boxes_become_keys():
    for bits in range(16):
        word = (((bits & 15) * 0x00204081) & 0x01010101) * 255
        assert word == sum(0xFF << (8 * i) for i in range(4) if bits >> i & 1)


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
