"""What the portable kernels and mods must show on a GPU: every kernel, every mod, varlen prefill with gradients, append.

    python tests/gpu/portable.py [docs kernels mods cute prefill append times] [--out portable.jsonl]
    TRITON_INTERPRET=1 python tests/gpu/portable.py --device cpu          the script itself, without a GPU

Each section is at most `--seconds` long and runs in processes of its own: most of the time goes into compiling a kernel
per item, so `--jobs` of them share the items (`times` has one). Correctness is the tolerance rule against the fp64
oracle (append: equal bytes; gradients: autograd in fp64). `docs` takes the first mod of docs/mods.md from that page and
runs it in all three backends. `kernels` draws hostile cases for the Triton kernels. `cute` runs mods in the Hopper
kernels; it, `docs`, `times` and `figures` need CuTe DSL or a bundle that holds them: `bundle DIR` makes one, anywhere, `bundle DIR
soft_cap` one for `figures`. `times` has
what the suite `portable` cannot say; `figures` takes from both what has a bar, in well below a minute, and holds it against
the bar (portable_figures.py). One JSON line per item; exit status 0 when all passed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from portable_figures import figures, parts
from portable_mods import CUTE_MODS, decode_arguments, mod_of_the_page, to
from portable_times import Item, section_times

import openmla
from openmla.core.errors import UnsupportedError
from openmla.core.layout import BYTE_LAYOUT_NAMES, kv_layout
from openmla.mods import Rope
from openmla.mods.attached import form_of
from openmla.reference import attention, quant
from openmla.testing import budget, coverage
from openmla.testing.cases import Case, draw, native_arguments
from openmla.testing.mod_cases import library_cases


def section_docs(device: str) -> Iterator[Item]:
    """The mod that the page shows first, unchanged in every backend; results beside the oracle and one another."""
    is_gpu = device != "cpu"
    sizes = {"d_qk": 576, "d_v": 512, "page_size": 64} if is_gpu else {"d_qk": 40, "d_v": 32, "page_size": 16}
    for h_q, s_q in ((128, 1), (128, 2)) if is_gpu else ((4, 2),):
        case = Case(
            op="decode", seed=3, family="unit", dtype=torch.bfloat16 if is_gpu else torch.float16, h_q=h_q, h_kv=1,
            softmax_scale=0.1, seqlens_q=(s_q,) * 3, seqlens_k=(900, 0, 133), is_causal=s_q > 1, **sizes,
        )  # fmt: skip
        backends = ("torch", "triton", "cute") if is_gpu else ("torch", "triton")
        yield f"h_q={h_q} s_q={s_q}", lambda a=case, b=backends: judge_page(a, b, device)


def judge_page(case: Case, backends: tuple[str, ...], device: str) -> dict[str, Any]:
    mod, operands = mod_of_the_page(), case.tensors()
    golden = attention.decode(**operands, mods=mod, precision="fp64", with_bounds=True)
    arguments = to(device, native_arguments("decode", operands))
    outs, worst = [], {}
    for backend in backends:
        out, lse = openmla.decode(**arguments, mods=mod, backend=backend)
        report = budget.check(out.cpu(), lse.cpu(), golden, dtype=case.dtype)
        report.require(backend)
        worst[backend] = max(finding.ratio for finding in report.findings)
        outs.append(out.float())
    apart = max(float((one - other).abs().max()) for one, other in itertools.combinations(outs, 2))
    scale = max(float(each.abs().max()) for each in outs)
    # Each is within the rule of the oracle; beside one another, within two roundings of the largest value.
    assert apart <= 2 * torch.finfo(case.dtype).eps * scale, f"backends differ by {apart}, largest value {scale}"
    return {"mod": mod.name, "worst": worst, "apart": round(apart / scale, 6)}


def section_kernels(device: str) -> Iterator[Item]:
    """Hostile cases of dense decode, sparse decode and sparse prefill, and Hopper's tile of 64 rows over every layout."""
    for layout in (*BYTE_LAYOUT_NAMES, "") if device != "cpu" else ():
        for h_q, s_q, page_size in ((128, 2, 64), (128, 1, 16), (16, 2, 64), (64, 1, 3)):
            stored = kv_layout(layout or "bf16_576")
            case = Case(
                op="decode", seed=7, family="unit", dtype=torch.bfloat16, h_q=h_q, h_kv=1, d_qk=stored.d_qk, d_v=512,
                softmax_scale=0.1, seqlens_q=(s_q,) * 3, seqlens_k=(900, 0, 133), is_causal=s_q > 1,
                page_size=page_size, layout=layout,
            )  # fmt: skip
            if not layout or stored.page_align_bytes == 1 or page_size != 3:
                yield f"decode {layout or 'bf16_576'} h_q={h_q} s_q={s_q}", lambda a=case: judge_case(a, device)
    for h_q, s_q, is_coded in itertools.product((128, 16), (1, 2), (False, True)) if device != "cpu" else ():
        name = f"decode fp8_576 h_q={h_q} s_q={s_q}{' codes of q' if is_coded else ''}"
        yield name, lambda a=h_q, b=s_q, c=is_coded: judge_codes(a, b, c, device)
    for dtype, more, d_v in itertools.product((torch.bfloat16, torch.float16, torch.float32), (0, 1, 7), (512, 40)):
        if device != "cpu" or dtype != torch.bfloat16:  # which the interpreter truncates
            name = f"parts merged {str(dtype).removeprefix('torch.')} {1 + more} of {d_v}"
            yield name, lambda a=dtype, b=more, c=d_v: judge_parts(a, b, c, device)
    for scale, share in itertools.product((0.04, 1.0), (0.0, 0.2)) if device != "cpu" else ():  # at 1.0 peaks move
        selected = Case(
            op="sparse_prefill", seed=2, family="unit", dtype=torch.bfloat16, h_q=128, h_kv=1, d_qk=576, d_v=512,
            softmax_scale=scale, seqlens_q=(5,), seqlens_k=(700,), topk=300, invalid_share=share,
            has_topk_length=share > 0, has_sink=True,
        )  # fmt: skip
        yield f"sparse_prefill 128 heads scale={scale} {share}", lambda a=selected: judge_case(a, device)
        paged = replace(selected, op="sparse_decode", seqlens_q=(2, 2), page_size=64)
        yield f"sparse_decode 128 heads scale={scale} {share}", lambda a=paged: judge_case(a, device)
    for changes in SCHEDULED if device != "cpu" else ():
        given = replace(selected, topk=300, invalid_share=0.1, has_topk_length=True, softmax_scale=0.04)
        case = replace(given, **changes)
        yield f"sparse_prefill of its own order {changes}", lambda a=case: judge_case(a, device)
    if device != "cpu":
        yield "sparse_prefill, the same bits twice", lambda: judge_twice(device)
    for op in ("decode", "sparse_decode", "sparse_prefill"):
        for seed in range(16):
            case = draw(seed, op)
            if device == "cpu" and case.dtype == torch.bfloat16:
                continue  # Triton's interpreter multiplies bit patterns
            yield f"{op} seed {seed}", lambda a=case: judge_case(a, device)


