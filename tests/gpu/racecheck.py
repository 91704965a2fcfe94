"""What racecheck reports of our kernels and is known to be none: by kernel, kind of instructions and number of places."""

from __future__ import annotations

import os
import re
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

# Right, as racecheck_order.py shows: `elected` stores, `reused` reads before the next writer.
_STORES = (
    "lanes store, the warp meets, one lane arrives: an order that only a warp makes; it ends when every lane arrives, or the "
    "lane that arrives stores, as in decode_dense"
)
_READS = (
    "lanes read, the warp meets, one lane arrives, and what was read is overwritten: the same order the other way round"
)
UNTIL = "2027-01-31"
# (kernel, instruction that writes, instruction that reads) -> (places, reason). More places, another kernel, other
# instructions or a day after UNTIL fail.
WAIVED = {
    ("decode_sparse", "STS", "LDS"): (12, _STORES),
    ("decode_sparseswapped", "STS", "LDS"): (12, _STORES),
    ("decode_sparseswapped", "UBLKCP", "LDS"): (48, _READS),  # rows into the ring, where it wraps
    ("decode_sparseswapped", "UBLKCP", "LDSM"): (16, _READS),
    ("prefill_sparse", "STS", "LDS"): (12, _STORES),
    ("prefill_sparse", "LDGSTS", "LDSM"): (256, _READS),
    ("decode_densetwo_loaders", "STS", "LDS"): (12, _READS),  # how much of a slot is valid, whether factors are needed
    ("decode_densetwo_clusters", "STS", "LDS"): (12, _READS),
    ("decode_dense_small", "STS", "LDS"): (12, _STORES),  # zeros for rows that are not there
    ("decode_dense_small", "STS", "LDSM"): (48, _STORES),
    ("decode_dense_small", "UBLKCP", "LDSM"): (48, _READS),  # rows of a byte cache into the ring, where it wraps
    ("decode_dense_small", "UBLKCP", "LDS"): (48, _READS),  # their scales
    ("decode_fp8", "STS", "LDS"): (24, _READS),  # factors of O, and whether they are needed
}

Place = tuple[str, int, int]  # a kernel's symbol, where it writes, where it reads
Opcodes = Callable[[str], list[dict[int, str]]]  # symbol -> of each binary that has it: address -> instruction

_ACCESS = re.compile(r"(Write|Read) access at (\S+)\+(0x[0-9a-f]+)")


def kernel_of(symbol: str) -> str:
    """The folder of a kernel, from its symbol."""
    return re.sub(r".*openmlabackendscute(\w+?)kernel.*", r"\1", symbol)


def places(text: str) -> set[Place] | None:
    """Where racecheck's output reports races; None where it cannot be read whole."""
    shown = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", text)
    blocks = re.split(r"Race reported between", text)[1:]
    if shown is None or not blocks or int(shown[1]) != len(blocks) or "print limit" in text.lower():
        return None
    found: set[Place] = set()
    for block in blocks:
        accesses = _ACCESS.findall(block)
        symbols = {symbol for _, symbol, _ in accesses}
        writes = [int(at, 16) for kind, _, at in accesses if kind == "Write"]
        reads = [int(at, 16) for kind, _, at in accesses if kind == "Read"]
        if len(symbols) != 1 or not writes or not reads or len(accesses) < block.count(" access at "):
            return None
        found |= {(symbol, write, read) for symbol in symbols for write in writes for read in reads}
    return found


def waived(text: str, today: str, opcodes: Opcodes) -> tuple[dict[str, str], list[str]]:
    """(what WAIVED says of the races in racecheck's output, what is not waived)."""
    found = places(text)
    if found is None:
        return {}, ["racecheck's output cannot be read"]
    if today > UNTIL:
        return {}, [f"the waivers ended on {UNTIL}"]
    counted: dict[tuple[str, str, str], int] = {}
    unknown = []
    for symbol, write, read in sorted(found):
        kernel, binaries = kernel_of(symbol), opcodes(symbol)
        kinds = {(each.get(write, "?"), each.get(read, "?")) for each in binaries}
        known = [(kernel, *pair) for pair in kinds if (kernel, *pair) in WAIVED]
        for key in known:  # variants share a symbol: the others hold something else there, or count, too
            counted[key] = counted.get(key, 0) + 1
        if not known:
            unknown.append(f"{kernel}+{write:#x} and +{read:#x}: {sorted(kinds)}")
    unknown += [f"{key}: {n} places, {WAIVED[key][0]} are known" for key, n in counted.items() if n > WAIVED[key][0]]
    said = {
        f"waived in {kernel}, {write} and {read}": f"{n} places: {WAIVED[kernel, write, read][1]}"
        for (kernel, write, read), n in counted.items()
    }
    return said, unknown


@cache
def of_the_bundle(symbol: str) -> list[dict[int, str]]:
    """The instructions of the binaries in OPENMLA_AOT_DIR that have a kernel of this symbol; nothing without a bundle."""
    from openmla.backends.cute.toolchain import disassemble

    kernel = kernel_of(symbol)
    # A kernel in a folder of another one's ("decode_sparsepair") lies in that one's library.
    libraries = [
        each for each in Path(os.environ.get("OPENMLA_AOT_DIR", "none")).glob("*.so") if kernel.startswith(each.stem)
    ]
    library = max(libraries, key=lambda each: len(each.stem), default=None)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for binary in device_binaries(library.read_bytes()) if library is not None else ():
            if symbol.encode() not in binary:
                continue
            path = Path(folder, "kernel.cubin")
            path.write_bytes(binary)
            lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z0-9_]+)", disassemble(path), re.M)
            found.append({int(at, 16): opcode for at, opcode in lines})
    return found


def device_binaries(library: bytes) -> list[bytes]:
    """The ELF files for GPUs that lie in a shared library."""
    found, at = [], library.find(b"\x7fELF", 1)
    while at >= 0:
        if len(library) - at > 64 and struct.unpack_from("<H", library, at + 18)[0] == 190:  # EM_CUDA
            programs, sections = struct.unpack_from("<QQ", library, at + 32)
            program_size, num_programs, section_size, num_sections = struct.unpack_from("<HHHH", library, at + 54)
            end = max(programs + program_size * num_programs, sections + section_size * num_sections)
            found.append(library[at : at + end])
        at = library.find(b"\x7fELF", at + 1)
    return found
