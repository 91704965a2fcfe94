# %% [markdown]
# # 5. Practice: running it, watching it, and what happens when something is wrong
#
# The last chapter is for whoever gets called at night. It installs nothing and needs no GPU: each section shows the call that answers a question, and what the answer looks like.

# %%
import dataclasses
import logging

import torch

import openmla
from drawings import bars
from openmla import backends, flash_mla
from openmla.core.cost import cost
from openmla.core.errors import OpenMLAError, OutOfPagesError, PlanMismatchError, UnsupportedError
from openmla.core.layout import kv_layout
from openmla.core.target import PRESET_NAMES, Target
from openmla.observe import doctor
from openmla.reference import attention
from openmla.testing import budget

torch.manual_seed(0)
q = torch.randn(3, 1, 16, 576).bfloat16()
pool = torch.randn(40, 64, 1, 576).bfloat16()
table = torch.randperm(40)[:36].int().view(3, 12)
lengths = torch.tensor([700, 5, 300], dtype=torch.int32)
scale = 192**-0.5

# %% [markdown]
# ## Before the first request: doctor
#
# `openmla doctor` says what this machine can run, what it cannot, why, and the fix. It has no side effects, needs no network, and its exit code is 1 if something is wrong: a good readiness probe.

# %%
diagnosis = doctor.examine()
for check in diagnosis.checks:
    if check.section.lower() in ("backends", "trial") or check.state == "problem":
        print(f"{check.state:8} {check.name}: {check.found[:110]}")
assert {check.state for check in diagnosis.checks} <= {"ok", "absent", "note", "problem"}

# %% [markdown]
# ## Deploying
#
# Four ways in, from the least change to the most control:
#
# - **Change one import.** `from openmla import flash_mla` has FlashMLA's functions, arguments and conventions. `flash_mla.install()` puts it in the place of the module `flash_mla` for code that you do not own.
# - **transformers**: [attach](../docs/transformers.md) it to a loaded model.
# - **vLLM**: [a backend](../docs/vllm.md), chosen by a flag. **SGLang**: [a plugin](../docs/sglang.md), experimental. Each page says what ran and what did not.
# - **Your own server**: `openmla.PagedKVCache`, `openmla.plan` once per step, `openmla.decode(plan=...)` per layer.
#
# The Hopper kernels compile on first use, which takes seconds. In an image, do it beforehand, on a machine without a GPU: `openmla compile --out DIR`, and set `OPENMLA_AOT_DIR=DIR`. A bundle
# made from other sources than the installed ones is refused, not used.

# %%
metadata, _ = flash_mla.get_mla_metadata()
theirs, _ = flash_mla.flash_mla_with_kvcache(q, pool, table, lengths, 512, metadata, softmax_scale=scale, causal=True)
plan = openmla.plan(q, pool, table, lengths)  # once per step ...
layers = [
    openmla.decode(q, pool, table, lengths, softmax_scale=scale, plan=plan)[0] for _ in range(3)
]  # ... for all layers
assert torch.equal(theirs, layers[0]) and torch.equal(layers[0], layers[2])
print("the compatible border and the native call give the same bits; one plan served three layers")

# %% [markdown]
# ## Watching
#
# Three things are worth a gauge. *Fallbacks*: on a GPU, whenever `auto` passes over a kernel for one of another backend, it logs one line and counts. *Faults*: bad values in tensors, read by
# `check_errors` (which waits for the GPU: once per step at most, or on a timer). *Pages*: how full the cache is.

# %%
logging.getLogger("openmla").setLevel(logging.ERROR)  # the line itself; here we only want the counter
problem = dataclasses.replace(backends.typical_problem("decode"), layout=kv_layout("fp8_656"))
backends.select(problem, Target.preset("h100_sxm"))
for (op, passed, chosen, reason), count in backends.fallbacks.items():
    print(f"openmla_fallbacks{{op={op!r}, passed_over={passed!r}, chosen={chosen!r}}} {count}   # {reason}")

cache = openmla.PagedKVCache("bf16_576", num_pages=8, page_size=64)
cache.alloc("a")
cache.append(0, "a", torch.randn(200, 576).bfloat16())
free, held = cache.allocator.num_free, cache.allocator.num_held
print(f"openmla_pages{{state='free'}} {free}\nopenmla_pages{{state='held'}} {held}")
assert (free, held) == (4, 4)
assert any(op == "decode" for op, *_ in backends.fallbacks)

# %% [markdown]
# ## When something is wrong
#
# The rule: what the caller can fix is an exception before the launch, with the value and the fix. What only the GPU can see is masked and reported, and never reaches another request. Nothing is silently slow.

# %%


def said(call: object, *arguments: object, **options: object) -> str:
    """The error of a call, on one line."""
    try:
        call(*arguments, **options)  # type: ignore[operator]
    except OpenMLAError as error:
        lines = [line.strip(" -") for line in str(error).splitlines()]
        return f"{type(error).__name__}: {' | '.join(lines)[:230]}"
    raise AssertionError("no error")


print(said(openmla.decode, q, pool.half(), table, lengths))
print(said(openmla.decode, q, pool, table, lengths, backend="cute"))
print(said(openmla.decode, q[:2], pool, table[:2], lengths[:2], plan=plan))
cache.alloc("b")
print(said(cache.append, 0, "b", torch.randn(64 * 9, 576).bfloat16()))
assert cache.check_integrity() == ()  # a failed append changed nothing
assert issubclass(OutOfPagesError, OpenMLAError) and issubclass(UnsupportedError, NotImplementedError)
assert "PlanMismatchError" in said(openmla.decode, q[:2], pool, table[:2], lengths[:2], plan=plan)
assert PlanMismatchError.__mro__[1].__name__ == "ProblemError"

