"""The sparse prefill on a GPU: correctness first, each variant in its own process, then timing beside the peer.

    python tests/gpu/prefill_sparse.py build LIBRARY [FIELD=VALUE,... ...]   where the DSL is installed; needs no GPU
    python tests/gpu/prefill_sparse.py gate LIBRARY FUNCTION ... [--brief]   each in a subprocess; prints who passed
    python tests/gpu/prefill_sparse.py check LIBRARY FUNCTION [CASE ...]
    python tests/gpu/prefill_sparse.py time LIBRARY ROWS.jsonl FUNCTION ... [--anchors --quick --heads --decode]
    python tests/gpu/prefill_sparse.py once LIBRARY FUNCTION CASE            one launch, for a profiler
    python tests/gpu/prefill_sparse.py sanitize LIBRARY FUNCTION             compute-sanitizer's four tools, small cases

`build` without fields compiles what ships, else one variant per FIELD=VALUE list. On the GPU host: torch, apache-tvm-ffi,
openmla on the path; `time` also sgl-flash-mla. A hang is a killed subprocess.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from openmla.backends.base import SparseDecodeOperands, SparsePrefillOperands
from openmla.backends.cute.prefill_sparse import config as gather
from openmla.backends.cute.prefill_sparse.launch import launch_decode, launch_prefill, launch_split
from openmla.reference import attention
from openmla.split.combine import merge
from openmla.testing.budget import check as judge

SECONDS = 90
CUDA = "cuda"
HOSTILE = (-2, -(2**31), 2**31 - 1, 114514)
NAN = float("nan")
BRIEF = ("one index", "three tiles", "hostile indices", "lengths", "long lists")


def selection(lead, topk, rows, g, *, lengths, hostile, absent, stray_nan):
    """Indices into `rows` rows, lengths, and the rows nobody may read."""
    reachable = rows - rows // 8 if stray_nan and rows >= 8 else rows
    indices = torch.randint(0, reachable, (lead, topk), dtype=torch.int32, device=CUDA, generator=g)
    dice = torch.rand(indices.shape, device=CUDA, generator=g)
    indices[dice < absent] = -1
    bad = torch.tensor([*HOSTILE, rows], dtype=torch.int64).to(torch.int32).to(CUDA)
    wild = bad[torch.randint(0, len(bad), indices.shape, device=CUDA, generator=g)]
    indices = torch.where(dice > 1 - hostile, wild, indices)
    length = None
    if lengths is not None:
        length = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
        behind = torch.arange(topk, device=CUDA)[None] >= length[:, None]
        indices.masked_fill_(behind, 114514)  # behind the end stands anything
    return indices, length, slice(reachable, rows)


def case(
    name, form, tokens, h_q, topk, *, d_qk=576, rows=1000, page_size=64, lengths=None, sink=None, parts=None, seed=0,
    hostile=0.0, absent=0.0, queries=1.0, keys=1.0, stray_nan=True, nan_key=False, strided=False,
):  # fmt: skip
    """Inputs and poisoned outputs of one problem. `rows` is what indices can name; pages are in the form "pages"."""
    g = torch.Generator(CUDA).manual_seed(seed)
    rows = rows if form == "rows" else rows // page_size * page_size
    how = {"lengths": lengths, "hostile": hostile, "absent": absent, "stray_nan": stray_nan}
    indices, length, nobody = selection(tokens, topk, rows, g, **how)
    kv = (torch.randn(rows, d_qk, device=CUDA, generator=g) * keys).to(torch.bfloat16)
    kv[nobody] = NAN
    if nan_key:
        kv[indices[0, 0].long(), 5] = NAN
    if strided:  # rows and heads lie apart, by multiples of 16 bytes
        kv = torch.cat([kv, torch.full_like(kv, NAN)[:, :64]], 1)[:, :d_qk]
    q = (torch.randn(tokens, h_q + strided, d_qk, device=CUDA, generator=g) * queries).to(torch.bfloat16)[:, :h_q]
    sinks = None
    if sink is not None:
        sinks = torch.randn(h_q, device=CUDA, generator=g) * 3
        sinks[0] = sink
    filled = lambda *shape, dtype=torch.float32: torch.full(shape, NAN, dtype=dtype, device=CUDA)  # noqa: E731
    word = torch.zeros(1, dtype=torch.int32, device=CUDA)
    if form == "rows":
        operands = SparsePrefillOperands(
            q, kv[:, None], indices[:, None], d_qk**-0.5, filled(tokens, h_q, 512, dtype=torch.bfloat16),
            filled(tokens, h_q), filled(tokens, h_q), word, length, sinks,
        )  # fmt: skip
    else:
        pages = kv.view(-1, page_size, 1, d_qk)
        operands = SparseDecodeOperands(
            q[:, None], pages, indices[:, None], d_qk**-0.5, filled(tokens, 1, h_q, 512, dtype=torch.bfloat16),
            filled(tokens, h_q, 1), word, length, sinks,
        )  # fmt: skip
    parts = min(parts or max(132 // -(-h_q // 64), 1), tokens)
    return SimpleNamespace(name=name, form=form, operands=operands, parts=parts, is_hostile=hostile > 0)


def run(module, name, c):
    """The operator: one launch; of pieces and their merge by the law in PyTorch."""
    if "_split_" in name:
        return run_pieces(module[name], c)
    (launch_prefill if c.form == "rows" else launch_decode)(module[name], c.operands, c.parts)


def run_pieces(function, c):
    """Lists in up to three pieces, two query tokens per request where they are even in number."""
    o = c.operands
    tokens, _, heads, d_qk = o.q.shape
    s_q, tiles = 2 - tokens % 2, -(-o.indices.shape[-1] // 64)
    each = -(-tiles // 3)
    splits, batch = -(-tiles // each), tokens // s_q
    length = None if o.topk_length is None else o.topk_length.view(batch, s_q)
    asked = o._replace(q=o.q.view(batch, s_q, heads, d_qk), indices=o.indices.view(batch, s_q, -1), topk_length=length)
    outs = torch.full((batch * splits, s_q * heads, 512), NAN, device=CUDA)
    lses = torch.full((batch * splits, s_q * heads), NAN, device=CUDA)
    launch_split(function, asked, outs, lses, splits, each * 64, min(c.parts, tokens * splits))
    out, lse = merge(*(x.unflatten(0, (batch, splits)).transpose(0, 1) for x in (outs, lses)), base=2.0)
    lse = (lse * 0.6931471805599453).view(tokens, heads)
    if o.attn_sink is not None:
        factor = 1 / (1 + torch.exp(o.attn_sink - lse))
        out = out * torch.where(lse == -torch.inf, torch.zeros_like(factor), factor).view(batch, s_q * heads, 1)
    o.out.copy_(out.view(o.out.shape))
    o.lse.copy_(lse[..., None])
    return None


def golden(c):
    o = c.operands
    if c.form == "rows":
        return attention.sparse_prefill(
            o.q, o.kv, o.indices, softmax_scale=o.softmax_scale, d_v=512, topk_length=o.topk_length,
            attn_sink=o.attn_sink, with_bounds=True,
        )  # fmt: skip
    return attention.sparse_decode(
        o.q, o.kv_cache, o.indices, softmax_scale=o.softmax_scale, d_v=512, topk_length=o.topk_length,
        attn_sink=o.attn_sink, with_bounds=True, layout=f"bf16_{o.q.shape[-1]}",
    )  # fmt: skip


def cases(form, d_qk):
    """Builders of named cases; small ones first, so that a broken kernel is known early."""
    make = lambda name, *args, **kw: (name, lambda: case(name, form, *args, d_qk=d_qk, **kw))  # noqa: E731
    return [
        make("one index", 1, 64, 1),
        make("one tile", 1, 64, 64),
        make("two tiles", 1, 64, 128),
        make("three tiles", 1, 64, 190),
        make("ten tiles", 1, 64, 640),
        make("many tokens, one CTA", 9, 64, 130, parts=1),
        make("one tile each, one CTA", 23, 64, 40, parts=1),
        make("128 heads, two tokens each", 6, 128, 200, parts=3),
        make("8 heads", 3, 8, 300),
        make("17 heads, odd pages", 6, 17, 100, page_size=7),
        make("1 head, pages of one", 2, 1, 77, page_size=1),
        make("200 heads", 2, 200, 100),
        make("absent keys", 3, 64, 333, absent=0.4),
        make("nobody there", 2, 64, 100, absent=1.1),
        make("hostile indices", 3, 64, 260, hostile=0.3),
        make("nothing but hostile indices", 1, 64, 190, hostile=1.1),
        make("lengths", 6, 64, 500, lengths=[0, 1, 63, 64, 65, 499], parts=2),
        make("sink", 3, 128, 150, sink=float("inf"), parts=2),
        make("sink, nobody there", 2, 64, 100, sink=-float("inf"), absent=1.1),
        make("peaky", 3, 64, 1000, queries=6.0, keys=2.0),
        make("huge logits", 2, 64, 300, queries=2.0**20, keys=2.0**10),
        make("rows and heads lie apart", 4, 72, 200, strided=form == "rows"),
        make("many tokens", 200, 128, 333, seed=3),
        make("long lists", 140, 64, 2048, rows=5000),
    ]


def judged(c):
    """Verdict and words about the outputs as they stand."""
    want = golden(c)
    report = judge(c.operands.out, c.operands.lse, want, dtype=torch.bfloat16)
    ratios = {rule: round(report.ratio(rule), 3) for rule in ("HARD", "RMS", "LSE")}
    fine, words = report.passed, f"{ratios}" if report.passed else str(report)
    if c.form == "rows":
        largest, mine = want.max_logits, c.operands.max_logits.double()
        seen = torch.isfinite(largest)
        off = (mine - largest)[seen].abs() / (1e-5 + 2e-5 * largest[seen].abs())
        worst = round(off.max().item(), 3) if off.numel() else 0.0
        good = worst <= 1 and torch.equal(mine[~seen], largest[~seen].to(mine))
        fine, words = fine and good, f"{words} max_logits {worst}"
    return fine, words


def outputs(c):
    """What a launch writes."""
    return [c.operands.out, c.operands.lse, *([c.operands.max_logits] if c.form == "rows" else [])]


def check(library, name, only=()):
    import tvm_ffi

    module = tvm_ffi.load_module(library)
    form, d_qk = form_of(name), d_qk_of(name)
    passed = True
    for title, build in cases(form, d_qk):
        if only and title not in only:
            continue
        c = build()
        run(module, name, c)
        torch.cuda.synchronize()
        fine, text = judged(c)
        word = c.operands.fault_word.item()
        fine &= word == (8 if c.is_hostile else 0)
        first = [t.clone() for t in outputs(c)]
        same = True
        for _ in range(3):
            for t in outputs(c):
                t.fill_(NAN)
            run(module, name, c)
            torch.cuda.synchronize()
            same &= all(
                torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(first, outputs(c), strict=True)
            )
        fine &= same
        passed &= fine
        print(f"  {'ok  ' if fine else 'FAIL'} {title}: {text} word {word} {'same' if same else 'DIFFERS'}", flush=True)
    if not only:
        passed &= other_rows_unchanged(module, name, form, d_qk)
    return passed


def other_rows_unchanged(module, name, form, d_qk):
    """Bad indices or a NaN key of one token leave the bits of the others alone; the NaN is seen."""
    c = case("others", form, 8, 128, 300, d_qk=d_qk, parts=3)
    run(module, name, c)
    torch.cuda.synchronize()
    others = torch.arange(8, device=CUDA) != 3
    before, fine = c.operands.out.clone(), True
    for bad in HOSTILE:
        c.operands.indices[3, 0, 7] = bad
        c.operands.fault_word.zero_()
        run(module, name, c)
        torch.cuda.synchronize()
        fine &= (
            torch.equal(before[others], c.operands.out[others]) and c.operands.fault_word.item() == 8 and judged(c)[0]
        )
    rows = c.operands.kv if form == "rows" else c.operands.kv_cache.flatten(0, 1)
    last = rows.shape[0] - 1  # NaN all over, and nobody reads it until now
    c.operands.indices[3, 0, 7] = last
    run(module, name, c)
    torch.cuda.synchronize()
    fine &= torch.equal(before[others], c.operands.out[others]) and bool(c.operands.out[3].isnan().all())
    if form == "rows":  # the maximum passes over NaN, and must not hide it
        fine &= bool(c.operands.max_logits[3].isnan().all()) and not bool(c.operands.max_logits[others].isnan().any())
    if c.operands.topk_length is None:
        wrong = torch.full((8,), 300, dtype=torch.int32, device=CUDA)
        wrong[3], wrong[5] = -5, 2**31 - 1
        c.operands.indices[3, 0, 7] = 0
        c = SimpleNamespace(**{**vars(c), "operands": c.operands._replace(topk_length=wrong)})
        c.operands.fault_word.zero_()
        run(module, name, c)
        torch.cuda.synchronize()
        fine &= torch.equal(before[others], c.operands.out[others]) and c.operands.fault_word.item() == 16
        fine &= bool((c.operands.out[3] == 0).all())
    print(
        f"  {'ok  ' if fine else 'FAIL'} bad indices, lengths and keys of a token leave other tokens alone", flush=True
    )
    return fine


def form_of(name):
    return "pages" if "_pages_" in name else "rows"


def d_qk_of(name):
    return 512 if "_d512_" in name else 576


def gate(library, names, only=()):
    """Which functions pass (the cases of these names, or all); each in its own process with a limit, all at once."""
    start = time.time()
    procs = {
        name: subprocess.Popen(
            [sys.executable, __file__, "check", library, name, *only],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name in names
    }  # fmt: skip
    good = []
    for name, proc in procs.items():
        try:
            text, _ = proc.communicate(timeout=max(SECONDS - (time.time() - start), 1))
            verdict = "PASS" if proc.returncode == 0 else "FAIL"
        except subprocess.TimeoutExpired:
            proc.kill()
            text, _ = proc.communicate()
            verdict = "HANG"
        print(f"{name}: {verdict} after {time.time() - start:.0f} s", flush=True)
        if verdict != "PASS" or name == names[0]:
            print(text[-4500:], flush=True)
        if verdict == "PASS":
            good.append(name)
    return good


def build(library, variants):
    """Compile variants into one library."""
    from openmla.backends.cute.prefill_sparse.launch import build as build_variant
    from openmla.backends.cute.toolchain import link_bundle

    def value(text):
        return int(text) if text.lstrip("-").isdigit() else {"True": True, "False": False}.get(text, text)

    wanted = [
        gather.Config(**{k: value(v) for k, v in (field.split("=") for field in fields.split(","))})
        for fields in variants
    ]
    with tempfile.TemporaryDirectory() as folder:
        wanted = wanted or [*gather.VARIANTS, *gather.CANDIDATES]
        compiled = [build_variant(config, Path(folder)) for config in wanted]
        for config, each in zip(wanted, compiled, strict=True):
            print(each.name, config, "spills", each.resources.spills)
        link_bundle([each.object_path for each in compiled], Path(library))


# ---------------------------------------------------------------------- timing


def timing_case(form, d_qk, h_q, tokens, topk, rows):
    """Each token its own selection without repetition, in random order, as the anchors have it; attention sink on."""
    g = torch.Generator(CUDA).manual_seed(0)
    q = (torch.randn(tokens, h_q, d_qk, device=CUDA, generator=g) * 0.1).to(torch.bfloat16)
    kv = (torch.randn(rows, d_qk, device=CUDA, generator=g) * 0.1).to(torch.bfloat16)
    indices = torch.empty(tokens, topk, dtype=torch.int32, device=CUDA)
    for first in range(0, tokens, 512):
        many = min(512, tokens - first)
        indices[first : first + many] = torch.rand(many, rows, device=CUDA, generator=g).topk(topk, dim=1).indices.int()
    sink = torch.randn(h_q, device=CUDA, generator=g)
    word = torch.zeros(1, dtype=torch.int32, device=CUDA)
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=CUDA)  # noqa: E731
    if form == "rows":
        operands = SparsePrefillOperands(
            q, kv[:, None], indices[:, None], d_qk**-0.5, empty(tokens, h_q, 512, dtype=torch.bfloat16),
            empty(tokens, h_q), empty(tokens, h_q), word, None, sink,
        )  # fmt: skip
    else:
        operands = SparseDecodeOperands(
            q[:, None], kv.view(-1, 64, 1, d_qk), indices[:, None], d_qk**-0.5,
            empty(tokens, 1, h_q, 512, dtype=torch.bfloat16), empty(tokens, h_q, 1), word, None, sink,
        )  # fmt: skip
    parts = min(max(132 // -(-h_q // 64), 1), tokens)
    name = f"{form} d{d_qk} h{h_q} tokens {tokens} topk {topk} of {rows}"
    return SimpleNamespace(name=name, form=form, operands=operands, parts=parts)


def peer_call(c):
    """FlashMLA's sparse prefill; it takes 64 or 128 heads, so fewer are padded beforehand."""
    import flash_mla

    o = c.operands
    if c.form == "pages":
        o = SparsePrefillOperands(
            o.q[:, 0], o.kv_cache.flatten(0, 1), o.indices, o.softmax_scale, o.out[:, 0], o.lse[..., 0], o.lse[..., 0],
            o.fault_word, None, o.attn_sink,
        )  # fmt: skip
    q, sink, h_q = o.q, o.attn_sink, o.q.shape[1]
    wide = 64 if h_q <= 64 else 128
    if h_q != wide:
        q = torch.cat([q, q.new_zeros(q.shape[0], wide - h_q, q.shape[2])], 1)
        sink = torch.cat([sink, sink.new_zeros(wide - h_q)])
    return lambda: flash_mla.flash_mla_sparse_fwd(
        q, o.kv, o.indices, o.softmax_scale, d_v=512, attn_sink=sink, use_legacy=True
    )


