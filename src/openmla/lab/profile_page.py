"""The page of `openmla profile`: one shape for every tool."""

from __future__ import annotations

from collections.abc import Sequence

from openmla.lab import plot, suite
from openmla.lab.page import Cell, Figure, Page, Section, Table, Tile, amount, duration, number
from openmla.lab.profile import Memory, Phase, Profile, Profiles
from openmla.lab.report import label

# Nsight Compute's names of what a warp waits for, after its manual.
STALLS = {
    "barrier": "other warps at a barrier of the block",
    "branch resolving": "where a branch leads",
    "dispatch stall": "the dispatcher, which holds the instruction back",
    "drain": "its stores, before it may end",
    "gmma": "a wgmma of its warpgroup",
    "imc miss": "a constant that is not in the cache",
    "lg throttle": "room in the queue of loads and stores",
    "long scoreboard": "an answer of the memory behind L1: global memory, or L2",
    "math pipe throttle": "a unit of arithmetic that is busy",
    "membar": "a fence, until its writes are seen",
    "mio throttle": "room in the queue of shared memory and special functions",
    "misc": "something else",
    "no instruction": "the next instruction, which is not fetched yet",
    "not selected": "nothing: it was ready, another warp was taken",
    "short scoreboard": "an answer of shared memory or of a special function",
    "sleeping": "the end of a sleep that it asked for",
    "tex throttle": "room in the queue of textures",
    "wait": "the fixed time of the instruction before",
}


def page(found: Profiles) -> Page:
    """Each case: phases, utilisation, stalls, memory, and what could not be seen."""
    sections = [section for place, each in enumerate(found.profiles) for section in _sections(place, each)]
    if found.refused:
        rows = [[f"`{case}`", why] for case, why in found.refused.items()]
        sections.append(Section("Not profiled", tables=[Table("refused", ("case", "why"), rows, (0, 1))]))
    first = found.profiles[0] if found.profiles else None
    title = f"Where the time goes on {first.device}" if first else "Nothing was profiled"
    lead = "Times are of one call without the tool; shares are what the tool saw. Every case passed the gate first."
    tiles = [Tile(duration(each.seconds), f"{_name(each)}, `{each.who}/{each.kernel}`") for each in found.profiles[:4]]
    return Page(title, lead, sections, tiles, ["Made by `openmla profile`."])


def _name(each: Profile) -> str:
    case = suite.parse(each.case)
    return label(case) if case else each.case


def _sections(place: int, one: Profile) -> list[Section]:
    has_threads = bool(one.operators)  # of a CPU; a GPU's phases are kernels
    figures = [
        Figure(
            plot.bars(
                [(each.name, 100 * each.share) for each in one.phases], salt=f"phases{place}",
                title=f"Phases of {one.case}", heading="% of the time",
            ),
            "All threads count: waiting is a part like the others." if has_threads else "Kernels of the call.",
            "phases",
        )
    ] if len(one.phases) > 1 else []  # fmt: skip
    if one.stalls:
        svg = plot.bars(
            [(name, 100 * share) for name, share in one.stalls[:10]], salt=f"stalls{place}",
            title=f"Stalls of {one.case}", heading="% of the warps' waiting",
        )  # fmt: skip
        figures.append(Figure(svg, "What warps of the longest kernel wait for.", "stall reasons"))
    readings: Sequence[Sequence[str | Cell]] = [
        [name, f"{number(each.value, 4)} {each.unit}", each.meaning] for name, each in one.readings.items()
    ]
    tables = [Table("counters", ("counter", "value", "what it is"), readings, left=(0, 2)), _memory(one.memory)]
    if one.stalls:
        waits = [[name, f"{100 * share:.1f} %", STALLS.get(name, "")] for name, share in one.stalls]
        tables.append(Table("what warps wait for", ("waits", "share", "what it is"), waits, (0, 2)))
    if one.operators:
        tables.append(_phases("operators, by their own time", one.operators))
    if one.phases:
        tables.append(_phases("the phases in numbers", one.phases))
    if one.missing:
        rows = [[name, why] for name, why in one.missing.items()]
        tables.append(Table("what could not be seen, and why", ("", "why"), rows, (0, 1), is_folded=True))
    text = [
        f"`{one.case}`: {duration(one.seconds)} by `{one.who}/{one.kernel}`, seen with {one.tool}. Gate: {one.gate}."
    ]
    return [Section(_name(one), text, figures, tables)]


def _phases(name: str, phases: Sequence[Phase]) -> Table:
    rows = [[each.name, str(each.calls), duration(each.seconds), f"{100 * each.share:.1f} %"] for each in phases]
    return Table(name, ("", "times", "time", "share"), rows, is_folded=True)


def _memory(memory: Memory) -> Table:
    rows = [
        ["fewest", amount(memory.fewest), "every attended KV row once, queries and results once"],
        ["asked for", amount(memory.asked), "with every load that the tiles of query rows issue"],
        ["times per KV byte", f"{memory.reuse:.3g}", "all but the first should come from a cache"],
        ["in one run", amount(memory.run_bytes), "contiguous bytes of a page; between two runs the address jumps"],
    ]
    if memory.moved is not None:
        rows.append(["moved", amount(memory.moved), "between memory and the chip, measured"])
    if memory.hit_rate is not None:
        rows.append(["found in L2", f"{100 * memory.hit_rate:.1f} %", "of the sectors asked for, longest kernel"])
    return Table("memory access", ("memory", "", "what it is"), rows, left=(0, 2))
