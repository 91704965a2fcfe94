"""Every variant of the many-row decode: compiled for sm_90a without a GPU, no spills, within budget."""

from __future__ import annotations

import itertools
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openmla.backends.cute.decode_dense import config as dense
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.mods import soft_cap
from openmla.mods.attached import form_of

BUDGET = tomllib.loads(Path(__file__).with_name("budgets.toml").read_text(encoding="utf-8"))["decode_dense"]
H100 = Target.preset("h100_sxm")


def problem(**changes):
    base = DecodeProblem(
        batch=4, s_q=1, total_q=4, h_q=128, h_kv=1, d_qk=576, d_v=512, dtype=torch.bfloat16,
        layout=kv_layout("bf16_576"), page_size=64, num_pages=100, max_pages=20,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.mark.parametrize("config", [*dense.VARIANTS, *dense.EXCHANGED], ids=lambda config: config.name)
def test_variant_compiles_within_budget(config, tmp_path):
    pytest.importorskip("cutlass")
    from openmla.backends.cute.decode_dense.launch import build
    from openmla.backends.cute.toolchain import disassemble

    compiled = build(config, tmp_path)
    resources = compiled.resources
    assert resources.spills == 0, resources
    assert resources.registers <= BUDGET["registers"], resources
    smem = resources.dynamic_smem_bytes + resources.static_smem_bytes
    assert smem <= BUDGET["smem_bytes"] + BUDGET["static_smem_bytes"] <= dense.SMEM_LIMIT, resources
    # per tile: one wgmma for 16 columns of a score, 2 halves of 128 columns x 4 k-steps of 16 keys for O
    assert resources.sass["HGMMA"] == config.d_qk // 16 + 8, resources
    # 4 quarters (2 boxes each without a cluster) and RoPE, each twice where a lane holds two page ids; 2 Q elements of 2
    # boxes, the other slices of Q. Two warps that load run the same code, for half of the quarters and of the elements, of
    # which there may be 3.
    keys = 4 // config.loaders * (1 if config.cluster == 2 else 2) + config.has_rope
    elements = -(-config.q_regs // 2 // config.loaders)
    expected = keys * (2 if config.boxes == 64 else 1) + 2 * elements + (config.q_slices - config.q_regs)
    assert resources.sass["UTMALDG"] == expected, resources
    assert resources.sass["WARPGROUP"] <= BUDGET["warpgroup_instructions"], resources
    roles = re.findall(r"USETMAXREG\S*\s+(?:UP0, )?(0x[0-9a-f]+)", disassemble(compiled.cubin_path))
    assert sorted(int(value, 16) for value in roles) == sorted(roles_of(config).values())


def roles_of(config):
    return BUDGET["roles_of_11_slots" if config.slots == 11 else "roles"]


def test_registers_of_the_roles_fill_the_file():
    for config in dense.VARIANTS:
        roles = roles_of(config)
        assert sum(roles.values()) + roles["values"] == 512  # x 128 threads = 65,536


@pytest.mark.parametrize("config", dense.MERGE_VARIANTS, ids=lambda config: config.name)
def test_merge_compiles_within_budget(config, tmp_path):
    pytest.importorskip("cutlass")
    from openmla.backends.cute.decode_dense.launch import build_merge

    resources = build_merge(config, tmp_path).resources
    assert resources.spills == 0, resources
    assert resources.registers * 128 * config.groups <= 32_768, "two CTAs of the largest find room on an SM"
    assert resources.dynamic_smem_bytes <= 48_000, "more would need an opt-in"


@pytest.mark.parametrize("config", dense.VARIANTS, ids=lambda config: config.name)
def test_ring_holds_what_two_pieces_need(config):
    # Q elements of the next piece and its first tile, beside the last tile of this one; fewer slots deadlock
    assert config.slots >= config.q_regs // 2 + 8
    assert config.q_regs % 2 == 0
    assert config.prefetch <= 16


def test_two_loaders_know_the_soft_cap_alone_and_no_exchange():
    plain = dense.VARIANTS[0]
    assert plain.loaders == 2
    assert replace(plain, is_exchanged=True).loaders == 1
    assert replace(plain, mods=(soft_cap(30.0),)).loaders == 2
    assert replace(plain, mods=(soft_cap(60.0),)).loaders == 1, "a cap without the form"
    assert replace(plain, d_qk=512, page_size=0, mods=(soft_cap(30.0),)).loaders == 2
    assert replace(plain, dtype="fp16", mods=(soft_cap(30.0),)).loaders == 1, "nor in fp16"
    assert all(config.loaders == config.cluster for config in dense.VARIANTS)
    assert replace(plain, mods=(soft_cap(30.0),)).opens_late
    assert not any(each.opens_late for each in (plain, replace(plain, loaders=1, mods=(soft_cap(30.0),))))
    for s_q in (1, 2):  # one cluster that reads the keys, and two
        given = problem(s_q=s_q, total_q=4 * s_q, mods=form_of((soft_cap(30.0),)))
        assert dense.configs(given, H100)[0].loaders == 2


def test_eleven_slots_where_several_clusters_read_the_same_keys():
    assert dense.configs(problem(s_q=2), H100)[0].slots == 11
    assert dense.configs(problem(s_q=4, page_size=192), H100)[0].slots == 11
    for changes in ({}, {"h_q": 64, "s_q": 2}, {"h_q": 64, "s_q": 3}, {"s_q": 2, "page_size": 48}):
        assert dense.configs(problem(**changes), H100)[0].slots == 10
    plain = dense.configs(problem(s_q=2), H100)[0]
    for other in (replace(plain, is_exchanged=True), replace(plain, mods=(soft_cap(30.0),))):
        assert (other.slots, other.q_regs) == (10, 4)
    assert replace(plain, is_exchanged=True) in dense.EXCHANGED


def test_partials_are_halved_where_requests_are_fewer_than_half_of_the_parts():
    def is_halved(**changes):
        return dense.configs(problem(**changes), H100)[0].is_halved

    assert is_halved(batch=32, total_q=32)  # 66 parts
    assert not is_halved(batch=33, total_q=33)
    assert is_halved(h_q=64, batch=65, total_q=65)  # 132
    assert not is_halved(h_q=64, batch=66, total_q=66)
    assert not is_halved(dtype=torch.float16, layout=kv_layout("fp16_576"))
    assert not is_halved(is_batch_invariant=True), "the launch that merges reads fp32"
    assert not is_halved(s_q=2, total_q=8), "several clusters"
    assert is_halved(s_q=2, total_q=8, page_size=48), "none"
    for changes in ({"is_exchanged": True}, {"mods": (soft_cap(30.0),)}):
        assert not replace(dense.configs(problem(), H100)[0], **changes).is_halved


def test_names_tell_variants_apart():
    names = [config.name for config in (*dense.VARIANTS, *dense.EXCHANGED)]
    assert len(set(names)) == len(names)
    assert dense.Config(gate_left=19).name != dense.Config().name


def test_supported_problems_get_an_ahead_of_time_variant():
    for dtype, layout in ((torch.bfloat16, "bf16_576"), (torch.float16, "fp16_576"), (torch.bfloat16, "bf16_512")):
        for s_q, h_q, page_size in itertools.product(
            (1, 2, 3, 4), (1, 40, 64, 100, 128), (1, 16, 48, 63, 64, 128, 192)
        ):
            asked = problem(
                dtype=dtype, layout=kv_layout(layout), d_qk=int(layout[-3:]), s_q=s_q, h_q=h_q, page_size=page_size,
                is_causal=s_q > 1,
            )  # fmt: skip
            assert dense.supports(asked, H100)
            config = dense.configs(asked, H100)[0]
            assert config in dense.VARIANTS
            assert page_size % config.box_rows == 0
            assert config.page_size in (0, page_size)
            assert dense.row_blocks(asked) % config.cluster == 0
            assert dense.merge_config(asked) in dense.MERGE_VARIANTS
            parts = dense.num_parts(asked, H100)
            assert 1 <= parts * dense.row_blocks(asked) * asked.h_kv <= H100.num_sms


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"d_v": 256}, "d_v"),
        ({"layout": kv_layout("fp8_656")}, "fp8_656"),
        ({"batch": 5000}, "batch"),
        ({"s_q": 100}, "132 SMs"),
    ],
)
def test_refusal_names_the_reason(changes, word):
    verdict = dense.supports(problem(**changes), H100)
    assert not verdict
    assert any(word in reason for reason in verdict.reasons), verdict


def test_other_machines_are_refused_with_their_name():
    assert any("sm_80" in reason for reason in dense.supports(problem(), Target.preset("a100_sxm")).reasons)
