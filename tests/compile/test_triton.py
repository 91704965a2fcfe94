"""The Triton kernels for machines that are not here: cross-compiled with the very arguments of a launch, and held to
limits of shared memory and registers. Also what `supports` says, which needs neither Triton nor a machine.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openmla import backends
from openmla.backends.base import (
    AppendOperands,
    DecodeOperands,
    PrefillOperands,
    SparseDecodeOperands,
    SparsePrefillOperands,
)
from openmla.backends.triton import DECODE, KERNELS, PREFILL, SPARSE_DECODE, SPARSE_PREFILL, config, prefill_config
from openmla.core.layout import kv_layout
from openmla.core.problem import DecodeProblem, PrefillProblem, SparseDecodeProblem, SparsePrefillProblem
from openmla.core.target import Target
from openmla.mods import Rope, attach, document, sigmoid, sliding_window, soft_cap
from openmla.testing.mod_cases import library_cases

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(config.is_interpreted(), reason="TRITON_INTERPRET=1 replaces the compiler")

TARGETS = {
    "a100_sxm": ("cuda", 80, 32),
    "l40s": ("cuda", 89, 32),
    "h100_sxm": ("cuda", 90, 32),
    "b200": ("cuda", 100, 32),
    "mi300x": ("hip", "gfx942", 64),
}
ELEMENT = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.uint8: "u8",
    torch.bool: "i1", torch.int64: "i64",
}  # fmt: skip


def form_of(value: Any) -> Any:
    """A tuple argument as a signature."""
    if isinstance(value, tuple):
        return tuple(form_of(each) for each in value)
    return f"*{ELEMENT[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"


class Recorder:
    """Stands where a kernel stands in `launch`, and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arguments, self.options, self.grid = kernel, (), {}, ()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.grid, self.arguments, self.options = grid, arguments, options

        return launch

    def source(self) -> tuple[Any, dict[str, int]]:
        """(what to compile, compiler options), specialised as a launch with these arguments would be."""
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        given = dict(zip(names, self.arguments, strict=False))
        options = {k: v for k, v in self.options.items() if k not in names}
        given |= {k: v for k, v in self.options.items() if k in names}
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(names):
            value = given[name]
            is_aligned = False
            is_free = self.kernel.params[place].do_not_specialize
            if self.kernel.params[place].is_constexpr or (isinstance(value, int) and value == 1 and not is_free):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{ELEMENT[value.dtype]}"
                is_aligned = value.data_ptr() % 16 == 0
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                is_aligned = value % 16 == 0 and not is_free
            elif isinstance(value, tuple):
                signature[name] = form_of(value)  # tables of mods: not specialised
            else:
                signature[name] = "fp32"
            if is_aligned:
                attributes[(place,)] = [["tt.divisibility", 16]]
        if self.kernel.is_gluon():
            from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
        return ASTSource(self.kernel, signature, constants, attributes), options


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    from openmla.backends.triton import launch, prefill_launch

    found = {}
    for name in ("decode_kernel", "selected_kernel", "combine_kernel", "plan_kernel"):
        found[name] = Recorder(getattr(launch, name))
        monkeypatch.setattr(launch, name, found[name])
    if config.has_gluon():
        found["selected_sm90_kernel"] = Recorder(launch.sm90_kernel())
        monkeypatch.setattr(launch, "sm90_kernel", lambda: found["selected_sm90_kernel"])
    for name in ("prefill_kernel", "delta_kernel", "query_gradient_kernel", "key_gradient_kernel"):
        found[name] = Recorder(getattr(prefill_launch, name))
        monkeypatch.setattr(prefill_launch, name, found[name])
    return found


