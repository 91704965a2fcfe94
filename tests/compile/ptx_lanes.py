"""What the lanes of a warp do on their own and with one another: operands, arithmetic, shuffles. See ptx_machine.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_program import ALL, E4M3, LANES, SHARED, TYPES, Program, to_bf16


class Warp:
    """32 lanes: registers by name, a program counter each."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.registers: dict[str, np.ndarray] = {}
        self.pc = np.zeros(32, np.int64)
        self.is_done = False
        self.copies: list[tuple[int, np.ndarray]] = []  # cp.async that has not landed, of no group yet
        self.committed: list[list[tuple[int, np.ndarray]]] = []  # ... and per group
        self.groups: list[list[tuple[np.ndarray, np.ndarray]]] = [[]]  # wgmma: (addresses, bytes) per commit group
        self.waits_at_barrier = False
        self.waits_for_some = False  # ... of these warps only


class Lanes:
    """Instructions that touch registers alone; each `do_*` makes one statement a function of (warp, lanes)."""

    program: Program
    params: dict[str, Any]
    block: dict[str, int]

    # ------------------------------------------------------------------ operands

    def reader(self, operand: str, kind: str) -> Callable[[Warp], np.ndarray]:
        """A function that reads an operand as a vector of a type."""
        dtype = TYPES[kind]
        if operand in self.block:
            return lambda warp: np.full(32, self.block[operand], dtype)
        if operand == "%tid.x":
            return lambda warp: (warp.index * 32 + LANES).astype(dtype)
        if operand == "%laneid":
            return lambda warp: LANES.astype(dtype)
        if operand == "__dynamic_shmem__0":
            return lambda warp: np.full(32, SHARED, dtype)
        if re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):
            bits = np.full(32, int(operand[2:], 16), np.uint32)
            return lambda warp: bits.view(dtype)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
            number = np.full(32, int(operand, 0) % (1 << 8 * unsigned.itemsize), unsigned).view(dtype)
            return lambda warp: number

        def register(warp: Warp) -> np.ndarray:
            value = warp.registers.get(operand)
            if value is None:  # an undefined value, which a phi may carry where nobody looks at it
                value = np.zeros(32, np.dtype(f"u{np.dtype(dtype).itemsize}"))
            return value.view(dtype)

        return register

    def writer(self, operand: str) -> Callable[[Warp, np.ndarray, np.ndarray], None]:
        """A function that writes a vector to the lanes of a mask."""

        def write(warp: Warp, mask: np.ndarray, value: np.ndarray) -> None:
            bits = value if value.dtype == bool else value.view(np.dtype(f"u{value.dtype.itemsize}"))
            old = warp.registers.get(operand)
            if mask is ALL or mask.all():
                warp.registers[operand] = bits
            else:
                warp.registers[operand] = np.where(mask, bits, np.zeros_like(bits) if old is None else old)

        return write

    def predicate(self, operand: str) -> Callable[[Warp], np.ndarray]:
        """A function that reads a predicate."""
        if operand in ("0", "1", "-1"):
            return lambda warp: np.full(32, operand != "0")
        name, negated = operand.lstrip("!"), operand.startswith("!")
        return lambda warp: warp.registers[name] ^ negated

    def address(self, operand: str) -> Callable[[Warp], np.ndarray]:
        """A function that reads [register + offset]."""
        match = re.fullmatch(r"\[\s*([\w%$.@]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        assert match, operand
        base, offset = (
            self.reader(match[1], "u64" if "rd" in match[1] or match[1][0] in "ab" else "u32"),
            int(match[2] or 0),
        )
        return lambda warp: base(warp).astype(np.int64) + offset

    def vector(self, operand: str) -> list[str]:
        """The registers of {a, b, ...} or a single one."""
        return [each.strip() for each in operand.strip("{} ").split(",")]

    def _map(self, operands: list[str], kind: str, out: str, formula: Callable[..., np.ndarray]) -> Any:
        write, reads = self.writer(operands[0]), [self.reader(x, kind) for x in operands[1:]]

        def run(warp: Warp, mask: np.ndarray) -> None:
            write(warp, mask, formula(*(read(warp) for read in reads)).astype(TYPES[out], copy=False))

        return run

    def do_mov(self, parts: list[str], operands: list[str]) -> Any:
        target, source = operands
        kind = parts[1]
        if kind == "pred":
            write, value = self.writer(target), self.predicate(source)
            return lambda warp, mask: write(warp, mask, value(warp))
        if source in self.params:
            write = self.writer(target)
            return lambda warp, mask: write(warp, mask, np.full(32, self.program.params.index(source), np.uint64))
        width = {"b32": 2, "b64": 4}.get(kind, 0)
        if target.startswith("{"):
            names, read = self.vector(target), self.reader(source, f"u{kind[1:]}")
            half = np.uint16 if width == 2 else np.uint32

            def split(warp: Warp, mask: np.ndarray) -> None:
                pair = np.ascontiguousarray(read(warp)).view(half).reshape(32, 2)
                for x in range(2):
                    self.writer(names[x])(warp, mask, np.ascontiguousarray(pair[:, x]))

            return split
        if source.startswith("{"):
            halves = [self.reader(x, "u16" if width == 2 else "u32") for x in self.vector(source)]
            write = self.writer(target)
            return lambda warp, mask: write(
                warp, mask, np.stack([h(warp) for h in halves], 1).view(TYPES[f"u{kind[1:]}"]).reshape(32).copy()
            )
        return self._map(operands, kind, kind, lambda x: x)

    def do_cvta(self, parts: list[str], operands: list[str]) -> Any:
        return self._map(operands, "u64", "u64", lambda x: x)

    def _arithmetic(self, parts: list[str], operands: list[str], formula: Callable[..., np.ndarray]) -> Any:
        return self._map(operands, parts[-1], parts[-1], formula)

    def do_add(self, p: list[str], o: list[str]) -> Any:
        return self._arithmetic(p, o, np.add)

    def do_sub(self, p: list[str], o: list[str]) -> Any:
        return self._arithmetic(p, o, np.subtract)

    def do_abs(self, p: list[str], o: list[str]) -> Any:
        return self._arithmetic(p, o, np.abs)

    def do_neg(self, p: list[str], o: list[str]) -> Any:
        return self._arithmetic(p, o, np.negative)

    def do_min(self, p: list[str], o: list[str]) -> Any:
        return self._arithmetic(p, o, np.fmin)

    def do_max(self, p: list[str], o: list[str]) -> Any:
        if p[-1] == "u16x2":
            return self._map(
                o, "u32", "u32", lambda a, b: np.maximum(a.view(np.uint16), b.view(np.uint16)).view(np.uint32)
            )
        return self._arithmetic(p, o, np.fmax)

    def do_rcp(self, p: list[str], o: list[str]) -> Any:
        return self._arithmetic(p, o, lambda x: (1 / x).astype(np.float32))

    def do_ex2(self, p: list[str], o: list[str]) -> Any:
        return self._arithmetic(p, o, np.exp2)

    def do_lg2(self, p: list[str], o: list[str]) -> Any:
        return self._arithmetic(p, o, np.log2)

    def do_div(self, p: list[str], o: list[str]) -> Any:
        if p[-1] == "f32":
            return self._arithmetic(p, o, np.divide)

        def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # towards zero
            quotient = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
            return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)

        return self._arithmetic(p, o, divide)

    def do_rem(self, p: list[str], o: list[str]) -> Any:
        return self._arithmetic(p, o, lambda a, b: np.fmod(a, np.where(b == 0, 1, b)))

    def do_mul(self, p: list[str], o: list[str]) -> Any:
        if p[-1] == "f16x2":
            return self._map(o, "u32", "u32", lambda a, b: (a.view(np.float16) * b.view(np.float16)).view(np.uint32))
        if "wide" in p:
            wide = {"16": "32", "32": "64"}[p[-1][1:]]
            return self._map(o, p[-1], p[-1][0] + wide, lambda a, b: a.astype(TYPES[p[-1][0] + wide]) * b.astype(TYPES[p[-1][0] + wide]))  # fmt: skip
        if "hi" in p:
            return self._map(o, p[-1], p[-1], lambda a, b: a.astype(np.int64) * b.astype(np.int64) >> 32)
        return self._arithmetic(p, o, np.multiply)

    def do_mad(self, p: list[str], o: list[str]) -> Any:
        if "wide" in p:
            wide = p[-1][0] + "64"
            a, b, c = self.reader(o[1], p[-1]), self.reader(o[2], p[-1]), self.reader(o[3], wide)
            write = self.writer(o[0])
            return lambda warp, mask: write(
                warp, mask, a(warp).astype(TYPES[wide]) * b(warp).astype(TYPES[wide]) + c(warp)
            )
        return self._arithmetic(p, o, lambda a, b, c: a * b + c)

    def do_fma(self, p: list[str], o: list[str]) -> Any:
        return self._arithmetic(
            p,
            o,
            lambda a, b, c: (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32),
        )

    def do_and(self, p: list[str], o: list[str]) -> Any:
        return self._bits(p, o, np.bitwise_and)

    def do_or(self, p: list[str], o: list[str]) -> Any:
        return self._bits(p, o, np.bitwise_or)

    def do_xor(self, p: list[str], o: list[str]) -> Any:
        return self._bits(p, o, np.bitwise_xor)

    def do_not(self, p: list[str], o: list[str]) -> Any:
        return self._bits(p, o, np.invert)

    def _bits(self, p: list[str], o: list[str], formula: Callable[..., np.ndarray]) -> Any:
        if p[-1] != "pred":
            return self._arithmetic(p, o, formula)
        write, reads = self.writer(o[0]), [self.predicate(x) for x in o[1:]]
        return lambda warp, mask: write(warp, mask, formula(*(read(warp) for read in reads)))

    def do_shl(self, p: list[str], o: list[str]) -> Any:
        return self._shift(p, o, lambda a, n: np.where(n < 8 * a.itemsize, a << n.astype(a.dtype), 0))

    def do_shr(self, p: list[str], o: list[str]) -> Any:
        return self._shift(p, o, lambda a, n: a >> np.minimum(n, 8 * a.itemsize - 1).astype(a.dtype))

    def _shift(self, p: list[str], o: list[str], formula: Callable[..., np.ndarray]) -> Any:
        write, a, n = self.writer(o[0]), self.reader(o[1], p[-1]), self.reader(o[2], "u32")
        return lambda warp, mask: write(warp, mask, formula(a(warp), n(warp)).astype(TYPES[p[-1]]))

    def do_shf(self, p: list[str], o: list[str]) -> Any:
        assert p[1:] == ["l", "wrap", "b32"], p
        return self._map(
            o, "u32", "u32", lambda low, high, n: (high << (n & 31)) | (low.astype(np.uint64) >> (32 - (n & 31))).astype(np.uint32)
        )  # fmt: skip

    def do_prmt(self, p: list[str], o: list[str]) -> Any:
        def select(a: np.ndarray, b: np.ndarray, how: np.ndarray) -> np.ndarray:
            both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
            chosen = [both >> ((how >> 4 * x & 7) * 8).astype(np.uint64) & np.uint64(255) for x in range(4)]
            return sum(each << np.uint64(8 * x) for x, each in enumerate(chosen)).astype(np.uint32)

        return self._map(o, "u32", "u32", select)

    def do_bfind(self, p: list[str], o: list[str]) -> Any:
        return self._map(o, p[-1], "u32", lambda a: np.floor(np.log2(np.maximum(a, 1))).astype(np.uint32))

    def do_selp(self, p: list[str], o: list[str]) -> Any:
        write, which = self.writer(o[0]), self.predicate(o[3])
        a, b = self.reader(o[1], p[-1]), self.reader(o[2], p[-1])
        return lambda warp, mask: write(warp, mask, np.where(which(warp), a(warp), b(warp)))

    def do_setp(self, p: list[str], o: list[str]) -> Any:
        test: dict[str, Callable[..., np.ndarray]] = {
            "eq": np.equal, "ne": lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b), "lt": np.less, "le": np.less_equal,
            "gt": np.greater, "ge": np.greater_equal, "neu": np.not_equal,
            "ltu": lambda a, b: ~(a >= b), "gtu": lambda a, b: ~(a <= b), "leu": lambda a, b: ~(a > b),
            "geu": lambda a, b: ~(a < b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
            "nan": lambda a, b: np.isnan(a) | np.isnan(b),
        }  # fmt: skip
        write, formula = self.writer(o[0]), test[p[1]] if p[-1] == "f32" or p[1] != "ne" else np.not_equal
        a, b = self.reader(o[1], p[-1]), self.reader(o[2], p[-1])
        return lambda warp, mask: write(warp, mask, formula(a(warp), b(warp)))

    def do_cvt(self, p: list[str], o: list[str]) -> Any:
        to, source = p[-2], p[-1]
        write = self.writer(o[0])
        if to == "bf16x2":
            high, low = self.reader(o[1], "f32"), self.reader(o[2], "f32")
            return lambda warp, mask: write(
                warp, mask, to_bf16(low(warp)).astype(np.uint32) | to_bf16(high(warp)).astype(np.uint32) << 16
            )
        if to == "f16x2" and source == "f32":
            high, low = self.reader(o[1], "f32"), self.reader(o[2], "f32")
            return lambda warp, mask: write(
                warp, mask, np.stack([low(warp), high(warp)], 1).astype(np.float16).view(np.uint32).reshape(32)
            )
        if to == "bf16" and source == "f32":
            one = self.reader(o[1], "f32")
            return lambda warp, mask: write(warp, mask, to_bf16(one(warp)))
        if source == "e4m3x2":
            read = self.reader(o[1], "u16")
            return lambda warp, mask: write(
                warp, mask, E4M3[read(warp) & 255].astype(np.uint32) | E4M3[read(warp) >> 8].astype(np.uint32) << 16
            )
        read = self.reader(o[1], self._stored(source, o[1]))
        kept = TYPES.get(to[0] + "16") if to in ("s8", "u8") else TYPES[to]  # registers have 16 bits at least
        return lambda warp, mask: write(warp, mask, read(warp).astype(TYPES[source]).astype(TYPES[to]).astype(kept))

    def _stored(self, kind: str, operand: str) -> str:
        """cvt may read a narrow type out of a wider register."""
        for prefix, bits in (("%rs", "16"), ("%rd", "64"), ("%r", "32")):
            if operand.startswith(prefix):
                return (kind[0] if kind[0] != "f" else "b") + bits if kind[1:] != bits else kind
        return kind

    # ------------------------------------------------------------------ lanes together

    def do_shfl(self, p: list[str], o: list[str]) -> Any:
        write, value, by = self.writer(o[0]), self.reader(o[1], "u32"), self.reader(o[2], "u32")

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all(), "shfl.sync of lanes that are elsewhere"
            source = {"bfly": LANES ^ by(warp), "idx": by(warp) & 31}[p[2]]
            write(warp, mask, value(warp)[source.astype(np.int64)])

        return run

    def do_vote(self, p: list[str], o: list[str]) -> Any:
        write, value = self.writer(o[0]), self.predicate(o[1])

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all(), "vote.sync of lanes that are elsewhere"
            found = value(warp)
            if p[2] == "ballot":
                write(warp, mask, np.full(32, int((found << LANES).sum()) & 0xFFFFFFFF, np.uint32))
            else:
                write(warp, mask, np.full(32, found.any() if p[2] == "any" else found.all()))

        return run

    def do_elect(self, p: list[str], o: list[str]) -> Any:
        write = self.writer(o[0].split("|")[1])

        def run(warp: Warp, mask: np.ndarray) -> None:
            assert mask.all(), "elect.sync of lanes that are elsewhere"
            write(warp, mask, LANES == 0)

        return run
