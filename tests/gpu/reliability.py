"""One command for what production asks of a GPU: `python tests/gpu/reliability.py [--sections a,b] [--out record.json]`.

Each section runs in a process of its own with a time limit, because some of them end with the device lost, on purpose.
Needs PyTorch with CUDA, Triton, and for the Hopper kernels a bundle in OPENMLA_AOT_DIR. Exit status 0: every section
that ran passed. The numerical suite is `prove_decode.py`; this one asks what happens when something goes wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIMITS = {"canary": 90, "portable_canary": 90, "values": 60, "modes": 60, "replays": 60, "watchdog": 40, "hang": 40, "sticky": 40,
          "foreign": 40, "memory": 40, "outgrown": 40, "soak": 60}  # fmt: skip
EXPECTED_STATUS = {"hang": 70}


ALONE = ("modes", "soak")  # they measure time


def run(name: str) -> dict[str, object]:
    """One section, in a process of its own."""
    begin = time.monotonic()
    command = [sys.executable, str(HERE / "reliability_sections.py"), name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMITS[name], check=False)
        status, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        status, out, err = -1, str(error.stdout or ""), f"no end within {LIMITS[name]} s"
    passed = status == EXPECTED_STATUS.get(name, 0)
    measured = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    found: dict[str, object] = {"passed": passed, "status": status, "seconds": round(time.monotonic() - begin, 1)}
    found |= {"measured": measured, "log": "" if passed else (out + err)[-3000:]}
    lines = "\n  ".join(map(json.dumps, measured))
    print(f"{name:<10} {'passed' if passed else 'FAILED'} {found['seconds']} s\n  {lines}\n{found['log']}", flush=True)
    return found


def main() -> int:
    """Sections that take no times share the device; then the others, one after another. The record grows as they end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(LIMITS))
    parser.add_argument("--parallel", type=int, default=5, help="processes on the device at a time")
    parser.add_argument("--out", type=Path, default=Path("reliability.json"))
    options = parser.parse_args()
    wanted = options.sections.split(",")
    record: dict[str, dict[str, object]] = {}

    def note(name: str, found: dict[str, object]) -> None:
        record[name] = found
        options.out.write_text(json.dumps(record, indent=1) + "\n")

    with ThreadPoolExecutor(options.parallel) as pool:
        together = {pool.submit(run, name): name for name in wanted if name not in ALONE}
        for each in as_completed(together):
            note(together[each], each.result())
    for name in (each for each in wanted if each in ALONE):
        note(name, run(name))
    from openmla.core.target import Target
    from openmla.lab import store

    row = {"kind": "gpu_suite", "utc": store.now(), "environment": store.environment(Target.detect("cuda"))}
    options.out.with_suffix(".jsonl").write_text(json.dumps(row | {"sections": record}) + "\n")
    return 0 if record and all(each["passed"] for each in record.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
