"""The many-row decode on a GPU: correctness first, each variant in its own process, then timing beside the peer.

    python tests/gpu/decode_dense.py build LIBRARY [FIELD=VALUE ...]        where the DSL is installed; needs no GPU
    python tests/gpu/decode_dense.py names [PART]                           of the functions that ship
    python tests/gpu/decode_dense.py gate LIBRARY FUNCTION ...              in subprocesses; prints who passed
    python tests/gpu/decode_dense.py check LIBRARY FUNCTION ...
    python tests/gpu/decode_dense.py time LIBRARY ROWS.jsonl FUNCTION ... [--bars --short --anchors --batches --h64 --one]
    ncu ... python tests/gpu/decode_dense.py once LIBRARY FUNCTION ... [--one]   one launch each, the peer first

`build` without fields compiles what ships; with fields, for example prefetch=0, that one variant; several of those
apart by "+". FUNCTION may end in +pN (N parts), +kN (a merge of N columns per CTA) or +whole (no request split), also
+p32_k8. On the GPU host: torch, apache-tvm-ffi, openmla on the path; `time` and `once` also sgl-flash-mla.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch

from openmla.backends.base import DecodeOperands
from openmla.backends.cute.decode_dense.launch import launch, launch_merge
from openmla.split.schedule import SplitPlan, plan_decode, ranges_needed

SECONDS = 60
CUDA = "cuda"


def case(
    name, lengths, *, s_q=1, heads=128, h_kv=1, parts=None, causal=False, data="randn", policy="balanced", varlen=None,
    hostile=True, dtype=torch.bfloat16, seed=0, chunk_tokens=256, page_size=64, cluster=2, d_qk=576, window=0, sink=False,
    interleaved_heads=False, dealt=False, merge_blocks=None,
):  # fmt: skip
    """Inputs, plan and poisoned outputs of one problem. `dealt`: parts are lists of ranges."""
    g = torch.Generator(CUDA).manual_seed(seed)
    batch = len(lengths)
    h_q = heads * h_kv
    scale = d_qk**-0.5
    pages_each = [max(-(-max(length, 0) // page_size), 0) for length in lengths]
    max_pages = max(max(pages_each), 1) + (3 if hostile else 0)
    num_pages = sum(pages_each) + (5 if hostile else 1)
    kv = torch.empty(num_pages, page_size, h_kv, d_qk, dtype=dtype, device=CUDA)
    kv.normal_(generator=g)
    q_tokens = [s_q] * batch if varlen is None else varlen
    q = torch.empty(sum(q_tokens), h_q, d_qk, dtype=dtype, device=CUDA).normal_(generator=g)
    if data == "small":
        kv *= 0.1
        q *= 0.1
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.randint(-(2**31), 2**31 - 1, (batch, max_pages), dtype=torch.int64).int()
    if not hostile:
        table.zero_()
    used, at = set(), 0
    for b, count in enumerate(pages_each):
        for i in range(count):
            table[b, i] = order[at]
            used.add(order[at])
            at += 1
    table = table.to(CUDA)
    if data == "ramp":  # the maximum moves often
        for b, count in enumerate(pages_each):
            for i in range(count):
                kv[table[b, i].item()] *= 0.2 + 5.8 * i / max(count - 1, 1)
    if data == "far":  # from 1, with equal weights
        q *= 0.0
        for b, count in enumerate(pages_each):
            size = (60 if dtype == torch.bfloat16 else 7) * (2 * b / (batch - 1) - 1)
            for i in range(count):
                kv[table[b, i].item()] *= 2.0 ** (size - i / 8)
    if data == "falling":  # along a row
        q *= 0.0
        kv[..., :512] *= 2.0 ** -(torch.arange(512, device=CUDA) % (24 if dtype == torch.bfloat16 else 10)).to(dtype)
    if data == "huge":  # logits of 1e12 and more
        q *= 2.0 ** (20 if dtype == torch.bfloat16 else 8)
        kv *= 2.0 ** (20 if dtype == torch.bfloat16 else 8)
    if hostile:
        for page in set(range(num_pages)) - used:
            kv[page] = float("nan")
        for b, length in enumerate(lengths):
            if length % page_size:
                kv[table[b, length // page_size].item(), length % page_size :] = float("nan")
            if window:  # keys before the window of the first query token
                before = torch.arange(max(length - q_tokens[b] + 1 - window, 0), device=CUDA)
                kv[table[b, before // page_size].long(), before % page_size] = float("nan")
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    m_blocks = -(-s_q * heads // 64)
    m_blocks += m_blocks % cluster
    parts = parts or max(torch.cuda.get_device_properties(0).multi_processor_count // (m_blocks * h_kv), 1)
    ranges = None
    if dealt:
        chunks = sum(max(-(-length // chunk_tokens), 1) for length in lengths)
        ranges = ranges_needed(batch, parts) if policy == "balanced" else -(-chunks // parts)
    plan = plan_decode(
        lengths, parts, policy=policy, chunk_tokens=chunk_tokens, ranges=ranges, merge_blocks=merge_blocks
    )
    cu = None
    shape, lse_shape = (batch, s_q, h_q), (batch, h_q, s_q)
    if varlen is not None:
        cu = torch.tensor([0, *torch.tensor(varlen).cumsum(0).tolist()], dtype=torch.int32, device=CUDA)
        shape, lse_shape = (sum(varlen), h_q), (h_q, sum(varlen))
    nan = float("nan")
    operands = DecodeOperands(
        q=(q.view(*shape, d_qk) if not interleaved_heads else q.transpose(0, 1).contiguous().transpose(0, 1).view(*shape, d_qk)),
        kv_cache=kv, block_table=table, cache_seqlens=seqlens, softmax_scale=scale,
        out=torch.full((*shape, 512), nan, dtype=dtype, device=CUDA), lse=torch.full(lse_shape, nan, device=CUDA),
        fault_word=torch.zeros(1, dtype=torch.int32, device=CUDA), cu_seqlens_q=cu,
        attn_sink=torch.randn(h_q, generator=g, device=CUDA) + 3 if sink else None,
    )  # fmt: skip
    blocks = h_kv * m_blocks
    return SimpleNamespace(
        name=name, operands=operands, plan=plan, metadata=metadata_of(plan),
        num_splits=plan.num_splits_tensor(CUDA), s_q=s_q, heads=heads, h_kv=h_kv, causal=causal or window > 0, lengths=lengths,
        window=window,
        q_tokens=q_tokens, page_size=page_size, num_pages=num_pages,
        blocks=blocks, **exchange(plan.num_pieces, blocks),
    )  # fmt: skip


def exchange(slots, blocks):
    """Partials that nobody has written, and counts of arrivals."""
    return {
        "out_accum": torch.full((slots, blocks, 64 * 512), math.nan, device=CUDA),
        "lse2_accum": torch.full((slots, blocks * 64), math.nan, device=CUDA),
        "arrivals": torch.zeros(slots, blocks, dtype=torch.int32, device=CUDA),
    }


def metadata_of(plan):
    """The plan's rows on the device, [ranges, num_parts, 8]."""
    return plan.tile_scheduler_metadata(CUDA).view(plan.ranges, -1, 8)


