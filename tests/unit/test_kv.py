"""The paged KV cache: every token of every request is where the block table says, whatever happened before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from openmla.core.errors import ConfigError, OutOfPagesError, ProblemError
from openmla.kv.allocator import PageAllocator
from openmla.kv.cache import PagedKVCache

BYTE_LAYOUTS = ("fp8_656", "fp8_584", "fp8_528", "fp8_528_mx", "fp4_288")


class AllocatorAgainstDict(RuleBasedStateMachine):
    """Tokens are written into a simulated pool; a plain dict says what each request must read back."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(12, 4, reserved=1)
        self.pool: dict[int, int] = {}
        self.model: dict[int, list[int]] = {}
        self.next_id = 0

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    @rule(tokens=st.lists(st.integers(0, 1), max_size=20))
    def alloc(self, tokens: list[int]) -> None:
        request = self.new_id()
        found = self.allocator.alloc(request, tokens)
        assert found % 4 == 0
        assert found <= len(tokens)
        self.model[request] = list(tokens[:found])

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), max_size=14))
    def append(self, data: st.DataObject, tokens: list[int]) -> None:
        request = data.draw(st.sampled_from(sorted(self.model)))
        before = self.snapshot()
        needed = self.allocator.pages_needed({request: len(tokens)})
        if needed > self.available():
            with pytest.raises(OutOfPagesError) as caught:
                self.allocator.append(request, len(tokens))
            assert caught.value.requested == needed
            assert self.snapshot() == before
            return
        growth = self.allocator.append(request, len(tokens))
        assert before["available"] - self.available() == needed
        for source, target in growth.copies:
            for offset in range(4):
                if source * 4 + offset in self.pool:
                    self.pool[target * 4 + offset] = self.pool[source * 4 + offset]
        assert all(4 <= slot < 48 for slot in growth.slots), "a slot of the reserved page or outside of the pool"
        assert len(set(growth.slots)) == len(tokens) == len(growth.slots)
        self.pool.update(zip(growth.slots, tokens, strict=True))
        self.model[request] += tokens

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(sorted(self.model)))
        length = data.draw(st.none() | st.integers(0, len(self.model[parent])))
        available, child = self.available(), self.new_id()
        self.allocator.fork(parent, child, length)
        assert self.available() == available, "a fork takes no page"
        self.model[child] = self.model[parent][:length]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), keep=st.booleans())
    def free(self, data: st.DataObject, keep: bool) -> None:
        request = data.draw(st.sampled_from(sorted(self.model)))
        tokens = self.model.pop(request)
        self.allocator.free(request, tokens if keep else None)
        if keep:
            probe = self.new_id()
            assert self.allocator.alloc(probe, tokens) == len(tokens) // 4 * 4, "a kept prefix must be found again"
            assert [self.pool[slot] for slot in self.allocator.slots(probe)] == tokens[: len(tokens) // 4 * 4]
            self.allocator.free(probe)
        with pytest.raises(ProblemError, match="not allocated"):
            self.allocator.free(request)

    @rule(count=st.none() | st.integers(0, 5))
    def evict(self, count: int | None) -> None:
        evictable, free = self.allocator.num_evictable, self.allocator.num_free
        evicted = self.allocator.evict(count)
        assert evicted == (evictable if count is None else min(count, evictable))
        assert self.allocator.num_free == free + evicted

    @invariant()
    def every_token_reads_back(self) -> None:
        for request, tokens in self.model.items():
            assert [self.pool[slot] for slot in self.allocator.slots(request)] == tokens

    @invariant()
    def rules_hold(self) -> None:
        assert self.allocator.check_integrity() == ()
        assert set(self.allocator.requests) == set(self.model)
        held = {page for request in self.model for page in self.allocator.pages(request)}
        assert self.allocator.num_held == len(held)

    def available(self) -> int:
        return self.allocator.num_free + self.allocator.num_evictable

    def snapshot(self) -> dict[str, object]:
        pages = {request: self.allocator.pages(request) for request in self.model}
        return {"available": self.available(), "free": self.allocator.num_free, "pages": pages}


TestAllocator = AllocatorAgainstDict.TestCase
TestAllocator.settings = settings(
    max_examples=500, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_first_writer_copies_shared_partial_page() -> None:
    allocator = PageAllocator(8, 4)
    allocator.alloc("parent")
    allocator.append("parent", 6)
    allocator.fork("parent", "child")
    assert allocator.pages("parent") == allocator.pages("child")
    growth = allocator.append("child", 1)
    shared, own = allocator.pages("parent")[1], allocator.pages("child")[1]
    assert growth.copies == ((shared, own),)
    assert growth.slots == [own * 4 + 2]
    assert allocator.append("parent", 1).copies == (), "the page has one holder left, so no copy is needed"


def test_full_shared_page_is_not_copied() -> None:
    allocator = PageAllocator(8, 4)
    allocator.alloc("parent")
    allocator.append("parent", 4)
    allocator.fork("parent", "child")
    assert allocator.append("child", 1).copies == ()
    assert allocator.pages("child")[0] == allocator.pages("parent")[0]
    assert allocator.refs(allocator.pages("parent")[0]) == 2


def test_batch_need_counts_each_copy_once() -> None:
    """Of two holders of a partial page the first copies it and the second then writes in place."""
    allocator = PageAllocator(8, 4)
    allocator.alloc("a")
    allocator.append("a", 2)
    allocator.fork("a", "b")
    assert allocator.pages_needed({"a": 1, "b": 1}) == 1


def test_kept_page_that_changes_is_no_longer_found() -> None:
    """A fork that ends inside a page kept as full one may write there; the old prefix must not be found then."""
    allocator = PageAllocator(4, 4)
    allocator.alloc("a")
    allocator.append("a", 4)
    allocator.fork("a", "b", 2)
    allocator.free("a", [1, 2, 3, 4])
    assert allocator.append("b", 1).copies == ()
    assert allocator.alloc("c", [1, 2, 3, 4]) == 0
    assert allocator.check_integrity() == ()


def test_evicts_least_recently_freed_and_tail_first() -> None:
    allocator = PageAllocator(6, 2)
    old, new = [1, 2, 3, 4], [5, 6, 7, 8]
    for name, tokens in (("old", old), ("new", new)):
        allocator.alloc(name)
        allocator.append(name, 4)
        allocator.free(name, tokens)
    assert allocator.evict(1) == 1
    assert allocator.alloc("x", old) == 2, "the tail of the older request went first"
    assert allocator.alloc("y", new) == 4
    allocator.free("x")
    assert allocator.evict() == 1, "x gave its page back; y still holds both of its own"


def test_prefix_freed_twice_counts_as_just_used() -> None:
    allocator = PageAllocator(6, 2)
    for name in ("first", "twin", "other"):
        allocator.alloc(name)
        allocator.append(name, 2)
    allocator.free("first", [1, 1])
    allocator.free("other", [2, 2])
    allocator.free("twin", [1, 1])
    allocator.evict(1)
    assert allocator.alloc("x", [2, 2]) == 0
    assert allocator.alloc("y", [1, 1]) == 2


def test_append_evicts_only_when_nothing_is_free() -> None:
    allocator = PageAllocator(3, 2)
    allocator.alloc("a")
    allocator.append("a", 4)
    allocator.free("a", [1, 2, 3, 4])
    allocator.alloc("b")
    allocator.append("b", 2)
    assert allocator.num_evictable == 2
    allocator.append("b", 2)
    assert allocator.num_evictable == 1
    with pytest.raises(OutOfPagesError, match=r"asked for 2 page.*0 free and 1 evictable.*more pages"):
        allocator.append("b", 4)
    assert allocator.length("b") == 4


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda a: a.append("nobody", 1), "'nobody' is not allocated.*call alloc first"),
        (lambda a: a.alloc("a"), "'a' exists already; free it first"),
        (lambda a: a.append("a", -1), "at least 0, got -1"),
        (lambda a: a.fork("a", "a", 9), "(?s)exists already.*length must be 0 to 3"),
        (lambda a: a.slots("a", 2, 9), "need 0 <= begin <= end <= 3"),
        (lambda a: a.free("a", [1]), "tokens must be all 3 tokens of 'a', got 1"),
        (lambda a: a.refs(99), "page must be 0 to 3, got 99"),
        (lambda a: PageAllocator(0, 0, reserved=-1), "(?s)num_pages.*page_size.*reserved"),
    ],
)
def test_errors_say_rule_value_and_fix(act, sentence) -> None:
    allocator = PageAllocator(4, 2)
    allocator.alloc("a")
    allocator.append("a", 3)
    with pytest.raises(ProblemError, match=sentence):
        act(allocator)
    assert allocator.check_integrity() == ()
    assert allocator.pages("a") == (0, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda a: a._free.append(a._free[0]),
        lambda a: a._refs.__setitem__(0, 5),
        lambda a: a._holdings["a"].pages.append(3),
        lambda a: a._digest_of.clear(),
        lambda a: a._free.clear(),
    ],
)
def test_check_integrity_sees_damage(damage) -> None:
    allocator = PageAllocator(6, 2)
    allocator.alloc("kept")
    allocator.append("kept", 2)
    allocator.free("kept", [1, 2])
    allocator.alloc("a")
    allocator.append("a", 3)
    assert allocator.check_integrity() == ()
    damage(allocator)
    assert allocator.check_integrity() != ()


