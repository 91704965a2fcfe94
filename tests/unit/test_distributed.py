"""Several ranks over gloo: shares merge to the whole, tensor-parallel heads, and a rank that dies or stalls is named."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from openmla.core import env
from openmla.core.errors import ProblemError, UnsupportedError
from openmla.core.layout import plain_layout
from openmla.distributed import ContextParallel, DeadRankError, Link
from openmla.kv.cache import PagedKVCache
from openmla.nn import MLA, MLAConfig, Pass, Rope
from openmla.reference import attention as reference
from openmla.testing import budget

LENGTHS = (37, 0, 5, 200)
BATCH, S_Q, HEADS, PAGE = len(LENGTHS), 2, 6, 16


def run_ranks(work, world: int, *arguments, expect_dead: tuple[int, ...] = ()) -> list:
    """`work(rank, *arguments)` in `world` processes; what each returned, in order of ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(work, rank, world, port, answers, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    found = {}
    for _ in range(world - len(expect_dead)):
        rank, failure, value = answers.get()
        assert failure is None, f"rank {rank}: {failure}"
        found[rank] = value
    for process in ranks:
        process.kill()
        process.join()
    return [found.get(rank) for rank in range(world)]


def _rank(work, rank: int, world: int, port: int, answers, arguments) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
        answers.put((rank, None, work(rank, *arguments)))
        signal.pause()  # rank 0 holds the store, which the others may still need
    except BaseException as error:
        answers.put((rank, f"{type(error).__name__}: {error}", None))


def operands(dtype: torch.dtype = torch.float32):
    """q, and the dense keys of every request; the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(BATCH, S_Q, HEADS, 576, generator=generator).to(dtype)
    keys = [torch.randn(n, 576, generator=generator).to(dtype) for n in LENGTHS]
    return q, keys


def paged(pieces: list[torch.Tensor], width: int):
    """A pool with one page table row per request, and its lengths."""
    pages = [-(-len(piece) // PAGE) for piece in pieces]
    pool = torch.full((sum(pages) + 1, PAGE, 1, 576), 1e4, dtype=pieces[0].dtype)
    table, page = torch.zeros(len(pieces), width, dtype=torch.int32), 1
    for i, piece in enumerate(pieces):
        for j in range(pages[i]):
            part = piece[j * PAGE : (j + 1) * PAGE]
            pool[page, : len(part), 0] = part
            table[i, j] = page
            page += 1
    return pool, table, torch.tensor([len(piece) for piece in pieces], dtype=torch.int32)


def golden(q, keys, *, is_causal: bool = False, sink=None):
    pool, table, lengths = paged(keys, 16)
    return reference.decode(
        q, pool, table, lengths, d_v=512, softmax_scale=192**-0.5, is_causal=is_causal, attn_sink=sink, with_bounds=True
    )


def _shares_merge(rank: int) -> list[str]:
    """Every split, exchange and head mode against the fp64 oracle over the whole; what was checked."""
    ranks, checked = ContextParallel(timeout_s=30), []
    world = ranks.world

    def judge(name, out, lse, want, q, own=slice(None)):
        whole_out, whole_lse = want.out.to(q.dtype), want.lse.float()  # the heads of others count as right
        whole_out[:, :, own], whole_lse[:, own] = out, lse
        budget.check(whole_out, whole_lse, want, dtype=q.dtype).require(f"{name}, rank {rank} of {world}")
        checked.append(name)

    q, keys = operands()
    want = golden(q, keys)
    # One stretch each, uneven: the first rank has nine tenths, the last nothing.
    ends = [0, 9, *[10] * (world - 1)]
    mine = [k[len(k) * ends[rank] // 10 : len(k) * ends[rank + 1] // 10] for k in keys]
    options = {"softmax_scale": 192**-0.5}
    for exchange in ("all_gather", "all_to_all", "auto"):
        out, lse = ranks.decode(q, *paged(mine, 16), exchange=exchange, **options)
        judge(f"uneven {exchange}", out, lse, want, q)
    plan = ranks.plan(q, *paged(mine, 16))
    for _ in range(2):  # as two layers would
        out, lse = ranks.decode(q, *paged(mine, 16), plan=plan, **options)
    judge("planned", out, lse, want, q)
    reason = ranks.why_not_direct(q)
    assert reason == "q is on cpu: only GPUs have peer memory", reason
    with pytest.raises(UnsupportedError, match="only GPUs have peer memory"):
        ranks.decode(q, *paged(mine, 16), exchange="direct", **options)
    sink = torch.linspace(-2, 3, HEADS)
    out, lse = ranks.decode(q, *paged(mine, 16), attn_sink=sink, **options)
    judge("sink", out, lse, golden(q, keys, sink=sink), q)
    # Round robin, causal: query i sees what came before it, wherever that lies.
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    for interleave in (1, PAGE):
        mine = [k[torch.arange(len(k)) // interleave % world == rank] for k in keys]
        pool, table, local = paged(mine, 16)
        assert torch.equal(ranks.shares(lengths, interleave=interleave)[:, rank], local)
        seen = ranks.visible(lengths, S_Q, interleave=interleave)
        plan = ranks.plan(q, pool, table, seen)
        out, lse = ranks.decode(q, pool, table, seen, exchange="all_to_all", plan=plan, **options)
        judge(f"causal {interleave}", out, lse, golden(q, keys, is_causal=True), q)
        if HEADS % world == 0:
            own = slice(rank * HEADS // world, (rank + 1) * HEADS // world)
            for exchange in ("all_gather", "all_to_all"):
                out, lse = ranks.decode(
                    q[:, :, own], pool, table, seen, heads="own", exchange=exchange, plan=plan, **options
                )
                judge(f"own {exchange} {interleave}", out, lse, golden(q, keys, is_causal=True), q, own)
    # bf16 shares are rounded once before the merge and once after: the rule holds, with room.
    q, keys = operands(torch.bfloat16)
    mine = [k[torch.arange(len(k)) % world == rank] for k in keys]
    out, lse = ranks.decode(q, *paged(mine, 16), **options)
    judge("bf16", out, lse, golden(q, keys), q)
    link = ranks.measure(runs=2)
    assert link.latency_s > 0
    assert link.bytes_per_s > 0
    return checked


@pytest.mark.parametrize("world", [2, 4])
def test_shares_merge_to_the_whole(world) -> None:
    found = run_ranks(_shares_merge, world)
    assert all(each == found[0] for each in found)
    assert len(found[0]) == (12 if world == 2 else 8)


def _bits(rank: int) -> list[torch.Tensor]:
    ranks = ContextParallel(timeout_s=30)
    q, keys = operands(torch.bfloat16)
    mine = [k[torch.arange(len(k)) % ranks.world == rank] for k in keys]
    return [
        ranks.decode(q, *paged(mine, 16), exchange=e)[0].view(torch.int16).numpy()
        for e in ("all_gather", "all_to_all", "all_to_all")
    ]


def test_every_rank_has_the_same_bits() -> None:
    found = run_ranks(_bits, 2)
    for outs in found:
        for out in outs:
            assert (out == found[0][0]).all()


def _one_stops(rank: int, how: str, victim: int, timeout_s: float):
    ranks = ContextParallel(timeout_s=60)
    q, keys = operands()
    mine = [k[torch.arange(len(k)) % ranks.world == rank] for k in keys]
    ranks.decode(q, *paged(mine, 16))  # a healthy one first, on a machine that may be busy
    dist.barrier()
    ranks.timeout_s = timeout_s
    if rank == victim:

        def stop_inside(start, what) -> None:
            start()  # the collective is under way
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

        ranks._run = stop_inside
    begin = time.monotonic()
    try:
        ranks.decode(q, *paged(mine, 16), exchange="all_to_all")
    except DeadRankError as error:
        seconds = time.monotonic() - begin
        try:
            ranks.decode(q, *paged(mine, 16))
        except DeadRankError as again:
            return error.ranks, str(error), seconds, again is error
    return None


@pytest.mark.parametrize(("how", "world", "victim"), [("killed", 2, 1), ("killed", 4, 2), ("stalled", 4, 3)])
def test_a_dead_rank_is_named_in_time(how, world, victim) -> None:
    timeout_s = 5.0
    found = run_ranks(_one_stops, world, how, victim, timeout_s, expect_dead=(victim,))
    survivors = [each for rank, each in enumerate(found) if rank != victim]
    for ranks, message, seconds, stays_lost in survivors:
        assert ranks == (victim,), message
        assert f"rank(s) {victim} did not answer within 5 s" in message
        assert seconds < 30, "a time limit of 5 s, and one for the roll call"
        assert stays_lost


def test_when_the_rank_that_holds_the_store_dies_nobody_hangs() -> None:
    found = run_ranks(_one_stops, 2, "killed", 0, 5.0, expect_dead=(0,))
    ranks, message, seconds, _ = found[1]
    assert ranks == (0,)
    assert "rank(s) 0 did not answer" in message
    assert seconds < 30


def _disagreement(rank: int) -> list[str]:
    """One rank's call differs, in one way after another; then all make the same one."""
    ranks = ContextParallel(timeout_s=30)
    q, keys = operands()
    mine = [k[torch.arange(len(k)) % ranks.world == rank] for k in keys]
    pool, table, lengths = paged(mine, 16)
    said = []
    for other in ({"batch": 3}, {"softmax_scale": 1.0}, {"exchange": "all_to_all"}):
        given, options = (q, table, lengths), {"softmax_scale": 192**-0.5}
        if rank == 1 and "batch" in other:
            given = (q[:3], table[:3], lengths[:3])
        elif rank == 1:
            options |= other
        with pytest.raises(ProblemError) as caught:
            ranks.decode(given[0], pool, *given[1:], **options)
        said.append(str(caught.value))
    out, lse = ranks.decode(q, pool, table, lengths, softmax_scale=192**-0.5)  # the group is as good as before
    budget.check(out, lse, golden(q, keys), dtype=q.dtype).require(f"rank {rank}")
    return said


def test_ranks_that_disagree_all_raise_before_anything_is_exchanged() -> None:
    for rank, said in enumerate(run_ranks(_disagreement, 2)):
        assert len(said) == 3
        for text in said:
            assert f"every rank must make the same call; rank {rank} has" in text, text
            assert f"rank {1 - rank} has" in text


def _one_repeats(rank: int):
    """Rank 0 repeats a call that was agreed on while rank 1 makes another one."""
    ranks = ContextParallel(timeout_s=30)
    q, keys = operands()
    mine = [k[torch.arange(len(k)) % ranks.world == rank] for k in keys]
    ranks.decode(q, *paged(mine, 16))
    dist.barrier()
    ranks.timeout_s = 3.0
    begin = time.monotonic()
    try:
        ranks.decode(q, *paged(mine, 16), **({"policy": "batch_invariant"} if rank == 1 else {}))
    except DeadRankError as error:
        return error.ranks, str(error), time.monotonic() - begin
    return None


def test_a_rank_that_repeats_while_another_makes_a_new_call_is_told() -> None:
    for rank, (ranks, message, seconds) in enumerate(run_ranks(_one_repeats, 2)):
        assert ranks == (1 - rank,), message
        assert "ranks disagree" in message
        assert "batch_invariant" in message
        assert seconds < 20


def _mixed_up(rank: int, exchange: str, heads: str):
    """Two kinds of call of one size, each made by all ranks before; then rank 1 makes the other one."""
    ranks = ContextParallel(timeout_s=3.0)
    q, keys = operands()
    q = q if heads == "all" else q[:, :, ranks._slice(HEADS)].contiguous()
    mine = [k[torch.arange(len(k)) % ranks.world == rank] for k in keys]
    kinds = [{"softmax_scale": scale, "exchange": exchange, "heads": heads} for scale in (0.07, 0.08)]
    for kind in (*kinds, *kinds):
        ranks.decode(q, *paged(mine, 16), **kind)
    begin = time.monotonic()
    try:
        ranks.decode(q, *paged(mine, 16), **kinds[rank == 1])
    except DeadRankError as error:
        return error.ranks, str(error), time.monotonic() - begin
    return None


@pytest.mark.parametrize(("exchange", "heads"), [("all_gather", "all"), ("all_to_all", "own")])
def test_ranks_that_mix_up_two_known_calls_of_one_size_are_told(exchange, heads) -> None:
    for rank, (ranks, message, seconds) in enumerate(run_ranks(_mixed_up, 2, exchange, heads)):
        assert ranks == (1 - rank,), message
        assert "a share of another call came in; ranks disagree" in message
        assert "0.07" in message
        assert "0.08" in message
        assert seconds < 20


def _tensor_parallel(rank: int):
    torch.manual_seed(3)
    config = MLAConfig(48, 4, q_lora_rank=24, d_latent=32, d_rope=16, d_nope=24, d_v=20, has_bias=True, rope=Rope(16))
    whole = MLA(config)
    share = MLA(config, group=dist.group.WORLD)
    share.load_checkpoint(whole.state_dict())
    x, positions = torch.randn(2, 7, 48), torch.arange(7)[None]
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, want = share(left, positions), whole(right, positions)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(want)
    (out * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)
    theirs = dict(whole.named_parameters())
    for name, parameter in share.named_parameters():
        wanted = share._share(theirs[name].grad, share._sharded_dim(name))
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5, msg=name)
    found = []
    for block in (share, whole):
        cache = PagedKVCache(plain_layout(torch.float32, 48, 32), 4, page_size=4)
        cache.alloc("a")
        with torch.inference_mode():
            prompt = Pass.begin(cache, ["a"], [6])
            block(x[0, :6], prompt.positions, prompt)
            step = Pass.begin(cache, ["a"], [1])
            found.append(block(x[0, 6:], step.positions, step))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], want[0, 6:].detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ProblemError, match="heads=3 must be divisible by the 2 ranks"):
        MLA(MLAConfig(48, 3), group=dist.group.WORLD)
    return True


