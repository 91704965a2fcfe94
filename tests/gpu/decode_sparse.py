"""The token-sparse decode on a GPU: correctness first, each variant in its own process, then timing beside the peer.

    python tests/gpu/decode_sparse.py build LIBRARY [FIELD=VALUE,... ...]   where the DSL is installed; needs no GPU
    python tests/gpu/decode_sparse.py gate LIBRARY FUNCTION ...             each in a subprocess; prints who passed
    python tests/gpu/decode_sparse.py check LIBRARY FUNCTION [CASE ...]
    python tests/gpu/decode_sparse.py api [BACKEND]                         the cases through openmla.sparse_decode
    python tests/gpu/decode_sparse.py time LIBRARY ROWS.jsonl FUNCTION ... [--bars --batches --heads --anchors --extra]

`build` without fields compiles what ships, else one variant per FIELD=VALUE list. On the GPU host: torch, apache-tvm-ffi,
openmla on the path; `time` also sgl-flash-mla. A hang is a killed subprocess.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from openmla.backends.base import SparseDecodeOperands
from openmla.backends.cute.decode_sparse import config as sparse
from openmla.backends.cute.decode_sparse.launch import launch
from openmla.core.layout import kv_layout
from openmla.reference import attention
from openmla.reference.quant import read_rows, write_rows
from openmla.split.schedule import plan_decode
from openmla.testing.budget import check as judge

SECONDS, AT_ONCE = 60, 4
CUDA = "cuda"
HOSTILE = (-2, -(2**31), 2**31 - 1, 114514)
LAYOUTS = ("fp8_656", "fp8_584", "fp8_528", "fp8_528_mx")


def cache(layout, num_pages, page_size, generator, spread=1.0):
    """Random keys in a byte layout."""
    found = kv_layout(layout)
    empty = found.empty_cache(num_pages, page_size, device=CUDA)
    rows = torch.randn(num_pages * page_size, found.d_qk, device=CUDA, generator=generator) * spread
    for first in range(0, rows.shape[0], 2**16):  # in pieces: the writer makes index tensors
        slots = torch.arange(first, min(first + 2**16, rows.shape[0]), device=CUDA)
        write_rows(empty, found, slots, rows[slots].to(torch.bfloat16))
    return empty


def flat(kv):
    """All bytes of a cache, one after the other."""
    return kv.view(torch.uint8).as_strided(((kv.shape[0] - 1) * kv.stride(0) + kv.shape[1] * kv.shape[3],), (1,))


def poison(kv, layout, slots, generator, what):
    """Overwrite keys: with NaN, or their scales with any value that the format can hold within reason."""
    if what == "nan":
        rows = torch.full((len(slots), kv_layout(layout).d_qk), float("nan"), device=CUDA)
        return write_rows(kv, layout, slots, rows)
    where, page, place = sparse.bytes_of(layout), slots // kv.shape[1], slots % kv.shape[1]
    first = page * kv.stride(0) + place * where.row_bytes + where.scale_place
    if where.scales_behind_page:
        first = page * kv.stride(0) + kv.shape[1] * where.row_bytes + place * where.scale_bytes
    scales = torch.randint(112, 122, (len(slots), where.scale_bytes), device=CUDA, generator=generator).to(torch.uint8)
    if not where.is_e8m0:
        scales = torch.rand(len(slots), where.scale_bytes // 4, device=CUDA, generator=generator) * 0.02 + 1e-4
    bytes_ = scales.view(torch.uint8).view(len(slots), -1)
    flat(kv)[first[:, None] + torch.arange(where.scale_bytes, device=CUDA)] = bytes_


def selection(layout, lead, topk, g, *, page_size, num_pages, lengths, hostile, absent, scales, keys, stray_nan):
    """A cache, indices into it, and their lengths; what nobody may read is NaN or nonsense."""
    kv = cache(layout, num_pages, page_size, g, keys)
    slots = num_pages * page_size
    reachable = slots - slots // 8 if stray_nan and slots >= 8 else slots
    indices = torch.randint(0, reachable, (*lead, topk), dtype=torch.int32, device=CUDA, generator=g)
    if scales:
        poison(kv, layout, torch.arange(reachable, device=CUDA), g, "scales")
    if reachable < slots:
        poison(kv, layout, torch.arange(reachable, slots, device=CUDA), g, "nan")
    dice = torch.rand(indices.shape, device=CUDA, generator=g)
    indices[dice < absent] = -1
    bad = torch.tensor([*HOSTILE, slots], dtype=torch.int64).to(torch.int32).to(CUDA)
    wild = bad[torch.randint(0, len(bad), indices.shape, device=CUDA, generator=g)]
    indices = torch.where((dice > 1 - hostile), wild, indices)
    length = None
    if lengths is not None:
        length = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
        rows = indices.view(-1, topk)  # behind the end stands anything
        per = length.view(-1) if length.numel() == rows.shape[0] else length.repeat_interleave(lead[-1])
        rows.masked_fill_(torch.arange(topk, device=CUDA)[None] >= per[:, None], 114514)
    return kv, indices, length


def case(
    name, layout, batch, s_q, h_q, topk, *, page_size=64, num_pages=40, lengths=None, sink=None, parts=None, seed=0,
    hostile=0.0, absent=0.0, scales=False, queries=1.0, keys=1.0, varlen=False, stray_nan=True, extra=0,
    extra_lengths=None,
):  # fmt: skip
    """Inputs, plan and poisoned outputs of one problem; `extra` indices into a second cache."""
    g = torch.Generator(CUDA).manual_seed(seed)
    lead = (batch,) if varlen else (batch, s_q)
    how = {"hostile": hostile, "absent": absent, "scales": scales, "keys": keys, "stray_nan": stray_nan}
    kv, indices, length = selection(
        layout, lead, topk, g, page_size=page_size, num_pages=num_pages, lengths=lengths, **how
    )  # fmt: skip
    second = (None, None, None)
    if extra:
        second = selection(layout, lead, extra, g, page_size=2, num_pages=300, lengths=extra_lengths, **how)
    d_qk = kv_layout(layout).d_qk
    q = (torch.randn(*lead, h_q, d_qk, device=CUDA, generator=g) * queries).to(torch.bfloat16)
    sinks = None
    if sink is not None:
        sinks = torch.randn(h_q, device=CUDA, generator=g) * 3
        sinks[0] = sink
    nan = float("nan")
    operands = SparseDecodeOperands(
        q=q, kv_cache=kv, indices=indices, softmax_scale=d_qk**-0.5,
        out=torch.full((*lead, h_q, 512), nan, dtype=torch.bfloat16, device=CUDA),
        lse=torch.full((h_q, batch) if varlen else (batch, h_q, s_q), nan, device=CUDA),
        fault_word=torch.zeros(1, dtype=torch.int32, device=CUDA), topk_length=length, attn_sink=sinks,
        extra_kv_cache=second[0], extra_indices=second[1], extra_topk_length=second[2],
    )  # fmt: skip
    s_q = 1 if varlen else s_q
    parts = parts or max(132 // (-(-h_q // 64) * s_q), 1)
    c = SimpleNamespace(name=name, layout=layout, operands=operands, is_hostile=hostile > 0)
    c = planned(c, sparse.plan(batch, sparse.tiles(topk, extra), parts))
    c.out_accum.fill_(nan)
    c.lse2_accum.fill_(nan)
    return c


def run(module, name, c):
    """The whole operator: the decode kernel and, where the plan splits a request, the merge.

    A name is that of one function with bf16 operands, or `fp16+bf16`: the second repeats what the first has voided. `fp16+`
    leaves it void. One that merges is the whole operator.
    """
    o = c.operands
    redo = c.redo if "+" in name else None
    if "_merges_" in name:
        blocks = c.redo.shape[1:].numel()
        if not hasattr(c, "counts"):
            c.counts = torch.zeros(c.plan.num_pieces, *c.redo.shape[1:], dtype=torch.int32, device=CUDA)
            c.blocks_accum = torch.full((c.plan.num_pieces, blocks * 64, 512), float("nan"), device=CUDA)
        launch(module[name], o, c.metadata, c.num_splits, c.blocks_accum, c.lse2_accum, redo=c.counts)
        return
    for each in filter(None, name.split("+")):
        launch(module[each], o, c.metadata, c.num_splits, c.out_accum, c.lse2_accum, redo=redo)
    if c.plan.num_pieces > c.plan.batch:
        out, lse = (o.out, o.lse) if o.q.dim() == 4 else (o.out.unsqueeze(1), o.lse.T.unsqueeze(2))
        sink = c.lse2_accum[0] if o.attn_sink is None else o.attn_sink
        module["combine_bf16"](
            c.out_accum, c.lse2_accum, c.num_splits, out, lse, sink, 1, int(o.attn_sink is not None)
        )  # fmt: skip


def golden(c):
    o = c.operands
    return attention.sparse_decode(
        o.q, o.kv_cache, o.indices, softmax_scale=o.softmax_scale, d_v=512, layout=c.layout, topk_length=o.topk_length,
        attn_sink=o.attn_sink, extra_kv_cache=o.extra_kv_cache, extra_indices=o.extra_indices,
        extra_topk_length=o.extra_topk_length, extra_layout=c.layout, with_bounds=True,
    )  # fmt: skip


def cases(layout, has_extra):
    """Builders of named cases; small ones first, so that a broken kernel is known early."""
    make = lambda name, *args, **kw: (name, lambda: case(name, layout, *args, **kw))  # noqa: E731
    if has_extra:
        return [
            make("one of each", 1, 1, 64, 1, extra=1),
            make("one CTA", 3, 1, 64, 130, extra=70, parts=1),
            make("everything", 4, 2, 128, 128, extra=512, hostile=0.1, absent=0.1, sink=1.0, scales=True),
            make("lengths", 3, 1, 17, 128, extra=200, lengths=[0, 128, 65], extra_lengths=[200, 0, 1], parts=2),
            make("split", 2, 1, 64, 700, extra=900, parts=9, lengths=[5, 700]),
        ]
    return [
        make("one index", 1, 1, 64, 1),
        make("one tile", 1, 1, 64, 64),
        make("two tiles, one CTA", 1, 1, 64, 128, parts=1),
        make("many tiles, one CTA", 1, 1, 64, 640, parts=1),
        make("many pieces, one CTA", 9, 1, 64, 130, parts=1),
        make("128 heads, two tokens", 3, 2, 128, 200, parts=2),
        make("splits", 2, 2, 128, 1500, parts=33),
        make("8 heads", 3, 1, 8, 300),
        make("17 heads, three tokens, odd pages", 2, 3, 17, 100, page_size=7),
        make("1 head, pages of one", 2, 1, 1, 77, page_size=1, num_pages=1000),
        make("absent keys", 3, 1, 64, 333, absent=0.4),
        make("nobody there", 2, 1, 64, 100, absent=1.1),
        make("hostile indices", 3, 2, 64, 260, hostile=0.3),
        make("nothing but hostile indices", 1, 1, 64, 190, hostile=1.1),
        make("lengths per token", 3, 2, 64, 500, lengths=[[0, 1], [63, 64], [65, 499]], parts=2),
        make("lengths per request, split", 3, 2, 64, 700, lengths=[0, 64, 650], parts=9),
        make("sink", 3, 1, 128, 150, sink=float("inf"), parts=2),
        make("sink, split", 2, 1, 64, 900, sink=-float("inf"), parts=7),
        make("sink, nobody there", 2, 1, 64, 100, sink=-float("inf"), absent=1.1),
        make("scales of any value", 3, 1, 64, 400, scales=True),
        make("peaky", 3, 1, 64, 1000, queries=6.0, keys=2.0),
        make("huge logits", 2, 1, 64, 300, queries=2.0**20, keys=2.0**10),
        make("varlen", 5, 1, 64, 300, varlen=True, lengths=[300, 0, 64, 65, 129]),
        make("many requests", 40, 2, 128, 333, seed=3),
        # work enough for keys in registers (config.SWAPPED_TILES), of which the last must be repeated
        *(
            [
                make("long lists, two blocks of heads", 33, 2, 80, 7680, num_pages=400, absent=0.1),
                make("long lists, lengths", 33, 4, 8, 7680, num_pages=400, lengths=[[0, 1, 7680, 4000]] * 33),
                make("long lists, scales of any value", 33, 2, 128, 7680, num_pages=400, scales=True, seed=4),
            ]
            if layout == "fp8_656"
            else []
        ),
    ]


def judged(c):
    """Verdict and words about the outputs as they stand."""
    report = judge(c.operands.out, c.operands.lse, golden(c), dtype=torch.bfloat16)
    ratios = {rule: round(report.ratio(rule), 3) for rule in ("HARD", "RMS", "LSE")}
    return report.passed, f"{ratios}" if report.passed else str(report)


def through_the_api(c, backend):
    """Verdict and words about one case as `openmla.sparse_decode` answers it, faults included."""
    import openmla

    o = c.operands
    openmla.check_errors()
    out, lse = openmla.sparse_decode(
        o.q, o.kv_cache, o.indices, kv_layout=c.layout, softmax_scale=o.softmax_scale, topk_length=o.topk_length,
        attn_sink=o.attn_sink, extra_kv_cache=o.extra_kv_cache, extra_indices=o.extra_indices,
        extra_topk_length=o.extra_topk_length, extra_kv_layout=None if o.extra_kv_cache is None else c.layout,
        backend=backend,
    )  # fmt: skip
    fine, words = judged(SimpleNamespace(**{**vars(c), "operands": o._replace(out=out, lse=lse)}))
    faults = [fault.value for fault in openmla.check_errors()]
    return fine and faults == ([8] if c.is_hostile else []), f"{words} faults {faults}"


def api(backend):
    """Whether every case of every variant that ships passes through the public call."""
    passed = True
    for layout, has_extra in sparse.SERVED:
        for title, build in cases(layout, has_extra):
            fine, words = through_the_api(build(), backend)
            passed &= fine
            print(f"  {'ok  ' if fine else 'FAIL'} {layout} {has_extra} {title}: {words}", flush=True)
    return passed


def check(library, name, only=()):
    import tvm_ffi

    module, layout = tvm_ffi.load_module(library), layout_of(name)
    passed = True
    for title, build in cases(layout, "_extra_" in name):
        if only and title not in only:
            continue
        c = cut(build()) if "_merges_" in name else build()
        run(module, name, c)
        torch.cuda.synchronize()
        fine, text = judged(c)
        word = c.operands.fault_word.item()
        fine &= word == (8 if c.is_hostile else 0)
        first = [t.clone() for t in (c.operands.out, c.operands.lse)]
        same = True
        for _ in range(3):
            c.operands.out.fill_(float("nan"))
            run(module, name, c)
            torch.cuda.synchronize()
            same &= all(
                torch.equal(x.view(torch.uint8), y.contiguous().view(torch.uint8))
                for x, y in zip(first, (c.operands.out, c.operands.lse), strict=True)
            )
        fine &= same
        passed &= fine
        print(f"  {'ok  ' if fine else 'FAIL'} {title}: {text} word {word} {'same' if same else 'DIFFERS'}", flush=True)
    if not only and "_extra_" not in name:
        passed &= every_code(module, name, layout) and other_rows_unchanged(module, name, layout)
        if "+" in name and layout == "fp8_656":
            passed &= late_scales(module, name) and odd_queries(module, name)
    return passed


def every_code(module, name, layout, batch=16):
    """One key per row of Q and V: the output is the key itself, bit for bit, for all 256 codes and odd scales."""
    found, where = kv_layout(layout), sparse.bytes_of(layout)
    c = case("every code", layout, batch, 1, 64, 1, num_pages=1, stray_nan=False)
    g = torch.Generator(CUDA).manual_seed(5)
    codes = torch.arange(found.d_quant, device=CUDA) % 256
    codes = torch.where(codes % 128 == 127, 1, codes).to(torch.uint8)  # NaN has its own case
    rows = flat(c.operands.kv_cache)[: 64 * where.row_bytes].view(64, -1)
    rows[:, : found.d_quant] = codes
    poison(c.operands.kv_cache, layout, torch.arange(64, device=CUDA), g, "scales")
    run(module, name, c)
    torch.cuda.synchronize()
    want = read_rows(c.operands.kv_cache, layout, c.operands.indices.view(-1).long())[:, :512]
    got = c.operands.out.view(batch, 64, 512)
    fine = torch.equal(got, want[:, None].expand(batch, 64, 512).to(got.dtype))
    print(f"  {'ok  ' if fine else 'FAIL'} every code comes out as the oracle's bf16", flush=True)
    rows[3, 5] = 0x7F
    c.operands.indices.fill_(3)
    run(module, name, c)
    torch.cuda.synchronize()
    seen = c.operands.out.isnan().view(-1, 512)
    has = bool(seen[:, 5].all()) and bool(c.operands.lse.isnan().all())
    print(f"  {'ok  ' if has else 'FAIL'} a NaN code is NaN in out and lse", flush=True)
    return fine and has


def other_rows_unchanged(module, name, layout):
    """Bad indices of one token leave the bits of the others alone."""
    c = case("others", layout, 4, 2, 64, 300, parts=3)
    run(module, name, c)
    torch.cuda.synchronize()
    before, fine = c.operands.out.clone(), True
    for bad in HOSTILE:
        c.operands.indices[1, 1, 7] = bad
        c.operands.fault_word.zero_()
        run(module, name, c)
        torch.cuda.synchronize()
        mask = torch.ones(4, 2, dtype=torch.bool, device=CUDA)
        mask[1, 1] = False
        fine &= torch.equal(before[mask], c.operands.out[mask]) and c.operands.fault_word.item() == 8 and judged(c)[0]
    print(f"  {'ok  ' if fine else 'FAIL'} a bad index leaves other tokens alone", flush=True)
    return fine


def late_scales(module, name):
    """A scale that fp16 does not hold, in any tile of a list, is found, and voids what it must alone."""
    fine = True
    for tile in (0, 1, 2, 3, 7, 15):
        c = case("late", "fp8_656", 2, 1, 8, 1024, parts=2, stray_nan=False, num_pages=80)
        o = c.operands
        o.indices.clamp_(max=5000)
        o.indices[1, 0, 64 * tile + 37] = 5100
        flat(o.kv_cache)[5100 * 656 + 512 : 5100 * 656 + 528].view(torch.float32)[2] = 0.3
        run(module, name, c)
        fine &= judged(c)[0] and c.redo.flatten().tolist() == [0, 1]
    for parts in (132, 33, 7):
        c = case("few odd", "fp8_656", 20, 2, 128, 700, parts=parts, num_pages=400, stray_nan=False, absent=0.1)
        g = torch.Generator(CUDA).manual_seed(1)
        poison(c.operands.kv_cache, "fp8_656", torch.randint(0, 25_600, (20,), device=CUDA, generator=g), g, "scales")
        run(module, name, c)
        fine &= judged(c)[0] and set(c.redo.flatten().tolist()) <= {0, 1}
    print(f"  {'ok  ' if fine else 'FAIL'} odd scales anywhere in a list", flush=True)
    return fine


def odd_queries(module, name):
    """Rows of Q from 1e-36 to 1e34, and softmax scales of every sign, void nothing."""
    made = [case("rows", "fp8_656", 3, 1, 64, 300, stray_nan=False, absent=0.2)]
    q = made[0].operands.q
    q.mul_(torch.logspace(-36, 34, 64, device=CUDA).view(1, 1, 64, 1))
    q[0, 0, 3, :512] *= 1e-8  # RoPE leads
    q[0, 0, 4, 512:] *= 1e-8
    q[0, 0, 5] = 0.0
    for scale in (0.0, -0.05, -3.0, 1e-30, 5.0):
        made.append(case("scale", "fp8_656", 3, 2, 17, 400, absent=0.3, queries=3.0))
        made[-1].operands = made[-1].operands._replace(softmax_scale=scale)
    fine = True
    for c in made:
        run(module, name, c)
        fine &= judged(c)[0] and not c.redo.any()
    print(f"  {'ok  ' if fine else 'FAIL'} queries and softmax scales of any size", flush=True)
    return fine


def layout_of(name):
    return next(layout for layout in sorted(LAYOUTS, key=len, reverse=True) if layout in name)


def gate(library, names):
    """Which functions pass; each in its own process with a limit, some at once: more wait for one another."""

    def one(name):
        start = time.time()
        try:
            done = subprocess.run(
                [sys.executable, __file__, "check", library, name],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS,
            )  # fmt: skip
            text, verdict = done.stdout, "PASS" if done.returncode == 0 else "FAIL"
        except subprocess.TimeoutExpired as late:
            text, verdict = (late.stdout or b"").decode(), "HANG"
        print(f"{name}: {verdict} after {time.time() - start:.0f} s", flush=True)
        if verdict != "PASS" or name == names[0]:
            print(text[-4500:], flush=True)
        return verdict == "PASS"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [name for name, fine in zip(names, pool.map(one, names), strict=True) if fine]


def build(library, variants):
    """Compile variants and the merge into one library."""
    import cutlass

    from openmla.backends.cute import combine
    from openmla.backends.cute.decode_sparse.launch import build as build_variant
    from openmla.backends.cute.toolchain import compile_kernel, link_bundle

    def value(text):
        return int(text) if text.lstrip("-").isdigit() else {"True": True, "False": False}.get(text, text)

    wanted = [
        sparse.Config(**{k: value(v) for k, v in (field.split("=") for field in fields.split(","))})
        for fields in variants
    ]
    with tempfile.TemporaryDirectory() as folder:
        wanted = wanted or [*sparse.VARIANTS]
        compiled = [build_variant(config, Path(folder)) for config in wanted]
        element = cutlass.BFloat16
        arguments = combine.fake_arguments(element)
        compiled.append(compile_kernel(combine.Combine(element, 512), arguments, "combine_bf16", out_dir=Path(folder)))
        for config, each in zip([*wanted, ""], compiled, strict=True):
            print(each.name, config, "spills", each.resources.spills)
        link_bundle([each.object_path for each in compiled], Path(library))


# ---------------------------------------------------------------------- timing


def timing_case(layout, batch, s_q, h_q, topk, extra=0):
    """Keys from a cache of 16,384 tokens per request, each token its own selection without repetition."""
    tokens = max(16384, 2 * topk)
    pages = batch * tokens // 64
    found = kv_layout(layout)
    g = torch.Generator(CUDA).manual_seed(0)
    kv = found.empty_cache(pages, 64, device=CUDA)
    sample = cache(layout, 64, 64, g, 0.1)
    for first in range(0, pages, 64):
        kv[first : first + 64] = sample[: min(64, pages - first)]
    indices = torch.empty(batch, s_q, topk, dtype=torch.int32, device=CUDA)
    for b in range(batch):
        chosen = torch.rand(s_q, tokens, device=CUDA, generator=g).topk(topk, dim=1).indices
        indices[b] = (chosen + b * tokens).int()
    q = (torch.randn(batch, s_q, h_q, found.d_qk, device=CUDA, generator=g) * 0.1).to(torch.bfloat16)
    others = {"extra_kv_cache": kv, "extra_indices": indices[..., :extra].flip(-1).contiguous()} if extra else {}
    operands = SparseDecodeOperands(
        q=q, kv_cache=kv, indices=indices, softmax_scale=found.d_qk**-0.5,
        out=torch.empty(batch, s_q, h_q, 512, dtype=torch.bfloat16, device=CUDA),
        lse=torch.empty(batch, h_q, s_q, device=CUDA), fault_word=torch.zeros(1, dtype=torch.int32, device=CUDA),
        **others,
    )  # fmt: skip
    name = f"{layout} b{batch} s_q{s_q} h{h_q} topk{topk}" + (f"+{extra}" if extra else "")
    c = SimpleNamespace(name=name, layout=layout, operands=operands)
    blocks = sparse.tiles(topk, extra)
    most = max(132 // (-(-h_q // 64) * s_q), 1)
    return planned(c, sparse.plan(batch, blocks, sparse.parts(most, batch, blocks, batch * s_q * h_q)))


def planned(c, plan):
    """The same problem with another plan."""
    metadata = plan.tile_scheduler_metadata(CUDA)
    rows = c.operands.q.shape[-3] * c.operands.q.shape[-2] if c.operands.q.dim() == 4 else c.operands.q.shape[-2]
    return SimpleNamespace(**{
        **vars(c), "plan": plan, "metadata": metadata,
        "num_splits": plan.num_splits_tensor(CUDA),
        "out_accum": torch.empty(plan.num_pieces, rows, 512, device=CUDA),
        "lse2_accum": torch.empty(plan.num_pieces, rows, device=CUDA),
        "redo": torch.full(redo_shape(c.operands, metadata), 7, dtype=torch.int32, device=CUDA),
    })  # fmt: skip


def cut(c):
    """The same problem with a plan that does not mind what a merge costs."""
    lengths = [64 * blocks for blocks in c.plan.blocks]
    return planned(c, plan_decode(lengths, c.metadata.shape[0], block_tokens=64, overhead_blocks=0, merge_blocks=0))


def redo_shape(operands, metadata):
    """A word per CTA."""
    s_q = operands.q.shape[1] if operands.q.dim() == 4 else 1
    return metadata.shape[0], s_q, -(-operands.q.shape[-2] // 64)


def peer_call(c):
    """FlashMLA's sparse FP8 decode; it takes 64 or 128 heads, so fewer are padded beforehand."""
    import flash_mla

    o = c.operands
    meta, _ = flash_mla.get_mla_metadata()
    q, h_q = o.q, o.q.shape[2]
    wide = 64 if h_q <= 64 else 128
    if h_q != wide:
        q = torch.cat([q, q.new_zeros(*q.shape[:2], wide - h_q, q.shape[3])], 2)
    return lambda: flash_mla.flash_mla_with_kvcache(
        q, o.kv_cache, None, None, 512, meta, softmax_scale=o.softmax_scale, is_fp8_kvcache=True, indices=o.indices,
        extra_k_cache=o.extra_kv_cache, extra_indices_in_kvcache=o.extra_indices, use_legacy=True,
    )  # fmt: skip