# What `selected_sm90` may meet: families of inputs, halves and groups of heads, lists of every length, NaN, many programs.
SCHEDULED: tuple[dict[str, Any], ...] = (
    *({"family": name, "softmax_scale": 0.3} for name in ("peaky", "outlier", "sweep", "sweep_rope", "onehot_v", "zero_q")),
    {"softmax_scale": -0.3}, {"dtype": torch.float16}, {"dtype": torch.float16, "family": "peaky", "softmax_scale": 1.0},
    {"h_q": 72, "has_sink": False}, {"h_q": 64, "topk": 64}, {"h_q": 128, "h_kv": 2}, {"h_q": 200, "topk": 129},
    {"topk": 1}, {"topk": 65, "invalid_share": 0.9}, {"topk": 128, "has_topk_length": False, "invalid_share": 0.0},
    {"nan_tokens": True}, {"nan_tokens": True, "topk": 40}, {"seqlens_q": (70,), "topk": 140},
    {"seqlens_q": (3,), "seqlens_k": (3000,), "topk": 2048}, {"seqlens_k": (0,), "topk": 70},
)  # fmt: skip


def judge_twice(device: str) -> dict[str, Any]:
    """More programs than run at once, and again: equal bits. A row of q that begins between 16 bytes is no error either."""
    q, kv = torch.randn(300, 128, 577, device=device).bfloat16(), torch.randn(5000, 1, 576, device=device).bfloat16()
    indices = torch.stack([torch.randperm(5000, device=device)[:2048] for _ in range(300)]).int()[:, None]
    one = openmla.sparse_prefill(q[..., :576].contiguous(), kv, indices, softmax_scale=0.04, backend="triton")
    for _ in range(5):
        again = openmla.sparse_prefill(q[..., :576].contiguous(), kv, indices, softmax_scale=0.04, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True)), "another result from the same input"
    odd = openmla.sparse_prefill(q[..., :576], kv, indices, softmax_scale=0.04, backend="triton")
    apart = max(float((a.float() - b.float()).abs().max()) for a, b in zip(one, odd, strict=True))
    assert apart < 2e-3, apart
    return {"apart": apart}


