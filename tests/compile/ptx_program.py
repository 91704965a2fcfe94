"""The text of a PTX kernel as a list of statements, and the memory and arguments that it runs on. See ptx_machine.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

LANES = np.arange(32)
ALL = np.ones(32, bool)  # the mask of a warp whose lanes are together, by this very object
SHARED = 1024  # where shared memory begins
GLOBAL = 0x7F0000000000
TYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip


# ---------------------------------------------------------------------- memory


class Memory:
    """The tensors of a launch side by side, with gaps between them that nobody may touch."""

    def __init__(self) -> None:
        self.bytes = np.zeros(0, np.uint8)
        self.ranges: list[tuple[int, int]] = []
        self.tensors: list[tuple[torch.Tensor, int]] = []

    def place(self, tensor: torch.Tensor) -> int:
        """The address of a tensor's first element; its whole storage becomes readable."""
        storage = tensor.untyped_storage()
        for known, address in self.tensors:
            if known.untyped_storage().data_ptr() == storage.data_ptr():
                return address + tensor.storage_offset() * tensor.element_size()
        raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().copy()
        begin = -(-(len(self.bytes) + 4096) // 256) * 256
        self.bytes = np.concatenate([self.bytes, np.zeros(begin - len(self.bytes), np.uint8), raw])
        self.ranges.append((begin, begin + len(raw)))
        self.tensors.append((tensor, GLOBAL + begin))
        return GLOBAL + begin + tensor.storage_offset() * tensor.element_size()

    def read_back(self) -> None:
        """Write what the kernel wrote into the tensors."""
        for tensor, address in self.tensors:
            raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            raw.copy_(torch.from_numpy(self.bytes[address - GLOBAL : address - GLOBAL + len(raw)].copy()))

    def check(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Offsets of addresses, each the first of `size` bytes inside one tensor."""
        offsets = addresses.astype(np.int64) - GLOBAL
        assert (offsets % min(size, 16) == 0).all(), f"{size} bytes at an address that is no multiple of it"
        fine = np.zeros(len(offsets), bool)
        for begin, end in self.ranges:
            fine |= (offsets >= begin) & (offsets + size <= end)
        assert fine.all(), f"address outside of every argument: {addresses[~fine][0]:#x}"
        return offsets


def swizzle(address: np.ndarray) -> np.ndarray:
    """The 128-byte swizzle: chunks of 16 bytes XOR the row of 128 bytes within 1,024."""
    return address ^ ((address >> 7 & 7) << 4)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of bf16, nearest even."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of bf16 -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


E4M3 = (
    torch.arange(256, dtype=torch.uint8)
    .view(torch.float8_e4m3fn)
    .to(torch.float16)
    .view(torch.int16)
    .numpy()
    .view(np.uint16)
)


@dataclass
class TensorMap:
    """What the copy engine knows of a tensor: extents and strides from the innermost on, and the box."""

    address: int
    extents: Sequence[int]
    strides: Sequence[int]  # bytes
    box: Sequence[int]


# ---------------------------------------------------------------------- program


@dataclass
class Program:
    """Statements of one kernel, each (guard, opcode, operands), and where labels stand."""

    statements: list[tuple[str, str, list[str]]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    params: list[str] = field(default_factory=list)


def parse(text: str) -> Program:
    """Read the text of the only kernel. Names that an inline block declares are made unique."""
    text = re.sub(r"//[^\n]*", "", text)
    head, body = text.split(".entry", 1)[1].split("{", 1)
    program = Program(params=re.findall(r"\.param[^,)]*?\s([\w$]+)(?:\[\d+\])?\s*(?=[,)])", head))
    scopes: list[dict[str, str]] = [{}]
    buffer, depth, serial = "", 0, 0
    for char in body:
        if char == "{" and not buffer.strip():
            serial += 1
            scopes.append({"": str(serial)})
            continue
        if char == "}" and not buffer.strip() and depth == 0:
            scopes.pop()
            if not scopes:
                break
            continue
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == ":" and re.fullmatch(r"\s*[\w$]+", buffer):
            name = buffer.strip()
            if len(scopes) > 1:
                scopes[-1][name] = f"{name}@{scopes[-1]['']}"
            program.labels[scopes[-1].get(name, name)] = len(program.statements)
            buffer = ""
            continue
        if char == ";" and depth == 0:
            statement, buffer = buffer.strip(), ""
            if statement.startswith(".reg"):
                for name in statement.split(None, 2)[2].split(","):
                    scopes[-1][name.strip()] = f"{name.strip()}@{scopes[-1].get('', '')}"
            elif statement and not statement.startswith(".pragma"):
                program.statements.append(_statement(statement, scopes))
            continue
        buffer += char
    return program


def _statement(text: str, scopes: list[dict[str, str]]) -> tuple[str, str, list[str]]:
    names = {key: value for scope in scopes[1:] for key, value in scope.items() if key}
    block = scopes[-1].get("", "")
    guard = ""
    if text.startswith("@"):
        guard, text = text[1:].split(None, 1)
    parts = text.split(None, 1)
    opcode, rest = parts[0], parts[1] if len(parts) > 1 else ""

    def rename(match: re.Match[str]) -> str:
        return names.get(match[0], match[0])

    rest, guard = (re.sub(r"(?<![\w.%$@])[A-Za-z_]\w*", rename, each) for each in (rest, guard))
    if opcode.startswith("bra") and block and rest not in names.values() and not rest.startswith("$"):
        rest = f"{rest}@{block}"
    operands, level, current = [], 0, ""
    for char in rest:
        level += {"{": 1, "[": 1, "}": -1, "]": -1}.get(char, 0)
        if char == "," and level == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += char
    if current.strip():
        operands.append(current.strip())
    return guard, opcode, operands


# ---------------------------------------------------------------------- arguments


def describe(memory: Memory, tensor: torch.Tensor, static: Sequence[bool], unit: Sequence[bool]) -> bytes:
    """A tensor argument as the kernel gets it: address, extents that are not fixed, strides that are not.

    Args:
        memory: where the tensor is placed.
        tensor: the argument.
        static: per mode, whether its extent is part of the type.
        unit: per mode, whether its stride is.
    """
    out = np.array([memory.place(tensor)], np.uint64).tobytes()
    out += np.array([n for n, fixed in zip(tensor.shape, static, strict=True) if not fixed], np.int32).tobytes()
    out += b"\0" * (-len(out) % 8)
    return out + np.array([n for n, fixed in zip(tensor.stride(), unit, strict=True) if not fixed], np.int64).tobytes()
