"""Rows that were never measured, for tests of what reads rows."""

from __future__ import annotations

import dataclasses

from openmla.lab.store import Row

_ROW = Row(
    suite="s", case="decode-b1-sq1-hq16-sk4096-bf16", who="torch", kind="backend", kernel="k", config="",
    policy="balanced", median_us=2.0, p20_us=1.9, p80_us=2.2, n=10, host_us=None, flops=142606336, bytes=4753920,
    tflops=0.1, gbps=1.0, fraction_gemm=0.2, fraction_read=0.1, ratio={}, gate="green", timing="call", cache="cold",
    dtype="bf16", inputs="x", seed=0, environment={"device": "d", "arch": "cpu"},
    ceilings={"read_gbps": 10.0, "gemm_bf16_tflops": 0.5}, utc="2026-11-22T00:00:00Z",
)  # fmt: skip


def row(**changes) -> Row:
    return dataclasses.replace(_ROW, **changes)