def judge_case(case: Case, device: str) -> dict[str, Any]:
    """A case in Triton, faults and all, as `openmla verify` judges it."""
    operands = case.tensors()
    moved = coverage.moved(operands, torch.device(device))  # with their strides and gaps
    try:
        out, lse, largest = (x if x is None else x.cpu() for x in case.run(backend="triton", operands=moved))
    except UnsupportedError as error:
        return {"refused": next(why for kernel, why in error.reasons.items() if kernel.startswith("triton/"))[0]}
    report = budget.check(out, lse, case.golden(operands), dtype=case.dtype, max_logits=largest)
    report.require(str(case))
    return {"worst": max(finding.ratio for finding in report.findings)}


def judge_codes(h_q: int, s_q: int, is_coded: bool, device: str) -> dict[str, Any]:
    """A cache of codes whose scale belongs to the call, queries in bf16 or codes as well."""
    random = torch.Generator().manual_seed(1)
    cache = kv_layout("fp8_576").empty_cache(20, 64)
    quant.write_rows(cache, "fp8_576", torch.arange(20 * 64), torch.randn(20 * 64, 576, generator=random) / 0.02)
    q = 2 * torch.randn(3, s_q, h_q, 576, generator=random)
    scales = {"descale_k": torch.tensor([0.02])} | ({"descale_q": torch.tensor([0.05])} if is_coded else {})
    q = (q / 0.05).to(torch.float8_e4m3fn) if is_coded else q.to(torch.bfloat16)
    table = torch.randperm(20, generator=random)[:18].int().view(3, 6)
    given = {
        "q": q, "kv_cache": cache, "block_table": table, "softmax_scale": 0.05, "is_causal": s_q > 1,
        "cache_seqlens": torch.tensor([380, 0, 133], dtype=torch.int32), "attn_sink": torch.linspace(-1, 1, h_q), **scales,
    }  # fmt: skip
    golden = attention.decode(**given, d_v=512, layout="fp8_576", with_bounds=True)
    out, lse = openmla.decode(**to(device, given), kv_layout="fp8_576", backend="triton")
    report = budget.check(out.cpu(), lse.cpu(), golden, dtype=torch.bfloat16)
    report.require()
    return {"worst": max(finding.ratio for finding in report.findings)}


