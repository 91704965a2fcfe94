"""Tune: what each choice of a kernel is worth on this machine, found by changing one at a time.

From the default setting on, each parameter is swept with the others held at the best so far; all values of a sweep are
gated against the oracle and then timed in turn, so a slow minute hits all of them. Passes go on until one changes
nothing. A value replaces the present one when it is beyond `MARGIN` faster in the same sweep and the bands from the
20th to the 80th percentile do not touch. The outcome runs against the default once more, and wins by the same rule or
is dropped: what is within the noise is not worth a setting of its own.

Every trial is appended to a file as it stands; a run that was cut off continues there. The result is a table with its
provenance. Nothing reads that table by itself: defaults live in the kernels' own code, where a reviewer sees them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from openmla import backends
from openmla.core.errors import CompileError, ConfigError, UnsupportedError
from openmla.core.target import Target
from openmla.lab import ceilings, clock, gate, peers, plot, runner, store
from openmla.lab.knobs import Knobs, Setting, knobs_of, text
from openmla.lab.page import Figure, Page, Section, Table, Tile, duration
from openmla.lab.peers import Contender
from openmla.lab.progress import Say, Stages
from openmla.lab.suite import Case

MARGIN = 0.02  # two runs of the same code on a quiet machine differ by less
MAX_PASSES = 3


@dataclass(frozen=True)
class Trial:
    """One setting in one sweep. `median_us` is None where it failed, and `gate` says how. Times in microseconds."""

    case: str
    backend: str
    kernel: str
    sweep: str  # the parameter that was swept, and what the others were
    setting: Setting
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    n: int
    gate: str
    provenance: str
    utc: str = ""


@dataclass(frozen=True)
class Worth:
    """One parameter in the last sweep of it: value -> median in microseconds, None where it failed."""

    parameter: str
    chosen: int
    default: int
    medians: dict[int, float | None]

    @property
    def spread(self) -> float:
        """The slowest value that works over the fastest: what a wrong choice costs."""
        times = [value for value in self.medians.values() if value]
        return max(times) / min(times) if times else 1.0

    @property
    def gain(self) -> float:
        """The default's time over that of the chosen value, in the same sweep."""
        before, after = self.medians.get(self.default), self.medians.get(self.chosen)
        return before / after if before and after else 1.0


@dataclass(frozen=True)
class Tuned:
    """The outcome of one case. `speedup`: default over best, both timed in turn at the end."""

    case: str
    backend: str
    kernel: str
    default: Setting
    best: Setting
    speedup: float
    default_us: float
    best_us: float
    worth: tuple[Worth, ...]
    trials: int
    reused: int
    environment: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """All cases of a run, and the reasons of those that could not be tuned."""

    entries: tuple[Tuned, ...]
    refused: dict[str, str]
    utc: str

    def as_dict(self) -> dict[str, Any]:
        """The tuned table: plain values for JSON."""
        entries = [
            {
                **asdict(each),
                "worth": {
                    w.parameter: {
                        "spread": w.spread,
                        "gain": w.gain,
                        "medians_us": {str(k): v for k, v in w.medians.items()},
                    }
                    for w in each.worth
                },
            }
            for each in self.entries
        ]
        return {"schema": 1, "utc": self.utc, "entries": entries, "refused": self.refused}

    def __str__(self) -> str:
        lines = []
        for each in self.entries:
            changed = ", ".join(f"{k} {each.default[k]} -> {v}" for k, v in each.best.items() if v != each.default[k])
            lines.append(
                f"{each.case}, {each.backend}/{each.kernel}: {each.speedup:.2f}x by {changed or 'nothing: the default stands'}"
            )
            for worth in each.worth:
                shown = ", ".join(f"{k}: {v:.4g}" if v else f"{k}: failed" for k, v in worth.medians.items())
                lines.append(f"  {worth.parameter:<12} a wrong choice costs {worth.spread:5.2f}x   us by value {shown}")
            lines.append(f"  {each.trials} trials, {each.reused} more from the file of an earlier run")
        lines += [f"{case}: not tuned, {why}" for case, why in self.refused.items()]
        return "\n".join(lines)


