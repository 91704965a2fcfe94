"""Compile what decode_dense_small.py runs, on a machine with the DSL and no GPU, into one library.

PYTHONPATH=src python tests/gpu/build_decode_dense_small.py OUT.so
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from openmla.backends.cute import schedule
from openmla.backends.cute.decode_dense_small.config import VARIANTS
from openmla.backends.cute.decode_dense_small.launch import build
from openmla.backends.cute.toolchain import compile_kernel, link_bundle


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        compiled = [compile_kernel(schedule.DecodePlan(), schedule.fake_arguments(), "decode_plan", out_dir=scratch)]
        compiled += [build(config, scratch) for config in VARIANTS]
        for each in compiled:
            print(f"{each.name:44} registers {each.resources.registers:4} spills {each.resources.spills}")
        link_bundle([each.object_path for each in compiled], out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
