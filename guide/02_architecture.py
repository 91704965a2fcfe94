# %% [markdown]
# # 2. Architecture: one call, step by step
#
# This chapter follows one call of `openmla.decode` through the code, stopping at every station. Have the repository open beside it: each section
# names the file it is about. The page [ARCHITECTURE](../ARCHITECTURE.md) is the map; this is the walk.
#
# The stations: tensors become a *problem*; a table of kernels is asked who may run it; the winner gets a *config*, is compiled once, and launched with a
# *plan*; what it returns is checked against an oracle that lives in the same package.

# %%
import inspect

import torch

import openmla
from drawings import bars, lanes
from openmla import backends
from openmla.core import faults
from openmla.core.errors import ProblemError, UnsupportedError
from openmla.core.problem import DecodeProblem
from openmla.core.target import Target
from openmla.mods import attach, score_mod
from openmla.ops import dispatch
from openmla.reference import attention, quant
from openmla.split.schedule import plan_decode
from openmla.testing import budget

torch.manual_seed(0)

# %% [markdown]
# ## Station 0: the tensors
#
# A server keeps the latents of all requests in one pool of *pages*, 64 tokens each. A request has a list of pages, its row of the *block table*, in any order. Pages
# are why memory does not fragment, and why two requests can share the beginning of a prompt. `openmla.PagedKVCache` (`src/openmla/kv/`) looks after pool and lists.

# %%
cache = openmla.PagedKVCache("bf16_576", num_pages=40, page_size=64)
prompt = list(range(150))  # token ids
cache.alloc("ann", prompt)
cache.append(0, "ann", torch.randn(150, 576).bfloat16())  # layer 0: latent and RoPE of each token
cache.fork("ann", "bob")  # shares all three pages with ann
cache.append(0, "bob", torch.randn(70, 576).bfloat16())  # writes: the half-filled third page is copied first
print(
    "block table\n",
    cache.block_table(["ann", "bob"]).tolist(),
    "\nlengths",
    cache.cache_seqlens(["ann", "bob"]).tolist(),
)
ann, bob = cache.block_table(["ann", "bob"]).tolist()
assert ann[:2] == bob[:2] and ann[2] != bob[2]  # two full pages shared, the third copied
assert cache.check_integrity() == ()

# %% [markdown]
# A decode call then is: queries of the new tokens, the pool, the lists, the lengths. Nothing is gathered into a rectangle.

# %%
h_q, scale = 16, 192**-0.5
q = torch.randn(2, 1, h_q, 576).bfloat16()  # [batch, s_q, h_q, d_qk]
table, lengths = cache.block_table(["ann", "bob"]), cache.cache_seqlens(["ann", "bob"])
out, lse = openmla.decode(q, cache.pages(0), table, lengths, softmax_scale=scale)
print("out", tuple(out.shape), out.dtype, " lse", tuple(lse.shape), lse.dtype)

# %% [markdown]
# ## Station 1: the Problem (`core/problem.py`)
#
# The first thing the library does is to forget the tensors. A `Problem` is what is asked, as a frozen value: shapes, dtypes, layout, options. It is the only
# validation there is, and it lists everything that is wrong at once.

# %%
problem = DecodeProblem.from_tensors(q, cache.pages(0), table, lengths)
print(problem)
try:
    DecodeProblem.from_tensors(q.float(), cache.pages(0), table.long(), lengths[:1])
except ProblemError as error:
    print("\n" + str(error))
    assert len(error.violations) == 3

# %% [markdown]
# Because it is a value without tensors, everything that follows can be answered anywhere: which kernel an H100 would take, what it costs, how it would be cut. No
# GPU, no compiler, no memory for a cache of 80 GB.
#
# ## Station 2: the table and the verdicts (`backends/__init__.py`)
#
# For each operation there is an ordered table of kernels. The first whose `supports(problem, target)` is true runs. A refusal is not `False` but a
# `Verdict` with every reason, and `explain` prints them. Here for an H100, first for this call, then for the same in fp32, for which Hopper's
# tensor cores have no instruction:

# %%
print(backends.explain(problem, target="h100_sxm"))
print()
in_fp32 = DecodeProblem.from_tensors(q.float(), cache.pages(0).float(), table, lengths)
refused = backends.explain(in_fp32, target="h100_sxm")
print(refused)
assert refused.chosen is not None and refused.chosen.backend != "cute"

# %% [markdown]
# On this machine the same question has another answer. A backend that is named never falls back: it runs, or it raises with the reasons.

# %%
here = Target.detect("cpu")
selection = backends.select(problem, here)
print(f"{selection.kernel.backend}/{selection.kernel.name} with {selection.config}")
try:
    openmla.decode(q, cache.pages(0), table, lengths, backend="cute")
except UnsupportedError as error:
    print(str(error).splitlines()[0])