# the search


@dataclass
class _Search:
    """One case on its way. `known`: sweep -> its trials, from the file and from this run."""

    case: Case
    sets: peers.Sets
    target: Target
    knobs: Knobs
    floor_us: float
    seconds: float
    provenance: str
    file: Path | None
    known: dict[str, list[Trial]]
    golden: gate.Golden
    used: set[str] = field(default_factory=set)  # sweeps of `known` that were counted
    trials: int = 0
    reused: int = 0

    def sweep(self, name: str, settings: Sequence[Setting]) -> list[Trial]:
        """Gate and time settings in turn, or take them from the file when the same sweep stands there."""
        found = self.known.get(name, [])
        if [each.setting for each in found] == list(settings):
            self.reused += 0 if name in self.used else len(found)
            self.used.add(name)
            return found
        self.used.add(name)
        ready: list[tuple[int, Contender]] = []
        gates: list[str] = []
        for number, setting in enumerate(settings):
            contender, said = self._gated(setting)
            gates.append(said)
            if contender:
                ready.append((number, contender))
        samples: dict[int, list[float]] = {}
        if ready:
            contenders = [contender for _, contender in ready]
            _, times = runner.time_in_turn(
                contenders, len(self.sets), self.target, self.case, self.floor_us, self.seconds, _quiet
            )
            samples = {number: each for (number, _), each in zip(ready, times, strict=True)}
        trials = [self._trial(name, setting, gates[i], samples.get(i)) for i, setting in enumerate(settings)]
        self.known[name] = trials
        self.trials += len(trials)
        if self.file:
            append(self.file, trials)
        return trials

    def _gated(self, setting: Setting) -> tuple[Contender | None, str]:
        try:
            contender = self.knobs.under(setting)
            out, lse = contender.call(0)
        except (RuntimeError, ValueError, AssertionError, MemoryError, CompileError, NotImplementedError) as error:
            return None, f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        verdict = gate.check(self.case, self.sets[0], out, lse, self.golden)
        return (contender if verdict.is_green else None), verdict.text

    def _trial(self, name: str, setting: Setting, said: str, seconds: list[float] | None) -> Trial:
        ordered = sorted(each * 1e6 for each in seconds or ())
        median, low, high = (clock.quantile(ordered, q) if ordered else None for q in (0.5, 0.2, 0.8))
        return Trial(
            self.case.name, self.knobs.backend, self.knobs.kernel.name, name, dict(setting), median, low, high,
            len(ordered), said, self.provenance, store.now(),
        )  # fmt: skip

    def run(self, tell: Callable[[float], None]) -> tuple[Setting, dict[str, Worth]]:
        """Coordinate descent. Returns the best setting and the last sweep of every parameter."""
        best, worth = dict(self.knobs.default), {}
        done, steps = 0, MAX_PASSES * len(self.knobs.space)
        for _ in range(MAX_PASSES):
            before = dict(best)
            for parameter, values in self.knobs.space.items():
                tried = sorted({*values, best[parameter], self.knobs.default[parameter]})
                trials = self.sweep(f"{parameter} at {text(best)}", [{**best, parameter: value} for value in tried])
                medians = {each.setting[parameter]: each.median_us for each in trials}
                best = dict(_better(trials, best).setting)
                worth[parameter] = Worth(parameter, best[parameter], self.knobs.default[parameter], medians)
                done += 1
                tell(done / steps)
            if best == before:
                break
        return best, worth


