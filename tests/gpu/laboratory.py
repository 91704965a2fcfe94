"""Every verb of the laboratory once on a GPU, each in its own process, in about 100 seconds.

    python tests/gpu/laboratory.py OUT [NAME ...]      names as below, such as roofline or "profile, auto"; default: all

Writes rows and JSON records to OUT; `openmla report`, `roofline --rows`, `profile --record` and `tune --record` make
their pages anywhere else. Ends with 1 when a verb failed. Needs openmla on the path; peers that are not installed say so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SECONDS = 120
SMALL, LARGE = "decode-b4-sq1-hq16-sk32768-bf16", "decode-b128-sq1-hq128-sk4096-bf16"
MANY_ROWS = "decode-b128-sq1-hq64-sk4096-bf16-varlen"  # ncu sees that kernel where it runs without clusters


@dataclass(frozen=True)
class Verb:
    """What is run, and where its JSON goes."""

    name: str
    arguments: list[str]
    record: Path | None = None
    is_alone: bool = False  # times what others would disturb


def verbs(out: Path) -> list[Verb]:
    """Those that time first, one behind another; then those that look or compute, side by side."""
    rows = str(out / "rows.jsonl")
    one = ["--suite", "decode_dense", "--case"]
    peers = [part for name in ("flash_mla", "fa3", "flashinfer", "triton_usual", "gemm") for part in ("--peer", name)]
    tune = ["--backend", "triton", "--parameter", "block_n", "--seconds", "0.05", "--table", str(out / "tuned.json")]
    return [
        Verb("bench small", ["bench", *one, SMALL, *peers, "--seconds", "0.1", "--out", rows], None, True),
        Verb("bench large", ["bench", *one, LARGE, *peers, "--seconds", "0.1", "--out", rows], None, True),
        Verb("roofline", ["roofline", "--case", "*b2*", "--seconds", "0.1"], out / "roofline.json", True),
        Verb("tune", ["tune", *one, SMALL, *tune], out / "tune.json", True),
        Verb("report", ["report", rows], out / "report.json"),
        Verb("profile, auto", ["profile", *one, SMALL], out / "profile.json"),
        Verb("profile, ncu", ["profile", *one, MANY_ROWS, "--tool", "ncu"], out / "profile_ncu.json"),
        Verb("profile, torch", ["profile", *one, LARGE, "--tool", "torch"], out / "profile_torch.json"),
        Verb("study", ["study", "--target", "here"], out / "study.json"),
    ]


def run(verb: Verb) -> bool:
    """Whether it ended as it should; says how."""
    command = [sys.executable, "-m", "openmla", *verb.arguments, *(["--json"] if verb.record else [])]
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        code, text, error = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        code, text, error = 124, "", f"killed after {late.timeout} s"
    if verb.record and text:
        verb.record.write_text(text)
    # 1 is a finding (a missed bar, nothing to tune), not a failure, as long as there is a result.
    is_fine = code in (0, 1) and bool(text) and "Traceback" not in error
    if is_fine and verb.record:
        json.loads(text)
    said = [f"{'ok  ' if is_fine else 'FAIL'} {verb.name}: exit {code}, {time.perf_counter() - begin:.1f} s"]
    said += [text] if not verb.record else []
    print(*said, "" if is_fine else error[-1500:], sep="\n", flush=True)
    return is_fine


def main() -> int:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    wanted = [verb for verb in verbs(out) if not sys.argv[2:] or verb.name in sys.argv[2:]]
    failed = [verb.name for verb in wanted if verb.is_alone and not run(verb)]
    with ThreadPoolExecutor() as together:
        others = [verb for verb in wanted if not verb.is_alone]
        failed += [verb.name for verb, is_fine in zip(others, together.map(run, others), strict=True) if not is_fine]
    print("failed: " + ", ".join(failed) if failed else "every verb ran")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