def compiled(recorder: Recorder, target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    source, options = recorder.source()
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def spilled(found: Any, tmp_path: Path) -> int:
    """Bytes (NVIDIA) or registers (AMD) that did not fit."""
    if "amdgcn" in found.asm:
        return int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", found.asm["amdgcn"])[0])
    (tmp_path / "kernel.cubin").write_bytes(found.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run(
        [tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    return int(re.findall(r"STACK:(\d+)", text)[0])


def decode_call(
    h_q: int = 128,
    s_q: int = 1,
    layout: str = "bf16_576",
    page_size: int = 64,
    batch: int = 2,
    mods: Any = None,
    **options: Any,
) -> tuple[DecodeProblem, DecodeOperands]:
    """A problem and operands of the right form, whose values nobody reads."""
    stored = kv_layout(layout)
    dtype = stored.dtype if not stored.is_quantised else torch.bfloat16
    shape = (batch * s_q, h_q) if options.get("is_varlen") else (batch, s_q, h_q)
    cache = stored.empty_cache(4, page_size)
    ints = torch.zeros(8, dtype=torch.int32)
    problem = DecodeProblem(
        batch=batch, s_q=s_q, total_q=batch * s_q, h_q=h_q, h_kv=1, d_qk=stored.d_qk, d_v=512, dtype=dtype,
        layout=stored, page_size=page_size, num_pages=4, max_pages=9,
        mods=None if mods is None else attach(mods).form, **options,
    )  # fmt: skip
    lse = (h_q, batch * s_q) if problem.is_varlen else (batch, h_q, s_q)
    operands = DecodeOperands(
        torch.zeros(*shape, stored.d_qk, dtype=dtype), cache, torch.zeros(batch, 9, dtype=torch.int32), ints[:batch],
        0.04, torch.zeros(*shape, 512, dtype=dtype), torch.zeros(lse), ints[:1],
        ints[: batch + 1] if problem.is_varlen else None, torch.zeros(h_q) if problem.has_sink else None,
        mods=attach(mods),
    )  # fmt: skip
    return problem, operands


def run_decode(target: str, recorded: dict[str, Recorder], **options: Any) -> tuple[Recorder, Any, Any]:
    problem, operands = decode_call(**options)
    where = Target.preset(target)
    choice = DECODE.configs(problem, where)[0]
    ready = DECODE.compile(problem, choice, where)
    plan = DECODE.plan(ready, problem, operands.cache_seqlens, "balanced")
    DECODE.launch(ready, problem, operands, plan)
    return recorded["decode_kernel"], problem, choice


def within_limits(found: Any, problem: Any, choice: Any, target: str, most: int, tmp_path: Path) -> None:
    where = Target.preset(target)
    assert found.metadata.shared <= where.smem_bytes
    assert found.metadata.shared <= config.shared_bytes(choice, problem, where), "the estimate that picks tiles is low"
    assert spilled(found, tmp_path) <= most


MODS = library_cases(h_q=128, s_q=1, batch=2, capacity=576, d_rope=64)
SEVERAL = MODS["several"]

# What each may spill (bytes of stack; registers on AMD): the compiler of Triton 3.9. Limits may only shrink; the two
# that grew by 8 did so when tiles that are seen in full got a loop of their own.
DECODE_CASES = [
    pytest.param("h100_sxm", {}, 0, id="h100-128-heads"),
    pytest.param("h100_sxm", {"h_q": 16}, 16, id="h100-16-heads"),
    pytest.param("h100_sxm", {"layout": "bf16_512"}, 200, id="h100-without-rope"),
    pytest.param("h100_sxm", {"s_q": 2, "is_causal": True, "has_sink": True}, 72, id="h100-causal"),
    pytest.param("h100_sxm", {"layout": "fp8_656", "h_q": 16}, 64, id="h100-bytes"),
    pytest.param("a100_sxm", {"layout": "fp16_576"}, 0, id="a100-fp16"),
    pytest.param("a100_sxm", {"h_q": 16, "page_size": 3, "is_varlen": True, "window": 100}, 64, id="a100-odd-pages"),
    pytest.param("l40s", {"h_q": 16}, 0, id="l40s-16-heads"),
    pytest.param("l40s", {"layout": "fp8_656"}, 0, id="l40s-bytes"),
    pytest.param("b200", {}, 48, id="b200-128-heads"),
    pytest.param("mi300x", {}, 0, id="mi300x-128-heads"),
    pytest.param("mi300x", {"h_q": 16, "is_causal": True, "s_q": 1}, 0, id="mi300x-16-heads"),
    pytest.param("h100_sxm", {"mods": soft_cap(30.0)}, 0, id="h100-soft-cap"),
    pytest.param("h100_sxm", {"mods": sliding_window(512)}, 48, id="h100-mask"),
    pytest.param("h100_sxm", {"mods": sliding_window(512), "window": 512}, 64, id="h100-window-as-a-mod"),
    pytest.param("h100_sxm", {"mods": SEVERAL, "s_q": 2, "is_causal": True}, 0, id="h100-several-mods"),
    pytest.param("h100_sxm", {"mods": [sigmoid(-8.0)], "h_q": 16}, 0, id="h100-sigmoid"),
    pytest.param("a100_sxm", {"mods": SEVERAL, "layout": "fp16_576"}, 24, id="a100-several-mods"),
    pytest.param("b200", {"mods": SEVERAL}, 88, id="b200-several-mods"),
    pytest.param("mi300x", {"mods": SEVERAL}, 0, id="mi300x-several-mods"),
]


def check_buffers(code: str) -> None:
    """A loop that asks for the next tile before it multiplies this one keeps two; Triton 3.6 was seen to keep one."""
    for loop in re.split(r"scf\.for ", code)[1:]:
        copy, product = loop.find("ttg.async_copy"), loop.find("ttng.warp_group_dot")
        if 0 <= copy < product:
            tiles = re.findall(r"!ttg\.memdesc<(\d+)x\d+x512x", loop[:product])
            assert "2" in tiles and "1" not in tiles, tiles


@pytest.mark.parametrize(("target", "options", "most"), DECODE_CASES)
def test_decode(target, options, most, recorded, tmp_path):
    recorder, problem, choice = run_decode(target, recorded, **options)
    found = compiled(recorder, target)
    within_limits(found, problem, choice, target, most, tmp_path)
    if target == "h100_sxm" and choice.block_m >= 64:
        # Columns of k in steps of 16, and keys: twice the first number where both warpgroups make all scores. One loop for
        # tiles that are seen in full and one for others, or the latter alone. RoPE is there twice where `fold_tile` hides
        # all products, which it must not where rows of a tile differ in what they see.
        has_masks = bool(problem.mods and problem.mods.masks)
        differs = has_masks or (problem.is_causal and problem.s_q > 1)
        once, again = problem.d_qk // 16 + choice.block_n // 16, (problem.d_qk - problem.d_v) // 16
        loops = 1 if has_masks else 2
        assert found.asm["ptx"].count("wgmma.mma_async") == once * loops + again * (loops - differs)
        check_buffers(found.asm["ttgir"])
    if target != "mi300x" and not problem.layout.is_quantised:
        assert "cp.async" in found.asm["ptx"], "tiles must not pass through registers"


@pytest.mark.parametrize("target", ["h100_sxm", "mi300x"])
def test_every_mod_of_the_library_compiles(target, recorded):
    for name, given in MODS.items():
        recorder, _, _ = run_decode(target, recorded, h_q=16, mods=given)
        assert compiled(recorder, target).metadata.shared, name


@pytest.mark.parametrize("name", ["relative_bias", "tree"])
def test_what_a_mod_reads_per_score_is_in_the_estimate(name, recorded):
    """A table read by row and key passes through shared memory; a tile of 64 x 64 did not fit an H100 with it."""
    recorder, problem, choice = run_decode("h100_sxm", recorded, mods=MODS[name])
    found, where = compiled(recorder, "h100_sxm"), Target.preset("h100_sxm")
    assert found.metadata.shared <= config.shared_bytes(choice, problem, where) <= where.smem_bytes


def test_a_number_of_a_mod_is_part_of_the_key(recorded):
    """Triton names functions by module when it looks for machine code: a cap of 30 must not find that of 50."""
    keys = set()
    for given in (soft_cap(30.0), soft_cap(50.0), sigmoid(30.0), None):
        recorder, _, _ = run_decode("h100_sxm", recorded, mods=given)
        keys.add(recorder.source()[0].hash())
    assert len(keys) == 4


def test_other_tables_compile_nothing(recorded):
    """What Triton compiles anew for, it says here; in tuples it knows no exception, so numbers must be neither 1 nor 16."""
    from triton._C import libtriton
    from triton.backends.nvidia.compiler import CUDABackend

    if not hasattr(libtriton, "native_specialize_impl"):
        pytest.skip("this Triton decides in Python, function by function, what it compiles anew for")

    keys = set()
    for batch, width in ((1, 1), (2, 16), (16, 33), (256, 2**20)):
        tables = document(torch.zeros(1, 1, dtype=torch.int32).expand(batch, width))
        recorder, _, _ = run_decode("h100_sxm", recorded, mods=tables, h_q=16)
        given = dict(zip(recorder.kernel.arg_names, recorder.arguments, strict=False))["tables"]
        keys.add(libtriton.native_specialize_impl(CUDABackend, given, False, True, True))
    assert len(keys) == 1


def run_sparse(target: str, recorded: dict[str, Recorder], **options: Any) -> tuple[Recorder, Any, Any]:
    stored, h_q, topk = kv_layout(options["layout"]), options.get("h_q", 128), 256
    dtype = stored.dtype if not stored.is_quantised else torch.bfloat16
    indices = torch.zeros(2, 1, topk, dtype=torch.int32)
    problem = SparseDecodeProblem(
        batch=2, s_q=1, total_q=2, h_q=h_q, h_kv=1, d_qk=stored.d_qk, d_v=512, dtype=dtype, layout=stored,
        page_size=64, num_pages=4, topk=topk, has_sink=True,
    )  # fmt: skip
    operands = SparseDecodeOperands(
        torch.zeros(2, 1, h_q, stored.d_qk, dtype=dtype), stored.empty_cache(4, 64), indices, 0.04,
        torch.zeros(2, 1, h_q, 512, dtype=dtype), torch.zeros(2, h_q, 1), indices[0, 0, :1], None, torch.zeros(h_q),
    )  # fmt: skip
    where = Target.preset(target)
    choice = SPARSE_DECODE.configs(problem, where)[0]
    SPARSE_DECODE.launch(SPARSE_DECODE.compile(problem, choice, where), problem, operands, None)
    return recorded["selected_kernel"], problem, choice


SPARSE_CASES = [
    pytest.param("h100_sxm", {"layout": "bf16_576"}, 0, id="h100-plain"),
    pytest.param("h100_sxm", {"layout": "fp8_656"}, 0, id="h100-fp8_656"),
    pytest.param("h100_sxm", {"layout": "fp8_584"}, 8, id="h100-fp8_584"),
    pytest.param("h100_sxm", {"layout": "fp8_528_mx"}, 0, id="h100-fp8_528_mx"),
    pytest.param("h100_sxm", {"layout": "fp4_288"}, 0, id="h100-fp4_288"),
    pytest.param("a100_sxm", {"layout": "fp8_656", "h_q": 16}, 64, id="a100-fp8_656"),
    pytest.param(
        "l40s", {"layout": "fp8_584"}, 376, id="l40s-fp8_584"
    ),  # 16 rows spill nothing, and load each key twice as often
    pytest.param("b200", {"layout": "bf16_576"}, 0, id="b200-plain"),
    pytest.param("mi300x", {"layout": "fp8_584"}, 8, id="mi300x-fp8_584"),
]


@pytest.mark.parametrize(("target", "options", "most"), SPARSE_CASES)
def test_sparse_decode(target, options, most, recorded, tmp_path):
    recorder, problem, choice = run_sparse(target, recorded, **options)
    within_limits(compiled(recorder, target), problem, choice, target, most, tmp_path)


def run_sparse_prefill(target: str, recorded: dict[str, Recorder], columns: int = 576) -> tuple[Any, Any]:
    """Launches 4 tokens of 128 heads, whose rows are `columns` apart; returns problem and config."""
    problem = SparsePrefillProblem(
        s_q=4, s_kv=64, h_q=128, h_kv=1, d_qk=576, d_v=512, dtype=torch.bfloat16, topk=64, has_topk_length=True
    )
    dtype, rows = torch.bfloat16, torch.zeros(4, 128)
    operands = SparsePrefillOperands(
        torch.zeros(4, 128, columns, dtype=dtype)[..., :576], torch.zeros(64, 1, 576, dtype=dtype),
        torch.zeros(4, 1, 64, dtype=torch.int32), 0.04, torch.zeros(4, 128, 512, dtype=dtype), rows, rows,
        torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32),
    )  # fmt: skip
    where = Target.preset(target)
    choice = SPARSE_PREFILL.configs(problem, where)[0]
    SPARSE_PREFILL.launch(SPARSE_PREFILL.compile(problem, choice, where), problem, operands, None)
    return problem, choice


@pytest.mark.parametrize("target", TARGETS)
def test_sparse_prefill(target, recorded, tmp_path, monkeypatch):
    from openmla.backends.triton import launch

    monkeypatch.setattr(launch, "is_scheduled", lambda *_: False)  # the portable kernel everywhere
    problem, choice = run_sparse_prefill(target, recorded)
    found = compiled(recorded["selected_kernel"], target)
    within_limits(found, problem, choice, target, 64, tmp_path)


def test_sparse_prefill_in_its_own_order(recorded, tmp_path):
    run_sparse_prefill("h100_sxm", recorded, 577)  # rows between 16 bytes
    assert recorded["selected_kernel"].arguments
    recorded["selected_kernel"].arguments = ()
    run_sparse_prefill("h100_sxm", recorded)
    assert not recorded["selected_kernel"].arguments
    found = compiled(recorded["selected_sm90_kernel"], "h100_sxm")
    assert found.metadata.shared <= Target.preset("h100_sxm").smem_bytes
    assert spilled(found, tmp_path) <= 96
    steps = re.findall(r"m64n256k16|m64n32k16|cp\.async\.cg|wgmma\.wait_group", found.asm["ptx"])
    loop = [name for name, _ in itertools.groupby(steps[steps.index("m64n32k16") :])]
    quarters = ["m64n32k16", "cp.async.cg"] * 5  # four of the latent columns, one of RoPE
    assert loop == [*quarters, "wgmma.wait_group"], "each quarter of the copies stands behind a quarter of the products"


def run_prefill(target: str, recorded: dict[str, Recorder], d_qk: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Launches forward and backward of 16 heads; returns problem and config."""
    total, h_q, h_kv = 512, 16, 8
    problem = PrefillProblem(2, total, total, 256, 256, h_q, h_kv, d_qk, 128, dtype, is_causal=True)
    offsets = torch.tensor([0, 256, 512], dtype=torch.int32)
    operands = PrefillOperands(
        torch.zeros(total, h_q, d_qk, dtype=dtype), torch.zeros(total, h_kv, d_qk, dtype=dtype),
        torch.zeros(total, h_kv, 128, dtype=dtype), offsets, offsets, 0.07,
        torch.zeros(total, h_q, 128, dtype=dtype), torch.zeros(h_q, total), torch.zeros(1, dtype=torch.int32),
    )  # fmt: skip
    choice = PREFILL.configs(problem, Target.preset(target))[0]
    ready = PREFILL.compile(problem, choice, Target.preset(target))
    PREFILL.launch(ready, problem, operands, None)
    PREFILL.launch_backward(ready, problem, operands, torch.zeros(total, h_q, 128, dtype=dtype))
    return problem, choice


# (forward, dq, dk and dv): bytes of stack (registers on AMD) that each may spill. Limits may only shrink.
PREFILL_CASES = [
    pytest.param("h100_sxm", 192, torch.bfloat16, (24, 0, 0), id="h100-192"),
    pytest.param("h100_sxm", 128, torch.bfloat16, (32, 0, 0), id="h100-128"),
    pytest.param("a100_sxm", 192, torch.float16, (48, 24, 0), id="a100-192"),
    pytest.param("b200", 192, torch.bfloat16, (216, 0, 0), id="b200-192"),
    pytest.param("mi300x", 192, torch.bfloat16, (0, 0, 0), id="mi300x-192"),
    pytest.param("l40s", 192, torch.bfloat16, (8, 0, 8), id="l40s-192"),
    pytest.param("l40s", 192, torch.float32, (16, 0, 0), id="l40s-fp32"),
]


@pytest.mark.parametrize(("target", "d_qk", "dtype", "most"), PREFILL_CASES)
def test_prefill(target, d_qk, dtype, most, recorded, tmp_path):
    problem, choice = run_prefill(target, recorded, d_qk, dtype)
    estimates = {
        "prefill_kernel": prefill_config.forward_bytes(choice.forward, problem),
        "query_gradient_kernel": prefill_config.backward_bytes(
            choice.query_gradient, problem, choice.query_gradient.block_m, choice.query_gradient.block_n
        ),
        "key_gradient_kernel": prefill_config.backward_bytes(
            choice.key_gradient, problem, choice.key_gradient.block_n, choice.key_gradient.block_m
        ),
    }
    report = {}
    for (name, estimate), limit in zip(estimates.items(), most, strict=True):
        found = compiled(recorded[name], target)
        report[name] = (found.metadata.shared, estimate, spilled(found, tmp_path), limit)
    assert spilled(compiled(recorded["delta_kernel"], target), tmp_path) == 0
    machine = Target.preset(target).smem_bytes
    assert all(shared <= min(estimate, machine) for shared, estimate, _, _ in report.values()), report
    assert all(spill <= limit for _, _, spill, limit in report.values()), report


def test_every_prefill_config_fits_its_machine():
    problem = PrefillProblem(2, 512, 512, 256, 256, 16, 8, 192, 128, torch.bfloat16)
    for name in ("a100_sxm", "l40s", "h100_sxm", "b200", "mi300x"):
        for dtype in (torch.bfloat16, torch.float32):
            assert PREFILL.configs(replace(problem, dtype=dtype), Target.preset(name)), (name, dtype)


def test_prefill_sizes_beyond_the_tiles_are_refused():
    problem = PrefillProblem(65_535, 512, 512, 256, 256, 70_000, 8, 8, 300, torch.bfloat16)
    assert PREFILL.supports(problem, Target.preset("h100_sxm")).reasons == (
        "takes d_qk from 16 to 256, got 8",
        "takes d_v up to 256, got 300",
        "takes fewer than 65535 requests (an axis of the grid), got 65535",
        "takes up to 65535 heads (an axis of the grid), got 70000",
    )


@pytest.mark.parametrize("layout", ["fp8_656", "fp8_584", "fp8_528", "fp8_528_mx", "fp4_288", "bf16_576"])
@pytest.mark.parametrize("target", TARGETS)
def test_append(target, layout, monkeypatch, tmp_path):
    """Few registers, and no product is fused with a sum, which would round RoPE otherwise than the reference does."""
    from openmla.backends.triton import append

    recorder = Recorder(append.append_kernel)
    monkeypatch.setattr(append, "append_kernel", recorder)
    stored = kv_layout(layout)
    operands = AppendOperands(
        stored.empty_cache(4, 64), torch.zeros(3, dtype=torch.int64), torch.zeros(3, stored.d_qk, dtype=torch.bfloat16),
        torch.zeros(1, dtype=torch.int32), Rope.of_base(64, 16), torch.zeros(3, dtype=torch.int64),
    )  # fmt: skip
    monkeypatch.setattr(append, "converts_to_e4m3", lambda device: target in ("l40s", "h100_sxm", "b200"))
    append.append(stored, operands, 8, 4)
    found = compiled(recorder, target)
    assert spilled(found, tmp_path) <= 8  # the return address of an exact division
    assert found.metadata.shared <= 8192
    if "ptx" in found.asm:  # AMD divides exactly by fused steps, so nothing can be seen there
        assert "fma.rn.f32" not in found.asm["ptx"]


@pytest.mark.parametrize("target", TARGETS)
def test_small_kernels(target, recorded, monkeypatch, tmp_path):
    """Combine, schedule, the merge of whole results, and the checks of ids and offsets."""
    from openmla.backends.triton import parts, values

    for module, name in ((parts, "merge_kernel"), (values, "ids_kernel"), (values, "offsets_kernel")):
        recorded[name] = Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, recorded[name])
    run_decode(target, recorded, s_q=2, is_varlen=True, has_sink=True)
    values.check(*decode_call(s_q=2, is_varlen=True), torch.zeros(8, dtype=torch.int32))
    out, lse = torch.zeros(3, 2, 2, 128, 512, dtype=torch.bfloat16), torch.zeros(3, 2, 128, 2)
    parts.merge(out[0], lse[0], out[1:], lse[1:], torch.zeros(128), 1.0)
    for name in ("combine_kernel", "plan_kernel", "merge_kernel", "ids_kernel", "offsets_kernel"):
        found = compiled(recorded[name], target)
        assert found.metadata.shared <= 16_384
        assert spilled(found, tmp_path) == 0


def test_grids_depend_on_the_problem_alone(recorded):
    """A CUDA graph replays a grid with other lengths."""
    run_decode("h100_sxm", recorded, batch=3)
    assert recorded["decode_kernel"].grid == (2, 132 // 2)
    assert recorded["plan_kernel"].grid == (132 // 2 + 1,)
    assert recorded["combine_kernel"].grid == (128 // 4, 3)


def test_another_batch_compiles_nothing(recorded):
    """A server sees every batch size; one that is 1 or a multiple of 16 must not get a kernel of its own."""
    found = {name: set() for name in recorded}
    for batch in (1, 2, 16, 31):
        run_decode("h100_sxm", recorded, batch=batch)
        for name in ("decode_kernel", "combine_kernel", "plan_kernel"):
            found[name].add(recorded[name].source()[0].hash())
    assert {name: len(each) for name, each in found.items() if each} == dict.fromkeys(
        ("decode_kernel", "combine_kernel", "plan_kernel"), 1
    )


def test_every_tile_of_the_tables_fits_some_machine():
    problem, _ = decode_call()
    for name in ("a100_sxm", "l40s", "h100_sxm", "b200", "mi300x"):
        assert config.candidates(problem, Target.preset(name)), name


def test_tiles_say_where_they_are_known_from():
    """Every list ends in one for any number of rows; what is called measured has a file of rows on that machine."""
    root = Path(__file__).resolve().parents[2]
    lists = tomllib.loads((root / "src/openmla/backends/triton/tiles.toml").read_text())
    assert set(lists) == {"tiles", "prefill", "append"}
    for entry in itertools.chain(*lists.values()):
        kind, _, where = entry["source"].partition(": ")
        assert kind in ("measured", "reasoned") and where, entry
        if kind == "measured":
            rows = [json.loads(line) for line in (root / where.partition(",")[0]).read_text().splitlines()]
            assert any("H100" in str(row) and "triton" in str(row) for row in rows), entry
    for key, listed in config.table().items():
        assert [most for most, _ in listed] == sorted({most for most, _ in listed}), key
        assert listed[-1][0] > 128 * 4096, key
    assert {key[0] for key in config.table()} == {"hopper", "blackwell", "ampere", "cdna3", "any"}
    assert set(prefill_config.table()) == {"hopper", "blackwell", "ampere", "cdna3", "fp32"}


@pytest.mark.parametrize(
    ("arch", "runs"),
    [("sm_75", False), ("sm_80", True), ("sm_89", True), ("sm_90a", True), ("sm_100a", True), ("sm_120", True),
     ("gfx942", True), ("gfx90a", False), ("xpu", False)],
)  # fmt: skip
def test_machines(arch, runs):
    problem, _ = decode_call(h_q=16)
    for kernel in KERNELS[:1]:
        verdict = kernel.supports(problem, Target("some machine", arch, 100, 101_376))
        assert bool(verdict) == runs
        assert runs or verdict.reasons == (f"needs an NVIDIA GPU of sm_80 or later or an AMD gfx942, got {arch}",)


def test_sizes_beyond_the_tiles_are_refused():
    plain, where = kv_layout("bf16_576"), Target.preset("h100_sxm")
    wide = DecodeProblem(1, 1, 1, 16, 1, 700, 600, torch.bfloat16, plain, 64, 4, 4)
    assert DECODE.supports(wide, where).reasons == (
        "holds at most 512 value columns, got d_v=600",
        "holds at most 640 key columns, got 1024 + 128 after padding",
    )
    small = Target("small card", "sm_86", 10, 20_000)
    problem, _ = decode_call()
    assert DECODE.supports(problem, small).reasons == ("no tile fits 20000 bytes of shared memory",)


def test_a_cpu_needs_the_interpreter():
    problem, _ = decode_call()
    assert DECODE.supports(problem, Target.preset("cpu")).reasons == (
        "a CPU runs it only in Triton's interpreter: set TRITON_INTERPRET=1",
    )


def test_explain_works_without_triton():
    """A process in which Triton cannot be imported: the reason says what to install."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from openmla import backends\n"
        "from openmla.backends.triton import KERNELS\n"
        "from openmla.core.target import Target\n"
        "for kernel in KERNELS:\n"
        "    problem = backends.typical_problem(kernel.op)\n"
        "    print(*kernel.supports(problem, Target.preset('h100_sxm')).reasons)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["triton is not installed: pip install openmla[triton]"] * len(KERNELS)


def test_kernels_carry_the_names_of_the_table():
    for kernel in KERNELS:
        listed = [each.name for each in backends.kernels(kernel.op) if each.backend == "triton"]
        assert listed == [kernel.name]
