"""Several CTAs of one launch side by side: what `ptx_machine` needs beyond itself for a kernel whose CTAs wait for each other.

All warps of all CTAs take turns in random order, so a partial that nobody stores is a deadlock here too. Also here: named
barriers, 16-byte loads and stores in one piece, boxes of five modes, transposed operands and stores, lanes that return alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from ptx_lanes import Warp
from ptx_machine import Cta, Deadlock
from ptx_program import ALL, LANES, TYPES, Memory, Program, from_bf16, swizzle

GONE = 1 << 40  # the place of lanes that have returned
RANK_BIT = 24  # an address in a cluster: place in shared memory, and from this bit on rank + 1
TOGETHER = (
    "shfl",
    "vote",
    "elect",
    "bar",
    "redux",
    "ldmatrix",
    "mma",
)  # instructions that all lanes of a warp execute at once


class GridCta(Cta):
    """One CTA of a grid."""

    def begin(self, block: tuple[int, int, int], seed: int) -> None:
        """As in Cta; nobody stands at a barrier."""
        super().begin(block, seed)
        self.places: dict[int, int] = {}  # warp -> named barrier
        self.cluster: list[GridCta] = [self]
        self.cluster_phase = [
            0,
            0,
        ]  # arrivals of this CTA's warps at the cluster's barrier, and phases that they wait for

    # ------------------------------------------------------------------ control

    def turn(self, warp: Warp) -> None:
        """As in Cta, but lanes wait at a .sync instruction for those that are elsewhere, wherever the code of those lies."""
        code = self.program.statements
        for _ in range(4000):
            if warp.is_done or warp.waits_at_barrier:
                return
            where = int(warp.pc[0])
            mask = warp.pc == where
            if mask.all():
                mask = ALL
            else:
                places = [int(place) for place in np.unique(warp.pc)]
                where = next((x for x in places if x < len(code) and not code[x][1].startswith(TOGETHER)), places[0])
                mask = warp.pc == where
            if self.issue(warp, mask, where):
                return

    def do_griddepcontrol(self, parts: list[str], operands: list[str]) -> Any:
        return self._ignore(parts, operands)

    def do_bar(self, parts: list[str], operands: list[str]) -> Any:
        if parts[1] == "warp":
            return super().do_bar(parts, operands)
        name, count = int(operands[0]), (int(operands[1]) if len(operands) > 1 else self.threads) // 32

        def wait(warp: Warp, mask: np.ndarray) -> bool:
            assert mask.all(), "bar.sync of lanes that are elsewhere"
            self.places[warp.index] = name
            here = [index for index, place in self.places.items() if place == name]
            assert len(here) <= count, "more warps at a barrier than it counts"
            if len(here) < count:
                warp.waits_at_barrier = True
                return True
            for index in here:
                del self.places[index]
                if index != warp.index:
                    self.warps[index].waits_at_barrier = False
                    self.warps[index].pc += 1
            return False

        return wait

    def do_ret(self, parts: list[str], operands: list[str]) -> Any:
        def run(warp: Warp, mask: np.ndarray) -> bool:
            warp.pc[mask] = GONE
            warp.is_done = bool((warp.pc >= GONE).all())
            return warp.is_done

        return run

    def compile(self, guard: str, opcode: str, operands: list[str]) -> Any:
        step = super().compile(guard, opcode, operands)
        if opcode != "ret":
            return step

        def leave(warp: Warp, mask: np.ndarray, where: int) -> bool:
            pause = step(warp, mask, where)
            warp.pc[mask] = GONE
            return pause

        return leave

    # ------------------------------------------------------------------ clusters

    def do_mapa(self, p: list[str], o: list[str]) -> Any:
        write, where, rank = self.writer(o[0]), self.reader(o[1], "u32"), self.reader(o[2], "u32")
        return lambda warp, mask: write(warp, mask, where(warp) | (rank(warp) + np.uint32(1) << np.uint32(RANK_BIT)))

    def there(self, address: int) -> tuple[GridCta, int]:
        """The CTA of the cluster that an address lies in, and the place in its shared memory."""
        cta = self.cluster[(address >> RANK_BIT) - 1] if address >> RANK_BIT else self
        assert any(not warp.is_done for warp in cta.warps), "the other CTA has left"
        return cta, address & (1 << RANK_BIT) - 1

    def do_barrier(self, p: list[str], o: list[str]) -> Any:
        assert p[1] == "cluster", p

        def arrive(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all(), "barrier.cluster of lanes that are elsewhere"
            self.cluster_phase[0] += 1

        def wait(warp: Warp, mask: np.ndarray) -> bool:
            done = all(cta.cluster_phase[0] >= len(cta.warps) for cta in self.cluster)  # one phase in a launch
            return not done

        return arrive if p[2] == "arrive" else wait

    def send(self, p: list[str], o: list[str]) -> Any:
        """st.async: bytes into the shared memory of a CTA of the cluster, counted by a barrier there."""
        where, reads, barrier = (
            self.address(o[0]),
            [self.reader(x, "u32") for x in self.vector(o[1])],
            self.address(o[2]),
        )

        def run(warp: Warp, mask: np.ndarray) -> None:
            for lane in np.flatnonzero(mask):
                (cta, place), (other, counted) = (
                    self.there(int(where(warp)[lane])),
                    self.there(int(barrier(warp)[lane])),
                )
                assert cta is other, "bytes here, their barrier there"
                content = np.array([read(warp)[lane] for read in reads], np.uint32).view(np.uint8)[None]
                assert place % content.size == 0, "not aligned"
                cta.store("shared", np.array([place]), content)
                cta.barriers[counted].bytes -= content.size
                cta.barriers[counted].flip()

        return run

    def do_mbarrier(self, p: list[str], o: list[str]) -> Any:
        if "shared::cluster" not in p:
            return super().do_mbarrier(p, o)
        assert p[1] == "arrive", p
        where = self.address(o[1])

        def arrive(warp: Warp, mask: np.ndarray) -> None:
            for lane in np.flatnonzero(mask):
                cta, place = self.there(int(where(warp)[lane]))
                cta.barriers[place].arrive()

        return arrive

    # ------------------------------------------------------------------ lanes

    def do_shfl(self, p: list[str], o: list[str]) -> Any:
        write, value = self.writer(o[0]), self.reader(o[1], "u32")
        by, clamp = self.reader(o[2], "u32"), self.reader(o[3], "u32")

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all(), "shfl.sync of lanes that are elsewhere"
            segment = clamp(warp) >> 8 & 31
            source = (LANES & segment) | (by(warp) & 31 & ~segment)
            if p[2] == "bfly":
                source = LANES ^ by(warp)
            if p[2] == "up":
                below = LANES.astype(np.int64) - by(warp)
                source = np.where(below < 0, LANES, below)
            write(warp, mask, value(warp)[source.astype(np.int64)])

        return run

    def do_elect(self, p: list[str], o: list[str]) -> Any:
        write = self.writer(o[0].split("|")[1])
        return lambda warp, mask: write(warp, mask, int(np.flatnonzero(mask)[0]) == LANES)

    def do_abs(self, p: list[str], o: list[str]) -> Any:
        return self._map(o, "f32", "f32", np.abs)

    def do_redux(self, p: list[str], o: list[str]) -> Any:
        assert p[2] in ("max", "add"), p
        write, value, total = self.writer(o[0]), self.reader(o[1], p[-1]), {"max": np.max, "add": np.sum}[p[2]]

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all(), "redux.sync of lanes that are elsewhere"
            write(warp, mask, np.full(32, total(value(warp)), TYPES[p[-1]]))

        return run

    def do_popc(self, p: list[str], o: list[str]) -> Any:
        return self._map(o, "u32", "u32", np.bitwise_count)

    def do_clz(self, p: list[str], o: list[str]) -> Any:
        return self._map(o, "u32", "u32", np.vectorize(lambda x: 32 - int(x).bit_length(), otypes=[np.uint32]))

    def do_prmt(self, p: list[str], o: list[str]) -> Any:
        write, a, b, how = (
            self.writer(o[0]),
            self.reader(o[1], "u32"),
            self.reader(o[2], "u32"),
            self.reader(o[3], "u32"),
        )

        def run(warp: Warp, mask: np.ndarray) -> None:
            both = a(warp).astype(np.uint64) | b(warp).astype(np.uint64) << np.uint64(32)
            found = np.zeros(32, np.uint64)
            for i in range(4):
                chosen = how(warp) >> (4 * i) & 15
                assert (chosen < 8).all(), "prmt that repeats signs"
                byte = both >> (chosen.astype(np.uint64) * np.uint64(8)) & np.uint64(255)
                found |= byte << np.uint64(8 * i)
            write(warp, mask, found.astype(np.uint32))

        return run

    def do_cvt(self, p: list[str], o: list[str]) -> Any:
        if p[-2] != "f16x2" or p[-1] != "f32":
            return super().do_cvt(p, o)
        write, high, low = self.writer(o[0]), self.reader(o[1], "f32"), self.reader(o[2], "f32")

        def run(warp: Warp, mask: np.ndarray) -> None:
            both = np.stack([low(warp), high(warp)], -1).astype(np.float16)
            write(warp, mask, np.ascontiguousarray(both).view(np.uint32).reshape(32))

        return run

    # ------------------------------------------------------------------ memory

    def address(self, operand: str) -> Any:
        match = re.fullmatch(r"\[\s*([\w%$.@]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        assert match, operand
        is_wide, offset = "rd" in match[1] or not match[1].startswith("%r"), int(match[2] or 0)
        base = self.reader(match[1], "u64" if is_wide else "u32")
        if is_wide:
            return lambda warp: base(warp).astype(np.int64) + offset
        return lambda warp: base(warp).astype(np.int64) + offset & 0xFFFFFFFF

    def do_mov(self, parts: list[str], o: list[str]) -> Any:
        if parts[1] != "b128":
            return super().do_mov(parts, o)
        if o[0].startswith("{"):
            writes = [self.writer(name) for name in self.vector(o[0])]

            def split(warp: Warp, mask: np.ndarray) -> None:
                for half, write in enumerate(writes):
                    write(warp, mask, warp.registers[o[1]][half].copy())

            return split
        reads = [self.reader(name, "u64") for name in self.vector(o[1])]

        def join(warp: Warp, mask: np.ndarray) -> None:
            warp.registers[o[0]] = np.stack([read(warp) for read in reads])

        return join

    def do_ld(self, p: list[str], o: list[str]) -> Any:
        if not {"relaxed", "acquire"} & set(p):
            return super().do_ld(p, o)
        where = self.address(o[1])
        narrow = super().do_ld(p, o) if p[-1] != "b128" else None

        def read(warp: Warp, mask: np.ndarray) -> None:
            if narrow:
                narrow(warp, mask)
            else:
                found = np.ascontiguousarray(self.fetch("global", where(warp)[mask], 16)).view(np.uint64)
                both = warp.registers[o[0]].copy()
                both[:, mask] = found.reshape(-1, 2).T
                warp.registers[o[0]] = both
            warp.registers["polling"] = LANES  # a loop around it gives way

        return read

    def do_st(self, p: list[str], o: list[str]) -> Any:
        if p[1] == "async":
            return self.send(p, o)
        if p[-1] != "b128":
            return super().do_st(p, o)
        where = self.address(o[0])

        def write(warp: Warp, mask: np.ndarray) -> None:
            content = np.ascontiguousarray(warp.registers[o[1]].T[mask]).view(np.uint8)
            self.store("global", where(warp)[mask], content.reshape(-1, 16))

        return write

    def do_cp(self, p: list[str], o: list[str]) -> Any:
        if "commit_group" in p:
            return self._ignore(p, o)
        if "mbarrier" in p:
            return self._arrive_behind_copies(p, o)
        if "bulk" in p and not {"tensor", "prefetch"} & set(p):
            return self._stretch(o)
        return super().do_cp(["cp", "async", "wait_all"] if "wait_group" in p else p, o)

    def _arrive_behind_copies(self, p: list[str], o: list[str]) -> Any:
        """An arrival per lane once its copies have landed, which is at once."""
        assert "noinc" in p, "the count does not include these arrivals"
        land, where = super().do_cp(["cp", "async", "wait_all"], o), self.address(o[0])

        def run(warp: Warp, mask: np.ndarray) -> None:
            land(warp, mask)
            for lane in np.flatnonzero(mask):
                self.barriers[int(where(warp)[lane])].arrive()

        return run

    def do_atom(self, p: list[str], o: list[str]) -> Any:
        if "inc" not in p:
            return super().do_atom(p, o)
        where, most, write = self.address(o[1]), self.reader(o[2], "u32"), self.writer(o[0])

        def run(warp: Warp, mask: np.ndarray) -> None:
            old = np.zeros(32, np.uint32)
            for lane in np.flatnonzero(mask):
                place = where(warp)[lane : lane + 1]
                old[lane] = self.fetch("global", place, 4).view(np.uint32)[0, 0]
                new = 0 if old[lane] >= most(warp)[lane] else old[lane] + 1
                self.store("global", place, np.array([[new]], np.uint32).view(np.uint8))
            write(warp, mask, old)

        return run

    def do_ldmatrix(self, p: list[str], o: list[str]) -> Any:
        where, writes = self.address(o[1]), [self.writer(x) for x in self.vector(o[0])]

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all(), "ldmatrix of lanes that are elsewhere"
            for matrix, write in enumerate(writes):
                rows = self.fetch("shared", where(warp)[8 * matrix : 8 * matrix + 8], 16)
                if "trans" in p:
                    rows = np.ascontiguousarray(rows).view(np.uint16).reshape(8, 8).T
                write(warp, mask, np.ascontiguousarray(rows).view(np.uint32).reshape(32).copy())

        return run

    def do_stmatrix(self, p: list[str], o: list[str]) -> Any:
        where, reads = self.address(o[0]), [self.reader(x, "u32") for x in self.vector(o[1])]

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all(), "stmatrix of lanes that are elsewhere"
            for matrix, read in enumerate(reads):
                content = np.ascontiguousarray(read(warp)).view(np.uint16).reshape(8, 8)
                content = np.ascontiguousarray(content.T if "trans" in p else content)
                self.store("shared", where(warp)[8 * matrix : 8 * matrix + 8], content.view(np.uint8))

        return run

    def _stretch(self, o: list[str]) -> Any:
        to, source, size, barrier = self.address(o[0]), self.address(o[1]), self.reader(o[2], "u32"), self.address(o[3])

        def run(warp: Warp, mask: np.ndarray) -> None:
            for lane in np.flatnonzero(mask):
                count = int(size(warp)[lane])
                assert count % 16 == 0, "copies move multiples of 16 bytes"
                self.store(
                    "shared", to(warp)[lane : lane + 1], self.fetch("global", source(warp)[lane : lane + 1], count)
                )
                done = self.barriers[int(barrier(warp)[lane])]
                done.bytes -= count
                done.flip()

        return run

    def _box(self, o: list[str]) -> Any:
        to, barrier = self.address(o[0]), self.address(o[2])
        match = re.fullmatch(r"\[\s*([\w%]+)\s*,\s*\{(.*)\}\s*\]", o[1])
        assert match
        which = self.reader(match[1], "u64")
        coordinates = [self.reader(x.strip(), "s32") for x in match[2].split(",")]

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.sum() == 1, "more than one lane starts a copy"
            lane = int(np.flatnonzero(mask)[0])
            of = self.params[self.program.params[int(which(warp)[lane])]]
            start = [int(x(warp)[lane]) for x in coordinates]
            box = [*of.box, *[1] * (len(start) - len(of.box))]
            content = np.zeros((*box[:0:-1], box[0] * 2), np.uint8)
            for place in np.ndindex(*box[:0:-1]):
                at = [start[0], *(start[d] + place[len(box) - 1 - d] for d in range(1, len(box)))]
                if all(0 <= x < extent for x, extent in zip(at, of.extents, strict=True)):
                    begin = of.address + sum(x * step for x, step in zip(at, of.strides, strict=True))
                    content[place] = self.fetch("global", np.array([begin]), box[0] * 2)[0]
            self.shared[swizzle(int(to(warp)[lane]) + np.arange(content.size))] = content.reshape(-1)
            done = self.barriers[int(barrier(warp)[lane])]
            done.bytes -= content.size
            done.flip()

        return run

    # ------------------------------------------------------------------ tensor cores

    def do_wgmma(self, p: list[str], o: list[str]) -> Any:
        if p[1] in ("fence", "commit_group", "wait_group"):
            return super().do_wgmma(p, o)
        n = int(re.search(r"m64n(\d+)k16", ".".join(p))[1])  # type: ignore[index]
        names, scale = self.vector(o[0]), self.predicate(o[3])
        held = (
            [self.reader(x, "u32") for x in self.vector(o[1])] if o[1].startswith("{") else []
        )  # a left side in registers
        sides = [] if held else [(self.reader(o[1], "u64"), o[6] == "1")]
        sides += [(self.reader(o[2], "u64"), o[-1] == "1")]

        def operand(descriptor: int, index: np.ndarray, is_transposed: bool) -> np.ndarray:
            start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
            assert descriptor >> 62 == 1, "not the 128-byte swizzle"
            k, i = np.arange(16)[None], index[:, None]
            if is_transposed:
                return swizzle(start + i // 64 * leading + i % 64 * 2 + k // 8 * stride + k % 8 * 128)
            return swizzle(start + i // 8 * stride + i % 8 * 128 + k * 2)

        def numbers(bits: np.ndarray) -> np.ndarray:
            return bits.view(np.float16).astype(np.float32) if "f16" in p else from_bf16(bits)

        def fragment(warp: Warp) -> np.ndarray:
            left = np.zeros((16, 16), np.float32)
            for x, read in enumerate(held):
                pair = np.ascontiguousarray(read(warp)).view(np.uint16).reshape(32, 2)
                for side in range(2):
                    column = LANES % 4 * 2 + side + 8 * (x // 2)
                    left[LANES // 4 + 8 * (x % 2), column] = numbers(np.ascontiguousarray(pair[:, side]))
            return left

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all(), "wgmma of lanes that are elsewhere"
            values = [fragment(warp)] if held else []
            rows = [] if held else [np.arange(16) + 16 * (warp.index % 4)]
            for (descriptor, is_transposed), index in zip(sides, (*rows, np.arange(n)), strict=True):
                both = operand(int(descriptor(warp)[0]), index, is_transposed)
                both = np.stack([both, both + 1], -1)
                content = self.shared[both]
                warp.groups[-1].append((both, content))
                bits = content.reshape(-1, 2).copy().view(np.uint16).reshape(both.shape[:2])
                values.append(numbers(bits))
            product, adds = values[0] @ values[1].T, scale(warp)[0]
            for x, name in enumerate(names):
                row, column = LANES // 4 + 8 * (x // 2 % 2), x // 4 * 8 + LANES % 4 * 2 + x % 2
                old = warp.registers[name].view(np.float32) if adds else np.float32(0)
                warp.registers[name] = (old + product[row, column]).astype(np.float32).view(np.uint32)

        return run

    def do_mma(self, p: list[str], o: list[str]) -> Any:
        """m16n8k16 of one warp: 16 bits times 16 bits, sums in fp32."""
        assert "m16n8k16" in p, p
        names = self.vector(o[0])
        a, b, c = ([self.reader(x, "u32") for x in self.vector(each)] for each in o[1:])

        def numbers(warp: Warp, read: Any) -> np.ndarray:
            bits = np.ascontiguousarray(read(warp)).view(np.uint16)
            return (bits.view(np.float16).astype(np.float32) if "f16" in p else from_bf16(bits)).reshape(32, 2)

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all(), "mma of lanes that are elsewhere"
            left, right = np.zeros((16, 16), np.float32), np.zeros((8, 16), np.float32)
            for side in range(2):
                for x, read in enumerate(a):
                    left[LANES // 4 + 8 * (x % 2), LANES % 4 * 2 + side + 8 * (x // 2)] = numbers(warp, read)[:, side]
                for x, read in enumerate(b):
                    right[LANES // 4, LANES % 4 * 2 + side + 8 * x] = numbers(warp, read)[:, side]
            product = left @ right.T
            for x, (name, old) in enumerate(zip(names, c, strict=True)):
                before = np.ascontiguousarray(old(warp)).view(np.float32)
                found = product[LANES // 4 + 8 * (x // 2), LANES % 4 * 2 + x % 2]
                warp.registers[name] = (before + found).astype(np.float32).view(np.uint32)

        return run


def launch(
    program: Program, memory: Memory, params: Sequence[Any], blocks: Iterable[tuple[int, int, int]], threads: int,
    shared_bytes: int, seed: int = 0, cluster: int = 1,
) -> int:  # fmt: skip
    """Run all blocks at once, so many of them that follow each other in a cluster; how many instructions that took.

    Raises:
        Deadlock: no warp of any CTA can go on.
    """
    named = dict(zip(program.params, params, strict=False))
    ctas, chance, idle, blocks = [], random.Random(seed), 0, list(blocks)
    everywhere = {f"%nctaid.{axis}": 1 + max(block[i] for block in blocks) for i, axis in enumerate("xyz")}
    for index, block in enumerate(blocks):
        cta = GridCta(program, memory, named, threads, shared_bytes)
        cta.begin(block, seed + index)
        cta.block |= {**everywhere, "%globaltimer": 0}  # time stands still
        ctas.append(cta)
    for index, cta in enumerate(ctas):
        cta.cluster = ctas[index // cluster * cluster :][:cluster]
    with np.errstate(all="ignore"):
        while True:
            alive = [(cta, warp) for cta in ctas for warp in cta.warps if not warp.is_done]
            if not alive:
                return sum(cta.issued for cta in ctas)
            chance.shuffle(alive)
            before = sum(cta.issued for cta in ctas)
            for cta, warp in alive:
                cta.turn(warp)
            # a turn that only polls issues a few instructions per warp
            idle = idle + 1 if sum(cta.issued for cta in ctas) - before <= 25 * len(alive) else 0
            if idle > 600:
                raise Deadlock(str([(cta.block, warp.index, int(warp.pc.min())) for cta, warp in alive]))