# %% [markdown]
# Out of pages is the one that a server meets every day. The order of remedies: `cache.evict()` drops pages that only the prefix cache still holds; then preempt a request (`free` it and compute it again later); then refuse new ones.
#
# Bad values, as a client with an off-by-one would produce them. The damage stays where it is:

# %%
good, _ = openmla.decode(q, pool, table, lengths, softmax_scale=scale)
wild_table, wild_lengths = table.clone(), lengths.clone()
wild_table[1, 0], wild_lengths[2] = -7, 100_000
out, _ = openmla.decode(q, pool, wild_table, wild_lengths, softmax_scale=scale)
print([fault.name for fault in openmla.check_errors()])
assert torch.equal(out[0], good[0]) and out.isfinite().all()
assert torch.equal(out[1], torch.zeros_like(out[1]))  # its only page was bad: it sees no key

# %% [markdown]
# While hunting such a bug, set `OPENMLA_CHECKS=strict`: each call then waits and raises. In production leave it at `fast`.
#
# ## The same bits
#
# The same call gives the same bits, run after run: sums have a fixed order, and there are no float atomics. On a GPU, how a request is cut depends on its batch mates, so its last bit may too. `policy="batch_invariant"` cuts at
# multiples of one length and nowhere else: a row then depends on itself alone, for a price (its [rows](../docs/kernels/decode_dense.md#results) say which). On a CPU both are the same.

# %%
alone, _ = openmla.decode(q[:1], pool, table[:1], lengths[:1], softmax_scale=scale, policy="batch_invariant")
together, _ = openmla.decode(q, pool, table, lengths, softmax_scale=scale, policy="batch_invariant")
assert torch.equal(alone[0], together[0])
print("request 0 alone and among others: the same bits")

# %% [markdown]
# ## Tuning
#
# In this order, because the first ones are free:
#
# 1. `openmla explain` for *your* shapes: is the kernel that you expect the one that runs? A reason is worth more than a benchmark.
# 2. One plan per step, not per layer. One `out=` and one `workspace=` per layer if you capture CUDA graphs.
# 3. The KV layout: `fp8_656` takes 57 % of the bytes, and moves results (chapter 2 shows by how much). Measure your model's answers, not only its speed.
# 4. Heads per GPU: with tensor parallelism 8 each GPU has 16 of 128 heads and reads the *whole* cache, since there is one KV head. Attention with data parallelism keeps 128 heads together and reads each cache once:

# %%
shapes = {}
for name, h_q, share in (("128 heads on one GPU", 128, 1), ("16 heads on each of 8", 16, 8)):
    asked = dataclasses.replace(backends.typical_problem("decode"), h_q=h_q, batch=64, total_q=64)
    shapes[name] = share * cost(asked, [8192] * 64).bytes / 1e9
    print(f"{name:22} {shapes[name]:5.2f} GB read for 64 requests of 8192 tokens, all GPUs together")
bars(
    shapes,
    unit="GB read per layer and step",
    salt="tp",
    caption="MLA has one KV head, so tensor parallelism over heads reads the cache once per GPU.",
)

# %% [markdown]
# 5. `openmla tune` searches the settings of a kernel on your machine, with the same gate as everything else, and writes a table with its provenance.
#
# ## Other hardware
#
# The table below is computed by this version, now: which kernel each machine would take for the decode of 16 and of 128 heads, and the ridge of its data sheet.

# %%
print(f"{'machine':10} {'16 heads':28} {'128 heads':28} FLOP per byte")
for name in PRESET_NAMES:
    target = Target.preset(name)
    taken = []
    for h_q in (16, 128):
        chosen = backends.explain(
            dataclasses.replace(backends.typical_problem("decode"), h_q=h_q), target=target
        ).chosen
        assert chosen is not None  # every machine runs something: PyTorch is the path of last resort
        taken.append(f"{chosen.backend}/{chosen.kernel}")
    ridge = f"{1e3 * target.bf16_tflops / target.hbm_gbps:.0f}" if target.hbm_gbps else "measure it: openmla roofline"
    print(f"{name:10} {taken[0]:28} {taken[1]:28} {ridge}")

# %% [markdown]
# What stands here is what the table of kernels allows. What has been *run*, and where, is on the kernels' pages: the CuTe kernels on an H100 and an H200, everything on CPUs, the Triton kernels in the interpreter and on the GPUs that
# [their page](../docs/kernels/triton.md) names. On hardware of your own, `openmla verify` runs the hostile cases of the test suite for a minute and prints the command that repeats a failure.
#
# ## A checklist
#
# | before | while running | when it burns |
# | --- | --- | --- |
# | `openmla doctor`, exit code 0 | fallbacks to another backend: alarm above 0 | `openmla doctor --json` into the ticket |
# | `openmla verify` on the hardware | faults: alarm above 0 | `OPENMLA_CHECKS=strict` on one replica |
# | `openmla explain` for your shapes | pages: alarm below 5 % free | `OPENMLA_BACKEND=torch` to tell kernel from server |
# | bundle in the image, `OPENMLA_AOT_DIR` | `openmla bench` after driver changes | the `REPRO` line of `verify` |

# %%
golden = attention.decode(q, pool, table, lengths, softmax_scale=scale, d_v=512, precision="fp64", with_bounds=True)
final, final_lse = openmla.decode(q, pool, table, lengths, softmax_scale=scale)
budget.check(final, final_lse, golden, dtype=torch.bfloat16).require()
assert shapes["16 heads on each of 8"] > 5 * shapes["128 heads on one GPU"]
