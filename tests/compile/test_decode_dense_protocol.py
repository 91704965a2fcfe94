"""The barrier protocol of decode_dense, run as a model: every role a coroutine, every interleaving random.

Counts, parities and slot arithmetic mirror kernel.py and two_loaders/kernel.py. A wrong one ends here as a deadlock or as a slot that holds
something else than its reader expects, instead of hanging a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Generator

import pytest

PIECES = 4


class Barrier:
    """An mbarrier: arrivals and bytes per phase."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, number: int = 1, expect: int = 0) -> None:
        self.pending -= number
        self.bytes += expect
        assert self.pending >= 0, "more arrivals than the barrier counts"
        self._flip()

    def complete(self, number: int) -> None:
        self.bytes -= number
        self._flip()

    def _flip(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def passed(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Cta:
    def __init__(self, rank: int, cluster: int, slots: int) -> None:
        self.rank, self.cluster = rank, cluster
        arrivals = 4 * cluster
        self.full = [Barrier(1) for _ in range(slots)]
        self.empty = [Barrier(arrivals) for _ in range(slots)]
        self.rope_full, self.rope_empty = Barrier(1), Barrier(arrivals)
        self.q_full, self.q_empty = Barrier(1), Barrier(4)
        self.p_full, self.p_empty = [Barrier(4) for _ in range(2)], [Barrier(8) for _ in range(2)]
        self.go = [Barrier(4) for _ in range(4)]
        self.sum_full, self.sum_empty = Barrier(4 * 8), Barrier(8)
        self.piece_full, self.piece_empty = [Barrier(1) for _ in range(PIECES)], [Barrier(15) for _ in range(PIECES)]
        self.share_full, self.share_empty = [Barrier(1) for _ in range(2)], [Barrier(8) for _ in range(2)]
        self.piece: list[int] = [0] * PIECES
        self.place: list[int] = [0] * PIECES  # of a piece's first tile in the ring; read where two warps load
        self.share: list[int] = [0] * 2
        self.merged: list[tuple[str, int]] = []
        self.ring: list[object] = [None] * slots
        self.rope: object = None
        self.q: object = None
        self.p: list[object] = [None, None]
        self.out: list[tuple[str, int]] = []


class Machine:
    loaders, slots, q_elements, is_late = 1, 10, 2, False

    def __init__(self, pieces: list[int], cluster: int, seed: int, is_capped: bool = False) -> None:
        self.is_capped = is_capped  # a soft cap stores P while it computes, so its place is waited for before the gates
        self.pieces, self.random = pieces, random.Random(seed)
        self.ctas = [Cta(rank, cluster, self.slots) for rank in range(cluster)]
        self.copies: list[tuple[Cta, str, int, object, int]] = []  # in flight
        self.cluster = cluster

    def run(self) -> None:
        roles = [
            role
            for c in self.ctas
            for role in (self.plan(c), *self.loads(c), self.scores(c), self.values(c, 0), self.values(c, 1))
        ]
        waiting = {role: next(role) for role in roles}
        while waiting:
            ready = [role for role, (barrier, parity) in waiting.items() if barrier.passed(parity)]
            choices = len(ready) + len(self.copies)
            assert choices, f"deadlock with {len(waiting)} roles waiting"
            pick = self.random.randrange(choices)
            if pick < len(ready):
                try:
                    waiting[ready[pick]] = next(ready[pick])
                except StopIteration:
                    del waiting[ready[pick]]
            else:
                self.land(self.copies.pop(pick - len(ready)))

    def land(self, copy: tuple[Cta, str, int, object, int]) -> None:
        cta, where, slot, tag, size = copy
        if where == "ring":
            cta.ring[slot] = tag
            cta.full[slot].complete(size)
        elif where == "rope":
            cta.rope = tag
            cta.rope_full.complete(size)
        else:
            cta.q = tag
            cta.q_full.complete(size)

    def release(self, name: str, slot: int | None = None) -> None:
        for cta in self.ctas:
            barrier = getattr(cta, name)
            (barrier if slot is None else barrier[slot]).arrive(4)

    Role = Generator[tuple[Barrier, int], None, None]

    def plan(self, c: Cta) -> Role:
        for count, tiles in enumerate([*self.pieces, -1]):
            index, before = count % PIECES, (count - 1) % PIECES
            yield c.piece_empty[index], (count // PIECES & 1) ^ 1
            c.place[index] = ((c.place[before] + 4 * c.piece[before] if count else 0) + self.q_elements) % self.slots
            c.piece[index] = tiles
            c.piece_full[index].arrive()
        for count, share in enumerate([*range(len(self.pieces) // 2), -1]):  # of the split ones; any number will do
            index = count % 2
            yield c.share_empty[index], (count // 2 & 1) ^ 1
            c.share[index] = share
            c.share_full[index].arrive()

    def each(self, c: Cta, arrivals: int, body) -> Role:
        piece = 0
        while True:
            yield c.piece_full[piece % PIECES], piece // PIECES & 1
            tiles = c.piece[piece % PIECES]
            if tiles < 0:
                return
            assert tiles == self.pieces[piece]
            yield from body(piece, tiles)
            if arrivals:
                c.piece_empty[piece % PIECES].arrive(arrivals)
            piece += 1

    def loads(self, c: Cta) -> tuple[Role, ...]:
        return self.load_kv(c, 0, 1), self.load_q(c), self.load_rope(c)

    def load_kv(self, c: Cta, side: int, sides: int) -> Role:
        at = [side]

        def fill(tag: object, shared: bool) -> Machine.Role:
            slot, phase = at[0] % self.slots, at[0] // self.slots & 1
            yield c.empty[slot], phase ^ 1
            c.full[slot].arrive(expect=2)
            if shared and self.cluster > 1:
                self.copies += [(cta, "ring", slot, tag, 1) for cta in self.ctas]
            else:
                self.copies += [(c, "ring", slot, tag, 1)] * 2
            at[0] += sides

        def body(piece: int, tiles: int) -> Machine.Role:
            # with an odd number of Q elements every piece begins with the other warp
            mine = (side + piece * self.q_elements) % sides
            for e in range(mine, self.q_elements, sides):
                yield from fill(("q", piece, e), False)
            lead = (mine + self.q_elements) % sides
            for j in range(tiles):
                for e in range(lead, 4, sides):
                    yield from fill((piece, j, e), True)

        yield from self.each(c, 1, body)

    def load_q(self, c: Cta) -> Role:
        def body(piece: int, tiles: int) -> Machine.Role:
            yield c.q_empty, (piece & 1) ^ 1
            c.q_full.arrive(expect=1)
            self.copies.append((c, "q", 0, piece, 1))

        yield from self.each(c, 1, body)

    def load_rope(self, c: Cta) -> Role:
        turn = [0]

        def body(piece: int, tiles: int) -> Machine.Role:
            if self.loaders == 2:
                yield c.q_empty, (piece & 1) ^ 1
                c.q_full.arrive(expect=1)
                self.copies.append((c, "q", 0, piece, 1))
            for j in range(tiles):
                yield c.rope_empty, (turn[0] & 1) ^ 1
                c.rope_full.arrive(expect=1)
                if turn[0] % self.cluster == c.rank:
                    self.copies += [(cta, "rope", 0, (piece, j), 1) for cta in self.ctas]
                turn[0] += 1

        yield from self.each(c, 1, body)

    def scores(self, c: Cta) -> Role:
        at, count = [0], [0]

        def store(tile: int) -> Machine.Role:
            yield c.p_empty[tile & 1], (tile >> 1 & 1) ^ 1
            c.p[tile & 1] = tile
            c.p_full[tile & 1].arrive(4)

        def left(tile: int) -> None:
            c.go[tile & 1].arrive(4)

        def right(tile: int) -> None:
            c.go[2 + (tile & 1)].arrive(4)

        def sums(piece: int) -> Machine.Role:
            yield c.sum_empty, (piece & 1) ^ 1
            c.sum_full.arrive(4 * 8)
            c.piece_empty[piece % PIECES].arrive(4)

        def body(piece: int, tiles: int) -> Machine.Role:
            for e in range(self.q_elements):
                slot, phase = at[0] % self.slots, at[0] // self.slots & 1
                yield c.full[slot], phase
                assert c.ring[slot] == ("q", piece, e)
                self.release("empty", slot)
                at[0] += 1
            for j in range(tiles):
                tile = count[0]
                for e in (0, 1, 2, -1, 3):
                    if e == (2 if self.q_elements == 2 else -1):  # the first that reads Q from shared memory
                        yield c.q_full, piece & 1
                        assert c.q == piece
                    if e < 0:
                        yield c.rope_full, tile & 1
                        assert c.rope == (piece, j)
                        continue
                    slot, phase = at[0] % self.slots, at[0] // self.slots & 1
                    yield c.full[slot], phase
                    assert c.ring[slot] == (piece, j, e)
                    at[0] += 1
                    if e == 0 and self.is_late:
                        yield from store(tile)
                if self.is_capped:
                    yield c.p_empty[(tile + 1) & 1], (tile + 1 >> 1 & 1) ^ 1
                left(tile)
                opens_late = self.is_capped and self.loaders == 2
                if not opens_late:
                    right(tile)
                self.release("rope_empty")
                if j == tiles - 1:
                    c.q_empty.arrive(4)
                if opens_late:  # others go on meanwhile
                    yield c.p_empty[(tile + 1) & 1], (tile + 1 >> 1 & 1) ^ 1
                    right(tile)
                if not self.is_late:
                    yield from store(tile + 1)
                count[0] += 1
            if self.is_late:
                following = piece + 1
                yield c.piece_full[following % PIECES], following // PIECES & 1
                if c.piece[following % PIECES] < 0:  # no scores follow behind whose first P would leave
                    yield from store(count[0])
                    left(count[0])
                    right(count[0])
            yield from sums(piece)

        if not self.is_late:
            c.p_full[0].arrive(4)  # tiles count from 1
        yield from self.each(c, 0, body)
        if count[0] and not self.is_late:
            left(count[0])
            right(count[0])

    def values(self, c: Cta, half: int) -> Role:
        slot, tile = [2 * half], [1]

        def body(piece: int, tiles: int) -> Machine.Role:
            if piece == 0:  # tile 0
                yield c.p_full[0], 0
                yield c.go[half * 2], 0
                c.p_empty[0].arrive(4)
            slot[0] = c.place[piece % PIECES] + 2 * half if self.loaders == 2 else slot[0] + self.q_elements
            for j in range(tiles):
                if slot[0] >= self.slots:
                    slot[0] -= self.slots
                slot1 = slot[0] + 1 if slot[0] + 1 < self.slots else 0
                buf, phase = tile[0] & 1, tile[0] >> 1 & 1
                yield c.p_full[buf], phase
                yield c.go[half * 2 + buf], phase
                assert c.p[buf] == tile[0]
                assert c.ring[slot[0]] == (piece, j, 2 * half)
                assert c.ring[slot1] == (piece, j, 2 * half + 1)
                self.release("empty", slot[0])
                c.p_empty[buf].arrive(4)
                self.release("empty", slot1)
                slot[0] += 4
                tile[0] += 1
            if slot[0] >= self.slots:
                slot[0] -= self.slots
            yield c.sum_full, piece & 1
            c.sum_empty.arrive(4)
            if self.loaders == 2:  # is there another piece?
                yield c.piece_full[(piece + 1) % PIECES], (piece + 1) // PIECES & 1
            c.out.append((str(half), piece))

        yield from self.each(c, 4, body)
        for turn in range(len(self.pieces) + 1):
            yield c.share_full[turn % 2], turn // 2 & 1
            if c.share[turn % 2] < 0:
                return
            c.merged.append((str(half), c.share[turn % 2]))
            c.share_empty[turn % 2].arrive(4)


class TwoLoaders(Machine):
    loaders, slots, q_elements, is_late = 2, 11, 3, True

    def loads(self, c: Cta) -> tuple[Machine.Role, ...]:
        return self.load_kv(c, 0, 2), self.load_kv(c, 1, 2), self.load_rope(c)


class Capped(TwoLoaders):
    """With a soft cap."""

    slots, q_elements, is_late = 10, 2, False


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("how", ["plain", "soft cap", "two loaders", "two loaders, soft cap"])
def test_every_interleaving_ends_with_every_piece_written(cluster: int, seed: int, how: str) -> None:
    dice = random.Random(seed)
    pieces = [dice.choice([1, 1, 2, 3, 5, 9]) for _ in range(dice.randrange(0, 9))]
    machine = {"plain": Machine, "soft cap": Machine, "two loaders": TwoLoaders}.get(how, Capped)(
        pieces, cluster, seed, "soft cap" in how
    )
    machine.run()
    for cta in machine.ctas:
        assert sorted(cta.out) == sorted((half, piece) for half in "01" for piece in range(len(pieces)))
        assert sorted(cta.merged) == sorted((half, share) for half in "01" for share in range(len(pieces) // 2))


def run_twenty(machine: type[Machine] = Machine) -> None:
    for seed in range(20):
        machine([3, 2, 5, 1, 4], 1, seed).run()


@pytest.mark.parametrize(
    ("machine", "name", "value"),
    [(Machine, "slots", 9), (Machine, "q_elements", 3), (TwoLoaders, "slots", 10), (Capped, "q_elements", 4)],
)
def test_a_ring_too_short_for_two_pieces_is_found(monkeypatch, machine, name, value) -> None:
    monkeypatch.setattr(machine, name, value)
    with pytest.raises(AssertionError, match="deadlock"):
        run_twenty(machine)


def test_a_descriptor_without_its_place_in_the_ring_is_found(monkeypatch) -> None:
    monkeypatch.setattr(
        Cta, "place", property(lambda self: [TwoLoaders.q_elements] * PIECES, lambda self, _: None), raising=False
    )
    with pytest.raises(AssertionError):
        run_twenty(TwoLoaders)


def test_a_slot_released_too_early_is_found(monkeypatch) -> None:
    # the scores warpgroup frees a quarter as soon as it has read it, before P V
    honest = Machine.scores

    def hasty(self: Machine, c: Cta) -> Machine.Role:
        for wait in honest(self, c):
            if wait[0] is c.rope_full:
                c.empty[0].pending = 0
                c.empty[0]._flip()
            yield wait

    monkeypatch.setattr(Machine, "scores", hasty)
    with pytest.raises(AssertionError):
        run_twenty()
