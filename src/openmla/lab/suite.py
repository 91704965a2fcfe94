"""Benchmark cases are data: TOML files that name problems, never code.

    description = "what the suite is for"
    peers = ["sdpa", "matmul"]        # measured beside ours unless the command line names others

    [[case]]
    batch = 16
    h_q = [16, 128]                   # a list is a choice: the case is repeated for every combination
    s_k = 4096

    [[bar]]                           # optional: what the rows of this suite are held against (openmla.lab.bars)
    name = "one request of 4k tokens"
    cases = ["decode-b1-*-sk4096-*"]  # shell patterns of case names
    value = "median_us"
    at_most = 10.0

Every key has one legal type and range, checked on load with file, case number and key in the message, because a
misspelt key that silently meant "default" would publish a number for another problem.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
import tomllib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from openmla.core.errors import ConfigError
from openmla.core.layout import BYTE_LAYOUT_NAMES, kv_layout

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "e4m3": torch.float8_e4m3fn,
}  # fmt: skip

# key -> legal values; a range stands for every int in it. 2^21 keys is twice the longest context in use (1 M tokens).
_RULES: dict[str, tuple[object, ...] | range | type] = {
    "op": ("decode", "append", "sparse_prefill", "sparse_decode"),
    "batch": range(1, 65_537),
    "s_q": range(1, 65_537),
    "h_q": range(1, 1025),
    "h_kv": range(1, 129),
    "s_k": range(1, (1 << 21) + 1),
    "d_qk": range(1, 2049),
    "d_v": range(1, 2049),
    "dtype": tuple(DTYPES),
    "topk": range(0, (1 << 17) + 1),
    "extra_topk": range(0, (1 << 17) + 1),
    "layout": ("plain", *BYTE_LAYOUT_NAMES, "fp8_576"),
    "page_size": range(1, 65_537),
    "lengths": ("fixed", "varlen"),
    "is_causal": bool,
    "policy": ("balanced", "batch_invariant"),
    "cache": ("cold", "warm"),
    "seed": range(0, 1 << 31),
}


@dataclass(frozen=True)
class Case:
    """One problem to measure.

    lengths = "varlen" draws each request's keys from N(s_k, s_k / 2), cut to [s_q, 2 * s_k]; cache = "cold" means that
    no run finds its KV in a cache; "warm" that it may, and that a GPU is kept under load between runs.
    """

    batch: int
    s_k: int
    op: str = "decode"
    s_q: int = 1
    h_q: int = 128
    h_kv: int = 1
    d_qk: int = 576
    d_v: int = 512
    dtype: str = "bf16"
    layout: str = "plain"  # elements of `dtype`, or the name of a byte layout
    page_size: int = 64
    lengths: str = "fixed"
    is_causal: bool = False
    policy: str = "balanced"
    cache: str = "cold"
    seed: int = 0
    topk: int = 0  # keys of a token, and of a second cache: sparse ops, see `openmla.lab.sparse`
    extra_topk: int = 0
    peers: tuple[str, ...] = field(default=(), compare=False)  # empty: those of the suite

    @property
    def name(self) -> str:
        """Unique within a suite; parts that have their default value are left out, save the five that span the space."""
        shape = f"{self.op}-b{self.batch}-sq{self.s_q}-hq{self.h_q}-sk{self.s_k}-{self.dtype}"
        extra = {
            f"hkv{self.h_kv}": self.h_kv != 1,
            f"d{self.d_qk}x{self.d_v}": (self.d_qk, self.d_v) != (576, 512),
            self.layout: self.layout != "plain",
            f"p{self.page_size}": self.page_size != 64,
            self.lengths: self.lengths != "fixed",
            "causal": self.is_causal,
            self.policy: self.policy != "balanced",
            self.cache: self.cache != "cold",
            f"seed{self.seed}": self.seed != 0,
            f"topk{self.topk}": self.topk != 0,
            f"extra{self.extra_topk}": self.extra_topk != 0,
        }
        return "-".join([shape, *(part for part, shown in extra.items() if shown)])

    @property
    def kv_layout(self) -> str | None:
        """What the operations take as `kv_layout=`: None for plain elements."""
        return None if self.layout == "plain" else self.layout

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, of out (bf16 where q is e4m3), and of a plain KV cache."""
        return DTYPES[self.dtype]

    @property
    def roof_dtype(self) -> str:
        """The dtype whose square product is the roof of arithmetic; of codes that of bf16, which FP8 cores may pass."""
        return "bf16" if self.dtype == "e4m3" else self.dtype

    def draw_lengths(self) -> list[int]:
        """Keys of each request; a function of the case alone, so that every machine and day measures the same batch.

        With op "append", the keys that are written: s_q behind s_k others (see `openmla.lab.writers`).
        """
        if self.op == "append":
            return [self.s_q] * self.batch
        if self.lengths == "fixed":
            return [self.s_k] * self.batch
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.batch} {self.s_k} {self.seed}".encode()))
        drawn = torch.normal(float(self.s_k), self.s_k / 2, (self.batch,), generator=generator)
        return [min(max(int(value), self.s_q), 2 * self.s_k) for value in drawn.tolist()]


