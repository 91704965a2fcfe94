"""The CPU reliability suite by one command: `make reliability`, or `python tests/reliability/suite.py [--out FILE]`.

The same tests as everywhere, with as many cases as a release deserves, two processes at a time; then the attempts of
`break_it.py` and a short soak. Needs no GPU; meant for 12 minutes on two quiet cores. The record says how many cases ran,
which mutants were caught, what failed. Exit status 0: everything passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
UNIT = "tests/unit"


@dataclass(frozen=True)
class Stage:
    """Test files, run with `scale` times their usual cases; or a script of this folder."""

    name: str
    files: tuple[str, ...]
    scale: int = 1
    at_least: int = 0  # cases; fewer is a failure
    keyword: str = ""

    def command(self, record: Path) -> list[str]:
        """What to run."""
        if self.files[0].endswith("reliability"):
            return [sys.executable, f"{self.files[0]}/{self.name}.py", "--record", str(record)]
        found = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-o", "timeout=900"]
        found += [*self.files, f"--case-scale={self.scale}", f"--record={record}"]
        return [*found, "-k", self.keyword] if self.keyword else found


# Longest first, so that two processes end together.
STAGES = (
    Stage("reference fuzz", (f"{UNIT}/test_fuzz_ops.py",), 5, 20_000, "cases and not large"),
    Stage("planner properties", (f"{UNIT}/test_schedule.py",), 5, 100_000),
    Stage("metamorphic relations", (f"{UNIT}/test_metamorphic.py",), 3, 6_000),
    Stage("poison and bits", (f"{UNIT}/test_fuzz_ops.py",), 1, 0, "not cases"),
    Stage("oracle and 26 mutants", (f"{UNIT}/test_budget.py", f"{UNIT}/test_reference.py"), 1, 1_000),
    Stage("argument fuzz", (f"{UNIT}/test_fuzz_arguments.py",), 20, 30_000),
    Stage("merge laws and ranks", (f"{UNIT}/test_combine.py", f"{UNIT}/test_distributed.py")),
    Stage("faults", tuple(f"{UNIT}/test_{name}.py" for name in ("faults_kernels", "diskcache", "monitor", "checks", "rollout"))),
    Stage("page allocator", (f"{UNIT}/test_kv.py",)),
    Stage("formats", (f"{UNIT}/test_quant.py",)),
    Stage("break_it", ("tests/reliability",)),
    Stage("soak", ("tests/reliability",)),
)  # fmt: skip


def run(stage: Stage) -> dict[str, Any]:
    """One stage in a process of its own."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
        log = Path(folder) / "log.txt"
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                stage.command(record), cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=file, stderr=file
            )
            _, status, used = os.wait4(process.pid, 0)  # CPU time of the stage with all that it started
            process.returncode = os.waitstatus_to_exitcode(status)
        text = log.read_text(encoding="utf-8", errors="replace")
        found = json.loads(record.read_text()) if record.exists() else {}
    passed = process.returncode == 0 and found.get("cases", 0) >= stage.at_least
    found |= {"passed": passed, "seconds": round(time.monotonic() - begin, 1), "wanted_cases": stage.at_least}
    found["cpu_seconds"] = round(used.ru_utime + used.ru_stime, 1)
    if not passed:
        found["log"] = text[-6000:]
    tests = sum(found.get("outcomes", {}).values())
    line = f"{stage.name:<24} {'passed' if passed else 'FAILED'} {tests:>5} tests {found.get('cases', 0):>7} cases"
    print(f"{line} {found['seconds']:>6.0f} s, {found['cpu_seconds']:>5.0f} s of CPU", flush=True)
    if not passed:
        print(found["log"], flush=True)
    return found


def main() -> int:
    """Every stage; prints a table and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "reliability.json")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--stage", action="append", help="repeatable; default: all")
    options = parser.parse_args()
    wanted = [each for each in STAGES if options.stage is None or each.name in options.stage]
    begin = time.monotonic()
    with ThreadPoolExecutor(options.parallel) as pool:
        found = dict(zip((each.name for each in wanted), pool.map(run, wanted), strict=True))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    record = {
        "schema": 1,
        "passed": all(each["passed"] for each in found.values()),
        "seconds": round(time.monotonic() - begin, 1),
        "cpu_seconds": round(sum(each["cpu_seconds"] for each in found.values()), 1),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip(),
        "stages": found,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{'passed' if record['passed'] else 'FAILED'} in {record['seconds']:.0f} s; record: {options.out}")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
