"""The barrier protocol of decode_sparse, run as a model: every role a coroutine, every interleaving random.

Counts, parities and slot arithmetic mirror kernel.py. A wrong one ends here as a deadlock or as a unit that holds
something else than its reader expects, instead of hanging a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Generator

import pytest

PIECES, TILES_IN_RING, AHEAD, VALID = 8, 2, 3, 4
ORDER = (0, 2, 1, 3)
WARPS = 4


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


Role = Generator[tuple[Barrier, int], None, None]


class Machine:
    """One CTA."""

    def __init__(self, pieces: list[int], seed: int, rope: str = "own slice") -> None:
        self.has_rope, self.rope_in_ring = rope == "own slice", rope == "ring"
        self.pieces, self.random = pieces, random.Random(seed)
        units = 4 * TILES_IN_RING
        self.full, self.empty = ([Barrier(4) for _ in range(units)] for _ in range(2))
        self.rope_full, self.rope_empty = Barrier(4), Barrier(4)
        self.q_full, self.q_empty = Barrier(1), Barrier(4)
        self.p_full, self.p_empty = [Barrier(4) for _ in range(2)], [Barrier(8) for _ in range(2)]
        self.go = [Barrier(4) for _ in range(5)]
        self.sum_full, self.sum_empty = Barrier(4 * 8), Barrier(8)
        self.piece_full, self.piece_empty = [Barrier(1) for _ in range(PIECES)], [Barrier(15) for _ in range(PIECES)]
        self.piece: list[int] = [0] * PIECES
        self.ring: list[list[object]] = [[None] * WARPS for _ in range(units)]  # unit, warp's keys
        self.valid: list[list[object]] = [[None] * WARPS for _ in range(VALID)]
        self.rope: list[object] = [None] * WARPS
        self.q: object = None
        self.p: list[object] = [None, None]
        self.sums: object = None
        self.copies: list[object] = []  # of Q, in flight
        self.out: list[tuple[int, int]] = []

    def run(self) -> None:
        roles = [self.produce(w) for w in range(WARPS)] + [self.scores(), self.values(0), self.values(1)]
        waiting = {}
        for role in roles:
            waiting[role] = next(role)
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
                self.q = self.copies.pop(pick - len(ready))
                self.q_full.complete(1)

    def next_piece(self, piece: int, found: list[int]) -> Role:
        yield self.piece_full[piece % PIECES], piece // PIECES & 1
        tiles = self.piece[piece % PIECES]
        assert tiles == (self.pieces[piece] if piece < len(self.pieces) else -1), "a descriptor was overwritten"
        found[:] = [tiles]

    def describe(self, piece: int) -> Role:
        yield self.piece_empty[piece % PIECES], (piece // PIECES & 1) ^ 1
        self.piece[piece % PIECES] = self.pieces[piece] if piece < len(self.pieces) else -1
        self.piece_full[piece % PIECES].arrive()

    def load_q(self, piece: int) -> Role:
        yield self.q_empty, (piece & 1) ^ 1
        self.q_full.arrive(expect=1)
        self.copies.append(piece)

    def produce(self, warp: int) -> Role:
        lead, tiles, at_tiles = warp == 0, [0], [0]
        if lead:
            for first in range(AHEAD):
                yield from self.describe(first)
        yield from self.next_piece(0, tiles)
        if lead and tiles[0] > 0:
            yield from self.load_q(0)
        at = [0, 0]  # piece, tile of the index that is read next

        def next_index() -> Role:
            if at[1] == 0:
                yield from self.next_piece(at[0], at_tiles)
            if at_tiles[0] > 0:
                assert self.piece[at[0] % PIECES] == at_tiles[0], "a descriptor was overwritten"
                found.append((at[0], at[1]))
                at[1] += 1
                if at[1] == at_tiles[0]:
                    at[:] = [at[0] + 1, 0]
            else:
                found.append(None)

        found: list[object] = []
        for _ in range(AHEAD):
            yield from next_index()
        self.valid[0][warp] = found[0]
        turn = piece = 0
        while tiles[0] > 0:
            if lead:
                yield from self.describe(piece + AHEAD)
            for tile in range(tiles[0]):
                assert found[turn] == (piece, tile)
                yield from next_index()
                base, phase = 4 * (turn % TILES_IN_RING), (turn // TILES_IN_RING & 1) ^ 1
                for p in range(4):
                    unit = base + ORDER[p]
                    yield self.empty[unit], phase
                    if p == 2:
                        if self.has_rope:
                            yield self.rope_empty, (turn & 1) ^ 1
                            self.rope[warp] = (piece, tile)
                        if self.rope_in_ring:  # the second half of unit 3
                            yield self.empty[base + 3], phase
                        self.valid[(turn + 1) % VALID][warp] = found[turn + 1]
                    self.ring[unit][warp] = (piece, tile, ORDER[p])
                    if p == 3 and self.has_rope:
                        self.rope_full.arrive()
                    self.full[unit].arrive()
                turn += 1
            if not lead:
                self.piece_empty[piece % PIECES].arrive()
            piece += 1
            yield from self.next_piece(piece, tiles)
            if lead and tiles[0] > 0:
                yield from self.load_q(piece)

    def scores(self) -> Role:
        count = piece = 0
        tiles = [0]
        yield from self.next_piece(0, tiles)
        while tiles[0] > 0:
            yield self.q_full, piece & 1
            for tile in range(tiles[0]):
                base, phase = 4 * (count % TILES_IN_RING), count // TILES_IN_RING & 1
                for e in ORDER:
                    yield self.full[base + e], phase
                    assert self.ring[base + e] == [(piece, tile, e)] * WARPS
                    if e == 0:
                        assert self.valid[count % VALID] == [(piece, tile)] * WARPS
                if self.has_rope:
                    yield self.rope_full, count & 1
                    assert self.rope == [(piece, tile)] * WARPS
                before = (count & 1) ^ 1
                self.go[before if tile else 4].arrive(4)
                yield self.full[base], phase  # the products run
                assert self.q == piece and (not self.has_rope or self.rope == [(piece, tile)] * WARPS)
                assert all(self.ring[base + e] == [(piece, tile, e)] * WARPS for e in ORDER)
                self.go[before + 2 if tile else 4].arrive(4)
                if self.has_rope:
                    self.rope_empty.arrive(4)
                if tile + 1 == tiles[0]:
                    self.q_empty.arrive(4)
                buf = count & 1
                yield self.p_empty[buf], (count >> 1 & 1) ^ 1
                self.p[buf] = (piece, tile)
                self.p_full[buf].arrive(4)
                if tile + 1 == tiles[0]:
                    self.go[buf].arrive(4)
                    self.go[2 + buf].arrive(4)
                count += 1
            yield self.sum_empty, (piece & 1) ^ 1
            self.sums = piece
            self.sum_full.arrive(4 * 8)
            self.piece_empty[piece % PIECES].arrive(4)
            piece += 1
            yield from self.next_piece(piece, tiles)

    def values(self, half: int) -> Role:
        count = piece = 0
        tiles = [0]
        yield from self.next_piece(0, tiles)
        while tiles[0] > 0:
            for tile in range(tiles[0]):
                buf, phase = count & 1, count >> 1 & 1
                unit = 4 * (count % TILES_IN_RING) + 2 * half
                yield self.p_full[buf], phase
                yield self.go[half * 2 + buf], phase
                for each in (0, 1):
                    assert self.ring[unit + each] == [(piece, tile, 2 * half + each)] * WARPS
                yield self.go[half * 2 + buf], phase  # the products run
                assert self.p[buf] == (piece, tile)
                assert self.ring[unit] == [(piece, tile, 2 * half)] * WARPS
                self.empty[unit].arrive(4)
                yield self.go[half * 2 + buf], phase
                assert self.ring[unit + 1] == [(piece, tile, 2 * half + 1)] * WARPS
                self.p_empty[buf].arrive(4)
                self.empty[unit + 1].arrive(4)
                count += 1
            yield self.sum_full, piece & 1
            assert self.sums == piece
            self.sum_empty.arrive(4)
            self.out.append((half, piece))
            self.piece_empty[piece % PIECES].arrive(4)
            piece += 1
            yield from self.next_piece(piece, tiles)


@pytest.mark.parametrize("rope", ["own slice", "ring", "none"])
@pytest.mark.parametrize("seed", range(30))
def test_every_interleaving_ends_with_every_piece_written(seed: int, rope: str) -> None:
    dice = random.Random(seed)
    pieces = [dice.choice([1, 1, 2, 3, 5, 9]) for _ in range(dice.randrange(0, 24))]
    machine = Machine(pieces, seed, rope)
    machine.run()
    assert sorted(machine.out) == sorted((half, piece) for half in (0, 1) for piece in range(len(pieces)))


def run_twenty() -> None:
    for seed in range(20):
        Machine([1, 1, 1, 2, 1, 1, 1, 5, 1, 4, 1, 1, 1, 1], seed, "own slice" if seed % 2 else "none").run()


@pytest.mark.parametrize(("name", "value"), [("PIECES", 3), ("VALID", 1), ("TILES_IN_RING", 1)])
def test_a_ring_too_short_is_found(monkeypatch, name, value) -> None:
    monkeypatch.setattr(f"{__name__}.{name}", value)
    with pytest.raises(AssertionError):
        run_twenty()


def test_a_unit_released_before_its_values_are_read_is_found(monkeypatch) -> None:
    honest = Machine.values

    def hasty(self: Machine, half: int) -> Role:
        for wait in honest(self, half):
            if wait[0] in self.p_full:
                for unit in (0, 1):
                    if self.empty[unit].pending == 4 and self.empty[unit].phase % 2 == 0:
                        self.empty[unit].phase += 1
            yield wait

    monkeypatch.setattr(Machine, "values", hasty)
    with pytest.raises(AssertionError):
        run_twenty()


def test_a_gate_that_a_piece_forgets_is_found(monkeypatch) -> None:
    # the last tile of a piece waits for scores that only come when it is done
    honest = Barrier.arrive

    def forgetful(self: Barrier, number: int = 1, expect: int = 0) -> None:
        if getattr(self, "forgets", False) and self.phase == 1:
            return
        honest(self, number, expect)

    monkeypatch.setattr(Barrier, "arrive", forgetful)
    machine = Machine([1, 2, 1], 0)
    machine.go[0].forgets = True
    with pytest.raises(AssertionError, match="deadlock"):
        machine.run()
