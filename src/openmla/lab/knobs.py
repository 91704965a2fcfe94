"""What can be chosen in a kernel, and how to run it under any choice: the ground of `openmla tune`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from openmla.backends import kernels, select
from openmla.backends.base import DecodeOperands
from openmla.core import faults
from openmla.core.errors import ConfigError
from openmla.core.target import Target
from openmla.lab import peers, workload
from openmla.lab.peers import Contender
from openmla.lab.suite import Case

Setting = dict[str, int]

# (backend, kernel) -> parameter -> values worth trying. Fields of the kernel's Config, or numbers of its
# plan (PLAN); for the torch backend constants of its modules. Illegal combinations drop out: they fail to compile, or the gate.
SPACES: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("torch", "decode_tiled"): {
        "tile_keys": (256, 512, 1024, 2048, 4096),
        "task_rows": (32, 64, 128, 256, 512),
        "pair_keys": (256, 512, 1024, 2048),
    },
    ("triton", "decode_split"): {
        "block_m": (16, 32, 64),
        "block_n": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3, 4),
        "ctas_per_sm": (1, 2),
    },
    ("cute", "decode_dense_small"): {"parts_percent": (25, 50, 75, 100), "overhead_blocks": (1, 3, 5)},
    ("cute", "decode_dense"): {
        "cluster": (1, 2),
        "gate_left": (-2, -1, 19),
        "gate_right": (-2, -1),
        "loaders": (1, 2),
        "prefetch": (0, 2, 4),  # with two loaders one tile at most
        "parts_percent": (25, 50, 75, 100),
        "overhead_blocks": (1, 3, 5),
    },
}

# Numbers of the plan instead of the Config: how many of the parts that fit are used, and what starting a piece is taken to cost.
PLAN = ("parts_percent", "overhead_blocks")


@dataclass(frozen=True)
class Knobs:
    """How to run one kernel of one case under any setting."""

    backend: str
    kernel: Any
    default: Setting
    space: dict[str, tuple[int, ...]]
    under: Callable[[Setting], Contender]


def knobs_of(case: Case, sets: peers.Sets, target: Target, backend: str) -> Knobs:
    """Raises UnsupportedError for a case that the backend refuses, ConfigError for a kernel without a space."""
    problem = peers.problem_of(case, sets[0])
    chosen = select(problem, target, backend)
    kernel = next(each for each in kernels("decode") if each is chosen.kernel)
    name = (kernel.backend, kernel.name)
    if name not in SPACES:
        known = ", ".join("/".join(each) for each in SPACES)
        raise ConfigError(f"nothing to choose in {'/'.join(name)}; tunable kernels: {known}")
    space = SPACES[name]
    if kernel.backend == "torch":
        return Knobs(
            "torch", kernel, torch_defaults(case), space, torch_under(case, sets, kernel, chosen.config, target)
        )
    planned = {"parts_percent": 100}
    if "overhead_blocks" in space:
        planned["overhead_blocks"] = kernel.compile(problem, chosen.config, target).options.overhead_blocks
    default = {key: planned[key] if key in PLAN else int(getattr(chosen.config, key)) for key in space}

    def under(setting: Setting) -> Contender:
        config = replace(chosen.config, **{key: value for key, value in setting.items() if key not in PLAN})
        return pinned(case, sets, kernel, config, target, text(setting), setting)

    return Knobs(kernel.backend, kernel, default, space, under)


def pinned(
    case: Case, sets: peers.Sets, kernel: Any, config: Any, target: Target, name: str, setting: Mapping[str, int] = MappingProxyType({}),
) -> Contender:  # fmt: skip
    """The four verbs of a kernel with a config of our choice, outputs and plans made beforehand."""
    problem = peers.problem_of(case, sets[0])
    compiled = kernel.compile(problem, config, target)
    if set(PLAN) & set(setting):
        options = compiled.options
        parts = max(options.num_parts * setting["parts_percent"] // 100, 1)
        options = options._replace(num_parts=parts, overhead_blocks=setting["overhead_blocks"])
        compiled = replace(compiled, options=options, scratch={})  # scratch: shapes that follow from the options
    size = kernel.workspace_bytes(compiled, problem, case.policy)
    ready = []
    for x in sets:
        out = x.q.new_full((*x.q.shape[:-1], case.d_v), torch.nan)
        lse = torch.full((case.batch, case.h_q, case.s_q), torch.nan, device=x.device)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        operands = DecodeOperands(
            x.q, x.kv_cache, x.block_table, x.cache_seqlens, x.softmax_scale, out, lse, faults.fault_word(x.device),
            workspace=workspace,
        )  # fmt: skip
        ready.append((operands, kernel.plan(compiled, problem, x.cache_seqlens, case.policy)))

    def call(i: int) -> peers.Result:
        operands, plan = ready[i]
        kernel.launch(compiled, problem, operands, plan)
        return operands.out, operands.lse

    return Contender(name, "backend", kernel.name, name, call)


def torch_defaults(case: Case) -> Setting:
    """What the torch backend would choose for a case."""
    from openmla.backends.torch import attend, products

    rows = min(case.s_q * (case.h_q // case.h_kv), attend.TASK_ROWS)
    arithmetic = products.arithmetic_for(case.torch_dtype, case.d_qk, case.d_v)
    return {
        "tile_keys": arithmetic.tile_keys(rows),
        "task_rows": attend.TASK_ROWS,
        "pair_keys": products._PAIR_KEYS,
    }


@contextlib.contextmanager
def torch_constants(setting: Setting) -> Iterator[None]:
    """The torch backend with other numbers, for one call: it has no Config, its numbers are constants."""
    from openmla.backends.torch import products, tiled

    def tile_keys(self: object, rows: int) -> int:
        return setting["tile_keys"]

    places: list[tuple[Any, str, Any]] = [
        (tiled, "TASK_ROWS", setting["task_rows"]),
        (products, "_PAIR_KEYS", setting["pair_keys"]),
        (products.Arithmetic, "tile_keys", tile_keys),
    ]
    before = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(places, before, strict=True):
            setattr(owner, name, value)


def torch_under(
    case: Case, sets: peers.Sets, kernel: Any, config: Any, target: Target
) -> Callable[[Setting], Contender]:
    """The torch backend under any setting."""
    plain = pinned(case, sets, kernel, config, target, "torch")

    def under(setting: Setting) -> Contender:
        def call(i: int) -> peers.Result:
            with torch_constants(setting):
                return plain.call(i)

        name = text(setting)
        return Contender(name, "backend", kernel.name, name, call)

    return under


def text(setting: Mapping[str, int]) -> str:
    """A setting on one line, such as `block_n=32,num_warps=4`."""
    return ",".join(f"{key}={value}" for key, value in sorted(setting.items()))


def bundle(
    cases: Sequence[Case],
    target: Target,
    out: Path,
    backend: str,
    parameters: Sequence[str],
    say: Callable[[str], None],
) -> Path:
    """Compile everything that a search of these cases on `target` can try into an ahead-of-time bundle; no GPU needed.

    Every combination of the values of `parameters` (default: all of the kernel's) for the Config that each case would
    run with. Returns the manifest.

    Raises:
        ConfigError: a case whose kernel is not of the CuTe backend, which alone has bundles, or an unknown parameter.
        CompileError: a tool is missing, the compiler refused, or a setting spills registers.
    """
    from openmla.backends.cute import bundle as bundles
    from openmla.backends.cute.families import FAMILIES

    wanted: dict[str, dict[Any, None]] = {}
    known: dict[str, None] = {}
    for case in cases:
        problem = workload.problem(case)
        chosen = select(problem, target, backend)
        family = chosen.kernel.name
        if chosen.kernel.backend != "cute" or family not in FAMILIES:
            raise ConfigError(
                f"{case.name}: {chosen.kernel.backend}/{family} compiles at its first use; needs no bundle"
            )
        space = {key: values for key, values in SPACES.get(("cute", family), {}).items() if key not in PLAN}
        known.update(dict.fromkeys((*space, *PLAN)))
        used = {
            key: {*values, getattr(chosen.config, key)}
            for key, values in space.items()
            if not parameters or key in parameters
        }
        every = itertools.product(*(sorted(values) for values in used.values()))
        found = wanted.setdefault(family, {})
        found.update({replace(chosen.config, **dict(zip(used, values, strict=True))): None for values in every})
    strangers = [each for each in parameters if each not in known]
    if strangers:
        raise ConfigError(f"cute/{', '.join(wanted)} has no {', '.join(strangers)}; it has: {', '.join(known)}")
    # The kernel's helpers (plan, merge) come along as they ship.
    rest = {
        name: each for name, each in FAMILIES.items() if name == "schedule" or name.removesuffix("_merge") in wanted
    }
    return bundles.build(out, rest | {name: (tuple(found), FAMILIES[name][1]) for name, found in wanted.items()}, say)
