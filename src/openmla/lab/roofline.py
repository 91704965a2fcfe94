"""Roofline: what a machine can do, where each case stands under it, and what bounds it.

    roof(intensity) = min(arithmetic, intensity * bandwidth)        intensity = FLOP / byte, from openmla.core.cost

The two meet at the ridge. A case left of it is bound by memory, right of it by arithmetic; a call that takes longer than
both say, and is short, is bound by latency. Rates are measured on this machine, or read from rows or a data sheet.
Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from openmla.core.cost import Cost, cost
from openmla.core.errors import ConfigError
from openmla.core.target import Target
from openmla.lab import bars, ceilings, plot, runner, store, suite, workload
from openmla.lab.page import Figure, Page, Section, Table, Tile, duration, number
from openmla.lab.progress import Stages
from openmla.lab.report import label
from openmla.lab.store import Row
from openmla.lab.suite import Case, Suite

# A call is taken to be bound by latency when the roofs allow less than this and it needs three times as long: launch,
# first load and last store of a GPU kernel take some microseconds together; on a CPU the call and waking its threads.
_SHORT_US = {"cpu": 100.0, "gpu": 20.0}


@dataclass(frozen=True)
class Roof:
    """Rates of one machine. `source` says where they come from."""

    device: str
    source: str
    gemm_tflops: dict[str, float]
    read_gbps: float
    cache_gbps: float | None = None
    cache_bytes: int = 0
    copy_gbps: float | None = None

    def ridge(self, dtype: str) -> float:
        """FLOP per byte at which arithmetic becomes the tighter limit. Raises ConfigError for a dtype without a rate."""
        if dtype not in self.gemm_tflops:
            raise ConfigError(
                f"{self.device}: no rate for {dtype} in {self.source}; choose cases in {' or '.join(self.gemm_tflops)}, as with --dtype or --suite"
            )
        return 1e3 * self.gemm_tflops[dtype] / self.read_gbps


@dataclass(frozen=True)
class Place:
    """One case under the roof. Times in microseconds; `measured_us` is None where nothing ran."""

    case: str
    dtype: str
    flops: int
    bytes: int
    intensity: float
    ridge: float
    floor_us: float
    bound: str
    who: str = ""
    measured_us: float | None = None
    note: str = ""

    @property
    def share(self) -> float | None:
        """The floor over the measured time: 1 is the roof."""
        return self.floor_us / self.measured_us if self.measured_us else None

    @property
    def sentence(self) -> str:
        """What bounds it, in one sentence."""
        side = "right" if self.intensity >= self.ridge else "left"
        why = f"{self.intensity:.3g} FLOP per byte, {side} of the ridge at {self.ridge:.3g}"
        if self.share is None:
            return f"{why}: {self.bound} bounds it at {duration(self.floor_us / 1e6)}" + (
                f"; {self.note}" if self.note else ""
            )
        took = f"{duration((self.measured_us or 0) / 1e6)} of at best {duration(self.floor_us / 1e6)}"
        above = "; more than all, because it multiplies faster than the product that the roof is made of"
        return f"{why}: {self.bound} bounds it, and {self.who} reaches {100 * self.share:.0f} % ({took})" + (
            above if self.share > 1.05 and self.bound == "arithmetic" else ""
        )


def measured(target: Target, dtypes: Sequence[str], seconds: float) -> Roof:
    """The roof of this machine, about `seconds` per rate."""
    found = ceilings.measure(target, tuple(dtypes), seconds)
    size, rate = ceilings.cache_gbps(target, min(seconds, 1.0))
    return Roof(target.name, "measured in this run", found.gemm_tflops, found.read_gbps, rate, size, found.copy_gbps)


def data_sheet(name: str) -> Roof:
    """The roof of a preset, from its data sheet: what nobody reaches. Raises ConfigError for one without rates."""
    target = Target.preset(name)
    if not target.bf16_tflops or not target.hbm_gbps:
        raise ConfigError(f"the preset {name} has no data-sheet rates; run without --target to measure this machine")
    rates = {"bf16": target.bf16_tflops, "fp16": target.bf16_tflops}
    return Roof(name, "data sheet", rates, target.hbm_gbps)


def of_rows(rows: Sequence[Row]) -> Roof:
    """The roof that stands in rows, the best of each rate. Raises ConfigError when they carry none."""
    gemm: dict[str, float] = {}
    read = copy = 0.0
    for row in rows:
        for key, value in row.ceilings.items():
            if key.startswith("gemm_") and key.endswith("_tflops") and key.count("_") == 2:
                dtype = key.split("_")[1]
                gemm[dtype] = max(gemm.get(dtype, 0.0), value)
        read = max(read, row.ceilings.get("read_gbps", 0.0))
        copy = max(copy, row.ceilings.get("copy_gbps", 0.0))
    if not gemm or not read:
        raise ConfigError(
            "these rows carry no ceilings (gemm_<dtype>_tflops and read_gbps); measure them with openmla bench"
        )
    return Roof(
        str(rows[0].environment.get("device", "?")), "measured beside these rows", gemm, read, copy_gbps=copy or None
    )


def place(case: Case, roof: Roof, row: Row | None = None, note: str = "") -> Place:
    """Where a case stands; with its row, how much of the roof it reached."""
    work: Cost = cost(workload.problem(case), case.draw_lengths())
    ridge = roof.ridge(case.roof_dtype)
    floor = max(work.flops / roof.gemm_tflops[case.roof_dtype] / 1e6, work.bytes / roof.read_gbps / 1e3)
    bound = "arithmetic" if work.intensity >= ridge else "memory"
    short = _SHORT_US["cpu" if row and row.environment.get("arch") == "cpu" else "gpu"]
    if row and floor < short and row.median_us > 3 * floor:
        bound = "latency"
    return Place(
        case.name, case.dtype, work.flops, work.bytes, work.intensity, ridge, floor, bound, row.who if row else "",
        row.median_us if row else None, note,
    )  # fmt: skip


@dataclass(frozen=True)
class Roofline:
    """A roof and the places under it."""

    roof: Roof
    places: tuple[Place, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema": 1,
            "roof": asdict(self.roof),
            "ridge": {dtype: self.roof.ridge(dtype) for dtype in self.roof.gemm_tflops},
            "cases": [{**asdict(each), "share": each.share, "sentence": each.sentence} for each in self.places],
        }

    def __str__(self) -> str:
        roof = self.roof
        rates = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in roof.gemm_tflops.items())
        lines = [f"{roof.device}, {roof.source}: {rates}; read {roof.read_gbps:.4g} GB/s"]
        if roof.copy_gbps:
            lines.append(f"  copy {roof.copy_gbps:.4g} GB/s, bytes read and written")
        if roof.cache_gbps:
            lines.append(f"  last cache {roof.cache_gbps:.4g} GB/s over {roof.cache_bytes / 2**20:.3g} MiB")
        lines += [f"  ridge {dtype} {roof.ridge(dtype):.3g} FLOP per byte" for dtype in roof.gemm_tflops]
        return "\n".join([*lines, *(f"{each.case}\n    {each.sentence}" for each in self.places)])


def run(
    chosen: Suite, cases: Sequence[Case], target: Target, backends: tuple[str, ...], seconds: float, say: Any
) -> Roofline:
    """Measure the roof of this machine and our own time of every case, behind the usual gate."""
    dtypes = tuple(case.roof_dtype for case in cases)
    stages = Stages(1 + len(cases), say)
    with stages.stage(f"ceilings of {target.name}"):
        roof = measured(target, dtypes, seconds)
        flat = ceilings.measure(target, dtypes, seconds)
    options, facts = runner.Options(backends, (), seconds), store.environment(target)
    places = []
    for case in cases:
        with stages.stage(case.name):
            result = runner.run_case(chosen, case, options, target, flat, facts, _quiet)
        why = "; ".join(each.reason for each in (*result.wrong, *result.refusals))
        places.append(place(case, roof, bars.ours(result.rows), f"no number: {why}" if why else ""))
    return Roofline(roof, tuple(places))


def _quiet(text: str) -> None:
    pass


def from_rows(rows: Sequence[Row]) -> Roofline:
    """The cases of a file of rows under the roof that the file carries."""
    table = {name: own for name, run in bars.newest(rows).items() if (own := bars.ours(run))}
    known = {name: case for name in table if (case := suite.parse(name))}
    if not known:
        raise ConfigError("no row of ours names a case; give a file that openmla bench --out wrote")
    roof = of_rows(list(table.values()))
    fits = {name: case for name, case in known.items() if case.roof_dtype in roof.gemm_tflops}
    return Roofline(roof, tuple(place(case, roof, table[name]) for name, case in fits.items()))


def planned(cases: Sequence[Case], roof: Roof) -> Roofline:
    """The cases under a roof, nothing run."""
    return Roofline(roof, tuple(place(case, roof) for case in cases))


# the page


def page(found: Roofline) -> Page:
    """Roof, places, sentences."""
    roof = found.roof
    used = [dtype for dtype in roof.gemm_tflops if any(each.dtype == dtype for each in found.places)]
    tiles = [Tile(f"{roof.gemm_tflops[dtype]:.3g} TFLOP/s", f"large matrix product, {dtype}") for dtype in used]
    tiles.append(Tile(f"{roof.read_gbps:.4g} GB/s", "reading memory"))
    if roof.copy_gbps:
        tiles.append(Tile(f"{roof.copy_gbps:.4g} GB/s", "copying memory, bytes read and written"))
    if roof.cache_gbps:
        tiles.append(
            Tile(f"{roof.cache_gbps:.4g} GB/s", f"reading {roof.cache_bytes / 2**20:.3g} MiB in the last cache")
        )
    tiles += [Tile(f"{roof.ridge(dtype):.3g}", f"FLOP per byte at the ridge, {dtype}") for dtype in used]
    lead = (
        f"Rates: {roof.source}. A call does so many multiplications and additions for each byte that it must read; left of the "
        "ridge the bytes cost the time, right of it the arithmetic."
    )
    return Page(_title(found), lead, list(_sections(found)), tiles, ["Made by `openmla roofline`."])


def _title(found: Roofline) -> str:
    bounds = [each.bound for each in found.places]
    said = ", ".join(
        f"{bounds.count(kind)} by {kind}" for kind in ("arithmetic", "memory", "latency") if kind in bounds
    )
    return f"{found.roof.device}: of {len(bounds)} cases, bound {said}"


def _sections(found: Roofline) -> Iterator[Section]:
    roof = found.roof
    figures = []
    for dtype in dict.fromkeys(each.dtype for each in found.places):
        places = [each for each in found.places if each.dtype == dtype]
        spots = [
            plot.Spot(
                each.intensity,
                each.flops / (each.measured_us or each.floor_us) / 1e6,
                _name(each),
                bool(each.measured_us),
            )
            for each in places
        ]
        slopes = [("memory", roof.read_gbps)] + ([("last cache", roof.cache_gbps)] if roof.cache_gbps else [])
        svg = plot.roofline(
            [("product", roof.gemm_tflops[dtype])], slopes, spots, salt=f"roof-{dtype}", title=f"Roofline, {dtype}"
        )
        caption = "Filled: measured. Hollow: where the case would be at the roof, not run. Dashed: the roof for data in the last cache."
        figures.append(Figure(svg, caption, dtype))
    yield Section("The roof", (), figures)
    rows = [
        [f"`{each.case}`", duration(each.measured_us / 1e6) if each.measured_us else "-",
         f"{100 * each.share:.0f} %" if each.share else "-", each.bound, duration(each.floor_us / 1e6),
         f"{each.intensity:.3g}", number(each.flops / 1e9), number(each.bytes / 1e6)]
        for each in found.places
    ]  # fmt: skip
    head = ("case", "measured", "of the roof", "bound by", "at best", "FLOP per byte", "GFLOP", "MB")
    text = ["Bytes are the fewest that must move: every attended row once, queries once, results once."]
    if any((each.share or 0) > 1.05 for each in found.places):
        text.append(
            "A case beyond 100 % multiplies faster than the product that the roof is made of, or reads from a cache."
        )
    sentences = [[f"`{each.case}`", each.sentence] for each in found.places]
    yield Section(
        "Each case",
        text,
        tables=[
            Table("cases", head, rows, left=(0, 3)),
            Table("in one sentence each", ("case", ""), sentences, (0, 1), True),
        ],
    )


def _name(each: Place) -> str:
    case = suite.parse(each.case)
    return label(case) if case else each.case
