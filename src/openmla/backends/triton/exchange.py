"""Shares of attention, exchanged and merged by one launch per rank: each writes into the memory of the others.

Every rank has a mailbox that the others have mapped: for each of two turns and each source a row of 32-bit words and a
word of lse per row of attention, all UNWRITTEN at first. For each of its rows a program

    1. writes words and lse of its own share into the mailbox of every other rank,
    2. waits until no word of theirs is UNWRITTEN, merges in the order of ranks, and makes their words UNWRITTEN again.

Data is its own flag, so there is no fence and no second message: one way over NVLink. UNWRITTEN is a NaN whose bits no
arithmetic gives (all ones); a word of a share that has them all the same travels as another NaN.

Two turns are enough. A rank writes turn n + 2 of a row once it has merged turn n + 1, for which it needed the reader's
share, which the reader sent in a kernel behind the one that read turn n. The turns of a row are counted on the device,
so a CUDA graph may hold any number of them.

A rank that does not write ends the wait at the limit: the row is NaN, and the flag `lost` is set for the host to read.

The technique is that of Lamport-style all-reduces (TensorRT-LLM's one-shot, NCCL's LL protocol).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from openmla.backends.triton.launch import ELEMENT, on_device

UNWRITTEN = tl.constexpr(-1)
OTHER_NAN = tl.constexpr(0x7FFFFFFF)
POLLS = tl.constexpr(2048)  # between two looks at the clock, which takes longer than a poll
NUM_WARPS = 1
PROGRAMS_PER_SM = 16 // NUM_WARPS  # all are resident, so none waits for one that has not begun


@triton.jit
def _is_over(polls, begin_ns, limit_ns, lost_ptr, HAS_CLOCK: tl.constexpr):
    """Whether to wait no longer, asked at every poll; tells the host."""
    is_over = False
    if HAS_CLOCK:  # noqa: SIM102, a constant and a value on the device
        if polls % POLLS == 0:
            is_over = (tl.extra.cuda.globaltimer() - begin_ns > limit_ns) | (tl.load(lost_ptr, volatile=True) != 0)
            if is_over:
                tl.store(lost_ptr, 1)
    return is_over


@triton.jit
def _await_lse(ptr, begin_ns, limit_ns, lost_ptr, HAS_CLOCK: tl.constexpr):
    """The word there, once it is written, as fp32."""
    found = tl.load(ptr, volatile=True)
    polls, is_over = 1, False
    while (found == UNWRITTEN) & (not is_over):
        found = tl.load(ptr, volatile=True)
        polls += 1
        is_over = _is_over(polls, begin_ns, limit_ns, lost_ptr, HAS_CLOCK)
    return found.to(tl.float32, bitcast=True)


@triton.jit
def _await_row(ptr, word, held, begin_ns, limit_ns, lost_ptr, HAS_CLOCK: tl.constexpr):
    """The words there, once all of them are written."""
    found = tl.load(ptr + word, mask=held, other=0, volatile=True)
    missing = tl.sum((found == UNWRITTEN).to(tl.int32), 0)
    polls, is_over = 1, False
    while (missing > 0) & (not is_over):
        found = tl.load(ptr + word, mask=held, other=0, volatile=True)
        missing = tl.sum((found == UNWRITTEN).to(tl.int32), 0)
        polls += 1
        is_over = _is_over(polls, begin_ns, limit_ns, lost_ptr, HAS_CLOCK)
    return found


@triton.jit
def _low(words, ELEMENT: tl.constexpr):
    """The first number of each word, fp32."""
    if ELEMENT.primitive_bitwidth == 32:
        return words.to(ELEMENT, bitcast=True)
    return (words & 0xFFFF).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)


@triton.jit
def _high(words, ELEMENT: tl.constexpr):
    """The second number of each word, fp32; nothing where a word is one number."""
    if ELEMENT.primitive_bitwidth == 32:
        return tl.zeros_like(words).to(tl.float32)
    return (words >> 16).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)


@triton.jit
def _words(low, high, ELEMENT: tl.constexpr):
    """Numbers, rounded to ELEMENT, as words."""
    if ELEMENT.primitive_bitwidth == 32:
        return low.to(tl.int32, bitcast=True)
    first = low.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return first | (high.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit(do_not_specialize=["num_rows", "s_q", "h_q", "capacity", "limit_ns", "lse_batch", "lse_token", "lse_head"])
def exchange_kernel(
    words_ptr,  # int32 [rows, WORDS]: out, as words
    lse_ptr,  # fp32 at (request, token, head), natural
    sink_ptr,  # [h_q] fp32 with HAS_SINK
    boxes_ptr,  # int64 [WORLD]: addresses of the mailboxes
    turns_ptr,  # int32 [capacity]
    lost_ptr,  # int32 [1]
    merged_ptr,  # int32 [rows, WORDS]
    merged_lse_ptr,  # fp32 [batch, h_q, s_q] contiguous
    num_rows, s_q, h_q, capacity, limit_ns, lse_batch, lse_token, lse_head,
    ELEMENT: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_CLOCK: tl.constexpr,
):  # fmt: skip
    """See the module. A mailbox is [2 turns, WORLD, capacity, WORDS] words of out, then [2, WORLD, capacity] of lse."""
    begin_ns = limit_ns
    if HAS_CLOCK:
        begin_ns = tl.extra.cuda.globaltimer()
    word = tl.arange(0, PADDED)
    held = word < WORDS
    source_slots = tl.cast(capacity, tl.int64)
    turn_slots = source_slots * WORLD
    lses = 2 * turn_slots * WORDS
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        slot = (tl.load(turns_ptr + row) & 1) * turn_slots + RANK * source_slots + row
        request, token, head = row // h_q // s_q, row // h_q % s_q, row % h_q
        lse = tl.load(lse_ptr + request * lse_batch + token * lse_token + head * lse_head).to(tl.int32, bitcast=True)
        lse = tl.where(lse == UNWRITTEN, OTHER_NAN, lse)
        words = tl.load(words_ptr + row * WORDS + word, mask=held, other=0)
        words = tl.where(words == UNWRITTEN, OTHER_NAN, words)
        for peer in tl.static_range(WORLD):
            if peer != RANK:
                box = tl.load(boxes_ptr + peer).to(tl.pointer_type(tl.int32))
                tl.store(box + lses + slot, lse)
                tl.store(box + slot * WORDS + word, words, mask=held)
    mine = tl.load(boxes_ptr + RANK).to(tl.pointer_type(tl.int32))
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        turn = tl.load(turns_ptr + row)
        place = (turn & 1) * turn_slots + row  # of source 0
        request, token, head = row // h_q // s_q, row // h_q % s_q, row % h_q
        own_lse = tl.load(lse_ptr + request * lse_batch + token * lse_token + head * lse_head)
        own = tl.load(words_ptr + row * WORDS + word, mask=held, other=0)
        top = own_lse
        for peer in tl.static_range(WORLD):
            if peer != RANK:
                at = mine + lses + place + peer * source_slots
                top = tl.maximum(top, _await_lse(at, begin_ns, limit_ns, lost_ptr, HAS_CLOCK))
        shift = tl.where(top == float("-inf"), 0.0, top)
        mass = 0.0
        low, high = tl.zeros([PADDED], tl.float32), tl.zeros([PADDED], tl.float32)
        for source in tl.static_range(WORLD):
            slot = place + source * source_slots
            if source == RANK:
                lse, words = own_lse, own
            else:
                lse = tl.load(mine + lses + slot, volatile=True).to(tl.float32, bitcast=True)
                words = _await_row(mine + slot * WORDS, word, held, begin_ns, limit_ns, lost_ptr, HAS_CLOCK)
            weight = tl.exp(lse - shift)
            mass += weight
            words = tl.where(lse == float("-inf"), 0, words)  # what a share without keys holds, counts for nothing
            low += weight * _low(words, ELEMENT)
            high += weight * _high(words, ELEMENT)
        is_empty = mass == 0.0
        total = tl.where(is_empty, 1.0, mass)
        merged_lse = tl.where(is_empty, float("-inf"), shift + tl.log(total))
        low, high = low / total, high / total
        if HAS_SINK:
            divisor = 1.0 + tl.exp(tl.load(sink_ptr + head) - tl.where(is_empty, 0.0, merged_lse))
            low, high = low / divisor, high / divisor
        tl.store(merged_ptr + row * WORDS + word, _words(low, high, ELEMENT), mask=held)
        tl.store(merged_lse_ptr + (request * h_q + head) * s_q + token, merged_lse)
        tl.debug_barrier()  # every lane has read before one of them wipes
        for peer in tl.static_range(WORLD):
            if peer != RANK:
                slot = place + peer * source_slots
                tl.store(mine + slot * WORDS + word, tl.full([PADDED], UNWRITTEN, tl.int32), mask=held)
                tl.store(mine + lses + slot, UNWRITTEN)
        tl.store(turns_ptr + row, turn + 1)


def exchange(
    out: torch.Tensor, lse: torch.Tensor, attn_sink: torch.Tensor | None, boxes: torch.Tensor, turns: torch.Tensor,
    lost: torch.Tensor, rank: int, limit_s: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The merge of every rank's (out, lse); each rank calls it with its own share, its mailbox and the same shapes.

    Args:
        out: [batch, s_q, h_q, d_v] contiguous, rows of whole 32-bit words.
        lse: [batch, h_q, s_q] fp32, any strides.
        attn_sink: [h_q] fp32.
        boxes: [world] int64 addresses of the mailboxes as this rank sees them.
        turns: [capacity] int32 of this rank, 0 at first; rows of one call are at most so many.
        lost: [1] int32; set where a rank did not write within limit_s.

    Returns:
        out and lse as `openmla.ops.parts.merge` has them, with its bits; NaN where `lost` is set.
    """
    batch, s_q, h_q, d_v = out.shape
    merged = torch.empty_like(out)
    merged_lse = torch.empty(batch, h_q, s_q, dtype=torch.float32, device=out.device)
    rows, words = batch * s_q * h_q, d_v * out.element_size() // 4
    if rows == 0:
        return merged, merged_lse
    resident = rows
    if out.is_cuda:
        resident = PROGRAMS_PER_SM * torch.cuda.get_device_properties(out.device).multi_processor_count
    with on_device(out.device):
        exchange_kernel[(min(rows, resident),)](
            out.view(torch.int32), lse, lse if attn_sink is None else attn_sink, boxes, turns, lost,
            merged.view(torch.int32), merged_lse, rows, s_q, h_q, turns.numel(), int(limit_s * 1e9),
            *lse.transpose(1, 2).stride(), ELEMENT=ELEMENT[out.dtype], RANK=rank, WORLD=boxes.numel(), WORDS=words,
            PADDED=triton.next_power_of_2(words), HAS_SINK=attn_sink is not None, HAS_CLOCK=out.is_cuda, num_warps=NUM_WARPS,
        )  # fmt: skip
    return merged, merged_lse