def judge_parts(dtype: torch.dtype, more: int, d_v: int, device: str) -> dict[str, Any]:
    """Results over other keys, some without any and full of NaN, against the law in fp64: fp32 sums, rounded once."""
    from openmla.backends.triton import parts
    from openmla.split import combine

    random = torch.Generator().manual_seed(1)
    outs = torch.randn(1 + more, 5, 3, 24, d_v, generator=random).to(dtype)
    lses, sink = 30 * torch.randn(1 + more, 5, 24, 3, generator=random), torch.linspace(-20, 20, 24)
    empty = torch.rand(lses.shape, generator=random) < 0.3
    empty[:, 0, 0, 0] = True
    outs, lses = outs.masked_fill(empty.transpose(2, 3)[..., None], torch.nan), lses.masked_fill(empty, -torch.inf)
    want, want_lse = combine.merge(outs.double(), lses.double().transpose(2, 3))
    want = want * torch.sigmoid(want_lse - sink)[..., None]
    given = to(device, {"o": outs, "l": lses, "s": sink})
    runs = [
        parts.merge(given["o"][0], given["l"][0], given["o"][1:], given["l"][1:], given["s"], 1.0) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "another result from the same input"
    out, lse = (each.cpu().double() for each in runs[0])
    limit = (torch.finfo(dtype).eps / 2 + 1e-6) * want.abs() + 3e-6
    worst = float(((out - want).abs() / limit).max())
    assert worst <= 1 and lse[0, 0, 0] == -torch.inf, worst
    torch.testing.assert_close(lse, want_lse.transpose(1, 2), rtol=1e-6, atol=1e-5)
    return {"worst": worst}


def section_mods(device: str) -> Iterator[Item]:
    """Every mod of the library, both tiles of Hopper, whole and split, one and two tokens."""
    is_gpu = device != "cpu"
    sizes = {"d_qk": 576, "d_v": 512} if is_gpu else {"d_qk": 40, "d_v": 32}
    for layout, h_q in itertools.product(("", "fp8_656") if is_gpu else ("",), (128, 16) if is_gpu else (4,)):
        case = Case(
            op="decode", seed=3, family="unit", dtype=torch.bfloat16 if is_gpu else torch.float16, h_q=h_q, h_kv=1,
            softmax_scale=0.1, seqlens_q=(2, 2, 2), seqlens_k=(900 if is_gpu else 90, 0, 33), is_causal=True,
            page_size=64 if is_gpu else 16, layout=layout, **sizes,
        )  # fmt: skip
        library = library_cases(h_q=h_q, capacity=64 * 20, d_rope=sizes["d_qk"] - sizes["d_v"])
        for name, given in library.items():
            yield f"{name} h_q={h_q} {layout}", lambda a=case, b=given: judge_decode(a, b, device)


def section_cute(device: str) -> Iterator[Item]:
    """Mods in the Hopper kernels: many and few heads, causal, and NaN in keys that a mask hides."""
    for h_q, s_q in ((128, 1), (128, 2), (16, 2), (64, 1)):
        case = Case(
            op="decode", seed=3, family="unit", dtype=torch.bfloat16, h_q=h_q, h_kv=1, d_qk=576, d_v=512,
            softmax_scale=0.1, seqlens_q=(s_q,) * 3, seqlens_k=(900, 0, 133), is_causal=s_q > 1, page_size=64,
        )  # fmt: skip
        for name, given in CUTE_MODS.items():
            is_one_block = h_q * s_q <= 64
            if is_one_block and name in ("fading", "every_third", "several"):
                continue  # one variant of a user's mod is enough for a bundle to hold
            yield f"{name} h_q={h_q} s_q={s_q}", lambda a=case, b=given: judge_decode(a, b, device, "cute")
    for scale, h_q in itertools.product(
        (0.02, 1.0, 20.0), (128, 16)
    ):  # within the polynomial's range, around it, beyond
        case = Case(
            op="decode", seed=5, family="unit", dtype=torch.bfloat16, h_q=h_q, h_kv=1, d_qk=576, d_v=512,
            softmax_scale=scale, seqlens_q=(1,) * 3, seqlens_k=(900, 0, 133), page_size=64, has_sink=True,
        )  # fmt: skip
        yield f"soft_cap h_q={h_q} scale={scale}", lambda a=case: judge_decode(a, CUTE_MODS["soft_cap"], device, "cute")
    for name in ("sink_tokens", "every_third", "several"):
        yield f"{name}, hidden NaN", lambda a=CUTE_MODS[name]: judge_hidden(a, device)


def judge_hidden(given: Any, device: str) -> dict[str, Any]:
    """Keys that every row's mask hides hold NaN and infinity: the same bits as without."""
    arguments = decode_arguments(128, 640, 2, device) | {"backend": "cute", "mods": given}
    cache = arguments["kv_cache"].clone()
    cache.view(-1, 576)[60] = torch.nan  # hidden by each of the masks
    cache.view(-1, 576)[63, 100] = torch.inf
    cache.view(-1, 576)[66, 570] = -torch.inf
    clean, _ = openmla.decode(**arguments)
    dirty, _ = openmla.decode(**{**arguments, "kv_cache": cache})
    assert clean.isfinite().all() and torch.equal(clean, dirty)
    return {"rows": clean.shape[0] * clean.shape[2]}


def judge_decode(case: Case, given: Any, device: str, backend: str = "triton") -> dict[str, Any]:
    operands = case.tensors()
    arguments = to(device, native_arguments("decode", operands))
    out, lse = openmla.decode(**arguments, mods=to(device, given), backend=backend)
    again, _ = openmla.decode(**arguments, mods=to(device, given), backend=backend)
    golden = attention.decode(**operands, mods=given, precision="fp64", with_bounds=True)
    report = budget.check(out.cpu(), lse.cpu(), golden, dtype=case.dtype)
    report.require()
    assert torch.equal(out.nan_to_num(), again.nan_to_num()), "another result from the same input"
    return {"worst": max(finding.ratio for finding in report.findings)}


def section_prefill(device: str) -> Iterator[Item]:
    """Both shapes of DeepSeek, causal and not, forward, gradients and the same bits twice."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device != "cpu" else (torch.float16,)
    lengths = ((150, 1, 70), (300, 5, 70)) if device != "cpu" else ((20, 1), (20, 7))
    for d_qk in (192, 128):
        for is_causal in (True, False):
            for dtype in dtypes:
                case = Case(
                    op="prefill", seed=5, family="unit", dtype=dtype, h_q=4, h_kv=2, d_qk=d_qk, d_v=128,
                    softmax_scale=d_qk**-0.5, seqlens_q=lengths[0], seqlens_k=lengths[1], is_causal=is_causal,
                    is_varlen=True,
                )  # fmt: skip
                name = f"{d_qk}/128 {'causal' if is_causal else 'full'} {str(dtype).removeprefix('torch.')}"
                yield name, lambda case=case: judge_prefill(case, device)


def judge_prefill(case: Case, device: str) -> dict[str, Any]:
    operands = case.tensors()
    arguments = to(device, native_arguments("prefill", operands))
    total = operands["q"].shape[0]
    grad_out = torch.randn(total, case.h_q, case.d_v, generator=torch.Generator().manual_seed(1)).to(case.dtype)

    def run() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        leaves = {name: arguments[name].detach().clone().requires_grad_() for name in ("q", "k", "v")}
        out, lse = openmla.prefill(**{**arguments, **leaves}, backend="triton")
        return out, lse, list(torch.autograd.grad(out, list(leaves.values()), grad_out.to(device)))

    (out, lse, found), again = run(), run()
    assert torch.equal(out, again[0]) and all(torch.equal(a, b) for a, b in zip(found, again[2], strict=True))
    report = budget.check(out.detach().cpu(), lse.cpu(), case.golden(operands), dtype=case.dtype)
    report.require()
    wide = {name: operands[name].double().requires_grad_() for name in ("q", "k", "v")}
    golden = attention.prefill(**{**operands, **wide}, precision="fp64")
    exact = torch.autograd.grad(golden.out, list(wide.values()), grad_out.double())
    # Roundings of out, weights, slopes and the result against gradients of order 1; fp32 adds up to 300 terms.
    limit = {torch.bfloat16: 3 * 2.0**-9, torch.float16: 2.0**-9, torch.float32: 1e-5}[case.dtype]
    errors = [
        float((mine.double().cpu() - g).abs().max() / (1 + g.abs().max())) for mine, g in zip(found, exact, strict=True)
    ]
    assert max(errors) <= limit, f"gradients off by {errors}, limit {limit}"
    return {"worst": max(f.ratio for f in report.findings), "gradients": max(errors) / limit}


def section_append(device: str) -> Iterator[Item]:
    """Bytes of every layout, with RoPE and without."""
    for layout in (*BYTE_LAYOUT_NAMES, "bf16_576"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for has_rope in (False, True):
                name = f"{layout} {str(dtype).removeprefix('torch.')}{' rope' if has_rope else ''}"
                yield name, lambda a=layout, b=dtype, c=has_rope: judge_append(a, b, c, device)


def judge_append(layout: str, dtype: torch.dtype, has_rope: bool, device: str) -> dict[str, Any]:
    from openmla.ops.append import append

    generator, stored = torch.Generator().manual_seed(0), kv_layout(layout)
    count = 2000 if device != "cpu" else 20
    rows = torch.randn(count, stored.d_qk, generator=generator) * torch.exp2(torch.arange(count) % 30 - 15.0)[:, None]
    rows = rows.clamp(-65504, 65504)  # the bytes of a group with an inf are free
    rows, slots = rows.to(dtype), torch.randperm(64 * 40, generator=generator)[:count]
    rope = Rope.of_base(64, 4000) if has_rope else None
    positions = torch.randint(0, 4000, (count,), generator=generator) if has_rope else None
    mine, expected = (stored.empty_cache(40, 64).fill_(1) for _ in range(2))
    mine = mine.to(device) if not stored.page_align_bytes > 1 else stored.empty_cache(40, 64, device=device).fill_(1)
    append(
        mine, slots.to(device), rows.to(device), kv_layout=layout, rope=to(device, rope), positions=to(device, positions),
        backend="triton",
    )  # fmt: skip
    if rope is not None and positions is not None:
        rows = rope.rotated(rows[:, None], stored.d_qk - 64, positions)[:, 0]
    quant.write_rows(expected, layout, slots, rows)
    differ = int((mine.cpu().contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)).sum())
    assert differ == 0, f"{differ} bytes differ"
    return {"tokens": count}


SECTIONS: dict[str, Callable[[str], Iterator[Item]]] = {
    "docs": section_docs, "kernels": section_kernels, "mods": section_mods, "cute": section_cute,
    "prefill": section_prefill, "append": section_append, "times": section_times,
}  # fmt: skip


def make_bundle(folder: Path, names: list[str]) -> None:
    """The Hopper kernels of the sections `cute`, `docs` and `times`, for machines without CuTe DSL; no GPU needed.

    names: of CUTE_MODS: only what 128 heads need, plain and with each of these.
    """
    from openmla.backends.cute import bundle
    from openmla.backends.cute.families import with_mods

    given = [CUTE_MODS[name] for name in names] or [*CUTE_MODS.values(), [mod_of_the_page()]]
    wanted = {"dtype": "bf16", "d_qk": 576, "page_size": 64} | ({"cluster": 2, "is_exchanged": False} if names else {})
    families, chosen = with_mods([form_of(each) for each in given]), {}
    for name in ("schedule", "combine", "decode_dense_merge", "decode_dense_small", "decode_dense"):
        variants, build = families[name]
        if not names or name != "decode_dense_small":
            chosen[name] = ([v for v in variants if all(getattr(v, k, x) == x for k, x in wanted.items())], build)
    bundle.build(folder, chosen, lambda line: print(line, flush=True))


def where(device: str) -> dict[str, str]:
    """What a row says of the machine and the moment."""
    card = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    versions = {"torch": torch.__version__, "triton": importlib.metadata.version("triton")}
    return {"device": card, **versions, "utc": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}


def run_section(name: str, device: str, share: int, jobs: int) -> int:
    """Every item of one section that is `share` modulo `jobs`, a line each; the number that failed."""
    failed = 0
    facts = where(device)
    for item, check in itertools.islice(SECTIONS[name](device), share, None, jobs):
        row: dict[str, Any] = {"section": name, "item": item.strip(), **facts}
        try:
            row |= {"passed": True, **check()}
        except Exception as error:  # what one item raises must not hide the others
            row |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:600]}
            failed += 1
        print(json.dumps(row), flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections", nargs="*", default=[], help=f"default: {' '.join(SECTIONS)}; or figures, or bundle DIR"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=150.0, help="per section")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jobs", type=int, default=max((os.cpu_count() or 2) - 2, 1), help="processes per section")
    parser.add_argument("--here", type=int, metavar="SHARE", help="in this process, and only this share of the items")
    args = parser.parse_args()
    if args.sections[:1] == ["bundle"]:
        make_bundle(Path(args.sections[1]), args.sections[2:])
        return 0
    if args.sections == ["figures"]:
        if args.here is not None:
            parts()[args.here]()
            return 0
        return figures(args.out, own=[sys.executable, __file__, "figures", "--here"], where=where("cuda"))
    if args.here is not None:
        return int(sum(run_section(name, args.device, args.here, args.jobs) for name in args.sections) > 0)
    lines, status = [], 0
    for name in args.sections or SECTIONS:
        found, texts, is_fine = run_processes(name, args)
        lines += found
        passed = sum(row["passed"] for row in found)
        print(f"{name}: {passed} of {len(found)} passed{'' if is_fine else ', and not all ran'}", flush=True)
        for row in found:
            if not row["passed"] or name == "times":
                print("  ", json.dumps(row), flush=True)
        for text in texts:
            print("  ", text[-1500:], flush=True)
        status |= passed < len(found) or not is_fine
        if args.out:
            args.out.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return int(status)


def run_processes(name: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str], bool]:
    """(rows, what processes that broke off said, whether none did) of one section."""
    jobs = 1 if name == "times" else args.jobs
    own = [sys.executable, __file__, name, "--device", args.device, "--jobs", str(jobs), "--here"]
    deadline = time.monotonic() + args.seconds
    # The oracle's threads of all processes together, no more than there are cores.
    environment = {**os.environ, "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // jobs, 1))}
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2 * jobs)]
        running = [
            subprocess.Popen([*own, str(share)], stdout=logs[2 * share], stderr=logs[2 * share + 1], env=environment)
            for share in range(jobs)
        ]
        rows, texts, is_fine = [], [], True
        for share, each in enumerate(running):
            try:
                code = each.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                each.kill()
                code = 124
            out, err = logs[2 * share], logs[2 * share + 1]
            out.seek(0), err.seek(0)
            mine = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
            rows += mine
            if code and all(row["passed"] for row in mine):
                is_fine = False
                texts.append(f"process {share} ended with {code}: {err.read()}")
        return rows, texts, is_fine


if __name__ == "__main__":
    sys.exit(main())