def _better(trials: Sequence[Trial], present: Setting) -> Trial:
    """The fastest trial of a sweep if it is clearly faster than the present setting, else the present one's."""
    now = next(each for each in trials if each.setting == present)
    fastest = min((each for each in trials if each.median_us), key=lambda each: each.median_us or 0.0, default=now)
    if not now.median_us or not now.p20_us or not fastest.median_us or not fastest.p80_us:
        return fastest
    is_clear = fastest.median_us < now.median_us * (1 - MARGIN) and fastest.p80_us < now.p20_us
    return fastest if is_clear else now


def tune(
    cases: Sequence[Case],
    target: Target,
    *,
    backend: str = "auto",
    seconds: float = 0.3,
    parameters: Sequence[str] = (),
    trials: Path | None = None,
    say: Say | None = None,
) -> Record:
    """Tune each case on this machine.

    Args:
        cases: problems.
        target: this machine.
        backend: auto takes the kernel that would run.
        seconds: per setting and sweep; at least ten rounds are run.
        parameters: search these alone, the others stay at their defaults; default: all of the kernel's.
        trials: JSONL file that every trial is appended to, and that a later run continues from.
        say: progress.

    Raises:
        ConfigError: a malformed trials file, or one that cannot be written.
    """
    facts = store.environment(target)
    seen = read(trials) if trials else []
    stages = Stages(len(cases), say)
    entries, refused = [], {}
    for case in cases:
        with stages.stage(case.name) as tell:
            try:
                entries.append(_tune_one(case, target, backend, seconds, parameters, trials, seen, facts, tell))
            except UnsupportedError as error:
                refused[case.name] = str(error.headline)
            except ConfigError as error:
                refused[case.name] = str(error)
    return Record(tuple(entries), refused, store.now())


def _tune_one(
    case: Case, target: Target, backend: str, seconds: float, parameters: Sequence[str], file: Path | None,
    seen: Sequence[Trial], facts: dict[str, Any], tell: Callable[[float], None],
) -> Tuned:  # fmt: skip
    sets, floor = runner.inputs(case, target, ceilings.measure(target, (case.dtype,), 0.3))
    knobs = knobs_of(case, sets, target, backend)
    strangers = [each for each in parameters if each not in knobs.space]
    if strangers:
        raise ConfigError(
            f"{knobs.backend}/{knobs.kernel.name} has no {', '.join(strangers)}; it has: {', '.join(knobs.space)}"
        )
    if parameters:
        knobs = replace(knobs, space={name: values for name, values in knobs.space.items() if name in parameters})
    provenance = _provenance(facts, knobs.backend)
    mine = [
        each for each in seen if (each.case, each.kernel, each.provenance) == (case.name, knobs.kernel.name, provenance)
    ]
    known: dict[str, list[Trial]] = {}
    for each in mine:
        group = known.setdefault(each.sweep, [])
        if any(other.setting == each.setting for other in group):
            group.clear()  # the sweep was run again; the newer one counts
        group.append(each)
    search = _Search(case, sets, target, knobs, floor, seconds, provenance, file, known, gate.golden(case, sets[0]))
    best, worth = search.run(tell)
    pair = [knobs.default] if best == knobs.default else [knobs.default, best]
    last = search.sweep(f"default against {text(best)}", pair)
    first, winner = last[0], _better(last, knobs.default)
    if not first.median_us or not winner.median_us:
        raise ConfigError(f"the default setting of {knobs.backend}/{knobs.kernel.name} failed: {first.gate}")
    return Tuned(
        case.name, knobs.backend, knobs.kernel.name, knobs.default, winner.setting, first.median_us / winner.median_us,
        first.median_us, winner.median_us, tuple(worth.values()), search.trials, search.reused, facts,
    )  # fmt: skip


def _quiet(text: str) -> None:
    pass


def _provenance(facts: Mapping[str, Any], backend: str) -> str:
    """What a trial depends on besides its case and setting; a trial of another machine or source is not reused."""
    folder = Path(backends.__file__).parent / backend
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    keys = ("device", "threads", "torch", "packages")
    return json.dumps({**{key: facts.get(key) for key in keys}, "sources": digest.hexdigest()[:12]}, sort_keys=True)