def test_tensor_parallel_heads_equal_the_whole_block() -> None:
    """Outputs, the gradient of x, and that of every parameter, cut or whole."""
    assert run_ranks(_tensor_parallel, 2) == [True, True]


def test_the_cost_model_chooses() -> None:
    """Few rows: one collective wins by latency. Many: fewer bytes win. Own heads never need the second one."""
    link, row = Link(100e-6, 1e9), {"row_bytes": 1028, "merged_bytes": 1028}
    assert link.choose(16, world=2, heads="all", **row) == "all_gather"
    assert link.choose(100_000, world=8, heads="all", **row) == "all_to_all"
    assert link.choose(16, world=4, heads="own", **row) == "all_to_all"
    assert Link.of("nccl").bytes_per_s > Link.of("gloo").bytes_per_s


def test_a_variable_of_another_library_is_given_back(monkeypatch) -> None:
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    for before in (None, "0"):
        monkeypatch.delenv(name, raising=False) if before is None else monkeypatch.setenv(name, before)
        with env.lent(name, "1"):
            assert os.environ[name] == "1"
        assert os.environ.get(name) == before


def test_refusals() -> None:
    with pytest.raises(
        ProblemError, match=r"(?s)not initialised; call .*init_process_group.*timeout_s must be above 0, got 0"
    ):
        ContextParallel(timeout_s=0)