def graphed(call):
    """The call as a CUDA graph: host time of nobody counts.

    It keeps the call alive. What a call makes when it first runs and keeps, as the peer's does its metadata (`peer_call`), lies
    outside the graph's memory; with the call gone, replays would read freed memory: wrong times, then an illegal access.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = call()
    return lambda: (graph.replay(), keep, call)[0]


def interleaved(calls, rounds, flush):
    """Median and spread of each call in us, one after another per round, cold L2."""
    times = {name: [] for name in calls}
    for _ in range(2):
        for call in calls.values():
            call()
    for _ in range(rounds):
        events = []
        for name, call in calls.items():
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            events.append((name, begin, end))
        torch.cuda.synchronize()
        for name, begin, end in events:
            times[name].append(begin.elapsed_time(end) * 1e3)
    return {name: (statistics.median(t), min(t), max(t)) for name, t in times.items()}


SUITES = {
    "bars": [("fp8_656", 128, 2, 128, 2048), ("fp8_656", 2, 2, 128, 2048), ("fp8_656", 148, 2, 64, 16384)],
    "batches": [("fp8_656", b, 2, 128, 2048) for b in (64, 74)],
    "heads": [("fp8_656", b, 1, h, 2048) for h in (8, 16) for b in (1, 16, 128)],
    "anchors": [("fp8_656", 148, 2, 128, 16384)],
    "fp8_584": [("fp8_584", 148, 2, h, 16384) for h in (64, 128)],
    "extra": [("fp8_584", b, 2, 64, 512, 128) for b in (64, 128)],
    "quick": [("fp8_656", 128, 2, 128, 2048)],
}  # fmt: skip


def time_all(library, rows_path, names, wanted):
    import tvm_ffi

    module = tvm_ffi.load_module(library)
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device=CUDA)
    rows = open(rows_path, "a")  # noqa: SIM115
    common = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"), "peer": "sgl-flash-mla 1.0.0, sparse FP8 decode, legacy path",
    }  # fmt: skip
    for layout, batch, s_q, h_q, topk, *extra in [shape for name in wanted or ["bars"] for shape in SUITES[name]]:
        c = timing_case(layout, batch, s_q, h_q, topk, *extra)
        mine = [name for name in names if layout_of(name) == layout and ("_extra_" in name) == bool(extra)]
        calls = {"peer": peer_call(c)}
        for name in mine:
            calls[name] = partial(run, module, name, c)
        peer_out = calls["peer"]()[0]
        run(module, mine[0], c)
        torch.cuda.synchronize()
        differ = (peer_out[:, :, :h_q].float() - c.operands.out.float()).abs().max().item()
        flops = 2 * batch * s_q * h_q * (c.operands.q.shape[3] + 512) * (topk + sum(extra))
        result = interleaved({name: graphed(call) for name, call in calls.items()}, 12, flush)
        print(f"== {c.name} pieces {c.plan.num_pieces} largest difference {differ:.2e}", flush=True)
        for name, (median, low, high) in result.items():
            row = {
                **common, "case": c.name, "kernel": name, "median_us": round(median, 2), "min_us": round(low, 2),
                "max_us": round(high, 2), "tflops": round(flops / median / 1e6, 1),
                "ratio": round(result["peer"][0] / median, 4), "pieces": c.plan.num_pieces,
            }  # fmt: skip
            rows.write(json.dumps(row) + "\n")
            print(
                f"   {name:36s} {median:8.1f} us [{low:.1f} {high:.1f}] {row['tflops']:6.1f} TFLOPS  x {row['ratio']:.3f}",
                flush=True,
            )
        rows.flush()
        del c, calls, result
        torch.cuda.empty_cache()


if __name__ == "__main__":
    verb, library, *rest = [*sys.argv[1:], "cute"] if sys.argv[1:] == ["api"] else sys.argv[1:]
    flags = [x[2:] for x in rest if x.startswith("--")]
    rest = [x for x in rest if not x.startswith("--")]
    if verb == "api":
        sys.exit(0 if api(library) else 1)
    if verb == "check":
        sys.exit(0 if check(library, rest[0], rest[1:]) else 1)
    if verb == "build":
        build(library, rest)
    if verb == "gate":
        print("passed:", " ".join(gate(library, rest)))
    if verb == "time":
        time_all(library, rest[0], rest[1:], flags)
