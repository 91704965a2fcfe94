"""Device code: the online softmax over tiles of keys, in base 2, shared by every attention kernel.

State of a tile of BLOCK_M query rows, fp32:

    peak [BLOCK_M]              largest score so far, unscaled, or one that it exceeds by little: see `weigh_lazily`
    mass [BLOCK_M]              sum of 2^((score - peak) * scale2), or its parts: see `add_mass`
    acc [BLOCK_M, D_LATENT]     sum of 2^((score - peak) * scale2) * v

with scale2 = |softmax_scale| * log2(e) and scores multiplied by the sign of softmax_scale, so that the largest score
has the largest weight. The peak is subtracted before scaling: the largest weight is then exactly 1, also for scores of
1e12, where a fused multiply-add of score and scaled peak would be off by whole powers of two.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from openmla.backends.triton.inline import activate, change
from openmla.backends.triton.rows import load_plain

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # where a lazy peak begins: no difference is then -inf - -inf
MOST = tl.constexpr(256.0)  # of what a thread adds to a row before the peak moves; weights stay exact enough in fp16


@triton.jit
def load_queries(row, valid, DIMS: tl.constexpr):
    """(q_latent [BLOCK_M, D_LATENT], q_rope [BLOCK_M, D_ROPE]) at those row pointers; zeros where not valid.

    Without RoPE columns q_rope is q_latent, and never used.
    """
    q_latent = load_plain(row, valid, 0, DIMS[1], DIMS[2])
    q_rope = q_latent
    if DIMS[3] > 0:
        q_rope = load_plain(row, valid, DIMS[1], DIMS[0] - DIMS[1], DIMS[3])
    return q_latent, q_rope


@triton.jit
def no_mass(BLOCK_M: tl.constexpr, APART: tl.constexpr):
    """The sum of no weights: [BLOCK_M], or with all APART [BLOCK_M, 2, 4], a share of each row per thread of its tile."""
    SHAPE: tl.constexpr = (BLOCK_M, 2, 4) if APART == "all" else (BLOCK_M,)
    return tl.zeros(SHAPE, tl.float32)


@triton.jit
def share(weights, APART: tl.constexpr):
    """Weights summed over columns: [BLOCK_M].

    With all APART over those alone that a thread of wgmma's result holds: columns 8 i + 2 lane and the one behind, in
    one of two halves, [BLOCK_M, 2, 4]. Threads and warpgroups need not meet for that, as they must for a sum per row.
    """
    if APART == "all":
        BLOCK_M: tl.constexpr = weights.shape[0]
        parts = tl.reshape(weights, (BLOCK_M, 2, weights.shape[1] // 16, 4, 2))
        found = tl.sum(tl.sum(parts, 4), 2)
    else:
        found = tl.sum(weights, 1)
    return found


@triton.jit
def largest_of(tops, scores, seen, sign, APART: tl.constexpr):
    """The largest scores so far: () where nobody asks, else (maxima,) per row or, with all APART, as `share` has sums."""
    if len(tops) > 0:
        scores = tl.where(seen, scores * sign, float("-inf"))
        if APART == "all":
            BLOCK_M: tl.constexpr = scores.shape[0]
            parts = tl.reshape(scores, (BLOCK_M, 2, scores.shape[1] // 16, 4, 2))
            tops = (tl.maximum(tops[0], tl.max(tl.max(parts, 4), 2)),)
        else:
            tops = (tl.maximum(tops[0], tl.max(scores, 1)),)
    return tops


@triton.jit
def whole_top(tops):
    """[BLOCK_M] of either form of `largest_of`."""
    top = tops[0]
    if len(top.shape) == 3:
        top = tl.max(tl.max(top, 2), 1)
    return top


@triton.jit
def add_mass(mass, rescale, weights, APART: tl.constexpr):
    """The sum after a tile: mass * rescale + `share` of its weights."""
    if APART == "all":
        mass = mass * rescale[:, None, None] + share(weights, APART)
    else:
        mass = mass * rescale + share(weights, APART)
    return mass


@triton.jit
def whole_mass(mass):
    """[BLOCK_M] of either form."""
    if len(mass.shape) == 3:
        mass = tl.sum(tl.sum(mass, 2), 1)
    return mass


@triton.jit
def weigh(
    scores, seen, sign, scale2, peak, mass, site, place, APART: tl.constexpr, MODS: tl.constexpr, dtype: tl.constexpr
):
    """(new peak, new mass, factor of what was summed so far, weights [BLOCK_M, BLOCK_N] in `dtype`) of a tile.

    With MODS, scores are in natural units behind `change`, scale2 is log2(e) and sign 1; an activation leaves the peak
    alone, and nothing that was summed is scaled.
    """
    if MODS is not None:
        scores, seen = change(scores, seen, site, place, MODS)
    scores = tl.where(seen, scores * sign, float("-inf"))
    HAS_ACTIVATION: tl.constexpr = MODS is not None and len(MODS[2]) > 0
    if HAS_ACTIVATION:
        higher = peak
        rescale = tl.zeros_like(peak) + 1.0
        weights = activate(scores, site, place, MODS)
    else:
        higher = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2((scores - shift[:, None]) * scale2)
        rescale = tl.exp2((peak - shift) * scale2)
    return higher, add_mass(mass, rescale, weights, APART), rescale, weights.to(dtype)


@triton.jit
def weigh_lazily(scores, seen, sign, scale2, peak, mass, acc, site, place, MODS: tl.constexpr, dtype: tl.constexpr):
    """(peak, mass, acc times its factor, weights) as of `weigh` with all APART; the peak moves only when it must.

    It stays while a thread's weights of a row add up to MOST at most: no maximum, which would cross both warpgroups, and
    no 128 multiplications of acc per thread. The first tile moves it, and so does a NaN.
    """
    if MODS is not None:
        scores, seen = change(scores, seen, site, place, MODS)
    scores = tl.where(seen, scores * sign, float("-inf"))
    exact = tl.exp2((scores - peak[:, None]) * scale2)
    weights = exact.to(dtype)  # in both branches: the compiler would pass fp32 through shared memory
    added = share(exact, "all")
    if tl.max(tl.where(added <= MOST, 0, 1), axis=None) != 0:
        higher = tl.maximum(peak, tl.max(scores, 1))
        rescale = tl.exp2((peak - higher) * scale2)
        exact = tl.exp2((scores - higher[:, None]) * scale2)
        weights = exact.to(dtype)
        added = share(exact, "all")
        mass *= rescale[:, None, None]
        acc *= rescale[:, None]
        peak = higher
    return peak, mass + added, acc, weights


@triton.jit
def unused_tile(peak, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] fp32 of no meaning. Not a constant, which the compiler would keep in shared memory."""
    return peak[:, None] + tl.zeros((1, BLOCK_N), tl.float32)