assert backends.select(problem, Target("cpu", "cpu", 2)).kernel.backend == "torch"

# %% [markdown]
# ## Station 3: four verbs (`backends/base.py`)
#
# A kernel, whether CuTe DSL, Triton or PyTorch, is an object with four verbs. That is all a new one has to have; `backends.extend` puts it into the table.

# %%
for verb in ("supports", "configs", "compile", "launch"):
    method = getattr(selection.kernel, verb)
    print(f"{verb}{inspect.signature(method)}".replace("'", ""))
    assert callable(method)

# %% [markdown]
# `supports` and `configs` live in a file without any import of a compiler (`config.py` of a Hopper kernel), so "may I?" and "how?" never need the machine. `compile` may take
# seconds and happens once; a bundle made ahead of time by `openmla compile` spares even that. `launch` only passes pointers.
#
# ## Station 4: the hot path (`ops/dispatch.py`)
#
# Checking and choosing cost more than launching, so they happen once per *signature*: everything about the tensors that any rule looks at. The second
# call of the same shapes is one dictionary lookup and a launch.

# %%
before = len(dispatch._prepared)
openmla.decode(q.clone(), cache.pages(0), table, lengths, softmax_scale=scale)  # other values, same signature
same = len(dispatch._prepared) - before
openmla.decode(q[:1], cache.pages(0), table[:1], lengths[:1], softmax_scale=scale)  # another shape
other = len(dispatch._prepared) - before
print(f"remembered signatures: {same} more after the same shapes, {other} more after others")
assert (same, other) == (0, 1)

# %% [markdown]
# ## Station 5: the plan (`split/schedule.py`)
#
# Requests have different lengths, and a GPU has 132 SMs that should all end at the same time. The plan lays the KV blocks of all requests on one line and
# cuts it evenly. A request that is cut leaves pieces, which are merged (chapter 3). The plan depends on lengths only, so one plan serves all layers of a step.

# %%
plan = plan_decode([640, 64, 2048, 0, 320], num_parts=4, overhead_blocks=1)
rows: dict[str, list[tuple[float, float, str, int]]] = {}
for piece in plan.pieces():
    row = rows.setdefault(f"worker {piece.part}", [])
    begin = row[-1][1] if row else 0.0
    size = max(piece.end_block - piece.begin_block, 0.5)
    row.append((begin, begin + size, f"{piece.request}.{piece.split}", piece.request))
print("pieces per request:", [b - a for a, b in zip(plan.num_splits, plan.num_splits[1:], strict=False)])
lanes(
    rows, x="KV blocks of 64 tokens", salt="plan",
    caption="Five requests on four workers. 2.1 is the second piece of request 2. Request 3 is empty; somebody still owns it, to write its zeros.",
)  # fmt: skip

# %% [markdown]
# A worker's share may also be a *list of ranges*: requests dealt out like cards, the longest first, from left to right and back again, so that none has to be cut. That is
# what the kernel for many rows does where there are about as many requests as workers, because a piece of 128 query rows costs 262 KB of partial results. Chapter 3 has
# the numbers.

# %% [markdown]
# ## Station 6: the kernel
#
# On this CPU it is `backends/torch/`: tiles of 512 to 2048 keys through twelve PyTorch operators on threads of its own
# ([how](../docs/kernels/decode_tiled.md)). On an H100 it is one of the CuTe kernels ([few rows](../docs/kernels/decode_dense_small.md),
# [many rows](../docs/kernels/decode_dense.md)); on other GPUs, [Triton](../docs/kernels/triton.md). All of them compute what these few lines say, written once, for
# people, in `reference/attention.py`:

# %%
source = inspect.getsource(attention._softmax_attention)
print(source[source.index("    logits") :])

# %% [markdown]
# ## Station 7: what values inside tensors can do
#
# Shapes are checked before the launch; values cannot be, because reading them would mean waiting for the GPU. A wrong page id must neither crash the
# process nor touch another request. Kernels mask it and set a bit, which `check_errors` reads when somebody asks; the first time it is found, a line goes to the log, too.

# %%
wild = table.clone()
wild[1, 0] = 1_000_000
damaged, _ = openmla.decode(q, cache.pages(0), wild, lengths, softmax_scale=scale)
found = openmla.check_errors()
print([f"{fault.name}: {faults.MEANING[fault]}" for fault in found])
assert [fault.name for fault in found] == ["PAGE_OUT_OF_RANGE"]
assert torch.equal(damaged[0], out[0])  # ann's bits are untouched
assert openmla.check_errors() == ()

# %% [markdown]
# ## Station 8: is it right? (`reference/`, `testing/budget.py`)
#
# The oracle computes the same call in fp64. How far a kernel may be from it is not a tolerance somebody chose but a bound that follows from rounding: the output
# once, each weight once, and the error of a logit. One function decides for every kernel, dtype and layout.