BAR_VALUES = {
    "ratio": "the fastest peer's time over ours",
    "gemm": "our TFLOP/s over those of the square product timed in turn",
    "copy": "the time of a copy of as many bytes, timed in turn, over ours",
    "read": "our GB/s over the measured read bandwidth",
    "median_us": "our median time",
    "policy_cost": "our time over the same case's under the policy balanced, less 1",
}


@dataclass(frozen=True)
class Bar:
    """A promise about the rows of a suite: `value` of every case (or their geometric mean) is at least, or at most."""

    name: str
    cases: tuple[str, ...]  # shell patterns
    value: str  # a key of BAR_VALUES
    limit: float
    is_floor: bool  # True: at least `limit`
    over: str = "each"  # or "geomean"

    def holds(self, value: float) -> bool:
        """True when a value keeps the promise."""
        return value >= self.limit if self.is_floor else value <= self.limit

    def covers(self, case: str) -> bool:
        """True for the cases it is about."""
        return any(fnmatch.fnmatchcase(case, pattern) for pattern in self.cases)


@dataclass(frozen=True)
class Suite:
    """The cases of one file, in its order."""

    name: str
    description: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...] = ()
    path: Path = field(default=Path(), compare=False)
    bars: tuple[Bar, ...] = ()

    def matching(self, pattern: str | None) -> tuple[Case, ...]:
        """Cases whose name matches a shell pattern (`*hq16*`). Raises ConfigError when none does."""
        if pattern is None:
            return self.cases
        found = tuple(case for case in self.cases if fnmatch.fnmatchcase(case.name, pattern))
        if not found:
            names = ", ".join(case.name for case in self.cases[:4])
            raise ConfigError(
                f"no case of suite {self.name} matches {pattern!r}; it has {len(self.cases)}: {names}, ..."
            )
        return found


def folders() -> tuple[Path, ...]:
    """Where suites are looked for by name: bench/suites here, of the source tree, and the copy inside the wheel."""
    package = Path(__file__).resolve().parent
    return (Path("bench/suites"), package.parents[2] / "bench" / "suites", package / "suites")


def available() -> tuple[str, ...]:
    """Names of the suites that `find` knows."""
    return tuple(sorted({path.stem for folder in folders() for path in folder.glob("*.toml")}))


def find(name_or_path: str) -> Path:
    """The file of a suite given by name or path. Raises ConfigError, naming the suites there are."""
    direct = Path(name_or_path)
    if direct.suffix == ".toml":
        if direct.is_file():
            return direct
        raise ConfigError(
            f"suite file {name_or_path} does not exist; suites by name: {', '.join(available()) or 'none'}"
        )
    for folder in folders():
        path = folder / f"{name_or_path}.toml"
        if path.is_file():
            return path
    raise ConfigError(
        f"unknown suite {name_or_path!r}; use one of: {', '.join(available()) or 'none'}; or a path ending in .toml"
    )