def test_the_error_travels_between_processes() -> None:
    error = DeadRankError((2,), "gather", 3.0, "Connection reset")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.ranks, str(copy)) == ((2,), str(error))
    assert "a rank that nobody can name" in str(DeadRankError((), "gather", 3.0, "x"))


class _Box:
    """Notes what is asked of a mailbox."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def stage(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[None, None]:
        return None, None

    def mail(self, limit_s: float) -> None:
        return None

    def exchange(self, out: torch.Tensor, lse: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        self.done.append("launch")
        return out, lse


def _ways(rank: int) -> list[list[str]]:
    """Of calls through peer memory, one after the other: eager, eager, captured; of another batch; with a sink."""
    ranks, found = ContextParallel(), []
    box = _Box()
    ranks._boxes[256, ()] = box  # type: ignore[assignment]

    def inside(q: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        box.done.append("inside")
        return torch.full((*q.shape[:3], 512), 7.0), torch.zeros(q.shape[0], q.shape[2], 1)

    module = sys.modules[ContextParallel.__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "decode_exchanged", inside)
        for batch, is_captured, sink in (
            (2, False, None), (2, False, None), (2, True, None), (3, False, None), (4, False, torch.zeros(4)),
        ):  # fmt: skip
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda is_captured=is_captured: is_captured)
            ranks._at = (("batch", batch),)
            q = torch.zeros(batch, 1, 4, 576, dtype=torch.bfloat16)
            pages = torch.zeros(batch, 64, 1, 576, dtype=torch.bfloat16)
            table = torch.arange(batch, dtype=torch.int32)[:, None]
            operands = (q, pages, table, torch.ones(batch, dtype=torch.int32))
            options = {"d_v": 512, "softmax_scale": 1.0, "kv_layout": None, "plan": None, "policy": "balanced"}
            out, _ = ranks._decode_directly((batch, 1, 4, 512), operands, sink, options | {"backend": None})
            assert (out == (7 if is_captured else 0)).all()
            found.append(list(box.done))
            box.done.clear()
    return found


def test_the_exchange_inside_the_decode_kernel_is_for_graphs_and_warmed_once() -> None:
    """So equal eager calls take one way, the first too, and have the same bits; a capture loads nothing."""
    (found,) = run_ranks(_ways, 1)
    assert found == [["inside", "launch"], ["launch"], ["inside"], ["inside", "launch"], ["launch"]]
