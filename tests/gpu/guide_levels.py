"""The six levels of chapter 3 on a GPU: right first, each in its own process, then timed in turn.

    PYTHONPATH=src:guide python tests/gpu/guide_levels.py build levels.so     where the DSL is installed; needs no GPU
    python tests/gpu/guide_levels.py gate levels.so                           each level in a subprocess; 1 when one is wrong
    python tests/gpu/guide_levels.py time levels.so rows.jsonl                one row per level and one of a bare read

Needs torch and apache-tvm-ffi on the GPU host. A level that hangs is a killed subprocess.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NAMES = ("loop", "wgmma", "TMA", "pipeline", "roles", "seesaw")
KEYS, ROWS, COLUMNS = 64, 16, 576
TILES = 8192  # 524,288 keys, 604 MB: twelve times the L2 of an H100, so every launch reads memory
SECONDS = 40


def build(library: Path) -> None:
    """Compile the levels into one library that needs no DSL."""
    import hopper_levels
    from openmla.backends.cute.toolchain import compile_kernel, link_bundle

    assert hopper_levels.NAMES == NAMES
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for level, name in enumerate(NAMES, 1):
            kernel = hopper_levels.Scores(level)
            made.append(compile_kernel(kernel, hopper_levels.arguments(), f"level_{level}", out_dir=Path(folder)))
            print(level, name, made[-1].resources.registers, "registers", made[-1].resources.spills, "spills")
            assert made[-1].resources.spills == 0
        link_bundle([each.object_path for each in made], library)


def tensors(tiles: int, size: float) -> tuple[Any, Any, Any]:
    """keys, q and an output full of NaN."""
    import torch

    g = torch.Generator("cuda").manual_seed(tiles)
    keys = torch.empty(tiles * KEYS, COLUMNS, dtype=torch.bfloat16, device="cuda").normal_(generator=g).mul_(size)
    q = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device="cuda").normal_(generator=g).mul_(size)
    return keys, q, torch.full((tiles, KEYS, ROWS), torch.nan, device="cuda")


def check(library: str, level: int) -> None:
    """Full, ragged and tiny grids against fp64: |error| <= 576 products in fp32, each rounded once."""
    import torch
    import tvm_ffi

    call = tvm_ffi.load_module(str(Path(library).resolve()))[f"level_{level}"]
    for tiles in (1, 131, 132, 133, 264, 1000):
        keys, q, out = tensors(tiles, 0.3)
        exact = (keys.double() @ q.double().T).view(tiles, KEYS, ROWS)
        sizes = (keys.double().abs() @ q.double().abs().T).view(tiles, KEYS, ROWS)
        bound = sizes * COLUMNS * 2.0**-24
        if level == 6:  # the approximate exponential is within 2 ulp, and carries the error of its argument
            exact = exact.exp2()
            bound = exact * (bound * 0.7 + 2.0**-21)
        first = None
        for _ in range(3):
            out.fill_(torch.nan)
            call(keys, q, out)
            torch.cuda.synchronize()
            first = out.clone() if first is None else first
            assert torch.equal(first, out), f"level {level}, {tiles} tiles: other bits in another run"
        worst = ((out.double() - exact).abs() / bound).max().item()
        assert worst <= 1, f"level {level}, {tiles} tiles: error is {worst:.2f} of the bound"
    print(f"level {level} {NAMES[level - 1]}: right, {worst:.2f} of the bound")


def gate(library: str) -> list[int]:
    """Levels that passed, each in a process of its own, all at once."""
    passed = []
    levels = range(1, len(NAMES) + 1)
    command = [sys.executable, __file__, "check", library]
    running = [
        subprocess.Popen([*command, str(level)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for level in levels
    ]
    for level, process in zip(levels, running, strict=True):
        try:
            said, _ = process.communicate(timeout=SECONDS)
            print(said.strip()[-600:], flush=True)
            passed += [level] if process.returncode == 0 else []
        except subprocess.TimeoutExpired:
            process.kill()
            print(f"level {level} {NAMES[level - 1]}: killed after {SECONDS} s", flush=True)
    return passed


def times(library: str, rows: Path) -> None:
    """Everybody in turn, cold: median, 20th and 80th percentile of 60 launches."""
    import torch
    import tvm_ffi

    from openmla.core.target import Target
    from openmla.lab import clock, store

    passed = gate(library)
    module = tvm_ffi.load_module(str(Path(library).resolve()))
    keys, q, out = tensors(TILES, 0.1)
    words = keys.view(torch.float32)
    calls: dict[str, Any] = {NAMES[i - 1]: lambda i=i: module[f"level_{i}"](keys, q, out) for i in passed}
    calls["read"] = words.sum  # reads the same bytes and does little else
    device = torch.device("cuda")
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(63):
        for name, call in calls.items():
            seconds = clock.seconds(call, device)
            if turn >= 3:
                found[name].append(1e6 * seconds)
    environment = store.environment(Target.detect("cuda"))
    lines = []
    for name, each in found.items():
        each.sort()
        median = clock.quantile(each, 0.5)
        size = keys.nbytes + (out.nbytes if name != "read" else 0)
        lines.append(
            {
                "level": NAMES.index(name) + 1 if name in NAMES else 0, "name": name, "keys": TILES * KEYS,
                "median_us": median, "p20_us": clock.quantile(each, 0.2), "p80_us": clock.quantile(each, 0.8),
                "n": len(each), "bytes": size, "gbps": size / median / 1e3,
                "environment": environment, "utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )  # fmt: skip
        print(f"{name:10} {median:8.1f} us {lines[-1]['gbps']:7.0f} GB/s")
    with rows.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, sort_keys=True) + "\n" for line in lines)


def main() -> int:
    verb, library, *rest = sys.argv[1:]
    if verb == "build":
        build(Path(library))
    elif verb == "check":
        check(library, int(rest[0]))
    elif verb == "gate":
        return 0 if len(gate(library)) == len(NAMES) else 1
    else:
        times(library, Path(rest[0]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
