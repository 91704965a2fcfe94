"""Benchmark cases are data: TOML files that name problems, never code.

    description = "what the suite is for"
    peers = ["sdpa", "matmul"]        # measured beside ours unless the command line names others

    [[case]]
    batch = 16
    h_q = [16, 128]                   # a list is a choice: the case is repeated for every combination
    s_k = 4096

Every key has one legal type and range, checked on load with file, case number and key in the message, because a
misspelt key that silently meant "default" would publish a number for another problem.
"""

from __future__ import annotations

import fnmatch
import itertools
import tomllib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from openmla.core.errors import ConfigError

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# key -> legal values; a range stands for every int in it. 2^21 keys is twice the longest context in use (1 M tokens).
_RULES: dict[str, tuple[object, ...] | range | type] = {
    "op": ("decode",),
    "batch": range(1, 65_537),
    "s_q": range(1, 1025),
    "h_q": range(1, 1025),
    "h_kv": range(1, 129),
    "s_k": range(1, (1 << 21) + 1),
    "d_qk": range(1, 2049),
    "d_v": range(1, 2049),
    "dtype": tuple(DTYPES),
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
    page_size: int = 64
    lengths: str = "fixed"
    is_causal: bool = False
    policy: str = "balanced"
    cache: str = "cold"
    seed: int = 0
    peers: tuple[str, ...] = field(default=(), compare=False)  # empty: those of the suite

    @property
    def name(self) -> str:
        """Unique within a suite; parts that have their default value are left out, save the five that span the space."""
        shape = f"{self.op}-b{self.batch}-sq{self.s_q}-hq{self.h_q}-sk{self.s_k}-{self.dtype}"
        extra = {
            f"hkv{self.h_kv}": self.h_kv != 1,
            f"d{self.d_qk}x{self.d_v}": (self.d_qk, self.d_v) != (576, 512),
            f"p{self.page_size}": self.page_size != 64,
            self.lengths: self.lengths != "fixed",
            "causal": self.is_causal,
            self.policy: self.policy != "balanced",
            self.cache: self.cache != "cold",
            f"seed{self.seed}": self.seed != 0,
        }
        return "-".join([shape, *(part for part, shown in extra.items() if shown)])

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, KV and out."""
        return DTYPES[self.dtype]

    def draw_lengths(self) -> list[int]:
        """Keys of each request; a function of the case alone, so that every machine and day measures the same batch."""
        if self.lengths == "fixed":
            return [self.s_k] * self.batch
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.batch} {self.s_k} {self.seed}".encode()))
        drawn = torch.normal(float(self.s_k), self.s_k / 2, (self.batch,), generator=generator)
        return [min(max(int(value), self.s_q), 2 * self.s_k) for value in drawn.tolist()]


@dataclass(frozen=True)
class Suite:
    """The cases of one file, in its order."""

    name: str
    description: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...] = ()
    path: Path = field(default=Path(), compare=False)

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
    legal = ("description", "peers", "defaults", "case")
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
    if wrong:
        raise ConfigError(f"{path}: " + "\n  ".join([f"{len(wrong)} problem(s)", *wrong]))
    return Suite(path.stem, str(raw.get("description", "")), tuple(cases), tuple(peers), path)


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
        else:
            yield case
