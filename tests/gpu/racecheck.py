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
_READS = "lanes read, the warp meets, one lane arrives, and a copy overwrites what was read: the same order the other way round"
UNTIL = "2027-01-31"
# (kernel, instruction that writes, instruction that reads) -> (places, reason). More places, another kernel, other
# instructions or a day after UNTIL fail.
WAIVED = {
    ("decode_sparse", "STS", "LDS"): (12, _STORES),
    ("prefill_sparse", "STS", "LDS"): (12, _STORES),
    ("prefill_sparse", "LDGSTS", "LDSM"): (256, _READS),
    ("decode_dense_small", "STS", "LDS"): (12, _STORES),  # zeros for rows that are not there
    ("decode_dense_small", "STS", "LDSM"): (48, _STORES),
}

Place = tuple[str, int, int]  # kernel, where it writes, where it reads
Opcodes = Callable[[str], list[dict[int, str]]]  # kernel -> of each of its binaries: address -> instruction

_ACCESS = re.compile(r"(Write|Read) access at (\S+)\+(0x[0-9a-f]+)")


def places(text: str) -> set[Place] | None:
    """Where racecheck's output reports races; None where it cannot be read whole."""
    shown = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", text)
    blocks = re.split(r"Race reported between", text)[1:]
    if shown is None or not blocks or int(shown[1]) != len(blocks) or "print limit" in text.lower():
        return None
    found: set[Place] = set()
    for block in blocks:
        accesses = _ACCESS.findall(block)
        kernels = {re.sub(r".*openmlabackendscute(\w+?)kernel.*", r"\1", kernel) for _, kernel, _ in accesses}
        writes = [int(at, 16) for kind, _, at in accesses if kind == "Write"]
        reads = [int(at, 16) for kind, _, at in accesses if kind == "Read"]
        if len(kernels) != 1 or not writes or not reads or len(accesses) < block.count(" access at "):
            return None
        found |= {(kernel, write, read) for kernel in kernels for write in writes for read in reads}
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
    for kernel, write, read in sorted(found):
        binaries = opcodes(kernel)
        kinds = {(each.get(write, "?"), each.get(read, "?")) for each in binaries}
        known = [(kernel, *pair) for pair in kinds if (kernel, *pair) in WAIVED]
        if len(known) == 1:  # the other binaries of that kernel hold something else at these addresses
            counted[known[0]] = counted.get(known[0], 0) + 1
        else:
            unknown.append(f"{kernel}+{write:#x} and +{read:#x}: {sorted(kinds)}")
    unknown += [f"{key}: {n} places, {WAIVED[key][0]} are known" for key, n in counted.items() if n > WAIVED[key][0]]
    said = {
        f"waived in {kernel}, {write} and {read}": f"{n} places: {WAIVED[kernel, write, read][1]}"
        for (kernel, write, read), n in counted.items()
    }
    return said, unknown


@cache
def of_the_bundle(kernel: str) -> list[dict[int, str]]:
    """The instructions of a kernel's binaries in OPENMLA_AOT_DIR; nothing where there is no bundle."""
    from openmla.backends.cute.toolchain import disassemble

    # A kernel in a folder of another one's ("decode_sparsepair") lies in that one's library.
    libraries = [
        each for each in Path(os.environ.get("OPENMLA_AOT_DIR", "none")).glob("*.so") if kernel.startswith(each.stem)
    ]
    library = max(libraries, key=lambda each: len(each.stem), default=None)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for binary in device_binaries(library.read_bytes()) if library is not None else ():
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
