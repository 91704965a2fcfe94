"""The token-sparse decode without a GPU: compiled within budget, and the arithmetic of its producers."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openmla.backends.cute.decode_sparse import config as sparse
from openmla.backends.cute.decode_sparse.launch import words_of_pages
from openmla.core.layout import kv_layout
from openmla.core.problem import ExtraKV, SparseDecodeProblem
from openmla.core.target import Target
from openmla.reference.quant import read_rows, write_rows

BUDGETS = tomllib.loads(Path(__file__).with_name("budgets_sparse.toml").read_text(encoding="utf-8"))
BUDGET, BUDGET_SWAPPED = BUDGETS["decode_sparse"], BUDGETS["decode_sparse_swapped"]
H100 = Target.preset("h100_sxm")
PLAIN, MERGED = sparse.Config("fp8_656"), sparse.MERGED[0]


def problem(**changes):
    base = SparseDecodeProblem(
        batch=4, s_q=2, total_q=8, h_q=128, h_kv=1, d_qk=576, d_v=512, dtype=torch.bfloat16,
        layout=kv_layout("fp8_656"), page_size=64, num_pages=100, topk=2048,
    )  # fmt: skip
    return replace(base, **changes)


BUILT = (*sparse.VARIANTS, sparse.Config("fp8_656", operands="fp16"), sparse.Config("fp8_584", operands="fp16"))
SHARED = tuple(each for each in BUILT if each.keys == "shared")


def registers_of_roles(sass: str) -> list[int]:
    return sorted(int(value, 16) for value in re.findall(r"USETMAXREG\S*\s+(?:UP0, )?(0x[0-9a-f]+)", sass))


@pytest.mark.parametrize("config", SHARED, ids=lambda config: config.name)
def test_variant_compiles_within_budget(config, tmp_path):
    pytest.importorskip("cutlass")
    from openmla.backends.cute.decode_sparse.launch import build
    from openmla.backends.cute.toolchain import disassemble

    compiled = build(config, tmp_path)
    resources = compiled.resources
    assert resources.spills == 0, resources
    assert resources.registers <= BUDGET["registers"], resources
    smem = resources.dynamic_smem_bytes + resources.static_smem_bytes
    assert smem <= BUDGET["smem_bytes"] + BUDGET["static_smem_bytes"] <= sparse.SMEM_LIMIT, resources
    # per tile: one wgmma for 16 columns of a score, 2 halves of 128 columns x 4 k-steps of 16 keys for O; where the last
    # 64 columns of the value are bf16 beside fp16, the halves have code of their own, and one of them two widths
    is_mixed = config.operands == "fp16" and config.bytes.rope_is_value
    assert resources.sass["HGMMA"] == config.bytes.d_qk // 16 + (8 + 4 + 8 if is_mixed else 8), resources
    assert resources.sass["WARPGROUP"] <= BUDGET["warpgroup_instructions"], resources
    # a lane's four keys: two units before the loop, four in it, RoPE
    assert resources.sass["LDGSTS"] == 4 * (2 + 4 + (config.bytes.rope_place > 0)), resources
    sass = disassemble(compiled.cubin_path)
    assert len(re.findall(r"F2FP\.F16\.E4M3\.UNPACK", sass)) == BUDGET["conversions_each_way"]
    assert registers_of_roles(sass) == sorted(config.roles.values())


def test_keys_in_registers_compile_within_budget(tmp_path):
    pytest.importorskip("cutlass")
    from openmla.backends.cute.decode_sparse.launch import build
    from openmla.backends.cute.toolchain import disassemble

    compiled = build(sparse.SWAPPED, tmp_path)
    resources = compiled.resources
    assert resources.spills == 0, resources
    assert resources.registers <= BUDGET_SWAPPED["registers"], resources
    smem = resources.dynamic_smem_bytes + resources.static_smem_bytes
    assert smem <= BUDGET_SWAPPED["smem_bytes"] + BUDGET_SWAPPED["static_smem_bytes"] <= sparse.SMEM_LIMIT, resources
    # a tile's scores; and 4 of 16 keys by 4 of 64 columns: beside weights, of the own tile, of another's last tile
    assert resources.sass["HGMMA"] == 576 // 16 + 3 * 16, resources
    assert resources.sass["WARPGROUP"] <= BUDGET_SWAPPED["warpgroup_instructions"], resources
    sass = disassemble(compiled.cubin_path)
    # 256 codes of a lane in the scores, 128 in each of the three places of the values, two per instruction
    assert len(re.findall(r"F2FP\.F16\.E4M3\.UNPACK", sass)) == 128 + 3 * 64
    assert registers_of_roles(sass) == sorted(sparse.SWAPPED.roles.values())


@pytest.mark.parametrize("config", BUILT, ids=lambda config: config.name)
def test_registers_of_the_roles_fit_the_file(config):
    wide = "math" if config.keys == "registers" else "values"  # two warpgroups
    total = sum(config.roles.values()) + config.roles[wide]
    assert total == 512 or (config.keys == "registers" and 496 < total <= 512)  # x 128 threads = 65,536
    assert all(count % 8 == 0 for count in config.roles.values())


# ---------------------------------------------------------------------- which lane puts what where


def swizzled(key: int, column: int) -> int:
    """Byte of a bf16 element of a 64 x 128 unit: slices of 64 columns, rows of 128 bytes, chunks of 16 XOR row % 8."""
    chunk = column % 64 // 8
    return column // 64 * 8192 + key * 128 + (chunk ^ key % 8) * 16 + column % 8 * 2


def test_every_element_of_a_unit_is_written_once_where_wgmma_looks_for_it():
    written = Counter()
    for warp in range(4):
        for lane in range(32):
            for i in range(4):
                key = 16 * warp + 4 * i + sparse.lane_key(lane)
                first = sparse.of_key(sparse.unit_place(warp, lane), i)
                for x in range(16):  # code x of the lane's 16 bytes
                    place = (first ^ 16 * (x // 8)) + x % 8 * 2
                    assert place == swizzled(key, 16 * sparse.lane_chunk(lane) + x)
                    written[place] += 1
    assert written == Counter(dict.fromkeys(range(0, 64 * 128 * 2, 2), 1))


def test_every_chunk_of_rope_is_written_once_where_wgmma_looks_for_it():
    written = Counter()
    for warp in range(4):
        for lane in range(32):
            for i in range(4):
                key = 16 * warp + 4 * i + sparse.load_key(lane)
                place = sparse.of_key(sparse.rope_place(warp, lane), i)
                assert place == swizzled(key, 8 * sparse.load_chunk(lane))
                written[place] += 1
    assert written == Counter(dict.fromkeys(range(0, 64 * 64 * 2, 16), 1))


@pytest.mark.parametrize("place", [sparse.unit_place, sparse.rope_place])
def test_the_eight_lanes_of_a_store_phase_hit_all_banks(place):
    for warp in range(4):
        for i in range(4):
            for phase in range(4):
                lanes = range(8 * phase, 8 * phase + 8)
                assert {sparse.of_key(place(warp, lane), i) // 16 % 8 for lane in lanes} == set(range(8))


def test_a_load_reads_whole_runs_of_a_key_into_whole_lines():
    for first in range(0, 32, 8):
        lanes = range(first, first + 8)
        assert len({sparse.load_key(lane) for lane in lanes}) == 1
        assert {sparse.load_chunk(lane) for lane in lanes} == set(range(8))
        assert len({sparse.raw_place(sparse.load_key(lane), sparse.load_chunk(lane)) // 128 for lane in lanes}) == 1


def test_codes_under_way_have_places_of_their_own_and_are_taken_without_bank_conflicts():
    places = {(key, chunk): sparse.raw_place(key, chunk) for key in range(4) for chunk in range(8)}
    assert sorted(places.values()) == list(range(0, 512, 16))
    for first in range(0, 32, 8):
        taken = [places[sparse.lane_key(lane), sparse.lane_chunk(lane)] for lane in range(first, first + 8)]
        assert {place // 16 % 8 for place in taken} == set(range(8))


def produced(layout: str, cache: torch.Tensor, page_size: int, slots: list[int]) -> torch.Tensor:
    """What a producer warp writes for its 16 keys, [16, 512] bf16: the kernel's addresses, lane by lane."""
    where = sparse.bytes_of(layout)
    memory = cache.untyped_storage()
    step = cache.stride(0)
    data = torch.tensor(list(memory), dtype=torch.uint8) if memory.nbytes() < 2**20 else None
    assert data is not None

    def read(start: int, count: int) -> torch.Tensor:
        return data[start : start + count].clone()

    rows = [slot // page_size * step + slot % page_size * where.row_bytes for slot in slots]
    half, words = where.scale_bytes // 2, {}
    for lane in range(32):
        slot = slots[lane % 16]
        start = rows[lane % 16] + where.scale_place
        if where.scales_behind_page:
            units = 2 * (slot // page_size) * (step // 16) + page_size * (where.row_bytes // 8) + slot % page_size
            start = 8 * units
        words[lane] = read(start + lane // 16 * half, half).view(torch.int32).tolist()
    out = torch.full((16, 512), torch.nan, dtype=torch.bfloat16)
    for unit in range(4):
        for lane in range(32):
            chunk = sparse.lane_chunk(lane)
            if where.rope_is_value and unit == 3 and chunk >= 4:
                continue
            for i in range(4):
                key = 4 * i + sparse.lane_key(lane)
                word = words[sparse.scale_holder(unit, key)][sparse.scale_word(where, unit)]
                if where.is_e8m0:
                    byte = word >> sparse.scale_shift(where, unit, chunk) & 0xFF
                    word = byte << 23 | (0x400000 if (byte + 1 & 0xFF) <= 1 else 0)
                scale = torch.tensor([word]).to(torch.int32).view(torch.float32)
                codes = read(rows[key] + 128 * unit + 16 * chunk, 16).view(torch.float8_e4m3fn)
                column = 128 * unit + 16 * chunk
                out[key, column : column + 16] = (codes.to(torch.float16).float() * scale).to(torch.bfloat16)
    if where.rope_is_value:
        for key in range(16):
            out[key, 448:] = read(rows[key] + where.rope_place, 128).view(torch.bfloat16)
    return out


@pytest.mark.parametrize("layout", sparse.LAYOUTS)
@pytest.mark.parametrize("page_size", [64, 7, 1])
def test_a_warp_produces_what_the_oracle_reads(layout, page_size):
    found = kv_layout(layout)
    pages = 200 // page_size + 1
    cache = found.empty_cache(pages, page_size)
    generator = torch.Generator().manual_seed(page_size)
    rows = torch.randn(pages * page_size, found.d_qk, generator=generator)
    rows *= torch.logspace(-6, 4, found.d_qk // 32).repeat_interleave(32)  # another scale for each group
    write_rows(cache, found, torch.arange(len(rows)), rows.to(torch.bfloat16))
    slots = torch.randperm(len(rows), generator=generator)[:16].tolist()
    golden = read_rows(cache, found, torch.tensor(slots))
    mine = produced(layout, cache, page_size, slots)
    assert torch.equal(mine.view(torch.int16), golden[:, :512].contiguous().view(torch.int16))


@pytest.mark.parametrize("layout", sparse.LAYOUTS)
def test_what_is_loaded_at_once_is_aligned(layout):
    where = sparse.bytes_of(layout)
    assert where.row_bytes % 16 == 0 and where.rope_place % 16 == 0
    assert where.scale_place % (where.scale_bytes // 2) == 0
    assert where.has_rope_slice == (kv_layout(layout).d_qk > sparse.D_V)


def test_e8m0_bits_are_the_format_for_every_byte():
    byte = torch.arange(256, dtype=torch.int32)
    bits = byte << 23 | torch.where((byte + 1 & 0xFF) <= 1, 0x400000, 0).to(torch.int32)
    want = byte.to(torch.uint8).view(torch.float8_e8m0fnu).float()
    assert torch.equal(bits.view(torch.float32)[:255], want[:255])
    assert bits.view(torch.float32)[255].isnan() and want[255].isnan()


def test_dequantisation_is_the_contract_for_every_code():
    """The kernel's steps e4m3 -> fp16 -> fp32, one product, one rounding, against the oracle; NaN codes included."""
    scales = torch.tensor(
        [1.0, 2.0**-13, 2.0**-126, 2.0**-140, 2.0**100, 0.1, 1 / 3, 3e-39, 7.7e30, -0.3, 0.0, torch.inf]
    )
    codes = torch.arange(256, dtype=torch.uint8)
    cache = torch.zeros(1, len(scales), 1, 656, dtype=torch.uint8)
    cache[0, :, 0, :512] = codes.repeat(2)
    cache[0, :, 0, 512:528] = scales.repeat_interleave(4).view(torch.uint8).view(len(scales), 16)
    golden = read_rows(cache, "fp8_656", torch.arange(len(scales)))[:, :512]
    half = codes.view(torch.float8_e4m3fn).to(torch.float16)
    assert torch.equal(half.float().nan_to_num(), codes.view(torch.float8_e4m3fn).float().nan_to_num())
    mine = (half.float()[None] * scales[:, None]).to(torch.bfloat16).repeat(1, 2)
    assert torch.equal(mine.isnan(), golden.isnan())
    assert torch.equal(mine.nan_to_num(7.0).view(torch.int16), golden.nan_to_num(7.0).view(torch.int16))


# ---------------------------------------------------------------------- what it takes


@pytest.mark.parametrize("h_q", [1, 8, 16, 64, 128])
@pytest.mark.parametrize("s_q", [1, 2, 5])
def test_supported_problems_get_an_ahead_of_time_variant(h_q, s_q):
    asked = problem(h_q=h_q, s_q=s_q, has_sink=True, has_topk_length=True, page_size=7, topk=100)
    assert sparse.supports(asked, H100)
    assert sparse.configs(asked, H100)[0] in BUILT
    both = replace(asked, extra=ExtraKV(asked.layout, 64, 10, 512))
    assert sparse.supports(both, H100) and sparse.configs(both, H100)[0] in BUILT
    parts = sparse.num_parts(asked, H100, sparse.configs(asked, H100)[0])
    assert 1 <= parts * sparse.row_blocks(asked) * s_q <= H100.num_sms


@pytest.mark.parametrize(("batch", "parts"), [(1, 16), (2, 22), (3, 33), (128, 33)])
def test_two_tiles_per_part_become_three(batch, parts):
    assert sparse.num_parts(problem(batch=batch, total_q=2 * batch), H100, PLAIN) == parts


@pytest.mark.parametrize(
    ("batch", "s_q", "h_q", "topk", "parts"),
    [
        (1, 2, 128, 2048, 16),  # 8,192 partial rows to merge if each tile is a piece
        (1, 1, 128, 2048, 16),
        (2, 2, 128, 1024, 16),
        (1, 1, 64, 2048, 32),  # 2,048
        (1, 1, 16, 2048, 32),
        (1, 1, 128, 1024, 16),
        (4, 2, 128, 512, 32),  # 8,192, but only eight for each row
        (8, 1, 128, 512, 64),
    ],
)
def test_no_more_parts_than_tiles_and_half_as_many_where_the_merge_is_long(batch, s_q, h_q, topk, parts):
    asked = problem(batch=batch, s_q=s_q, total_q=batch * s_q, h_q=h_q, topk=topk)
    assert sparse.num_parts(asked, H100, PLAIN) == parts


def test_three_tiles_per_part_are_three():
    pieces = list(sparse.plan(2, sparse.tiles(2048), 22).pieces())
    assert len(pieces) == 22 and max(x.end_block - x.begin_block for x in pieces) == 3


def test_a_variant_that_no_gpu_has_run_is_refused(monkeypatch):
    monkeypatch.setattr(sparse, "SERVED", (("fp8_528", False),))
    verdict = sparse.supports(problem(), H100)
    assert any("checked on a GPU" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"layout": kv_layout("bf16_576")}, "bf16_576"),
        ({"layout": kv_layout("fp4_288"), "d_qk": 512}, "fp4_288"),
        ({"dtype": torch.float16}, "bf16 queries"),
        ({"batch": 100_000}, "requests"),
        ({"topk": 0}, "index"),
        ({"num_pages": 2**31 // 64}, "bytes"),
        ({"extra": ExtraKV(kv_layout("fp8_584"), 64, 10, 512)}, "second cache"),
        ({"is_aligned": False}, "multiples of 16 bytes"),
        ({"layout": kv_layout("fp8_528_mx"), "d_qk": 512}, "registers"),
    ],
)
def test_refusal_names_the_reason(changes, word):
    verdict = sparse.supports(problem(**changes), H100)
    assert not verdict
    assert any(word in reason for reason in verdict.reasons), verdict


@pytest.mark.parametrize("batch", [1, 2, 33, 74, 128, 148, 1000])
@pytest.mark.parametrize("topk", [1, 64, 512, 2048, 16384])
@pytest.mark.parametrize("parts", [1, 33, 66, 132])
def test_plan_covers_every_tile_once(batch, topk, parts):
    blocks = sparse.tiles(topk)
    plan = sparse.plan(batch, blocks, parts)
    assert len(plan.parts) == parts
    tiles = Counter((x.request, tile) for x in plan.pieces() for tile in range(x.begin_block, x.end_block))
    assert tiles == Counter(dict.fromkeys(((r, tile) for r in range(batch) for tile in range(blocks)), 1))
    for request in range(batch):
        splits = [x.split for x in plan.pieces() if x.request == request] if batch <= 33 else []
        assert splits in ([], list(range(plan.num_splits[request + 1] - plan.num_splits[request])))


def test_whole_requests_where_they_balance_and_splits_where_they_do_not():
    assert sparse.plan(128, 32, 33).num_pieces == 128  # 4 of 32 tiles against an even share of 124
    assert sparse.plan(2, 32, 33).num_pieces > 16
    assert sparse.plan(148, 256, 66).num_pieces > 148


def test_pages_that_bulk_loads_cannot_read_are_named():
    pool = torch.zeros(3 * 42_000, dtype=torch.uint8)
    fine = pool.as_strided((3, 64, 1, 656), (42_000, 656, 656, 1))
    assert words_of_pages(fine).shape == (3, 64 * 164) and words_of_pages(fine).stride(0) == 10_500
    q, indices = torch.zeros(1, 1, 8, 576, dtype=torch.bfloat16), torch.zeros(1, 1, 4, dtype=torch.int32)
    for cache, takes in (
        (fine, True),
        (pool.as_strided((2, 64, 1, 656), (41_988, 656, 656, 1)), False),
        (pool[4:].as_strided((2, 64, 1, 656), (41_984, 656, 656, 1)), False),
        (pool.as_strided((1, 64, 1, 656), (41_988, 656, 656, 1)), True),  # nobody steps from this page
    ):
        assert SparseDecodeProblem.from_tensors(q, cache, indices, layout="fp8_656").is_aligned == takes
        both = SparseDecodeProblem.from_tensors(
            q, fine, indices, layout="fp8_656", extra_kv_cache=cache, extra_indices=indices, extra_layout="fp8_656"
        )
        assert both.is_aligned == takes


def test_other_machines_are_refused_with_their_name():
    assert any("sm_80" in reason for reason in sparse.supports(problem(), Target.preset("a100_sxm")).reasons)


def test_what_a_variant_may_void_another_that_ships_repeats():
    for each in BUILT:
        assert (each.repeat is None) == (each.operands == "bf16")
    assert [each for each in sparse.VARIANTS if each.repeat] == [sparse.SWAPPED]
    assert sparse.SWAPPED.repeat in sparse.VARIANTS


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, sparse.SWAPPED),
        ({"h_q": 64}, sparse.SWAPPED),
        ({"topk": 4096}, sparse.SWAPPED),
        ({"topk": 2048}, sparse.SWAPPED),
        ({"topk": 1984}, sparse.Config("fp8_656")),
        ({"batch": 4, "total_q": 8}, MERGED),
        ({"batch": 33, "total_q": 66, "topk": 2048}, sparse.Config("fp8_656")),
        # one block of heads: a list of 32 tiles for every SM; with two, two of them
        ({"batch": 128, "total_q": 128, "s_q": 1, "h_q": 64, "topk": 2048}, sparse.SWAPPED),
        ({"batch": 120, "total_q": 120, "s_q": 1, "h_q": 64, "topk": 2048}, sparse.Config("fp8_656")),
        ({"batch": 64, "total_q": 64, "s_q": 1, "topk": 2048}, sparse.Config("fp8_656")),
        ({"batch": 128, "total_q": 128, "s_q": 1, "topk": 2048}, sparse.SWAPPED),
        ({"layout": kv_layout("fp8_584"), "d_qk": 512}, sparse.Config("fp8_584")),
        ({"extra": ExtraKV(kv_layout("fp8_656"), 64, 10, 512)}, sparse.Config("fp8_656", True)),
    ],
)
def test_keys_are_in_registers_where_lists_and_parts_are_long(changes, first):
    asked = problem(**{"batch": 148, "total_q": 296, "topk": 16384, **changes})
    assert sparse.supports(asked, H100)
    assert sparse.configs(asked, H100)[0] == first
    assert all(each in sparse.VARIANTS for each in sparse.configs(asked, H100))


@pytest.mark.parametrize(
    ("batch", "s_q", "h_q", "changes", "parts"),
    [
        (1, 2, 128, {}, 16),  # 8,192 partial rows if each tile is a piece
        (1, 1, 128, {}, 32),
        (1, 1, 64, {}, 32),
        (2, 2, 128, {}, 32),  # two tiles for each
        (3, 2, 128, {}, 33),  # as many for each request
        (16, 2, 128, {}, 32),
        (7, 2, 128, {}, 28),
        (12, 2, 128, {}, 33),  # nine of 33 would have nothing to do
        (32, 1, 64, {}, 128),
        (2, 1, 17, {"topk": 16384}, 132),
        (1, 33, 128, {}, 2),  # 66 CTAs of each piece
        (2, 2, 128, {"layout": kv_layout("fp8_584"), "d_qk": 512}, 32),
        (33, 1, 64, {}, None),  # one request too many
        (1, 66, 128, {}, None),  # nothing is split
        (1, 1, 64, {"topk": 64}, None),
        (2, 2, 128, {"topk": 2**18}, None),  # keys in registers
        (2, 2, 128, {"extra": ExtraKV(kv_layout("fp8_656"), 64, 10, 512)}, None),
    ],
)
def test_few_requests_are_merged_by_those_who_computed_them(batch, s_q, h_q, changes, parts):
    asked = problem(batch=batch, s_q=s_q, total_q=batch * s_q, h_q=h_q, **changes)
    assert sparse.supports(asked, H100)
    first, *others = sparse.configs(asked, H100)
    assert first.merges == (parts is not None)
    if parts is not None:
        assert first in sparse.MERGED and others == [sparse.Config(asked.layout.name)]
        assert sparse.num_parts(asked, H100, first) == parts
        assert parts * s_q * sparse.row_blocks(asked) <= H100.num_sms  # they wait for one another: all must be resident
        assert sparse.plan(batch, sparse.all_tiles(asked), parts).num_pieces > batch


def test_a_part_has_pieces_of_two_split_requests_at_most():
    """What `merge.SHARES` holds."""
    for batch in range(1, sparse.MERGED_REQUESTS + 1):
        for each in (1, 2, 7, 8, 31, 32, 33, 64, 256):
            for most in (1, 2, 11, 33, 66, 132):
                plan = sparse.plan(batch, each, sparse.parts(most, batch, each, 128 * batch, merges=True))
                pieces = list(plan.pieces())
                split = {request for request, count in Counter(x.request for x in pieces).items() if count > 1}
                shares = Counter(x.part for x in pieces if x.request in split)
                assert max(shares.values(), default=0) <= 2


@pytest.mark.parametrize(
    ("batch", "changes", "is_early"),
    [(64, {}, True), (8, {}, True), (64, {"extra": None}, False), (64, {"h_q": 128}, True)],
)
def test_a_second_cache_starts_early(batch, changes, is_early):
    layout = kv_layout("fp8_584")
    second = {"extra": ExtraKV(layout, 64, 10, 512), "layout": layout, "d_qk": 512, "h_q": 64, "topk": 128}
    asked = problem(batch=batch, total_q=2 * batch, **{**second, **changes})
    assert sparse.supports(asked, H100)
    plain = sparse.Config("fp8_584", asked.extra is not None)
    assert sparse.configs(asked, H100) == ((sparse.STARTS_EARLY, plain) if is_early else (plain,))


def test_every_scale_that_counts_as_fit_keeps_every_code_in_fp16():
    """2^-14 to 2^7: the product is the contract's bf16, exactly; a step further it is not."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num()

    def is_exact(exponent: int) -> bool:
        product = codes.half() * torch.tensor(2.0**exponent).half()
        return torch.equal(product.float(), codes * 2.0**exponent)

    low, high = sparse.FIT_LOW - 127, sparse.FIT_HIGH - 127
    assert all(is_exact(exponent) for exponent in range(low, high + 1))
    assert not is_exact(high + 1)
    assert 2.0**low <= 2.0**-13  # the smallest scale that the writers make


def test_names_tell_variants_apart():
    assert sparse.Config(gate_left=18).name != sparse.Config().name
