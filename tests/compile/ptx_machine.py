"""Runs the PTX of one kernel on a CPU, CTA by CTA: what a Hopper kernel computes, without a GPU.

Every warp is 32 lanes of numpy vectors; lanes that diverge run in the order of their program counters and meet again at
the smallest. Warps take turns, in random order, and give way where an mbarrier is not complete, so a wrong count or
parity is a deadlock here too. wgmma reads its operands when it is issued, and again when it is waited for: both must be the
same bytes. cp.async lands at its wait. A box of the copy engine lands at once. Memory outside of the arguments, and
shared memory outside of the CTA's, is an error.

Not modelled: time, the order of memory between proxies, clusters, other instructions than the kernels here use.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_lanes import Lanes, Warp
from ptx_program import ALL, LANES, SHARED, TYPES, Memory, Program, from_bf16, swizzle


class Deadlock(AssertionError):
    """No warp can go on."""


Step = Callable[[Warp, np.ndarray, int], bool]


class Barrier:
    """An mbarrier."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, number: int = 1, expect: int = 0) -> None:
        self.pending -= number
        self.bytes += expect
        assert self.pending >= 0, "more arrivals than the barrier counts"
        self.flip()

    def flip(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


class Cta(Lanes):
    """Runs a program, one block index after the other."""

    def __init__(
        self, program: Program, memory: Memory, params: dict[str, Any], threads: int, shared_bytes: int
    ) -> None:
        self.program, self.memory, self.params = program, memory, params
        self.threads, self.size = threads, SHARED + shared_bytes
        self.begin((0, 0, 0), 0)
        # made when it is reached first: most of a program is for cases that a test does not have
        self.code: list[Step | None] = [None] * len(program.statements)

    def begin(self, block: tuple[int, int, int], seed: int) -> None:
        """A fresh CTA: shared memory is NaN, wherever it is read before it is written."""
        self.block = dict(zip(("%ctaid.x", "%ctaid.y", "%ctaid.z"), block, strict=True))
        self.shared = np.full(self.size, 0xFF, np.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.meetings: dict[int, list[Warp]] = {}
        self.warps = [Warp(index) for index in range(self.threads // 32)]
        self.landing: list[tuple[list[tuple[int, np.ndarray]], int, int, int]] = []  # copies that end with arrivals
        self.random = random.Random(seed)
        self.issued = 0

    def run(self, block: tuple[int, int, int], seed: int = 0) -> int:
        """One block, until every warp has returned; how many instructions that took."""
        self.begin(block, seed)
        with np.errstate(all="ignore"):
            return self._run()

    def _run(self) -> int:
        idle = 0
        while True:
            alive = [warp for warp in self.warps if not warp.is_done]
            if not alive:
                return self.issued
            self.random.shuffle(alive)
            before = self.issued
            for warp in alive:
                self.turn(warp)
                self.land(0.2)
            if all(warp.waits_at_barrier and not warp.waits_for_some for warp in self.warps if not warp.is_done):
                for warp in alive:
                    warp.waits_at_barrier = False
                    warp.pc += 1
            # a turn that only polls issues a few instructions per warp
            idle = idle + 1 if self.issued - before <= 12 * len(alive) else 0
            if idle > 400:
                raise Deadlock(f"warps {[w.index for w in alive]} wait at {[int(w.pc.min()) for w in alive]}")

    def land(self, chance: float) -> None:
        """Complete some of the copies that a barrier tracks, and arrive there for the lanes that asked for it."""
        for each in list(self.landing):
            if self.random.random() < chance:
                copies, barrier, lanes, size = each
                for place, content in copies:
                    self.store("shared", np.array([place]), content[None])
                self.barriers[barrier].bytes -= size
                self.barriers[barrier].arrive(lanes)
                self.landing.remove(each)

    def turn(self, warp: Warp) -> None:
        """Run a warp until it must wait, or for a while."""
        for _ in range(4000):
            if warp.is_done or warp.waits_at_barrier:
                return
            where = int(warp.pc.min())
            mask = warp.pc == where
            if self.issue(warp, ALL if mask.all() else mask, where):
                return

    def issue(self, warp: Warp, mask: np.ndarray, where: int) -> bool:
        """One statement; true where the warp shall give way."""
        self.issued += 1
        step = self.code[where]
        if step is None:
            step = self.code[where] = self.compile(*self.program.statements[where])
        return step(warp, mask, where)

    # ------------------------------------------------------------------ control

    def compile(self, guard: str, opcode: str, operands: list[str]) -> Step:
        """One statement as a function of (warp, lanes, place); true where the warp shall give way."""
        parts = opcode.split(".")
        allowed = self.predicate(guard) if guard else None
        if parts[0] == "bra":
            target = self.program.labels[operands[0]]

            def jump(warp: Warp, mask: np.ndarray, where: int) -> bool:
                taken = mask & allowed(warp) if allowed else mask
                warp.pc[mask] = where + 1
                warp.pc[taken] = target
                return target <= where and bool(taken.any()) and warp_is_polling(warp)

            def warp_is_polling(warp: Warp) -> bool:
                return warp.registers.pop("polling", None) is not None

            return jump
        action = getattr(self, f"do_{parts[0]}", None)
        if action is None:
            raise NotImplementedError(f"{opcode} {', '.join(operands)}")
        run = action(parts, operands)

        def step(warp: Warp, mask: np.ndarray, where: int) -> bool:
            lanes = mask & allowed(warp) if allowed else mask
            if warp.waits_at_barrier:
                return True
            pause = run(warp, lanes) if lanes is ALL or lanes.any() else False
            if not warp.waits_at_barrier:
                warp.pc[mask] = where + 1
            return bool(pause)

        return step

    def do_ret(self, parts: list[str], operands: list[str]) -> Any:
        def run(warp: Warp, mask: np.ndarray) -> bool:
            assert mask.all(), "lanes return one by one"
            assert not warp.copies and not any(warp.committed) and not any(warp.groups), (
                "a warp returns with work in flight"
            )
            warp.is_done = True
            return True

        return run

    def _ignore(self, parts: list[str], operands: list[str]) -> Any:
        return lambda warp, mask: None

    do_prefetch = do_setmaxnreg = do_griddepcontrol = _ignore

    def do_fence(self, parts: list[str], operands: list[str]) -> Any:
        return self._ignore(parts, operands)

    def do_bar(self, parts: list[str], operands: list[str]) -> Any:
        if parts[1] == "warp":

            def meet(warp: Warp, mask: np.ndarray) -> None:
                assert mask.all(), "bar.warp.sync of lanes that are elsewhere"

            return meet

        if parts[1] == "red":
            return self._vote(operands)
        if operands[0] != "0":  # a named barrier of some warps
            return self._meeting(operands)

        def wait(warp: Warp, mask: np.ndarray) -> bool:
            warp.waits_at_barrier = True
            return True

        return wait

    def _vote(self, operands: list[str]) -> Any:
        """bar.red.or.pred: a named barrier of some warps, and whether any of their lanes said yes."""
        name, count = self.reader(operands[1], "u32"), self.reader(operands[2], "u32")
        said, write = self.predicate(operands[3]), self.writer(operands[0])

        def meet(warp: Warp, mask: np.ndarray) -> bool:
            assert mask.all(), "bar.red of lanes that are elsewhere"
            waiting = self.meetings.setdefault(int(name(warp)[0]), [])
            waiting.append(warp)
            warp.waits_at_barrier = warp.waits_for_some = True
            if len(waiting) == int(count(warp)[0]) // 32:
                found = any(bool(said(each).any()) for each in waiting)
                for each in waiting:
                    write(each, mask, np.full(32, found))
                    each.waits_at_barrier = each.waits_for_some = False
                    each.pc += each is not warp
                waiting.clear()
            return True

        return meet

    def _meeting(self, operands: list[str]) -> Any:
        name, count = self.reader(operands[0], "u32"), self.reader(operands[1], "u32")

        def meet(warp: Warp, mask: np.ndarray) -> bool:
            assert mask.all(), "bar.sync of lanes that are elsewhere"
            waiting = self.meetings.setdefault(int(name(warp)[0]), [])
            waiting.append(warp)
            warp.waits_at_barrier = warp.waits_for_some = True
            if len(waiting) == int(count(warp)[0]) // 32:
                for each in waiting:
                    each.waits_at_barrier = each.waits_for_some = False
                    each.pc += each is not warp
                waiting.clear()
            return True

        return meet

    # ------------------------------------------------------------------ memory

    def _space(self, parts: list[str]) -> str:
        return (
            "shared" if any(part.startswith("shared") for part in parts) else "param" if "param" in parts else "global"
        )

    def do_ld(self, p: list[str], o: list[str]) -> Any:
        names, kind = self.vector(o[0]), p[-1]
        writes, size = [self.writer(name) for name in names], np.dtype(TYPES[kind]).itemsize
        if self._space(p) == "param":
            match = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", o[1])
            assert match
            raw, at = self.params[match[1]], int(match[2] or 0)

            def load(warp: Warp, mask: np.ndarray) -> None:
                for x, write in enumerate(writes):
                    write(warp, mask, np.full(32, np.frombuffer(raw, TYPES[kind], 1, at + x * size)[0]))

            return load
        where = self.address(o[1])

        def read(warp: Warp, mask: np.ndarray) -> None:
            found = self.fetch(self._space(p), where(warp)[mask], size * len(names))
            for x, write in enumerate(writes):
                value = np.zeros(32, TYPES[kind])
                value[mask] = np.ascontiguousarray(found[:, x * size : (x + 1) * size]).view(TYPES[kind])[:, 0]
                if names[x].startswith("%rd") and size < 8:  # extended on the way
                    value = value.astype(np.int64 if kind.startswith("s") else np.uint64)
                write(warp, mask, value)

        return read

    def do_st(self, p: list[str], o: list[str]) -> Any:
        where, kind = self.address(o[0]), p[-1]
        reads = [self.reader(name, kind) for name in self.vector(o[1])]

        def write(warp: Warp, mask: np.ndarray) -> None:
            words = np.stack([read(warp) for read in reads], 1)[mask]
            self.store(self._space(p), where(warp)[mask], np.ascontiguousarray(words).view(np.uint8))

        return write

    def fetch(self, space: str, addresses: np.ndarray, size: int) -> np.ndarray:
        """Bytes [n, size] at addresses."""
        if space == "shared":
            assert (addresses >= SHARED).all() and (addresses + size <= len(self.shared)).all(), (
                "outside of shared memory"
            )
            return self.shared[addresses[:, None] + np.arange(size)]
        return self.memory.bytes[self.memory.check(addresses, size)[:, None] + np.arange(size)]

    def store(self, space: str, addresses: np.ndarray, content: np.ndarray) -> None:
        """Bytes [n, size] to addresses."""
        size = content.shape[1]
        if space == "shared":
            assert (addresses >= SHARED).all() and (addresses + size <= len(self.shared)).all(), (
                "outside of shared memory"
            )
            self.shared[addresses[:, None] + np.arange(size)] = content
        else:
            self.memory.bytes[self.memory.check(addresses, size)[:, None] + np.arange(size)] = content

    def do_atom(self, p: list[str], o: list[str]) -> Any:
        where, value, write = self.address(o[1]), self.reader(o[2], "u32"), self.writer(o[0])
        assert "or" in p, p

        def run(warp: Warp, mask: np.ndarray) -> None:
            old = np.zeros(32, np.uint32)
            for lane in np.flatnonzero(mask):
                place = where(warp)[lane : lane + 1]
                word = self.fetch("global", place, 4).view(np.uint32)
                old[lane] = word[0, 0]
                self.store("global", place, (word | value(warp)[lane]).view(np.uint8))
            write(warp, mask, old)

        return run

    do_red = do_atom

    def do_cp(self, p: list[str], o: list[str]) -> Any:
        if "commit_group" in p:

            def close(warp: Warp, mask: np.ndarray) -> None:
                warp.committed.append(list(warp.copies))
                warp.copies.clear()

            return close
        if "mbarrier" in p:
            barrier = self.address(o[0])

            def hand_over(warp: Warp, mask: np.ndarray) -> None:
                self.landing.append((list(warp.copies), int(barrier(warp)[0]), int(mask.sum()), 0))
                warp.copies.clear()

            return hand_over
        if "wait_all" in p or "wait_group" in p:
            keep = int(o[0]) if "wait_group" in p else None

            def land(warp: Warp, mask: np.ndarray) -> None:
                landing = []
                while len(warp.committed) > (keep or 0):
                    landing += warp.committed.pop(0)
                if keep is None:
                    self.land(1.0)
                    landing += warp.copies
                    warp.copies.clear()
                for place, content in landing:
                    self.store("shared", np.array([place]), content[None])

            return land
        if "tensor" in p:
            return self._box(o)
        if "prefetch" in p:
            return self._ignore(p, o)
        if "bulk" in p:
            return self._stretch(o)
        to, source, size = self.address(o[0]), self.address(o[1]), self.reader(o[3], "u32")

        def copy(warp: Warp, mask: np.ndarray) -> None:
            for lane in np.flatnonzero(mask):
                content = np.zeros(16, np.uint8)
                count = int(size(warp)[lane])
                if count:
                    content[:count] = self.fetch("global", source(warp)[lane : lane + 1], count)[0]
                warp.copies.append((int(to(warp)[lane]), content))

        return copy

    def _stretch(self, o: list[str]) -> Any:
        """One copy of adjacent bytes per lane, which completes some time later."""
        to, source, size, barrier = self.address(o[0]), self.address(o[1]), self.reader(o[2], "u32"), self.address(o[3])

        def run(warp: Warp, mask: np.ndarray) -> None:
            for lane in np.flatnonzero(mask):
                count = int(size(warp)[lane])
                assert count % 16 == 0 and int(to(warp)[lane]) % 16 == 0 and int(source(warp)[lane]) % 16 == 0
                content = self.fetch("global", source(warp)[lane : lane + 1], count)[0]
                self.landing.append(([(int(to(warp)[lane]), content)], int(barrier(warp)[lane]), 0, count))

        return run

    def _box(self, o: list[str]) -> Any:
        to, barrier = self.address(o[0]), self.address(o[2])
        match = re.fullmatch(r"\[\s*([\w%]+)\s*,\s*\{(.*)\}\s*\]", o[1])
        assert match
        which = self.reader(match[1], "u64")
        coordinates = [self.reader(x.strip(), "s32") for x in match[2].split(",")]

        def run(warp: Warp, mask: np.ndarray) -> None:
            lane = int(np.flatnonzero(mask)[0])
            assert mask.sum() == 1, "more than one lane starts a copy"
            map_ = self.params[self.program.params[int(which(warp)[lane])]]
            start = [int(x(warp)[lane]) for x in coordinates]
            columns, rows = map_.box[:2]
            content = np.zeros((rows, columns * 2), np.uint8)
            outer = [0 <= start[d] < map_.extents[d] for d in range(2, len(start))]
            base = map_.address + sum(start[d] * map_.strides[d] for d in range(2, len(start)))
            for r in range(rows):
                if all(outer) and 0 <= start[1] + r < map_.extents[1] and start[0] + columns <= map_.extents[0]:
                    place = base + (start[1] + r) * map_.strides[1] + start[0] * map_.strides[0]
                    content[r] = self.fetch("global", np.array([place]), 16 * (columns // 8)).reshape(-1)
            target = int(to(warp)[lane]) + np.arange(rows * columns * 2)
            self.shared[swizzle(target)] = content.reshape(-1)
            done = self.barriers[int(barrier(warp)[lane])]
            done.bytes -= rows * columns * 2
            done.flip()

        return run

    # ------------------------------------------------------------------ barriers, tensor cores

    def do_mbarrier(self, p: list[str], o: list[str]) -> Any:
        if p[1] == "init":
            where, count = self.address(o[0]), self.reader(o[1], "u32")

            def init(warp: Warp, mask: np.ndarray) -> None:
                lane = int(np.flatnonzero(mask)[0])
                self.barriers[int(where(warp)[lane])] = Barrier(int(count(warp)[lane]))

            return init
        where = self.address(o[1])
        if p[1] == "arrive":
            amount = self.reader(o[2], "u32") if len(o) > 2 else None
            expects = "expect_tx" in p

            def arrive(warp: Warp, mask: np.ndarray) -> None:
                for lane in np.flatnonzero(mask):
                    number = int(amount(warp)[lane]) if amount else 1
                    barrier = self.barriers[int(where(warp)[lane])]
                    barrier.arrive(1, number) if expects else barrier.arrive(number)

            return arrive
        parity, write = self.reader(o[2], "u32"), self.writer(o[0])

        def try_wait(warp: Warp, mask: np.ndarray) -> None:
            lane = int(np.flatnonzero(mask)[0])
            barrier = self.barriers[int(where(warp)[lane])]
            passed = barrier.phase % 2 != int(parity(warp)[lane])
            write(warp, mask, np.full(32, passed))
            if not passed:
                warp.registers["polling"] = LANES

        return try_wait

    def do_stmatrix(self, p: list[str], o: list[str]) -> Any:
        where, reads = self.address(o[0]), [self.reader(x, "u32") for x in self.vector(o[1])]
        assert "trans" not in p and len(reads) == 4

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all()
            places = where(warp)
            for matrix in range(4):
                target = places[8 * matrix + LANES // 4] + LANES % 4 * 4
                self.store("shared", target, np.ascontiguousarray(reads[matrix](warp)).view(np.uint8).reshape(32, 4))

        return run

    def do_ldmatrix(self, p: list[str], o: list[str]) -> Any:
        writes, where = [self.writer(x) for x in self.vector(o[0])], self.address(o[1])
        assert "trans" in p and len(writes) == 4

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all()
            places = where(warp)
            for matrix, write in enumerate(writes):
                rows = self.fetch("shared", places[8 * matrix : 8 * matrix + 8], 16).copy().view(np.uint16)  # [8, 8]
                pairs = rows.T.reshape(8, 4, 2)[LANES // 4, LANES % 4]
                write(warp, mask, np.ascontiguousarray(pairs).view(np.uint32).reshape(32))

        return run

    def do_wgmma(self, p: list[str], o: list[str]) -> Any:
        if p[1] == "fence":
            return self._ignore(p, o)
        if p[1] == "commit_group":
            return lambda warp, mask: warp.groups.append([])
        if p[1] == "wait_group":
            keep = int(o[0])

            def wait(warp: Warp, mask: np.ndarray) -> None:
                while len(warp.groups) - 1 > keep:
                    for addresses, content in warp.groups.pop(0):
                        assert np.array_equal(self.shared[addresses], content), "an operand of wgmma changed in flight"

            return wait
        n = int(re.search(r"m64n(\d+)k16", ".".join(p))[1])  # type: ignore[index]
        names = self.vector(o[0])
        b, scale = self.reader(o[2], "u64"), self.predicate(o[3])
        held = [self.reader(x, "u32") for x in self.vector(o[1])] if o[1].startswith("{") else None
        a = self.reader(o[1], "u64") if held is None else None
        transposed = o[-1] == "1"
        as_numbers = from_bf16 if p[-1] == "bf16" else lambda bits: bits.view(np.float16).astype(np.float32)
        assert o[4:-1] == ["1", "1", "0"][: 2 if held else 3] and len(names) == n // 2, o[3:]

        def rows_held(warp: Warp) -> np.ndarray:
            """A from registers: word w of a lane is row lane / 4 + 8 (w % 2), columns 2 (lane % 4) + 8 (w / 2) and the next."""
            values = np.zeros((16, 16), np.float32)
            for w, read in enumerate(held or []):
                pair = as_numbers(np.ascontiguousarray(read(warp)).view(np.uint16).reshape(32, 2))
                for x in range(2):
                    values[LANES // 4 + 8 * (w % 2), LANES % 4 * 2 + 8 * (w // 2) + x] = pair[:, x]
            return values

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all(), "wgmma of lanes that are elsewhere"
            rows = np.arange(16) + 16 * (warp.index % 4)
            places = [operand(int(a(warp)[0]), rows, False)] if a else []
            places.append(operand(int(b(warp)[0]), np.arange(n), transposed))
            for addresses in places:
                assert addresses.min() >= SHARED and addresses.max() + 2 <= len(self.shared), (
                    "wgmma outside of shared memory"
                )
            values = [] if a else [rows_held(warp)]
            for addresses in places:
                both = np.stack([addresses, addresses + 1], -1)
                content = self.shared[both]
                warp.groups[-1].append((both, content))
                values.append(as_numbers(content.reshape(-1, 2).copy().view(np.uint16).reshape(addresses.shape)))
            product = values[0] @ values[1].T  # [16, n]
            for x, name in enumerate(names):
                row, column = LANES // 4 + 8 * (x // 2 % 2), x // 4 * 8 + LANES % 4 * 2 + x % 2
                old = warp.registers[name].view(np.float32) if scale(warp)[0] else np.float32(0)
                warp.registers[name] = (old + product[row, column]).astype(np.float32).view(np.uint32)

        def operand(descriptor: int, index: np.ndarray, is_transposed: bool) -> np.ndarray:
            """Addresses [len(index), 16] of an operand in the 128-byte swizzle."""
            start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
            assert descriptor >> 62 == 1, "not the 128-byte swizzle"
            k = np.arange(16)[None]
            i = index[:, None]
            if is_transposed:
                flat = start + i // 64 * leading + i % 64 * 2 + k // 8 * stride + k % 8 * 128
            else:
                flat = start + i // 8 * stride + i % 8 * 128 + k * 2
            return swizzle(flat)

        return run