# %%
golden = attention.decode(
    q, cache.pages(0), table, lengths, softmax_scale=scale, d_v=512, precision="fp64", with_bounds=True
)
report = budget.check(out, lse, golden, dtype=torch.bfloat16)
print(report)
report.require()
bars(
    {rule: report.ratio(rule) for rule in ("HARD", "RMS", "LSE")}, unit="error / limit; above 1 the call is wrong", salt="budget",
    caption="How much of each limit this call used. HARD: the worst element. RMS: the error of a row as a whole. LSE: the log of the sum.",
)  # fmt: skip

# %% [markdown]
# A limit is good when it catches what is wrong. Forget one key in a hundred and the rule says so:

# %%
fewer, lse_fewer = openmla.decode(q, cache.pages(0), table, lengths - 2, softmax_scale=scale)
verdict = budget.check(fewer, lse_fewer, golden, dtype=torch.bfloat16)
print("broken rules:", verdict.broken)
assert not verdict.passed

# %% [markdown]
# ## Byte layouts (`core/layout.py`, `reference/quant.py`)
#
# A cache may store a token in fewer bytes. A layout is one entry in a table (name, columns, format, scales); packing and unpacking follow from the entry,
# bit for bit as other libraries do it. The kernels read the bytes directly; nothing else in the path changes.

# %%
rows_bf16 = torch.randn(64, 576).bfloat16()
packed = openmla.kv_layout("fp8_656").empty_cache(1, 64)
quant.write_rows(packed, "fp8_656", torch.arange(64), rows_bf16)
page, one = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([64], dtype=torch.int32)
exact, _ = openmla.decode(q[:1], rows_bf16[None, :, None], page, one, softmax_scale=scale)
small, _ = openmla.decode(q[:1], packed, page, one, softmax_scale=scale, kv_layout="fp8_656")
difference = (exact.float() - small.float()).norm() / exact.float().norm()
print(f"bytes per token: {packed.shape[-1]} instead of {2 * 576}; the result moves by {difference:.1%}")
assert 0.001 < difference < 0.05

# %% [markdown]
# ## Changing the mathematics: mods (`mods/`)
#
# A *mod* is a Python function of a few lines that every backend inlines: the PyTorch kernel calls it, Triton translates its source, and the Hopper kernel for many rows calls it while it is compiled, so
# it costs instructions per score and no launch: nothing for a sliding window, 12 to 23 % of the time for a function of each score where the tensor cores decide, a few percent for a soft cap, which has a form of its own ([measured](../docs/mods.md)). It is its own oracle. This one lets keys fade with their age:

# %%


@score_mod
def fading(score, b, h, q_idx, kv_idx):
    """A key loses a hundredth of a unit of score per token of age."""
    return score - 0.01 * (q_idx - kv_idx)


faded, _ = openmla.decode(q, cache.pages(0), table, lengths, softmax_scale=scale, mods=fading)
fading_problem = DecodeProblem.from_tensors(q, cache.pages(0), table, lengths, mods=attach(fading))
print(backends.explain(fading_problem, target="h100_sxm"))
want = attention.decode(q, cache.pages(0), table, lengths, softmax_scale=scale, d_v=512, precision="fp64", mods=fading)
print(
    f"error against the oracle {(faded - want.out).abs().max():.1e}; without the mod {(out - want.out).abs().max():.1e}"
)
assert (faded - want.out).abs().max() < 0.1 * (out - want.out).abs().max()

# %% [markdown]
# What a mod may contain, and which kernel takes which, is on [its page](../docs/mods.md).
#
# ## Where a new thing goes
#
# | a new ... | goes to |
# | --- | --- |
# | option of an operation | a field of its Problem, then the oracle, then each kernel's `supports` |
# | KV layout | one entry in `core/layout.py` |
# | kernel | a class with the four verbs, one row in the table |
# | name that another library uses | `ops/flash_mla.py` or `integrations/`, and nowhere else |
#
# Imports go downwards only (`core`, `reference` and `split`, `backends`, `ops`, `kv`, then `nn`, `integrations`, `lab`), and a linter holds that. If you have a GPU, the last cell
# runs the same call there and judges it by the same rule.
#
# Exercises: `openmla learn which_kernel`; later `openmla learn write_a_mod`, `openmla learn your_layout` and `openmla learn your_kernel`.

# %%
if torch.cuda.is_available():
    on_gpu = [each.cuda() for each in (q, cache.pages(0), table, lengths)]
    out_gpu, lse_gpu = openmla.decode(*on_gpu, softmax_scale=scale)
    budget.check(out_gpu.cpu(), lse_gpu.cpu(), golden, dtype=torch.bfloat16).require()
assert report.passed and out.shape == (2, 1, h_q, 512)
