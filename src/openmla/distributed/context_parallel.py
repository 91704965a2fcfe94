"""Context-parallel decode: the tokens of a request are spread over the ranks of a group, in any way.

Each rank attends over its own share, which gives (out, lse), and the shares are merged by the law of
`openmla.split.combine`. A rank may hold more tokens than another, or none.

    ranks = ContextParallel(group)
    lengths = ranks.shares(total_lengths)                          # [batch, world]: tokens per rank, round robin
    out, lse = ranks.decode(q, kv_cache, block_table, lengths[:, ranks.rank])

Three ways to exchange the shares of R = batch * s_q * h_q rows, each of d_v numbers and an lse:

    direct        every rank writes its share into the others' memory 1 launch,      (P - 1) R rows received;
                  and merges what it was written: no collective       GPUs of one host (`openmla.distributed.mailbox`)
    all_gather    every rank gets every share and merges all rows     1 collective,  (P - 1) R rows received
    all_to_all    every rank merges the rows of its own heads         1 collective,  (P - 1) / P R rows received;
                  and, where all need all heads, gathers the result   1 more,        (P - 1) / P R merged rows

`direct` is taken where it can be; else `Link`, a cost model, chooses. Every rank computes the same choice from the
same numbers.

A rank that dies or stalls ends every other rank's call in a DeadRankError that names it, at most `timeout_s` after
the collective should have ended plus `timeout_s` for the roll call. Nothing waits for ever.

Ranks must make the same calls. A kind of call that is new to a rank is compared through the store before anything is
exchanged: where ranks differ, every one of them raises ProblemError, and the group is as good as before. Where one rank
repeats a call while another makes a new one, both end in a DeadRankError that says what the other was at. So do two that
repeat different calls of one size: shares of a collective carry the number of their kind of call, every kind has mailboxes
of its own. Their rows are NaN; on CPUs the call raises, on GPUs `wait`.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from openmla.core import env, incidents
from openmla.core.errors import OpenMLAError, ProblemError, UnsupportedError
from openmla.core.layout import KVLayout
from openmla.distributed.link import Exchange, Heads, Link
from openmla.distributed.mailbox import Mailbox, host_number
from openmla.distributed.message import Message
from openmla.ops import native, parts
from openmla.ops.shares import decode_exchanged
from openmla.split.schedule import Policy

Call = tuple[tuple[str, Any], ...]  # what every rank must pass alike, by name

DIRECT_BYTES = 16 << 20  # of one share; mailboxes hold 2 * world of them

# PyTorch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_serial = itertools.count()  # the n-th ContextParallel of a process; the same on every rank, as they are made together


class DeadRankError(OpenMLAError, RuntimeError):
    """Ranks did not answer within the time limit. `ranks` are their numbers in the group; empty if nobody can say."""

    def __init__(self, ranks: tuple[int, ...], what: str, timeout_s: float, cause: str) -> None:
        self.ranks, self.what, self.timeout_s, self.cause = ranks, what, timeout_s, cause
        who = f"rank(s) {', '.join(map(str, ranks))}" if ranks else "a rank that nobody can name"
        super().__init__(
            f"{what}: {who} did not answer within {timeout_s:g} s ({cause}); "
            "the group cannot be used any more: start its ranks again, or build a group without them"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.ranks, self.what, self.timeout_s, self.cause))


class ContextParallel:
    """Decode over a KV cache that is spread over the ranks of a group.

    Args:
        group: default: all ranks. NCCL for tensors on GPUs, gloo on CPUs.
        timeout_s: how long a collective may take before its ranks are called up one by one.
        link: cost model of the exchange; must be the same on every rank. Default: `Link.of` the backend.
        direct: whether `auto` may exchange through peer memory. Its mailboxes belong to this object, which must outlive
            every CUDA graph that holds a call; they serve one stream at a time.

    Raises:
        ProblemError: torch.distributed is not initialised, or timeout_s is not positive.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        timeout_s: float = 30.0,
        link: Link | None = None,
        direct: bool = True,
    ) -> None:
        wrong = []
        if not dist.is_initialized():
            wrong.append("torch.distributed is not initialised; call torch.distributed.init_process_group first")
        if not timeout_s > 0:
            wrong.append(f"timeout_s must be above 0, got {timeout_s}")
        if wrong:
            raise ProblemError("ContextParallel", wrong)
        chosen = group if group is not None else dist.group.WORLD
        assert chosen is not None, "initialised"
        self.group: dist.ProcessGroup = chosen
        self.rank, self.world = self.group.rank(), self.group.size()
        self.timeout_s = timeout_s
        self.link = link if link is not None else Link.of(dist.get_backend(self.group))
        # PyTorch has no public name for the store that every rank met at; it is the one channel that outlives a
        # collective gone wrong.
        self._store = dist.distributed_c10d.PrefixStore(
            f"openmla/{next(_serial)}", dist.distributed_c10d._get_default_store()
        )
        self._lost: DeadRankError | None = None
        self._agreed: dict[Call, int] = {}  # kinds of calls that all ranks make alike, and their numbers
        self._asked = 0  # agreements that were sought; the same on every rank
        self._at: Call = ()  # the call at work
        self._number = 0  # of its kind
        self._direct = direct
        self._boxes: dict[tuple[int, Call], Mailbox] = {}  # by words of a row and kind of call but its batch
        self._outgrown: list[Mailbox] = []  # captured graphs may still use them
        self._warm: set[Call] = set()  # calls that have run as a graph would hold them
        self._refusal: str | None = None  # why these ranks cannot have mailboxes
        self._strange: torch.Tensor | None = None  # bool [1] on a GPU: shares of another call came in

    # Who holds what

    def shares(self, lengths: torch.Tensor, *, interleave: int = 1) -> torch.Tensor:
        """How many tokens of each request every rank holds, if token t goes to rank (t // interleave) % world.

        Args:
            lengths: [...] integers, tokens per request.
            interleave: tokens that stay together, the page size say.

        Returns:
            [..., world], dtype of lengths. Round robin keeps the ranks within `interleave` tokens of each other
            while a request grows.
        """
        ranks = torch.arange(self.world, device=lengths.device, dtype=lengths.dtype)
        whole = lengths[..., None] // (self.world * interleave) * interleave
        rest = lengths[..., None] % (self.world * interleave) - ranks * interleave
        return whole + rest.clamp(0, interleave)

    def visible(self, lengths: torch.Tensor, s_q: int, *, interleave: int = 1) -> torch.Tensor:
        """[batch, s_q] tokens of this rank that query i sees, causal, for `lengths` [batch] with the s_q new ones."""
        seen = lengths[:, None] - s_q + 1 + torch.arange(s_q, device=lengths.device, dtype=lengths.dtype)
        return self.shares(seen.clamp(min=0), interleave=interleave)[..., self.rank]

    # Attention

    def decode(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        *,
        heads: Heads = "all",
        exchange: Exchange = "auto",
        d_v: int = 512,
        softmax_scale: float | None = None,
        attn_sink: torch.Tensor | None = None,
        kv_layout: KVLayout | str | None = None,
        policy: Policy = "balanced",
        plan: native.Plan | None = None,
        backend: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`openmla.decode` over all ranks' tokens. Collective: every rank calls it with the same shapes and options.

        Args:
            q: [batch, s_q, h_q, d_qk], the same on every rank; with heads="own" [batch, s_q, h_q / world, d_qk], the
                heads of this rank.
            kv_cache, block_table: this rank's pages; sizes may differ between ranks.
            cache_seqlens: int32 [batch], tokens of this rank that every query sees; or [batch, s_q], of which query i
                sees the first cache_seqlens[b, i] (`visible`): several causal queries. 0 is legal.
            heads: `own` takes and returns the heads of this rank only: what tensor-parallel projections need.
            exchange: `auto` takes `direct` where `why_not_direct` has no reason against it, else asks the cost model.
            plan: of `ContextParallel.plan`, once for all layers of a step; default: made for this call.
            d_v, softmax_scale, attn_sink, kv_layout, policy, backend: as for `openmla.decode`; attn_sink has all heads.

        Returns:
            out: [batch, s_q, h_q, d_v] (or this rank's heads), dtype of q; 0 where no rank has a key.
            lse: [batch, h_q, s_q] fp32, natural; -inf where no rank has a key.

        Raises:
            ProblemError, UnsupportedError: as `openmla.decode`; ProblemError also where ranks pass other shapes or options,
                UnsupportedError where exchange="direct" cannot be had.
            DeadRankError: a rank did not answer; this object is of no use any more.

        Notes:
            Precision: shares travel in the dtype of q (lse in fp32) and are merged in fp32, so out is rounded twice.
            Determinism: shares are merged in the order of ranks: same inputs, same bits, on every rank. A captured call may
            round otherwise than an eager one.
            On GPUs the call returns when the work is queued; `wait` is the point where a dead rank is noticed. Rows whose
            share did not arrive by `direct` within timeout_s are NaN.
            CUDA graphs: safe after one warm call of that size on every rank.
        """
        self._check(q, cache_seqlens, heads, exchange)
        self._agree((
            ("batch", q.shape[0]), ("q", tuple(q.shape[1:])), ("dtype", q.dtype), ("dims of cache_seqlens", cache_seqlens.dim()),
            ("heads", heads), ("exchange", exchange), ("d_v", d_v), ("softmax_scale", softmax_scale),
            ("has_sink", attn_sink is not None), ("kv_layout", kv_layout), ("policy", policy), ("link", self.link),
            ("direct", self._direct),
        ))  # fmt: skip
        q = self._gather_heads(q) if heads == "own" else q
        batch, s_q, h_q, d_qk = q.shape
        chosen = self._exchange(exchange, heads, q, d_v)
        rows, table, lengths = _each_query(q, block_table, cache_seqlens)
        # Every rank gets every share: the kernel writes straight into what travels.
        share = Message.empty((batch, s_q, h_q, d_v), q, self._number) if chosen == "all_gather" else None
        scale = d_qk**-0.5 if softmax_scale is None else softmax_scale
        options: dict[str, Any] = {
            "d_v": d_v, "softmax_scale": scale, "kv_layout": kv_layout, "plan": plan, "policy": policy, "backend": backend,
        }  # fmt: skip
        own = self._slice(h_q) if heads == "own" or share is None else slice(None)
        if chosen == "direct":
            found = self._decode_directly((batch, s_q, h_q, d_v), (rows, kv_cache, table, lengths), attn_sink, options)
            return found if heads == "all" else (found[0][:, :, own].contiguous(), found[1][:, own])
        into = None if share is None else share.out[0].view(*rows.shape[:3], d_v)
        out, lse = native.decode(rows, kv_cache, table, lengths, out=into, **options)
        assert lse is not None, "asked for by default"
        lse = _each_token(lse, batch, s_q)
        if share is not None:
            share.lse[0].copy_(lse)
            shares = self._all_shares(share)
            outs, lses = shares.out[:, :, :, own], shares.lse[:, :, own]
        else:
            shares = self._trade_heads(out.view(batch, s_q, h_q, d_v), lse)
            outs, lses = shares.out, shares.lse
        sink = None if attn_sink is None else attn_sink[own]
        merged, merged_lse = parts.merge(outs[0], lses[0], outs[1:], lses[1:], attn_sink=sink)
        if share is None and heads == "all":
            return self._gather_merged(merged, merged_lse, h_q)
        return merged, merged_lse

    def plan(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        *,
        heads: Heads = "all",
        d_v: int = 512,
        kv_layout: KVLayout | str | None = None,
        policy: Policy = "balanced",
        backend: str | None = None,
    ) -> native.Plan:
        """Cut this rank's tokens into pieces, once for all layers of a step; the arguments of `decode`. Not collective."""
        self._check(q, cache_seqlens, heads, "auto")
        if heads == "own":
            q = q.new_empty(*q.shape[:2], q.shape[2] * self.world, q.shape[3])
        rows, table, lengths = _each_query(q, block_table, cache_seqlens)
        return native.plan(
            rows, kv_cache, table, lengths, d_v=d_v, kv_layout=kv_layout, policy=policy, backend=backend
        )  # fmt: skip

    def _exchange(self, asked: Exchange, heads: Heads, q: torch.Tensor, d_v: int) -> Exchange:
        """How the shares of q travel: as asked, or the best there is; alone, the rank gathers itself."""
        if self.world == 1:
            return "all_gather"
        if asked == "direct" or (asked == "auto" and self._direct):
            reason = self._open(q, d_v)
            if reason is None:
                return "direct"
            if asked == "direct":
                raise UnsupportedError(
                    "exchange='direct' cannot be had", {"direct": (reason,)}, "ContextParallel.decode"
                )
        if asked == "auto":
            row_bytes = d_v * q.element_size() + 4
            return self.link.choose(math.prod(q.shape[:3]), row_bytes, row_bytes, self.world, heads)
        return asked

    # Through peer memory

    def why_not_direct(self, q: torch.Tensor, d_v: int = 512) -> str | None:
        """Why shares of these queries do not travel through peer memory; None if they do. Not collective.

        What only a meeting of all ranks can tell (one host, memory that can be mapped) is known after the first decode.
        """
        backend, size = dist.get_backend(self.group), math.prod(q.shape[:3]) * d_v * q.element_size()
        reasons = (
            (self._refusal, self._refusal is not None),
            (f"q is on {q.device}: only GPUs have peer memory", not q.is_cuda),
            (f"the group's backend is {backend}, not nccl: its ranks need not be on one host", "nccl" not in backend),
            (f"a row of {d_v} numbers is not whole 32-bit words", d_v * q.element_size() % 4 != 0),
            (f"a share of {size} bytes is above {DIRECT_BYTES}, where bandwidth decides", size > DIRECT_BYTES),
        )
        return next((reason for reason, holds in reasons if holds), None)

    def _open(self, q: torch.Tensor, d_v: int) -> str | None:
        """Make sure that there is a mailbox for q's shares, or say why not; the same on every rank. Collective."""
        rows, words = math.prod(q.shape[:3]), d_v * q.element_size() // 4
        reason = self.why_not_direct(q, d_v)
        box = self._boxes.get((words, self._at[1:]))
        if reason is not None or (box is not None and box.capacity >= rows):
            return reason
        if torch.cuda.is_current_stream_capturing():
            return "a captured call needs a warm one of its size first, which opens the mailboxes"
        if self._refusal is None:
            meeting = self._told(host_number() if env.is_importable("triton") else 0)
            if 0 in meeting:
                self._refusal = "a rank has no Triton"
            elif len(set(meeting)) > 1:
                self._refusal = "the ranks are on several hosts"
        if self._refusal is None:
            found = Mailbox.open(self.group, q.device, rows, words)
            if 0 in self._told(int(isinstance(found, Mailbox))):  # also: every mailbox is empty before anybody writes
                self._refusal = f"no symmetric memory: {found if isinstance(found, str) else 'on another rank'}"
            elif isinstance(found, Mailbox):
                self._outgrown += [box] if box is not None else []
                self._boxes[words, self._at[1:]] = found
        return self._refusal

    def _told(self, number: int) -> list[int]:
        """Every rank's number; waits for the device, within the time limit."""
        device = torch.device("cuda", torch.cuda.current_device())
        numbers = self._gather(torch.tensor([number], dtype=torch.int64, device=device), "meeting of the ranks")
        self.wait()
        found: list[int] = numbers.flatten().tolist()
        return found

    def _decode_directly(
        self, shape: tuple[int, int, int, int], operands: tuple[torch.Tensor, ...], attn_sink: torch.Tensor | None,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Everybody's shares of all heads, merged: in a graph by the decode kernel where it can, else by a launch behind it."""
        if self._lost is not None:
            raise self._lost
        (batch, s_q, _, d_v), q = shape, operands[0]
        box = self._boxes[d_v * q.element_size() // 4, self._at[1:]]
        # Called from Python, the kernel that exchanges adds 248 us to its attention, the launch of its own 93: the first is for
        # graphs (where it is the faster), and runs once before, so that a capture finds everything loaded.
        is_captured = torch.cuda.is_current_stream_capturing()
        if attn_sink is None and (is_captured or self._at not in self._warm):
            self._warm.add(self._at)
            staged_out, staged_lse = box.stage((*q.shape[:3], d_v), q.dtype)
            found = decode_exchanged(
                *operands, mail=box.mail(self.timeout_s), staged_out=staged_out, staged_lse=staged_lse, **options
            )
            if found is not None and is_captured:
                return found[0].view(shape), _each_token(found[1], batch, s_q)
        out, lse = native.decode(*operands, **options)
        assert lse is not None, "asked for by default"
        return box.exchange(
            out.view(shape).contiguous(), _each_token(lse, batch, s_q), attn_sink, self.timeout_s
        )  # fmt: skip

    def _check(self, q: torch.Tensor, cache_seqlens: torch.Tensor, heads: str, exchange: str) -> None:
        wrong = []
        if q.dim() != 4:
            wrong.append(f"q must be [batch, s_q, h_q, d_qk], got shape {tuple(q.shape)}")
        elif cache_seqlens.dim() == 2 and tuple(cache_seqlens.shape) != tuple(q.shape[:2]):
            wrong.append(
                f"cache_seqlens must be [batch] or [batch, s_q] = {tuple(q.shape[:2])}, got {tuple(cache_seqlens.shape)}"
            )
        if heads not in ("all", "own"):
            wrong.append(f"heads must be all or own, got {heads!r}")
        if exchange not in ("auto", "direct", "all_gather", "all_to_all"):
            wrong.append(f"exchange must be auto, direct, all_gather or all_to_all, got {exchange!r}")
        if wrong:
            raise ProblemError("ContextParallel.decode", wrong)

    def _slice(self, h_q: int, rank: int | None = None) -> slice:
        """The heads of a rank: h_q / world of them, the first ranks one more where it does not divide."""
        rank = self.rank if rank is None else rank
        each, more = divmod(h_q, self.world)
        begin = rank * each + min(rank, more)
        return slice(begin, begin + each + (rank < more))

    def _all_shares(self, share: Message) -> Message:
        """Everybody's share of all heads."""
        if self.world == 1:
            return share
        return self._of_this_call(share.replaced(self._gather(share.content[0], "gather of attention shares")))

    def _trade_heads(self, out: torch.Tensor, lse: torch.Tensor) -> Message:
        """From this rank's share [batch, s_q, h_q, d_v], [batch, h_q, s_q] everybody's shares of this rank's heads."""
        batch, s_q, h_q, d_v = out.shape
        spans = [self._slice(h_q, rank) for rank in range(self.world)]
        sent = [Message.empty((batch, s_q, span.stop - span.start, d_v), out, self._number) for span in spans]
        for message, span in zip(sent, spans, strict=True):
            message.fill(out[:, :, span], lse[:, span])
        mine = sent[self.rank].content.numel()
        received = out.new_empty(self.world * mine, dtype=torch.uint8)
        everything = torch.cat([message.content[0] for message in sent])
        sizes = [message.content.numel() for message in sent]
        self._run(
            lambda: dist.all_to_all_single(
                received, everything, [mine] * self.world, sizes, group=self.group, async_op=True
            ),
            "exchange of attention shares",
        )  # fmt: skip
        return self._of_this_call(sent[self.rank].replaced(received.view(self.world, mine)))

    def _gather_merged(self, out: torch.Tensor, lse: torch.Tensor, h_q: int) -> tuple[torch.Tensor, torch.Tensor]:
        """From the merged rows of this rank's heads those of all heads."""
        batch, s_q, mine, d_v = out.shape
        sizes = [span.stop - span.start for span in (self._slice(h_q, rank) for rank in range(self.world))]
        # Heads may be uneven: every rank sends as many as the first.
        block = Message.empty((batch, s_q, sizes[0], d_v), out, self._number)
        block.out[0, :, :, :mine].copy_(out)
        block.lse[0, :, :mine].copy_(lse)
        whole = block.replaced(self._gather(block.content[0], "gather of merged heads"))
        outs = [part[:, :, :size] for part, size in zip(whole.out, sizes, strict=True)]
        lses = [part[:, :size] for part, size in zip(whole.lse, sizes, strict=True)]
        return torch.cat(outs, 2), torch.cat(lses, 1)

    def _gather_heads(self, q: torch.Tensor) -> torch.Tensor:
        """[batch, s_q, h_q / world, d_qk] of every rank -> [batch, s_q, h_q, d_qk]."""
        gathered = self._gather(q.contiguous(), "gather of query heads")
        return gathered.permute(1, 2, 0, 3, 4).flatten(2, 3)

    # Collectives with an end

    def _agree(self, call: Call) -> None:
        """Raises ProblemError on every rank unless all are about to make this call. Asked once per kind of call."""
        self._at, self._number = call, self._agreed.get(call, 0)
        if self.world == 1 or call in self._agreed:
            return
        if self._lost is not None:
            raise self._lost
        key, mine = f"call/{self._asked}", str(call)
        self._asked += 1
        others = [rank for rank in range(self.world) if rank != self.rank]
        said: dict[int, str] = {}

        def ask() -> None:
            self._store.set(f"{key}/{self.rank}", mine)
            while len(said) < len(others) and time.monotonic() < deadline:
                for rank in set(others) - set(said):
                    if self._store.check([f"{key}/{rank}"]):
                        said[rank] = self._store.get(f"{key}/{rank}").decode()
                time.sleep(0.001)

        deadline = time.monotonic() + self.timeout_s
        failure = _within(self.timeout_s + 1, ask)
        if failure or len(said) < len(others):
            raise self._roll_call("agreement on shapes and options", failure or "a rank makes another call or none")
        differing = {rank: text for rank, text in sorted(said.items()) if text != mine}
        if differing:
            raise ProblemError(
                "ContextParallel.decode",
                [f"every rank must make the same call; rank {self.rank} has {mine}"]
                + [f"rank {rank} has {text}" for rank, text in differing.items()],
            )
        self._agreed[call] = self._number = self._asked

    def _of_this_call(self, shares: Message) -> Message:
        """Shares of another call than this one become NaN and end in DeadRankError: here on a CPU, on a GPU in `wait`."""
        is_strange = shares.call != self._number
        shares.lse.masked_fill_(is_strange[:, None, None, None], math.nan)
        if shares.content.is_cuda:
            if self._strange is None:
                self._strange = is_strange.new_zeros(1)
            self._strange.logical_or_(is_strange.any())
        elif bool(is_strange.any()):
            raise self._roll_call("exchange of attention shares", "a share of another call came in")
        return shares

    def _gather(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """[world, *shape], the same on every rank."""
        result = tensor.new_empty(self.world, *tensor.shape)
        flat = result.view(self.world * tensor.shape[0], *tensor.shape[1:])
        self._run(lambda: _all_gather(flat, tensor, group=self.group, async_op=True), what)
        return result

    def _run(self, start: Callable[[], Any], what: str) -> None:
        """Start a collective; on a CPU also see it through, within the time limit."""
        if self._lost is not None:
            raise self._lost
        try:
            work = start()
            if dist.get_backend(self.group) == "nccl":
                work.wait()  # the stream waits, not the host
            else:
                work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
            raise self._roll_call(what, _first_line(error)) from error

    def wait(self) -> None:
        """Wait until this rank's queued work is done; the point where a GPU rank notices that another one is gone.

        Raises:
            DeadRankError: not done within timeout_s.
        """
        if self._lost is not None:
            raise self._lost
        if not torch.cuda.is_available():
            return
        done = torch.cuda.Event()
        done.record()
        deadline = time.monotonic() + self.timeout_s
        while not done.query():
            if time.monotonic() > deadline:
                raise self._roll_call("wait", "queued work is not done")
            time.sleep(1e-4)
        if self._strange is not None and bool(self._strange):
            raise self._roll_call("exchange of attention shares", "a share of another call came in")
        if any(box.is_lost() for box in (*self._boxes.values(), *self._outgrown)):
            raise self._roll_call("exchange of attention shares", "a share was not written")

    def _roll_call(self, what: str, cause: str) -> DeadRankError:
        """Everybody who is alive comes here too, once their own collective fails: whoever does not is named."""
        incidents.note("rank_lost", "distributed", f"rank {self.rank}: {what}: {cause}")
        mine = str(self._at)
        answers: dict[int, str] = {self.rank: mine}

        def call() -> None:
            self._store.set(f"here/{self.rank}", mine)
            while len(answers) < self.world and time.monotonic() < deadline:
                for rank in set(range(self.world)) - set(answers):
                    if self._store.check([f"here/{rank}"]):
                        answers[rank] = self._store.get(f"here/{rank}").decode()
                time.sleep(0.01)

        # Others notice at most timeout_s later than this rank; the second is for a busy machine.
        deadline = time.monotonic() + self.timeout_s + 1
        store_failed = _within(self.timeout_s + 2, call)
        missing = tuple(sorted(set(range(self.world)) - set(answers)))
        if not missing:  # all are alive: perhaps they do not do the same
            missing = tuple(rank for rank, text in sorted(answers.items()) if text != mine)
            if missing:
                cause = f"{cause}; ranks disagree: rank {missing[0]} is at {answers[missing[0]]}, this one at {mine}"
        elif store_failed:
            # The store lives in rank 0 of the default group (or in torchrun's agent, which outlives its workers).
            host = dist.get_group_rank(self.group, 0) if 0 in dist.get_process_group_ranks(self.group) else None
            missing = (host,) if host is not None and host in missing else ()
            cause = f"{cause}; and the rendezvous store is gone"
        self._lost = DeadRankError(missing, what, self.timeout_s, cause)
        return self._lost

    def measure(self, device: torch.device | str = "cpu", *, runs: int = 5) -> Link:
        """Latency and bandwidth of this group, the slowest rank's; becomes `link`. Collective."""
        times = []
        for size in (64, 1 << 22):
            block = torch.zeros(size, dtype=torch.uint8, device=device)
            seen = []
            for _ in range(runs):
                begin = time.perf_counter()
                self._gather(block, "measurement of the link")
                self.wait()
                seen.append(time.perf_counter() - begin)
            times.append(sorted(seen)[runs // 2])
        mine = torch.tensor(times, dtype=torch.float64, device=device)
        slowest = self._gather(mine, "measurement of the link").amax(0).tolist()
        received = (self.world - 1) * (1 << 22)
        self.link = Link(slowest[0], max(received, 1) / max(slowest[1] - slowest[0], 1e-9))
        return self.link


def _each_token(lse: torch.Tensor, batch: int, s_q: int) -> torch.Tensor:
    """[batch, h_q, s_q] from an lse whose query tokens may each have been a request of their own."""
    return lse if lse.shape[0] == batch else lse.view(batch, s_q, -1).transpose(1, 2)


def _each_query(
    q: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As they are, or with lengths per query one query per request, so that each has its own."""
    if cache_seqlens.dim() == 1:
        return q, block_table, cache_seqlens.contiguous()
    batch, s_q, h_q, d_qk = q.shape
    return (
        q.reshape(batch * s_q, 1, h_q, d_qk),
        block_table.repeat_interleave(s_q, 0),
        cache_seqlens.flatten().contiguous(),
    )


def _within(seconds: float, talk: Callable[[], None]) -> str:
    """Talk to the store; why it failed, or "". In a thread: a store whose host stands still answers nobody, for minutes."""
    failed: list[str] = []

    def run() -> None:
        try:
            talk()
        except RuntimeError as error:
            failed.append(_first_line(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return failed[0] if failed else "the store does not answer" if thread.is_alive() else ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