# The cache: tensors behind the allocator


@pytest.mark.parametrize("layout", ["bf16_576", "fp16_512", "fp32_576", *BYTE_LAYOUTS])
def test_rows_survive_append_fork_and_free(layout: str) -> None:
    """What `gather` returns depends on the rows only, never on pages, forks or neighbours."""
    cache = PagedKVCache(layout, num_pages=16, page_size=8, num_layers=2)
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(40, cache.layout.d_qk, generator=generator)
    plain = PagedKVCache(layout, num_pages=8, page_size=8)
    plain.alloc("all")
    plain.append(0, "all", rows)
    want = plain.gather(0, "all")  # the rows as this layout stores them

    cache.alloc("parent")
    for layer in range(2):
        cache.append(layer, "parent", rows[:11])
    cache.fork("parent", "child")
    cache.fork("parent", "short", 3)
    for layer in range(2):
        cache.append(layer, "child", rows[20:26])
    for layer in range(2):
        cache.append(layer, "parent", rows[11:20])
        cache.append(layer, "short", rows[30:31])
    assert cache.check_integrity() == ()
    for layer in range(2):
        torch.testing.assert_close(cache.gather(layer, "parent"), want[:20], rtol=0, atol=0)
        torch.testing.assert_close(cache.gather(layer, "child"), torch.cat([want[:11], want[20:26]]), rtol=0, atol=0)
        torch.testing.assert_close(cache.gather(layer, "short"), torch.cat([want[:3], want[30:31]]), rtol=0, atol=0)
    cache.free("parent")
    torch.testing.assert_close(cache.gather(1, "child"), torch.cat([want[:11], want[20:26]]), rtol=0, atol=0)