def load(name_or_path: str) -> Suite:
    """Read a suite. Raises ConfigError that names file, case and key of everything that is wrong."""
    path = find(name_or_path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    legal = ("description", "peers", "defaults", "case", "bar")
    wrong = [f"unknown key {key!r}; legal: {', '.join(legal)}" for key in raw if key not in legal]
    defaults = raw.get("defaults", {})
    if not isinstance(defaults, dict):
        wrong.append(f"defaults must be a table, got {defaults!r}")
        defaults = {}
    entries = raw.get("case", [])
    peers = raw.get("peers", [])
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        wrong.append("needs at least one [[case]] table")
        entries = []
    wrong += _wrong_peers(peers, "")
    cases: list[Case] = []
    for number, entry in enumerate(entries, 1):
        where = f"case {number}"
        problems = list(_wrong_keys({**defaults, **entry}, where))
        wrong += problems
        if not problems:
            cases += list(_expand({**defaults, **entry}, where, wrong))
    names = [case.name for case in cases]
    wrong += [f"{name} appears {names.count(name)} times" for name in sorted({n for n in names if names.count(n) > 1})]
    bars = [_bar(entry, f"bar {number}", names, wrong) for number, entry in enumerate(raw.get("bar", []), 1)]
    if wrong:
        raise ConfigError(f"{path}: " + "\n  ".join([f"{len(wrong)} problem(s)", *wrong]))
    kept = tuple(bar for bar in bars if bar)
    return Suite(path.stem, str(raw.get("description", "")), tuple(cases), tuple(peers), path, kept)


def sweep(choices: Mapping[str, Any], peers: tuple[str, ...] = ()) -> Suite:
    """A suite made on the spot: every combination of the given values; what is not given has its default.

    Raises ConfigError naming each key and value that is not legal.
    """
    entry = {"batch": 1, "s_k": 4096, "layout": "plain", **choices}
    wrong = list(_wrong_keys(entry, "sweep"))
    cases: list[Case] = []
    layouts = entry["layout"] if isinstance(entry["layout"], list) else [entry["layout"]]
    for layout in layouts if not wrong else ():
        # A byte layout has its own number of columns.
        own = {} if layout == "plain" else {"d_qk": kv_layout(layout).d_qk, "d_v": kv_layout(layout).d_v}
        cases += _expand({**own, **entry, "layout": layout}, "sweep", wrong)
    if wrong:
        raise ConfigError("\n  ".join([f"{len(wrong)} problem(s)", *wrong]))
    return Suite("sweep", "made on the command line", tuple(cases), peers)


_NAME = re.compile(
    r"(?P<op>decode|append|sparse_prefill|sparse_decode)-b(?P<batch>\d+)-sq(?P<s_q>\d+)-hq(?P<h_q>\d+)-sk(?P<s_k>\d+)-(?P<dtype>bf16|fp16|fp32|e4m3)"
    r"(-hkv(?P<h_kv>\d+))?(-d(?P<d_qk>\d+)x(?P<d_v>\d+))?"
    rf"(-(?P<layout>{'|'.join(sorted((*BYTE_LAYOUT_NAMES, 'fp8_576'), key=len, reverse=True))}))?"
    r"(-p(?P<page_size>\d+))?(-(?P<lengths>varlen))?(?P<is_causal>-causal)?(-(?P<policy>batch_invariant))?"
    r"(-(?P<cache>warm))?(-seed(?P<seed>\d+))?(-topk(?P<topk>\d+))?(-extra(?P<extra_topk>\d+))?"
)


def parse(name: str) -> Case | None:
    """The case of that name, the inverse of `Case.name`; None when it is no such name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    given: dict[str, Any] = {key: value for key, value in match.groupdict().items() if value is not None}
    for each in fields(Case):
        if each.type == "int" and each.name in given:
            given[each.name] = int(given[each.name])
    given["is_causal"] = "is_causal" in given
    return Case(**given)


def _bar(entry: object, where: str, names: list[str], wrong: list[str]) -> Bar | None:
    """One [[bar]] table, or None after recording what is wrong with it."""
    before = len(wrong)
    if not isinstance(entry, dict):
        wrong.append(f"{where}: must be a table, got {entry!r}")
        return None
    legal = ("name", "cases", "value", "at_least", "at_most", "over")
    wrong += [f"{where}: unknown key {key!r}; legal: {', '.join(legal)}" for key in entry if key not in legal]
    patterns, value, over = entry.get("cases"), entry.get("value"), entry.get("over", "each")
    limits = [entry[key] for key in ("at_least", "at_most") if key in entry]
    if not isinstance(patterns, list) or not patterns or not all(isinstance(each, str) for each in patterns):
        wrong.append(f"{where}: cases must be a list of patterns, got {patterns!r}")
    else:
        unused = [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]
        wrong += [f"{where}: no case matches {pattern!r}" for pattern in unused]
    if value not in BAR_VALUES:
        wrong.append(f"{where}: value must be one of {', '.join(BAR_VALUES)}, got {value!r}")
    if over not in ("each", "geomean"):
        wrong.append(f"{where}: over must be each or geomean, got {over!r}")
    if len(limits) != 1 or not isinstance(limits[0], (int, float)) or isinstance(limits[0], bool):
        wrong.append(f"{where}: needs one number, at_least or at_most")
    if len(wrong) > before:
        return None
    name = str(entry.get("name", value))
    return Bar(name, tuple(entry["cases"]), str(value), float(limits[0]), "at_least" in entry, str(over))


def _wrong_keys(entry: Mapping[str, Any], where: str) -> Iterator[str]:
    for key in ("batch", "s_k"):
        if key not in entry:
            yield f"{where}: key {key!r} is missing"
    for key, given in entry.items():
        if key == "peers":
            yield from _wrong_peers(given, f"{where}: ")
            continue
        rule = _RULES.get(key)
        if rule is None:
            yield f"{where}: unknown key {key!r}; legal: {', '.join(_RULES)}"
            continue
        values = given if isinstance(given, list) else [given]
        if not values:
            yield f"{where}: {key} is an empty list"
        for value in values:
            if not _legal(value, rule):
                yield f"{where}: {key} must be {_words(rule)}, got {value!r}"


def _wrong_peers(given: object, where: str) -> list[str]:
    if isinstance(given, list) and all(isinstance(peer, str) for peer in given):
        return []
    return [f"{where}peers must be a list of names, got {given!r}"]


def _legal(value: object, rule: tuple[object, ...] | range | type) -> bool:
    if rule is bool:
        return isinstance(value, bool)
    if isinstance(rule, range):
        return isinstance(value, int) and not isinstance(value, bool) and value in rule
    return isinstance(value, str) and isinstance(rule, tuple) and value in rule


def _words(rule: tuple[object, ...] | range | type) -> str:
    if isinstance(rule, range):
        return f"an integer from {rule.start} to {rule.stop - 1}"
    if isinstance(rule, tuple):
        return "one of " + ", ".join(map(str, rule))
    return "true or false"


def _expand(entry: Mapping[str, Any], where: str, wrong: list[str]) -> Iterator[Case]:
    peers = tuple(entry.get("peers", ()))
    order = [each.name for each in fields(Case) if each.name in entry and each.name != "peers"]
    choices = [entry[key] if isinstance(entry[key], list) else [entry[key]] for key in order]
    for values in itertools.product(*choices):
        case = Case(**dict(zip(order, values, strict=True)), peers=peers)
        if case.h_q % case.h_kv:
            wrong.append(f"{where}: h_q={case.h_q} is not a multiple of h_kv={case.h_kv}")
        elif case.d_v > case.d_qk:
            wrong.append(f"{where}: d_v={case.d_v} exceeds d_qk={case.d_qk}; V is the first d_v columns of the key")
        elif case.layout != "plain" and (case.d_qk, case.d_v, case.h_kv) != _columns(case.layout):
            wrong.append(
                f"{where}: layout {case.layout} has (d_qk, d_v, h_kv) = {_columns(case.layout)}, "
                f"got {(case.d_qk, case.d_v, case.h_kv)}"
            )
        else:
            yield case


def _columns(layout: str) -> tuple[int, int, int]:
    found = kv_layout(layout)
    return (found.d_qk, found.d_v, 1)
