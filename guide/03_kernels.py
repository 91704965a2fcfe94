# %% [markdown]
# # 3. Kernels: from the formula to the instruction
#
# Eleven ideas make an attention kernel on a Hopper GPU fast. Each stands here alone, small enough to check on a CPU: first the arithmetic (online softmax, the merge law,
# splitting, merging inside), then memory (pages, gathering, banks and swizzle), then the machine (wgmma, TMA, pipelines, warp roles). The last part compiles one small product in six steps and
# counts what the assembler made of it; no GPU is needed for that.

# %%
import ast
import itertools
import json
import math
import re
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import torch

import drawings
import openmla
from drawings import bars, curves, lanes, squares
from openmla.core import env
from openmla.lab import suite
from openmla.reference.attention import BLOCK_KEYS, online_softmax
from openmla.split.combine import merge, merge_two
from openmla.split.schedule import plan_decode, ranges_needed

torch.manual_seed(0)

# %% [markdown]
# ## Online softmax
#
# Softmax divides by a sum over all keys, and to be safe it first subtracts the largest score. Both seem to need all scores before the first output. They do not. Keep, per
# row, the largest score so far $m$, the sum so far $l$ and the output so far $o$; when a block with a larger maximum $m'$ comes, everything so far is multiplied by
# $e^{m - m'}$:
#
# $$m' = \max(m, \max_j s_j), \qquad l' = l\,e^{m-m'} + \sum_j e^{s_j-m'}, \qquad o' = o\,e^{m-m'} + \sum_j e^{s_j-m'} v_j$$
#
# So a kernel holds one block of keys at a time, and the matrix of scores never exists. `online_softmax` is the oracle's version, in blocks of 64 keys like the kernels.

# %%
rows, keys, d_qk, d_v = 16, 640, 576, 512
q, k = torch.randn(rows, d_qk), torch.randn(keys, d_qk)
k[400] = 3 * q[5]  # one key that row 5 likes very much, late in the sequence
v, seen, scale = k[:, :d_v], torch.ones(rows, keys, dtype=torch.bool), d_qk**-0.5

out, lse, top = online_softmax(q, k, v, seen, scale, torch.float32)
scores = scale * (q.double() @ k.double().T)
exact = scores.softmax(-1) @ v.double()
print(f"blocks of {BLOCK_KEYS} keys: error {(out - exact).abs().max():.1e}, scores up to {scores.max():.0f}")
assert torch.allclose(out.double(), exact, atol=1e-5)
assert torch.allclose(lse.double(), scores.logsumexp(-1), atol=1e-5)

steps = [scores[:, : n + BLOCK_KEYS].amax(-1) for n in range(0, keys, BLOCK_KEYS)]
moved = torch.stack([after > before for before, after in itertools.pairwise(steps)])
print(f"of {moved.numel()} chances the maximum moved {int(moved.sum())} times")
curves(
    {f"row {r}": [(64 * (i + 1), float(step[r])) for i, step in enumerate(steps)] for r in (0, 5)},
    x="keys read", y="largest score so far", salt="peak", is_log=False,
    caption="Most blocks bring no new maximum. Row 5 meets its favourite key in the seventh block and then rescales once.",
)  # fmt: skip

# %% [markdown]
# Rescaling `o` costs a multiplication per output column, 512 of them per row. As the maximum seldom moves, the kernel for many rows goes further: its reference moves
# only when a weight would exceed $2^8$. What matters is that no exponential overflows; the exact maximum is not needed.
#
# ## The merge law
#
# Three numbers per row describe attention over *some* keys; two are enough when the output is already divided: `out` and `lse`, the logarithm of the sum. Two such
# results over different keys combine to the result over all of them:
#
# $$w_i = e^{\mathrm{lse}_i - \max \mathrm{lse}}, \qquad \mathrm{out} = \frac{\sum_i w_i\,\mathrm{out}_i}{\sum_i w_i}, \qquad \mathrm{lse} = \max \mathrm{lse} + \ln \sum_i w_i$$
#
# The grouping does not matter, and the result over no keys, $(0, -\infty)$, changes nothing. Mathematicians say commutative monoid; for a kernel it means that the
# keys of a request may be cut anywhere and computed by anybody. One function, `openmla.split.combine.merge`, serves split-KV, context parallelism over GPUs, shared prefixes and chunked prefill.