def test_extend_gives_room_to_all_or_none() -> None:
    cache = PagedKVCache("fp32_64", num_pages=3, page_size=4)
    cache.alloc("a")
    cache.alloc("b")
    with pytest.raises(OutOfPagesError):
        cache.extend(["a", "b"], [8, 5])
    assert cache.cache_seqlens(["a", "b"]).tolist() == [0, 0]
    slots = cache.extend(["a", "b"], [5, 2])
    assert slots.dtype == torch.int64
    rows = torch.arange(7.0)[:, None].expand(7, 64)
    cache.write(0, slots, rows)
    assert cache.gather(0, "b")[:, 0].tolist() == [5.0, 6.0]
    assert cache.block_table(["a", "b"]).tolist()[1][1] == 0
    assert cache.block_table(["a"], max_pages=5).shape == (1, 5)
    assert cache.block_table([]).shape == (0, 1)


def test_prefix_is_found_again_with_its_rows() -> None:
    cache = PagedKVCache("bf16_64", num_pages=8, page_size=4, num_layers=2)
    tokens = list(range(10))
    rows = torch.randn(10, 64).bfloat16()
    cache.alloc("first")
    for layer in range(2):
        cache.append(layer, "first", rows)
    cache.free("first", tokens)
    assert cache.alloc("second", [*tokens[:9], 77]) == 8
    assert torch.equal(cache.gather(1, "second"), rows[:8])
    cache.free("second")
    assert cache.evict() == 2
    assert cache.alloc("third", tokens) == 0


def test_cache_refuses_what_would_corrupt_it() -> None:
    cache = PagedKVCache("fp32_64", num_pages=4, page_size=4, num_layers=2)
    cache.alloc("a")
    cache.append(0, "a", torch.zeros(3, 64))
    with pytest.raises(ProblemError, match="must be written in every layer, but layer 1 holds 0"):
        cache.fork("a", "b")
    with pytest.raises(ProblemError, match="not written in every layer"):
        cache.free("a", [1, 2, 3])
    assert "layer 1 holds 0 of 3" in cache.check_integrity()[0]
    with pytest.raises(ProblemError, match=r"rows must be \[n, 64\], got \(3, 65\)"):
        cache.append(1, "a", torch.zeros(3, 65))
    with pytest.raises(ProblemError, match=r"rows must be \[n, d_qk\] = \[2, 64\]"):
        cache.write(0, torch.tensor([0, 1]), torch.zeros(3, 64))
    with pytest.raises(ProblemError, match="layer must be 0 to 1, got 2"):
        cache.append(2, "a", torch.zeros(1, 64))
    with pytest.raises(ProblemError, match="named once per call"):
        cache.extend(["a", "a"], [1, 1])
    with pytest.raises(ProblemError, match="max_pages=0 is too small"):
        cache.block_table(["a"], max_pages=0)
    with pytest.raises(ProblemError, match="num_layers must be at least 1"):
        PagedKVCache("fp32_64", 4, num_layers=0)
    with pytest.raises(ConfigError, match="unknown KV layout"):
        PagedKVCache("fp8", 4)
    with pytest.raises(ProblemError, match="not allocated"):
        cache.free("nobody", [1])
    assert cache.cache_seqlens(["a"]).tolist() == [3]