def interleaved(calls, rounds, flush):
    """Median and spread of each call in us, one after another per round, cold L2."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    names = list(calls)
    for turn in range(rounds):
        events = []
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody is always behind the same one
            call = calls[name]
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
    "anchors": [
        *(("rows", 576, 128, 4096, 2048, rows) for rows in (8192, 32768, 131072)),
        *(("rows", 512, 64, 4096, 512, rows) for rows in (8192, 65536)),
        *(("rows", 512, 128, 4096, 1024, rows) for rows in (8192, 65536)),
    ],
    "quick": [("rows", 576, 128, 4096, 2048, 8192)],
    "pages": [("pages", 576, 128, 4096, 2048, 8192)],  # what max_logits cost
    "heads": [("rows", 576, h, 2048, 2048, 32768) for h in (16, 64)],
    "decode": [("pages", 576, 128, tokens, 2048, 131072) for tokens in (128, 256)],
}


def time_all(library, rows_path, names, wanted):
    import tvm_ffi

    module = tvm_ffi.load_module(library)
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device=CUDA)
    rows = open(rows_path, "a")  # noqa: SIM115
    common = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"), "peer": "sgl-flash-mla 1.0.0, sparse prefill, legacy path",
    }  # fmt: skip
    for form, d_qk, h_q, tokens, topk, kv_rows in [shape for name in wanted or ["anchors"] for shape in SUITES[name]]:
        c = timing_case(form, d_qk, h_q, tokens, topk, kv_rows)
        mine = [name for name in names if form_of(name) == form and d_qk_of(name) == d_qk]
        if not mine:
            continue
        calls = {"peer": peer_call(c)}
        for name in mine:
            calls[name] = partial(run, module, name, c)
        peer_out = calls["peer"]()[0]
        run(module, mine[0], c)
        torch.cuda.synchronize()
        differ = (peer_out[:, :h_q].float() - c.operands.out.view(peer_out[:, :h_q].shape).float()).abs().max().item()
        flops = 2 * tokens * h_q * (d_qk + 512) * topk
        result = interleaved(calls, 9, flush)
        print(f"== {c.name} largest difference {differ:.2e}", flush=True)
        for name, (median, low, high) in result.items():
            row = {
                **common, "case": c.name, "kernel": name, "median_us": round(median, 2), "min_us": round(low, 2),
                "max_us": round(high, 2), "tflops": round(flops / median / 1e6, 1),
                "ratio": round(result["peer"][0] / median, 4),
            }  # fmt: skip
            rows.write(json.dumps(row) + "\n")
            print(
                f"   {name:40s} {median:8.1f} us [{low:.1f} {high:.1f}] {row['tflops']:6.1f} TFLOPS  x {row['ratio']:.3f}",
                flush=True,
            )
        rows.flush()
        del c, calls, result
        torch.cuda.empty_cache()


def once(library, name, which):
    """One launch after a warm one."""
    import tvm_ffi

    c = timing_case(*SUITES["anchors"][int(which)])
    call = peer_call(c) if name == "peer" else partial(run, tvm_ffi.load_module(library), name, c)
    call()
    torch.cuda.synchronize()


TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
WATCHED = ("three tiles", "one tile each, one CTA", "128 heads, two tokens each", "hostile indices", "lengths", "sink")


def watched(library, name):
    """What a sanitizer looks at: every case launched once. All memory is written by kernels that it sees."""
    import tvm_ffi

    module = tvm_ffi.load_module(library)
    for title, build in cases(form_of(name), d_qk_of(name)):
        if title in WATCHED:
            run(module, name, build())
    torch.cuda.synchronize()
    print(f"ran {len(WATCHED)}", flush=True)


def sanitize(library, name):
    """How many tools found something, all four at once; prints what they say."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    procs = {
        tool: subprocess.Popen(
            [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5", sys.executable, __file__, "watched",
             library, name],
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for tool in TOOLS
    }  # fmt: skip
    dirty, start = 0, time.time()
    for tool, proc in procs.items():
        try:
            text, _ = proc.communicate(timeout=max(SECONDS - (time.time() - start), 1))
        except subprocess.TimeoutExpired:
            proc.kill()
            text, _ = proc.communicate()
        clean = proc.returncode == 0 and "ran " in text
        dirty += not clean
        summary = "; ".join(line.strip("= ") for line in text.splitlines() if "SUMMARY" in line)
        print(f"{tool} {name}: {'clean' if clean else 'NOT CLEAN'}, status {proc.returncode}, {summary}", flush=True)
        if not clean:
            print(text[-3000:], flush=True)
    return dirty


if __name__ == "__main__":
    verb, library, *rest = sys.argv[1:]
    flags = [x[2:] for x in rest if x.startswith("--")]
    rest = [x for x in rest if not x.startswith("--")]
    if verb == "check":
        sys.exit(0 if check(library, rest[0], rest[1:]) else 1)
    if verb == "build":
        build(library, rest)
    if verb == "gate":
        print("passed:", " ".join(gate(library, rest, BRIEF if "brief" in flags else ())))
    if verb == "time":
        time_all(library, rest[0], rest[1:], flags)
    if verb == "watched":
        watched(library, rest[0])
    if verb == "sanitize":
        sys.exit(sanitize(library, rest[0]))
    if verb == "once":
        once(library, rest[0], rest[1])