def append(path: Path, trials: Sequence[Trial]) -> None:
    """Add trials at the end of a JSONL file. Raises ConfigError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(each), sort_keys=True) + "\n" for each in trials))
    except OSError as error:
        raise ConfigError(f"cannot append to {path}: {error.strerror}; choose another file with --trials") from error


def write(record: Record, path: Path) -> None:
    """The tuned table as JSON. Raises ConfigError when it cannot be written."""
    try:
        path.write_text(json.dumps(record.as_dict(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another file with --table") from error


def load(path: Path) -> Record:
    """A table that `write` made, perhaps on a machine that cannot draw. Raises ConfigError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        entries = []
        for each in raw["entries"]:
            worth = tuple(
                Worth(
                    name, each["best"][name], each["default"][name], {int(k): v for k, v in one["medians_us"].items()}
                )
                for name, one in each["worth"].items()
            )
            entries.append(Tuned(**{**each, "worth": worth}))
        return Record(tuple(entries), raw["refused"], raw["utc"])
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no table of openmla tune: {type(error).__name__} {error}") from error


def read(path: Path) -> list[Trial]:
    """Every trial of a file; none when it is not there yet. Raises ConfigError naming file and line of a malformed one."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(Trial(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ConfigError(
                f"{path}:{number}: not a trial ({error}); remove the line or choose another --trials"
            ) from error
    return found


# the page


def page(record: Record) -> Page:
    """What each parameter is worth, case by case."""
    sections = [_section(i, each) for i, each in enumerate(record.entries)]
    if record.refused:
        rows = [[f"`{case}`", why] for case, why in record.refused.items()]
        sections.append(Section("Not tuned", tables=[Table("refused", ("case", "why"), rows, (0, 1))]))
    gained = sum(each.best != each.default for each in record.entries)
    lead = (
        "Each parameter is swept with the others held at the best so far; every value passed the gate against the fp64 oracle "
        f"before it was timed, and those of one sweep took turns. A change counts beyond {MARGIN:.0%} and outside both bands."
    )
    tiles = [Tile(f"{each.speedup:.2f}x", f"over the default, `{each.case}`") for each in record.entries[:4]]
    device = str(record.entries[0].environment.get("device")) if record.entries else "this machine"
    title = f"{device}: a better setting for {gained} of {len(record.entries)} cases"
    facts = record.entries[0].environment if record.entries else {}
    footer = [
        f"torch {facts.get('torch')}, commit {str(facts.get('git_sha') or 'unknown')[:10]}, {record.utc}.",
        "Made by `openmla tune`.",
    ]
    return Page(title, lead, sections, tiles, footer)


def _section(number: int, each: Tuned) -> Section:
    labels = [f"{w.parameter} {value}" for w in each.worth for value in w.medians]
    values = [
        (min(time for time in w.medians.values() if time) / time if time else None)
        for w in each.worth
        for time in w.medians.values()
    ]
    svg = plot.dots(
        labels, {"speed": values}, salt=f"tune{number}", title=f"Speed by value of each parameter, {each.case}",
        heading="speed against the best value of the same sweep",
    )  # fmt: skip
    rows = [
        [w.parameter, str(w.default), str(each.best[w.parameter]), f"{w.gain:.3f}x", f"{w.spread:.2f}x"]
        for w in each.worth
    ]
    head = ("parameter", "default", "outcome", "chosen over default", "worst over best")
    text = (
        f"`{each.backend}/{each.kernel}`: {duration(each.default_us / 1e6)} by default, {duration(each.best_us / 1e6)} as tuned, "
        f"timed in turn. {each.trials} trials, {each.reused} more from an earlier run."
    )
    table = Table("what each parameter is worth", head, rows)
    return Section(
        each.case, [text], [Figure(svg, "Left is slower. A value without a dot failed to run or to pass.")], [table]
    )