def operator(module, name, c):
    """The whole operator: the decode kernel and, where the plan splits a request, the merge.

    A name may end in `_pN` (N parts), `_kN` (N columns per CTA of the merge) or `_whole` (no request split).
    """
    name, _, ending = name.partition("+")
    is_merged = "sep" not in ending
    blocks = len(c.lengths) * c.blocks
    merge = "8_4" if blocks <= 8 else "32_1" if blocks <= 64 else "128_1"
    for end in ending.split("_"):
        if end == "whole":
            c = planned(c, whole_requests(c))
        elif end.startswith("p"):
            c = replanned(c, int(end[1:]))
        elif end.startswith("k"):
            merge = {8: "8_4", 32: "32_1", 128: "128_1"}[int(end[1:])]
    function = module[name]
    merge = module[f"decode_dense_merge_{'fp16' if 'fp16' in name else 'bf16'}_{merge}"]

    def call():
        launch(
            function, c.operands, c.metadata, c.num_splits, c.out_accum, c.lse2_accum, s_q=c.s_q,
            chunk_blocks=c.plan.chunk_blocks, is_causal=c.causal, window=c.window, arrivals=c.arrivals if is_merged else None,
        )  # fmt: skip
        if not is_merged and c.plan.num_pieces > len(c.lengths):
            launch_merge(merge, c.operands, c.num_splits, c.out_accum, c.lse2_accum, s_q=c.s_q)

    return call