@triton.jit
def fold_tile(
    q_latent, q_rope, latent, rope, seen, sign, scale2, peak, mass, acc, tops, site, place, MIXED: tl.constexpr,
    APART: tl.constexpr, MODS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """One tile of keys: latent [BLOCK_N, D_LATENT] is read once and used as k and as v. Returns the new state.

    seen: [BLOCK_M, BLOCK_N], or [1, BLOCK_N] where all rows see the same keys. MIXED: rows differ in what they see, so
    a key may be NaN for one row's sake only; its v must not reach the others as 0 * NaN. Who sees it has a NaN weight.
    tops: see `largest_of`; without mods only. site, place, MODS: see `openmla.backends.triton.inline`; place [BLOCK_N] is the position of each key.

    APART hides products from the compiler in conditions that always hold: "", "scores" or "all" of them. Seeing that the
    product with v needs the scores, it gives both of Hopper's warpgroups the same rows, and each of them computes all
    scores. And seeing products that wgmma reads from shared memory, it keeps a tile more for each stage and asks for
    the next tile behind them: with room for two tiles nothing would then be on its way while a tile is multiplied.
    Inside conditions, and with two uses of each operand, loads come first and two buffers do. Never so where a tile also
    goes through registers, as values of a MIXED one do: Triton 3.6 then keeps one buffer, and the next tile arrives in it
    while the scores read this one. With all APART the peak may stay where it is (`weigh_lazily`).
    """
    # "ieee" matters for fp32 alone, which would otherwise be rounded to tf32.
    BLOCK_N: tl.constexpr = latent.shape[0]
    HAS_ACTIVATION: tl.constexpr = MODS is not None and len(MODS[2]) > 0
    IS_LAZY: tl.constexpr = APART == "all" and not MIXED and not HAS_ACTIVATION
    if APART != "":
        higher, rescale = peak, peak
        if scale2 > 0:
            scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        else:
            scores = unused_tile(peak, BLOCK_N)
        if sign < 2.0:  # another condition, or both blocks become one
            if DIMS[3] > 0:
                scores = tl.dot(q_rope, tl.trans(rope), acc=scores, input_precision="ieee")
            if IS_LAZY:
                higher, mass, acc, weights = weigh_lazily(
                    scores, seen, sign, scale2, peak, mass, acc, site, place, MODS, latent.dtype
                )  # fmt: skip
            else:
                higher, mass, rescale, weights = weigh(
                    scores, seen, sign, scale2, peak, mass, site, place, APART, MODS, latent.dtype
                )  # fmt: skip
            tops = largest_of(tops, scores, seen, sign, APART)
        elif APART == "all" and not MIXED and DIMS[3] > 0:  # the second use of rope
            weights = tl.dot(q_rope, tl.trans(rope), acc=scores, input_precision="ieee").to(latent.dtype)
        else:
            weights = unused_tile(peak, BLOCK_N).to(latent.dtype)
    else:
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        if DIMS[3] > 0:
            scores = tl.dot(q_rope, tl.trans(rope), acc=scores, input_precision="ieee")
        higher, mass, rescale, weights = weigh(
            scores, seen, sign, scale2, peak, mass, site, place, APART, MODS, latent.dtype
        )  # fmt: skip
        tops = largest_of(tops, scores, seen, sign, APART)
    values = latent
    if MIXED:
        values = tl.where(tl.abs(latent) < float("inf"), latent, 0.0)
    if not IS_LAZY:
        acc = acc * rescale[:, None]
    if APART == "all" and not MIXED:
        if scale2 > -1.0:
            acc = tl.dot(weights, values, acc=acc, input_precision="ieee")
    else:
        acc = tl.dot(weights, values, acc=acc, input_precision="ieee")
    return higher, mass, acc, tops


@triton.jit
def finish(peak, mass, acc, scale2):
    """(out fp32 [BLOCK_M, D_LATENT], lse2 [BLOCK_M]) of a state; 0 and -inf where no key was seen."""
    mass = whole_mass(mass)
    is_empty = mass == 0.0
    divisor = tl.where(is_empty, 1.0, mass)
    lse2 = tl.where(is_empty, float("-inf"), peak * scale2 + tl.log2(divisor))
    # One division per row: 128 per thread would hold the special function units for 2,000 cycles of a program.
    return acc * (1.0 / divisor)[:, None], lse2


@triton.jit
def sink_share(lse2, sink):
    """1 / (1 + exp(sink - lse)): what is left for the keys beside a logit `sink` (natural units) without a value."""
    share = 1.0 / (1.0 + tl.exp2(sink * LOG2_E - lse2))
    return tl.where(lse2 == float("-inf"), 1.0, share)
