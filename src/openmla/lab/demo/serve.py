"""Continuous batching for the demo, and the watch that checks every attention output of it.

The loop is the one of a serving engine with everything left out that is not about the KV cache: requests wait until
their pages fit, join with a prefill, decode one token per step together with everybody else, and leave their pages to
the prefix cache. The watch keeps its own copy of every latent row, request by request, and so shares neither pages
nor block tables with what it checks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from openmla.integrations.transformers import AttentionCall, PagedModel
from openmla.ops import native
from openmla.reference import attention as reference
from openmla.testing import budget

_QUERY_BLOCK = 256  # rows of a prefill that the oracle takes at a time: its fp64 scores would fill memory otherwise


@dataclass(frozen=True)
class Request:
    """What somebody asks for. `forks` names a running request whose prompt begins alike."""

    name: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    arrives: int
    forks: str | None = None


@dataclass
class RequestLog:
    """What became of it; steps are counted from 0."""

    name: str
    arrived: int
    joined: int = -1
    left: int = -1
    prompt_tokens: int = 0
    shared_tokens: int = 0  # of the prompt, taken from a running request
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    tokens: list[int] = field(default_factory=list)


@dataclass
class StepLog:
    """One step: who computed what, and who held which page at its end. Seconds are wall time."""

    prefilled: dict[str, int]  # request -> prompt tokens computed
    decoded: list[str]
    pages: dict[int, list[str]]
    cached_pages: list[int]
    free_pages: int
    prefill_seconds: float
    decode_seconds: float
    context_tokens: int  # KV tokens that the decode of this step read


@dataclass
class Served:
    """The whole run."""

    requests: list[RequestLog]
    steps: list[StepLog]
    integrity: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Wall time of all prefills and decodes."""
        return sum(step.prefill_seconds + step.decode_seconds for step in self.steps)

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens that were computed, those shared or found left out."""
        return sum(sum(step.prefilled.values()) for step in self.steps)

    @property
    def decode_tokens(self) -> int:
        """Tokens that decode steps computed; the first new token of a request comes from its prefill."""
        return sum(len(step.decoded) for step in self.steps)


class Watch:
    """Observer of a PagedModel: each output against the fp64 oracle, over rows that the watch itself kept."""

    def __init__(self) -> None:
        self.outputs = 0  # attention calls x requests
        self.rows = 0  # (query token, head) pairs
        self.worst: dict[str, budget.Finding] = {}
        self.where: dict[str, str] = {}
        self.failures: list[str] = []
        self.largest: Replay | None = None
        self._rows: dict[tuple[int, str], list[torch.Tensor]] = {}
        self._tokens: dict[str, tuple[int, ...]] = {}

    def begin(self, name: str, prefix: Sequence[int], donor: str | None) -> None:
        """A request starts with `prefix` already in the cache: take the rows of whoever computed them."""
        prefix = tuple(prefix)
        if prefix and donor is None:
            donor = next(other for other, known in self._tokens.items() if known[: len(prefix)] == prefix)
        if prefix and donor is not None:
            for (layer, owner), rows in list(self._rows.items()):
                if owner == donor:
                    self._rows[layer, name] = [torch.cat(rows)[: len(prefix)]]

    def finish(self, name: str, tokens: Sequence[int]) -> None:
        """A request left these tokens to the prefix cache."""
        self._tokens[name] = tuple(tokens)

    def __call__(self, call: AttentionCall) -> None:
        """Check one call, request by request."""
        names = [str(request) for request in call.requests]
        for i, name in enumerate(names):
            self._rows.setdefault((call.layer, name), []).append(call.new_rows[i].clone())
        if call.op == "prefill":
            each = call.q.shape[0] // len(names)
            for i, name in enumerate(names):
                self._check_prefill(call, name, slice(i * each, (i + 1) * each))
            return
        for i, name in enumerate(names):
            keys = self._keys(call.layer, name)
            report = check_decode(call, i, keys, call.out[i : i + 1], call.lse[i : i + 1])
            self._note(report, f"decode, layer {call.layer}, request {name}, {len(keys)} keys", call.out[i].shape)

    def keep_largest(self, call: AttentionCall, paged: PagedModel) -> None:
        """Keep the operands of the decode step with the most KV, for timing and for the controls."""
        if call.op != "decode" or call.layer != 0 or call.q.shape[1] != 1:
            return
        lengths = paged.cache.cache_seqlens(call.requests)
        if self.largest is None or int(lengths.sum()) > int(self.largest.cache_seqlens.sum()):
            keys = [self._keys(0, str(request)) for request in call.requests]
            table = paged.cache.block_table(call.requests)
            self.largest = Replay(call, paged.cache.pages(0).clone(), table, lengths, keys)

    def _keys(self, layer: int, name: str) -> torch.Tensor:
        pieces = self._rows[layer, name]
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        self._rows[layer, name] = [joined]
        return joined

    def _check_prefill(self, call: AttentionCall, name: str, part: slice) -> None:
        assert call.key is not None
        assert call.value is not None
        q, key, value, out = (x[part] for x in (call.q, call.key, call.value, call.out))
        lse = call.lse[:, part]
        for begin in range(0, q.shape[0], _QUERY_BLOCK):
            end = min(begin + _QUERY_BLOCK, q.shape[0])
            spans = [torch.tensor([0, n], dtype=torch.int32, device=q.device) for n in (end - begin, end)]
            golden = reference.prefill(
                q[begin:end], key[:end], value[:end], *spans, softmax_scale=call.softmax_scale, is_causal=True,
                with_bounds=True,
            )  # fmt: skip
            report = budget.check(out[begin:end], lse[:, begin:end], golden, dtype=q.dtype)
            self._note(
                report, f"prefill, layer {call.layer}, request {name}, tokens {begin} to {end}", out[begin:end].shape
            )

    def _note(self, report: budget.Report, where: str, shape: torch.Size) -> None:
        self.outputs += 1
        self.rows += shape.numel() // shape[-1]
        for finding in report.findings:
            if finding.rule not in self.worst or finding.ratio > self.worst[finding.rule].ratio:
                self.worst[finding.rule], self.where[finding.rule] = finding, where
            if not finding.holds:
                self.failures.append(f"{where}: {finding.rule}: {finding.sentence}")


@dataclass(frozen=True)
class Replay:
    """One decode call with everything to run it again: the pool as it was, and the watch's own rows per request."""

    call: AttentionCall
    pool: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    keys: list[torch.Tensor]

    def run(
        self, *, scale: float = 1.0, drop_last: bool = False, foreign_page: bool = False, backend: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of the call; the options are the mistakes of the controls."""
        table, lengths = self.block_table, self.cache_seqlens
        if drop_last:
            lengths = lengths - 1
        if foreign_page:
            table = table.clone()
            table[0, 0] = table[-1, -1] if table[-1, -1] != table[0, 0] else table[-1, 0]
        out, lse = native.decode(
            self.call.q, self.pool, table, lengths, d_v=self.call.out.shape[-1], is_causal=True, backend=backend,
            softmax_scale=self.call.softmax_scale * scale,
        )  # fmt: skip
        assert lse is not None, "asked for by default"
        return out, lse

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> list[budget.Report]:
        """One report per request."""
        return [check_decode(self.call, i, keys, out[i : i + 1], lse[i : i + 1]) for i, keys in enumerate(self.keys)]


def check_decode(
    call: AttentionCall, index: int, keys: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> budget.Report:
    """One request of a decode call against the oracle over `keys` [s_k, d_qk], which lie in no page at all."""
    device = call.q.device
    golden = reference.decode(
        call.q[index : index + 1], keys[None, :, None], torch.zeros(1, 1, dtype=torch.int32, device=device),
        torch.tensor([len(keys)], dtype=torch.int32, device=device), softmax_scale=call.softmax_scale,
        d_v=out.shape[-1], is_causal=True, with_bounds=True,
    )  # fmt: skip
    return budget.check(out, lse, golden, dtype=call.q.dtype)


Choose = Callable[[int, torch.Tensor], int]  # (position of the new token, logits [vocab]) -> token


def likeliest(position: int, logits: torch.Tensor) -> int:
    """Greedy."""
    return int(logits.argmax())


def serve(
    paged: PagedModel,
    requests: Sequence[Request],
    *,
    watch: Watch | None = None,
    choose: Choose = likeliest,
    progress: Callable[[float], None] = lambda share: None,
) -> Served:
    """Run all requests to their end. `choose` picks each token; `progress` gets the share of new tokens done."""
    loop = _Loop(paged, watch, choose)
    waiting = sorted(requests, key=lambda request: request.arrives)
    logs = {request.name: RequestLog(request.name, request.arrives) for request in requests}
    total = sum(request.max_new_tokens for request in requests)
    steps: list[StepLog] = []
    integrity: list[str] = []
    while waiting or loop.running:
        loop.prefilled, begin = {}, time.perf_counter()
        while waiting and waiting[0].arrives <= len(steps) and loop.has_room(waiting[0]):
            request = waiting.pop(0)
            logs[request.name].joined = len(steps)
            loop.join(request, logs[request.name])
        middle = time.perf_counter()
        decoded, context = loop.decode()
        end = time.perf_counter()
        allocator = paged.cache.allocator
        owners: dict[int, list[str]] = {}
        for name in loop.running:
            for page in allocator.pages(name):
                owners.setdefault(page, []).append(name)
        steps.append(
            StepLog(
                loop.prefilled,
                decoded,
                owners,
                list(allocator.cached_pages),
                allocator.num_free,
                middle - begin if loop.prefilled else 0.0,
                end - middle,
                context,
            )
        )
        loop.let_go(len(steps) - 1)
        integrity += paged.cache.check_integrity()
        progress(sum(len(log.tokens) for log in logs.values()) / total)
    return Served(list(logs.values()), steps, tuple(integrity))


class _Loop:
    """State of `serve` between steps."""

    def __init__(self, paged: PagedModel, watch: Watch | None, choose: Choose) -> None:
        self.paged, self.watch, self.choose = paged, watch, choose
        self.running: dict[str, tuple[Request, RequestLog]] = {}
        self.prefilled: dict[str, int] = {}

    def _pages(self, request: Request) -> int:
        return -(-(len(request.prompt) + request.max_new_tokens) // self.paged.cache.page_size)

    def has_room(self, request: Request) -> bool:
        """True when all pages it may ever need are there, next to what the running ones may still ask for."""
        allocator = self.paged.cache.allocator
        # One page more for each running request: the copy of a shared page that it may have to make.
        promised = sum(self._pages(other) + 1 - len(allocator.pages(name)) for name, (other, _) in self.running.items())
        fits = allocator.num_free + allocator.num_evictable - promised >= self._pages(request)
        if not fits and not self.running:
            raise ValueError(f"request {request.name} needs {self._pages(request)} pages; build a larger cache")
        return fits

    def join(self, request: Request, log: RequestLog) -> None:
        """Take what is there already, prefill the rest; its last logits give the first new token."""
        cache, prompt = self.paged.cache, request.prompt
        known = 0
        if request.forks in self.running:
            source, source_log = self.running[request.forks]
            written = [*source.prompt, *source_log.tokens][: cache.allocator.length(source.name)]
            while known < min(len(written), len(prompt) - 1) and written[known] == prompt[known]:
                known += 1
            cache.fork(source.name, request.name, known)
            log.shared_tokens = known
        else:
            known = cache.alloc(request.name, prompt[:-1])
            log.cached_tokens = known
        if self.watch is not None:
            self.watch.begin(request.name, prompt[:known], request.forks if log.shared_tokens else None)
        logits = self.paged.forward([request.name], [prompt[known:]])
        log.prompt_tokens = len(prompt)
        log.tokens.append(self.choose(len(prompt), logits[0]))
        self.prefilled[request.name] = len(prompt) - known
        self.running[request.name] = (request, log)

    def decode(self) -> tuple[list[str], int]:
        """One token for every running request that wants more; returns who, and how many KV tokens were read."""
        names = [name for name, (request, log) in self.running.items() if len(log.tokens) < request.max_new_tokens]
        if not names:
            return [], 0
        logits = self.paged.forward(names, [[self.running[name][1].tokens[-1]] for name in names])
        for name, row in zip(names, logits, strict=True):
            request, log = self.running[name]
            log.tokens.append(self.choose(len(request.prompt) + len(log.tokens), row))
        return names, int(self.paged.cache.cache_seqlens(names).sum())

    def let_go(self, step: int) -> None:
        """Free whoever is done; the pages stay findable. The last new token was never fed, so it is not in there."""
        for name, (request, log) in list(self.running.items()):
            if len(log.tokens) >= request.max_new_tokens:
                tokens = [*request.prompt, *log.tokens[:-1]]
                self.paged.cache.free(name, tokens)
                if self.watch is not None:
                    self.watch.finish(name, tokens)
                log.left = step
                del self.running[name]
