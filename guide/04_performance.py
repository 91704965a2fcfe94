# %% [markdown]
# # 4. Performance: what the kernels reach, and how they got there
#
# Every time on this page is read from a row in `bench/results`, measured on one H100 80GB HBM3 (where it says so, on an H200), and named by its row. The logs behind them, failures
# included, are the pages of the two dense kernels: [few rows](../docs/kernels/decode_dense_small.md) and [many rows](../docs/kernels/decode_dense.md).

# %%
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import drawings
from openmla.core.cost import cost
from openmla.core.target import Target
from openmla.lab import bars, store, suite, workload
from openmla.split.schedule import SplitPlan, plan_decode

RESULTS = Path(drawings.__file__).parents[1] / "bench" / "results"
ROWS: dict[str, Any] = {
    raw["environment"]["row"]: SimpleNamespace(**raw)
    for name in ("decode_dense", "decode_dense_small")
    for raw in map(json.loads, (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    if "row" in raw["environment"]
}
print(f"{len(ROWS)} named rows; the fields of one: {', '.join(list(vars(ROWS['dd-5-04']))[:8])}, ...")

# %% [markdown]
# ## The roof that a card really has
#
# A data sheet says 989 TFLOP/s and 3,352 GB/s. A large matrix product reaches less, because the card holds its power at about 700 W by lowering its clock: less when it runs once, and less still when it runs back to back.

# %%
gemm, reading = ROWS["dd-5-07"], ROWS["dds-2-18"].ceilings["read_gbps"]
once, sustained = gemm.tflops, gemm.environment["sustained_tflops"]
sheet = Target.preset("h100_sxm")
print(
    f"bf16 product of 8192 x 8192: {once:.0f} TFLOP/s once, {sustained:.0f} back to back (dd-5-07); data sheet {sheet.bf16_tflops:.0f}"
)
print(f"reading: {reading:,.0f} GB/s (dds-2-18); data sheet {sheet.hbm_gbps:,.0f}")
print(
    f"so the ridge is at {1e3 * sustained / reading:.0f} FLOP per byte, not at {1e3 * sheet.bf16_tflops / sheet.hbm_gbps:.0f}"
)
assert sustained < once < sheet.bf16_tflops and reading < sheet.hbm_gbps

# %% [markdown]
# Under that roof stand the calls. A call is *bound* by what the roof at its intensity is made of, and its share of the roof says how much is left to gain.

# %%
NEWEST = bars.newest(store.read(RESULTS / "decode_dense_suite.jsonl"))  # of each case of the suite, the run that counts
SHOWN = {
    "few rows, batch 1, 4k": "decode-b1-sq1-hq16-sk4096-bf16",
    "few rows, batch 4, 32k": "decode-b4-sq1-hq16-sk32768-bf16",
    "few rows, batch 128, 16k": "decode-b128-sq1-hq16-sk16384-bf16",
    "128 heads, 1 token, 32k": "decode-b128-sq1-hq128-sk32768-bf16",
    "128 heads, 2 tokens, 16k": "decode-b128-sq2-hq128-sk16384-bf16-varlen",
}
calls, shares = {name: bars.ours(NEWEST[case]) for name, case in SHOWN.items()}, {}
for name, row in calls.items():
    assert row.environment["device"] == gemm.environment["device"]
    floor = max(row.flops / once / 1e6, row.bytes / reading / 1e3)
    shares[name] = floor / row.median_us
    bound = "arithmetic" if row.flops / once / 1e6 > row.bytes / reading / 1e3 else "memory"
    print(
        f"{name:26} {row.median_us:7.1f} us, the roof allows {floor:7.1f} ({bound}): {shares[name]:4.0%}   {SHOWN[name]}"
    )
drawings.roofline(
    [], tflops=once, gbps=reading, rates="measured, once", salt="reached",
    reached=[(name, row.flops / row.bytes, row.tflops) for name, row in calls.items()],
    caption="Where five calls stand under the measured roof. One short call alone is far below: it is bound by neither.",
)  # fmt: skip

# %% [markdown]
# Three regimes, three kinds of work:
#
# - **Latency.** One request of 4,096 tokens needs 4.7 MB, which memory delivers in 1.5 microseconds. The call takes more than five times as long: the launch, the plan, the first load, the merge. What helps is
#   fewer steps one after another, not more bandwidth.
# - **Memory.** 16 heads and a large batch: read at full speed, do everything else meanwhile.
# - **Arithmetic.** 128 heads: keep the tensor cores busy in every clock, and spend as little power as possible on anything else.
#
# ## Uneven lengths
#
# Requests differ. A kernel with one CTA per request ends when the longest request does. The plan (`split/schedule.py`) cuts the line of all KV blocks evenly instead. Lengths below are drawn as the benchmark suites
# draw them, around a mean of 16,384 with half of it as spread.

# %%
case = next(
    each for each in suite.sweep({"batch": [128], "s_k": [16384], "h_q": [16], "lengths": ["varlen"]}, ()).cases
)
lengths = case.draw_lengths()


def busiest(plan: SplitPlan, parts: int) -> int:
    """Blocks of the part that has most."""
    load = [0] * parts
    for piece in plan.pieces():
        load[piece.part] += piece.end_block - piece.begin_block
    return max(load)


blocks = sum(-(-n // 64) for n in lengths)
even, plan = blocks / 132, plan_decode(lengths, 132)
print(
    f"{len(lengths)} requests of {min(lengths):,} to {max(lengths):,} tokens: {blocks:,} blocks, {even:.0f} for each of 132 SMs"
)
print(
    f"one request per SM: the longest has {max(lengths) // 64}, so the GPU is busy {even / (max(lengths) / 64):.0%} of the time"
)
print(
    f"with the plan: the busiest SM has {busiest(plan, 132)}, in {plan.num_pieces} pieces; busy {even / busiest(plan, 132):.0%}"
)
assert busiest(plan, 132) < 1.05 * even + 6

# %% [markdown]
# Cutting has its price. With 128 heads each piece leaves 262 KB of partial results, and they have to be merged. At 4,096 tokens the even plan split nearly every request, and the kernel lost against its peer because of it;
# dealing whole requests to the parts loses a little balance and wins:

# %%
peer, split, whole = ROWS["dd-5-14"], ROWS["dd-5-15"], ROWS["dd-5-19"]
print(
    f"batch 128, 128 heads, 4096 tokens: split {split.median_us:.0f} us, whole {whole.median_us:.0f}, peer {peer.median_us:.0f} (dd-5-15, -19, -14)"
)
print(f"whole requests gain {split.median_us / whole.median_us - 1:.0%}")
assert whole.median_us < peer.median_us < split.median_us
cheap = plan_decode([16384] * 128, 66, overhead_blocks=5, merge_blocks=0)
dear = plan_decode([16384] * 128, 66, overhead_blocks=5, merge_blocks=20)
print(f"at 16,384 tokens, splitting for nothing: {cheap.num_pieces} pieces; at a price of 20 blocks: {dear.num_pieces}")
assert cheap.num_pieces > dear.num_pieces == 128

# %% [markdown]
# That is why `plan_decode` has a `merge_blocks`: splitting has a price for the whole batch, and the plan pays it only when it evens out more. With uneven lengths, lists of ranges (chapter 3) keep requests whole *and* the parts even:

# %%
peer, stretch, lists = ROWS["dd-11-01"], ROWS["dd-11-02"], ROWS["dd-11-03"]
print(
    f"batch 128, uneven around 4096, H200: stretches {stretch.median_us:.0f} us, lists {lists.median_us:.0f}, peer {peer.median_us:.0f} (dd-11-02, -03, -01)"
)
assert lists.median_us < stretch.median_us < peer.median_us
assert all(row.environment["device"] == "NVIDIA H200" for row in (peer, stretch, lists))

# %% [markdown]
# ## The end of a small batch
#
# Four requests of 4,096 tokens with 128 heads are 64 pieces, each of four tiles. Then a call is mostly beginning and end: set-up, first loads, and the merge. What became of the end:

# %%
ENDS = {
    "one more launch merges (H100)": "dd-12-018",
    "no merge at all (H100): the floor, wrong results": "dd-12-019",
    "one more launch merges (H200)": "dd-12-208",
    "counts and bulk copies, in the kernel (H200)": "dd-12-211",
    "the peer (H200)": "dd-12-207",
}
for name, row_id in ENDS.items():
    print(f"{name:50} {ROWS[row_id].median_us:5.1f} us   {row_id}")
    assert ROWS[row_id].case == "decode-b4-sq1-hq128-sk4096-bf16"
    assert name.count("H200") == ROWS[row_id].environment["device"].count("H200")
assert ROWS["dd-12-211"].median_us < ROWS["dd-12-207"].median_us < ROWS["dd-12-208"].median_us

# %% [markdown]
# Between those lie two designs. *Sentinels*, where each 16 bytes of a partial result say whether they have arrived, suit the few-row kernel's 32 KB and not 128 KB: marking them unread again is as much traffic as the data. *Counts with loads
# into registers* worked, in four rounds of loads one after the other. The third lays partial results out so that a CTA's share of each piece is one stretch of memory, asks for all of it at once by bulk copies into the ring of tiles, which is free by then, and is a third as long.
#
# ## The memory hierarchy
#
# | level | size on an H100 | what lives there |
# | --- | --- | --- |
# | registers | 256 KB per SM | the output: 64 x 512 fp32 are 128 KB |
# | shared memory | 227 KB per SM | the ring of KV tiles, 72 KB each, and the queries |
# | L2 | 50 MB | tiles that two SMs want; partial results on their way to the merge |
# | HBM | 80 GB at about 3,080 GB/s | the cache |
#
# Two findings from the logs, each a row against a row:

# %%
first, second = ROWS["dds-1-08"], ROWS["dds-2-18"]
print(f"boxes of 64 columns: {first.gbps:,.0f} GB/s; of eight whole rows: {second.gbps:,.0f} (dds-1-08, dds-2-18)")
alone, ahead = ROWS["dd-2-13"], ROWS["dd-2-12"]
print(f"1 token, L2 prefetch two tiles ahead: {alone.median_us:.0f} -> {ahead.median_us:.0f} us (dd-2-13, -12)")
alone2, ahead2 = ROWS["dd-2-03"], ROWS["dd-2-02"]
print(f"2 tokens, the same:                   {alone2.median_us:.0f} -> {ahead2.median_us:.0f} us (dd-2-03, -02)")
assert second.gbps > 1.05 * first.gbps and ahead.median_us < 0.9 * alone.median_us
assert ahead2.median_us > 0.95 * alone2.median_us

# %% [markdown]
# The first: *contiguity beats depth*. The second version had less in flight and was faster, because each request of the copy engine asks for 9,216 bytes in a row instead of 64 separate lines. The second: prefetching into L2
# helped where a tile has one reader and did not where two clusters read the same tile; the one that lags finds it in L2 anyway, unless prefetching makes them lose each other.
#
# ## Overlap
#
# A tile of 64 keys and 64 rows is 8.91 MFLOP, 2,176 clocks of one SM's tensor cores. Whatever else a tile needs has to happen meanwhile: exponentials (256 clocks of the special-function units at least), maxima, rounding,
# the hand-over to the second product. One turn of the kernel for many rows was measured with clock stamps at 2,600:

# %%
flops_per_tile = 2 * 64 * 64 * (576 + 512)
clocks = flops_per_tile / 4096  # an SM makes 4096 bf16 FLOP per clock
print(
    f"{flops_per_tile / 1e6:.2f} MFLOP = {clocks:.0f} clocks; a turn of 2,600 keeps the tensor cores {clocks / 2600:.0%} busy"
)
assert round(clocks) == 2176
drawings.lanes(
    {
        "scores": [(0, 70, "", 0), (70, 730, "maximum of j-1", 3), (730, 1370, "wgmma + exp", 0), (1370, 1470, "", 4), (1470, 2180, "24 wgmma", 0), (2180, 2425, "drain", 7)],
        "values, left": [(0, 290, "P V", 1), (290, 2250, "waits for P(j-1), then for its gate", 7), (2250, 2600, "P V", 1)],
        "values, right": [(0, 840, "P V(j-2)", 1), (840, 2500, "waits", 7), (2500, 2600, "", 1)],
    },
    x="clocks of one turn", salt="turn", is_wide=True,
    caption="One turn of the kernel for many rows, from its page. The gates let P V run while the scores warpgroup finds a maximum and cannot feed the tensor cores.",
)  # fmt: skip

# %% [markdown]
# ## How the few-row kernel got there
#
# Each version was predicted, changed, measured beside its peer in the same run, and written down, also when it was slower.

# %%
VERSIONS = {
    "slice ring": "dds-1-02",
    "rows of eight": "dds-2-03",
    "+ merge in kernel": "dds-2-02",
    "+ partials in order": "dds-4-02",
    "+ weights once": "dds-5-04",
}
PEERS = ("dds-1-01", "dds-2-01", "dds-4-01", "dds-5-01")
for name, row_id in VERSIONS.items():
    print(f"{name:20} {ROWS[row_id].median_us:5.1f} us   {row_id}")
print("the peer in the same runs:", ", ".join(f"{ROWS[row_id].median_us:.1f}" for row_id in PEERS))
ours, peer = calls["few rows, batch 1, 4k"], bars.faster_peer(NEWEST[SHOWN["few rows, batch 1, 4k"]])
print(
    f"newest, without the host and behind clean lines: {ours.median_us:.1f} us, {peer.who} {peer.median_us:.1f} ({ours.case})"
)
assert ours.timing == "graph" and ours.median_us < peer.median_us
assert all(ROWS[row_id].case == "decode-b1-sq1-hq16-sk4096-bf16" for row_id in (*VERSIONS.values(), *PEERS))
drawings.bars(
    {**{name: ROWS[row_id].median_us for name, row_id in VERSIONS.items()}, "peer (dds-5-01)": ROWS["dds-5-01"].median_us},
    unit="us: batch 1, 16 heads, 4096 tokens", salt="versions",
    caption="Small steps. The largest jump was the first version itself; of what is left, an empty launch takes 4.3 us.",
)  # fmt: skip

# %% [markdown]
# What did *not* work, from both logs: a prefetch before the plan is read (the address arithmetic cost more than the hit saved); tiles of 32 keys (twice the pieces); finer cuts; two accumulators in turn (the assembler serialises them); a
# cluster of four (not all are resident at once: half the speed). A log that holds only successes teaches nothing.
#
# ## How much is a number worth?
#
# The same kernel, the same case, twice: once with the L2 flushed by writing 256 MB, once flushed and then filled with clean lines.

# %%
dirty, clean = ROWS["dds-5-12"], ROWS["dds-5-16"]
print(f"batch 4, 32k: {dirty.median_us:.1f} us behind a write, {clean.median_us:.1f} behind a read (dds-5-12, -16)")
print(f"the peer:     {ROWS['dds-5-09'].median_us:.1f} and {ROWS['dds-5-13'].median_us:.1f} (dds-5-09, -13)")
assert dirty.median_us > 1.1 * clean.median_us

# %% [markdown]
# 50 MB that somebody else wrote must go back to memory while the kernel reads: it pays for its predecessor. Neither number is wrong; a number without its protocol is. [How we measure](../docs/concepts/measurement.md) has the rest: gate first,
# everybody in turn, median with spread, ceilings from the same process.
#
# ## On your machine
#
# ```
# openmla bench --suite smoke                      # seconds, on a laptop
# openmla roofline --suite smoke                   # your ceilings, and what bounds each case
# openmla roofline --target h100_sxm --h-q 16,128  # the same for a card that you do not have
# ```
#
# Predict before you run: bytes over bandwidth, FLOPs over rate, the larger of the two. The last cell does it for a call that no row has.
#
# Exercise: `openmla learn gather_once`.

# %%
asked = suite.sweep({"batch": [32], "s_k": [8192], "h_q": [16]}, ()).cases[0]
work = cost(workload.problem(asked), asked.draw_lengths())
print(
    f"{asked.name}: {work.bytes / 1e6:.0f} MB, {work.flops / 1e9:.0f} GFLOP; at best {work.bytes / reading / 1e3:.0f} us, bound by memory"
)
assert work.bytes / reading / 1e3 > work.flops / once / 1e6
assert shares["few rows, batch 128, 16k"] > 0.95 and shares["few rows, batch 1, 4k"] < 0.2
assert all(0.7 < shares[name] < 1.05 for name in SHOWN if "128 heads" in name or "batch 4" in name)