def results(c):
    """Per request: (out [tokens, h_q, 512] fp32, lse [tokens, h_q])."""
    result, start, o = [], 0, c.operands
    for b, tokens in enumerate(c.q_tokens):
        if o.cu_seqlens_q is not None:
            result.append((o.out[start : start + tokens].float(), o.lse[:, start : start + tokens].T))
        else:
            result.append((o.out[b].float(), o.lse[b].T))
        start += tokens
    return result


def expected(c, b, start):
    """One request in fp64: (out, lse, sum p |v|, bound of a logit's error). Masked keys are selected away."""
    tokens, length = c.q_tokens[b], c.lengths[b]
    o = c.operands
    d_qk = o.q.shape[-1]
    q = o.q.reshape(-1, c.h_kv * c.heads, d_qk)[start : start + tokens].double()
    if length <= 0 or tokens == 0:
        zero = torch.zeros(tokens, c.h_kv * c.heads, 512, device=CUDA)
        return zero, torch.full((tokens, c.h_kv * c.heads), -math.inf, device=CUDA), zero, 0.0
    ids = o.block_table[b, : -(-length // c.page_size)].long()
    good = (ids >= 0) & (ids < c.num_pages)
    keys = o.kv_cache[torch.where(good, ids, 0)].flatten(0, 1)[:length].double()  # [length, h_kv, 576]
    seen = good.repeat_interleave(c.page_size)[:length]
    keys = torch.where(seen[:, None, None], keys, 0.0)
    q = q.view(tokens, c.h_kv, c.heads, d_qk)
    scores = torch.einsum("tkhd,nkd->tkhn", q, keys) * o.softmax_scale
    mask = seen.view(1, 1, 1, -1).expand(tokens, 1, 1, -1)
    if c.causal:
        limit = length - tokens + 1 + torch.arange(tokens, device=CUDA)
        at = torch.arange(length, device=CUDA)
        mask = mask & (at < limit[:, None]).view(tokens, 1, 1, -1)
        if c.window:
            mask = mask & (at >= limit[:, None] - c.window).view(tokens, 1, 1, -1)
            keys = torch.where(mask.any(0).view(-1, 1, 1), keys, 0.0)
            scores = torch.einsum("tkhd,nkd->tkhn", q, keys) * o.softmax_scale
    scores = scores.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1)
    p = torch.where(torch.isinf(lse).unsqueeze(-1), 0.0, torch.exp(scores - lse.unsqueeze(-1)))
    values = keys[..., :512]
    out, absolute = (torch.einsum("tkhn,nkd->tkhd", p, v).flatten(1, 2).float() for v in (values, values.abs()))
    # fp32 dot product of 576 terms, and the exponential's approximation
    largest = (torch.einsum("tkhd,nkd->tkhn", q.abs(), keys.abs()).max() * o.softmax_scale).item()
    if o.attn_sink is not None:
        share = torch.sigmoid(lse.flatten(1, 2) - o.attn_sink).unsqueeze(-1).float()
        out, absolute = out * share, absolute * share
    return out, lse.flatten(1, 2).float(), absolute, 24 * 2.0**-24 * largest + 2.0**-20


def compare(c, sample=None):
    """Worst error over its derived bound for out and lse, and 1 - cosine; raises on NaN or a wrong empty row.

    out: rounding of out and P, each U relative, on |o| and on A = sum p |v|. lse never sees P: fp32 accuracy.
    """
    # half a unit in the last place, and of the smallest numbers
    unit, smallest = (2.0**-8, 1e-30) if c.operands.out.dtype == torch.bfloat16 else (2.0**-11, 2.0**-25)
    worst, cosine, lse_error, start = 0.0, 0.0, 0.0, 0
    wanted = set(sample) if sample is not None else set(range(len(c.lengths)))
    for b, (out, lse) in enumerate(results(c)):
        if b in wanted and c.q_tokens[b]:
            ref, ref_lse, absolute, delta = expected(c, b, start)
            empty = torch.isinf(ref_lse)
            assert not torch.isnan(lse).any(), f"request {b}: NaN in lse"
            assert torch.equal(torch.isinf(lse) & (lse < 0), empty), f"request {b}: empty rows differ"
            assert not out[empty].any() and not torch.isnan(out).any(), f"request {b}: NaN or a non-zero empty row"
            bound = 1.01 * unit * ref.abs() + (1.02 * unit + 2 * delta) * absolute + smallest
            worst = max(worst, ((out - ref).abs() / bound).max().item())
            x, y = out.double(), ref.double()
            norm = (x * x + y * y).sum().item()
            cosine = max(cosine, 1 - 2 * (x * y).sum().item() / norm if norm else 0.0)
            if not empty.all():
                error = (lse - ref_lse).abs() / (delta + 2.0**-22 * ref_lse.abs() + 2.0**-20)
                lse_error = max(lse_error, error[~empty].max().item())
        start += c.q_tokens[b]
    return worst, cosine, lse_error


def build(library, fields):
    """Compile variants and the merge into one library."""
    from openmla.backends.cute.decode_dense import config as dense
    from openmla.backends.cute.decode_dense.launch import build as build_variant
    from openmla.backends.cute.decode_dense.launch import build_merge
    from openmla.backends.cute.toolchain import link_bundle

    wanted = dense.VARIANTS
    if fields:
        given = [dict(field.split("=") for field in one.split()) for one in " ".join(fields).split("+")]
        wanted = [
            dense.Config(**{k: int(v) if v.lstrip("-").isdigit() else v for k, v in one.items()}) for one in given
        ]
    with tempfile.TemporaryDirectory() as folder:
        compiled = [build_variant(config, Path(folder)) for config in wanted]
        compiled += [build_merge(config, Path(folder)) for config in dense.MERGE_VARIANTS]
        for each in compiled:
            print(each.name, "spills", each.resources.spills, "registers", each.resources.registers)
        link_bundle([each.object_path for each in compiled], Path(library))


def cases(name):
    """Builders; small ones first, so that a broken kernel is known early."""
    torch.manual_seed(1)
    long = [int(x) for x in torch.randint(1, 3000, (40,))]
    cluster = int(re.search(r"_c(\d)", name).group(1))
    pages = {"64": [64], "64n": [128, 192], "16n": [16, 48], "1n": [1, 7, 100]}[re.search(r"_p(\w+)_c", name).group(1)]
    d_qk = int(re.search(r"_d(\d+)", name).group(1))
    dtype = torch.float16 if "fp16" in name else torch.bfloat16
    # rows per KV head: two blocks of 64 for a cluster, else one, also with fewer heads than rows of a block
    heads, few = (128, 100) if cluster == 2 else (64, 40)
    turn = iter(range(10**6))

    def make(what, lengths, **kw):
        page = pages[next(turn) % len(pages)]
        given = {"heads": heads, "page_size": page, "cluster": cluster, "d_qk": d_qk, "dtype": dtype, **kw}
        return lambda: case(f"{what}, h {given['heads']}, page {page}", lengths, **given)

    return [
        make("one token", [1]),
        make("one tile", [64]),
        make("ragged", [63, 65, 1, 128, 200]),
        make("one part, many pieces", [63, 0, 65, 1, 640, 0, 77], parts=1),
        make("splits", [1000, 64, 1, 0, 2049], parts=16),
        make("s_q 2 causal", [5, 64, 65, 66, 129, 1000], s_q=2, causal=True),
        make("s_q 4 causal, fewer keys than queries", [0, 1, 3, 4, 64, 67, 68, 513], s_q=4, causal=True, parts=5),
        make("s_q 4 not causal", [100, 300], s_q=4),
        make("fixed chunks", [1000, 64, 1, 0, 2049, 256, 257], parts=7, policy="batch_invariant"),
        make("ramp", [2048, 1999], data="ramp", parts=3),
        make("huge logits", [130, 700], data="huge"),
        make("varlen queries", [10, 700, 64, 65], varlen=[1, 4, 0, 2], s_q=4, causal=True, parts=6),
        make("two KV heads", [300, 64, 129], h_kv=2, s_q=2, causal=True, parts=4),
        make("heads apart", [300, 64, 129], s_q=2, causal=True, parts=4, interleaved_heads=True),
        make("odd head count", [300, 64, 700], heads=few, s_q=2, causal=True, parts=4),
        make("sink", [300, 0, 64, 700], sink=True, parts=4),
        make("sink, two KV heads, not split", [300, 0, 64], sink=True, h_kv=2, parts=3),
        make("window", [300, 64, 1000, 5, 0, 2000], window=100, parts=9),
        make("window of 1, s_q 2, sink", [300, 64, 1000, 1], window=1, s_q=2, sink=True, parts=5),
        make("window, varlen, chunks", [1500, 700, 64], window=130, varlen=[2, 4, 1], s_q=4, policy="batch_invariant"),
        make("many requests", long, s_q=2, causal=True),
        make("many requests dealt", long, s_q=2, causal=True, dealt=True, parts=13),
        make("dealt, cut where long", [3000, 100, 0, 64, 700, 1500, 1], dealt=True, parts=4),
        make("a piece per part", [1024, 900, 1024, 1000], parts=16, dealt=True, merge_blocks=0, sink=True),
        make("two pieces", [1400], s_q=2, causal=True, parts=2, dealt=True, merge_blocks=0),
        make("sixteen pieces", [2000], parts=16, dealt=True, merge_blocks=0),
        make("values far from 1", [700, 300, 1200, 64, 2000], data="far", parts=16),
        make("values of falling size", [700, 1900], data="falling", parts=16),
        make("chunks dealt", [1000, 64, 1, 0, 2049, 256, 257], dealt=True, parts=3, policy="batch_invariant"),
    ]


def check(library, name):
    """All cases of one function; prints a line each and PASS or FAIL."""
    import tvm_ffi

    module = tvm_ffi.load_module(library)
    passed = True
    for build in cases(name):
        c = build()
        call = operator(module, name, c)
        call()
        torch.cuda.synchronize()
        try:
            worst, cosine, lse = compare(c)
            fine = worst <= 1.0 and cosine <= 1e-5 and lse <= 1.0
            text = f"out {worst:.3f} cos {cosine:.1e} lse {lse:.3f}"
        except AssertionError as error:
            fine, text = False, str(error)
        first = [t.clone() for t in (c.operands.out, c.operands.lse)]
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        again = (c.operands.out, c.operands.lse)
        bits = [[x.contiguous().view(torch.uint8) for x in pair] for pair in (first, again)]
        same = all(map(torch.equal, *bits))
        fine &= same and c.operands.fault_word.item() == 0
        fine &= "sep" in name or not c.arrivals.any()
        passed &= fine
        say(fine, f"{c.name}: {text} repeat {'same' if same else 'DIFFERS'}")
    passed &= bad_values(module, name)
    print(f"{name}: {'PASS' if passed else 'FAIL'}", flush=True)
    return passed


def say(fine, text):
    """One line of a check."""
    print(f"  {'ok  ' if fine else 'FAIL'} {text}", flush=True)


def bad_values(module, name):
    """A bad page id masks its page, a bad length is clamped, both are reported; NaN stays in its request."""
    cluster, page = int(re.search(r"_c(\d)", name).group(1)), int(re.search(r"_p(\d+)", name).group(1))
    d_qk = int(re.search(r"_d(\d+)", name).group(1))
    dtype = torch.float16 if "fp16" in name else torch.bfloat16
    kind = {"heads": 64 * cluster, "cluster": cluster, "dtype": dtype, "d_qk": d_qk, "page_size": page}
    c = case("bad page", [200, 300, 129], **kind)
    call, passed = operator(module, name, c), True
    call()
    torch.cuda.synchronize()
    before = c.operands.out.clone()
    for bad in (-5, 2**30):
        c.operands.block_table[1, 2] = bad
        c.operands.fault_word.zero_()
        call()
        torch.cuda.synchronize()
        worst, _, _ = compare(c)
        fine = worst <= 1.0 and c.operands.fault_word.item() == 1
        fine &= torch.equal(before[0], c.operands.out[0]) and torch.equal(before[2], c.operands.out[2])
        passed &= fine
        say(fine, f"page {bad}: out {worst:.3f} word {c.operands.fault_word.item()}")
    c.operands.block_table[1, 2] = 0
    # Cut to the table, 2^30 makes the plan's five blocks full: of small pages one more than 300 tokens have, a random id.
    beyond = -(-320 // page) > -(-300 // page)
    for length, bit in ((-7, 2), (2**30, 4 | beyond)):
        c.operands.cache_seqlens[1] = length
        c.operands.fault_word.zero_()
        call()
        torch.cuda.synchronize()
        fine = c.operands.fault_word.item() == bit and torch.equal(before[0], c.operands.out[0])
        passed &= fine
        say(fine, f"length {length}: word {c.operands.fault_word.item()}")
    for parts in (1, 12):
        c = case("NaN", [200, 300], parts=parts, **kind)
        c.operands.kv_cache[c.operands.block_table[0, : -(-200 // page)].long()] = float("nan")
        operator(module, name, c)()
        torch.cuda.synchronize()
        fine = all(x[0].isnan().all() and not x[1].isnan().any() for x in (c.operands.out, c.operands.lse))
        passed &= fine
        say(fine, f"NaN keys, {parts} parts")
    return passed


def gate(library, names):
    """Which functions pass, in up to eight processes with a limit; a hang takes those behind it along."""
    start = time.time()
    lists = [names[i :: min(len(names), 8)] for i in range(min(len(names), 8))]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(i) for i in range(len(lists))]
        procs = []
        for log, mine in zip(logs, lists, strict=True):
            with log.open("w") as text:
                argv = [sys.executable, __file__, "check", library, *mine]
                procs.append(subprocess.Popen(argv, stdout=text, stderr=subprocess.STDOUT))
        for proc in procs:
            try:
                proc.wait(timeout=max(SECONDS - (time.time() - start), 1))
            except subprocess.TimeoutExpired:
                proc.kill()
        texts = [log.read_text() for log in logs]
    good = [name for name in names if any(f"{name}: PASS" in text for text in texts)]
    for text, mine in zip(texts, lists, strict=True):
        if names[0] in mine or not all(name in good for name in mine):
            print(text[-6000:], flush=True)
    print(f"{len(good)} of {len(names)} passed in {time.time() - start:.0f} s", flush=True)
    return good


def timing_case(batch, s_k, s_q, heads, cluster, varlen_lengths=False):
    lengths = [s_k] * batch
    if varlen_lengths:
        g = torch.Generator().manual_seed(0)
        lengths = [max(int(torch.normal(s_k, s_k / 2, (1,), generator=g)), s_q) for _ in range(batch)]
    return case(
        f"b{batch}{'v' if varlen_lengths else ''} s_q{s_q} h{heads} s_k{s_k}", lengths, s_q=s_q, heads=heads,
        data="small", hostile=False, cluster=cluster, causal=s_q > 1,
    )  # fmt: skip


def peer_call(c):
    import flash_mla

    meta, _ = flash_mla.get_mla_metadata()
    o = c.operands
    return lambda: flash_mla.flash_mla_with_kvcache(
        o.q, o.kv_cache, o.block_table, o.cache_seqlens, 512, meta, softmax_scale=o.softmax_scale, causal=c.causal,
        use_legacy=True,
    )  # fmt: skip


def graphed(call):
    """The call as a CUDA graph: host time of nobody counts."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = call()
    return lambda: (graph.replay(), keep, call)[0]  # its plan's tensors live with the call


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


def sustained(calls, rounds=5, seconds=0.12):
    """us per call, back to back in turn: what power allows. Median of the rounds."""
    result = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, count = time.time(), 0
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call()
            begin.record()
            while time.time() - start < seconds:
                for _ in range(10):
                    call()
                count += 10
                torch.cuda.synchronize()
            end.record()
            torch.cuda.synchronize()
            result[name].append(begin.elapsed_time(end) * 1e3 / count)
    return {name: statistics.median(times) for name, times in result.items()}


def replanned(c, parts):
    """The same problem cut for another number of parts."""
    plan = plan_decode(c.lengths, parts)
    return planned(c, plan, **exchange(plan.num_pieces, c.blocks))


def planned(c, plan, **more):
    """The same problem with another plan."""
    new = {"plan": plan, "metadata": metadata_of(plan), "num_splits": plan.num_splits_tensor(CUDA), **more}
    return SimpleNamespace(**{**vars(c), **new})


def whole_requests(c):
    """The same problem with no request split: the parts take whole requests, as evenly as those allow."""
    blocks, parts = c.plan.blocks, len(c.plan.parts)
    edges = [i * len(blocks) // parts for i in range(parts + 1)]
    stretches = [(a, b - 1, 0, blocks[b - 1], 0) if b > a else (0, -1, 0, 0, 0) for a, b in pairwise(edges)]
    return SplitPlan("balanced", 64, 0, blocks, tuple(stretches), tuple(range(len(blocks) + 1)))


def time_all(library, rows_path, names):
    import tvm_ffi

    module = tvm_ffi.load_module(library)
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device=CUDA)
    rows = open(rows_path, "a")  # noqa: SIM115
    a = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    common = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"), "peer": "sgl-flash-mla 1.0.0, dense decode, legacy path",
    }  # fmt: skip
    suites = {
        "bars": [(128, 16384, 2, 128, False), (128, 32768, 1, 128, False)],
        "short": [(128, 4096, 1, 128, False), (128, 4096, 2, 128, False)],
        "anchors": [(128, s_k, s_q, 128, True) for s_q in (1, 2) for s_k in (4096, 8192, 16384, 32768)],
        "one": [(1, s_k, 1, 128, False) for s_k in (1024, 4096, 32768, 131072)],
        "batches": [(b, s_k, 1, 128, False) for b in (4, 16) for s_k in (1024, 4096, 32768, 131072)]
        + [(64, s_k, 1, 128, False) for s_k in (1024, 4096, 32768, 65536)],
        "h64": [(128, s_k, 1, 64, True) for s_k in (4096, 16384)],
    }  # fmt: skip
    wanted = [x[2:] for x in sys.argv if x.startswith("--")] or ["bars"]
    shapes = [shape for name in wanted for shape in suites[name]]
    for batch, s_k, s_q, heads, ragged in shapes:
        cluster = 1 if -(-s_q * heads // 64) % 2 else 2
        c = timing_case(batch, s_k, s_q, heads, cluster, ragged)
        calls = {"peer": peer_call(c)}
        for name in names:
            if f"_c{cluster}" in name:
                calls[name] = operator(module, name, c)
        if s_q == 2 and s_k == 16384:
            calls["cublas 8192^3"] = lambda: a @ b
        flops = 2 * s_q * heads * 1088 * sum(c.lengths)
        calls = {name: call if name.startswith("cublas") else graphed(call) for name, call in calls.items()}
        result = interleaved(calls, 12 if s_k * batch > 2**18 else 40, flush)
        print(f"== {c.name}", flush=True)
        warm = sustained(calls) if s_k * batch >= 2**21 else {}
        for name, (median, low, high) in result.items():
            work = 2 * 8192**3 if name.startswith("cublas") else flops
            row = {
                **common, "case": c.name, "kernel": name, "median_us": round(median, 2), "min_us": round(low, 2),
                "max_us": round(high, 2), "tflops": round(work / median / 1e6, 1),
                "ratio": round(result["peer"][0] / median, 4), "sustained_us": round(warm.get(name, 0.0), 2),
                "sustained_ratio": round(warm["peer"] / warm[name], 4) if warm else None,
            }  # fmt: skip
            rows.write(json.dumps(row) + "\n")
            text = f"   {name:52s} {median:8.1f} us [{low:.1f} {high:.1f}] {row['tflops']:6.1f} TFLOPS  x {row['ratio']:.3f}"
            if warm:
                rate = work / warm[name] / 1e6
                text += f"  sustained {warm[name]:.1f} us {rate:.1f} TFLOPS x {row['sustained_ratio']:.3f}"
            print(text, flush=True)
        rows.flush()
        del c, calls
        torch.cuda.empty_cache()


if __name__ == "__main__":
    verb, library, *rest = [*sys.argv[1:], ""][: max(len(sys.argv) - 1, 2)]
    rest = [x for x in rest if not x.startswith("--")]
    if verb == "check":
        sys.exit(sum(not check(library, name) for name in rest))
    if verb == "names":
        from openmla.backends.cute.decode_dense.config import VARIANTS

        print(*(config.name for config in VARIANTS if library in config.name))
    if verb == "build":
        build(library, rest)
    if verb == "gate":
        print("passed:", " ".join(gate(library, rest)))
    if verb == "time":
        time_all(library, rest[0], rest[1:])
    if verb == "once":  # one launch of each for a profiler
        import tvm_ffi

        module = tvm_ffi.load_module(library)
        c = timing_case(132, 16384, 1 if "--one" in sys.argv else 2, 128, 2)
        peer_call(c)()
        for name in rest:
            operator(module, name, c)()
        torch.cuda.synchronize()
