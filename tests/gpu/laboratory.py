"""Every verb of the laboratory once on a GPU, each in its own process, in about two minutes.

    python tests/gpu/laboratory.py OUT [NAME ...]      names as below, such as roofline or "profile, auto"; default: all

Writes rows and JSON records to OUT; `openmla report`, `roofline --rows`, `profile --record` and `tune --record` make
their pages anywhere else. Ends with 1 when a verb failed. Needs openmla on the path; peers that are not installed say so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

SECONDS = 120
SMALL, LARGE = "decode-b4-sq1-hq16-sk32768-bf16", "decode-b128-sq1-hq128-sk4096-bf16"


def verbs(out: Path) -> list[tuple[str, list[str], Path | None]]:
    """(name, arguments, where its JSON goes)."""
    rows = str(out / "rows.jsonl")
    one = ["--suite", "decode_dense", "--case"]
    peers = [part for name in ("flash_mla", "fa3", "flashinfer", "triton_usual", "gemm") for part in ("--peer", name)]
    return [
        ("bench small", ["bench", *one, SMALL, *peers, "--seconds", "0.2", "--out", rows], None),
        ("bench large", ["bench", *one, LARGE, *peers, "--seconds", "0.2", "--out", rows], None),
        ("report", ["report", rows], out / "report.json"),
        ("roofline", ["roofline", "--case", "*b2*", "--seconds", "0.1"], out / "roofline.json"),
        ("profile, auto", ["profile", *one, SMALL], out / "profile.json"),
        ("profile, ncu", ["profile", *one, LARGE, "--tool", "ncu"], out / "profile_ncu.json"),
        ("profile, torch", ["profile", *one, LARGE, "--tool", "torch"], out / "profile_torch.json"),
        (
            "tune",
            [
                "tune",
                *one,
                SMALL,
                "--backend",
                "triton",
                "--parameter",
                "block_n",
                "--seconds",
                "0.05",
                "--table",
                str(out / "tuned.json"),
            ],
            out / "tune.json",
        ),
        ("study", ["study", "--target", "here"], out / "study.json"),
    ]


def main() -> int:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    wanted = sys.argv[2:]
    for name, arguments, record in verbs(out):
        if wanted and name not in wanted:
            continue
        command = [sys.executable, "-m", "openmla", *arguments, *(["--json"] if record else [])]
        begin = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            code, text, error = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as late:
            code, text, error = 124, "", f"killed after {late.timeout} s"
        if record and text:
            record.write_text(text)
        # 1 is a finding (a missed bar, nothing to tune), not a failure, as long as there is a result.
        is_fine = code in (0, 1) and bool(text) and "Traceback" not in error
        if is_fine and record:
            json.loads(text)
        print(f"{'ok  ' if is_fine else 'FAIL'} {name}: exit {code}, {time.perf_counter() - begin:.1f} s", flush=True)
        print(text if not record else "", error[-1500:] if not is_fine else "", sep="\n", flush=True)
        if not is_fine:
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "every verb ran")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
