"""What puts the lists of a sparse prefill in the order of their rows, on a GPU: alone, and in the whole operation.

python tests/gpu/prefill_order.py gate       with a bundle or the DSL; every case four times, the same bits
python tests/gpu/prefill_order.py watched    small cases, once each, for compute-sanitizer
"""

from __future__ import annotations

import sys

import torch

import openmla
from openmla.backends.cute import bundle
from openmla.backends.cute.prefill_sparse import config as gather
from openmla.core import faults
from openmla.core.problem import SparsePrefillProblem
from openmla.core.target import Target
from openmla.reference import attention
from openmla.testing.budget import check as judge

CUDA = "cuda"
HOSTILE = (-2, -(2**31), 2**31 - 1, 114514)
LISTS = (  # tokens, topk, rows, tokens of a turn, whether lists have lengths
    (1, 1, 1, 1, False),
    (3, 64, 40, 1, True),
    (7, 1023, 65536, 2, False),
    (300, 512, 65536, 132, True),
    (500, 2048, 131072, 66, True),
    (9, 2047, 2_000_000, 4, True),
)


def lists(tokens, topk, rows, has_length, seed=0):
    """(indices, lengths or None): a tenth are -1 or hostile; behind the end stands anything."""
    g = torch.Generator(CUDA).manual_seed(seed)
    indices = torch.randint(0, rows, (tokens, topk), dtype=torch.int32, device=CUDA, generator=g)
    dice = torch.rand(indices.shape, device=CUDA, generator=g)
    bad = torch.tensor([-1, *HOSTILE], device=CUDA).to(torch.int32)
    wild = bad[torch.randint(0, len(bad), indices.shape, device=CUDA, generator=g)]
    indices = torch.where(dice < 0.1, wild, indices)
    length = torch.randint(-1, topk + 2, (tokens,), dtype=torch.int32, device=CUDA, generator=g) if has_length else None
    return indices, length


def one_list(function, tokens, topk, rows, parts, has_length):
    """Whether every list is the same entries in the order asked for, with the same bits four times."""
    indices, length = lists(tokens, topk, rows, has_length)
    fine, before = True, None
    for _ in range(4):
        out = torch.full((tokens, topk), -777, dtype=torch.int32, device=CUDA)
        function(indices, indices[0] if length is None else length, out, rows, parts, int(has_length))
        fine &= before is None or torch.equal(out, before)
        before = out
    ends = torch.full((tokens,), topk, device=CUDA) if length is None else length.clamp(0, topk)
    inside = torch.arange(topk, device=CUDA)[None] < ends[:, None]
    last = 2**31 - 1
    same = torch.equal(out.masked_fill(~inside, last).sort(1).values, indices.masked_fill(~inside, last).sort(1).values)
    bucket = (out.float() * (torch.tensor(32.0, device=CUDA) / rows)).clamp(0, 31).int()
    is_back = (torch.arange(tokens, device=CUDA) // parts % 2 == 1)[:, None]
    steps = torch.where(is_back, -bucket.diff(dim=1), bucket.diff(dim=1))
    in_order = bool((steps[inside[:, 1:]] >= 0).all())
    untouched = bool((out[~inside] == -777).all())
    print(f"  {tokens} x {topk} of {rows}: entries {same} order {in_order} rest {untouched} bits {fine}", flush=True)
    return fine and same and in_order and untouched


def whole(d_qk, h_q, has_length, rows=131072, tokens=300, topk=700):
    """The operation over ordered lists beside the oracle, twice, and in a CUDA graph; bad indices are reported."""
    g = torch.Generator(CUDA).manual_seed(h_q)
    q = torch.randn(tokens, h_q, d_qk, device=CUDA, generator=g).to(torch.bfloat16)
    kv = torch.randn(rows, 1, d_qk, device=CUDA, generator=g).to(torch.bfloat16)
    indices, length = lists(tokens, topk, rows, has_length, seed=h_q)
    indices, sink = indices[:, None], torch.randn(h_q, device=CUDA, generator=g)
    problem = SparsePrefillProblem(tokens, rows, h_q, 1, d_qk, 512, torch.bfloat16, topk, has_sink=True)
    is_ordered = gather.is_ordered(problem, Target.detect(CUDA))
    word = faults.fault_word(q.device)
    word.zero_()

    def call():
        return openmla.sparse_prefill(q, kv, indices, topk_length=length, attn_sink=sink, backend="cute")

    first = call()
    reported = bool(word.item() & 8)
    word.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    graph.replay()
    word.zero_()
    same = all(torch.equal(x, y) for x, y in zip(first, held, strict=True))
    fine, worst = True, 0.0
    for some in (slice(0, 24), slice(130, 150), slice(tokens - 8, tokens)):  # turns of both directions
        want = attention.sparse_prefill(
            q[some], kv, indices[some], softmax_scale=d_qk**-0.5, d_v=512, attn_sink=sink, with_bounds=True,
            topk_length=None if length is None else length[some],
        )  # fmt: skip
        report = judge(first[0][some], first[2][some], want, dtype=torch.bfloat16, max_logits=first[1][some])
        fine &= report.passed
        worst = max(worst, report.ratio("HARD"))
    words = f"oracle {fine} worst {worst:.2f} graph {same} reported {reported} ordered {is_ordered}"
    print(f"  {d_qk} columns, {h_q} heads, lengths {has_length}: {words}", flush=True)
    return fine and same and reported and is_ordered


if __name__ == "__main__":
    served = bundle.serve(gather.ORDER_FAMILY, gather.Order()).function
    if sys.argv[1] == "watched":
        for each in LISTS[:3]:
            one_list(served, *each)
        sys.exit(0)
    passed = [one_list(served, *each) for each in LISTS]
    passed += [whole(d_qk, h_q, has) for d_qk in (576, 512) for h_q, has in ((64, True), (128, False))]
    print(f"{sum(passed)} of {len(passed)} passed")
    sys.exit(0 if all(passed) else 1)