# %%


def part(begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys [begin, end) alone."""
    out, lse, _ = online_softmax(q, k[begin:end], v[begin:end], seen[:, begin:end], scale, torch.float32)
    return out, lse


pieces = [part(0, 100), part(100, 101), part(101, 640), part(7, 7)]
whole, whole_lse = merge(*(torch.stack(each) for each in zip(*pieces, strict=True)))
left = merge_two(*merge_two(*pieces[0], *pieces[1]), *pieces[2])
right = merge_two(*pieces[0], *merge_two(*pieces[1], *pieces[2]))
print(f"three pieces and an empty one: error {(whole - exact).abs().max():.1e}")
print(f"grouped differently: {(left[0] - right[0]).abs().max():.1e} apart")
assert torch.allclose(whole, out, atol=1e-5) and torch.allclose(whole_lse, lse, atol=1e-5)
assert torch.allclose(left[0], right[0], atol=1e-5)
assert torch.equal(merge_two(*pieces[0], *pieces[3])[0], pieces[0][0])

# %% [markdown]
# Equal up to rounding, not bit for bit: floating-point sums depend on their order. That is why the kernels merge in the order of the keys, whoever finishes first: the same
# input gives the same bits.
#
# ## Split-KV: who computes what
#
# One request of 32,768 tokens is 512 blocks of 64 keys. One SM would work through them one after the other while 131 others watch. So the plan gives each SM a
# stretch, and the merge law puts the results together. That is not free: every piece of a 128-head request leaves 128 rows of 512 fp32 numbers, written and read back.
#
# With as many requests as SMs there is a cheaper way to be even. A part may be a *list of ranges*: whole requests are dealt like cards, the longest first, from left to right and back again.
# 128 rows take two SMs, so 132 SMs are 66 parts; here are 128 requests of uneven length around 4,096 tokens, as the benchmark draws them:

# %%
for name, lengths in {"one long": [32768], "two": [32768, 16384], "128 short": [4096] * 128}.items():
    plan = plan_decode(lengths, num_parts=132)
    busiest = max(
        sum(piece.end_block - piece.begin_block for piece in plan.pieces() if piece.part == p) for p in range(132)
    )
    alone = max(-(-n // 64) for n in lengths)
    print(f"{name:10} {plan.num_pieces:4} pieces; busiest SM {busiest:3} blocks instead of {alone}")
uneven = next(
    iter(suite.sweep({"batch": [128], "s_k": [4096], "h_q": [128], "lengths": ["varlen"]}, ()).cases)
).draw_lengths()
for name, ranges in {"stretches": None, "lists of ranges": ranges_needed(128, 66)}.items():
    dealt = plan_decode(uneven, 66, merge_blocks=20, ranges=ranges)
    loads = [sum(p.end_block - p.begin_block for p in dealt.pieces() if p.part == part) for part in range(66)]
    merged = sum(b - a for a, b in itertools.pairwise(dealt.num_splits) if b - a > 1)
    print(f"{name:15} busiest part {max(loads)} blocks, even would be {sum(loads) / 66:.0f}; {merged} pieces to merge")
assert merged == 0
print(f"partial results per piece: {128 * 512 * 4:,} bytes")
assert plan.num_pieces == 128  # as many requests as SMs: nobody is split, nothing has to be merged

# %% [markdown]
# Four blocks more for the busiest part, and nothing to merge: on an H200 the call took 230.8 us instead of 244.7 (rows `dd-11-03` and `dd-11-02`).
#
# ## The merge, inside the kernel
#
# Who merges? A second kernel can: it starts when the first has ended, reads all partial results, writes `out`. That costs a launch, and all SMs wait for the last one before anybody merges. For a call of 28 microseconds it
# is a quarter of the time (rows `dd-12-002` and `-003`). So both dense kernels merge themselves. In the one for many rows a CTA that has no piece left takes its share of the rows that it helped to compute, waits until a
# *count* of arrivals says that all of their partial results lie in memory, and merges. (The one for few rows has smaller partials, and each 16 bytes of them say by their first word whether they are there.) Three things have to be right:
#
# - **Everybody who waits must be running.** A CTA that waits for one that has not been started waits for ever, so the launch is *cooperative*: all CTAs are resident at once, or the launch fails.
# - **Counts are ready for the next call.** The arrival that completes a count wraps it to 0 (`atom.inc`), so no launch has to clear it, and a captured graph can be replayed.
# - **The order of the sum does not depend on who came first**: pieces are added in the order of the keys. The same bits, run after run.
#
# Here is that protocol on threads of this CPU. Workers end in any order; the result is one:

# %%


def with_counts(order: list[int]) -> torch.Tensor:
    """Five workers: each stores its piece, adds to the count, waits for it, and merges its share of the rows."""
    cuts, store, result, arrivals = [0, 100, 101, 300, 333, 640], {}, torch.empty_like(out), [0]
    arrived = threading.Condition()

    def work(worker: int) -> None:
        time.sleep(0.002 * order[worker])
        store[worker] = part(cuts[worker], cuts[worker + 1])
        with arrived:
            arrivals[0] += 1
            arrived.notify_all()
            arrived.wait_for(lambda: arrivals[0] == 5)
        mine = slice(worker * rows // 5, (worker + 1) * rows // 5)
        outs, lses = (torch.stack([store[i][which][mine] for i in range(5)]) for which in (0, 1))
        result[mine] = merge(outs, lses)[0]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    [each.start() for each in workers]
    [each.join() for each in workers]
    return result


first, second = with_counts([0, 1, 2, 3, 4]), with_counts([4, 2, 0, 3, 1])
print(f"error {(first - exact).abs().max():.1e}; other order of arrival, same bits: {torch.equal(first, second)}")
assert torch.equal(first, second) and torch.allclose(first.double(), exact, atol=1e-5)

# %% [markdown]
# Two other designs were right and slower; chapter 4 has their times. For `policy="batch_invariant"` the kernel for many rows still merges by a second launch.
#
# ## Pages
#
# The keys of a request lie in pages scattered over the pool. For a kernel a page table is one more load before the load: the id of the page, then the page. What it must not become is
# 64 separate small loads. A page holds 64 rows of 1,152 bytes that are contiguous, so the kernel for few rows asks for eight whole rows at once, 9,216 bytes in one
# request of the copy engine. Any page size that is a multiple of eight works. Since only the table knows where pages lie, moving them changes nothing, not one bit:

# %%
pool = torch.randn(20, 64, 1, 576).bfloat16()
table = torch.arange(10, dtype=torch.int32)[None]
order = torch.randperm(20)
moved_pool = torch.empty_like(pool)
moved_pool[order] = pool
queries, length = torch.randn(1, 1, 16, 576).bfloat16(), torch.tensor([600], dtype=torch.int32)
here, _ = openmla.decode(queries, pool, table, length)
there, _ = openmla.decode(queries, moved_pool, order[table.long()].int(), length)
assert torch.equal(here, there)
print("pages at", order[:10].tolist(), "give the same bits")

# %% [markdown]
# ## Sparse attention: every query its own keys
#
# DeepSeek V3.2 lets a small *indexer* choose some two thousand keys per query token, and attends to those alone. For a kernel this changes one thing: keys are *gathered*. There is no box of 64 neighbouring rows that the copy engine could
# fetch; each row has an address of its own, read from a list. What comes out is attention over the chosen keys, nothing else:

# %%
slots = torch.randperm(600)[:64].int()  # positions in the sequence ...
chosen = (table[0].long()[slots.long() // 64] * 64 + slots.long() % 64).int()  # ... and where they lie in the pool
sparse, _ = openmla.sparse_decode(queries, pool, chosen.view(1, 1, 64))
picked = pool.view(-1, 576)[chosen.long()][None, :, None]  # one page of 64 rows: the chosen keys, side by side
dense, _ = openmla.decode(queries, picked, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([64], dtype=torch.int32))
print(f"sparse and dense over the same 64 keys differ by {(sparse - dense).abs().max():.1e}")
for context in (4096, 32768, 131072):
    print(
        f"{context:7} tokens: dense reads {context * 1152 / 1e6:6.1f} MB, sparse with 2048 keys {2048 * 656 / 1e6:.1f} MB (fp8_656)"
    )
assert torch.allclose(sparse.float(), dense.float(), atol=0.02)

# %% [markdown]
# Three consequences, each a warp role of [the sparse decode](../docs/kernels/decode_sparse.md):
#
# - **Rows come by loads of threads** (16 bytes each, `cp.async` or registers), because the copy engine's gather belongs to Blackwell. Indices are read a tile ahead; one that is out of range is masked.
# - **FP8 becomes bf16 on the way.** Hopper's tensor cores know no scale per group of columns, so warps of their own convert 64 x 512 codes per tile while others multiply: about half as many clocks as the products take, so it
#   hides, if nobody waits for it.
# - **Two tokens share nothing.** In dense decode all query rows of a request read the same tile; here each token has its own, so the arithmetic per byte comes from the heads alone.
#
# [Sparse prefill](../docs/kernels/prefill_sparse.md) gathers bf16 rows the same way.
#
# ## Banks and swizzle
#
# Shared memory, where a tile waits for the tensor cores, has 32 *banks* of 4 bytes; each delivers one word per clock. Eight threads reading 16 bytes each can be served in one clock
# if together they touch every bank once. Tensor cores read eight *rows* at the same 16-byte column. In a tile with rows of 128 bytes all of those lie in the same four banks, and the reads queue: an
# eight-way bank conflict.
#
# *Swizzling* fixes it without a byte of padding: the 16-byte column is exclusive-ored with the row number. Below, `swizzle` is the 128-byte mode of the hardware: TMA writes with it, wgmma reads with it.

# %%


def swizzle(byte: int) -> int:
    """Address within a tile of 128-byte rows: bits 4 to 6 (16-byte column) ^= bits 7 to 9 (row)."""
    return byte ^ ((byte >> 7 & 7) << 4)


def clocks(addresses: list[int]) -> int:
    """Clocks for eight reads of 16 bytes: how often the busiest group of four banks is asked."""
    groups = [address // 16 % 8 for address in addresses]
    return max(groups.count(group) for group in groups)


plain = [[row * 128 + column * 16 for column in range(8)] for row in range(8)]
swizzled = [[swizzle(address) for address in row] for row in plain]
for name, tile in (("plain", plain), ("swizzled", swizzled)):
    down = clocks([tile[row][3] for row in range(8)])
    along = clocks(tile[3])
    print(f"{name:9} clocks for eight rows of one column: {down}; for eight columns of one row: {along}")
assert clocks([row[3] for row in plain]) == 8
assert all(clocks([swizzled[row][column] for row in range(8)]) == 1 for column in range(8))
assert all(clocks(row) == 1 for row in swizzled)
assert sorted(address for row in swizzled for address in row) == sorted(address for row in plain for address in row)
squares(
    [[address // 16 % 8 for address in row] for row in plain], [[address // 16 % 8 for address in row] for row in swizzled],
    titles=("plain: a column is one bank group", "swizzled: a column is all of them"), salt="banks",
    caption="Where the 16-byte pieces of eight rows lie. A number, and a colour, is a group of four banks. Reading down a column must not meet one twice.",
)  # fmt: skip

# %% [markdown]
# ## wgmma: 64 rows or nothing
#
# Hopper's matrix instruction is issued by four warps together (a *warpgroup*) and multiplies 64 rows by up to 256 columns, 16 deep, straight out of shared memory. 64 is fixed. A
# decode call with 16 heads and one token has 16 query rows: put on the 64-row side, three quarters of the multiplications are for nothing.
#
# The other side, N, may be any multiple of 8. So the kernel for few rows turns the product around: $S^T = K Q^T$ with 64 *keys* on the 64-row side, of which there are always enough.

# %%
for query_rows in (8, 16, 32, 64, 128):
    as_m, as_n = query_rows / (64 * math.ceil(query_rows / 64)), query_rows / (8 * math.ceil(query_rows / 8))
    print(f"{query_rows:4} query rows: {as_m:5.0%} of the work is useful with rows on M, {as_n:4.0%} with keys on M")
per_tile = 576 // 16
print(f"scores of 64 keys and 16 rows: {per_tile} wgmmas of 64 x 16 x 16")
assert per_tile == 36

# %% [markdown]
# ## TMA and the pipeline
#
# The *tensor memory accelerator* is a copy engine: one thread describes a box of a tensor, and the box appears in shared memory, swizzled, while threads do something else. A barrier in shared memory (*mbarrier*)
# counts the bytes and wakes whoever waits. This makes it cheap to have several tiles on their way. Why one wants that is arithmetic: with one buffer a tile's
# journey and its use add up; two buffers halve that; with enough of them only the slowest station counts. A small model, in any unit of time:

# %%


def schedule(stages: int, tiles: int = 6, latency: float = 4.0, transfer: float = 2.0, work: float = 3.0):
    """(rows to draw, time per tile) of loads into `stages` buffers and one worker that uses tiles in order."""
    free, done, bus = [0.0] * stages, 0.0, 0.0
    loads, uses = [], []
    for tile in range(tiles):
        start = free[tile % stages]
        bus = max(start + latency, bus) + transfer  # arrives; transfers follow one another
        loads.append((start, bus, f"load {tile}", tile))
        begin = max(bus, done)
        done = begin + work
        uses.append((begin, done, f"use {tile}", tile))
        free[tile % stages] = done
    lanes_of = {f"buffer {s}": [box for t, box in enumerate(loads) if t % stages == s] for s in range(stages)}
    return {**lanes_of, "worker": uses}, (uses[-1][1] - uses[1][1]) / (tiles - 2)


per = {stages: schedule(stages)[1] for stages in (1, 2, 3, 4)}
for stages, per_tile in per.items():
    print(f"{stages} buffers: {per_tile:.1f} per tile")
assert per[1] == 9.0 and per[3] == 3.0  # everything added up; then only the work counts
lanes(
    schedule(2)[0], x="time", salt="stages", is_wide=True,
    caption="Two buffers. The worker still waits now and then: a journey (6) is longer than one use (3). A third buffer closes the gaps.",
)  # fmt: skip

# %% [markdown]
# ## Warp roles
#
# Who starts the copies? If the multiplying threads do, they stop multiplying for it. So kernels for Hopper give warps different jobs: one warp only loads and runs ahead, into
# the next request if it can; warpgroups only compute. They meet at two mbarriers per buffer, *full* and *empty*. Registers can be moved from those who load (24 are plenty)
# to those who hold the output.
#
# This is one tile of the kernel for few rows as it ran on an H100, in clocks; numbers from [its page](../docs/kernels/decode_dense_small.md). Two warpgroups share each tile: each sums half of the columns of every
# dot product, they exchange partial scores (X), then each computes half of the output's rows.

# %%
turn, at = [], 0.0
for name, length_of in (("scores", 842), ("X", 22), ("max", 300), ("exp, P", 330), ("P V", 834)):
    turn.append((at, at + length_of, name if length_of > 100 else "", len(turn)))
    at += length_of
print(f"{at:.0f} clocks per tile of 64 keys; at 132 SMs and full bandwidth memory brings one every 5,400")
lanes(
    {"loading warp": [(0, 550, "8 loads", 7), (550, at, "waits for a free buffer, or is tiles ahead", 7)], "warpgroup 0": turn, "warpgroup 1": turn},
    x="clocks", salt="roles", is_wide=True,
    caption="Few rows: the matrix units idle half of the time and nobody cares, because memory is slower still. With 128 heads that is different (chapter 4).",
)  # fmt: skip

# %% [markdown]
# ## Six levels of one product, compiled
#
# `guide/hopper_levels.py` holds the scores of 64 keys and 16 rows, tile after tile, six times: a loop, wgmma, TMA, a pipeline, warp roles, and two warpgroups that take turns at multiplying and
# exponentials (the *seesaw*). Each is a few lines more than the one before. The CuTe DSL compiles them for `sm_90a` on any machine, and the disassembly says what became of them. On a GPU they are checked and timed by
# `tests/gpu/guide_levels.py`.

# %%
LEVELS = Path(drawings.__file__).with_name("hopper_levels.py").read_text(encoding="utf-8")
LEVEL_ROWS = Path(drawings.__file__).parents[1] / "bench" / "results" / "guide_levels.jsonl"
functions = {each.name: each for each in ast.walk(ast.parse(LEVELS)) if isinstance(each, ast.FunctionDef)}
for name in ("loop", "load", "multiply"):
    print(textwrap.dedent(ast.get_source_segment(LEVELS, functions[name], padded=True) or ""), end="\n\n")

# %% [markdown]
# Those three do the work: level 1 is `loop`; levels 2 to 6 call `multiply` on a tile that threads (level 2) or `load` (from level 3) have brought. What the levels differ in is who calls them, and when. Compiled:

# %%
WATCHED = ("LDG", "STS", "FFMA", "HGMMA", "UTMALDG", "SYNCS", "MUFU")
counts: dict[str, dict[str, int]] = {}
if env.is_importable("cutlass") and env.is_importable("triton"):  # the DSL, and cuobjdump, which Triton's wheel carries
    import hopper_levels
    from openmla.backends.cute import toolchain

    with tempfile.TemporaryDirectory() as folder:
        print(f"{'level':12}registers  smem  " + "  ".join(WATCHED))
        for level, name in enumerate(hopper_levels.NAMES, 1):
            kernel = hopper_levels.Scores(level)
            made = toolchain.compile_kernel(kernel, hopper_levels.arguments(), f"level_{level}", out_dir=Path(folder))
            sass = toolchain.disassemble(made.cubin_path)
            found = counts[name] = {op: len(re.findall(rf"\b{op}\b", sass)) for op in WATCHED}
            size = made.resources.dynamic_smem_bytes
            assert made.resources.spills == 0
            row = "  ".join(f"{found[op]:{len(op)}}" for op in WATCHED)
            print(f"{level} {name:10}{made.resources.registers:9}{size // 1024:4} K  {row}")
else:
    print("needs: pip install 'openmla[cuda,triton]'")

# %% [markdown]
# How to read it, line by line:
#
# 1. **loop**: loads from global memory (`LDG`) and fused multiply-adds (`FFMA`), one number at a time. No tensor core is used.
# 2. **wgmma**: 36 `HGMMA` replace all multiply-adds: 576 columns, 16 at a time. Every thread still copies the tile by hand (`LDG`, then `STS` into shared memory).
# 3. **TMA**: nine `UTMALDG`, one per 64 columns, issued by one thread; loads and stores by threads remain for the queries only. `SYNCS` are operations on mbarriers.
# 4. **pipeline**: shared memory doubles; the same nine loads appear in the prologue (twice) and in the loop. Those who multiply also load.
# 5. **roles**: nine loads again, in one place, in a warp of their own.
# 6. **seesaw**: `MUFU` are the exponentials, eight per thread and tile. While one warpgroup takes them, the other's `HGMMA` keep the tensor cores busy.
#
# ## How fast they are
#
# Before you look: 604 MB of keys, 9.7 GFLOP. Which level reaches the rate of the memory? The last bar is PyTorch adding up the same bytes, in the same run.

# %%
rates: dict[str, dict[str, float]] = {}  # device -> level -> GB/s
for each in map(json.loads, LEVEL_ROWS.read_text(encoding="utf-8").splitlines()):
    device = each["environment"]["device"]
    if device not in rates:
        print(f"{device}, {each['keys']:,} keys of 576 columns, 16 query rows")
    rates.setdefault(device, {})[each["name"]] = each["gbps"]
    print(f"{each['level'] or ' '} {each['name']:9}{each['median_us']:9.1f} us {each['gbps']:6.0f} GB/s")
rate = rates["NVIDIA H200"]
bars(
    {f"{number % 7 or ''} {name}".strip(): gbps for number, (name, gbps) in enumerate(rate.items(), 1)}, unit="GB/s of keys and scores (logarithmic)",
    is_log=True, salt="levels", caption="H200: six levels and a bare read of the same bytes. From level 4 on there is nothing left to win: memory is the limit.",
)  # fmt: skip

# %% [markdown]
# - **1 to 2**: the tensor cores take over, and it is eight times as fast. The limit is now the copy into shared memory, two bytes at a time by every thread.
# - **2 to 3**: the copy engine takes over, and it is six times as fast again. Each CTA still waits for its one tile, but two CTAs fit on an SM, and one waits while the other works: a pipeline that nobody wrote.
# - **3 to 4**: a pipeline that somebody wrote. Half as fast again on the H200, an eighth on the H100, whose memory is slower; on both faster than PyTorch's sum.
# - **5 and 6**: nothing. With 16 rows the arithmetic is done long before the next tile is there, so who issues copies and whose exponentials overlap does not matter. Roles and turns pay where the tensor cores are the limit
#   (128 heads, chapter 4), and where a warp that loads can run ahead into the next request. *An optimisation is worth what it removes from the limit, and nothing anywhere else.*
#
# What ships adds the second product, masks, the plan, the merge and the guards against bad values: 36 `HGMMA` for scores and the rest for values per tile, and no spills, which a
# test holds for every variant (`tests/compile`).
#
# ## What to take along
#
# Arithmetic gives freedom (cut the keys anywhere, merge in order), memory takes it away (contiguous boxes, swizzled tiles, enough of them on their way), and the machine decides who does what.
# Chapter 4 puts numbers on it.
#
# Exercises: `openmla learn bank_conflicts`, `openmla learn merge_kernel`.

# %%
assert per[2] < per[1]
assert 6 < rate["wgmma"] / rate["loop"] < 10 and 4 < rate["TMA"] / rate["wgmma"] < 8
assert rate["pipeline"] > 1.2 * rate["TMA"]
assert all(each["pipeline"] > 1.1 * each["TMA"] and each["pipeline"] > each["read"] for each in rates.values())
assert all(0.9 < rate[name] / rate["pipeline"] < 1.1 for name in ("roles", "seesaw"))
for name in counts:
    assert (counts[name]["HGMMA"] == 36) == (name != "loop")
    assert (counts[name]["UTMALDG"] > 0) == (name not in ("loop", "wgmma"))
    assert (counts[name]["FFMA"] > 0) == (name == "loop")
    assert (counts[name]["MUFU"] == 8) == (name == "seesaw")
assert not counts or counts["pipeline"]["UTMALDG"] == 3 * counts["roles"]["UTMALDG"]
